"""Training one run in one process: what it writes, what it refuses before writing, and every way it can end."""

import errno
import json
import math
import os
import signal
import threading
import warnings

import numpy as np
import pytest
import tiny
import torch
from helpers import files_in

from questctl import store
from questctl.config import RunConfig
from questctl.errors import DataError, Diverged, OutOfMemory, Preempted, RunFailed, StorageError, UsageError
from questctl.evaluate.loss import bits_per_byte
from questctl.models.llama import build_model
from questctl.quant.quantizer import Quantizer
from questctl.store import RunStore, checkpoint_steps, load_runs
from questctl.store.lease import LeaseHeld, LeaseLost
from questctl.training import checkpoint, loop
from questctl.training.distributed import SINGLE_PROCESS, World
from questctl.training.loop import train


def run_of(root, config):
    return RunStore(root).run(config.run_id)


def stop_after(steps):
    """A `stop` that says yes when asked for the `steps` + 1st time, which is after that many steps."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= steps


# --- what a run leaves ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root, shown = tmp_path_factory.mktemp("runs"), []
    config = tiny.config(tiny.QUEST, train__steps=150, train__log_every=10, train__eval_every=50)
    result = train(config, runs=root, progress=lambda **values: shown.append(values))
    return root, config, result, shown


def test_it_learns_the_chain(finished):
    """Most of the way from the entropy of single symbols, which needs no context, to the chain's, which no model can beat."""
    _, config, result, _ = finished
    data = loop.load_data(config)
    p = np.bincount(data.train) / len(data.train)
    unigram, entropy = float(-(p * np.log(p)).sum()), data.meta.entropy
    assert entropy < result.loss < entropy + (unigram - entropy) / 3


def test_files(finished):
    root, config, result, _ = finished
    run = run_of(root, config)
    assert files_in(run.path) == [
        "config.json",
        "env.json",
        "metrics.jsonl",
        "model.safetensors",
        "result.json",
        "status.json",
        "timing.jsonl",
    ]
    assert run.config() == config
    assert run.result() == result
    assert (run.state(), run.status().step, run.status().attempts) == ("done", 150, 1)
    assert load_runs(root).loss.tolist() == [result.loss]


def test_metrics_say_nothing_of_time_and_are_means_over_their_windows(finished):
    root, config, _, shown = finished
    metrics, timing = run_of(root, config).metrics(), run_of(root, config).timing()
    assert [m["step"] for m in metrics] == [t["step"] for t in timing] == list(range(10, 151, 10))
    keys = {"step", "tokens", "train_loss(nats/token)", "lr", "grad_norm", "val_loss(nats/token)", "loss_spike(nats/token)"}
    keys |= {"grad_norm_growth(ratio)"}
    keys |= {f"{operand}_{share}(fraction)" for operand in ("weight", "activation") for share in ("trust", "saturation")}
    assert {k for m in metrics for k in m} == keys
    assert [m["step"] for m in metrics if "val_loss(nats/token)" in m] == [50, 100, 150]
    assert [m["tokens"] for m in metrics] == [m["step"] * 8 * 16 for m in metrics]
    assert [s["loss"] for s in shown] == [m["train_loss(nats/token)"] for m in metrics]
    assert shown[-1]["eta_s"] == 0
    assert all(t["tokens/s"] * t["step_time(ms)"] == pytest.approx(128e3) for t in timing)


def test_result_agrees_with_its_parts(finished):
    root, config, result, _ = finished
    last = run_of(root, config).metrics()[-1]
    assert (result.loss, result.train_loss) == (last["val_loss(nats/token)"], last["train_loss(nats/token)"])
    assert result.tokens == 150 * 8 * 16
    assert result.bits_per_byte == bits_per_byte(result.loss, None) is None  # symbols of a chain are no bytes
    assert (result.w_grid_bits, result.a_grid_bits, result.w_stored_bits, result.scheme) == (4, 4, 4, "quest-w4a4")
    n = config.model.params_non_embedding
    norms = (2 * 2 + 1) * 32
    assert result.model_bits == 4 * (n - norms) + 16 * norms
    assert result.params_total == n + 2 * 16 * 32
    matrices = n - norms + 16 * 32
    assert result.flops == pytest.approx(result.tokens * 3 * (2 * matrices + 4 * 16 * 32 * 2))
    assert result.val_tokens == 256
    assert result.tokens_per_s * result.seconds >= result.tokens
    assert result.peak_memory_bytes > 50e6


