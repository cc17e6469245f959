"""Faults at random moments: killed runs, workers and supervisors, frozen processes, clocks that jump, two supervisors.

The trainer computes nothing (sweep_trainers.logged), so that a machine of two cores gets through hundreds of kills; it claims,
checkpoints and logs as the real one does. After each storm every run is done, has each of its metric lines exactly once and the
result of an undisturbed run, and what was finished was never touched again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
import tally
import tiny
from sweep_trainers import assert_trained_once, result_of, traced
from test_distributed import same_curve
from test_local import trace  # noqa: F401
from test_sweep_faults import Finished, children_and_workers
from test_worker import cell

from questctl import store
from questctl.config.describe import to_toml
from questctl.errors import QuestError
from questctl.store import RunStore
from questctl.sweep.launchers import local
from questctl.sweep.outcomes import OutcomeReader, reset
from questctl.sweep.sweep_file import SweepFile
from questctl.training.loop import train

LOGGED = "sweep_trainers:logged"


def assert_whole(cells, runs: Path) -> None:
    """Every run is done, with each line once, the right result, and nothing left over of those that were killed."""
    tally.COUNTS["runs checked"] += len(cells)
    for c in cells:
        run = RunStore(runs).run(c.run_id)
        result, lines = run.result(), [line["step"] for line in run.metrics()]
        if result is None:
            tally.COUNTS["runs lost"] += 1
        if lines != list(range(c.config.train.steps)):
            tally.COUNTS["runs with lost or repeated lines"] += 1
        assert result is not None, c.run_id
        assert result.loss == 1 / (1 + c.config.train.seed)
        assert lines == list(range(c.config.train.steps)), c.run_id
        assert run.status().attempts <= len(run.env()["attempts"])  # a kill may fall between the two files
        assert not [p.name for p in run.path.glob("*.tmp") if not p.name.startswith("lease")]


def kill(victims: list[psutil.Process], dice: random.Random, what: str) -> bool:
    with suppress(psutil.NoSuchProcess, IndexError):
        dice.choice(victims).kill()
        tally.COUNTS[f"killed: {what}"] += 1
        return True
    return False


@contextmanager
def supervisor(cells, runs: Path, *, jobs: int = 2) -> Iterator[multiprocessing.Process]:
    """A supervisor in a process of its own; its runs are over when this ends."""
    process = multiprocessing.get_context("fork").Process(target=_supervise, args=(cells, runs, jobs))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _supervise(cells, runs: Path, jobs: int) -> None:
    forkserver._forkserver.__init__()  # not that of the process it was forked from
    try:
        local.launch(cells, RunStore(runs), jobs=jobs, trainer=LOGGED, poll_s=0.05)
    except QuestError as e:
        os._exit(e.exit_code)
    os._exit(0)


def drain_again(cells, runs: Path, *, jobs: int = 4, watch: Callable | None = None) -> None:
    """Sweep here; runs that were killed once too often are tried again, until all are done."""
    for _ in range(100):
        local.launch(cells, RunStore(runs), jobs=jobs, trainer=LOGGED, poll_s=0.05, watch=watch)
        if not reset(cells, RunStore(runs), ("failed",)):
            return
    pytest.fail("it never ends")


def storm(cells, runs: Path, *, kills: int, seed: int, pause: float = 0.05) -> None:
    """Kill runs and workers in turn, `kills` of them, while `drain_again` goes on."""
    dice, finished = random.Random(seed), Finished(SweepFile("storm", "", tuple(cells)), runs)
    done, last = [0], [0.0]

    def watch(_: object) -> None:
        finished.look()
        if done[0] < kills and time.monotonic() - last[0] > pause:
            children, workers = children_and_workers()
            what, victims = ("a worker", workers) if done[0] % 2 else ("a training process", children)
            done[0] += kill(victims, dice, what)
            last[0] = time.monotonic()

    drain_again(cells, runs, watch=watch)
    finished.look()
    assert_whole(cells, runs)
    assert done[0] >= kills // 2, "the storm was over before it began"


def supervisors_killed(cells, runs: Path, *, kills: int, seed: int, pairs: bool) -> None:
    """Kill supervisors, one or two at a time on the same sweep, then drain in peace."""
    dice, finished = random.Random(seed), Finished(SweepFile("storm", "", tuple(cells)), runs)
    for _ in range(kills):
        with supervisor(cells, runs) as first:
            if pairs:
                with supervisor(cells, runs) as second:
                    _until_begun(runs, dice)
                    second.kill()
                    tally.COUNTS["killed: a supervisor"] += 1
            else:
                _until_begun(runs, dice)
            first.kill()
            tally.COUNTS["killed: a supervisor"] += 1
        finished.look()
    drain_again(cells, runs)
    finished.look()
    assert_whole(cells, runs)


def _until_begun(runs: Path, dice: random.Random) -> None:
    before = len(traced(Path(os.environ["SWEEP_TRACE"])))
    deadline = time.monotonic() + 30
    while len(traced(Path(os.environ["SWEEP_TRACE"]))) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(dice.random() * 0.3)


@pytest.mark.faults
def test_a_short_storm(tmp_path, trace):  # noqa: F811
    cells = [cell(100 + i, steps=25) for i in range(8)]
    storm(cells, tmp_path / "runs", kills=8, seed=0)
    assert_trained_once(trace, {c.run_id: 25 for c in cells}, killed=True)


def test_a_supervisor_is_killed(tmp_path, trace):  # noqa: F811
    supervisors_killed([cell(200 + i, steps=25) for i in range(4)], tmp_path / "runs", kills=2, seed=1, pairs=False)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_a_storm(tmp_path, trace, seed):  # noqa: F811
    cells = [cell(100 + i, steps=40) for i in range(40)]
    storm(cells, tmp_path / "runs", kills=50, seed=seed)
    assert_trained_once(trace, {c.run_id: 40 for c in cells}, killed=True)


@pytest.mark.faults
@pytest.mark.parametrize("pairs", [False, True])
def test_supervisors_are_killed_again_and_again(tmp_path, trace, pairs):  # noqa: F811
    cells = [cell(200 + i, steps=60) for i in range(12)]
    supervisors_killed(cells, tmp_path / "runs", kills=10, seed=2, pairs=pairs)
    assert_trained_once(trace, {c.run_id: 60 for c in cells}, killed=True)


@pytest.mark.faults
def test_two_supervisors_in_a_storm_of_signals(tmp_path, trace):  # noqa: F811
    """SIGTERM and SIGUSR1 to one supervisor while the other goes on: the first checkpoints and ends with code 75."""
    cells, runs = [cell(300 + i, steps=60) for i in range(12)], tmp_path / "runs"
    for i, number in enumerate((signal.SIGTERM, signal.SIGUSR1) * 2):
        with supervisor(cells, runs) as first, supervisor(cells, runs):
            _until_begun(runs, random.Random(i))
            os.kill(first.pid, number)
            first.join(30)
            tally.COUNTS[f"stopped: a supervisor by {number.name}"] += 1
            assert first.exitcode in (75, 0)
    drain_again(cells, runs)
    assert_whole(cells, runs)
    assert_trained_once(trace, {c.run_id: 60 for c in cells}, killed=True)


def stand_still(cells, runs: Path, *, times: int, seed: int) -> None:
    """Stop training processes with SIGSTOP for longer than their lease (SWEEP_STALE), let others take over, wake them."""
    dice, stale = random.Random(seed), float(os.environ["SWEEP_STALE"])
    stopped: list[tuple[psutil.Process, float]] = []
    count = [0]

    def watch(_: object) -> None:
        for process, since in list(stopped):
            if time.monotonic() - since > 2.5 * stale:
                with suppress(psutil.NoSuchProcess):
                    process.resume()
                stopped.remove((process, since))
        if count[0] < times and len(stopped) < 2 and dice.random() < 0.3:
            with suppress(psutil.NoSuchProcess, IndexError):
                victim = dice.choice(children_and_workers()[0])
                if victim.pid not in [p.pid for p, _ in stopped]:
                    victim.suspend()
                    stopped.append((victim, time.monotonic()))
                    count[0] += 1
                    tally.COUNTS["stopped beyond its lease: a training process"] += 1

    try:
        drain_again(cells, runs, watch=watch)
    finally:
        for process, _ in stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()
    drain_again(cells, runs)
    assert_whole(cells, runs)
    assert count[0] >= min(2, times)


@pytest.fixture
def short_leases(monkeypatch):
    monkeypatch.setenv("SWEEP_STALE", "0.6")


@pytest.mark.faults
def test_those_that_stand_still_and_come_back(short_leases, tmp_path, trace):  # noqa: F811
    stand_still([cell(400 + i, steps=60) for i in range(12)], tmp_path / "runs", times=12, seed=0)


def clocks_jump(cells, runs: Path, *, jumps: int, seed: int) -> None:
    """Move the times of the leases by an hour, as a file server's clock does that jumps, while everything goes on."""
    dice, count = random.Random(seed), [0]

    def watch(_: object) -> None:
        leases = list(runs.glob("*/lease"))
        if count[0] < jumps and leases and dice.random() < 0.3:
            hour = dice.choice((-3600, 3600))
            with suppress(FileNotFoundError):
                victim = dice.choice(leases)
                os.utime(victim, (time.time() + hour,) * 2)
                count[0] += 1
                tally.COUNTS[f"clock of a lease jumped {'back' if hour < 0 else 'ahead'}"] += 1

    drain_again(cells, runs, watch=watch)
    assert_whole(cells, runs)
    assert count[0] >= min(4, jumps)


