"""`questctl sweep`: estimated costs, the table at the end, exit codes, and what is refused before anything is written."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_cli
from rich.console import Console
from sweep_trainers import result_of, traced
from test_local import trace  # noqa: F401
from test_sweep_file import LAPTOP

from questctl import console
from questctl.cli.sweep_view import SweepView
from questctl.config import Layer, RunConfig, flatten, resolve
from questctl.config.presets import PRESETS
from questctl.store import RunStore
from questctl.sweep.calibrate import Calibration
from questctl.sweep.costs import (
    Speed,
    TimeRange,
    flops_per_token,
    speedup,
    tokens_of_work,
    training_time,
    wall_seconds,
    wall_time,
)
from questctl.sweep.launchers.local import launch
from questctl.sweep.outcomes import Outcome
from questctl.sweep.sweep_file import load_sweep_file

SEEDS = """
[base]
data.source = "synthetic:markov?tokens=5000"
data.seq_len = 16
train.steps = 4
[matrix]
train.seed = {seeds}
"""


def config(**values: object) -> RunConfig:
    return resolve([Layer("test", flatten(values, where="test"))]).config


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    """A sweep file of the seeds that are asked for, trained by the fake."""
    monkeypatch.setattr("questctl.sweep.run.launch", functools.partial(launch, trainer="sweep_trainers:train", poll_s=0.05))
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path / "cache"))

    def write(*seeds: int) -> Path:
        path = tmp_path / "seeds.toml"
        path.write_text(SEEDS.format(seeds=list(seeds)))
        return path

    return write


def finish(runs: Path, config: RunConfig, *, host: str = platform.node(), **measured: object) -> None:
    with RunStore(runs).run(config.run_id).open_for_training(config) as writer:
        writer.begin(step=0, steps=1, env={"data_hash": "0", "threads": 1, "attempt": {"host": host}})
        writer.finish(result_of(config, **measured))


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["53K", "214K", "640K", "30M"])
def test_the_formula_counts_what_the_modules_count(preset):
    import torch

    from questctl.models.llama import build_model, count_flops

    c = config(preset=preset)
    with torch.device("meta"):
        model = build_model(c.model.model_copy(update={"vocab_size": 256}), c.quant, 0)
    assert flops_per_token(c) == count_flops(model, c.data.seq_len).training


def test_time_is_that_of_the_nearest_run_scaled_by_its_operations():
    c = config(preset="53K", quant={"method": "quest", "bits": 4})
    work, tokens = flops_per_token(c), tokens_of_work(c)
    assert tokens == c.tokens + c.train.eval_tokens / 3
    same, other = c.quant.label, "bf16"

    def likely(*speeds: Speed) -> float:
        return training_time(c, speeds).likely

    assert likely(Speed(same, work, 1000.0)) == pytest.approx(tokens / 1000)
    assert likely(Speed(other, work, 1.0), Speed(same, 2 * work, 500.0)) == pytest.approx(tokens / 1000)
    assert likely(Speed(other, work, 1000.0), Speed(same, 20 * work, 1.0)) == pytest.approx(tokens / 1000)
    assert likely(Speed(same, work, 900.0), Speed(same, work, 1600.0)) == pytest.approx(tokens / 1200)
    assert training_time(c, []) is None
    assert training_time(c, [Speed(same, work, 1.0, on_gpu=True)]) is None


def test_the_range_is_wider_the_less_the_runs_are_alike_and_holds_all_that_are():
    c = config(preset="53K", quant={"method": "quest", "bits": 4})
    work, same = flops_per_token(c), c.quant.label

    def ratio(*speeds: Speed) -> float:
        t = training_time(c, speeds)
        assert t.low <= t.likely <= t.high
        return t.high / t.low

    exact = Speed(same, work, 1000.0)
    assert ratio(exact) == pytest.approx(1)
    assert ratio(Speed(same, work, 1000.0, 1.2)) == pytest.approx(1.44)
    assert 1 < ratio(Speed(same, 2 * work, 1000.0)) < ratio(Speed(same, 8 * work, 1000.0))
    assert ratio(Speed("bf16", work, 1000.0)) == pytest.approx(math.exp(0.66))
    assert ratio(exact, Speed(same, work, 1500.0)) == pytest.approx(1.5)
    assert ratio(exact, Speed("bf16", work, 9000.0)) == pytest.approx(1)
    assert wall_time([TimeRange(1, 2, 4), TimeRange(3, 4, 5)], 2) == TimeRange(3, 4, 5)
    assert wall_time([TimeRange(1, 2, 4), TimeRange(3, 4, 5)], 1) == TimeRange(4, 6, 9)


@pytest.mark.parametrize(("eval_every", "validations"), [(0, 1), (10, 11)])
def test_validations_count_as_a_third_of_training(eval_every, validations):
    c = config(preset="53K", train={"steps": 100, "eval_every": eval_every, "eval_tokens": 3000})
    assert tokens_of_work(c) == c.tokens + 1000 * validations


def test_the_last_worker_s_end():
    assert wall_seconds([], 3) == 0
    assert wall_seconds([5, 4, 3, 3, 3], 2) == 10  # 5+3 | 4+3+3, the greedy order; 9 would be the best
    assert wall_seconds([7, 1, 1], 3) == 7
    assert wall_seconds([5, 4, 3], 2, [2, 1, 1]) == 9  # both places for 5 seconds, then one for each
    assert wall_seconds([5, 4, 3], 2, [1, 2, 1]) == 12  # 4 waits until both are free
    assert wall_seconds([6], 2, [4]) == 6


def test_dry_run_says_what_is_done_what_is_left_and_where_the_times_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr("questctl.sweep.estimate.calibrate", lambda *_, **__: Calibration())
    (tmp_path / "p.toml").write_text(LAPTOP)
    cells, runs = load_sweep_file(tmp_path / "p.toml").cells, tmp_path / "runs"
    words = (tmp_path / "p.toml", "--runs", runs, "--dry-run", "--json", "--jobs", 2)
    rough = json.loads(run_cli("sweep", *words).stdout)
    assert rough["total"]["basis"].startswith("unknown: no run like it has finished here")
    assert rough["total"]["seconds"] is rough["total"]["seconds_low"] is rough["total"]["seconds_high"] is None
    shown = run_cli("sweep", *words[:-3], "--jobs", 2).stdout
    assert "FLOPs, time unknown: no run like it has finished here" in shown
    assert rough["total"]["left"] == len(cells)
    assert not runs.exists()
    bf16 = cells[0].config.with_vocabulary(64)
    finish(runs, cells[0].config, flops=flops_per_token(bf16) * bf16.tokens, tokens_per_s=2000.0)
    finish(runs, cells[1].config, host="elsewhere", tokens_per_s=1.0)
    before = sorted(runs.rglob("*"))
    data = json.loads(run_cli("sweep", *words).stdout)
    assert sorted(runs.rglob("*")) == before
    assert data["total"]["basis"] == "estimated from 1 finished run"
    assert (data["total"]["cells"], data["total"]["left"], data["total"]["jobs"]) == (len(cells), len(cells) - 2, 2)
    for row, cell in zip(data["cells"], cells, strict=True):
        c = cell.config.with_vocabulary(64)
        assert row["run_id"] == cell.run_id
        assert row["values"] == cell.values
        assert (row["params_non_embedding"], row["tokens"]) == (c.model.params_non_embedding, c.tokens)
        assert row["flops"] == pytest.approx(flops_per_token(c) * c.tokens)
        assert row["seconds"] == pytest.approx(tokens_of_work(c) * flops_per_token(c) / flops_per_token(bf16) / 2000)
        assert row["seconds_low"] < row["seconds"] < row["seconds_high"]
    assert [row["state"] for row in data["cells"][:3]] == ["done", "done", "pending"]
    left = sorted((row["seconds"] for row in data["cells"][2:]), reverse=True)
    assert max(left) <= data["total"]["seconds"] <= sum(left)
    assert data["total"]["seconds_low"] < data["total"]["seconds"] < data["total"]["seconds_high"]
    text = run_cli("sweep", tmp_path / "p.toml", "--runs", runs, "--dry-run").stdout
    assert all(cell.run_id in text for cell in cells)
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_a_run_of_two_processes_counts_as_fast_as_one_of_them(tmp_path, monkeypatch):
    """By its speed together a run of one process took half the time that it takes, and one of two is not as slow as one."""
    monkeypatch.setattr("questctl.sweep.estimate.calibrate", lambda *_, **__: Calibration())
    text = SEEDS.format(seeds=[1, 2])
    for name, more in (("one", ""), ("two", "[resources]\nnproc = 2\n")):
        (tmp_path / f"{name}.toml").write_text(text + more)
    (first, second), runs = load_sweep_file(tmp_path / "two.toml").cells, tmp_path / "runs"
    sized = first.config.with_vocabulary(64)
    with RunStore(runs).run(first.run_id).open_for_training(first.config) as writer:
        attempt = {"host": platform.node(), "processes": 2}
        writer.begin(step=0, steps=1, env={"data_hash": "0", "threads": 1, "attempt": attempt})
        writer.finish(result_of(first.config, flops=flops_per_token(sized) * sized.tokens, tokens_per_s=1000 * speedup(2)))
    alone = tokens_of_work(sized) / 1000
    for name, jobs, seconds in (("one", 1, alone), ("one", 2, alone), ("two", 2, alone / speedup(2))):
        words = (tmp_path / f"{name}.toml", "--runs", runs, "--dry-run", "--json", "--jobs", jobs)
        data = json.loads(run_cli("sweep", *words).stdout)
        assert [row["run_id"] for row in data["cells"] if row["state"] == "pending"] == [second.run_id]
        assert data["total"]["seconds"] == pytest.approx(seconds)
        assert RunStore(runs).run(first.run_id).read_facts().processes == 2


def test_help_and_dry_run_import_no_torch(tmp_path):
    (tmp_path / "p.toml").write_text(SEEDS.format(seeds=[1, 2]))
    code = f"""
