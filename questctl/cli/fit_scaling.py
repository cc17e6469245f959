"""`questctl fit-scaling SOURCE…`: a scaling law with its doubt, the frontier and the figures, from runs or tables of points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import UsageError
from ..scaling.fit import FEW_REPLICATES, check_law, fit_sources
from ..scaling.sources import require_sources
from ..store import default_root
from . import fit_options as fo
from . import options as opt

if TYPE_CHECKING:
    from ..analysis.choice import Choice
    from ..analysis.fit_result import Fit
    from ..scaling.fit import FitResult

Replicates = Annotated[
    int, typer.Option("--bootstrap", min=0, help="Replicates of the wild bootstrap, by cluster.", rich_help_panel=fo.OF_FIT)
]


@fo.with_table_flags
def command(
    sources: fo.Sources = None,
    law: fo.Law = "quest",
    objective: fo.Objective = "lsq",
    residuals: fo.Residuals = None,
    fix: fo.Fix = None,
    schemes: Annotated[
        str | None,
        typer.Option(help="Schemes an answer is wanted for: 1.585,w4a4.", show_default=False, rich_help_panel=fo.OF_FIT),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of parameters to evaluate instead of fitting.", show_default=False, rich_help_panel=fo.OF_FIT
        ),
    ] = None,
    intervals: fo.Intervals = None,
    bootstrap: Replicates = FEW_REPLICATES,
    out: Annotated[Path | None, typer.Option(help="Folder for fit.json and the figures.", show_default=False)] = None,
    details: fo.Details = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
    *,
    rows: fo.Rows,
) -> None:
    """Fit a scaling law: parameters and eff per scheme with 95 % intervals, what they cannot say, and the frontier."""
    check_law(law)
    if law == "auto" and (fix or evaluate):
        raise UsageError("--law auto compares free fits; name a law with --fix or --evaluate.")
    sources = sources or [runs or default_root()]
    require_sources(sources)
    result = fit_sources(
        sources,
        law,
        objective=objective,
        residuals=residuals or "log",
        fix=fo.numbers("--fix", fix),
        columns=rows.columns,
        where=rows.where,
        table=rows.options,
        schemes=fo.names(schemes),
        evaluate=evaluate,
        intervals=intervals,
        bootstrap=bootstrap,
    )
    if as_json:
        console.print_json(result.document.to_json())
    else:
        show(result, details=details)
    if out is not None:  # after it is shown, which a folder that cannot be written does not prevent
        result.save(out)
        if not as_json:
            console.note(f"wrote {out}/fit.json and figures")


def show(result: FitResult, *, details: bool = False) -> None:
    """The verdict, then the tables of the laws and of the fit; with `details` all findings and the lists behind them."""
    document = result.document
    fo.note_points(result.fit.points)
    fo.say_findings(document.findings, details=details)
    console.say()
    if result.choice is not None:
        show_choice(result.choice)
    show_fit(result.fit)
    fo.say_tables(document.tables if details else document.shown_tables)


def show_choice(choice: Choice) -> None:
    """The laws with their errors on runs that they were not fitted to."""
    rows = []
    for s in choice.scores:
        errors = (100 * s.in_sample, 100 * s.leave_one_size_out, 100 * s.forward)
        rows.append((s.law, *errors, s.aicc, s.fit.status, "clearly worse" if s.clearly_worse else ""))
    console.print_table(("law", "RMS %", "held-out size %", "forward %", "AICc", "status", ""), rows)
    for name, reason in choice.skipped.items():
        console.note(f"law {name} was not tried: {reason}")


def show_fit(fit: Fit) -> None:
    """The law, its parameters and eff."""
    what = f"sum of {fit.objective} on {fit.objective.residuals} residuals"
    n = f"{fit.n} points, {what}: {fit.cost:.9g}, RMS {100 * fit.rms:.3g} %"
    console.say(f"{fit.law.name}: {fit.law.equation}  ({fit.law.source})")
    console.say(f"{fit.status}; {n}; data {fit.points.hash}")
    parameters: list[tuple[Any, ...]] = [
        (name, "no number" if value is None else value, *_ends(fit, name), "fixed" if name in fit.fixed else "")
        for name, value in fit.params.items()
    ]
    console.print_table(("parameter", "value", "low", "high", ""), parameters)
    show_eff(fit)


def show_eff(fit: Fit) -> None:
    """eff of each scheme with its interval, and what it makes of a stored bit; nothing for a law without eff."""
    from ..analysis.summary import eff_per_bit, per_bit_formula

    if not fit.eff:
        return
    runs = {label: int((fit.points.group == g).sum()) for g, label in enumerate(fit.points.labels)}
    bits = {s.label: s.w_stored_bits for s in fit.points.schemes}
    rows, per_bit = list[tuple[Any, ...]](), eff_per_bit(fit)
    for label, e in fit.eff.items():
        value = "no runs" if e is None else e
        rows.append((label, bits.get(label), runs.get(label, 0), value, *_ends(fit, f"eff.{label}"), per_bit.get(label)))
    console.print_table(("scheme", "bits", "runs", "eff", "low", "high", per_bit_formula(fit)), rows)


def _ends(fit: Fit, name: str) -> tuple[float | None, float | None]:
    return fit.intervals.get(name, (None, None))
