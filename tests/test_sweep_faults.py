"""A real sweep, killed at random moments and started again, ends with the very files of an undisturbed one.

Killed are children (SIGKILL: the run fails and is tried again), workers, and the supervisor. What was finished is never touched
again: its result keeps its time stamp, and the attempts in env.json do not grow.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from questctl.store import Run, RunStore
from questctl.sweep.launchers.local import launch
from questctl.sweep.outcomes import reset
from questctl.sweep.sweep_file import load_sweep_file

SWEEP = """
[base]
data = { source = "synthetic:markov?tokens=20000", seq_len = 16 }
model = { d_model = 32, d_ff = 64, n_head = 2 }
train = { steps = 60, batch_size = 2, eval_tokens = 64, log_every = 2, checkpoint_every = 5, eval_every = 20, threads = 1 }
[matrix]
quant.weights = ["bf16", "int2-h32-rms-trust"]
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The sweep file, and the folder in which it was trained in peace."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "sweep.toml").write_text(SWEEP)
    forkserver._forkserver._stop()
    sweep_file = load_sweep_file(folder / "sweep.toml")
    assert [o.state for o in launch(sweep_file.cells, RunStore(folder / "runs"), jobs=2, poll_s=0.05)] == ["done"] * 2
    yield sweep_file, folder
    forkserver._forkserver._stop()


def assert_same(sweep_file, undisturbed: Path, killed: Path) -> None:
    for cell in sweep_file.cells:
        one, other = Run(undisturbed / "runs" / cell.run_id), Run(killed / cell.run_id)
        for name in ("config.json", "metrics.jsonl"):
            assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), (cell.run_id, name)
        assert tensors(one.model_path) == tensors(other.model_path), cell.run_id
        same = ("loss", "train_loss", "bits_per_byte", "tokens", "steps", "data_hash")
        assert [getattr(one.result(), k) for k in same] == [getattr(other.result(), k) for k in same]
        assert not [path for path in other.path.glob("*.tmp") if not path.name.startswith("lease")]
        assert not other.checkpoints_path.exists()
        assert not other.lease_path.exists()


def tensors(path: Path) -> tuple[dict, bytes]:
    """Header, whose keys may come in any order, and payload of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


class Finished:
    """Watches that what is finished stays as it is."""

    def __init__(self, sweep_file, runs: Path) -> None:
        self.paths = [runs / c.run_id / name for c in sweep_file.cells for name in ("result.json", "env.json", "metrics.jsonl")]
        self.seen: dict[Path, tuple[int, int]] = {}

    def look(self) -> None:
        for path in self.paths:
            if path.with_name("result.json").exists():
                stat = path.stat()
                assert self.seen.setdefault(path, (stat.st_mtime_ns, stat.st_ino)) == (stat.st_mtime_ns, stat.st_ino), path


def children_and_workers() -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Of the forkserver that this process started: (training processes, workers)."""
    if forkserver._forkserver._forkserver_pid is None:
        return [], []
    workers, children = psutil.Process(forkserver._forkserver._forkserver_pid).children(), []
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            children += worker.children()
    return children, workers


def kill_at_random(sweep_file, undisturbed: Path, runs: Path, *, kills: int, seed: int) -> None:
    """Sweep in this process, killing a worker and a child in turn until `kills` have been; then in peace to the end."""
    dice, finished, victims = random.Random(seed), Finished(sweep_file, runs), []

    def watch(outcomes) -> None:
        finished.look()
        if len(victims) < kills and dice.random() < 0.4:
            children, workers = children_and_workers()
            with suppress(psutil.NoSuchProcess, IndexError):  # it has just ended by itself, or there is none
                victim = dice.choice(children if len(victims) % 2 else workers)
                victim.kill()
                victims.append(victim.pid)

    for _ in range(kills + 1):
        outcomes = launch(sweep_file.cells, RunStore(runs), jobs=2, poll_s=0.03, watch=watch)
        failed = [o for o in outcomes if o.state != "done"]
        assert [o for o in failed if "SIGKILL" not in o.message] == []
        if not failed:
            break
        assert len(reset(sweep_file.cells, RunStore(runs), ("failed",))) == len(failed)
    assert_same(sweep_file, undisturbed, runs)
    finished.look()
    attempts = sum(len(Run(runs / c.run_id).env()["attempts"]) for c in sweep_file.cells)
    assert attempts <= len(sweep_file.cells) + len(victims)
    assert len(victims) >= 2


def kill_supervisor_at_random(sweep_file, undisturbed: Path, runs: Path, *, kills: int, seed: int) -> None:
    """Sweep in a process of its own that is killed some time after the first run has begun to train."""
    dice, finished = random.Random(seed), Finished(sweep_file, runs)
    code = "import pathlib, sys; from questctl.cli import sweep; sweep.command(sys.argv[1], pathlib.Path(sys.argv[2]), jobs=2)"
    words = [sys.executable, "-c", code, str(undisturbed / "sweep.toml"), str(runs)]
    for _ in range(kills):
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            begun = steps_taken(runs)
            while process.poll() is None and steps_taken(runs) == begun:
                time.sleep(0.01)
            time.sleep(dice.random() * 0.6)
            process.kill()
        finished.look()
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    finished.look()
    assert_same(sweep_file, undisturbed, runs)


def steps_taken(runs: Path) -> int:
    return sum(path.stat().st_size for path in runs.glob("*/timing.jsonl"))


def test_killed_workers_and_children(undisturbed, tmp_path):
    kill_at_random(*undisturbed, tmp_path / "runs", kills=3, seed=2)


@pytest.mark.faults
def test_killed_supervisor(undisturbed, tmp_path):
    kill_supervisor_at_random(*undisturbed, tmp_path / "runs", kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again(undisturbed, tmp_path, seed):
    kill_at_random(*undisturbed, tmp_path / "a", kills=12, seed=seed)
    kill_supervisor_at_random(*undisturbed, tmp_path / "b", kills=5, seed=seed)
