"""Figures of points and fits. Each function takes the tidy record and returns a matplotlib Figure; `save` writes PNG and SVG.

One style per scheme everywhere: the hue says the bits of the weights (Okabe & Ito's palette, which colour-blind readers can
tell apart), shade, marker and dash tell schemes of the same bits from each other. Axes carry units. Nothing is drawn from
constants: every mark is a row of the points or a prediction of the fit. Files are the same bytes for the same input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .fit_result import Fit
from .pareto import Frontier
from .schemes import Scheme
from .tables import PointError
from .transitions import iso_memory_loss, transition
from .uncertainty import Bootstrap, profile, threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray

# Okabe & Ito 2008, "Color Universal Design"; by bits of the weights, from full precision down.
_PALETTE = {16: "#000000", 8: "#0072B2", 4: "#009E73", 3: "#E69F00", 2: "#D55E00", 1: "#CC79A7"}
_OTHER = "#56B4E9"
_MARKERS = "osD^vP*X<>hd"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
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


@dataclasses.dataclass(frozen=True)
class Style:
    """How a scheme is drawn."""

    color: str
    marker: str
    dash: Any


def styles(schemes: Sequence[Scheme]) -> dict[str, Style]:
    """Label → style; schemes of the same bits share the hue and differ in marker and dash, other methods than the first also in
    shade.
    """
    out: dict[str, Style] = {}
    seen: dict[str, int] = {}
    shades: dict[str, dict[str, str]] = {}
    for s in sorted(schemes, key=lambda s: (s.w_grid_bits != s.a_grid_bits, not s.rotated, s.w_mse, len(s.label), s.label)):
        color = _PALETTE.get(round(s.w_grid_bits) if abs(s.w_grid_bits - round(s.w_grid_bits)) < 1e-9 else -1, _OTHER)
        k = seen.get(color, 0)
        seen[color] = k + 1
        method = s.label.partition("-w")[0] if "-w" in s.label or not s.label.startswith("w") else ""
        known = shades.setdefault(color, {"": color, "quest": color})
        shade = known.setdefault(method, _shade(color, _SHADES[(len(known) - 2) % len(_SHADES)]))
        out[s.label] = Style(shade, _MARKERS[k % len(_MARKERS)], _DASHES[k % len(_DASHES)])
    return {s.label: out[s.label] for s in schemes}


_SHADES = (-0.4, 0.35, -0.65, 0.18, -0.2)


def _shade(color: str, share: float) -> str:
    """The colour mixed with white (share > 0) or with black."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p + abs(share) * ((255 if share > 0 else 0) - p)):02x}" for p in parts)


def axes_grid(
    width: float = 6.4, height: float = 4.4, columns: int = 1, *, rows: int = 1, shared: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure in the house's style, inches wide and high, and its axes row by row."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_RC):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, sharey=shared, squeeze=False).ravel())


def legend(axes: Axes, count: int) -> None:
    """Beside the axes when there is much to name, so that no data is covered."""
    if count > 8:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    else:
        axes.legend(frameon=False, fontsize=8)


def count(n: float) -> str:
    """30482560 → `30M`, 53440 → `53K`."""
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:.3g}{word}" if n < 10 * unit else f"{n / unit:.0f}{word}"
    return f"{n:g}"


def _size_axis(axes: Axes, sizes: Array) -> None:
    """A log axis of N whose ticks are the sizes that were trained (thinned where they would touch)."""
    axes.set_xscale("log")
    axes.set_xlabel("parameters without embeddings, N")
    kept: list[float] = []
    for n in sizes:
        if not kept or np.log(n / kept[-1]) > 0.09 * max(np.log(sizes[-1] / sizes[0]), 1e-9):
            kept.append(float(n))
    axes.set_xticks(kept, [count(n) for n in kept])
    axes.set_xticks([], minor=True)


