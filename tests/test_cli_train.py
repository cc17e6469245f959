"""`questctl train` as a user types it: options, mistakes, interruptions, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
from command_line import invoke

from questctl.cli.app import main
from questctl.store import RunStore
from questctl.training import loop

TINY = [f"--set={key}={json.dumps(value)}" for key, value in tiny.BASE.items()]
RUN = RunStore("nowhere").run(tiny.config().run_id).name


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_trains_and_shows(tmp_path):
    done = invoke("train", *TINY)
    assert done.exit_code == 0, done.output
    for word in ("validation loss", "nats/token", "non-embedding", "tokens/s", RUN, f"runs/{RUN}"):
        assert word in done.stdout
    assert "step 12/12" in done.stderr
    assert "next: the same with --quant quest --bits 4" in done.stderr
    assert (tmp_path / "runs" / RUN / "result.json").exists()
    again = invoke("train", *TINY)
    assert again.stdout == done.stdout
    assert "finished before" in again.stderr
    assert "step" not in again.stderr


def test_it_warns_once_of_threads_that_wait_for_each_other(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("questctl.sweep.slots.cpu_count", lambda: 2)
    monkeypatch.setattr("questctl.system.OtherWork.cpus", lambda self: 1.5)
    several = [word for word in TINY if "train.threads" not in word]
    assert invoke("train", *several).stderr.count("warning: other programs use 1.5 of the 2 CPUs; ") == 1
    assert "other programs" not in invoke("train", *TINY, "--seed=1").stderr


def test_json_is_the_result_and_nothing_else(tmp_path):
    done = invoke("train", *TINY, "--json", "--quiet", "--quant=quest", "--bits=4", "--set=quant.block=32", "--runs=elsewhere")
    shown = json.loads(done.stdout)
    assert done.stderr == ""
    stored = json.loads((tmp_path / shown["path"] / "result.json").read_bytes())
    about_files = ("schema", "model_sha256", "seal")
    assert {k: v for k, v in shown.items() if k != "path"} == {k: v for k, v in stored.items() if k not in about_files}
    assert shown["scheme"] == "quest-w4a4"


def test_dry_run_writes_nothing_and_agrees_with_the_run(tmp_path):
    shown = invoke("train", *TINY, "--dry-run", "--set=model.vocab_size=16")
    assert shown.exit_code == 0
    assert "pending" in shown.stdout
    cost = json.loads(invoke("train", *TINY, "--dry-run", "--json", "--set=model.vocab_size=16").stdout)
    assert list(tmp_path.iterdir()) == []
    result = json.loads(invoke("train", *TINY, "--json", "--set=model.vocab_size=16").stdout)
    for key in ("run", "params_non_embedding", "params_total", "tokens", "flops", "steps", "w_grid_bits", "w_stored_bits"):
        assert cost[key] == result[key], key
    assert "done" in invoke("train", *TINY, "--dry-run", "--set=model.vocab_size=16").stdout


MISTAKES = {
    "unknown preset": (["--preset=54K"], "preset: unknown preset '54K'"),
    "unknown method": (["--quant=qest", "--bits=4"], "did you mean 'quest'?"),
    "bits out of range": (["--bits=9"], "quant.bits: unknown value '9'"),
    "unknown key": (["--set=train.sed=1"], "did you mean 'train.seed'?"),
    "unknown word": (["--set=quant.weights=int4-h64-rms-tryst"], "tryst"),
    "not a number": (["--set=optim.lr=fast"], "optim.lr: 'fast'"),
    "rotation": (["--quant=quest", "--bits=4", "--set=quant.block=128"], "128 does not divide model.d_model 64"),
    "layer": (['--set=quant.overrides."blocks.*.dwn".weights=bf16'], "did you mean 'blocks.*.down'?"),
    "missing corpus": (["--data=file:/nowhere/at/all.txt"], "no file matches"),
    "empty corpus": (["--data=file:empty.txt"], "empty"),
    "small corpus": (["--data=file:small.txt"], "too small"),
    "unknown corpus": (["--data=pystdlub"], "did you mean 'pystdlib'?"),
    "folder": (["--runs=empty.txt/runs"], "is not a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_exit_2_and_nothing_written(tmp_path, name):
    args, sentence = MISTAKES[name]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "small.txt").write_text("Too little to learn from.\n")
    done = invoke("train", *args)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "small.txt"]


@pytest.mark.parametrize("name", [*MISTAKES, "processes", "vocabulary", "another experiment"])
def test_a_dry_run_refuses_what_the_run_refuses(tmp_path, name):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "small.txt").write_text("Too little to learn from.\n")
    if name == "another experiment":
        other = tiny.config({"optim.lr": 1.0}).to_json()
        path = tmp_path / "runs" / RUN / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(other))
    args = {
        "processes": [*TINY, "--nproc=3"],
        "vocabulary": [*TINY, "--set=model.vocab_size=2"],
        "another experiment": TINY,
    }.get(name) or MISTAKES[name][0]
    dry, real = invoke("train", *args, "--dry-run"), invoke("train", *args)
    assert (dry.exit_code, real.exit_code) == (2, 2), dry.output
    assert dry.stdout == ""
    if name not in ("empty corpus", "small corpus"):  # of these it knows the bytes, not the tokens of both sides
        assert dry.stderr == real.stderr


def test_mistakes_need_no_torch(tmp_path):
    """Of the parser, of the config, of the layers, of the text, of the folder: one after another in a fresh interpreter."""
    (tmp_path / "empty.txt").write_text("")
    mistakes = [["--bitz=4"], *(MISTAKES[name][0] for name in ("unknown key", "layer", "missing corpus", "folder"))]
    script = f"""
import sys
from questctl.cli.app import app
for words in {mistakes!r}:
    try:
        code = app(["train", *words], standalone_mode=False)
    except Exception:  # of the parser
        code = 2
    if code != 2 or "torch" in sys.modules:
        sys.exit(f"{{words}}: code {{code}}, or torch")
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_divergence_ends_with_4():
    done = invoke("train", *TINY, "--lr=1e30", "--quiet")
    assert done.exit_code == 4
    assert "is not finite; the state before it is kept" in done.stderr


def test_warnings_are_shown_on_stderr(monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(loop.Trainer, "finish", lambda *_: {}["unfinished"])
        assert invoke("train", *TINY, "--quiet").exit_code == 1
    done = invoke("train", *TINY, "--set=train.log_every=3", "--quiet", "--json")
    assert "warning: train.log_every:" in done.stderr
    json.loads(done.stdout)


def type_in_a_shell(words, folder, stderr):
    """In a process of its own: what the shell runs."""
    os.chdir(folder)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv[1:] = words
    main()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_stopped_in_a_shell_it_says_how_to_go_on(tmp_path, name, code):
    args = [arg for arg in TINY if "train.steps" not in arg]
    child = tiny.start(type_in_a_shell, ["train", *args, "--steps=100000"], tmp_path, tmp_path / "said")
    run = None
    while run is None or run.last_metrics().get("step", 0) < 4:
        time.sleep(0.01)
        run = next(iter(RunStore("runs").runs()), None)
    os.kill(child.pid, getattr(signal, name))
    child.join(60)
    said = (tmp_path / "said").read_text()
    assert child.exitcode == code, said
    assert f"stopped by {name} at step" in said
    assert "repeat the command to resume" in said
    assert run.state() == "preempted"
    assert os.listdir(run.checkpoints_path)
