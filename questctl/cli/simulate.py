"""`questctl simulate SWEEP --cluster 8x8xH100`: what a sweep would take there, on virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..config import human_bytes
from ..sweep.on_cluster import GPUS, ClusterEstimate, simulate_sweep
from ..sweep.simulation import HOUR
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
    price: Annotated[float | None, typer.Option(help="Of a device-hour, in any currency.", show_default=False)] = None,
    failures: Annotated[float, typer.Option(help="Failures of a node, per hour.")] = 0.0,
    preemptions: Annotated[float, typer.Option(help="Preemptions of a node, per hour.")] = 0.0,
    slow: Annotated[float, typer.Option(help="Share of nodes that take half as long again.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of failures, preemptions and slow nodes.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw the course (Gantt).", show_default=False)] = None,
    retry: Retry = None,
    set_: opt.Set = None,
    force: Annotated[bool, typer.Option("--force", help="Also cells that seem too large for the device.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Say what the cells of a sweep that are not done would take on a cluster: hours, money, and what bounds them.

    For example: questctl simulate paper --cluster 8x8xH100 --price 2.5 --failures 0.01
    """
    rates = {"price": price, "failures": failures, "preemptions": preemptions, "slow": slow}
    estimate = simulate_sweep(source, cluster, runs=runs, sets=set_ or [], retry=retry, seed=seed, force=force, **rates)
    files = estimate.plot(plot) if plot else []
    if as_json:
        console.print_json(estimate.to_json())
        return
    console.print_table((f"{estimate.name} on {estimate.cluster}", ""), list(rows(estimate)), left=2)
    for file in files:
        console.note(f"wrote {file}")


def rows(estimate: ClusterEstimate) -> list[tuple[str, str]]:
    """What the table shows."""
    t, hours, course = estimate.time, estimate.device_hours, estimate.course
    found = [
        ("cells", f"{estimate.cells}, {estimate.flops:.2g} FLOPs"),
        ("time", f"{console.duration(t.likely)}, {console.duration_range(t.low, t.high)} ({estimate.basis})"),
        ("device-hours", "{}, {} to {}".format(*map(console.rough, (hours.likely, hours.low, hours.high)))),
        ("disk", f"{human_bytes(estimate.disk_bytes)} at the most"),
        ("bound by", estimate.bound_in_words()),
        ("least possible", f"{console.duration(course.lower_bound)}; {course.ratio:.3f} times that are taken"),
    ]
    if estimate.cost:
        found.insert(3, ("cost", f"{estimate.cost.likely:,.0f}, {estimate.cost.low:,.0f} to {estimate.cost.high:,.0f}"))
    if estimate.resources:
        found.append(("processes", estimate.resources))
    if interrupted := len(course.attempts) - estimate.cells:
        found.append(("interrupted", f"{interrupted} attempts, {console.rough(course.lost / HOUR)} device-hours undone"))
    rate = sum(course.operations.values())
    found.append(("file system", f"{console.rough(rate)} operations on names and attributes a second"))
    return found