def plain_log_axis(axes: Axes, which: str = "x") -> None:
    """A log axis with ticks at 1, 2, 5 (beyond three decades: at 1) written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _plain_loss_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=7))
    axes.set_ylabel("validation loss (nats/token)")


def loss_against_bits(front: Frontier) -> Figure:
    """Measured loss against the size of the model in bits, with the frontier drawn as a staircase."""
    p = front.points
    figure, (axes,) = axes_grid()
    look = styles(p.schemes)
    on = set(front.best.tolist())
    for g, label in enumerate(p.labels):
        rows = [i for i in front.rows if p.group[i] == g]
        if rows:
            s = look[label]
            axes.plot(
                p.memory_bits[rows],
                p.loss[rows],
                linestyle="none",
                marker=s.marker,
                color=s.color,
                ms=5,
                mfc="none",
                label=label,
            )
            kept = [i for i in rows if i in on]
            axes.plot(p.memory_bits[kept], p.loss[kept], linestyle="none", marker=s.marker, color=s.color, ms=6)
    axes.step(
        p.memory_bits[front.best], p.loss[front.best], where="post", color="0.45", lw=1.2, zorder=0, label="frontier (filled)"
    )
    axes.set_xscale("log")
    axes.set_xlabel("model size: bits × parameters (bits)")
    _plain_loss_axis(axes)
    budget = "" if len(front.rows) == len(p) else f", {np.median(p.D[front.rows] / p.N[front.rows]):.3g} tokens per parameter"
    axes.set_title(f"{len(on)} of {len(front.rows)} runs are on the frontier{budget}", fontsize=10, loc="left")
    legend(axes, len(p.labels) + 1)
    return figure


def loss_against_size(fit: Fit) -> Figure:
    """Measured loss against N, one panel per D/N, with the fitted law through each scheme's own sizes and budget."""
    p, look = fit.points, styles(fit.points.schemes)
    budgets = p.ratios[-4:] if fit.law.uses_D else np.array([1.0])
    nearest = (
        np.argmin(np.abs(np.log(np.outer(p.D / p.N, 1 / p.ratios))), axis=1) - (len(p.ratios) - len(budgets))
        if fit.law.uses_D
        else np.zeros(len(p), int)
    )
    figure, panels = axes_grid(3.6 * len(budgets) + 2.4, 4.4, len(budgets), shared=True)
    for k, (axes, budget) in enumerate(zip(panels, budgets, strict=True)):
        for g, label in enumerate(p.labels):
            rows = np.flatnonzero((p.group == g) & (nearest == k))
            if not len(rows):
                continue
            s = look[label]
            rows = rows[np.argsort(p.N[rows], kind="stable")]
            axes.plot(p.N[rows], p.loss[rows], linestyle="none", marker=s.marker, color=s.color, ms=5, label=label)
            if len(np.unique(p.N[rows])) > 1:
                N = np.geomspace(p.N[rows].min(), p.N[rows].max(), 60)
                D = np.exp(np.interp(np.log(N), np.log(p.N[rows]), np.log(p.D[rows]))) if fit.law.uses_D else np.ones_like(N)
                axes.plot(N, fit.predict(N, D, label), color=s.color, ls=s.dash)
        _size_axis(axes, p.sizes)
        axes.set_title(f"D/N ≈ {budget:.3g} tokens per parameter" if fit.law.uses_D else "", fontsize=9, loc="left")
        if k == 0:
            _plain_loss_axis(axes)
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        [entries[x] for x in p.labels if x in entries],
        [x for x in p.labels if x in entries],
        loc="outside right center",
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(f"{fit.law.equation} ({fit.status}); points measured, lines fitted", fontsize=9)
    return figure


def eff_per_scheme(fit: Fit) -> Figure:
    """eff with its 95 % interval per scheme; a scheme without runs is named and gets no mark."""
    look = styles(fit.points.schemes)
    labels = list(fit.eff)
    figure, (axes,) = axes_grid(6.4, 1.2 + 0.28 * len(labels))
    for row, label in enumerate(labels):
        value = fit.eff[label]
        if value is None:
            axes.text(1.0, row, "no runs", va="center", ha="center", fontsize=8, color="0.4")
            continue
        s = look[label]
        low, high = fit.intervals.get(f"eff.{label}", (value, value))
        if high > low > 0 and np.isfinite(high):
            axes.plot([low, high], [row, row], color=s.color, lw=2, alpha=0.6, solid_capstyle="butt")
        axes.plot(value, row, marker=s.marker, color=s.color, ms=6)
    axes.axvline(1, color="0.6", lw=0.8)
    axes.set_xscale("log")
    known = [e for e in fit.eff.values() if e]
    low, high = axes.get_xlim()  # an interval without end would leave no room for the rest
    axes.set_xlim(max(low, min(known, default=1.0) / 30), min(high, 30 * max(known, default=1.0)))
    plain_log_axis(axes)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel(f"eff: share of the parameters that count (1 = {fit.points.labels[fit.design.reference]})")
    note = "bars: 95 % profile likelihood" if fit.intervals else "no intervals"
    axes.set_title(f"{note}; status: {fit.status}", fontsize=9, loc="left")
    return figure


