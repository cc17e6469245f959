"""The record of a sweep: it is found by any of its folders, and other code or other text is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from command_line import invoke
from test_cli_sweep import SEEDS

from questctl import system
from questctl.errors import DataError, UsageError
from questctl.store import RunStore, read_json, write_sealed
from questctl.sweep import manifest
from questctl.sweep.manifest import Sweep, code_version, join, open_sweep
from questctl.sweep.sweep_file import load_sweep_file


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "seeds.toml").write_text(SEEDS.format(seeds=[1, 2]) + "[launcher.slurm]\npartition = 'gpu'\n")
    return Sweep(load_sweep_file(tmp_path / "seeds.toml"), RunStore(tmp_path / "runs"))


def find(word, tmp_path, **more):
    return open_sweep(str(word), **more)


def test_a_recorded_sweep_is_found_by_any_of_its_folders_and_is_the_sweep_file(sweep, tmp_path):
    join(sweep, sweep.file.cells)
    assert RunStore(tmp_path / "runs").runs() == []
    for word in (tmp_path / "runs", sweep.folder, sweep.folder / "sweep.json"):
        opened = find(word, tmp_path)
        assert opened.file == sweep.file
        assert opened.folder.resolve() == sweep.folder.resolve()
    assert find(tmp_path / "seeds.toml", tmp_path, runs=tmp_path / "runs").folder == sweep.folder


def test_an_edited_sweep_file_is_another_sweep_and_then_it_must_be_named(sweep, tmp_path):
    join(sweep, sweep.file.cells)
    (tmp_path / "seeds.toml").write_text(SEEDS.format(seeds=[1, 2, 3]))
    other = Sweep(load_sweep_file(tmp_path / "seeds.toml"), sweep.store)
    join(other, other.file.cells)
    assert other.folder != sweep.folder
    with pytest.raises(UsageError, match="holds 2 sweeps; name one"):
        find(tmp_path / "runs", tmp_path)
    assert len(find(sweep.folder, tmp_path).file.cells) == 2


def test_other_code_is_refused_unless_forced(sweep, monkeypatch):
    join(sweep, sweep.file.cells)
    was = code_version()
    monkeypatch.setattr(manifest, "code_version", lambda: {**was, "sources": "0123456789abcdef"})
    with pytest.raises(UsageError, match=f"begun with questctl .* .sources {was['sources']}.*0123456789abcdef.*--force"):
        join(sweep, sweep.file.cells)
    join(sweep, sweep.file.cells, force=True)
    join(sweep, sweep.file.cells)
    monkeypatch.undo()


def test_other_text_is_refused_unless_forced(sweep, monkeypatch):
    join(sweep, sweep.file.cells)
    (text,) = manifest.data_hashes(sweep.file.cells)
    monkeypatch.setattr(manifest, "data_hashes", lambda *_: {text: "f" * 64})
    with pytest.raises(UsageError, match=r"other text under data.source synthetic:markov.* .hash .*here ffffffff.*--force"):
        join(sweep, sweep.file.cells)
    join(sweep, sweep.file.cells, force=True)


def test_a_dry_run_refuses_other_code_as_the_sweep_would(sweep, tmp_path, monkeypatch):
    words = ["sweep", str(tmp_path / "seeds.toml"), "--runs", str(tmp_path / "runs")]
    join(sweep, sweep.file.cells)
    assert invoke(*words, "--dry-run").exit_code == 0
    monkeypatch.setattr(manifest, "code_version", lambda: {"questctl": "0", "sources": "0123456789abcdef"})
    dry, real = invoke(*words, "--dry-run"), invoke(*words)
    assert (dry.exit_code, dry.stderr) == (real.exit_code, real.stderr) == (2, real.stderr)
    assert invoke(*words, "--dry-run", "--force").exit_code == 0


def test_the_code_is_that_which_computes(monkeypatch, tmp_path):
    """A changed source is another version; a changed command, figure or test is not."""
    import shutil

    shutil.copytree(system.PACKAGE, tmp_path / "questctl", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(system, "PACKAGE", tmp_path / "questctl")
    before = code_version()
    for name in ("cli/sweep.py", "analysis/fit.py"):
        with (tmp_path / "questctl" / name).open("a") as f:
            f.write("# changed\n")
        assert code_version() == before
    for name in (
        "quant/grids.py",
        "kernels/hadamard.py",
        "training/loop.py",
        "models/llama.py",
        "config/__init__.py",
        "evaluate/loss.py",
    ):
        path = tmp_path / "questctl" / name
        path.write_text(f"{path.read_text()}# changed\n")
        now = code_version()
        assert now != before
        before = now


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 1}', '{"schema": 2}'])
def test_a_damaged_record_is_named_with_a_remedy(sweep, tmp_path, damage):
    join(sweep, sweep.file.cells)
    (sweep.folder / "sweep.json").write_text(damage)
    with pytest.raises(DataError, match=r"sweep.json: .*start the sweep again with questctl sweep FILE"):
        find(sweep.folder, tmp_path)


def test_a_record_of_the_last_version_is_read(sweep, tmp_path):
    join(sweep, sweep.file.cells)
    path = sweep.folder / "sweep.json"
    record = read_json(path, "")
    del record["name"]
    write_sealed(path, {**record, "schema": 1, "plan": "earlier"})
    assert find(sweep.folder, tmp_path).file == replace(sweep.file, name="earlier")


def test_a_recorded_sweep_has_its_own_runs_and_values(sweep, tmp_path):
    join(sweep, sweep.file.cells)
    with pytest.raises(UsageError, match=r"--set: .* recorded sweep"):
        find(sweep.folder, tmp_path, sets=["train.steps=3"])
    with pytest.raises(UsageError, match=r"--runs: .* recorded sweep"):
        find(sweep.folder, tmp_path, runs=tmp_path)
    with pytest.raises(UsageError, match="neither a sweep file nor the folder of a sweep"):
        find(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="there is no such sweep file"):
        find(tmp_path / "nowhere", tmp_path)


def test_the_worker_command_refuses_in_a_sentence(sweep, tmp_path):
    join(sweep, sweep.file.cells)
    values = json.loads((sweep.folder / "sweep.json").read_text())
    del values["seal"]  # a record of an earlier version
    values["code"]["sources"] = "old"
    (sweep.folder / "sweep.json").write_text(json.dumps(values))
    result = invoke("worker", sweep.folder)
    assert result.exit_code == 2
    assert "sources old" in result.output
    assert not list((tmp_path / "runs").glob("[!.]*"))