def test_weights_load_and_give_the_loss_of_the_result(finished):
    root, config, result, _ = finished
    data = loop.load_data(config)
    trainer = loop.Trainer(config, data, torch.device("cpu"), stop=lambda: False)
    trainer.model.load_state_dict(checkpoint.load_tensors(run_of(root, config).model_path))
    with loop.execution(1, torch.device("cpu")):
        found = loop.evaluate(trainer.loss, data.val, seq_len=16, max_tokens=256, batch_size=8)
    assert found == result.loss


def test_environment_is_recorded(finished):
    root, config, result, _ = finished
    env = run_of(root, config).env()
    assert env["data_hash"] == result.data_hash == loop.load_data(config).data_hash
    assert env["threads"] == 1
    (attempt,) = env["attempts"]
    assert attempt["torch"] == torch.__version__
    assert {"command", "host", "python", "questctl", "cpu", "gpu", "commit", "diff_sha256", "started_at"} <= attempt.keys()


def test_a_finished_run_answers_at_once(finished, monkeypatch):
    root, config, result, _ = finished
    before = files_in(root)
    monkeypatch.setattr(loop, "load_data", lambda *_: pytest.fail("trains again"))
    assert train(config, runs=root) == result
    assert files_in(root) == before


def test_the_first_steps_are_what_they_should_be(tmp_path):
    """Against a plain loop written here: torch's AdamW, no machinery."""
    config = tiny.config(train__steps=6, train__log_every=1)
    train(config, runs=tmp_path)
    data = loop.load_data(config)
    model = build_model(config.model.model_copy(update={"vocab_size": 16}), config.quant, 0)
    decayed = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is d for d in decayed)]
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95), weight_decay=0.1)
    for step, line in enumerate(run_of(tmp_path, config).metrics()):
        batch = torch.from_numpy(loop.sampler.batch(data.train, seed=0, step=step, batch_size=8, seq_len=16))
        loss = model(batch[:, :-1], batch[:, 1:])
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = loop.learning_rate(step, 6, config.optim)
        adamw.step()
        found = [line["train_loss(nats/token)"], line["grad_norm"], line["lr"]]
        assert found == pytest.approx([float(loss.detach()), float(norm), adamw.param_groups[0]["lr"]], rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_gives_the_same_run(tmp_path, micro_batch):
    whole = train(tiny.config(), runs=tmp_path / "whole")
    parts = train(tiny.config(train__micro_batch=micro_batch), runs=tmp_path / "parts")
    assert parts.run == whole.run
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
    assert parts.loss != whole.loss  # it did go another way


def test_clipping_limits_what_an_outlier_does():
    """Planted: the gradient of one step is 10⁴ times too long. How far are the weights off, five steps later?

    Below the usual norm of 0.9, clipping leaves nothing of the outlier but its direction. At 1 the outlier enters with norm 1
    in place of 0.9. Without clipping it fills both moments of AdamW, which follow it for many steps.
    """

    def weights(clip, factor):
        """All weights after 8 steps, and the first moment's share of the gradient of step 3: g = (m₃ − β₁m₂) / (1 − β₁)."""
        config = tiny.config(optim__grad_clip=clip)
        trainer = loop.Trainer(config, loop.load_data(config), torch.device("cpu"), stop=lambda: False)
        gradient = trainer.forward_backward

        def planted(step):
            loss = gradient(step)
            for p in trainer.model.parameters():
                p.grad.mul_(factor if step == 3 else 1.0)
            return loss

        trainer.forward_backward = planted
        for step in range(8):
            before = moments(trainer)
            trainer.step()
            if step == 3:
                used = (moments(trainer) - config.optim.beta1 * before) / (1 - config.optim.beta1)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), float(used.norm())

    def moments(trainer):
        named = trainer.optimizer.tensors()
        return torch.cat([m.flatten() for name, m in named.items() if name.endswith("/exp_avg")])

    distance = {}
    for clip in (0.0, 1.0, 0.1):
        calm, usual = weights(clip, 1.0)
        hit, used = weights(clip, 1e4)
        distance[clip] = float((hit - calm).norm())
        assert used == pytest.approx(clip or 1e4 * usual, rel=1e-3)
    assert distance[0.1] < 1e-4
    assert distance[0.1] < distance[1.0] < 0.1 * distance[0.0]
    assert distance[0.0] > 1