def predicted_against_measured(fit: Fit) -> Figure:
    """Measured against predicted loss, and the relative error of each prediction."""
    p, look = fit.points, styles(fit.points.schemes)
    figure, (left, right) = axes_grid(9.6, 4.2, 2)
    predicted = p.loss * np.exp(fit.residuals)
    for g, label in enumerate(p.labels):
        rows, s = p.group == g, look[label]
        kw: Mapping[str, Any] = {"linestyle": "none", "marker": s.marker, "color": s.color, "ms": 5, "mfc": "none"}
        left.plot(predicted[rows], p.loss[rows], label=label, **kw)
        right.plot(p.N[rows], 100 * np.expm1(fit.residuals[rows]), **kw)
    ends = [min(predicted.min(), p.loss.min()), max(predicted.max(), p.loss.max())]
    left.plot(ends, ends, color="0.6", lw=0.8, zorder=0)
    left.set_xlabel("predicted loss (nats/token)")
    left.set_ylabel("measured loss (nats/token)")
    right.axhline(0, color="0.6", lw=0.8, zorder=0)
    _size_axis(right, p.sizes)
    right.set_ylabel("predicted over measured - 1 (%)")
    right.set_title(f"RMS {100 * fit.rms:.2g} %", fontsize=9, loc="left")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    return figure


def residuals_per_scheme(fit: Fit) -> Figure:
    """Residuals against N, joined per scheme: under the right law they are noise, a slope is a trend."""
    p, look = fit.points, styles(fit.points.schemes)
    figure, (axes,) = axes_grid(7.4, 4.2)
    for g, label in enumerate(p.labels):
        rows, s = np.flatnonzero(p.group == g), look[label]
        sizes = np.unique(p.N[rows])
        mean = [100 * np.expm1(fit.residuals[rows[p.N[rows] == n]].mean()) for n in sizes]
        axes.plot(p.N[rows], 100 * np.expm1(fit.residuals[rows]), ls="none", marker=s.marker, color=s.color, ms=4, mfc="none")
        axes.plot(sizes, mean, ls=s.dash, marker=s.marker, color=s.color, ms=4, lw=1, label=label)
    axes.axhline(0, color="0.6", lw=0.8, zorder=0)
    _size_axis(axes, p.sizes)
    axes.set_ylabel("predicted over measured - 1 (%)")
    axes.set_title(f"law {fit.law.name}: means over tokens, joined", fontsize=9, loc="left")
    legend(axes, len(p.labels))
    return figure


def profiles(fit: Fit) -> Figure:
    """Likelihood-ratio profiles of the shared parameters; a flat one says that the points do not determine it."""
    names = [n for n in (q.name for q in fit.law.shared) if n in fit.intervals]
    columns = min(max(len(names), 1), 4)
    rows = -(-len(names) // columns) or 1
    figure, panels = axes_grid(2.4 * columns + 0.6, 2.6 * rows, columns, rows=rows, shared=True)
    for spare in panels[len(names) :]:
        spare.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        low, high = fit.intervals[name]
        i = fit.index(name)
        edge = fit.coordinates[i]
        ends = [edge.internal(max(v, 1e-300)) if edge.log else v for v in (low, high)]
        reach = 0.3 * (ends[1] - ends[0])
        values = np.linspace(max(ends[0] - reach, edge.lower), min(ends[1] + reach, edge.upper), 25)
        natural = np.asarray(edge.natural(values))
        axes.plot(natural, profile(fit, name, natural), color="#0072B2")
        axes.axhline(threshold(fit), color="0.6", lw=0.8)
        axes.axvline(float(edge.natural(fit.theta[i])), color="0.6", lw=0.8, ls=":")
        axes.set_xlabel(f"{name} ({edge.unit})" if edge.unit else name)
    figure.supylabel("likelihood-ratio statistic; line: 95 %", fontsize=9)
    panels[0].set_ylim(0, 2.5 * threshold(fit))
    return figure


def bootstrap_clouds(boot: Bootstrap) -> Figure:
    """Bootstrap replicates of the exponents and the floor, pair by pair, with the fit."""
    names = [n for n in ("alpha", "beta", "E", "gamma", "eta") if n in boot.fit.names and n not in boot.fit.fixed]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]][:3]
    figure, panels = axes_grid(3.2 * max(len(pairs), 1), 3.0, max(len(pairs), 1))
    for axes, (a, b) in zip(panels, pairs, strict=False):
        axes.plot(boot.values(a), boot.values(b), ls="none", marker=".", ms=3, color="#0072B2", alpha=0.3)
        axes.plot(*(float(boot.fit.theta[boot.fit.index(n)]) for n in (a, b)), marker="x", color="#D55E00", ms=8, mew=2)
        axes.set_xlabel(a)
        axes.set_ylabel(f"{b} (nats/token)" if b == "E" else b)
    figure.suptitle(f"{len(boot)} {boot.kind} bootstrap replicates; cross: the fit", fontsize=9)
    return figure


