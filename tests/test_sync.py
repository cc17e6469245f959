"""Runs copied by rsync between folders and to a stand-in of a remote machine: conflicting results are never overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import report_runs
from command_line import run_cli
from helpers import files_in, write_file

from questctl.errors import DataError, MissingDependency, StorageError, UsageError
from questctl.store import RunStore
from questctl.store import sync as sync_module
from questctl.store.lease import Lease
from questctl.store.listing import list_runs
from questctl.store.packing import archive_runs
from questctl.store.sync import sync_runs

pytestmark = pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed here")

HERE, THERE, BOTH, OTHER = report_runs.configs(presets=("53K",), methods=("bf16", "quest-4"), ratios=(8, 16))
BEGUN = report_runs.config("53K", "ste", 2)


@pytest.fixture
def sides(tmp_path) -> tuple[Path, Path]:
    """Two folders: each has a run of its own, one is in both, one has finished here and not there, one is unfinished here."""
    here, there = tmp_path / "here", tmp_path / "there"
    report_runs.write_all(here, [HERE, BOTH, OTHER])
    report_runs.write_all(there, [THERE, BOTH])
    report_runs.write(there, OTHER, state="preempted")
    report_runs.write(here, BEGUN, state="preempted")
    write_file(here / HERE.run_id / "model.safetensors", b"weights")
    write_file(here / HERE.run_id / "checkpoints" / "step-00000001" / "state.json", "{}")
    write_file(here / HERE.run_id / "evaluations.jsonl", "")
    return here, there


@pytest.fixture
def host(tmp_path, monkeypatch) -> str:
    """A host whose shell runs what it is told on this machine."""
    shell = write_file(tmp_path / "shell", '#!/bin/sh\nshift\nexec "$@"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("RSYNC_RSH", str(shell))
    return "elsewhere:"


def done(root: Path) -> list[str]:
    return [row["run"] for row in list_runs(root) if row["state"] == "done"]


@pytest.mark.parametrize("remote", [False, True])
def test_finished_runs_come_to_both_sides(sides, host, remote):
    here, there = sides
    place = f"{host}{there}" if remote else str(there)
    synced = sync_runs(place, here)
    assert (synced.pulled.runs, synced.pulled.equal) == ([THERE.run_id], 1)
    assert sorted(synced.pushed.runs) == sorted([HERE.run_id, OTHER.run_id])
    assert synced.pushed.left == {BEGUN.run_id: "is not finished (preempted)"}
    assert done(here) == done(there) == sorted(c.run_id for c in (HERE, THERE, BOTH, OTHER))
    assert not (there / BEGUN.run_id).exists()
    kept = [name for name in files_in(here / HERE.run_id) if not name.startswith("checkpoints/")]
    assert files_in(there / HERE.run_id) == kept
    assert (there / HERE.run_id / "model.safetensors").read_bytes() == b"weights"
    again = sync_runs(place, here)
    assert (again.pulled.runs, again.pushed.runs, again.conflicts) == ([], [], {})
    assert not any(p.name.startswith(".") for p in (*here.iterdir(), *there.iterdir()))


@pytest.mark.parametrize("remote", [False, True])
def test_two_truths_are_refused_and_both_stay(sides, host, remote):
    here, there = sides
    result = there / BOTH.run_id / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"loss": 9.0}))
    before = result.read_bytes(), (here / BOTH.run_id / "result.json").read_bytes()
    said = run_cli("runs", "sync", f"{host}{there}" if remote else there, "--runs", here, code=1).stderr
    assert f"{BOTH.run_id} is finished on both sides with other numbers" in said
    assert (result.read_bytes(), (here / BOTH.run_id / "result.json").read_bytes()) == before
    assert THERE.run_id in done(here)  # what is in no conflict is copied


def test_another_machine_may_have_taken_another_time(sides):
    here, there = sides
    result = there / BOTH.run_id / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"seconds": 9.0, "tokens_per_s": 1.0}))
    assert sync_runs(there, here).pulled.equal == 1


@pytest.mark.parametrize("remote", [False, True])
def test_a_run_that_is_trained_there_stays(sides, host, remote):
    here, there = sides
    status = there / OTHER.run_id / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "running"}))
    with Lease(there / OTHER.run_id / "lease"):
        pushed = sync_runs(f"{host}{there}" if remote else there, here, pull=False).pushed
    assert pushed.left[OTHER.run_id].startswith("is being trained in")
    assert OTHER.run_id not in done(there)


def test_a_run_that_begins_there_meanwhile_stays(sides, host, monkeypatch):
    here, there = sides
    real = sync_module._look

    def look(place, folder):
        if folder.name == "again":
            write_file(there / HERE.run_id / "config.json", (here / HERE.run_id / "config.json").read_bytes())
            write_file(there / HERE.run_id / "status.json", json.dumps({"state": "running"}))
            lease.claim()
        return real(place, folder)

    lease = Lease(there / HERE.run_id / "lease")
    monkeypatch.setattr(sync_module, "_look", look)
    pushed = sync_runs(f"{host}{there}", here, pull=False).pushed
    lease.release()
    assert pushed.left[HERE.run_id] == "is being trained there"
    assert HERE.run_id not in done(there)
    assert OTHER.run_id in done(there)


def test_another_experiment_under_one_name_is_a_conflict(sides):
    here, there = sides
    shutil.copy(there / THERE.run_id / "config.json", there / OTHER.run_id / "config.json")
    assert "is another experiment" in sync_runs(there, here).conflicts[OTHER.run_id]


@pytest.mark.parametrize("remote", [False, True])
def test_archived_runs_are_copied_as_folders(sides, host, remote):
    here, there = sides
    archive_runs(runs=here)
    archive_runs(runs=there)
    sync_runs(f"{host}{there}" if remote else there, here)
    assert done(here) == done(there) == sorted(c.run_id for c in (HERE, THERE, BOTH, OTHER))
    assert RunStore(here).run(BOTH.run_id).is_archived
    assert not RunStore(here).run(THERE.run_id).is_archived


def test_what_arrives_damaged_is_left(sides, monkeypatch):
    here, there = sides
    monkeypatch.setattr(sync_module, "model_is_intact", lambda run: run.name != HERE.run_id)
    pushed = sync_runs(there, here, pull=False).pushed
    assert pushed.left[HERE.run_id] == "changed while it was copied; repeat the command"
    assert done(there) == sorted(c.run_id for c in (THERE, BOTH, OTHER))


def test_what_is_refused(sides, monkeypatch):
    here, there = sides
    with pytest.raises(UsageError, match="is the folder of runs itself"):
        sync_runs(here, here)
    with pytest.raises(DataError, match="there is no such folder of runs"):
        sync_runs(there / "nothing", here)
    monkeypatch.setenv("RSYNC_RSH", "false")
    with pytest.raises(StorageError, match="elsewhere:runs: rsync cannot copy: "):
        sync_runs("elsewhere:runs", here)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match=r"sync: needs rsync, which is not installed here \(apt install rsync\)"):
        sync_runs(there, here)