import sys
from questctl.sweep import estimate
from questctl.cli.app import app
estimate.MOST_MODELS = 0
for words in (["sweep", {str(tmp_path / "p.toml")!r}, "--dry-run"], ["runs", "ls"]):
    app([*words, "--runs", {str(tmp_path)!r}], standalone_mode=False)
    if loaded := [m for m in ("torch", "pandas", "scipy", "matplotlib") if m in sys.modules]:
        sys.exit(f"{{words}}: {{loaded}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- running ----------------------------------------------------------------------------------------------------------


def test_a_sweep_trains_all_and_the_next_call_none(tmp_path, sweep_file, trace):  # noqa: F811
    path, runs = sweep_file(1, 2, 3), tmp_path / "runs"
    result = run_cli("sweep", path, "--runs", runs, "--jobs", 2)
    cells = load_sweep_file(path).cells
    assert all(cell.run_id in result.stdout for cell in cells)
    assert "0.5000" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    before = traced(trace)
    data = json.loads(run_cli("sweep", path, "--runs", runs, "--json").stdout)
    assert traced(trace) == before
    assert [cell["state"] for cell in data["cells"]] == ["done"] * 3
    assert [cell["loss"] for cell in data["cells"]] == [1 / 2, 1 / 3, 1 / 4]
    assert data["cells"][0]["values"] == {"train.seed": 1}
    run_cli("sweep", path, "--runs", runs, "--set", "train.steps=2", "--quiet", "--json")
    assert len(RunStore(runs).runs()) == 6


def test_failed_cells_end_in_exit_code_3_with_their_reasons_and_are_retried_on_demand(tmp_path, sweep_file, trace):  # noqa: F811
    path, runs = sweep_file(31, 36, 1), tmp_path / "runs"
    text = run_cli("sweep", path, "--runs", runs, code=3).output
    assert "failed: ZeroDivisionError: division by zero" in text
    assert "diverged: blocks.0.wq is not finite" in text
    assert "1 failed and 1 diverged of 3 cells; --retry all tries again" in text
    before = len(traced(trace))
    run_cli("sweep", path, "--runs", runs, code=3)
    assert len(traced(trace)) == before
    left = json.loads(run_cli("sweep", path, "--runs", runs, "--dry-run", "--json", "--retry", "failed").stdout)["total"][
        "left"
    ]
    assert left == 1
    (tmp_path / "healed").touch()
    text = run_cli("sweep", path, "--runs", runs, "--retry", "failed", "--json", code=3)
    assert [cell["state"] for cell in json.loads(text.stdout)["cells"]] == ["done", "diverged", "done"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.toml"], "there is no such sweep file"),
        (["{sweep_file}", "--retry", "fail"], "did you mean 'failed'"),
        (["{sweep_file}", "--jobs", "-1"], "--jobs"),
        (["{sweep_file}", "--set", "train.sed=1"], "did you mean 'train.seed'"),
        (["{sweep_file}", "--set", "train.seed=1"], "one experiment"),
        (["{sweep_file}", "--set", "data.source=file:/nowhere.txt"], "nowhere.txt"),
        (["{sweep_file}", "--set", "data.seq_len=6000"], "too small"),
        (["{sweep_file}", "-l", "slurm", "--cpus", "many"], "--cpus: 'many': must be a whole number."),
        (["{sweep_file}", "-l", "ray", "--gpus", "-1"], "--gpus: -1.0: must be 0 or more."),
        (["{sweep_file}", "--set", "quant.weights=int9-rms-trust"], "int9"),
        (["{sweep_file}", "--set", 'quant.overrides."blocks.*.dwn".weights=int4-rms-ste'], "did you mean 'blocks.*.down'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, sweep_file, words, message):
    path = sweep_file(1, 2)
    text = run_cli("sweep", *(word.format(sweep_file=path) for word in words), "--runs", tmp_path / "runs", code=2).output
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()


def test_a_runs_folder_that_cannot_be_written_is_refused(tmp_path, sweep_file):
    (tmp_path / "file").write_text("")
    for runs in (tmp_path / "file", tmp_path / "file" / "runs"):
        text = run_cli("sweep", sweep_file(1), "--runs", runs, code=2).output
        assert f"{tmp_path / 'file'}: is not a folder" in text


# --- the view ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def eleven(tmp_path):
    (tmp_path / "p.toml").write_text(SEEDS.format(seeds=list(range(11))))
    return load_sweep_file(tmp_path / "p.toml")


def outcomes(sweep_file, *states: str) -> list[Outcome]:
    all_states = itertools.chain(states, itertools.repeat("pending"))
    return [
        Outcome(cell.run_id, state, 2, 4, 1, 1.5, tokens_per_s=100.0 if state == "running" else None, eta_s=7.0, message="why")
        for cell, state in zip(sweep_file.cells, all_states, strict=False)
    ]


def test_without_a_terminal_each_settled_cell_is_one_line(eleven, capsys, monkeypatch):
    view = SweepView(eleven)
    view(outcomes(eleven, "done", "running"))
    view(outcomes(eleven, "done", "done", "running"))
    err = capsys.readouterr().err
    assert [line.split()[0] for line in err.splitlines()] == [eleven.cells[1].run_id]
    monkeypatch.setattr(console.progress, "PLAIN_INTERVAL_S", 0.0)
    view(outcomes(eleven, "done", "done", "running", "failed"))
    err = capsys.readouterr().err
    assert "failed" in err
    assert "2/11 done, 1 running, 1 failed" in err
    assert "left" not in err  # no cell was seen to train for a while
    SweepView(eleven, quiet=True)(outcomes(eleven, "done", "failed"))
    assert capsys.readouterr().err == ""


def test_on_a_terminal_what_runs_and_what_failed_is_in_sight(eleven, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, height=12, color_system=None)
    monkeypatch.setattr(console.tables, "stderr", lambda: terminal)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    view = SweepView(eleven)
    view(outcomes(eleven, *["done"] * 7, "failed", "running"))
    shown = screen.getvalue()
    view.close()
    assert eleven.cells[7].run_id in shown
    assert eleven.cells[8].run_id in shown
    assert "7/11 done, 1 running, 1 failed" in shown
    assert sum(c.run_id in shown for c in eleven.cells) == 6
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80


def test_every_preset_can_be_costed():
    for name in PRESETS:
        assert flops_per_token(config(preset=name)) > 6 * config(preset=name).model.params_non_embedding * 0.99
