"""The local launcher: slots, threads, restarts, Ctrl-C, and what happens when the supervisor itself is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers import until
from sweep_trainers import assert_trained_once, traced
from test_worker import cell, states

from questctl.errors import RunFailed
from questctl.store import RunStore
from questctl.sweep.launchers import local
from questctl.sweep.slots import Slot

FAKE = "sweep_trainers:train"


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """Workers are forked from a server that keeps the environment it was started in."""
    monkeypatch.setenv("SWEEP_TRACE", str(tmp_path / "trace"))
    forkserver._forkserver._stop()
    yield tmp_path / "trace"
    forkserver._forkserver._stop()


def launch(cells, runs, **kwargs):
    return local.launch(cells, RunStore(runs), **{"trainer": FAKE, "poll_s": 0.05, **kwargs})


def alive(trace: Path) -> list[int]:
    """Workers and children that left a trace and still exist."""
    pids = {pid for *_, pid, ppid, _ in traced(trace) for pid in (pid, ppid)}
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_all_cells_once_with_one_thread_each(tmp_path, trace, monkeypatch):
    monkeypatch.setattr("questctl.sweep.slots.cpu_count", lambda: 7)
    cells = [cell(i, steps=i) for i in range(1, 13)]
    seen = []
    outcomes = launch(cells, tmp_path / "runs", jobs=3, watch=lambda now: seen.append([o.state for o in now]))
    assert [o.state for o in outcomes] == ["done"] * 12
    assert [o.loss for o in outcomes] == [1 / (1 + i) for i in range(1, 13)]
    assert_trained_once(trace, {c.run_id: c.config.train.steps for c in cells})
    steps = traced(trace)
    assert {s[5] for s in steps} == {1}  # tiny models; test_slots divides the CPUs among larger ones
    assert 1 < len({s[4] for s in steps}) <= 3
    assert seen[-1] == ["done"] * 12
    assert any("running" in states for states in seen)
    assert "OMP_NUM_THREADS" not in set(os.environ) or os.environ["OMP_NUM_THREADS"] != "2"
    assert launch(cells, tmp_path / "runs") == outcomes
    assert traced(trace) == steps


@pytest.mark.faults
def test_workers_and_children_killed_at_random_lose_and_repeat_nothing(tmp_path, trace):
    cells = [cell(i, steps=30) for i in range(1, 9)]
    dice, kills = random.Random(0), []

    def kill(outcomes) -> None:
        running = [s for s in traced(trace)[-3:] if psutil.pid_exists(s[4])]
        if running and len(kills) < 10 and dice.random() < 0.4:
            kills.append(dice.choice(running)[4])
            os.kill(kills[-1], signal.SIGKILL)

    outcomes = launch(cells, tmp_path / "runs", jobs=2, watch=kill)
    assert [o.state for o in outcomes] == ["done"] * 8
    assert_trained_once(trace, {c.run_id: 30 for c in cells})
    assert len(kills) >= 3


def test_the_loss_of_the_forkserver_costs_nothing(tmp_path, trace):
    cells, killed = [cell(i, steps=30) for i in range(1, 7)], []

    def kill(outcomes) -> None:
        if not killed and len(traced(trace)) > 20:
            killed.append(forkserver._forkserver._forkserver_pid)
            os.kill(killed[0], signal.SIGKILL)

    outcomes = launch(cells, tmp_path / "runs", jobs=2, watch=kill)
    assert killed
    assert [o.state for o in outcomes] == ["done"] * 6
    assert_trained_once(trace, {c.run_id: 30 for c in cells})


def test_a_program_without_a_guard_can_sweep(tmp_path, trace):
    """Workers do not run the file that started them."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        SCRIPT.partition('if __name__ == "__main__":')[0]
        + f"""
out = local.launch([cell(1)], RunStore({str(tmp_path / "runs")!r}), jobs=1, trainer={FAKE!r}, poll_s=0.05)
print([o.state for o in out], __file__)
"""
    )
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"['done'] {script}\n"


