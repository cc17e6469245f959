"""SLURM: an array job whose tasks are workers. Each trains cells until none is free, and is queued again when preempted.

    before the time limit    SLURM sends USR1 to the script → the worker checkpoints → `scontrol requeue` → it goes on later
    preempted (or scancel)   SLURM sends TERM → the worker checkpoints; SLURM itself queues the task again, or does not
    node lost                SLURM queues the task again; the run goes on from its last checkpoint once its lease is stale

When a task starts, it decides from the run folders which cell to train. Any number of tasks therefore works, and tasks of an
earlier submission that still wait in the queue do no harm. Directives are those of sbatch(1).

With [resources], cells with the same numbers of nodes and of processes on each form a class. Each class has an array, the
largest class first. A worker of a large class also takes small cells when none of its own class is left, as any worker takes
what fits. A worker with several nodes takes only cells of its class, each by one srun over all its nodes.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ...errors import MissingDependency, RunFailed, UsageError
from ..manifest import Sweep
from ..outcomes import Outcome, OutcomeReader, Watch
from ..resource_rules import Resources
from ..sweep_file import Cell
from .options import SlurmOptions

logger = logging.getLogger(__name__)
QUEUE_POLL_S = 5.0  # between two looks at the folder and the queue
MAX_ARRAY = 1000  # SLURM's default for MaxArraySize is 1001
INSTALL = "sbatch: not found; run this where SLURM is (Debian: apt-get install slurm-wlm), or print the job with --emit."

SCRIPT = """\
#!/bin/bash
{directives}

