"""`questctl demo`: train the sweep file experiments/laptop.toml, fit a law to its runs, draw it, and say which bits pay.

The same runs can be changed and continued with `questctl sweep laptop` and `questctl fit-scaling`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..demo import estimate_demo, run_demo
from . import fit_options as fo
from . import fit_scaling
from . import options as opt
from .sweep import DryRun, Quiet, show_estimate
from .sweep_view import show_outcomes, watching


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
    """Train a grid of 1- to 16-bit models here, fit the law, and say which bits pay. Minutes on two cores.

    After an interruption the same command resumes it. --set changes every cell, such as --set train.seed=1.
    """
    start = time.monotonic()
    if dry_run:
        show_estimate(estimate_demo(runs, set_ or [], jobs or 0), as_json=as_json)
        return
    with watching(quiet=quiet) as watch:
        result = run_demo(runs, set_ or [], jobs or 0, watch=watch, data_progress=console.DataProgress)
    if as_json:
        console.print_json({"out": str(out), **result.to_json()})
        result.fit.save(out)
        return
    if not quiet:
        show_outcomes("demo", result.outcomes)
        console.say()
        fit_scaling.show_eff(result.fit.fit)
        console.say()
    fo.say_findings(result.findings)
    result.fit.save(out)  # after it is shown, which a folder that cannot be written does not prevent
    console.note(
        f"{console.duration(time.monotonic() - start)}; {out}/loss_vs_bits.png shows it, {out}/fit.json has the numbers"
    )
