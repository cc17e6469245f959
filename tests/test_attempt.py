"""Attempts at cells of several processes: how a group begins, and that it ends as one, whichever of its processes is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import psutil
import pytest
from helpers import until
from sweep_trainers import assert_trained_once, traced
from test_worker import cell, states, trace  # noqa: F401

from questctl.errors import Preempted
from questctl.store import RunStore
from questctl.store.lease import Lease
from questctl.sweep import worker
from questctl.sweep.outcomes import OutcomeReader
from questctl.sweep.resource_rules import Resources
from questctl.sweep.slots import Device, Pool, Slot
from questctl.sweep.sweep_file import Cell
from questctl.training import group

RANKED = "sweep_trainers:ranked"


def several(seed: int, nproc: int, steps: int = 20) -> Cell:
    one = cell(seed, steps=steps)
    return Cell(one.config, one.values, Resources(nproc))


def drain(cells, runs, **kwargs) -> None:
    pool = Pool((Device(None, 4),), 1)
    worker.drain(cells, runs, **{"threads": 1, "trainer": RANKED, "poll_s": 0.05, "pool": pool, **kwargs})


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(group, "LOST_GRACE_S", 0.1)
    monkeypatch.setattr(group, "GRACE_S", 0.5)


def ranks(path: Path) -> dict[str, list[tuple[int, int, int, int]]]:
    """`run/rank` → (world size, local rank, pid, parent) of each attempt."""
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    for name, size, local, pid, parent, _ in traced(path):
        if "/" in name:
            found.setdefault(name, []).append((size, local, pid, parent))
    return found


def steps_of(path: Path) -> list[tuple]:
    return [s for s in traced(path) if "/" not in s[0]]


def alive(path: Path) -> list[int]:
    """Ranks and heads that left a trace and still exist."""
    pids = {pid for attempts in ranks(path).values() for *_, pid, parent in attempts for pid in (pid, parent)} - {os.getpid()}
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def begun(cells, runs: Path) -> multiprocessing.Process:
    """A worker in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=drain, args=(cells, runs))
    process.start()
    return process


def test_each_rank_has_its_place_and_one_lease_is_enough(tmp_path, trace):  # noqa: F811
    cells = [several(1, 3), several(2, 2), several(3, 2)]
    drain(cells, tmp_path / "runs")
    assert states(cells, tmp_path / "runs") == ["done"] * 3
    found = ranks(trace)
    assert {name: attempts[0][:2] for name, attempts in found.items()} == {
        f"{c.run_id}/{rank}": (c.nproc, rank) for c in cells for rank in range(c.nproc)
    }
    heads = {attempts[0][3] for attempts in found.values()}
    assert len(heads) == 3
    assert len({attempts[0][2] for attempts in found.values()}) == 7
    assert not list((tmp_path / "runs").glob("*/lease"))
    assert alive(trace) == []


def test_a_lost_rank_ends_the_attempt_and_the_next_goes_on_from_the_checkpoint(tmp_path, trace):  # noqa: F811
    """First rank 1, then rank 0, which writes the run; both times the others are gone before the next attempt begins."""
    one = several(1, 3, steps=150)
    process = begun([one], tmp_path / "runs")
    for attempt, victim in enumerate(("1", "0"), 1):
        until(lambda n=attempt: len(ranks(trace).get(f"{one.run_id}/0", [])) == n)
        begin = len(steps_of(trace))
        until(lambda n=begin: len(steps_of(trace)) > n + 12)
        os.kill(ranks(trace)[f"{one.run_id}/{victim}"][-1][2], signal.SIGKILL)
    process.join(30)
    assert process.exitcode == 0
    run = RunStore(tmp_path / "runs").run(one.run_id)
    assert (run.state(), run.status().attempts) == ("done", 3)
    assert "rank 1 of 3 was killed by SIGKILL" in run.log_path.read_text()
    assert_trained_once_by_rank0(trace, one)
    assert [line["step"] for line in run.metrics()] == list(range(150))
    assert alive(trace) == []


