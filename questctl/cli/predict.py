"""`questctl predict SOURCE…`: the loss of models that nobody trained yet, by a law fitted to runs or tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import console
from ..config.amounts import parse_amount
from ..errors import UsageError
from ..scaling.fit import check_law
from ..scaling.plan import REPLICATES, fit_or_saved
from ..scaling.prediction import predict
from ..scaling.sources import require_sources
from ..store import default_root
from . import fit_options as fo
from . import options as opt


@fo.with_table_flags
def command(
    sources: fo.Sources = None,
    N: Annotated[str | None, typer.Option("--N", help="Non-embedding parameters: 7B.", show_default=False)] = None,
    D: Annotated[str | None, typer.Option("--D", help="Training tokens: 140B.", show_default=False)] = None,
    scheme: Annotated[
        str | None, typer.Option(help="Schemes or bits: w4a4,16 (default: all with runs).", show_default=False)
    ] = None,
    cells: Annotated[
        Path | None, typer.Option(help="Instead: a table of cells with columns N, D and scheme.", show_default=False)
    ] = None,
    unique_tokens: fo.UniqueTokens = None,
    share: Annotated[
        float | None, typer.Option(help="Part of the tokens before quantization, for --law switch-eff (default: the best).")
    ] = None,
    law: fo.SavedLaw = None,
    objective: fo.SavedObjective = None,
    residuals: fo.Residuals = None,
    fix: fo.Fix = None,
    bootstrap: Annotated[int, typer.Option("--bootstrap", min=0, help="Replicates behind the intervals.")] = REPLICATES,
    details: fo.Details = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
    *,
    rows: fo.Rows,
) -> None:
    """Predict the loss of a size, tokens and scheme, with a 95 % interval and how far other laws disagree."""
    check_law(law or "quest")
    if (cells is None) == (N is None and D is None) or (cells is None and (N is None or D is None)):
        raise UsageError("predict: give --N and --D, such as --N 7B --D 140B, or --cells FILE.")
    size, tokens = (None if text is None else parse_amount(text, key) for text, key in ((N, "--N"), (D, "--D")))
    unique = math.inf if unique_tokens is None else parse_amount(unique_tokens, "--unique-tokens")
    sources = sources or [runs or default_root()]
    require_sources([*sources, *([cells] if cells else [])])
    how: dict[str, Any] = {"objective": objective, "residuals": residuals, "fix": fo.numbers("--fix", fix)}
    fitted = fit_or_saved(sources, law, **how, columns=rows.columns, where=rows.where, table=rows.options)
    asked: dict[str, Any] = {"cells": cells, "columns": rows.columns, "unique_tokens": unique, "share": share}
    predicted = predict(fitted, size, tokens, fo.names(scheme), **asked, bootstrap=bootstrap)
    if as_json:
        console.print_json(predicted.to_json())
        return
    fo.note_points(predicted.fit.points)
    fo.say_findings(predicted.findings, details=details)
    console.say()
    shown = []
    for c in predicted.cells:
        ends = c.interval or (None, None)
        low, high = c.spread
        laws = None if len(c.laws) < 2 else f"{low:.4f} … {high:.4f}"
        sizes = (f"{c.params_non_embedding:.4g}", f"{c.tokens:.4g}", c.tokens / c.params_non_embedding)
        shown.append((c.scheme, *sizes, f"{c.loss:.5f}", *ends, laws))
    columns = ("scheme", "N", "D", "D/N", "loss", "low", "high", "laws")
    fo.print_models(columns, shown, [c.share for c in predicted.cells])
