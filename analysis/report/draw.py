"""A chart as matplotlib figures, and files of them: what the page shows, for a paper.

Every view of a chart becomes one figure, drawn from the same numbers as on the page. Same input, same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import figures
from ..figures import Style
from .charts import Axis, Chart, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("pdf", "svg", "png")
NEUTRAL = Style("#777777", "o", "-")


def figure(chart: Chart, view: View, looks: Mapping[str, Style]) -> Figure:
    """One view of a chart; `looks` are the styles by scheme."""
    height = max(2.2, min(chart.height / 96, 11)) if view.y.words else 4.2
    drawing, (axes,) = figures.axes_grid(7.2, height)
    for s in view.series:
        look = looks.get(s.scheme or "", NEUTRAL)
        label = _text(s.name) if s.listed and s.name not in axes.get_legend_handles_labels()[1] else None
        if s.kind == "points":
            fill = "none" if s.hollow else look.color
            axes.plot(s.x, s.y, ls="none", marker=look.marker, color=look.color, mfc=fill, ms=5, label=label)
        elif s.kind == "line":
            axes.plot(s.x, s.y, color=look.color, ls=look.dash, label=label, zorder=1, lw=0.9 if s.run is not None else 1.4)
        elif s.kind == "steps":
            axes.step(s.x, s.y, where="post", color=look.color, lw=1.1, zorder=0, label=label)
        elif s.kind == "band":
            assert s.low is not None
            assert s.high is not None
            axes.fill_between(s.x, s.low, s.high, color=look.color, alpha=0.13, lw=0)
        else:
            assert s.low is not None
            assert s.high is not None
            axes.hlines(s.y, s.low, s.high, color=look.color, lw=2, alpha=0.55)
            axes.plot(s.x, s.y, ls="none", marker=look.marker, color=look.color, ms=5.5, label=label)
    _axis(axes, view.x, "x")
    _axis(axes, view.y, "y")
    words = [f"{question.lower()}: {answer}" for question, answer in view.choice.items()]
    axes.set_title(_text("; ".join([*words, *([view.note] if view.note else [])])), fontsize=9, loc="left")
    if axes.get_legend_handles_labels()[1]:
        figures.legend(axes, len(axes.get_legend_handles_labels()[1]))
    return drawing


def _text(words: str) -> str:
    """No letter of a name is markup to matplotlib."""
    return words.replace("\\", "\\\\").replace("$", r"\$")


def _axis(axes: Axes, axis: Axis, which: str) -> None:
    scale = axes.set_xscale if which == "x" else axes.set_yscale
    ticks, limits = (axes.set_xticks, axes.set_xlim) if which == "x" else (axes.set_yticks, axes.set_ylim)
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(_text(axis.label))
    if axis.words:
        ticks(np.arange(len(axis.words)), [_text(w) for w in axis.words])
        limits((len(axis.words) - 0.5, -0.5))
        return
    if axis.shown:
        limits(axis.shown)
    if axis.log:
        scale("log")
        if axis.ticks:
            ticks([v for v, _ in axis.ticks], [t for _, t in axis.ticks])
            ticks([], minor=True)
        else:
            figures.plain_log_axis(axes, which)


def save(charts: Iterable[Chart], folder: str | Path, looks: Mapping[str, Style]) -> list[Path]:
    """Every view of every chart as PDF, SVG and PNG in `folder`, which is made; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for chart in charts:
        for view in chart.views:
            answers = [slug(answer) for question, answer in view.choice.items() if question in chart.questions]
            out += figures.save(figure(chart, view, looks), folder / "-".join([chart.key, *answers]), KINDS)
    return out


def slug(text: str) -> str:
    """Letters, digits and dots of a text, for a file's name.

    >>> slug("tokens per parameter: 98.4")
    'tokens-per-parameter-98.4'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
