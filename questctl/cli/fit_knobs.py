"""`questctl fit-knobs SOURCE…`: the best learning rate and batch of each cell, and how they grow with N and D."""

from __future__ import annotations

from .. import console
from ..scaling.knobs import fit_knobs
from ..store import default_root
from . import fit_options as fo
from . import options as opt


def command(
    sources: fo.Sources = None, map_: fo.Map = None, where: fo.Where = None, runs: opt.RunsDir = None, as_json: opt.Json = False
) -> None:
    """Fit laws of the learning rate and the batch, with intervals and the loss lost by using them on held-out cells."""
    fit = fit_knobs(sources or [runs or default_root()], columns=fo.mappings(map_), where=fo.conditions(where))
    if as_json:
        console.print_json(fit.to_dict())
        return
    for sentence in fit.sentences:
        console.say(sentence)
    console.say()
    rows = [
        (c.scheme, f"{c.N:.4g}", f"{c.D:.4g}", c.runs, *(v for k in ("lr", "batch") for v in c.shown(k)), f"{c.regret:.4f}")
        for c in fit.cells
    ]
    head = ("scheme", "N", "D", "runs", "lr", "low", "high", "batch", "low", "high", "regret")
    console.print_table(head, rows)
