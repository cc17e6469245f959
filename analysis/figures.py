"""The standard figures of a fit, which `fit-scaling --out` writes.

Frontier, losses, eff, predictions and residuals are the charts that the report shows (`charts`), drawn with matplotlib; the
profiles, the bootstrap and the two figures at equal memory exist only here. Axes carry units, and nothing is drawn from
constants: every mark is a row of the points or a prediction of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import charts
from .charts import LOSS, Chart
from .draw import axes_grid, draw_view, figure, legend, panels, plain_log_axis, save
from .fit_result import Fit
from .isoflop import IsoFlop, isoflop_optima
from .pareto import budgets
from .points import Points
from .style import OTHER, PALETTE, styles
from .tables import PointError
from .transitions import iso_memory_loss, transition
from .uncertainty import Bootstrap, profile, threshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 4


def loss_against_bits(fit: Fit) -> Figure:
    """Measured loss against model bits at the commonest budget: the frontier as a staircase, the law as lines, and the saving
    of memory by eff as a shift.
    """
    chart = charts.frontier(fit.points, {charts.MODEL_BITS: fit.points.memory_bits}, np.arange(fit.n), fit)
    return _first(chart, fit.points)


def loss_against_size(fit: Fit, boot: Bootstrap | None = None) -> Figure:
    """Measured loss against N, one panel for each of the commonest token budgets, with the law through each scheme's runs."""
    chart = charts.size(fit, np.arange(fit.n), boot)
    shown = chart.views[:MOST_PANELS]
    split = budgets(fit.points)
    order = {split.label(value): i for i, value in enumerate(split.rows)}
    answers = [next(iter(view.choice.values()), "") for view in shown]
    pairs = sorted(zip(shown, answers, strict=True), key=lambda pair: order.get(pair[1], len(order)))
    titles = [f"{answer} {split.unit}" if answer in order else "" for _, answer in pairs]
    return panels(chart, [view for view, _ in pairs], styles(fit.points.schemes), titles)


def eff_per_scheme(fit: Fit) -> Figure:
    """eff with its 95 % interval per scheme; a scheme without runs is named and gets no mark."""
    return _first(charts.eff(fit, {}), fit.points)


def predicted_against_measured(fit: Fit) -> Figure:
    """Measured against predicted loss."""
    return _first(charts.predicted(fit, np.arange(fit.n)), fit.points)


def residuals_per_scheme(fit: Fit) -> Figure:
    """Residuals against N, with means joined per scheme: under the right law they are noise; a slope is a misfit."""
    return _first(charts.residuals(fit, np.arange(fit.n), None), fit.points)


def isoflop(points: Points, optima: Sequence[IsoFlop]) -> Figure:
    """Losses at equal FLOP with their parabolas, and their minima against the compute, of the scheme with most budgets."""
    best = max(optima, key=lambda one: (len(one.inside), len(one.budgets)))
    views = charts.isoflop(points, [best], np.arange(len(points))).views
    drawing, panes = axes_grid(5.2 * len(views), 4.2, len(views))
    for axes, view in zip(panes, views, strict=True):
        draw_view(axes, view, styles(points.schemes))
        legend(axes, len(axes.get_legend_handles_labels()[1]))
    drawing.suptitle(f"{best.scheme}: runs of one training compute, and the minimum of the parabola through them", fontsize=9)
    return drawing


def _first(chart: Chart, points: Points) -> Figure:
    return figure(chart, chart.views[0], styles(points.schemes))


def profiles(fit: Fit) -> Figure:
    """Likelihood-ratio profiles of the shared parameters; the points do not determine a parameter whose profile is flat."""
    names = [n for n in (q.name for q in fit.law.shared) if n in fit.intervals]
    columns = min(max(len(names), 1), 4)
    rows = -(-len(names) // columns) or 1
    figure, panels = axes_grid(2.4 * columns + 0.6, 2.6 * rows, columns, rows=rows, shared=True)
    for unused in panels[len(names) :]:
        unused.set_axis_off()
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
    """Tokens per parameter from which fewer bits pay at equal memory and FLOP, against the size; a line and 95 % band per law.

    PointError where one of the two has no runs.
    """
    figure, (axes,) = axes_grid()
    sizes = np.geomspace(1e8, 1e11, 13)
    colours = [PALETTE[bits] for bits in (8, 2, 4, 1, 3)] + [OTHER, PALETTE[16]]
    never = []
    for colour, (law, boot) in zip(colours, boots.items(), strict=False):
        answers = [transition(boot.fit, n, many, few, boot) for n in sizes]
        ratio = np.array([t.ratio if 0 < t.ratio < np.inf else np.nan for t in answers])
        if np.isnan(ratio).all():
            never.append(f"{law}: {answers[0].words}")
            continue
        ends = np.clip([t.interval or (np.nan, np.nan) for t in answers], 1e-2, 1e6)
        axes.plot(sizes, ratio, color=colour, label=law)
        axes.fill_between(sizes, ends[:, 0], ends[:, 1], color=colour, alpha=0.12, lw=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-1), min(high, 1e5))
    plain_log_axis(axes, "y")
    axes.set_xticks([1e8, 1e9, 1e10, 1e11], ["100M", "1B", "10B", "100B"])
    axes.set_xlabel("size of the 16-bit model of the same memory (parameters)")
    axes.set_ylabel("tokens per 16-bit parameter")
    axes.set_title(f"above a line {few} bits beat {many}" + (f" ({'; '.join(never)})" if never else ""), fontsize=9, loc="left")
    legend(axes, len(boots))
    return figure


def loss_against_memory(boot: Bootstrap) -> Figure:
    """Predicted loss against memory at equal FLOP, one line and 95 % band per scheme, at the median D/N of the points."""
    fit, look = boot.fit, styles(boot.fit.points.schemes)
    ratio = float(np.median(fit.points.tokens_per_param))
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
    plain_log_axis(axes)
    axes.set_xlabel("memory of the weights (GB); grey: beyond the largest model trained at 16 bits")
    axes.set_ylabel(LOSS)
    axes.set_title(f"equal FLOP along a column: those of {ratio:.3g} tokens per 16-bit parameter", fontsize=9, loc="left")
    legend(axes, len(shown))
    return figure


def save_all(fit: Fit, folder: str | Path, boots: Mapping[str, Bootstrap] | None = None) -> list[Path]:
    """The standard set of figures in `folder`, which is created; bootstraps (law → replicates) add theirs."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    boot = (boots or {}).get(fit.law.name)
    made = {
        "loss_vs_bits": loss_against_bits(fit),
        "loss_vs_params": loss_against_size(fit, boot),
        "predicted_vs_measured": predicted_against_measured(fit),
        "residuals": residuals_per_scheme(fit),
    }
    if fit.eff:
        made["eff"] = eff_per_scheme(fit)
    if optima := [one for one in isoflop_optima(fit.points) if one.clear or one.a_interval]:
        made["isoflop"] = isoflop(fit.points, optima)
    if boots:
        if fit.intervals:
            made["profiles"] = profiles(fit)
        if boot is not None:
            made["bootstrap"] = bootstrap_clouds(boot)
        if boot is not None and fit.law.uses_scheme:
            made["loss_vs_memory"] = loss_against_memory(boot)
        with suppress(PointError):  # without runs at 8 or at 4 bits there is no transition
            made["iso_memory"] = iso_memory({law: b for law, b in boots.items() if b.fit.law.uses_scheme})
    return [path for name, drawing in made.items() for path in save(drawing, folder / name)]
