"""The record of a sweep: any folder of it will do, and who comes with other code or other text is refused."""

from __future__ import annotations

import json

import pytest
from test_cli_sweep import SEEDS
from typer.testing import CliRunner

from questctl.cli.app import app
from questctl.errors import DataError, UsageError
from questctl.store import RunStore
from questctl.sweep import record
from questctl.sweep.record import Sweep, code_version, find_sweep, join
from questctl.sweep.sweep_file import load_plan


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "seeds.toml").write_text(SEEDS.format(seeds=[1, 2]) + "[launcher.slurm]\npartition = 'gpu'\n")
    return Sweep(load_plan(tmp_path / "seeds.toml"), RunStore(tmp_path / "runs"))


def find(word, tmp_path, **more):
    return find_sweep(str(word), default_runs=tmp_path / "elsewhere", **more)


def test_a_recorded_sweep_is_found_by_any_of_its_folders_and_is_the_plan(sweep, tmp_path):
    join(sweep, sweep.plan.cells)
    assert RunStore(tmp_path / "runs").runs() == []
    for word in (tmp_path / "runs", sweep.folder, sweep.folder / "sweep.json"):
        found = find(word, tmp_path)
        assert found.plan == sweep.plan
        assert found.folder.resolve() == sweep.folder.resolve()
    assert find(tmp_path / "seeds.toml", tmp_path, runs=tmp_path / "runs").folder == sweep.folder


def test_a_plan_that_was_edited_is_another_sweep_and_then_it_must_be_named(sweep, tmp_path):
    join(sweep, sweep.plan.cells)
    (tmp_path / "seeds.toml").write_text(SEEDS.format(seeds=[1, 2, 3]))
    other = Sweep(load_plan(tmp_path / "seeds.toml"), sweep.store)
    join(other, other.plan.cells)
    assert other.folder != sweep.folder
    with pytest.raises(UsageError, match="holds 2 sweeps; name one"):
        find(tmp_path / "runs", tmp_path)
    assert len(find(sweep.folder, tmp_path).plan.cells) == 2


def test_other_code_is_refused_unless_forced(sweep, monkeypatch):
    join(sweep, sweep.plan.cells)
    was = code_version()
    monkeypatch.setattr(record, "code_version", lambda: {**was, "sources": "0123456789abcdef"})
    with pytest.raises(UsageError, match=f"begun with questctl .* .sources {was['sources']}.*0123456789abcdef.*--force"):
        join(sweep, sweep.plan.cells)
    join(sweep, sweep.plan.cells, force=True)
    join(sweep, sweep.plan.cells)
    monkeypatch.undo()


def test_other_text_is_refused_unless_forced(sweep, monkeypatch):
    join(sweep, sweep.plan.cells)
    (text,) = record.data_hashes(sweep.plan.cells)
    monkeypatch.setattr(record, "data_hashes", lambda _: {text: "f" * 64})
    with pytest.raises(UsageError, match=r"other text under data.source synthetic:markov.* .hash .*here ffffffff.*--force"):
        join(sweep, sweep.plan.cells)
    join(sweep, sweep.plan.cells, force=True)


def test_a_dry_run_refuses_other_code_as_the_sweep_would(sweep, tmp_path, monkeypatch):
    words = ["sweep", str(tmp_path / "seeds.toml"), "--runs", str(tmp_path / "runs")]
    join(sweep, sweep.plan.cells)
    assert CliRunner().invoke(app, [*words, "--dry-run"]).exit_code == 0
    monkeypatch.setattr(record, "code_version", lambda: {"questctl": "0", "sources": "0123456789abcdef"})
    dry, real = CliRunner().invoke(app, [*words, "--dry-run"]), CliRunner().invoke(app, words)
    assert (dry.exit_code, dry.stderr) == (real.exit_code, real.stderr) == (2, real.stderr)
    assert CliRunner().invoke(app, [*words, "--dry-run", "--force"]).exit_code == 0


def test_the_code_is_that_which_computes(monkeypatch, tmp_path):
    """A changed source is another version; a changed command, figure or test is not."""
    import shutil

    shutil.copytree(record.PACKAGE, tmp_path / "questctl", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(record, "PACKAGE", tmp_path / "questctl")
    before = code_version()
    for name in ("cli/sweep.py", "analysis/fit.py"):
        with (tmp_path / "questctl" / name).open("a") as f:
            f.write("# changed\n")
        assert code_version() == before
    for name in ("quant/grids.py", "kernels/hadamard.py", "training/loop.py", "model.py"):
        with (tmp_path / "questctl" / name).open("a") as f:
            f.write("# changed\n")
        now = code_version()
        assert now != before
        before = now


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 1}', '{"schema": 2}'])
def test_a_damaged_record_is_named_with_a_remedy(sweep, tmp_path, damage):
    join(sweep, sweep.plan.cells)
    (sweep.folder / "sweep.json").write_text(damage)
    with pytest.raises(DataError, match=r"sweep.json: .*start the sweep from its plan again"):
        find(sweep.folder, tmp_path)


def test_a_recorded_sweep_has_its_own_runs_and_values(sweep, tmp_path):
    join(sweep, sweep.plan.cells)
    with pytest.raises(UsageError, match=r"--set: .* recorded sweep"):
        find(sweep.folder, tmp_path, sets=["train.steps=3"])
    with pytest.raises(UsageError, match=r"--runs: .* recorded sweep"):
        find(sweep.folder, tmp_path, runs=tmp_path)
    with pytest.raises(UsageError, match="neither a plan nor the folder of a sweep"):
        find(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="there is no such plan"):
        find(tmp_path / "nowhere", tmp_path)


def test_the_worker_command_refuses_in_a_sentence(sweep, tmp_path):
    join(sweep, sweep.plan.cells)
    values = json.loads((sweep.folder / "sweep.json").read_text())
    del values["seal"]  # a record of an earlier version
    values["code"]["sources"] = "old"
    (sweep.folder / "sweep.json").write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["worker", str(sweep.folder)])
    assert result.exit_code == 2
    assert "sources old" in result.output
    assert not list((tmp_path / "runs").glob("[!.]*"))