def test_a_cell_that_loses_its_ranks_again_and_again_has_failed(tmp_path, trace):  # noqa: F811
    """Seed 35 kills its rank 0 at half its steps, each time at the same checkpoint."""
    cells = [several(35, 2, steps=6), several(1, 2, steps=4)]
    drain(cells, tmp_path / "runs")
    failed, done = OutcomeReader(cells, RunStore(tmp_path / "runs"))()
    assert (failed.state, done.state) == ("failed", "done")
    assert f"a process was lost {worker.LOST_ATTEMPTS} times in a row without a new checkpoint" in failed.message
    assert len(ranks(trace)[f"{cells[0].run_id}/0"]) == worker.LOST_ATTEMPTS


def test_an_error_of_any_rank_is_that_of_the_cell(tmp_path, trace):  # noqa: F811
    cells = [several(39, 2, steps=500), several(36, 2), several(37, 2)]
    drain(cells, tmp_path / "runs")
    raised, diverged, memory = OutcomeReader(cells, RunStore(tmp_path / "runs"))()
    assert (raised.state, raised.message) == ("failed", "ValueError: this rank cannot")
    assert (diverged.state, diverged.message) == ("diverged", "blocks.0.wq is not finite")
    assert (memory.state, memory.message) == ("failed", "out of memory, and")
    assert "Traceback" in RunStore(tmp_path / "runs").run(cells[0].run_id).log_path.read_text()
    assert alive(trace) == []


def test_no_rank_begins_where_another_process_has_the_run(tmp_path, trace):  # noqa: F811
    one = several(1, 2)
    run = RunStore(tmp_path / "runs").run(one.run_id)
    run.create(one.config)
    context = multiprocessing.get_context("fork")
    with Lease(run.lease_path):
        child = context.Process(target=worker.begin, args=(one.config, run, 1, Slot(), RANKED, False, 2))
        child.start()
        child.join(20)
    assert child.exitcode == 0
    assert traced(trace) == []


@pytest.mark.parametrize("victim", ["worker", "head"])
def test_no_rank_outlives_those_who_watch_it(tmp_path, trace, victim):  # noqa: F811
    """A head whose worker is killed lets its ranks checkpoint; the ranks of a killed head are killed, and another goes on."""
    one = several(1, 2, steps=400)
    process = begun([one], tmp_path / "runs")
    until(lambda: len(steps_of(trace)) > 12)
    head = ranks(trace)[f"{one.run_id}/0"][0][3]
    os.kill(process.pid if victim == "worker" else head, signal.SIGKILL)
    run = RunStore(tmp_path / "runs").run(one.run_id)
    if victim == "worker":
        process.join()
        until(lambda: alive(trace) == [])
        assert (run.state(), run.status().step) == ("preempted", len(steps_of(trace)))
    else:
        until(lambda: len(ranks(trace)[f"{one.run_id}/0"]) == 2)
        first = {attempts[0][2] for attempts in ranks(trace).values()}
        assert not first & set(alive(trace))
        process.terminate()
        process.join(20)
        until(lambda: alive(trace) == [])


def test_a_signal_checkpoints_the_whole_group(tmp_path, trace):  # noqa: F811
    one = several(1, 2, steps=60)
    process = begun([one], tmp_path / "runs")
    until(lambda: len(steps_of(trace)) > 12)
    process.terminate()
    process.join(20)
    assert process.exitcode == 1  # drain raised Preempted
    assert states([one], tmp_path / "runs") == ["preempted"]
    assert alive(trace) == []
    drain([one], tmp_path / "runs")
    assert_trained_once_by_rank0(trace, one)


def assert_trained_once_by_rank0(path: Path, one: Cell) -> None:
    lines = [line for line in path.read_text().splitlines() if "/" not in line.split()[0]]
    path.with_name("rank0").write_text("\n".join(lines))
    assert_trained_once(path.with_name("rank0"), {one.run_id: one.config.train.steps})


def test_a_worker_that_is_stopped_says_so(tmp_path, trace):  # noqa: F811
    one = several(1, 2, steps=4)
    w = worker._Worker([one], tmp_path / "runs", 1, Pool((Device(None, 2),), 1), False, RANKED, 0.05, None, None)
    w.stopping = "SIGTERM"
    with pytest.raises(Preempted):
        w.drain()
    assert traced(trace) == []
