"""`questctl eval`: the loss that the run reported, the training side, other texts, and refused requests."""

import json
import os
import random
import subprocess
import sys

import pytest
import tiny
import torch
from command_line import invoke

from questctl.data.sampler import validation_windows
from questctl.errors import Diverged, UsageError
from questctl.evaluate.tasks import cloze
from questctl.store import RunStore, checkpoint_steps
from questctl.training import train
from questctl.training.loading import load_model
from questctl.training.run_data import load_data


@pytest.fixture(autouse=True)
def result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return train(tiny.config(tiny.QUEST))


def measured(*args):
    done = invoke("eval", *args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_number_of_the_result_to_the_last_digit(result):
    found = measured(result.run[-8:])
    assert (found["run"], found["loss"], found["data_hash"]) == (result.run, result.loss, result.data_hash)
    shown = invoke("eval", result.run)
    assert f"{result.loss:.4f}" in shown.stdout


def test_other_tokens_sides_and_texts(result):
    losses = {
        measured(result.run, *args)["loss"]
        for args in ((), ("--tokens=16",), ("--part=train",), ("--data=synthetic:markov?vocab=16&tokens=20000&seed=5",))
    }
    assert len(losses) == 4
    assert all(1 < loss < 4 for loss in losses)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["nosuch"], "there is no run 'nosuch'"),
        (["21K", "--part=test"], "--part: unknown value 'test'"),
        (["21K", "--data=synthetic:markov?vocab=17&tokens=20000"], "has 17 ids"),
        (["21K", "--data=file:/nowhere.txt"], "no file matches"),
    ],
)
def test_mistakes(args, sentence):
    done = invoke("eval", *args)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_predictions_beside_those_of_another_checkpoint(result):
    """KL(p ‖ q) = Σ p·ln(p/q), and how often both find the same id the likeliest, from the logits of both models."""
    other = train(tiny.config())
    config, run = tiny.config(tiny.QUEST), RunStore("runs").run(result.run)
    windows = torch.from_numpy(validation_windows(load_data(config, run).val, config.data.seq_len, config.train.eval_tokens))
    p, q = (load_model(RunStore("runs").run(name))(windows[:, :-1]).double().softmax(-1) for name in (other.run, result.run))
    found = measured(result.run, f"--reference=runs/{other.run}")
    assert found["loss"] == result.loss
    assert found["reference"]["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert found["reference"]["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-6)
    assert 0 < found["reference"]["kl"] < 3
    itself = measured(other.run, f"--reference=runs/{other.run}")["reference"]
    assert (itself["kl"], itself["agreement"]) == (pytest.approx(0, abs=1e-7), 1)
    shown = invoke("eval", result.run, f"--reference=runs/{other.run}").output
    assert f"KL from runs/{other.run}: {found['reference']['kl']:.4f} nats/token; the same likeliest token in " in shown
    for args, sentence in (
        ((f"--reference=runs/{other.run}", "--tasks=words.jsonl"), "--reference: compares predictions on a text"),
        (("--reference=nowhere",), "'nowhere' is not here; it takes a run's folder"),
    ):
        refused = invoke("eval", result.run, *args)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert sentence in refused.stderr


def test_damaged_weights(result, tmp_path):
    (tmp_path / "runs" / result.run / "model.safetensors").write_bytes(b"\x00" * 100)
    done = invoke("eval", "21K")
    assert done.exit_code == 2
    assert "model.safetensors: is damaged" in done.stderr


def test_what_was_measured_is_kept_and_all_finished_runs_can_be_watched(result):
    other = train(tiny.config(tiny.LSQ))
    both = measured(result.run, other.run)
    assert [m["run"] for m in both] == [result.run, other.run]
    watched = measured("--watch", "--tokens=16")
    assert sorted(m["run"] for m in watched) == sorted(m["run"] for m in both)
    kept = RunStore("runs").find(result.run).evaluations()
    assert [m["loss"] for m in kept] == [both[0]["loss"], next(m["loss"] for m in watched if m["run"] == result.run)]
    refused = invoke("eval", result.run, "--watch")
    assert refused.exit_code == 2
    assert "one of the two" in refused.stderr


EXPORTED = """
import json, sys
sys.modules["questctl"] = None  # any import of it fails: the folder is all that lm-eval has
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", batch_size=7)
tasks = {"tasks": [json.loads(sys.argv[2])], "task_manager": TaskManager(include_defaults=False)}
found = simple_evaluate(model, **tasks, bootstrap_iters=0)
json.dump(found["results"], open(sys.argv[3], "w"))
"""


