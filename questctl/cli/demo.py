"""`questctl demo`: train the sweep file experiments/laptop.toml, fit a law to its runs, draw it, and say what it shows.

It does what `questctl sweep laptop` and `questctl fit-scaling` do; the same runs can be changed and continued with those two.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..scaling.fit import FitResult, fit_points
from ..scaling.sources import load_sources
from ..store import RunStore
from ..sweep.launchers.options import LauncherOptions
from ..sweep.manifest import open_sweep
from ..sweep.run import estimate_sweep, run_sweep
from ..sweep.sweep_file import SweepFile
from . import fit_scaling
from . import options as opt
from .sweep import DryRun, Quiet, show_estimate
from .sweep_view import show_outcomes, watching

SWEEP = "laptop"


def command(
    runs: opt.RunsDir = None,
    out: Annotated[Path, typer.Option(help="Folder for fit.json and the figures.")] = Path("demo-results"),
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Runs at a time (default: one per CPU).", show_default=False)
    ] = None,
    dry_run: DryRun = False,
    set_: opt.Set = None,
    as_json: opt.Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a grid of 1- to 16-bit models here, fit the law, draw the figures, and say what they show. Minutes on two cores.

    After an interruption the same command resumes it. --set changes every cell, such as --set train.seed=1.
    """
    start = time.monotonic()
    sweep, launcher = open_sweep(SWEEP, runs=runs, sets=set_ or []), LauncherOptions(jobs=jobs or 0)
    file, store = sweep.file, sweep.store
    if dry_run:
        show_estimate(estimate_sweep(sweep, launcher=launcher, record=False), as_json=as_json)
        return
    with watching(quiet=quiet) as watch:
        progress = console.DataProgress
        outcomes = run_sweep(sweep, launcher=launcher, record=False, watch=watch(sweep), data_progress=progress)
    trained = time.monotonic()
    result = fit_sweep(file, store)
    result.save(out)
    if as_json:
        console.print_json({"sweep": file.name, "runs": str(store.root), "out": str(out), **result.document.to_json()})
        return
    if not quiet:
        show_outcomes(file.name, outcomes)
    fit_scaling.show(result)
    took = f"{console.duration(trained - start)} of training and {console.duration(time.monotonic() - trained)} of fitting"
    console.note(f"{took}; figures and fit.json are in {out}/, runs in {store.root}/ (questctl runs ls)")


def fit_sweep(file: SweepFile, store: RunStore) -> FitResult:
    """The paper's law fitted to the finished runs of a sweep file, with intervals. Raises DataError if they are too few."""
    sources = load_sources(store.root).only([cell.run_id for cell in file.cells])
    return fit_points(sources.points, bootstrap=0, alternatives=False)
