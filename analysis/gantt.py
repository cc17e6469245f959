"""A Gantt picture: which device of a cluster is busy with what, and when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .draw import axes_grid
from .style import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOUR, MINUTE = 3600.0, 60.0


class Span(NamedTuple):
    """A device in use: its lane, from and to in seconds, the devices of the same attempt, and how the attempt ended."""

    lane: int
    start: float
    stop: float
    devices: int
    end: str


def gantt(spans: Sequence[Span], title: str) -> Figure:
    """The spans, with a lane for each device. Colours show how many devices an attempt took; red attempts did not finish."""
    drawing, (axes,) = axes_grid(7.2, 3.6)
    colours = list(PALETTE.values())[1:]
    last = max((span.stop for span in spans), default=0.0)
    unit, name = (HOUR, "hours") if last > 2 * HOUR else (MINUTE, "minutes")
    kinds: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        kinds[f"{span.devices} device{'s' * (span.devices > 1)}" if span.end == "done" else "failed or preempted"].append(span)
    order = sorted(kinds, key=lambda kind: (not kind[0].isdigit(), int(kind.split()[0]) if kind[0].isdigit() else 0))
    for i, kind in enumerate(order):
        of_kind = kinds[kind]
        colour = colours[i % len(colours)] if kind[0].isdigit() else "tab:red"
        left, width = ([x / unit for x in xs] for xs in ([s.start for s in of_kind], [s.stop - s.start for s in of_kind]))
        edge = "white" if len(spans) < 2000 else "none"
        lanes = [s.lane for s in of_kind]
        axes.barh(lanes, width, left=left, height=0.9, color=colour, edgecolor=edge, linewidth=0.3, label=kind)
    axes.set(xlabel=f"time ({name})", ylabel="device", title=title, xlim=(0, last / unit or 1))
    axes.invert_yaxis()
    axes.legend(loc="upper right", fontsize="small")
    return drawing