def trainer_of(config, world=SINGLE_PROCESS):
    return loop.Trainer(config, loop.load_data(config), torch.device("cpu"), stop=lambda: False, world=world)


def scales_and_optima(trainer):
    """(learned scale, Gaussian optimum of what it rounds in the first sequences of the present batch) of every quantizer."""
    pairs = []

    def look(quantizer, args):
        z = args[0].detach().double() - (0 if quantizer.offset is None else quantizer.offset.double().item())
        pairs.append((quantizer.scale.item(), quantizer.spec.grid.unit * z.square().mean().sqrt().item()))

    hooks = [m.register_forward_pre_hook(look) for m in trainer.model.modules() if isinstance(m, Quantizer)]
    with torch.no_grad():
        trainer.model(trainer.calibration_batch())
    for hook in hooks:
        hook.remove()
    return pairs


def test_learned_scales_are_set_from_data_again_and_again_until_the_warm_up_ends():
    """Weights and inputs of layers that share their input or not; in between gradients move them."""
    config = tiny.config(
        tiny.LSQ | {"quant.method": "lsq+"}, train__steps=40, optim__warmup_frac=0.5, optim__scale_calibrations=4
    )
    trainer = trainer_of(config)
    moved = 0.0
    for step in range(24):
        if step in (0, 5, 10, 15, 20):
            moved = max(moved, *(abs(s / o - 1) for s, o in scales_and_optima(trainer)))
            trainer.calibrate()
            pairs = scales_and_optima(trainer)
            assert len(pairs) == 2 * 2 * 7
            assert all(s == pytest.approx(o, rel=1e-4) for s, o in pairs)
        trainer.step()
    assert moved > 0.1
    assert all(s > 0 for s, _ in scales_and_optima(trainer))


@pytest.mark.slow
def test_an_input_that_grows_in_training_is_not_clamped_at_the_end(tmp_path):
    """Calibrated on the untrained network alone, the inputs of o and down outgrow their scales: what runs did before."""
    clamped = {}
    before = {"optim.scale_calibrations": 0, "optim.scale_update": "absolute", "optim.scale_lr": 1.0}
    for name, changes in {"now": {}, "before": before}.items():
        config = tiny.config(tiny.LSQ | changes, train__steps=60, train__log_every=60, optim__lr=4e-3)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            train(config, runs=tmp_path)
        line = run_of(tmp_path, config).metrics()[-1]
        clamped[name] = max(line["activation_saturation(fraction)"].values()), [str(w.message) for w in warned]
    assert clamped["now"][0] < 0.25
    assert clamped["now"][1] == []
    assert clamped["before"][0] > 0.5
    assert "of the entries are clamped in blocks." in clamped["before"][1][-1]


def test_a_bad_step_ends_calibration(tmp_path):
    trainer = trainer_of(tiny.config(tiny.LSQ))
    trainer.step()
    trainer._bad.fill_(1.0)
    trainer.counters.step = 3
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.calibrate()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


# --- random rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro_batch", "processes"), [(1, 1), (4, 1), (2, 2)])
def test_stochastic_grids_round_a_batch_alike_however_it_is_split(micro_batch, processes):
    """One run name is one experiment: micro-batches and processes are no part of it."""
    words = {f"quant.{x}": "int4.sr-h16.s-rms.g16-ste" for x in ("weights", "activations", "gradients")}
    whole = trainer_of(tiny.config(words))
    whole.forward_backward(3)
    split = tiny.config(words, train__micro_batch=micro_batch)
    assert split.run_id == whole.config.run_id
    parts = [trainer_of(split, World(rank=rank, size=processes)) for rank in range(processes)]
    for part in parts:
        part.forward_backward(3)
    for p, *own in zip(whole.model.parameters(), *(part.model.parameters() for part in parts), strict=True):
        mean = torch.stack([q.grad for q in own]).mean(0)
        torch.testing.assert_close(mean, p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item())


