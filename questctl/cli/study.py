"""`questctl study NAME`: train what a study compares, and show one table and what the runs say about each claim."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..config import human_count
from ..errors import SweepFailed, UsageError, unknown
from ..sweep.study import StudyResult, estimate_study, run_study
from ..sweep.study_file import SCALES, find_study, load_study, studies
from ..sweep.study_folder import FILES, row_in_words, training_cost
from . import options as opt
from .sweep import DryRun, Quiet, Retry, show_estimate
from .sweep_view import watching

NAME = typer.Argument(
    metavar="NAME",
    show_default=False,
    help=f"{', '.join(sorted(studies()))}, or a TOML file.",
)
COLUMNS = {"scheme": "scheme", "lr": "lr", "n": "n", "loss": "loss", "sd": "sd", "difference": "Δ", "interval": "95 %"}
COLUMNS |= {"grad_norm": "grad", "diverged": "div."}


def command(
    name: Annotated[str, NAME],
    scale: Annotated[str, typer.Option(help="laptop: an hour on two cores; full: the paper's sizes.")] = "laptop",
    runs: opt.RunsDir = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for table, JSON, figure and README.md.", show_default=False)
    ] = None,
    dry_run: DryRun = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one per CPU at laptop sizes.")] = 0,
    retry: Retry = None,
    set_: opt.Set = None,
    details: Annotated[bool, typer.Option("--details", help="Show the differences behind each verdict.")] = False,
    as_json: opt.Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods under identical conditions: search their learning rates, train all seeds, and say what holds here.

    After an interruption the same command resumes it; a study whose runs are all done only prints its table.
    """
    if scale not in SCALES:
        raise UsageError(unknown("--scale", scale, SCALES))
    study = load_study(find_study(name), set_ or [], scale)
    if dry_run:
        estimate = estimate_study(study, runs=runs, jobs=jobs, retry=retry)
        show_estimate(estimate.sweep, as_json=as_json)
        if n := len(estimate.unsearched):
            console.note(
                f"The learning rates of {n} schemes are not known yet: their cells are costed at the middle of the grid, and "
                f"the search may add up to {estimate.extensions} runs for each."
            )
        return
    with watching(quiet=quiet) as watch:
        result = run_study(study, runs=runs, jobs=jobs, retry=retry, watch=watch, data_progress=console.DataProgress)
    if as_json:
        console.print_json(result.to_dict())
    else:
        show_study(result, details=details)
    if out is not None:
        result.write(out)
        if not as_json:
            console.note(f"{', '.join(FILES[:-1])} and {FILES[-1]} are in {out}/")
    for outcome in result.failed:
        console.warn(f"{outcome.run_id}: {outcome.message}")
    if result.failed:
        raise SweepFailed(f"{len(result.failed)} of {len(result.outcomes)} cells failed; --retry failed tries again.")


def show_study(result: StudyResult, *, details: bool) -> None:
    """Print a table for each size, where Δ is the loss minus the reference's, paired by seed; then the verdicts."""
    title = result.study.sweep_file.description or result.study.sweep_file.name
    for size in dict.fromkeys(row.size for row in result.rows):
        console.say(f"{title}: {human_count(size[0])} parameters, {human_count(size[1])} tokens; loss in nats/token")
        rows = [row_in_words(row) for row in result.rows if row.size == size]
        for row in rows:
            row["interval"] = row["interval"] and str(row["interval"]).replace(" to ", " ")  # so that 80 columns are enough
        console.print_table(list(COLUMNS.values()), [[row[key] or None for key in COLUMNS] for row in rows])
    for reference, others in result.comparison.reference.items():
        console.say(f"Δ to {reference}, paired by seed: {', '.join(others)}")
    for judgement in result.judgements:
        console.say(f"* {judgement.sentence}")
        for detail in judgement.details if details else ():
            console.say(f"    {detail}")
    console.say(training_cost(result.provenance))
