"""`questctl runs health [RUN…]`: spikes, growing gradients, dead masks, clamped operands and families, from metric lines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .. import console
from ..scaling.health import check_collapse, diagnose_health
from ..store import default_root
from . import options as opt


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", show_default=False, help="Runs: their names, or unique ends of them; left out: all."),
    ] = None,
    collapse: Annotated[
        bool, typer.Option("--collapse", help="Check whether the curves of a family coincide, once divided by their last loss.")
    ] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Show the health of runs: loss spikes, gradient growth, the operands with the least gradient and the most clamping."""
    root = runs or default_root()
    if collapse:
        families = check_collapse(root, names or ())
        if as_json:
            console.print_json([family.to_dict() for family in families])
            return
        for family in families:
            console.say(family.sentence)
        if not families:
            console.note(f"no four finished runs in {root} are of one scheme, schedule and tokens per parameter")
        return
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