def test_workers_that_die_again_and_again_end_the_sweep(tmp_path, trace, monkeypatch):
    monkeypatch.setattr(local, "work", _die)
    monkeypatch.setattr(local, "IDLE_DEATHS", 3)
    with pytest.raises(RunFailed, match="1 cells remain"):
        launch([cell(1)], tmp_path / "runs", jobs=1)


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_cannot_write_says_so_and_is_not_replaced(tmp_path, trace, capfd):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunFailed, match="1 cells remain"):
        launch([cell(1)], tmp_path / "runs", jobs=1)
    assert str(tmp_path / "runs") in capfd.readouterr().err


SCRIPT = """
import sys
from test_worker import cell
from questctl.store import RunStore
from questctl.sweep.slots import Slot
from questctl.sweep.launchers import local
if __name__ == "__main__":
    cells = [cell(i, steps=int(sys.argv[2])) for i in (1, 2, 3)]
    try:
        local.launch(cells, RunStore(sys.argv[1]), jobs=2, trainer=sys.argv[3], poll_s=0.05)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        print(type(e).__name__, e)
        sys.exit(getattr(e, "exit_code", 1))
"""


@pytest.fixture
def sweep(tmp_path, trace):
    """Starts a supervisor as a process (and process group) of its own: sweep(steps, trainer) → Popen."""
    script = tmp_path / "supervise.py"
    script.write_text(SCRIPT)
    started = []

    def start(steps: int, trainer: str = FAKE) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        words = [sys.executable, str(script), str(tmp_path / "runs"), str(steps), trainer]
        started.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


CELLS = [cell(i, steps=60) for i in (1, 2, 3)]
STOPS = [(signal.SIGINT, 130), *(pytest.param(stop, 75, marks=pytest.mark.slow) for stop in (signal.SIGTERM, signal.SIGHUP))]


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_stopped_sweep_checkpoints_everything_and_goes_on(tmp_path, trace, sweep, number, code):
    process = sweep(60)
    until(lambda: len({s[0] for s in traced(trace)}) == 2)
    time.sleep(0.2)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:  # Ctrl-C and the end of the terminal reach the group
        os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code, out
    assert alive(trace) == []
    assert states(CELLS, tmp_path / "runs") == ["preempted", "preempted", "pending"]
    taken = len(traced(trace))
    assert sweep(60).wait(timeout=60) == 0
    assert states(CELLS, tmp_path / "runs") == ["done"] * 3
    assert len(traced(trace)) == 180 > taken, "a checkpoint was not the last word"
    assert_trained_once(trace, {c.run_id: 60 for c in CELLS})


def test_a_sweep_under_nohup_outlives_its_terminal(tmp_path, trace, sweep):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = sweep(40)
    finally:
        signal.signal(signal.SIGHUP, before)
    until(lambda: len({s[0] for s in traced(trace)}) == 2)
    os.killpg(process.pid, signal.SIGHUP)
    for pid in alive(trace):  # workers and runs
        os.kill(pid, signal.SIGHUP)
    assert process.wait(timeout=60) == 0
    assert_trained_once(trace, {c.run_id: 40 for c in [cell(i, steps=40) for i in (1, 2, 3)]})
    assert {s[1] for s in traced(trace)} == {1}  # attempts