# --- refused before anything is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.source": "synthetic:markov?vocab=16&tokens=300", "data.seq_len": 64}, "is too small"),
        ({"data.source": "file:/nowhere.txt"}, "no file matches"),
        ({"model.vocab_size": 15}, "model.vocab_size: 15 is smaller than the 16 ids"),
        ({"train.device": "cuda:7"}, "train.device: 'cuda:7' is not on this machine"),
        ({("quant", "overrides", "blocks.*.dwn", "weights"): "int4-rms-ste"}, "quant.overrides: unknown layer"),
        ({("quant", "overrides", "blocks.*.down", "weights"): "int4-h128-rms-trust"}, "layer blocks.0.down"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, changes, sentence):
    with pytest.raises((UsageError, DataError)) as e:
        train(tiny.config(changes), runs=tmp_path / "runs")
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        train(tiny.config(), runs=tmp_path / "file")


def test_other_data_under_the_same_run_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    config = tiny.config({"data.source": f"file:{text}"})
    with pytest.raises(Preempted):
        train(config, runs=tmp_path / "runs", stop=stop_after(5))
    text.write_text("lorem ipsum dolor sit amet\n" * 300)
    with pytest.raises(UsageError, match=r"is not the text that the run began with"):
        train(config, runs=tmp_path / "runs")
    assert run_of(tmp_path / "runs", config).status().attempts == 1


def test_damaged_run_folders_are_named(tmp_path):
    config = tiny.config()
    run = run_of(tmp_path, config)
    with pytest.raises(Preempted):
        train(config, runs=tmp_path, stop=stop_after(5))
    for name in ("status.json", "config.json", "env.json"):
        whole = (run.path / name).read_bytes()
        (run.path / name).write_bytes(whole[:-20])
        with pytest.raises(DataError, match=rf"{name}: is damaged"):
            train(config, runs=tmp_path)
        (run.path / name).write_bytes(whole)
    for path in run.checkpoints_path.glob("step-*"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.warns(match="going back"), pytest.raises(DataError, match="none before it"):
        train(config, runs=tmp_path)


def test_a_run_that_is_being_trained_is_refused(tmp_path):
    config, refused = tiny.config(), []

    def meanwhile(**_):
        try:
            train(config, runs=tmp_path)
        except LeaseHeld as e:
            refused.append(str(e))

    train(config, runs=tmp_path, progress=meanwhile)
    assert len(refused) == 6
    assert f"process {os.getpid()}" in refused[0]


def test_a_run_that_another_process_finishes_meanwhile_is_not_trained_again(tmp_path, monkeypatch):
    config, real = tiny.config(), loop.load_data

    def slow(*args):
        monkeypatch.setattr(loop, "load_data", real)
        train(config, runs=tmp_path)
        return real(*args)

    monkeypatch.setattr(loop, "load_data", slow)
    assert train(config, runs=tmp_path).attempts == 1
    assert run_of(tmp_path, config).status().attempts == 1
    assert len(run_of(tmp_path, config).metrics()) == 6


def test_a_run_taken_over_stops_and_leaves_its_successor_alone(tmp_path):
    config = tiny.config(train__steps=40)
    run = run_of(tmp_path, config)

    def steal(*, step, **_):
        if step == 6:
            os.utime(run.lease_path, (0, 0))
            train(config, runs=tmp_path)

    with pytest.raises(LeaseLost):
        train(config, runs=tmp_path, progress=steal)
    assert run.state() == "done"
    assert tiny.outcome(run.path)["metrics.jsonl"].count(b"\n") == 20


def test_what_a_successor_does_to_its_files_is_no_failure_of_the_disk(tmp_path, monkeypatch):
    config = tiny.config(train__steps=40, train__checkpoint_every=40)  # written at the end, and waited for
    run, save = run_of(tmp_path, config), checkpoint.save

    def taken_over(*args, **how):
        monkeypatch.setattr(checkpoint, "save", save)
        os.utime(run.lease_path, (0, 0))
        train(config, runs=tmp_path)
        raise FileNotFoundError(2, "No such file or directory", "step")

    monkeypatch.setattr(checkpoint, "save", taken_over)
    with pytest.raises(LeaseLost):
        train(config, runs=tmp_path)
    assert run.state() == "done"


def test_the_time_that_is_left_is_judged_without_the_first_step(tmp_path, monkeypatch):
    """Of a run whose first step takes ten times as long as the others, as where kernels are compiled."""
    clock = [0.0]
    real = loop.Trainer.step

    def step(self):
        clock[0] += 10.0 if self._warm is None else 1.0
        real(self)

    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(loop.Trainer, "step", step)
    shown = []
    train(tiny.config(train__steps=6, train__log_every=1), runs=tmp_path, progress=lambda **values: shown.append(values))
    assert math.isnan(shown[0]["eta_s"])
    assert [values["eta_s"] for values in shown[1:]] == [4, 3, 2, 1, 0]
    speeds = [128 / 10] + [128] * 5  # each is what was measured
    assert [values["tokens_per_s"] for values in shown] == speeds
    shown.clear()
    train(tiny.config(train__steps=6, train__log_every=3), runs=tmp_path, progress=lambda **values: shown.append(values))
    assert [values["eta_s"] for values in shown] == []  # finished before
    train(tiny.config(train__steps=9, train__log_every=3), runs=tmp_path, progress=lambda **values: shown.append(values))
    assert [values["eta_s"] for values in shown] == [6, 3, 0]


@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_run_knows_its_speed(tmp_path, monkeypatch, stop):
    """Stopped at a step whose report is still to come, and in the middle of a window."""
    clock = [0.0]
    real = loop.Trainer.step

    def step(self):
        clock[0] += 1.0
        real(self)

    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(loop.Trainer, "step", step)
    config = tiny.config(train__steps=12, train__log_every=2)
    steps = iter(range(100))
    with pytest.raises(Preempted):
        train(config, runs=tmp_path, stop=lambda: next(steps) == stop)
    shown = []
    train(config, runs=tmp_path, progress=lambda **values: shown.append(values))
    assert [values["step"] for values in shown] == list(range(4 if stop == 4 else 6, 13, 2))
    first, *others = shown
    assert first["eta_s"] == pytest.approx(12 - first["step"]) or (stop == 5 and math.isnan(first["eta_s"]))
    assert [values["eta_s"] for values in others] == [12 - values["step"] for values in others]
    assert {values["tokens_per_s"] for values in shown} == {128.0}
    assert {line["tokens/s"] for line in run_of(tmp_path, config).timing()} == {128.0}


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(tiny.config(), runs=tmp_path, progress=lambda **_: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.attempts == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_signals_end_it_after_a_checkpoint(tmp_path, name):
    config, handlers = tiny.config(), signal.getsignal(getattr(signal, name))
    run = run_of(tmp_path, config)

    def send(*, step, **_):
        if step == 6:
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else Preempted):
        train(config, runs=tmp_path, progress=send)
    assert signal.getsignal(getattr(signal, name)) == handlers
    assert (run.state(), checkpoint_steps(run.checkpoints_path)[-1]) == ("preempted", 7)
    assert run.status().message == f"stopped by {name} at step 7/12; repeat the command to resume."
    assert train(config, runs=tmp_path).attempts == 2


def test_it_trains_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(tiny.config(), runs=tmp_path)))
    thread.start()
    thread.join()
    assert results[0].steps == 12