def test_a_clock_jumps(tmp_path, trace):  # noqa: F811
    clocks_jump([cell(500 + i, steps=40) for i in range(6)], tmp_path / "runs", jumps=6, seed=0)


@pytest.mark.faults
def test_clocks_jump_again_and_again(tmp_path, trace):  # noqa: F811
    clocks_jump([cell(500 + i, steps=80) for i in range(16)], tmp_path / "runs", jumps=40, seed=1)


# --- measured ---------------------------------------------------------------------------------------------------------


def processor_seconds() -> float:
    """Of this process and of all of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in both)


@pytest.mark.faults
def test_200_cells_with_a_worker_killed_every_second(tmp_path, trace):  # noqa: F811
    """All done exactly once within a minute of two cores; of processor time where the machine is shared."""
    cells, runs, dice = [cell(1000 + i, steps=1) for i in range(200)], tmp_path / "runs", random.Random(0)
    last, kills = [time.monotonic()], [0]

    def watch(_: object) -> None:
        if time.monotonic() - last[0] >= 1.0:
            last[0] = time.monotonic()
            kills[0] += kill(children_and_workers()[1], dice, "a worker")

    start, used = time.monotonic(), processor_seconds()
    outcomes = local.launch(cells, RunStore(runs), jobs=4, trainer="sweep_trainers:noop", watch=watch, poll_s=0.1)
    wall = time.monotonic() - start
    forkserver._forkserver._stop()
    used = processor_seconds() - used
    tally.LINES.append(f"200 cells, 4 workers, {kills[0]} of them killed: {wall:.1f} s, {used:.1f} s of processor time")
    assert [o.state for o in outcomes] == ["done"] * 200
    assert sorted(s[0] for s in traced(trace)) == sorted(c.run_id for c in cells)
    assert min(wall, used / 2) < 60


@pytest.mark.faults
def test_one_process_of_a_run_on_two_is_killed(tmp_path):
    """Again and again, the first and the second in turn: the others end with it, and the same command resumes the run."""
    config = tiny.config(train__steps=60, train__checkpoint_every=6)
    (tmp_path / "run.toml").write_text(to_toml(config))
    words = [sys.executable, "-m", "questctl", "train", "--config", tmp_path / "run.toml", "--runs", tmp_path / "two"]
    words += ["--nproc", "2", "--quiet"]
    timing = tmp_path / "two" / config.run_id / "timing.jsonl"
    for kills in range(3):
        before = timing.stat().st_size if timing.exists() else 0
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not (timing.exists() and timing.stat().st_size > before):
                time.sleep(0.02)
            children = sorted(psutil.Process(process.pid).children(), key=lambda p: p.pid)
            children[kills % 2].kill()
            tally.COUNTS["killed: a process of a run on two"] += 1
            said = process.communicate(timeout=120)[1]
        assert process.returncode in (1, 128 + signal.SIGKILL), said
        assert "Traceback" not in said
        assert "another process of this run has ended" in said or "was killed by SIGKILL" in said
        assert RunStore(tmp_path / "two").run(config.run_id).result() is None
    subprocess.run(words, check=True, timeout=120)
    train(config, runs=tmp_path / "one")
    assert same_curve(tmp_path / "two", tmp_path / "one", config)


def test_progress_of_a_damaged_status_is_one_sentence(tmp_path, trace):  # noqa: F811
    one = cell(1)
    run = RunStore(tmp_path / "runs").run(one.run_id)
    run.create(one.config)
    run.status_path.write_text(json.dumps({"state": "runn"}))
    (seen,) = OutcomeReader([one], RunStore(tmp_path / "runs"))()
    assert (seen.state, "status.json: is damaged" in seen.message) == ("failed", True)


@pytest.mark.faults
def test_a_thousand_runs_are_listed_in_two_seconds(tmp_path):
    """1000 finished folders of 500 metric lines: `runs ls` and `load_runs`, in processor time."""
    line = json.dumps({"step": 1, "train_loss(nats/token)": 3.0, "lr": 1e-3, "grad_norm": 1.0}) + "\n"
    config = cell(1).config
    for i in range(1000):
        run = store.Run(tmp_path / "runs" / f"run-{i}")
        run.path.mkdir(parents=True)
        run.config_path.write_text(json.dumps(config.to_json()))
        run.metrics_path.write_text(line * 500)
        run.status_path.write_text(json.dumps(asdict(store.Status("done", 522, 522, 1))))
        run.result_path.write_text(json.dumps({"schema": 1, **asdict(replace(result_of(config), run=run.name))}))
    words = [sys.executable, "-m", "questctl", "runs", "ls", "--runs", str(tmp_path / "runs")]
    start, used = time.monotonic(), processor_seconds()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    listed, wall = processor_seconds() - used, time.monotonic() - start
    store.load_runs(tmp_path / "runs" / "run-0")  # pandas itself
    used = processor_seconds()
    assert len(store.load_runs(tmp_path / "runs")) == 1000
    loaded = processor_seconds() - used
    said = f"runs ls {wall:.1f} s, {listed:.1f} s of processor time; load_runs {loaded:.2f} s"
    tally.LINES.append(f"1000 finished runs of 500 lines: {said}")
    assert listed < 2
    assert loaded < 2
