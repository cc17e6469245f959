"""Options of the commands that read sources and fit laws, and how their `NAME=VALUE` texts are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..errors import UsageError

if TYPE_CHECKING:
    from ..analysis.document import Table
    from ..analysis.findings import Finding

Sources = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[SOURCE]…", show_default=False, help="Folders of runs, or .csv .json .parquet (default: --runs)."),
]
Map = Annotated[
    list[str] | None, typer.Option("--map", help="Our column = yours: N=params (repeatable; a+b joins).", show_default=False)
]
Where = Annotated[list[str] | None, typer.Option(help="Only rows with COLUMN=VALUE (repeatable).", show_default=False)]
Fix = Annotated[list[str] | None, typer.Option(help="Hold a parameter: E=1.69, eff.w4a4=.7 (repeatable).", show_default=False)]
Objective = Annotated[str, typer.Option(help="lsq, or huber:DELTA on log residuals.")]
SavedObjective = Annotated[
    str | None, typer.Option("--objective", help="lsq, or huber:DELTA [lsq, or that of a saved fit].", show_default=False)
]
Law = Annotated[str, typer.Option(help="quest, chinchilla, quartet, qat, unified, …, or auto: the best on held-out runs.")]
SavedLaw = Annotated[
    str | None, typer.Option("--law", help="As for fit-scaling [quest, or that of a saved fit].", show_default=False)
]
Intervals = Annotated[
    str, typer.Option(help="profile, or cluster: errors that the runs of one scheme and size share, by bootstrap.")
]
Details = Annotated[bool, typer.Option("--details", help="Also show all other findings and the lists behind them.")]


def pairs(option: str, items: Sequence[str] | None) -> dict[str, str]:
    """`["N=params,D=tokens"]` → {"N": "params", "D": "tokens"}. Raises UsageError.

    A comma that no `name=` follows belongs to the value.
    """
    out = {}
    for item in (part for text in items or [] for part in re.split(r",(?=\w+=)", text)):
        key, sign, value = item.partition("=")
        if not sign or not key or not value:
            raise UsageError(f"{option}: '{item}' is not NAME=VALUE.")
        out[key.strip()] = value.strip()
    return out


def numbers(option: str, items: Sequence[str] | None) -> dict[str, float]:
    """`["E=1.69"]` → {"E": 1.69}. Raises UsageError."""
    out = {}
    for name, text in pairs(option, items).items():
        try:
            out[name] = float(text)
        except ValueError:
            raise UsageError(f"{option} {name}: '{text}' is not a number.") from None
    return out


def names(text: str | None) -> list[str]:
    """`"1,2, w4a4"` → ["1", "2", "w4a4"]."""
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def say_findings(findings: Sequence[Finding], *, most: int = 5, details: bool = False) -> None:
    """The first findings, a line each; the others with `details`, else how many there are."""
    for finding in findings if details else findings[:most]:
        console.say(finding.sentence)
    if len(findings) > most and not details:
        console.note(f"{len(findings) - most} more findings: --details")


def say_tables(tables: Sequence[Table]) -> None:
    """The lists behind findings."""
    for table in tables:
        console.say()
        console.say(table.title)
        console.print_table(table.columns, table.rows)
