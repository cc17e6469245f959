"""Workers: the cells they take and in which order, children that die, and cells they must leave alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from sweep_trainers import assert_trained_once, result_of, traced

from questctl.config import Layer, flatten, resolve
from questctl.errors import Preempted, StorageError
from questctl.store import Run, RunStore
from questctl.store.lease import Lease
from questctl.sweep import attempt, worker
from questctl.sweep.outcomes import OutcomeReader, read_outcome, reset
from questctl.sweep.slots import Slot
from questctl.sweep.sweep_file import Cell

FAKE = "sweep_trainers:train"


def cell(seed: int, steps: int = 10, **train: object) -> Cell:
    tree = {"train": {"seed": seed, "steps": steps, **train}}
    return Cell(resolve([Layer("test", flatten(tree, where="test"))]).config, {"train.seed": seed})


@pytest.fixture
def trace(tmp_path, monkeypatch):
    monkeypatch.setenv("SWEEP_TRACE", str(tmp_path / "trace"))
    return tmp_path / "trace"


def drain(cells, runs, **kwargs):
    worker.drain(cells, runs, **{"threads": 1, "trainer": FAKE, "poll_s": 0.05, **kwargs})


def states(cells, runs) -> list[str]:
    return [seen.state for seen in OutcomeReader(cells, RunStore(runs))()]


def test_every_cell_is_trained_once_the_longest_first_each_in_a_process_of_its_own(tmp_path, trace):
    cells = [cell(1, steps=3), cell(2, steps=9), cell(3, steps=6)]
    drain(cells, tmp_path / "runs", threads=3)
    assert states(cells, tmp_path / "runs") == ["done"] * 3
    assert_trained_once(trace, {c.run_id: c.config.train.steps for c in cells})
    steps = traced(trace)
    assert list(dict.fromkeys(s[0] for s in steps)) == [cells[i].run_id for i in (1, 2, 0)]
    assert len({s[3] for s in steps}) == 3
    assert {s[4] for s in steps} == {os.getpid()}
    assert {s[5] for s in steps} == {3}
    drain(cells, tmp_path / "runs")
    assert traced(trace) == steps


def test_the_plan_s_own_number_of_threads_is_kept(tmp_path, trace):
    drain([cell(1, threads=2)], tmp_path / "runs", threads=5)
    assert {s[5] for s in traced(trace)} == {2}


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (31, "ZeroDivisionError: division by zero"),
        (32, "killed by SIGSEGV"),
        (33, "exit code 7"),
        (34, "SystemExit"),
        (35, "killed by SIGKILL (out of memory?)"),
        (37, "out of memory, and"),
    ],
)
def test_a_cell_that_fails_does_not_stop_the_others_and_says_why(tmp_path, trace, seed, words):
    cells = [cell(seed, steps=20), cell(1, steps=4)]
    drain(cells, tmp_path / "runs")
    failed, done = (read_outcome(c, RunStore(tmp_path / "runs").run(c.run_id)) for c in cells)
    assert (failed.state, done.state) == ("failed", "done")
    assert words in failed.message
    assert "\n" not in failed.message
    assert not (tmp_path / "runs" / failed.run_id / "lease").exists()
    if seed in (31, 34):
        assert "Traceback" in (tmp_path / "runs" / failed.run_id / "log.txt").read_text()
    if seed == 32:
        assert "Segmentation fault" in (tmp_path / "runs" / failed.run_id / "log.txt").read_text()


def test_what_failed_is_tried_again_only_when_asked_and_goes_on_from_its_checkpoint(tmp_path, trace):
    cells = [cell(31, steps=20), cell(36, steps=20), cell(1, steps=4)]
    runs = tmp_path / "runs"
    drain(cells, runs)
    assert states(cells, runs) == ["failed", "diverged", "done"]
    before = traced(trace)
    drain(cells, runs)
    assert traced(trace) == before
    (tmp_path / "healed").touch()
    assert reset(cells, RunStore(runs), ("failed",)) == cells[:1]
    assert states(cells, runs) == ["pending", "diverged", "done"]
    drain(cells, runs)
    assert states(cells, runs) == ["done", "diverged", "done"]
    again = traced(trace)[len(before) :]
    assert {s[0] for s in again} == {cells[0].run_id}
    assert [s[2] for s in again] == list(range(10, 20))
    assert RunStore(runs).run(cells[0].run_id).status().attempts == 2
    assert reset(cells, RunStore(runs), ("failed", "diverged")) == cells[1:2]


def test_a_run_that_another_process_trains_is_waited_for_not_touched(tmp_path, trace):
    mine, other = cell(1), cell(2, steps=1)
    run = RunStore(tmp_path / "runs").run(other.run_id)
    run.create(other.config)
    lease = Lease(run.lease_path).claim()

    def finish() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and states([mine], tmp_path / "runs") != ["done"]:
            time.sleep(0.02)
        time.sleep(0.3)
        with run.open_for_training(other.config, lease=lease) as writer:
            writer.set_state("failed", 0, "by the other")
        lease.release()

    thread = threading.Thread(target=finish)
    thread.start()
    drain([mine, other], tmp_path / "runs")
    thread.join()
    assert {s[0] for s in traced(trace)} == {mine.run_id}
    assert read_outcome(other, run).message == "by the other"


def test_a_run_whose_holder_is_gone_is_taken_over(tmp_path, trace):
    one = cell(1)
    run = RunStore(tmp_path / "runs").run(one.run_id)
    run.create(one.config)
    code = (
        "import os, pathlib, sys; from questctl.store.lease import Lease; Lease(pathlib.Path(sys.argv[1])).claim(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.lease_path)], check=True)
    assert run.lease_path.exists()
    drain([one], tmp_path / "runs")
    assert states([one], tmp_path / "runs") == ["done"]


def test_a_child_looks_again_after_its_claim(tmp_path, trace):
    """Between the worker's look and the child's claim another worker may have settled the run."""
    one = cell(1)
    run = RunStore(tmp_path / "runs").run(one.run_id)
    for state in ("failed", "diverged", "stopped"):
        with run.open_for_training(one.config) as writer:
            writer.set_state(state, 0, "elsewhere")
        child = multiprocessing.get_context("fork").Process(target=attempt.begin, args=(one.config, run, 1, Slot(), FAKE))
        child.start()
        child.join()
        assert (child.exitcode, read_outcome(one, run).state, traced(trace)) == (0, state, [])


@pytest.mark.parametrize("damage", ["config.json", "status.json", "other experiment"])
def test_a_damaged_folder_counts_as_failed_and_the_others_go_on(tmp_path, trace, damage):
    cells = [cell(1), cell(2)]
    run = RunStore(tmp_path / "runs").run(cells[0].run_id)
    run.create(cells[0].config)
    if damage == "other experiment":
        run.config_path.unlink()
        run.create(cells[1].config)
    else:
        (run.path / damage).write_text('{"schema": ')
    before = sorted((p.name, p.read_bytes()) for p in run.path.iterdir())
    drain(cells, tmp_path / "runs")
    bad, good = OutcomeReader(cells, RunStore(tmp_path / "runs"))()
    assert (bad.state, good.state) == ("failed", "done")
    assert run.name in bad.message
    assert sorted((p.name, p.read_bytes()) for p in run.path.iterdir()) == before
    assert reset(cells, RunStore(tmp_path / "runs"), ("failed",)) == []


def test_a_folder_that_cannot_be_written_ends_the_worker_with_a_sentence(tmp_path, trace):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="runs"):
        drain([cell(1)], tmp_path / "runs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_checkpoints_the_run_at_hand_and_takes_no_other(tmp_path, trace, number):
    cells = [cell(1, steps=60), cell(2, steps=50)]
    runs = tmp_path / "runs"
    pid = os.getpid()

    def send() -> None:
        deadline = time.monotonic() + 20
        while len(traced(trace)) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pid, number)

    handlers = [signal.getsignal(s) for s in worker.STOP_SIGNALS]
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(Preempted, match=number.name):
        drain(cells, runs)
    thread.join()
    assert [signal.getsignal(s) for s in worker.STOP_SIGNALS] == handlers
    assert states(cells, runs) == ["preempted", "pending"]
    drain(cells[:1], runs)
    assert_trained_once(trace, {cells[0].run_id: 60})
    assert {s[1] for s in traced(trace)} == {1, 2}


def test_a_child_whose_worker_is_killed_checkpoints_and_ends(tmp_path, trace):
    one = cell(1, steps=500)
    process = multiprocessing.get_context("fork").Process(target=drain, args=([one], tmp_path / "runs"))
    process.start()
    while len(traced(trace)) < 12:
        time.sleep(0.01)
    process.kill()
    process.join()
    run = RunStore(tmp_path / "runs").run(one.run_id)
    deadline = time.monotonic() + 20
    while run.lease_path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    taken = len(traced(trace))
    assert (run.state(), run.status().step) == ("preempted", taken)
    time.sleep(0.1)
    assert len(traced(trace)) == taken


def test_settled_cells_cost_a_worker_no_more_reads(tmp_path, trace, monkeypatch):
    cells = [cell(i, steps=1) for i in range(1, 4)]
    drain(cells, tmp_path / "runs")
    progress = OutcomeReader(cells, RunStore(tmp_path / "runs"))
    first = progress()
    monkeypatch.setattr("questctl.sweep.outcomes.read_outcome", lambda *_: pytest.fail("read again"))
    assert progress() == first == progress.last


def test_a_run_that_finishes_between_two_looks_is_read_with_its_result(tmp_path, monkeypatch):
    """`result()` just missed it, `state()` sees it: the outcome must still carry the loss."""
    one = cell(1, steps=2)
    run = RunStore(tmp_path).run(one.run_id)
    with run.open_for_training(one.config) as writer:
        writer.begin(step=0, steps=2, env={"data_hash": "0", "threads": 1, "attempt": {"host": "x"}})
        writer.finish(result_of(one.config))
    looks = []
    honest = Run.result
    monkeypatch.setattr(Run, "result", lambda self: honest(self) if looks.append(1) or len(looks) > 1 else None)
    assert read_outcome(one, run).loss is not None


def test_a_worker_reads_few_of_many_run_folders_at_a_time_and_all_in_turn(tmp_path, monkeypatch):
    from questctl.sweep import outcomes

    cells = [cell(i) for i in range(30)]
    store = RunStore(tmp_path)
    for one in cells[:20]:
        store.run(one.run_id).create(one.config)
    read = []
    real = outcomes.read_outcome
    monkeypatch.setattr(outcomes, "read_outcome", lambda one, run: read.append(one.run_id) or real(one, run))
    reader = outcomes.OutcomeReader(cells, store, most=8)
    first = [o.state for o in reader()]
    assert len(read) == 8
    assert first.count("running") == 12  # begun, and not read yet: nobody may take them
    assert first[20:] == ["pending"] * 10  # without a folder, and so without a look into it
    assert (reader.begun, reader.pace) == (20, 2.5)
    for _ in range(2):
        last = reader()
    assert {o.state for o in last} == {"pending"}
    assert set(read) == {one.run_id for one in cells[:20]}
    reader.forget(cells[3])
    monkeypatch.setattr(reader, "most", None)
    assert reader()[3].state == "pending"
    store.run(cells[0].run_id).remove()
    assert reader()[0].state == "pending"
