"""One run in several processes: the curve of one process, the checkpoints of any number of them, and one way out for all."""

import os
import socket
from contextlib import nullcontext
from multiprocessing import forkserver

import pytest
import tiny
import torch

from questctl.errors import Preempted, RunFailed, UsageError
from questctl.store import RunStore, checkpoint_steps
from questctl.training import checkpoint, distributed, loop
from questctl.training.distributed import SINGLE_PROCESS, threads_each
from questctl.training.group import free_port
from questctl.training.loop import train

# Gradients are summed in another order than in one process. Where weights are rounded to levels, a last bit may tip one to the
# next level, and the curves part; so there one process takes the halves of its batch one after the other: the same sum.
HALVES = {"train.micro_batch": 4, "optim.grad_clip": 0.0}
MUON = {"optim.name": "muon"}
RANDOM = {f"quant.{x}": "int4.sr-rms-ste" for x in ("weights", "activations", "gradients")}
BY_ROW = {"quant.embedding": "int4-h32-rms-trust", "quant.kv": "int4-rms-ste"}
TWO = [
    pytest.param("ddp", tiny.config({**tiny.QUEST, **HALVES}), id="ddp-quest"),
    pytest.param("fsdp", tiny.config(MUON, train__micro_batch=2), id="fsdp-muon-accumulated"),
    pytest.param("ddp", tiny.config(MUON), id="ddp-muon", marks=pytest.mark.slow),
    pytest.param("fsdp", tiny.config(train__micro_batch=2), id="fsdp-bf16-accumulated", marks=pytest.mark.slow),
    pytest.param("fsdp", tiny.config({**tiny.LSQ, **HALVES, "quant.method": "lsq+"}), id="fsdp-lsq+", marks=pytest.mark.slow),
    pytest.param("ddp", tiny.config({**tiny.LSQ, **HALVES}), id="ddp-lsq", marks=pytest.mark.slow),
    pytest.param("ddp", tiny.config({**RANDOM, **HALVES}), id="ddp-random", marks=pytest.mark.slow),
    pytest.param("ddp", tiny.config(train__micro_batch=2), id="ddp-bf16-accumulated", marks=pytest.mark.slow),
    *(
        pytest.param(how, tiny.config({**HALVES, **BY_ROW, **head}), id=f"{how}-by-row-{name}", marks=pytest.mark.slow)
        for how in ("ddp", "fsdp")
        for name, head in (("head", {"quant.head": "int4-h32-rms-trust"}), ("tied", {"model.tied": True}))
    ),
]
# What corrects or averages weights keeps sums, snapshots and averages of each parameter beside the optimizer's moments.
CORRECTED = {"optim.cage": 10.0, "optim.cage_from": 0.25, "optim.reset_ratio": 1.5, "optim.reset_window": 3}
RATES = {"optim.embedding_lr": 2.0, "optim.hidden_lr": 0.7, "model.base_width": 16}
KEPT = {
    "muon-ema": {**tiny.QUEST, **CORRECTED, **MUON, **RATES, "optim.average": "ema:0.9"},
    "adamw-lawa": {**tiny.QUEST, **CORRECTED, **RATES, "optim.average": "lawa:2:3"},
    "paretoq": {"quant.method": "paretoq", "quant.bits": 2, **CORRECTED},
    "paretoq-muon": {"quant.method": "paretoq", "quant.bits": "ternary", **MUON, "optim.average": "ema:0.9"},
    "lsq": {**tiny.LSQ, "optim.average": "lawa:2:3"},
    "squares": {"quant.method": "nvfp4-2d", **CORRECTED},
}
STATES = [
    pytest.param(how, name, marks=[] if (how, name) == ("ddp", "adamw-lawa") else pytest.mark.slow)
    for how in ("ddp", "fsdp")
    for name in KEPT
]
STAGES = {"quant.stages": "4:lsq-w8a8", "quant.start": 7}
PREEMPTED = Preempted.exit_code


@pytest.fixture(scope="module")
def server():
    """What forks the processes has imported what they share a model with: that takes longer than their runs."""
    forkserver._forkserver._stop()
    parts = ("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo")
    forkserver.set_forkserver_preload(["questctl.training.loop", *parts])
    forkserver.ensure_running()


def together(n, root, config, parallel, work=None):
    """Train in n processes, `work(rank)` first in each; their exit codes."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"parallel": parallel})})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environ = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "QUESTCTL_CACHE": os.environ["QUESTCTL_CACHE"],
    }
    children = [tiny.start(_one, environ | {"RANK": str(r), "LOCAL_RANK": str(r)}, root, config, work) for r in range(n)]
    for child in children:
        child.join(300)
    return [child.exitcode for child in children]


def _one(environ, root, config, work):
    os.environ.update(environ)
    rank = int(environ["RANK"])
    stop = work(rank) if work else None
    try:
        train(config, runs=root, stop=stop)
    except Preempted as e:
        os._exit(e.exit_code)


class StopAfter:
    """Rank 1 alone says stop, after so many steps of its own."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, rank):
        asked = iter(range(10**6))
        return lambda: next(asked) >= self.steps and rank == 1