{setup}
{worker} &
worker=$!
asked=
trap 'asked=yes; kill -USR1 $worker' USR1
trap 'kill -TERM $worker' TERM
wait $worker
while kill -0 $worker 2>/dev/null; do wait $worker; done   # a signal ends the wait, not the worker
wait $worker
code=$?
if [ -n "$asked" ] && {{ [ $code = 75 ] || [ $code = 138 ]; }}; then   # checkpointed, or (138) not begun yet
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit $code
"""


def launch(
    sweep: Sweep, options: SlurmOptions, *, remaining: Sequence[Cell], wait: bool = False, watch: Watch | None = None
) -> list[Outcome]:
    """Submit workers for the `remaining` cells of a sweep whose manifest exists; returns the outcomes of all cells.

    With `wait`, return when all cells are settled, and call `watch` with the outcomes until then. Raises RunFailed if SLURM
    refuses a job, after cancelling those submitted before it, or if the jobs end before all cells are settled.
    """
    read = OutcomeReader(sweep.cells, sweep.store)
    if not remaining:
        return read()
    jobs: list[str] = []
    for taken, cells in classes(remaining).items():
        try:
            jobs.append(submit(sweep, script(sweep, options, tasks=len(cells), taken=taken), taken))
        except RunFailed:
            if jobs:
                subprocess.run(("scancel", *jobs), capture_output=True, check=False)
            raise
        each = f" of {taken.nproc} processes" if taken.nproc > 1 else ""
        logger.info("submitted job %s: workers for %d cells%s, output in %s", jobs[-1], len(cells), each, sweep.folder)
    job = ",".join(jobs)
    if not wait:
        logger.info("questctl runs ls shows how far they are; the same command adds workers for the remaining cells")
        return read()
    while not all(outcome.settled for outcome in read()):
        if watch is not None:
            watch(read.last)
        if not workers_queued(job) and not all(outcome.settled for outcome in read()):
            logs = sweep.folder / ("slurm-*.out" if len(jobs) > 1 else f"slurm-{job}_*.out")
            raise RunFailed(f"job {job} ended before all cells were trained; see {logs}; repeat the command to resume.")
        time.sleep(QUEUE_POLL_S)
    return read.last


def classes(cells: Sequence[Cell]) -> dict[Resources, list[Cell]]:
    """The cells by the resources that they take, those of the most processes first."""
    by_resources: dict[Resources, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (-cell.nproc, -cell.nodes)):
        by_resources.setdefault(cell.resources or Resources(), []).append(cell)
    return by_resources


def scripts(sweep: Sweep, options: SlurmOptions, cells: Sequence[Cell]) -> str:
    """The batch scripts of the arrays for `cells`, one after another."""
    arrays = classes(cells).items()
    return "\n".join(script(sweep, options, tasks=len(members), taken=taken) for taken, members in arrays) or script(
        sweep, options, tasks=1
    )


def script(sweep: Sweep, options: SlurmOptions, *, tasks: int, taken: Resources = Resources()) -> str:
    """The batch script of an array of at most `tasks` workers for the cells of a sweep that take `taken`.

    Raises UsageError for cells of several nodes in a container, since srun cannot be called from inside one.
    """
    if taken.nodes > 1 and options.container:
        raise UsageError("launcher.slurm.container: cells of several nodes need srun, which a container has not; use modules.")
    tasks = min(options.jobs or tasks, tasks, MAX_ARRAY)
    folder = sweep.folder.resolve()
    each, gpus = taken.per_node, options.gpus
    if taken.nproc > 1 and gpus:
        kind, colon, _ = gpus.rpartition(":")
        gpus = f"{kind}{colon}{each}"
    directives = [
        f"--job-name=questctl-{sweep.folder.name}",
        f"--array=0-{tasks - 1}",
        *((f"--nodes={taken.nodes}", "--ntasks-per-node=1") if taken.nodes > 1 else ()),
        f"--ntasks={taken.nodes}",
        "--requeue",
        "--open-mode=append",
        f"--output={folder}/slurm-%A_%a.out",
        f"--signal=B:USR1@{options.warning_s}",
        f"--cpus-per-task={(options.cpus or 1) * each}",
        *(
            f"--{key}={value}"
            for key, value in (
                ("account", options.account),
                ("partition", options.partition),
                ("time", options.time),
                ("gpus-per-node" if taken.nodes > 1 else "gpus", gpus),
                ("mem", re.sub(r"^\d+", lambda n: str(int(n[0]) * each), options.memory)),
                ("constraint", options.constraint),
            )
            if value
        ),
        *options.directives,
    ]
    worker = [sys.executable, "-m", "questctl", "worker", str(folder), "--leave", "--quiet"]
    if each > 1 and not gpus:
        worker += ["--jobs", str(each)]
    if options.jobs_per_gpu != 1:
        worker += ["--jobs-per-gpu", str(options.jobs_per_gpu)]
    if options.container:
        mounted = [str(folder.parent.parent), str(Path.cwd())]
        worker[0] = "python"
        worker = ["apptainer", "exec", "--nv", *(w for path in mounted for w in ("--bind", path)), options.container, *worker]
    setup = [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", *(f"module load {shlex.quote(m)}" for m in options.modules)]
    head = "\n".join(f"#SBATCH {directive}" for directive in directives)
    return SCRIPT.format(directives=head, setup="\n".join([*setup, *options.setup]), worker=shlex.join(worker))


def require() -> None:
    """Raises MissingDependency if this machine has no SLURM."""
    if shutil.which("sbatch") is None:
        raise MissingDependency(INSTALL)


def submit(sweep: Sweep, text: str, taken: Resources = Resources()) -> str:
    """Hand the script to sbatch and return the job's number. Raises RunFailed if sbatch refuses it."""
    path = sweep.folder / (f"job-{taken.nodes}x{taken.per_node}.sbatch" if taken.nproc > 1 else "job.sbatch")
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(("sbatch", "--parsable", str(path)), capture_output=True, text=True, check=False)
    if done.returncode:
        asked = f"{taken.nodes} node{'s' * (taken.nodes > 1)} with {taken.per_node} processes each"
        way_out = f"; it asks for {asked}: change nodes or nproc in [resources], or the partition" if taken.nproc > 1 else ""
        raise RunFailed(f"sbatch: {' '.join(done.stderr.split()) or 'refused the job'} (the script is {path}){way_out}.")
    return done.stdout.strip().partition(";")[0]


def workers_queued(job: str) -> int:
    """The number of tasks of the job that wait or run, by squeue."""
    command = ("squeue", "--noheader", "--array", "--format=%T", f"--jobs={job}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return len(done.stdout.split()) if done.returncode == 0 else 0
