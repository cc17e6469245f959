"""SLURM: an array job whose tasks are workers. Each drains the sweep until nothing is free, and is queued again if preempted.

    before the time limit    SLURM sends USR1 to the script → the worker checkpoints → `scontrol requeue` → it goes on later
    preempted (or scancel)   SLURM sends TERM → the worker checkpoints; SLURM itself queues the task again, or does not
    node lost                SLURM queues the task again; the run goes on from its last checkpoint as soon as its lease is stale

Which cell a task trains is decided when it starts, by the run folders; so any number of tasks will do, also those of an earlier
submission that still wait in the queue. Directives are those of sbatch(1).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ...errors import MissingDependency, RunFailed
from ..manifest import Sweep
from .options import SlurmOptions

MAX_ARRAY = 1000  # SLURM's own default for MaxArraySize is 1001
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


def script(sweep: Sweep, options: SlurmOptions, *, left: int) -> str:
    """The batch script that drains the `left` cells of a sweep."""
    tasks = min(options.jobs or left, left, MAX_ARRAY)
    folder = sweep.folder.resolve()
    directives = [
        f"--job-name=questctl-{sweep.folder.name}",
        f"--array=0-{tasks - 1}",
        "--ntasks=1",
        "--requeue",
        "--open-mode=append",
        f"--output={folder}/slurm-%A_%a.out",
        f"--signal=B:USR1@{options.warning_s}",
        f"--cpus-per-task={options.cpus or 1}",
        *(
            f"--{key}={value}"
            for key, value in (
                ("account", options.account),
                ("partition", options.partition),
                ("time", options.time),
                ("gpus", options.gpus),
                ("mem", options.memory),
                ("constraint", options.constraint),
            )
            if value
        ),
        *options.directives,
    ]
    worker = [sys.executable, "-m", "questctl", "worker", str(folder), "--leave", "--quiet"]
    if options.jobs_per_gpu != 1:
        worker += ["--jobs-per-gpu", str(options.jobs_per_gpu)]
    if options.container:
        there = [str(folder.parent.parent), str(Path.cwd())]
        worker[0] = "python"
        worker = ["apptainer", "exec", "--nv", *(w for path in there for w in ("--bind", path)), options.container, *worker]
    setup = [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", *(f"module load {shlex.quote(m)}" for m in options.modules)]
    head = "\n".join(f"#SBATCH {directive}" for directive in directives)
    return SCRIPT.format(directives=head, setup="\n".join([*setup, *options.setup]), worker=shlex.join(worker))


def require() -> None:
    """Raises MissingDependency where there is no SLURM."""
    if shutil.which("sbatch") is None:
        raise MissingDependency(INSTALL)


def submit(sweep: Sweep, text: str) -> str:
    """Hand the script to sbatch; the job's number. Raises RunFailed if it refuses."""
    path = sweep.folder / "job.sbatch"
    path.write_text(text)
    done = subprocess.run(("sbatch", "--parsable", str(path)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunFailed(f"sbatch: {' '.join(done.stderr.split()) or 'refused the job'} (the script is {path}).")
    return done.stdout.strip().partition(";")[0]


def workers_queued(job: str) -> int:
    """Tasks of the job that wait or run, by squeue."""
    words = ("squeue", "--noheader", "--array", "--format=%T", f"--jobs={job}")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return len(done.stdout.split()) if done.returncode == 0 else 0
