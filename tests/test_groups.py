"""Cells of 1, 2 and 4 processes, DDP and FSDP2, disturbed by kills: each done exactly once, with the curve of a quiet sweep.

Killed are ranks, heads, workers and supervisors. Two supervisors drain the sweep together. What is killed goes on from its last
checkpoint, in as many processes as the sweep file then says. The curves are those of one process that trains in peace.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
import tally
from helpers import until
from test_distributed import same_curve
from test_sweep_faults import Finished

from questctl.errors import QuestError
from questctl.store import RunStore
from questctl.sweep.launchers import local
from questctl.sweep.launchers.local import launch
from questctl.sweep.manifest import Sweep, join
from questctl.sweep.outcomes import reset
from questctl.sweep.resources import settle
from questctl.sweep.sweep_file import load_sweep_file
from questctl.training.group import free_port
from questctl.training.loop import train

# One process takes the halves of its batch one after the other, and clips nothing: the sums of two and four (test_distributed).
SWEEP = """
[base]
data = { source = "synthetic:markov?vocab=16&tokens=20000", seq_len = 16 }
model = { d_model = 32, d_ff = 64, n_head = 2, n_layer = 2 }
optim = { lr = 1e-2, grad_clip = 0.0 }
[base.train]
steps = 40
batch_size = 8
micro_batch = 2
eval_tokens = 256
log_every = 2
checkpoint_every = 4
threads = 1
device = "cpu"
[matrix]
train.seed = [0, 1]
model.d_ff = [64, 96, 128, 160, 192]
"""
RULES = """
[[resources]]
min_params = 23_000
nproc = 2
[[resources]]
min_params = 30_000
parallel = "fsdp"
[[resources]]
min_params = 36_000
nproc = 4
parallel = "ddp"
[[resources]]
min_params = 42_000
parallel = "fsdp"
"""
KINDS = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]


def opened(folder: Path, runs: str, text: str = SWEEP + RULES) -> Sweep:
    (folder / f"{runs}.toml").write_text(text)
    return settle(Sweep(load_sweep_file(folder / f"{runs}.toml"), RunStore(folder / runs)), [])


def in_peace(sweep: Sweep, folder: Path) -> None:
    for cell in sweep.cells:
        train(cell.config, runs=folder)


def family(supervisor: int) -> dict[str, list[psutil.Process]]:
    """Below a supervisor: workers, the heads of cells (a single process is its own), and ranks."""
    found: dict[str, list[psutil.Process]] = {"a worker": [], "a head": [], "a rank": []}
    with suppress(psutil.NoSuchProcess):
        for server in psutil.Process(supervisor).children():
            found["a worker"] += server.children()
    for worker in found["a worker"]:
        with suppress(psutil.NoSuchProcess):
            found["a head"] += worker.children()
    for head in found["a head"]:
        with suppress(psutil.NoSuchProcess):
            found["a rank"] += head.children()
    return found


def supervise(sweep: Sweep) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=_supervise, args=(sweep,))
    process.start()
    return process


def _supervise(sweep: Sweep) -> None:
    os.setsid()
    forkserver._forkserver.__init__()  # not that of the process it was forked from
    try:
        local.launch(sweep.cells, sweep.store, jobs=4, poll_s=0.5)
    except QuestError as e:
        os._exit(e.exit_code)
    os._exit(0)


def progress(runs: Path) -> int:
    return sum(path.stat().st_size for path in runs.glob("*/timing.jsonl"))


def storm(sweep: Sweep, *, kills: int, seed: int, of_supervisors: int, pause: Callable[[random.Random], float]) -> int:
    """Two supervisors at a time, and `kills` kills; then in peace to the end. Returns the kills."""
    dice, finished, done = random.Random(seed), Finished(sweep.file, sweep.store.root), 0
    seen: set[int] = set()
    supervisors = [supervise(sweep), supervise(sweep)]
    try:
        while done < kills and any(process.is_alive() for process in supervisors):
            before, deadline = progress(sweep.store.root), time.monotonic() + 120
            while progress(sweep.store.root) == before and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(pause(dice))
            finished.look()
            process = dice.choice(supervisors)
            below = family(process.pid or 0)
            seen |= {p.pid for members in below.values() for p in members}
            if dice.random() * kills < of_supervisors:
                what, victims = "a supervisor", [psutil.Process(process.pid)] if process.is_alive() else []
            else:
                what = dice.choice(["a rank", "a rank", "a head", "a worker"])
                victims = below[what]
            with suppress(psutil.NoSuchProcess, IndexError):
                dice.choice(victims).kill()
                tally.COUNTS[f"killed: {what} of a group"] += 1
                done += 1
            reset(sweep.cells, sweep.store, ("failed",))
            for i, one in enumerate(supervisors):
                if not one.is_alive():
                    one.join()
                    supervisors[i] = supervise(sweep)
    finally:
        for process in supervisors:
            process.terminate()
        for process in supervisors:
            process.join(120)
    for _ in range(20):
        launch(sweep.cells, sweep.store, jobs=4, poll_s=0.5)
        if not reset(sweep.cells, sweep.store, ("failed",)):
            break
    finished.look()
    until(lambda: not [pid for pid in seen if _lives(pid)], 30)
    return done


def _lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and "forkserver" in " ".join(psutil.Process(pid).cmdline())
    return False


def assert_as_in_peace(sweep: Sweep, peace: Path) -> None:
    for cell in sweep.cells:
        run = sweep.store.run(cell.run_id)
        assert run.result() is not None, run.status()
        steps = [line["step"] for line in run.metrics()]
        assert steps == list(range(2, cell.config.train.steps + 1, 2)), cell.run_id
        assert same_curve(sweep.store.root, peace, cell.config)
        assert not run.checkpoints_path.exists()
        assert not run.lease_path.exists()
        assert run.env()["attempts"][-1]["processes"] == cell.nproc


@pytest.fixture
def server():
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_a_rank_is_killed_and_the_cell_has_the_same_curve(tmp_path):
    text = SWEEP.replace("[0, 1]", "[0]").replace("[64, 96, 128, 160, 192]", "[96, 128]")
    sweep, killed = opened(tmp_path, "runs", text + RULES), []
    assert [(cell.nproc, cell.config.train.parallel) for cell in sweep.cells] == [(2, "ddp"), (2, "fsdp")]

    def watch(_: object) -> None:
        ranks = family(os.getpid())["a rank"]
        if not killed and ranks and progress(sweep.store.root):
            with suppress(psutil.NoSuchProcess):
                ranks[-1].kill()
                killed.append(ranks[-1].pid)

    assert [o.state for o in launch(sweep.cells, sweep.store, jobs=2, poll_s=0.05, watch=watch)] == ["done", "done"]
    assert killed
    in_peace(sweep, tmp_path / "peace")
    assert_as_in_peace(sweep, tmp_path / "peace")
    assert sum(len(sweep.store.run(c.run_id).env()["attempts"]) for c in sweep.cells) == 3


@pytest.mark.slow
def test_two_nodes_on_two_addresses_of_this_machine(tmp_path):
    """Two heads with two ranks each meet at 127.0.0.2; one of them is killed, and the next attempt ends the run."""
    text = SWEEP.replace("[0, 1]", "[0]").replace("[64, 96, 128, 160, 192]", "[64]")
    sweep = opened(tmp_path, "runs", text + "[resources]\nnproc = 4\nnodes = 2\nparallel = 'fsdp'\n")
    join(sweep, sweep.cells)
    run = sweep.store.run(sweep.cells[0].run_id)

    def begin() -> list[subprocess.Popen]:
        meeting = {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(free_port("127.0.0.2"))}
        words = [sys.executable, "-m", "questctl.sweep.node", str(sweep.folder), run.name]
        environments = [{**os.environ, **meeting, "NODE_RANK": str(i)} for i in range(2)]
        return [subprocess.Popen(words, env=e, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for e in environments]

    nodes = begin()
    until(lambda: progress(sweep.store.root), 300)
    nodes[1].kill()
    assert nodes[0].wait(60) == 76, "the first node has lost ranks of the second"
    assert run.state() == "preempted"
    nodes = begin()
    assert [process.wait(300) for process in nodes] == [0, 0]
    in_peace(sweep, tmp_path / "peace")
    assert_as_in_peace(sweep, tmp_path / "peace")


@pytest.mark.faults
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("seed", range(4))
def test_a_storm_over_groups(tmp_path, seed):
    """Four storms of 25 kills each."""
    kills = int(os.environ.get("STORM_KILLS", "25"))
    sweep = opened(tmp_path, "runs")
    assert sorted({(cell.nproc, cell.config.train.parallel) for cell in sweep.cells}) == sorted(KINDS)
    in_peace(sweep, tmp_path / "peace")
    done = storm(sweep, kills=kills, seed=seed, of_supervisors=max(1, kills // 8), pause=lambda dice: dice.random())
    assert_as_in_peace(sweep, tmp_path / "peace")
    tally.LINES.append(f"groups of 1, 2 and 4 processes: {done} kills, every curve as in peace")
    assert done >= kills // 2
