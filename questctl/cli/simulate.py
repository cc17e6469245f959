"""`questctl simulate SWEEP --cluster 8x8xH100`: what a sweep would take there, on virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..sweep.on_cluster import GPUS, simulate_sweep
from . import options as opt
from .sweep import Retry

Stated = Annotated[
    str,
    typer.Option(help=f"NODESxDEVICESxKIND: 8x8xH100, 64xH100, 2xcpu; kinds: {', '.join(GPUS)}, cpu.", show_default=False),
]


def command(
    source: Annotated[
        str, typer.Argument(metavar="SWEEP", show_default=False, help="A sweep file, or the name of a built-in one.")
    ],
    cluster: Stated,
    price: Annotated[float | None, typer.Option(help="Price of a device-hour, in any currency.", show_default=False)] = None,
    failures: Annotated[float, typer.Option(help="Failures of a node, per hour.")] = 0.0,
    preemptions: Annotated[float, typer.Option(help="Preemptions of a node, per hour.")] = 0.0,
    slow: Annotated[float, typer.Option(help="Share of nodes that take half as long again.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of failures, preemptions and slow nodes.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw the course (Gantt).", show_default=False)] = None,
    retry: Retry = None,
    set_: opt.Set = None,
    force: Annotated[bool, typer.Option("--force", help="Include cells that seem too large for the device.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Estimate what the unfinished cells of a sweep take on a cluster: hours, money, and what limits them.

    For example: questctl simulate paper --cluster 8x8xH100 --price 2.5 --failures 0.01
    """
    estimate = simulate_sweep(
        source,
        cluster,
        runs=runs,
        sets=set_ or [],
        retry=retry,
        price=price,
        failures=failures,
        preemptions=preemptions,
        slow=slow,
        seed=seed,
        force=force,
    )
    files = estimate.plot(plot) if plot else []
    if as_json:
        console.print_json(estimate.to_json())
        return
    console.print_table((f"{estimate.name} on {estimate.cluster}", ""), estimate.rows(), left=2)
    for file in files:
        console.note(f"wrote {file}")