def curve(root, config):
    """All that the metric lines say, as numbers by line and name; masks flattened."""
    found = {}
    for line in RunStore(root).run(config.run_id).metrics():
        for key, value in line.items():
            for name, x in value.items() if isinstance(value, dict) else [("", value)]:
                found[line["step"], key, name] = x
    return found


def same_curve(root, other, config, tolerance=1e-5):
    a, b = curve(root, config), curve(other, config)
    assert a.keys() == b.keys()
    for key, x in a.items():
        limit = {"loss_spike(nats/token)": 10 * tolerance, "grad_norm": 1e-4, "grad_norm_growth(ratio)": 1e-3}
        masks = key[1].endswith("(fraction)")  # an entry at an edge of its mask may fall on either side
        assert abs(x - b[key]) <= (2e-3 if masks else limit.get(key[1], tolerance)), (key, x, b[key])
    return True


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("parallel", "config"), TWO)
def test_two_processes_train_as_one(tmp_path, parallel, config):
    assert together(2, tmp_path / "two", config, parallel) == [0, 0]
    alone = train(config, runs=tmp_path / "one")
    run = RunStore(tmp_path / "two").run(config.run_id)
    assert same_curve(tmp_path / "two", tmp_path / "one", config)
    assert run.result().loss == pytest.approx(alone.loss, abs=1e-5)
    assert [a["processes"] for a in run.env()["attempts"]] == [2]
    assert sorted(p.name for p in run.path.iterdir()) == sorted(p.name for p in (tmp_path / "one" / run.name).iterdir())
    weights = [checkpoint.load_tensors(tmp_path / x / run.name / "model.safetensors") for x in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("parallel", "name"), STATES)
def test_the_state_of_each_optimizer_and_method_is_that_of_one_process_and_resumes_bit_for_bit(tmp_path, parallel, name):
    """Two as one to 1e-5, averages included; stopped within a window and resumed, the bits of two that were not."""
    config = tiny.config({**HALVES, **KEPT[name]})
    assert together(2, tmp_path / "two", config, parallel) == [0, 0]
    assert together(2, tmp_path / "stopped", config, parallel, StopAfter(7)) == [PREEMPTED] * 2
    assert RunStore(tmp_path / "stopped").run(config.run_id).status().step == 7
    assert together(2, tmp_path / "stopped", config, parallel) == [0, 0]
    train(config, runs=tmp_path / "one")
    two, stopped, one = (RunStore(tmp_path / x).run(config.run_id) for x in ("two", "stopped", "one"))
    names = ["model.safetensors", "metrics.jsonl"] + ["average.safetensors"] * bool(config.optim.average)
    assert all((two.path / name).read_bytes() == (stopped.path / name).read_bytes() for name in names)
    assert same_curve(tmp_path / "two", tmp_path / "one", config)
    assert two.result().loss == pytest.approx(one.result().loss, abs=1e-5)
    assert two.result().loss_average == pytest.approx(one.result().loss_average, abs=1e-5)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_tied_grouped_model_learns_from_a_teacher_in_two_processes_as_in_one(tmp_path, parallel):
    first = tiny.config(train__steps=4)
    train(first, runs=tmp_path)
    shape = {"model.tied": True, "model.n_kv_head": 1, "model.bias": "qkv", "model.qk_norm": True}
    taught = {"teacher.source": str(tmp_path / first.run_id), "teacher.top_k": 3}
    config = tiny.config({**shape, **taught, "train.micro_batch": 2, "train.steps": 6})
    assert together(2, tmp_path / "two", config, parallel) == [0, 0]
    alone = train(config, runs=tmp_path / "one")
    assert same_curve(tmp_path / "two", tmp_path / "one", config)
    assert RunStore(tmp_path / "two").run(config.run_id).result().loss == pytest.approx(alone.loss, abs=1e-5)


@pytest.fixture(autouse=True)
def plain_accumulation(monkeypatch):
    """One process would quantize weights once for both halves, and add their gradients before the mask: another last bit."""
    monkeypatch.setattr(loop, "quantized_once", lambda *_: nullcontext())


def each_goes_on_from_the_others(tmp_path, n, config):
    """DDP → FSDP2 → one process → FSDP2 → DDP, stopped after every third step but one; the first writes what all read.

    The model changes its quantizers in the second attempt and at the beginning of the fourth.
    """
    whole = train(config, runs=tmp_path / "one")
    root = tmp_path / "many"
    run = RunStore(root).run(config.run_id)
    asked = iter(range(100))
    assert together(n, root, config, "ddp", StopAfter(3)) == [PREEMPTED] * n
    assert run.status().step == 3
    assert together(n, root, config, "fsdp", StopAfter(2)) == [PREEMPTED] * n
    with pytest.raises(Preempted, match="step 7/12"):
        train(config, runs=root, stop=lambda: next(asked) >= 2)
    assert together(n, root, config, "fsdp", StopAfter(2)) == [PREEMPTED] * n
    files = [p.name for p in (run.checkpoints_path / "step-00000009").iterdir()]
    assert sum(name.startswith("shard-") for name in files) == n
    assert together(n, root, config, "ddp") == [0] * n
    assert same_curve(root, tmp_path / "one", config)
    assert run.result().loss == pytest.approx(whole.loss, abs=1e-5)
    assert run.result().attempts == 5


