"""`questctl forecast SOURCE…`: the curve and the final loss of runs that are not finished, or of other schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..errors import UsageError
from ..scaling.best_schedule import BestSchedule, best_schedule
from ..scaling.forecast import forecast
from ..store import default_root
from . import fit_options as fo
from . import options as opt


def command(
    sources: fo.Sources = None,
    run: Annotated[str | None, typer.Option(help="Forecast this run (default: all unfinished).", show_default=False)] = None,
    schedule: Annotated[str | None, typer.Option(help="Another schedule: wsd:decay=.2, cosine.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Another length.", show_default=False)] = None,
    law: Annotated[str, typer.Option(help="multi-power, momentum, power, or joint over N, D and bits.")] = "multi-power",
    given: Annotated[
        str | None,
        typer.Option(help="Schedule of curves without rates: cosine:lr=3e-4,steps=24000.", show_default=False),
    ] = None,
    N: Annotated[float | None, typer.Option("--N", help="Another size (law joint).", show_default=False)] = None,
    scheme: Annotated[str | None, typer.Option(help="Another scheme (law joint).", show_default=False)] = None,
    optimize: Annotated[bool, typer.Option("--optimize", help="The best non-increasing schedule, as a config.")] = False,
    loss: Annotated[str, typer.Option(help="training, or validation (runs with train.eval_every).")] = "training",
    map_: fo.Map = None,
    out: Annotated[Path | None, typer.Option(help="Picture to write: .png .svg .pdf.", show_default=False)] = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Forecast the final loss of runs, with a 90 % interval, from whole loss curves.

    With --schedule or --steps: one forecast for each size and scheme, trained that way.
    """
    asked = {"run": run, "steps": steps, "law": law, "given": given, "columns": fo.mappings(map_), "loss": loss, "out": out}
    other = {"schedule": schedule, "N": N, "scheme": scheme}
    where = sources or [runs or default_root()]
    if optimize and any(value is not None for value in other.values()):
        raise UsageError("--optimize looks for a schedule itself: leave out --schedule, --N and --scheme.")
    result = best_schedule(where, **asked) if optimize else forecast(where, **asked, **other)  # type: ignore[arg-type]
    if as_json:
        console.print_json(result.to_dict())
        return
    for each in result.left_out:
        console.note(f"{each.run} is left out: {each.reason}")
    for sentence in result.sentences:
        console.say(sentence)
    if isinstance(result, BestSchedule):
        console.say(result.toml, as_is=True)
    if out:
        console.say(str(out))
