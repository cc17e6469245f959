"""Files that version 0.1.0 wrote are still read: runs, checkpoints, sweeps, imported runs and fits (tests/data/v0.1)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import output

import questctl
from questctl.store import RunStore

OLD = Path(__file__).with_name("data") / "v0.1"
SAME_MACHINE = 1e-6  # relative: the losses were computed on another processor, whose sums may round otherwise


@pytest.fixture
def old(tmp_path):
    """A copy of the old files that may be written."""
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def test_finished_interrupted_and_quantized_runs_are_rows():
    rows = questctl.load_runs(OLD / "runs").set_index("scheme")
    assert rows.state.to_dict() == {
        "bf16": "done",
        "quest-w4a4": "done",
        "ptq-gptq-w4a4": "done",
        "quest-w2a2": "preempted",
    }
    for name, result in ((run.name, json.loads((run.path / "result.json").read_text())) for run in finished()):
        row = rows[rows.run == name].iloc[0]
        assert (row.loss, row.tokens, row.params_non_embedding) == (
            result["loss"],
            result["tokens"],
            result["params_non_embedding"],
        )
        assert row.w_stored_bits == result["w_bits"]  # what stored bits were called


def finished():
    return [run for run in RunStore(OLD / "runs").runs() if (run.path / "result.json").exists()]


def test_old_configs_have_their_old_names_and_their_old_json():
    for run in RunStore(OLD / "runs").runs():
        assert run.config().run_id == run.name
        stored = json.loads((run.path / "config.json").read_text())
        assert run.config().to_json() == {key: value for key, value in stored.items() if key != "seal"}


def test_an_interrupted_run_is_continued_to_the_loss_of_an_undisturbed_one(old):
    expected = json.loads((OLD / "expected.json").read_text())
    run = RunStore(old / "runs").run(expected["run"])
    result = questctl.train(run.config(), runs=old / "runs")
    assert result.run == expected["run"]
    assert result.attempts == 2
    assert result.loss == pytest.approx(expected["loss"], rel=SAME_MACHINE)
    assert result.train_loss == pytest.approx(expected["train_loss"], rel=SAME_MACHINE)
    assert [line["step"] for line in run.metrics()][:3] == [2, 4, 6]


def test_old_weights_are_loaded_and_evaluated(old):
    for run in finished():
        measured = json.loads(output("eval", run.name, "--runs", old / "runs", "--json"))
        assert measured["loss"] == pytest.approx(run.result().loss, rel=1e-5)


def test_a_finished_run_is_finished(old):
    for run in finished():
        if run.config().ptq is None:
            assert questctl.train(run.config(), runs=old / "runs") == run.result()


def test_runs_are_listed_shown_and_compared():
    listed = json.loads(output("runs", "ls", "--runs", OLD / "runs", "--json"))
    assert len(listed) == 4
    names = [row["run"] for row in listed]
    assert all(name in output("runs", "show", name, "--runs", OLD / "runs") for name in names)
    compared = json.loads(output("runs", "compare", *names, "--runs", OLD / "runs", "--json"))
    assert compared["runs"] == names


def test_a_sweep_is_continued_when_the_user_accepts_that_the_code_is_another(old):
    command = ("sweep", old / "sweep.toml", "--runs", old / "swept", "--jobs", 1, "--quiet")
    refusal = output(*command, code=2)
    assert "begun with questctl 0.1.0" in refusal
    assert "--force" in refusal
    output(*command, "--force")
    first, second = RunStore(old / "swept").runs()
    assert (first.state(), second.state()) == ("done", "done")
    assert second.result().loss == pytest.approx(first.result().loss, rel=0.2)


def test_imported_runs_are_points(tmp_path):
    rows = questctl.load_runs(OLD / "external")
    assert rows.state.unique().tolist() == ["imported"]
    assert rows.scheme.value_counts().to_dict() == {"bf16": 6, "w4a4": 6, "w2a2": 6}
    again = json.loads(output("fit-scaling", OLD / "external", "--bootstrap", 0, "--json"))
    assert again["eff"] == pytest.approx(json.loads((OLD / "fitted" / "fit.json").read_text())["eff"], rel=1e-4)


def test_a_fit_is_a_source(tmp_path):
    stored = json.loads((OLD / "fitted" / "fit.json").read_text())
    again = json.loads(output("fit-scaling", OLD / "fitted" / "fit.json", "--bootstrap", 0, "--json"))
    assert again["params"] == pytest.approx(stored["params"], rel=1e-4)
    plan = json.loads(output("plan", OLD / "fitted" / "fit.json", "--flops", "1e18", "--bootstrap", 0, "--json"))
    assert plan