@pytest.mark.slow
def test_a_measurement_that_cannot_be_kept_is_shown(result):
    """As in an archive that is mounted read-only: also for root, who may write everywhere else."""
    run = RunStore("runs").find(result.run)
    run.evaluations_path.mkdir()
    done = invoke("eval", result.run)
    assert done.exit_code == 0
    assert f"{result.loss:.4f}" in done.stdout
    reason = f"{run.evaluations_path}: cannot be written: Is a directory."
    assert done.stderr == f"warning: {result.run}: the measurement is not kept: {reason}\n"
    assert measured(result.run)["loss"] == result.loss


def test_accuracy_is_the_same_packed_and_exported(tmp_path):
    for package in ("lm_eval", "transformers", "accelerate"):
        pytest.importorskip(package)
    run = train(tiny.config({"quant.method": "quest", "quant.bits": 2, "quant.block": 32, "data.source": "pystdlib"}))
    dice = random.Random(0)
    words = lambda: "".join(dice.choices("etaoin():", k=dice.randrange(1, 9)))  # noqa: E731
    lines = [{"context": "import ", "choices": ["os", "zzzz", "(("], "answer": i % 3} for i in range(6)]
    lines += [{"context": words(), "choices": [words(), words() + "!", words() + "?"], "answer": i % 3} for i in range(40)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain, packed = (measured(run.run, "--tasks=words.jsonl", *more) for more in ((), ("--packed",)))
    assert plain["tasks"] == packed["tasks"]
    assert 0.1 < plain["tasks"]["words"]["acc"] < 0.9
    done = invoke("export", run.run, "--format=hf", "--out=export")
    assert done.exit_code == 0, done.output
    args = ["export", json.dumps(cloze(tmp_path / "words.jsonl")), "found.json"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    alone = subprocess.run([sys.executable, "-c", EXPORTED, *args], env=offline, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr[-2000:]
    exported = json.loads((tmp_path / "found.json").read_text())["words"]
    assert {k.partition(",")[0]: v for k, v in exported.items() if isinstance(v, int | float)} == plain["tasks"]["words"]


@pytest.mark.parametrize("state", ["preempted", "diverged"])
def test_weights_of_an_unfinished_run_are_named_as_such(state):
    if state == "preempted":
        asked, c = iter(range(100)), tiny.config()
        with pytest.raises(InterruptedError):
            train(c, stop=lambda: next(asked) == 9)
    else:
        c = tiny.config({"optim.lr": 1e30})
        with pytest.raises(Diverged):
            train(c)
    step = 9 if state == "preempted" else max(checkpoint_steps(RunStore("runs").run(c.run_id).checkpoints_path))
    sentence = f"warning: {c.run_id}: is not finished: these are the weights of its checkpoint of step {step} of 12 ({state})."
    for args in (["eval", c.run_id], ["generate", c.run_id, "3 1", "--max-tokens", "2"]):
        done = invoke(*args)
        assert done.stderr.splitlines()[0] == sentence
        found = json.loads(invoke(*args, "--json").stdout)
        assert found["unfinished"] == {"state": state, "step": step, "steps": 12}


def test_weights_of_a_finished_run_need_no_warning(result):
    done = invoke("eval", result.run)
    assert done.stderr == ""
    assert "unfinished" not in measured(result.run)


def test_the_public_call_measures_what_the_command_prints(result):
    import questctl

    run = RunStore("runs").run(result.run)
    assert questctl.evaluate_run(result.run[-8:])["loss"] == result.loss
    assert questctl.evaluate_run(run, part="train", max_tokens=64, record=False) == measured(
        result.run, "--part=train", "--tokens=64"
    )
    packed = questctl.evaluate_run(run, packed=True, record=False)
    assert (packed["loss"], packed["packed"]["layers"]) == (pytest.approx(result.loss, abs=1e-6), 14)
    assert [line["part"] for line in run.evaluations()] == ["val", "train"]
    with pytest.raises(UsageError, match="unknown value 'test'"):
        questctl.evaluate_run(run, part="test")


def test_the_public_call_writes_what_the_command_prints(result):
    import questctl

    written = questctl.generate_text(result.run, "3 1 4", max_tokens=5, temperature=1.0, seed=7)
    printed = invoke("generate", result.run, "3 1 4", "--max-tokens=5", "--temperature=1", "--seed=7", "--json")
    assert written.to_json() == json.loads(printed.stdout)
    assert written.whole == f"3 1 4 {written.text}"
    assert (written.beyond, written.unfinished, written.packed) == (None, None, None)
    assert questctl.generate_text(result.run, "3 1 4", max_tokens=14).beyond == 16
