"""The figure of a probe: alignment, gradient norm, mask, error and kurtosis of each layer, drawn from probe.json.

Layers are ordered from left to right as data passes them. The left column shows weights, the right column inputs, with one line
per setting, in the last row one per basis. Grey lines mark the value of a perfect quantizer, or of normal values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .draw import axes_grid
from .style import DASHES, MARKERS, OTHER, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
OPERANDS = {"weights": "weights", "activations": "inputs"}
WIDE = 5.0  # an axis with larger values is logarithmic
_COLORS = (PALETTE[4], PALETTE[8], PALETTE[2], PALETTE[3], PALETTE[1], OTHER, PALETTE[16])


def probe_figure(probe: Record) -> Figure:
    """Draw every setting of a probe's document (`Probe.to_dict`); returns a figure with eight panels."""
    names = [layer["layer"].removeprefix("blocks.") for layer in probe["settings"][0]["layers"]]
    figure, panels = axes_grid(max(8.0, 2.5 + 0.3 * len(names)), 10.0, 2, rows=4)
    rows: list[tuple[str, Callable[[Record], float | None], float | None]] = [
        ("alignment: cosine to the\nfull-precision gradient", lambda layer: layer["alignment"], 1.0),
        ("gradient norm over that\nin full precision", lambda layer: layer["gradient_ratio"], 1.0),
        *((f"{title}: share of entries\nwithout gradient (%)", _of(x, _distrusted), None) for x, title in OPERANDS.items()),
        *((f"{title}: squared error over\nthat of normal values", _of(x, _excess), 1.0) for x, title in OPERANDS.items()),
    ]
    for axes, (label, value, ideal) in zip(panels, rows, strict=False):
        lines = {f"{s['name']}: {s['alignment']:.2f}": [value(layer) for layer in s["layers"]] for s in probe["settings"]}
        _draw(axes, lines, label, ideal)
    for axes, (operand, title) in zip(panels[6:], OPERANDS.items(), strict=True):
        shapes = [d for d in probe["distributions"] if d["operand"] == operand]
        lines = {basis: [s["kurtosis"] for s in shapes if s["rotation"] == basis] for basis in (s["rotation"] for s in shapes)}
        _draw(axes, lines, f"{title}: excess kurtosis\n(of normal values: 0)", 0.0, first=len(probe["settings"]))
        axes.legend(frameon=False, fontsize=8, title="rotation", title_fontsize=8)
    for i, axes in enumerate(panels):
        axes.set_xticks(range(len(names)), names if i >= 6 else [""] * len(names), rotation=90, fontsize=6)
        axes.set_xlim(-0.5, len(names) - 0.5)
    batches = f"{probe['batches']} batches of {probe['tokens_per_batch']:,} tokens"
    title = f"{probe['run']}: alignment over all layers, mean of {batches}"
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8, title=title)
    return figure


def _of(operand: str, value: Callable[[Record], float | None]) -> Callable[[Record], float | None]:
    return lambda layer: None if layer[operand] is None else value(layer[operand])


def _distrusted(operand: Record) -> float:
    share: float = operand["trusted"]
    return 100 * (1 - share)


def _excess(operand: Record) -> float | None:
    return operand["error"] / operand["normal_error"] if operand["normal_error"] else None


def _draw(axes: Axes, lines: Mapping[str, Sequence[float | None]], label: str, ideal: float | None, *, first: int = 0) -> None:
    """Draw one line per name, with styles from number `first` on. The axis is logarithmic above 1 if a value exceeds `WIDE`."""
    from matplotlib.ticker import FuncFormatter

    for i, (name, values) in enumerate(lines.items(), start=first):
        style = {"color": _COLORS[i % len(_COLORS)], "marker": MARKERS[i % len(MARKERS)], "ls": DASHES[i % len(DASHES)]}
        axes.plot(range(len(values)), [float("nan") if v is None else v for v in values], ms=3.5, lw=1.1, label=name, **style)
    if ideal is not None:
        axes.axhline(ideal, color="0.6", lw=0.8, zorder=0)
        drawn = [v for values in lines.values() for v in values if v is not None]
        if max(drawn, default=0) > WIDE:
            axes.set_yscale("symlog", linthresh=1)
            if min(drawn) >= 0:
                axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_ylabel(label)