@pytest.mark.parametrize("policy", ["passive", "active"])
def test_runs_wait_passively_unless_the_user_decided(tmp_path, trace, monkeypatch, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # so that it is restored
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if policy == "active":
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    launch([cell(1)], tmp_path / "runs", trainer="sweep_trainers:environment")
    assert (tmp_path / "runs" / "environment").read_text() == policy


def test_runs_of_ray_wait_passively(tmp_path, trace, monkeypatch):
    """The function that Ray calls, without Ray."""
    from questctl.sweep.launchers import ray

    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # so that it is restored
    monkeypatch.delenv("OMP_WAIT_POLICY")
    one = cell(1)
    sweep = SimpleNamespace(cells=[one], store=RunStore(tmp_path / "runs"), file=SimpleNamespace(stop=None))
    monkeypatch.setattr(ray, "open_sweep", lambda folder: sweep)
    ray._task(one.run_id, 1, "folder", 1, True, "sweep_trainers:environment", 0.05)
    assert (tmp_path / "runs" / "environment").read_text() == "passive"


def test_a_second_ctrl_c_does_not_wait(tmp_path, trace, sweep):
    process = sweep(60, "sweep_trainers:deaf")
    until(lambda: len(traced(trace)) == 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    until(lambda: alive(trace) == [])


def test_workers_stop_when_their_supervisor_is_killed(tmp_path, trace, sweep):
    process = sweep(60)
    until(lambda: len({s[0] for s in traced(trace)}) == 2)
    process.kill()
    process.wait()
    until(lambda: alive(trace) == [], 10)
    assert states(CELLS, tmp_path / "runs") == ["preempted", "preempted", "pending"]
    assert sweep(60).wait(timeout=60) == 0
    assert len(traced(trace)) == 180
    assert_trained_once(trace, {c.run_id: 60 for c in CELLS})


def test_two_supervisors_share_one_sweep(tmp_path, trace, sweep):
    both = [sweep(60), sweep(60)]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    assert len(traced(trace)) == 180
    assert_trained_once(trace, {c.run_id: 60 for c in CELLS})


def test_a_run_out_of_memory_beside_others_is_tried_once_more_alone(tmp_path, trace):
    """Seed 38 fits when it is alone, 37 never; 35 is killed as by the kernel, at half its steps."""
    cells = [cell(1, steps=60), cell(2, steps=50), cell(38, steps=40), cell(37, steps=30), cell(35, steps=20)]
    outcomes = launch(cells, tmp_path / "runs", jobs=2)
    assert [o.state for o in outcomes] == ["done", "done", "done", "failed", "failed"]
    assert "out of memory, and" in outcomes[3].message
    assert "SIGKILL" in outcomes[4].message
    assert [o.attempts for o in outcomes[:4]] == [1, 1, 2, 2]
    assert outcomes[4].attempts >= 2  # the other worker may take up what looks like a lost machine's before it is marked
    steps = traced(trace)
    alone = [i for i, s in enumerate(steps) if s[0] == cells[2].run_id and s[1] == 2]
    assert {s[0] for s in steps[alone[0] : alone[-1] + 1]} == {cells[2].run_id}, "it was not alone"


def test_a_run_that_has_the_device_to_itself_is_not_tried_again(tmp_path, trace):
    outcomes = launch([cell(37, steps=4)], tmp_path / "runs", jobs=3)
    assert [(o.state, o.attempts) for o in outcomes] == [("failed", 1)]


def test_every_slot_sees_its_own_gpu(tmp_path, trace, monkeypatch):
    monkeypatch.setenv("SWEEP_GPUS", str(tmp_path / "gpus"))
    places = [Slot("0", 2), Slot("0", 2), Slot("7", 1)]
    launch([cell(i, steps=20) for i in range(1, 7)], tmp_path / "runs", places=places)
    assert set((tmp_path / "gpus").read_text().split()) == {"0", "7"}


def test_leaving_does_not_wait_for_the_runs_of_others(tmp_path, trace):
    mine, other = cell(1, steps=3), cell(2, steps=3)
    run = RunStore(tmp_path / "runs").run(other.run_id)
    with run.open_for_training(other.config) as writer:
        writer.begin(step=0, steps=3, env={"data_hash": "0", "threads": 1, "attempt": {}})
        outcomes = launch([mine, other], tmp_path / "runs", jobs=2, leave=True)
    assert [o.state for o in outcomes] == ["done", "running"]