def iso_memory(boots: Mapping[str, Bootstrap], many: str | float = 8, few: str | float = 4) -> Figure:
    """Tokens per parameter from which fewer bits pay at equal memory and FLOP, against the size, one line and 95 % band per
    law."""
    figure, (axes,) = axes_grid()
    sizes = np.geomspace(1e8, 1e11, 13)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    never = []
    for colour, (law, boot) in zip(colours, boots.items(), strict=False):
        found = [transition(boot.fit, n, many, few, boot) for n in sizes]
        ratio = np.array([t.ratio if 0 < t.ratio < np.inf else np.nan for t in found])
        if np.isnan(ratio).all():
            never.append(f"{law}: {found[0].words}")
            continue
        ends = np.clip([t.interval or (np.nan, np.nan) for t in found], 1e-2, 1e6)
        axes.plot(sizes, ratio, color=colour, label=law)
        axes.fill_between(sizes, ends[:, 0], ends[:, 1], color=colour, alpha=0.12, lw=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-1, 1e5)
    axes.set_xticks([1e8, 1e9, 1e10, 1e11], ["100M", "1B", "10B", "100B"])
    axes.set_xlabel("size of the 16-bit model of the same memory (parameters)")
    axes.set_ylabel("tokens per 16-bit parameter")
    axes.set_title(f"above a line {few} bits beat {many}" + (f" ({'; '.join(never)})" if never else ""), fontsize=9, loc="left")
    legend(axes, len(boots))
    return figure


def loss_against_memory(boot: Bootstrap) -> Figure:
    """Predicted loss against memory at equal FLOP, one line and 95 % band per scheme, at the median D/N of the points."""
    fit, look = boot.fit, styles(boot.fit.points.schemes)
    ratio = float(np.median(fit.points.D / fit.points.N))
    sizes = np.geomspace(fit.points.sizes[0] / 4, fit.points.sizes[-1] * 10, 40)
    figure, (axes,) = axes_grid()
    shown = [g for g, s in enumerate(fit.points.schemes) if s.w_grid_bits == s.a_grid_bits and s.rotated]
    for g in shown:
        label, s = fit.points.labels[g], look[fit.points.labels[g]]
        per_theta = np.stack([iso_memory_loss(fit, boot.theta, n, np.log([ratio]), g)[:, 0] for n in sizes], axis=1)
        low, high = np.quantile(per_theta, [0.025, 0.975], axis=0)
        axes.plot(
            16 * sizes / 8e9,
            [iso_memory_loss(fit, fit.theta[None], n, np.log([ratio]), g)[0, 0] for n in sizes],
            color=s.color,
            ls=s.dash,
            label=label,
        )
        axes.fill_between(16 * sizes / 8e9, low, high, color=s.color, alpha=0.12, lw=0)
    axes.axvspan(16 * fit.points.sizes[-1] / 8e9, 16 * sizes[-1] / 8e9, color="0.95", zorder=0, lw=0)
    axes.set_xscale("log")
    axes.set_xlabel("memory of the weights (GB); grey: beyond the largest model trained at 16 bits")
    _plain_loss_axis(axes)
    axes.set_title(f"equal FLOP along a column: those of {ratio:.3g} tokens per 16-bit parameter", fontsize=9, loc="left")
    legend(axes, len(shown))
    return figure


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


def save_all(fit: Fit, front: Frontier, folder: str | Path, boots: Mapping[str, Bootstrap] | None = None) -> list[Path]:
    """The standard set of figures in `folder`, which is made if it does not exist; bootstraps (law → replicates) add theirs."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "loss_vs_bits": loss_against_bits(front),
        "loss_vs_params": loss_against_size(fit),
        "predicted_vs_measured": predicted_against_measured(fit),
        "residuals": residuals_per_scheme(fit),
    }
    if fit.eff:
        made["eff"] = eff_per_scheme(fit)
    if boots:
        if fit.intervals:
            made["profiles"] = profiles(fit)
        if fit.law.name in boots:
            made["bootstrap"] = bootstrap_clouds(boots[fit.law.name])
        if fit.law.name in boots and fit.law.uses_scheme:
            made["loss_vs_memory"] = loss_against_memory(boots[fit.law.name])
        with suppress(PointError):  # no runs at 8 or at 4 bits: there is no such transition
            made["iso_memory"] = iso_memory({law: b for law, b in boots.items() if b.fit.law.uses_scheme})
    return [path for name, figure in made.items() for path in save(figure, folder / name)]