def test_stopped_before_the_first_step_it_begins_anew(tmp_path):
    config = tiny.config()
    with pytest.raises(Preempted, match="step 0/12"):
        train(config, runs=tmp_path, stop=lambda: True)
    assert not run_of(tmp_path, config).checkpoints_path.exists()
    assert train(config, runs=tmp_path).attempts == 2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_divergence_is_found_kept_and_named(tmp_path, name):
    config = tiny.config(optim__name=name, optim__lr=1e30, train__log_every=5)
    run = run_of(tmp_path, config)
    with pytest.raises(Diverged, match=r"diverged at step \d+/12: .* is not finite; the state before it is kept") as e:
        train(config, runs=tmp_path)
    status = run.status()
    assert (run.state(), e.value.exit_code) == ("diverged", 4)
    assert status.message in str(e.value)
    assert run.result() is None
    latest = checkpoint.load_latest(run.checkpoints_path)
    assert latest.step == status.step
    assert all(t.isfinite().all() for t in [*latest.model.values(), *latest.optimizer.values()])
    assert all(math.isfinite(m["train_loss(nats/token)"]) for m in run.metrics())
    with pytest.raises(Diverged) as again:  # from the state that was kept, the same step goes wrong at once
        train(config, runs=tmp_path)
    assert str(again.value) == str(e.value)