@pytest.mark.usefixtures("server")
def test_each_goes_on_from_the_others(tmp_path):
    each_goes_on_from_the_others(tmp_path, 2, tiny.config({**tiny.LSQ, **HALVES, **MUON, **STAGES}))


@pytest.mark.slow
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_train_as_one(tmp_path, parallel):
    config = tiny.config(train__steps=30, train__checkpoint_every=10)
    assert together(4, tmp_path / "four", config, parallel) == [0] * 4
    train(config, runs=tmp_path / "one")
    assert same_curve(tmp_path / "four", tmp_path / "one", config)


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_each_of_four_goes_on_from_the_others(tmp_path):
    each_goes_on_from_the_others(tmp_path, 4, tiny.config())


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_a_damaged_shard_costs_time_and_nothing_else(tmp_path):
    config = tiny.config()
    assert together(2, tmp_path / "two", config, "fsdp", StopAfter(9)) == [PREEMPTED] * 2
    folder = RunStore(tmp_path / "two").run(config.run_id).checkpoints_path
    assert checkpoint_steps(folder) == [8, 9]
    shard = folder / "step-00000009" / "shard-00002-model-00001-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 4
    shard.write_bytes(data)
    assert together(2, tmp_path / "two", config, "fsdp") == [0, 0]
    train(config, runs=tmp_path / "one")
    assert same_curve(tmp_path / "two", tmp_path / "one", config)


def test_torch_reads_what_one_process_wrote(tmp_path):
    """Through torch.distributed.checkpoint itself."""
    import torch.distributed.checkpoint as dcp

    generator = torch.Generator().manual_seed(0)
    model = {"a.weight": torch.randn(3, 5, generator=generator), "a.scale": torch.randn(1, generator=generator)}
    moments = {f"{name}/exp_avg": t * 2 for name, t in model.items()}
    path = checkpoint.save(tmp_path, checkpoint.Checkpoint(4, model, moments, {"step": 4}))
    read = {name: torch.full_like(t, torch.nan) for name, t in {**model, **moments}.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(torch.equal(t, read[name]) for name, t in {**model, **moments}.items())
    assert not [p for p in path.iterdir() if p.suffix not in (".safetensors", ".json")]  # nothing that could run


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"train\.batch_size: 8 sequences cannot be shared equally by 3 processes"):
        train(tiny.config(), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_processes_that_do_not_meet_say_where_and_what_to_do(tmp_path, monkeypatch):
    """Rank 0 waits for a second process, which nobody starts; so does rank 1 for rank 0."""
    monkeypatch.setenv("QUESTCTL_RENDEZVOUS_S", "0.2")
    for rank in ("0", "1"):
        port = free_port("127.0.0.2")
        where = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        for name, value in where.items():
            monkeypatch.setenv(name, value)
        sentence = rf"rendezvous: the 2 processes of this run did not meet at 127\.0\.0\.2:{port} within 0\.2 s; check"
        with pytest.raises(RunFailed, match=sentence):
            train(tiny.config(), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_alone_nothing_is_asked_of_anyone():
    world = SINGLE_PROCESS
    assert (world.any(True), world.any(False), world.all(3), world.on_rank0(lambda: 4)) == (True, False, [3], 4)
    with pytest.raises(RunFailed):
        SINGLE_PROCESS.on_rank0(lambda: (_ for _ in ()).throw(RunFailed("no")))


def test_a_background_write_tells_its_error_at_the_next_step():
    background = checkpoint.Background()
    background.check()
    background.start(lambda: 1 / 0)
    background._thread.join()
    with pytest.raises(ZeroDivisionError):
        background.check()
    background.wait()
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.start(lambda: None)


@pytest.mark.parametrize(
    ("variables", "torch_s", "allowed", "threads"),
    [
        ({}, 64, 1, 1),  # a container limited to one CPU of many, of which torch sees all
        ({}, 64, 6, 6),
        ({}, 4, 8, 4),  # two threads of a core are one to torch
        ({"LOCAL_WORLD_SIZE": "4"}, 64, 6, 1),
        ({"LOCAL_WORLD_SIZE": "2"}, 8, 16, 4),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, 3, 2, 3),  # the user decided
    ],
)
def test_threads_are_those_that_a_process_may_use(variables, torch_s, allowed, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_s)
    monkeypatch.setattr(distributed, "cpu_count", lambda: allowed)
    assert threads_each() == threads
