"""`questctl worker SWEEP`: train what remains of a sweep on this machine, beside any other workers anywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import console
from ..sweep.launchers.options import launcher_options
from ..sweep.manifest import open_sweep
from ..sweep.run import run_sweep
from . import options as opt
from .sweep import Force, JobsPerGPU, Quiet, parsed, report_outcomes
from .sweep_view import watching


def command(
    source: Annotated[str, typer.Argument(metavar="SWEEP", show_default=False, help="A sweep file, or the folder of a sweep.")],
    runs: opt.RunsDir = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one per GPU, or one per CPU.")] = 0,
    jobs_per_gpu: JobsPerGPU = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of a run; 0: its share of the CPUs.")] = 0,
    leave: Annotated[bool, typer.Option("--leave", help="End when no run is free, without waiting for other workers.")] = False,
    force: Force = False,
    set_: opt.Set = None,
    as_json: opt.Json = False,
    quiet: Quiet = False,
) -> None:
    """Join a sweep: train the longest run that is free, then the next, until all are done.

    Start any number of workers, on any machine that sees the folder. SIGUSR1 and SIGTERM end one with a checkpoint and exit
    code 75; another worker goes on from there. A worker with other code or another text than the sweep's is refused.
    """
    sweep, flags = open_sweep(source, runs=runs, sets=set_ or []), {"jobs": jobs, "jobs_per_gpu": parsed(jobs_per_gpu)}
    options = launcher_options("local", sweep.file.launchers, flags)
    with watching(quiet=quiet) as watch:
        view, progress = watch(sweep), console.DataProgress
        outcomes = run_sweep(
            sweep, launcher=options, threads=threads, leave=leave, helping=True, force=force, watch=view, data_progress=progress
        )
    report_outcomes(sweep, outcomes, as_json=as_json)
