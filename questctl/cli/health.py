"""`questctl runs health [RUN…]`: spikes, growing gradients, dead masks and clamped operands, from the metric lines alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .. import console
from ..scaling.health import diagnose_health
from ..store import default_root
from . import options as opt


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", show_default=False, help="Runs: their names, or unique ends of them; left out: all."),
    ] = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Show the health of runs: loss spikes, gradient growth, the operands with the least gradient and the most clamping."""
    root = runs or default_root()
    health = diagnose_health(root, names or ())
    if as_json:
        console.print_json([asdict(each) for each in health])
        return
    table = [
        (h.run, h.state, h.step, *(e and console.rough(e.value) for e in (h.spike, h.growth, h.drift, h.trust, h.saturation)))
        for h in health
    ]
    console.print_table(("run", "state", "step", "spike", "jump", "drift", "trust", "clamped"), table, left=2)
    if health:
        from ..analysis.health import LEGEND

        console.say(LEGEND)
    for each in health:
        for finding in each.findings:
            console.say(f"{each.run}: {finding}")
    if not health:
        console.note(f"no runs in {root}")
    elif not any(each.findings for each in health):
        console.note("nothing to report")
