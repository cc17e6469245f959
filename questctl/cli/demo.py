"""`questctl demo`: the plan experiments/laptop.toml from text to verdict: train, fit, draw, and say what it shows and what not.

It is nothing but `sweep` and `fit-scaling` in one word; the same plan can be run, changed and continued with those two.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..store import RunStore, load_runs
from ..sweep.launchers.options import LauncherOptions
from ..sweep.record import Sweep
from ..sweep.sweep_file import Plan, find_plan, load_plan
from . import fit_scaling
from . import options as opt
from .sweep import run_here, show_costs, show_outcomes

if TYPE_CHECKING:
    from ..analysis.fit import Fit

PLAN = "laptop"


def command(
    runs: opt.RunsDir = None,
    out: Annotated[Path, typer.Option(help="Folder for fit.json and the figures.")] = Path("demo-results"),
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Runs at a time (default: one a core).", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained; write nothing.")] = False,
    set_: opt.Set = None,
    as_json: opt.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a grid of 1- to 16-bit models here, fit the law, draw the figures, and say what they show. Minutes on two cores.

    Interrupt it at will: the same command goes on. --set changes every cell, such as --set train.seed=1.
    """
    start = time.monotonic()
    plan, store = load_plan(find_plan(PLAN), set_ or []), RunStore(opt.runs_dir(runs))
    if dry_run:
        show_costs(Sweep(plan, store), LauncherOptions(jobs=jobs or 0), as_json=as_json, recorded=False)
        return
    outcomes = run_here(plan, store, jobs=jobs or 0, quiet=quiet)
    trained = time.monotonic()
    found = fit_scaling.study(fit_plan(plan, store), out=out)
    if as_json:
        console.print_json({"plan": plan.name, "runs": str(store.root), "out": str(out), **found.document})
        return
    if not quiet:
        show_outcomes(plan, outcomes)
    fit_scaling.show(found)
    took = f"{console.duration(trained - start)} of training and {console.duration(time.monotonic() - trained)} of fitting"
    console.note(f"{took}; figures and fit.json are in {out}/, runs in {store.root}/ (questctl runs ls)")


def fit_plan(plan: Plan, store: RunStore) -> Fit:
    """The law of the paper fitted to the finished runs of a plan, with intervals. Raises DataError if they are too few."""
    from ..analysis import fit_law, points_from_frame, with_intervals

    frame = load_runs(store.root)
    with fit_scaling.user_errors():
        points = points_from_frame(frame[frame["run"].isin([cell.run_id for cell in plan.cells])], source=plan.name)
        return with_intervals(fit_law(points, "quest"))
