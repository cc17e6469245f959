"""What SLURM is asked for, read from the scripts; cells of several nodes, with an srun that starts them on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_trainers import traced

from questctl.errors import RunFailed, UsageError
from questctl.store import RunStore
from questctl.sweep import node, worker
from questctl.sweep.launchers import slurm
from questctl.sweep.launchers.options import SlurmOptions
from questctl.sweep.manifest import Sweep, join
from questctl.sweep.outcomes import OutcomeReader
from questctl.sweep.resources import settle
from questctl.sweep.run import launch_commands, run_sweep
from questctl.sweep.slots import GPU
from questctl.sweep.sweep_file import parse_sweep_file

RULES = [{"nproc": 1}, {"min_params": "100K", "nproc": 4}, {"min_params": "500K", "nproc": 8, "nodes": 2}]


def sweep(tmp_path, rules=RULES, presets=("53K", "214K", "640K"), **train):
    data = {"source": "synthetic:markov?tokens=5000", "seq_len": 16}
    base = {"data": data, "train": {"batch_size": 8, "steps": 4, "eval_tokens": 64, **train}}
    tree = {"base": base, "matrix": {"preset": list(presets)}, "resources": rules}
    return Sweep(parse_sweep_file(tree, tmp_path / "s.toml"), RunStore(tmp_path / "runs"))


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!{sys.executable}\n{text}")
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder in front of PATH, for stand-ins of SLURM's programs."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "bin"


def directives(text: str) -> list[list[str]]:
    """The #SBATCH lines of each script."""
    return [
        [line.removeprefix("#SBATCH --") for line in part.splitlines() if line.startswith("#SBATCH")]
        for part in text.split("#!/bin/bash")[1:]
    ]


def test_an_array_for_each_class_the_largest_first(tmp_path):
    options = SlurmOptions(gpus="a100:1", cpus=3, memory="10G", time="1:00:00")
    text = launch_commands(sweep(tmp_path), launcher=options)
    eight, four, one = directives(text)
    same = {"array=0-0", "requeue", "time=1:00:00", "open-mode=append", "signal=B:USR1@120"}
    assert all(same <= set(job) for job in (eight, four, one))
    assert {"nodes=2", "ntasks=2", "ntasks-per-node=1", "gpus-per-node=a100:4", "cpus-per-task=12", "mem=40G"} <= set(eight)
    assert {"ntasks=1", "gpus=a100:4", "cpus-per-task=12", "mem=40G"} <= set(four)
    assert {"ntasks=1", "gpus=a100:1", "cpus-per-task=3", "mem=10G"} <= set(one)
    assert not [line for job in (four, one) for line in job if line.startswith(("nodes", "ntasks-per-node"))]
    assert text.count(" --leave --quiet &") == 3
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_worker_without_gpus_is_told_how_many_processes_it_may_start(tmp_path):
    workers = [line for line in launch_commands(sweep(tmp_path), launcher=SlurmOptions()).splitlines() if " worker " in line]
    assert [line.partition("--quiet")[2] for line in workers] == [" --jobs 4 &", " --jobs 4 &", " &"]


def test_a_sweep_without_resources_is_one_array_as_before(tmp_path):
    plain = sweep(tmp_path, rules=[])
    (job,) = directives(launch_commands(plain, launcher=SlurmOptions(gpus="2")))
    assert {"array=0-2", "ntasks=1", "gpus=2", "cpus-per-task=1"} <= set(job)


def test_auto_is_settled_by_the_memory_of_the_cluster_s_gpus(tmp_path):
    rules = {"nproc": "auto", "parallel": "auto"}
    with pytest.raises(UsageError, match="nproc = 'auto' needs the memory of a GPU"):
        launch_commands(sweep(tmp_path, rules), launcher=SlurmOptions())
    text = launch_commands(sweep(tmp_path, rules, ("30M",)), launcher=SlurmOptions(gpus="1", gpu_memory_gib=1.5))
    assert int(next(d for d in directives(text)[0] if d.startswith("gpus")).partition("=")[2]) > 1


