"""`questctl worker SWEEP`: train what is left of a sweep with what this machine has, beside any other workers anywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from ..config import parse_value
from ..sweep.launchers.options import options as launcher_options
from ..sweep.manifest import find_sweep
from . import options as opt
from .sweep import Force, JobsPerGPU, report, run_sweep


def command(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", show_default=False, help="A sweep file, or the folder of a sweep.")],
    runs: opt.RunsDir = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one a GPU, or one a core.")] = 0,
    jobs_per_gpu: JobsPerGPU = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a run; 0: its share of the cores.")] = 0,
    leave: Annotated[bool, typer.Option("--leave", help="End when nothing is free; do not wait for others.")] = False,
    force: Force = False,
    set_: opt.Set = None,
    as_json: opt.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Join a sweep: take the longest run that is free, train it, take the next, until all are done.

    Start as many workers as you like, on any machine that sees the folder. SIGUSR1 and SIGTERM end it with a checkpoint and
    exit code 75; whoever works on the sweep next goes on from there. Refused: other code or other text than the sweep's.
    """
    found = find_sweep(sweep, runs=runs, sets=set_ or [], default_runs=opt.runs_dir(runs))
    flags = {"jobs": jobs, "jobs_per_gpu": parse_value(jobs_per_gpu) if jobs_per_gpu else None}
    options = launcher_options("local", found.file.launchers.get("local", {}), flags)
    outcomes = run_sweep(found, options, threads=threads, leave=leave, quiet=quiet, force=force)
    assert outcomes is not None, "the local launcher waits"
    report(found, outcomes, as_json=as_json)