def test_a_norm_that_overflows_is_told_apart_from_gradients_that_do(tmp_path, monkeypatch):
    real = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: real(gradients) * math.inf)
    told = "step 0/12: the norm of the gradients is not finite, although each gradient is; the state before it is kept"
    with pytest.raises(Diverged, match=told):
        train(tiny.config(), runs=tmp_path)


PLANTED = {
    "parameter blocks.1.up.weight": lambda m: m.blocks[1].up.weight.data.fill_(math.inf),
    "output of blocks.0.o": lambda m: m.blocks[0].o.register_forward_hook(lambda *a: a[2] * math.nan),
    "gradient of blocks.1.v.weight": lambda m: m.blocks[1].v.weight.register_hook(lambda g: g * math.inf),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("step", [0, 5, 11])
def test_the_first_bad_tensor_and_its_step_are_named(tmp_path, monkeypatch, name, step):
    real = loop.Trainer.step

    def poisoned(self):
        if self.counters.step == step:
            PLANTED[name](self.model)
        real(self)

    monkeypatch.setattr(loop.Trainer, "step", poisoned)
    with pytest.raises(Diverged, match=f"step {step}/12: {name} is not finite"):
        train(tiny.config(train__log_every=4), runs=tmp_path)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_during_a_checkpoint(tmp_path, monkeypatch):
    config = tiny.config()
    run, real = run_of(tmp_path, config), checkpoint._write
    undisturbed = run_of(tmp_path / "other", config)
    train(config, runs=tmp_path / "other")
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "_write", lambda path, data: full() if "00000008" in str(path) else real(path, data))
        with pytest.raises(StorageError, match=r"cannot be written: No space left on device; the last checkpoint is intact\."):
            train(config, runs=tmp_path)
    assert run.state() == "failed"
    assert run.status().step >= 8  # the checkpoint was written beside the steps that followed
    assert "No space left" in run.status().message
    assert checkpoint_steps(run.checkpoints_path) == [4]
    assert not run.lease_path.exists()
    train(config, runs=tmp_path)
    assert tiny.outcome(run.path) == tiny.outcome(undisturbed.path)


def test_a_disk_that_fills_up_during_a_metrics_line(tmp_path, monkeypatch):
    config = tiny.config()
    run, append_lines = run_of(tmp_path, config), store.runs.append_lines

    def append_until_full(path, values):
        if values[-1]["step"] >= 6:
            raise StorageError(f"{path}: full.")
        return append_lines(path, values)

    with monkeypatch.context() as m:
        m.setattr(store.runs, "append_lines", append_until_full)
        with pytest.raises(StorageError):
            train(config, runs=tmp_path)
    assert run.state() == "failed"
    assert train(config, runs=tmp_path).attempts == 2


def test_out_of_memory_says_what_to_do(tmp_path, monkeypatch):
    def exhausted(self):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(loop.Trainer, "step", exhausted)
    with pytest.raises(RunFailed, match=r"out of memory at 8 sequences per backward pass; set train\.micro_batch"):
        train(tiny.config(), runs=tmp_path)
    assert run_of(tmp_path, tiny.config()).state() == "failed"


def test_a_mistake_of_ours_is_recorded_and_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Trainer, "step", lambda self: {}["missing"])
    with pytest.raises(KeyError):
        train(tiny.config(), runs=tmp_path)
    assert run_of(tmp_path, tiny.config()).status().state == "failed"


# --- execution --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_as_it_began_and_says_so(tmp_path):
    with pytest.raises(Preempted):
        train(tiny.config(), runs=tmp_path, stop=stop_after(5))
    with pytest.warns(match=r"train.log_every: .* began with 2 and continues with it"):
        train(tiny.config(train__log_every=3), runs=tmp_path)
    assert [m["step"] for m in run_of(tmp_path, tiny.config()).metrics()] == [2, 4, 6, 8, 10, 12]


def test_the_thread_count_is_recorded_kept_and_put_back(tmp_path, monkeypatch):
    before, seen, real = torch.get_num_threads(), [], loop.Trainer.step

    def step(self):
        seen.append(torch.get_num_threads())
        real(self)

    monkeypatch.setattr(loop.Trainer, "step", step)
    config = tiny.config(train__threads=0)
    monkeypatch.setattr(loop.torch, "get_num_threads", lambda: 2)
    with pytest.raises(Preempted):
        train(config, runs=tmp_path, stop=stop_after(5))
    monkeypatch.undo()
    monkeypatch.setattr(loop.Trainer, "step", step)
    torch.set_num_threads(before)
    train(config, runs=tmp_path)
    assert set(seen) == {2}
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_compiled_weights_carry_plain_names(tmp_path):
    """`torch.compile` prefixes the names of the module that it returns; files must not know."""
    names = set(checkpoint.load_tensors(_trained(tmp_path).model_path))
    assert all(not n.startswith("_orig_mod") for n in names)
    assert "blocks.0.q.weight" in names


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("no kernel for the backward pass")