def test_nodes_in_a_container_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"launcher\.slurm\.container: cells of several nodes need srun"):
        launch_commands(sweep(tmp_path), launcher=SlurmOptions(container="x.sif"))


def test_what_sbatch_refuses_is_told_with_what_was_asked_and_nothing_is_left_behind(tmp_path, programs):
    """The second of three jobs is refused: the first is cancelled, the third not submitted."""
    said = tmp_path / "said"
    log = f"import sys; print(*sys.argv, file=open({str(said)!r}, 'a'))\n"
    program(programs, "scancel", log)
    refuse = (
        "import sys; 'job-1x4' in sys.argv[-1] and sys.exit('sbatch: error: Requested node configuration is not available')"
    )
    program(programs, "sbatch", f"{log}{refuse}\nprint(41)")
    with pytest.raises(RunFailed, match=r"configuration is not available.*1 node with 4 processes each: change nodes or nproc"):
        run_sweep(sweep(tmp_path), launcher="slurm")
    calls = [(Path(line.split()[0]).name, line.split()[-1].rpartition("/")[2]) for line in said.read_text().splitlines()]
    assert calls == [("sbatch", "job-2x4.sbatch"), ("sbatch", "job-1x4.sbatch"), ("scancel", "41")]


SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
n = int(next(w for w in words if w.startswith("--ntasks=")).partition("=")[2])
command = words[next(i for i, w in enumerate(words) if not w.startswith("-")):]
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(i)}, stdin=0) for i in range(n)]
codes = [task.wait() for task in tasks]
sys.exit(max(codes))
"""


@pytest.fixture
def two_nodes(tmp_path, programs, monkeypatch):
    """A job of two nodes, both this machine, with tasks that train the fake."""
    program(programs, "srun", SRUN)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SWEEP_TRACE", str(tmp_path / "trace"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    code = "import sys, os; from questctl.sweep.node import train_part; train_part(*sys.argv[1:3], os.environ, sys.argv[3])"
    real = node.command
    monkeypatch.setattr(node, "command", lambda *a: [*real(*a)[:-4], "-c", code, *real(*a)[-2:], "sweep_trainers:ranked"])
    return tmp_path


def test_a_cell_of_two_nodes_is_one_srun(two_nodes, tmp_path):
    """Nodes 0 and 1 have two ranks each, with one head each; only the first holds the lease and writes."""
    one = settle(sweep(tmp_path, {"nproc": 4, "nodes": 2}, ("53K",)), [])
    join(one, one.cells)
    worker.drain(one.cells, one.store.root, trainer="sweep_trainers:ranked", poll_s=0.05, job=one.folder)
    assert [o.state for o in OutcomeReader(one.cells, one.store)()] == ["done"]
    ranks = {
        name.partition("/")[2]: (size, local, parent)
        for name, size, local, _, parent, _ in traced(tmp_path / "trace")
        if "/" in name
    }
    assert {rank: values[:2] for rank, values in ranks.items()} == {"0": (4, 0), "1": (4, 1), "2": (4, 0), "3": (4, 1)}
    assert len({parent for *_, parent in ranks.values()}) == 2


def test_a_worker_of_one_node_leaves_cells_of_several_to_others(tmp_path, monkeypatch):
    monkeypatch.setenv("SWEEP_TRACE", str(tmp_path / "trace"))
    cells = settle(sweep(tmp_path, [{"nproc": 1}, {"min_params": "100K", "nproc": 4, "nodes": 2}], ("53K", "214K")), []).cells
    worker.drain(cells, tmp_path / "runs", trainer="sweep_trainers:train", poll_s=0.05, leave=True)
    assert [o.state for o in OutcomeReader(cells, RunStore(tmp_path / "runs"))()] == ["done", "pending"]


def test_classes_are_those_of_the_remaining_cells(tmp_path):
    cells = settle(sweep(tmp_path), [GPU("0", "", 2**40)]).cells
    assert [(taken.nproc, taken.nodes, len(members)) for taken, members in slurm.classes(cells).items()] == [
        (8, 2, 1),
        (4, 1, 1),
        (1, 1, 1),
    ]
    assert list(slurm.classes(cells[:1])) == [cells[0].resources]
