"""`questctl study` end to end with a planted loss: search, cells, table, folder, exit codes, and nothing trained twice."""

from __future__ import annotations

import csv
import functools
import json
import math

import pytest
from command_line import run_cli
from sweep_trainers import CLIFF, VALLEYS, traced
from test_local import trace  # noqa: F401
from test_study import STUDY

from questctl.store import RunStore
from questctl.sweep.launchers.local import launch


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr("questctl.sweep.run.launch", functools.partial(launch, trainer="sweep_trainers:valley", poll_s=0.05))
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "small.toml").write_text(STUDY)
    return tmp_path / "small.toml"


def test_a_study_searches_trains_and_tabulates_and_the_next_call_only_tabulates(tmp_path, path, trace):  # noqa: F811
    runs, out = tmp_path / "runs", tmp_path / "out"
    before = json.loads(run_cli("study", path, "--runs", runs, "--dry-run", "--json").stdout)["total"]
    assert (before["cells"], before["left"]) == (9 + 7, 9 + 7)
    assert not runs.exists()
    document = json.loads(run_cli("study", path, "--runs", runs, "--jobs", 1, "--json", "--quiet", "--out", out).stdout)
    searched = {entry["scheme"]: entry for entry in document["search"]}
    assert {name: entry["lr"] for name, entry in searched.items()} == {"bf16": 4e-3, "quest-w2a2": 1.6e-2, "plain": 1e-3}
    assert [x["lr"] for x in searched["quest-w2a2"]["losses"]] == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert CLIFF < 3.2e-2
    assert searched["quest-w2a2"]["losses"][-1]["loss"] is None  # diverged
    rows = {(row["scheme"], row["role"]): row for row in document["rows"]}
    assert list(rows) == [("bf16", "main"), ("quest-w2a2", "main"), ("plain", "main"), ("quest-w2a2", "fixed")]
    plain = rows["plain", "main"]
    assert (plain["n"], plain["reference"], plain["difference_n"]) == (2, "quest-w2a2", 2)
    assert plain["loss"] == pytest.approx(VALLEYS["ste-w2a2"][0] + 0.005)
    assert plain["difference"] == pytest.approx(VALLEYS["ste-w2a2"][0] - VALLEYS["quest-w2a2"][0])
    assert plain["to_control"] == pytest.approx(VALLEYS["ste-w2a2"][0] - VALLEYS["bf16"][0])
    assert plain["grad_norm"] == 2.5  # steps 1 to 4, warm-up 0.4 of a step
    assert plain["spread"] == pytest.approx(math.sqrt(2) * 0.005)
    assert [f["holds"] for f in document["findings"]] == [True]
    assert document["about"]["states"] == {"done": 9 + 2 + 1 + 7, "diverged": 1}

    assert {p.name for p in out.iterdir()} == {"table.csv", "study.json", "README.md", "losses.png", "losses.svg"}
    assert json.loads((out / "study.json").read_text())["rows"] == document["rows"]
    with (out / "table.csv").open() as f:
        assert [row["scheme"] for row in csv.DictReader(f)] == [row["scheme"] for row in document["rows"]]
    text = (out / "README.md").read_text()
    assert document["findings"][0]["sentence"] in text
    assert "| plain | " in text
    assert "diverged" in text

    trained = len(traced(trace))
    shown = run_cli("study", path, "--runs", runs).stdout
    assert len(traced(trace)) == trained
    assert document["findings"][0]["sentence"][:60] in shown.replace("\n", " ")
    assert max(map(len, (line for line in shown.splitlines() if "quest-w2a2 " in line and "0.016" in line))) <= 80
    after = json.loads(run_cli("study", path, "--runs", runs, "--dry-run", "--json").stdout)["total"]
    assert after["left"] == 0


def test_the_figure_has_a_mark_for_every_run(tmp_path):
    from test_compare import SIZES, record, runs

    from questctl.analysis.compare import Comparison
    from questctl.analysis.compare_figure import losses_by_seed

    records = [
        *runs("a", [2.0, 2.1], w_stored_bits=2.0),
        *runs("b", [1.0, 1.2, 1.4]),
        *runs("b", [0.5], SIZES[1]),
        record("c", 0, None, state="diverged"),
        record("a", 0, 7.0, role="fixed", lr=1.0),
    ]
    left, right = losses_by_seed(Comparison(tuple(records))).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["b", "a", "c"]
    marks = {tuple(xy) for line in left.lines if line.get_marker() == "o" for xy in zip(*line.get_data(), strict=True)}
    assert marks == {(1.0, 0), (1.2, 0), (1.4, 0), (2.0, 1), (2.1, 1)}
    assert [t.get_text() for t in left.texts] == ["1 diverged"]
    assert {x for line in right.lines if line.get_marker() == "o" for x in line.get_xdata()} == {0.5}


@pytest.mark.slow
def test_a_failed_cell_is_told_after_the_table_and_retried_on_demand(tmp_path, path, trace):  # noqa: F811
    path.write_text(STUDY.replace("seed = [0, 1]", "seed = [0, 31]"))
    runs = tmp_path / "runs"
    result = run_cli("study", path, "--runs", runs, "--jobs", 1, "--quiet", code=3)
    assert "Cannot be judged: " in result.output.replace("\n", " ")
    assert "ZeroDivisionError" in result.output
    assert "3 of 7 cells failed" in result.output
    (tmp_path / "healed").touch()
    document = json.loads(run_cli("study", path, "--runs", runs, "--jobs", 1, "--quiet", "--retry", "failed", "--json").stdout)
    assert {row["missing"] for row in document["rows"]} == {0}
    assert {run.state() for run in RunStore(runs).runs()} == {"done", "diverged"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methds"], "did you mean 'methods'"),
        (["{path}", "--scale", "ful"], "did you mean 'full'"),
        (["{path}", "--retry", "fail"], "did you mean 'failed'"),
        (["{path}", "--set", "optim.lr=1"], "searches it"),
        (["{path}", "--set", "data.seq_len=6000"], "too small"),
        (["laptop"], "unknown study"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, path, words, message):
    text = run_cli("study", *(word.format(path=path) for word in words), "--runs", tmp_path / "runs", code=2).output
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()