def _fails_forward(model):
    def call(*inputs):
        raise NotImplementedError("an intermediate tensor 'u' aliases\nand so on")

    return call


@pytest.mark.parametrize(
    ("compiler", "named"),
    [
        (_fails_forward, "NotImplementedError: an intermediate tensor 'u' aliases"),
        (lambda model: lambda *inputs: _FailsBackward.apply(model(*inputs)), "RuntimeError: no kernel for the backward pass"),
    ],
)
@pytest.mark.parametrize("rows", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_whose_compilation_fails_goes_on_without_it(compiler, named, rows, tmp_path, monkeypatch):
    plain = train(tiny.config(tiny.QUEST, train__micro_batch=rows), runs=tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.warns(UserWarning, match="torch.compile fails") as caught:
        again = train(tiny.config(tiny.QUEST, train__compile="on", train__micro_batch=rows), runs=tmp_path / "compiled")
    (warning,) = [str(w.message) for w in caught if "torch.compile" in str(w.message)]
    assert named in warning
    assert "and so on" not in warning
    assert (again.loss, again.train_loss) == (plain.loss, plain.train_loss)


def test_an_error_that_is_not_the_compiler_s_is_raised(tmp_path, monkeypatch):
    def out_of_memory(*inputs):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch, "compile", lambda model: out_of_memory)
    with pytest.raises(OutOfMemory):
        train(tiny.config(train__compile="on"), runs=tmp_path)


def test_a_validation_on_a_cpu_is_not_compiled(tmp_path, monkeypatch):
    """It is shorter than its compilation, which would be another one than that of the steps."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model: lambda *inputs: calls.append(torch.is_grad_enabled()) or model(*inputs))
    train(tiny.config(train__compile="on"), runs=tmp_path)
    assert calls == [True] * 12


@pytest.mark.parametrize(
    "changes", [{}, *(pytest.param(c, marks=pytest.mark.slow) for c in (tiny.LSQ, tiny.QUEST | {"train.kernels": "fused"}))]
)
def test_steps_and_validations_of_all_batch_sizes_are_two_graphs(changes, monkeypatch):
    """As on a GPU, where validations are compiled, too: their last batch is smaller than the others."""
    graphs, compiler = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend=backend, fullgraph=True))
    monkeypatch.setattr(loop.Trainer, "_compiles_validation", True)
    torch.compiler.reset()
    c = tiny.config(changes, train__compile="on", data__seq_len=23, train__micro_batch=4)  # a length without rotary tables yet
    trainer = loop.Trainer(c, loop.load_data(c), torch.device("cpu"), stop=lambda: False)
    try:
        for _ in range(2):
            trainer.step()
            with torch.no_grad():
                for rows in (8, 8, 5, 3):
                    trainer.loss(*loop.parts(trainer.batch(0)[:rows]))
        assert trainer._forward is not trainer._plain
        assert len(graphs) == 2
    finally:
        torch.compiler.reset()


def _trained(root):
    train(tiny.config(), runs=root)
    return run_of(root, tiny.config())


def test_metadata_of_the_weights_rebuilds_the_model(tmp_path):
    import safetensors

    run = _trained(tmp_path)
    with safetensors.safe_open(run.model_path, "pt") as f:
        about = json.loads(f.metadata()["questctl"])
    assert RunConfig.from_json(about["config"]).run_id == about["run"] == run.name


def test_the_file_of_the_weights_does_not_say_how_they_were_computed(tmp_path):
    """Equal weights of one experiment are equal files, with one hash."""
    files = []
    for name, how in {"a": {}, "b": {"train__log_every": 3, "train__checkpoint_every": 5, "train__health_every": 2}}.items():
        config = tiny.config(**how)
        train(config, runs=tmp_path / name)
        files.append(run_of(tmp_path / name, config).model_path.read_bytes())
    assert files[0] == files[1]
