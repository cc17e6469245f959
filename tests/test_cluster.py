"""A real one-node SLURM and a real local Ray drain a sweep, are disturbed in the middle, and end with the very same files.

`make test-cluster` installs what they need (as root), and runs this; it is not in the default suite.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import psutil
import pytest
from test_branch import SWEEP as LENGTHS
from test_groups import RULES, assert_as_in_peace, in_peace, opened
from test_groups import SWEEP as GROUPS
from test_sweep_faults import assert_same, steps_taken

from questctl.store import RunStore
from questctl.sweep.sweep_file import load_sweep_file

until = functools.partial(helpers.until, seconds=240, pause=0.2)
NODE = Path(__file__).with_name("slurm_node.sh")
SWEEP = """
[base]
data = { source = "synthetic:markov?tokens=20000", seq_len = 16 }
model = { d_model = 32, d_ff = 64, n_head = 2 }
train = { steps = 300, batch_size = 2, eval_tokens = 64, log_every = 10, checkpoint_every = 20, threads = 1 }
[matrix]
train.seed = [0, 1]
quant.weights = ["bf16", "int2-h32-rms-trust"]
[launcher.slurm]
jobs = 2
time = "30"
"""


def questctl(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "questctl", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    return done


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """The sweep file, trained in peace in tmp_path/runs by the local launcher."""
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(SWEEP)
    questctl("sweep", "sweep.toml", "--quiet")
    return load_sweep_file(Path("sweep.toml"))


def attempts(sweep_file, runs: str) -> list[int]:
    return [len(RunStore(runs).run(cell.run_id).env().get("attempts", [])) for cell in sweep_file.cells]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs root and apt-get install slurm-wlm munge (make test-cluster)")
    folder = tmp_path / "slurm"
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    try:
        subprocess.run([NODE, "start", folder], check=True, timeout=120)
        yield
    finally:
        subprocess.run([NODE, "stop", folder], check=True, timeout=60)


def queue() -> list[list[str]]:
    """(job, state, reason) of every task that waits or runs."""
    words = ["squeue", "--noheader", "--array", "--format=%A %T %r"]
    return [line.split() for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()]


def start_requeued() -> int:
    """SLURM lets a task that was queued again rest for two minutes; this does not. Returns how many there were."""
    resting = [job for job, state, reason in queue() if (state, reason) == ("PENDING", "BeginTime")]
    time.sleep(3 if resting else 0)  # slurmd refuses what begins again within the same second
    for job in resting:
        subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=False)  # it may have begun by now
    return len(resting)


@pytest.mark.slurm
def test_slurm_with_a_preemption_in_the_middle(slurm, sweep):
    runs = Path("on-slurm")
    said = questctl("sweep", "sweep.toml", "--runs", runs, "--launcher", "slurm").stderr
    job = said.partition("submitted job ")[2].partition(":")[0]
    until(lambda: len([s for s in queue() if s[1] == "RUNNING"]) == 2)
    until(lambda: len([n for n in attempts(sweep, "on-slurm") if n]) >= 2 and steps_taken(runs) > 300)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)  # as SLURM does before the time limit
    seen: list[str] = []
    until(lambda: seen.extend(s for s in ["again"] * start_requeued()) or len(seen) >= 2 or not queue())
    assert seen, "no task was queued again"
    before = steps_taken(runs)
    until(lambda: steps_taken(runs) > before or not queue())
    for running in [j for j, state, _ in queue() if state == "RUNNING"][:1]:
        subprocess.run(["scontrol", "requeue", running], check=True)  # a preemption: TERM, later KILL, and queued again
    until(lambda: start_requeued() * 0 or not queue())
    output = "".join(p.read_text() for p in runs.glob(".sweeps/*/slurm-*.out"))
    assert "stopped by SIGUSR1; every run was checkpointed" in output
    assert_same(sweep, Path.cwd(), runs)
    assert max(attempts(sweep, "on-slurm")) >= 2
    finished = questctl("sweep", "sweep.toml", "--runs", runs, "--launcher", "slurm")
    assert "submitted" not in finished.stderr
    assert finished.stdout.count("done") == 4


@pytest.mark.slurm
def test_slurm_refuses_in_its_own_words_and_can_be_waited_for(slurm, sweep):
    said = questctl("sweep", "sweep.toml", "--runs", "x", "--launcher", "slurm", "--partition", "nowhere", code=1).stderr
    assert "invalid partition" in said
    words = ("sweep", "sweep.toml", "--runs", "on-slurm", "--set", "train.steps=4", "--launcher", "slurm", "--wait", "--quiet")
    assert questctl(*words).stdout.count("done") == 4


@pytest.fixture
def ray(monkeypatch):
    """Where a local Ray has its sockets, which allow no long path."""
    pytest.importorskip("ray")
    folder = Path("/tmp") / f"q{os.getpid()}"
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder.mkdir()
    yield
    shutil.rmtree(folder, ignore_errors=True)


PAIRS = GROUPS.replace("[0, 1]", "[0]").replace("[64, 96, 128, 160, 192]", "[64, 96, 128]") + RULES


@pytest.mark.slurm
def test_slurm_with_cells_of_two_processes_and_a_preemption(slurm, tmp_path, monkeypatch):
    """An array for the cell of one process and one for those of two; a task of the second is queued again in the middle."""
    monkeypatch.chdir(tmp_path)
    sweep, runs = opened(tmp_path, "on-slurm", PAIRS), Path("on-slurm")
    said = questctl("sweep", "on-slurm.toml", "--runs", runs, "--launcher", "slurm").stderr
    assert said.count("submitted job") == 2
    until(lambda: any(path.stat().st_size for path in runs.glob("[23][73]K*/timing.jsonl")))
    job = said.partition("submitted job ")[2].partition(":")[0]
    subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
    until(lambda: start_requeued() * 0 or not queue())
    assert max(attempts(sweep, "on-slurm")) == 2
    in_peace(sweep, Path("peace"))
    assert_as_in_peace(sweep, Path("peace"))


@pytest.mark.ray
def test_ray_with_cells_of_two_processes_and_a_killed_rank(ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = opened(tmp_path, "on-ray", PAIRS)
    words = [sys.executable, "-m", "questctl", "sweep", "on-ray.toml", "--runs", "on-ray", "--launcher", "ray", "--quiet"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        until(lambda: (steps_taken(Path("on-ray")) > 100 and ranks_of(process.pid)) or process.poll() is not None)
        ranks_of(process.pid)[0].kill()
        out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert max(attempts(sweep, "on-ray")) == 2
    in_peace(sweep, Path("peace"))
    assert_as_in_peace(sweep, Path("peace"))


@pytest.mark.ray
def test_ray_with_a_killed_worker(ray, sweep):
    words = [sys.executable, "-m", "questctl", "sweep", "sweep.toml", "--runs", "on-ray", "--launcher", "ray", "--quiet"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        until(lambda: steps_taken(Path("on-ray")) > 300 or process.poll() is not None)
        killed = tasks_of(process.pid)[0]
        killed.kill()
        out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert_same(sweep, Path.cwd(), Path("on-ray"))
    assert max(attempts(sweep, "on-ray")) >= 2


@pytest.mark.ray
def test_ray_sends_branches_out_after_their_trunk(ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(LENGTHS)
    questctl("sweep", "sweep.toml", "--quiet")
    said = questctl("sweep", "sweep.toml", "--runs", "on-ray", "--launcher", "ray", "--quiet")
    assert said.stdout.count("done") == 6
    assert_same(load_sweep_file(Path("sweep.toml")), Path.cwd(), Path("on-ray"))


def tasks_of(driver: int) -> list[psutil.Process]:
    """Ray's worker processes that carry out a task, of the cluster that this driver started."""
    started = psutil.Process(driver).create_time()
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        title = " ".join(process.info["cmdline"] or [])
        of_task = title.startswith(("ray::_task", "ray::_part"))
        if of_task and process.info["create_time"] >= started and process.cwd() == str(Path.cwd()):
            found.append(process)
    return found


def ranks_of(driver: int) -> list[psutil.Process]:
    """The ranks of the cells that tasks have in processes of their own."""
    heads = [head for task in tasks_of(driver) for head in task.children()]
    return [rank for head in heads for rank in head.children()]


@pytest.mark.ray
def test_ray_that_is_stopped_lets_its_runs_checkpoint(ray, sweep):
    words = [sys.executable, "-m", "questctl", "sweep", "sweep.toml", "--runs", "on-ray", "--launcher", "ray", "--quiet"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: steps_taken(Path("on-ray")) > 300 or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    states = [RunStore("on-ray").run(cell.run_id).state() for cell in sweep.cells]
    assert "preempted" in states
    assert "running" not in states
    questctl("sweep", "sweep.toml", "--runs", "on-ray", "--quiet")
    assert_same(sweep, Path.cwd(), Path("on-ray"))
