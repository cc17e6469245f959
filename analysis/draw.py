"""Draw charts with matplotlib and save them: the charts of the interactive page, for a paper or a folder of results.

A chart is described in `charts`; here each of its views becomes axes. The same input gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .charts import BUDGETS, Axis, Chart, View
from .style import Style, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("pdf", "svg", "png")
NEUTRAL = Style("#777777", "o", "-")
MOST_LISTED = 3  # of a legend inside the axes; a longer one is placed beside them, off the data
_RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "questctl",
    "figure.dpi": 100,
    "lines.linewidth": 1.4,
}


def axes_grid(
    width: float = 6.4, height: float = 4.4, columns: int = 1, *, rows: int = 1, shared: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure in the house style, inches wide and high, and its axes row by row; `shared`: with one y axis a row."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, sharey=shared, squeeze=False).ravel())


def figure(chart: Chart, view: View, looks: Mapping[str, Style]) -> Figure:
    """One view of a chart; `looks` are the styles by scheme."""
    height = max(2.2, min(chart.height / 96, 11)) if view.y.words else 4.2
    drawing, (axes,) = axes_grid(7.2, height)
    draw_view(axes, view, looks)
    shown = {*chart.questions, *BUDGETS}  # questions with one answer are left out, except the budget
    words = [f"{question.lower()}: {answer}" for question, answer in view.choice.items() if question in shown]
    axes.set_title(_text("; ".join([*words, *([view.note] if view.note else [])])), fontsize=9, loc="left")
    if entries := len(axes.get_legend_handles_labels()[1]):
        legend(axes, entries)
    return drawing


def panels(chart: Chart, views: Sequence[View], looks: Mapping[str, Style], titles: Sequence[str] = ()) -> Figure:
    """Several views of a chart side by side, with one y axis and one legend."""
    drawing, axes = axes_grid(3.6 * len(views) + 2.2, 4.4, len(views), shared=True)
    entries: dict[str, Any] = {}
    for one, view, title in zip(axes, views, titles or [""] * len(views), strict=True):
        draw_view(one, view, looks)
        one.set_title(_text(title), fontsize=9, loc="left")
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    for one in axes[1:]:
        one.set_ylabel("")
    if entries:
        places = {_text(label): place for place, label in enumerate(looks)}
        order = sorted(entries, key=lambda label: places.get(label, len(places)))  # the order of schemes in all charts
        drawing.legend([entries[label] for label in order], order, loc="outside right center", frameon=False, fontsize=8)
    drawing.suptitle(_text(chart.caption), fontsize=9)
    return drawing


def draw_view(axes: Axes, view: View, looks: Mapping[str, Style]) -> None:
    """The series and the axes of a view."""
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
    draw_axis(axes, view.x, "x")
    draw_axis(axes, view.y, "y")


def _text(words: str) -> str:
    """Escape what matplotlib would read as markup, such as `$` in the name of a scheme."""
    return words.replace("\\", "\\\\").replace("$", r"\$")


def draw_axis(axes: Axes, axis: Axis, which: str) -> None:
    """Label, scale, ticks and reference line of one axis, `which` is "x" or "y"."""
    scale = axes.set_xscale if which == "x" else axes.set_yscale
    ticks, limits = (axes.set_xticks, axes.set_xlim) if which == "x" else (axes.set_yticks, axes.set_ylim)
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(_text(axis.label))
    if axis.mark is not None:
        (axes.axvline if which == "x" else axes.axhline)(axis.mark, color="0.6", lw=0.8, zorder=0)
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
            plain_log_axis(axes, which)


def plain_log_axis(axes: Axes, which: str = "x") -> None:
    """A log axis with ticks at 1, 2, 5 (beyond three decades: at 1; within half of one: at all digits), as 0.5, 20 or 30M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis = axes.xaxis if which == "x" else axes.yaxis
    digits = range(1, 10) if high < 3 * low else (1, 2, 5) if high < 1e3 * low else (1,)
    axis.set_major_locator(LogLocator(subs=[float(d) for d in digits]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: count(v) if 1e3 <= v < 1e15 else f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Axes, entries: int) -> None:
    """A legend inside the axes, or beside them if a long one would cover data; none without named entries."""
    if not axes.get_legend_handles_labels()[0]:
        return
    if entries > MOST_LISTED:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False, fontsize=8)


def save(figure: Figure, stem: str | Path, kinds: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write `stem.png` and `stem.svg`, or other `kinds` (pdf); returns the paths."""
    import matplotlib as mpl

    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    out = [Path(f"{stem}.{kind}") for kind in kinds]
    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for all files
        for path, kind in zip(out, kinds, strict=True):
            figure.savefig(path, dpi=150, metadata=undated.get(kind))
    return out


def save_views(charts: Iterable[Chart], folder: str | Path, looks: Mapping[str, Style]) -> list[Path]:
    """Every view of every chart as PDF, SVG and PNG in `folder`, which is created; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for chart in charts:
        for view in chart.views:
            answers = [slug(answer) for question, answer in view.choice.items() if question in chart.questions]
            out += save(figure(chart, view, looks), folder / "-".join([chart.key, *answers]), KINDS)
    return out


def slug(text: str) -> str:
    """Letters, digits and dots of a text, for a file name.

    >>> slug("tokens per parameter: 98.4")
    'tokens-per-parameter-98.4'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
