"""`questctl sweep SWEEP`: train the cells of a sweep file that are not done yet, on this machine or on a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .. import console
from ..config import human_count, parse_value
from ..errors import SweepFailed, UsageError
from ..sweep.launchers.options import SlurmOptions, launcher_options
from ..sweep.manifest import Sweep, open_sweep
from ..sweep.outcomes import Outcome
from ..sweep.run import SweepEstimate, estimate_sweep, launch_commands, run_sweep
from . import options as opt
from .sweep_view import show_outcomes, watching

JobsPerGPU = Annotated[
    str | None, typer.Option(help="Runs that share a GPU; auto: as many as fit by memory.", show_default=False)
]
Force = Annotated[
    bool, typer.Option("--force", help="Mix code versions or texts; train cells that seem too large for the device.")
]
Retry = Annotated[
    str | None,
    typer.Option(help="Train again cells that ended as: failed, diverged, all; stopped.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the cells and what they cost; write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
OF_SLURM, OF_RAY, OF_CLUSTERS = "SLURM", "Ray", "SLURM and Ray"


def command(
    source: Annotated[
        str, typer.Argument(metavar="SWEEP", show_default=False, help="A sweep file, or the name of a built-in one.")
    ],
    runs: opt.RunsDir = None,
    dry_run: DryRun = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one per GPU, or one per CPU.", show_default=False),
    ] = None,
    jobs_per_gpu: JobsPerGPU = None,
    retry: Retry = None,
    set_: opt.Set = None,
    track: opt.Track = None,
    as_json: opt.Json = False,
    quiet: Quiet = False,
    force: Force = False,
    launcher: Annotated[str, typer.Option("--launcher", "-l", help="Where workers start: local, slurm, ray.")] = "local",
    emit: Annotated[bool, typer.Option("--emit", help="Print what would be submitted or started; start nothing.")] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="GPUs of a SLURM task (2, a100:2) or of a Ray run (0.25).", show_default=False, rich_help_panel=OF_CLUSTERS
        ),
    ] = None,
    cpus: Annotated[
        str | None, typer.Option(help="CPUs of a task or run.", show_default=False, rich_help_panel=OF_CLUSTERS)
    ] = None,
    account: Annotated[str | None, typer.Option(help="As for sbatch.", show_default=False, rich_help_panel=OF_SLURM)] = None,
    partition: Annotated[str | None, typer.Option(help="As for sbatch.", show_default=False, rich_help_panel=OF_SLURM)] = None,
    time_: Annotated[
        str | None,
        typer.Option("--time", help="Time limit of one task, as for sbatch.", show_default=False, rich_help_panel=OF_SLURM),
    ] = None,
    constraint: Annotated[str | None, typer.Option(help="As for sbatch.", show_default=False, rich_help_panel=OF_SLURM)] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(help="Environment module to load first (repeatable).", show_default=False, rich_help_panel=OF_SLURM),
    ] = None,
    container: Annotated[
        str | None, typer.Option(help="Image for apptainer exec.", show_default=False, rich_help_panel=OF_SLURM)
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Watch the job until the sweep is finished.", rich_help_panel=OF_SLURM)
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a running cluster, or auto.", show_default=False, rich_help_panel=OF_RAY),
    ] = None,
) -> None:
    """Train every cell of a sweep file that is not finished yet. After an interruption the same command resumes it.

    Exit code 0: all cells are done; 3: finished, but some failed or diverged (the table says why; --retry trains them again).
    """
    flags = {
        "jobs": jobs,
        "jobs_per_gpu": parsed(jobs_per_gpu),
        "gpus": gpus if launcher == "slurm" else parsed(gpus),
        "cpus": parsed(cpus),
        "account": account,
        "partition": partition,
        "time": time_,
        "constraint": constraint,
        "modules": modules or None,
        "container": container,
        "address": address,
    }
    sweep = open_sweep(source, runs=runs, sets=set_ or [])
    options = launcher_options(launcher, sweep.file.launchers, flags)
    if wait and not isinstance(options, SlurmOptions):
        raise UsageError(f"--wait: is an option of --launcher slurm; {launcher} always waits.")
    opt.track(track)
    if dry_run:
        show_estimate(estimate_sweep(sweep, launcher=options, retry=retry, force=force), as_json=as_json)
        return
    if emit:
        console.say(launch_commands(sweep, launcher=options, force=force), as_is=True)
        return
    with watching(quiet=quiet) as watch:
        outcomes = run_sweep(
            sweep,
            launcher=options,
            retry=retry,
            force=force,
            wait=wait,
            watch=watch(sweep),
            data_progress=console.DataProgress,
        )
    if wait or not isinstance(options, SlurmOptions) or all(outcome.settled for outcome in outcomes):
        report_outcomes(sweep, outcomes, as_json=as_json)


def parsed(text: str | None) -> Any:
    """The value that the text of an option stands for: a number where it is one."""
    return None if text is None else parse_value(text)


def report_outcomes(sweep: Sweep, outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """Print the outcome of each cell. Raises SweepFailed if cells failed or diverged."""
    if as_json:
        cells = [{**asdict(o), "values": cell.values} for cell, o in zip(sweep.cells, outcomes, strict=True)]
        console.print_json({"sweep": sweep.file.name, "runs": str(sweep.store.root), "cells": cells})
    else:
        show_outcomes(sweep.file.name, outcomes)
    n = Counter(outcome.state for outcome in outcomes)
    if bad := [state for state in ("failed", "diverged") if n[state]]:
        counts = " and ".join(f"{n[state]} {state}" for state in bad)
        raise SweepFailed(f"{counts} of {len(outcomes)} cells; --retry {bad[0] if len(bad) == 1 else 'all'} tries again.")


def show_estimate(estimate: SweepEstimate, *, as_json: bool = False) -> None:
    """Print a row for each cell and the sum of those that are to train."""
    if as_json:
        console.print_json(estimate.to_dict())
        return
    rows = [
        (
            c.run_id,
            c.state,
            *map(human_count, (c.params_non_embedding, c.tokens)),
            f"{c.flops:.2g}",
            console.duration(c.time.likely) if c.time else None,
        )
        for c in estimate.cells
    ]
    console.print_table(("run", "state", "params", "tokens", "FLOPs", "time"), rows, title=estimate.description, left=2)
    for sentence in estimate.sentences():
        console.say(sentence)
