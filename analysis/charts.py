"""Descriptions of charts: a chart is a set of views, a view is axes and series of numbers.

`draw` renders them with matplotlib, `report.page` with plotly. Units stand in the labels of the axes. A mark that belongs to a
run carries the run's row, so that the page can name it. A scheme looks the same in every chart (`style.styles`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..metrics import GRAD_NORM, STEP, TOKENS, TRAIN_LOSS, VAL_LOSS
from .fit_result import Fit
from .isoflop import IsoFlop
from .pareto import budgets, commonest_budget, non_dominated
from .points import Points
from .schemes import Scheme
from .shares import at_best_share
from .style import count
from .summary import leader, per_bit_spans
from .uncertainty import Bootstrap

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
Kind = Literal["points", "line", "band", "steps", "span"]
LOSS = "validation loss (nats/token)"
TRAINING_LOSS = "training loss (nats/token)"
SIZE = "parameters without embeddings, N"
MODEL_BITS = "model bits: model size without embeddings (bits)"  # a cost of `frontier`, as "name: label of its axis"
BUDGETS = ("Tokens per parameter", "Tokens")  # questions whose answers are training budgets
PUBLISHED = " published"  # the look of published values; no scheme begins with a space
MOST_BUDGETS = 5  # as many as a reader can compare; the rest is in "all"


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis: its label with the unit; `words` name the places 0, 1, 2, … of an axis of names; `ticks` are (value, text)."""

    label: str
    log: bool = False
    words: tuple[str, ...] = ()
    ticks: tuple[tuple[float, str], ...] = ()
    shown: tuple[float, float] | None = None  # the part that is shown first; None: all
    mark: float | None = None  # a value with a thin line across the axes, such as an error of zero


@dataclasses.dataclass(frozen=True)
class Series:
    """n numbers of one name. x, y, and for a band or span its ends, have shape (n,); nan breaks a line.

    points: marks; line: joined; steps: a staircase, level to the right of a point; band: from `low` to `high` in y;
    span: marks with a bar from `low` to `high` in x. `run` (n,) are rows of the table of runs, -1 for none.
    """

    name: str
    kind: Kind
    x: Array
    y: Array
    scheme: str | None = None  # whose style; None: neutral
    run: Array | None = None
    low: Array | None = None
    high: Array | None = None
    hollow: bool = False
    listed: bool = True  # in the legend


@dataclasses.dataclass(frozen=True)
class View:
    """One state of a chart. `choice` holds the answers that select it: {"against": "memory"}."""

    series: tuple[Series, ...]
    x: Axis
    y: Axis
    choice: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure of the report: its file name, its title, what to see in it, and its views, the first shown first."""

    key: str
    title: str
    caption: str
    views: tuple[View, ...]
    height: int = 440  # pixels on the page

    @property
    def questions(self) -> dict[str, list[str]]:
        """The questions, each with its answers in the order of the views; those with a single answer are left out."""
        asked: dict[str, list[str]] = {}
        for view in self.views:
            for question, answer in view.choice.items():
                if answer not in asked.setdefault(question, []):
                    asked[question].append(answer)
        return {question: answers for question, answers in asked.items() if len(answers) > 1}


def sizes_axis(sizes: Iterable[float]) -> Axis:
    """A log axis of N whose ticks are the sizes that were trained, thinned where they would touch."""
    kept: list[float] = []
    distinct = sorted({float(n) for n in sizes})
    for n in distinct:
        if not kept or math.log(n / kept[-1]) > 0.09 * max(math.log(distinct[-1] / distinct[0]), 1e-9):
            kept.append(n)
    return Axis(SIZE, log=True, ticks=tuple((n, count(n)) for n in kept))


def budget_masks(points: Points) -> tuple[str, dict[str, Array]]:
    """The question (one of BUDGETS), and name → rows (boolean) of the budgets: the five commonest, beginning with that of most
    cells, then all.
    """
    split = budgets(points)
    if not split.rows:
        return BUDGETS[0], {"all": np.ones(len(points), bool)}
    commonest = commonest_budget(points)
    ranked = sorted(
        split.rows.items(), key=lambda item: (not np.array_equal(item[1], commonest), -int(item[1].sum()), -item[0])
    )
    named = {split.label(value): rows for value, rows in ranked[:MOST_BUDGETS]}
    if len(split.rows) > 1:
        named["all"] = np.ones(len(points), bool)
    return BUDGETS[split.tokens], named


def frontier(points: Points, costs: Mapping[str, Array], row: Array, fit: Fit | None = None) -> Chart:
    """Loss against the cost of a model; the runs on the frontier are filled and joined.

    `costs`: axis label → (n,), nan where unknown; `row` (n,) is the run of each point. Key of a cost is "name: label". A `fit`
    adds the law of each scheme as a line, if the runs of one budget have several sizes, and the saving of memory by eff.
    """
    views, (question, masks) = [], budget_masks(points)
    for against, cost in costs.items():
        name, _, label = against.partition(": ")
        for budget, rows in masks.items():
            kept = np.flatnonzero(rows & np.isfinite(cost))
            if not len(kept):
                continue
            on = kept[non_dominated(cost[kept], points.loss[kept])]
            on = on[np.argsort(cost[on], kind="stable")]
            series = [Series("frontier (filled)", "steps", cost[on], points.loss[on])]
            if fit is not None and (budget != "all" or len(masks) == 1):
                series += _laws(fit, cost, kept)
                series += _shift(fit, kept) if against == MODEL_BITS and question == BUDGETS[1] else []
            for g, scheme in enumerate(points.labels):
                for some, hollow in ((np.setdiff1d(kept, on), True), (on, False)):
                    mine = some[points.group[some] == g]
                    if len(mine):
                        twice = not hollow and any(s.name == scheme and s.kind == "points" for s in series)
                        series.append(
                            Series(
                                scheme,
                                "points",
                                cost[mine],
                                points.loss[mine],
                                scheme,
                                row[mine],
                                hollow=hollow,
                                listed=not twice,
                            )
                        )
            note = f"{len(on)} of {len(kept)} runs are on the frontier"
            views.append(
                View(tuple(series), Axis(label, log=True), Axis(LOSS), {**_asked(against=name), question: budget}, note)
            )
    caption = f"Filled marks: no other run shown is at once cheaper and better. Runs of other {question.lower()} are hidden."
    return Chart("frontier", "Which runs pay", caption, tuple(views), height=500)


def _laws(fit: Fit, cost: Array, kept: Array) -> list[Series]:
    """The law of each scheme through its runs among `kept`, against their cost; D and cost are interpolated between sizes."""
    out, p = [], fit.points
    for g, label in enumerate(p.labels):
        mine = kept[p.group[kept] == g]
        N, first = np.unique(p.N[mine], return_index=True)
        if len(N) > 1:
            x = np.linspace(math.log(N[0]), math.log(N[-1]), 40)
            D, price = (np.exp(np.interp(x, np.log(N), np.log(values[mine][first]))) for values in (p.D, cost))
            out.append(Series(label, "line", price, fit.predict(np.exp(x), D, label), label, listed=False))
    return out


def _shift(fit: Fit, kept: Array) -> list[Series]:
    """At equal tokens and loss, from the bits of the reference to those of the best scheme per stored bit: 16·eff/bits.

    It is drawn at the middle of the losses that both reach within their sizes, and not at all if these do not overlap.
    """
    p, spans = fit.points, per_bit_spans(fit)
    if len(spans) < 2:
        return []
    best, _, loose = leader(spans)
    reference = fit.design.reference
    g = p.labels.index(best)
    eff, D = fit.eff[best], float(np.median(p.D[kept]))
    mine, theirs = (p.N[kept][p.group[kept] == i] for i in (g, reference))
    if loose or g == reference or eff is None or not (len(mine) and len(theirs)):
        return []
    low, high = max(mine.min() * eff, theirs.min()), min(mine.max() * eff, theirs.max())
    if low > high:
        return []
    N = math.sqrt(low * high)
    ends = np.array([N / eff * p.schemes[g].w_stored_bits, N * p.schemes[reference].w_stored_bits])
    times = f"{ends[1] / ends[0]:.2g} times fewer bits at equal loss" if ends[1] > ends[0] else "more bits at equal loss"
    level = float(fit.predict(N, D, p.labels[reference]))
    here, there = ends[:1], ends[1:]
    return [
        Series(f"{best}: {times}", "span", here, np.array([level]), low=np.minimum(here, there), high=np.maximum(here, there))
    ]


def _asked(*, against: str = "", size: str = "", metric: str = "", device: str = "") -> dict[str, str]:
    """Questions of a view in the words of the page, unanswered ones left out."""
    asked = {"Against": against, "Parameters": size, "Metric": metric, "Device": device}
    return {question: answer for question, answer in asked.items() if answer}


def size(fit: Fit, row: Array, boot: Bootstrap | None) -> Chart:
    """Loss against N per scheme: points measured, lines the law, bands the middle 95 % of the bootstrap's laws."""
    p = fit.points
    views, (question, masks) = [], budget_masks(p)
    for budget, rows in masks.items():
        if budget == "all" and len(masks) > 1 and fit.law.uses_D:
            continue  # a curve belongs to a single budget
        series = []
        for g, label in enumerate(p.labels):
            mine = np.flatnonzero(rows & (p.group == g))
            if not len(mine):
                continue
            mine = mine[np.argsort(p.N[mine], kind="stable")]
            if len(np.unique(p.N[mine])) > 1:
                N = np.geomspace(p.N[mine[0]], p.N[mine[-1]], 40)
                D = np.exp(np.interp(np.log(N), np.log(p.N[mine]), np.log(p.D[mine]))) if fit.law.uses_D else np.ones_like(N)
                if boot is not None:
                    with np.errstate(all="ignore"):
                        at = at_best_share(fit, fit.theta, fit.design.at(N, D, np.full(N.shape, g)))
                        drawn = fit.law.predict(boot.theta, at)
                    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
                    series.append(Series(label, "band", N, high, label, low=low, high=high, listed=False))
                series.append(Series(label, "line", N, fit.predict(N, D, label), label, listed=False))
            series.append(Series(label, "points", p.N[mine], p.loss[mine], label, row[mine]))
        views.append(View(tuple(series), sizes_axis(p.sizes), Axis(LOSS), {question: budget}))
    band = f"; bands: 95 % of {len(boot)} bootstrap refits" if boot is not None else ""
    best = ", each at the best share" if fit.law.uses_share else ""
    caption = f"Points measured, lines fitted: {fit.law.equation}{best}{band}."
    return Chart("loss_vs_size", "Loss against size", caption, tuple(views))


def isoflop(points: Points, optima: Sequence[IsoFlop], row: Array) -> Chart:
    """Loss against N at each training compute with its parabola and minimum, and the minima against the compute, by scheme."""
    views = []
    for one in optima:
        curves, marks = list[Series](), list[Series]()
        for budget in one.budgets:
            N = np.geomspace(points.N[budget.rows].min(), points.N[budget.rows].max(), 40)
            curves.append(Series("parabolas", "line", N, budget.at(N), listed=not curves))
            marks.append(
                Series(
                    "runs", "points", points.N[budget.rows], points.loss[budget.rows], one.scheme, row[budget.rows], hollow=True
                )
            )
        x = np.array([budget.N for budget in one.inside])
        marks.append(Series("least loss", "points", x, np.array([budget.loss for budget in one.inside]), one.scheme))
        sizes = points.N[np.concatenate([budget.rows for budget in one.budgets])]
        asked = {"Scheme": one.scheme}
        views.append(View((*curves, *marks), sizes_axis(sizes), Axis(LOSS), asked | {"Shown": "losses"}))
        if math.isnan(one.a):
            continue
        C = np.array([budget.flops for budget in one.inside])
        ends = "" if one.a_interval is None else f" [{one.a_interval[0]:.3f}, {one.a_interval[1]:.3f}]"
        line = Series(f"N ∝ C^{one.a:.3f}{ends}", "line", C, one.factor * C**one.a, one.scheme)
        optimum = View(
            (line, Series("least loss", "points", C, x, one.scheme)),
            Axis("training compute C = 6·N·D (FLOP)", log=True),
            Axis("size of least loss, N", log=True),
            asked | {"Shown": "minima"},
        )
        views.append(optimum)
    caption = (
        "Runs of one training compute, and the minimum of the parabola through them; a minimum outside the sizes has no mark."
    )
    return Chart("isoflop", "The best size at equal FLOP", caption, tuple(views))


def eff(fit: Fit, published: Mapping[str, float]) -> Chart:
    """eff per scheme with its interval, beside the published value where there is one; a scheme without runs has no mark."""
    labels = list(fit.eff)
    series = []
    for place, label in enumerate(labels):
        value = fit.eff[label]
        if value is None:
            continue
        low, high = fit.intervals.get(f"eff.{label}", (value, value))
        ends = np.clip([low, high], value / 30, value * 30)  # an infinite interval would leave no room for the rest
        at = np.array([place])
        series.append(Series(label, "span", np.array([value]), at, label, low=ends[:1], high=ends[1:], listed=False))
    at = np.array([place for place, label in enumerate(labels) if label in published and fit.eff[label] is not None], int)
    if len(at):
        series.append(Series("published", "points", np.array([published[labels[i]] for i in at]), at, PUBLISHED))
    x = Axis(f"eff: share of the parameters that count (1 = {fit.reference.label})", log=True, mark=1.0)
    words = tuple(label if fit.eff[label] is not None else f"{label} (no runs)" for label in labels)
    bars = f"bars: {fit.intervals_method}" if fit.intervals else "no intervals"
    view = View(tuple(series), x, Axis("", words=words), note=f"{bars}; status: {fit.status}")
    caption = f"{bars[0].upper()}{bars[1:]}. Fit: {fit.status}."
    return Chart("eff", "What a parameter is worth", caption, (view,), height=110 + 26 * len(labels))


def predicted(fit: Fit, row: Array) -> Chart:
    """Measured against predicted loss."""
    p = fit.points
    guess = p.loss * np.exp(fit.errors)
    ends = np.array([min(guess.min(), p.loss.min()), max(guess.max(), p.loss.max())])
    series = [Series("equal", "line", ends, ends, listed=False)]
    series += [Series(label, "points", guess[r], p.loss[r], label, row[r], hollow=True) for label, r in _rows(p)]
    x, y = Axis("predicted loss (nats/token)"), Axis("measured loss (nats/token)")
    return Chart("predicted", "Predicted against measured", "On the line, the law is right.", (View(tuple(series), x, y),))


def residuals(fit: Fit, row: Array, held_out: Array | None) -> Chart:
    """Relative error of each prediction against N: by the fit, and by fits without the run's size."""
    p = fit.points
    views = []
    for name, r in (("of the fit", fit.errors), ("of sizes held out", held_out)):
        if r is None or np.isnan(r).all():
            continue
        series = [Series(label, "points", p.N[i], 100 * np.expm1(r[i]), label, row[i], hollow=True) for label, i in _rows(p)]
        for label, rows in _rows(p):
            i = rows[~np.isnan(r[rows])]
            sizes = np.unique(p.N[i])
            if len(sizes) > 1:
                means = np.array([100 * np.expm1(r[i][p.N[i] == n].mean()) for n in sizes])
                series.append(Series(label, "line", sizes, means, label, listed=False))
        note = f"root mean square {100 * math.sqrt(float(np.nanmean(r**2))):.2g} %"
        y = Axis("predicted over measured - 1 (%)", mark=0.0)
        views.append(View(tuple(series), sizes_axis(p.sizes), y, {"Errors": name}, note))
    caption = "Lines join the means at each size: under the right law they are noise, a slope is a trend."
    return Chart("residuals", "What the law misses", caption, tuple(views))


def _rows(points: Points) -> list[tuple[str, Array]]:
    return [(label, np.flatnonzero(points.group == g)) for g, label in enumerate(points.labels)]


def held_out(laws: Sequence[Mapping[str, object]]) -> Chart:
    """Errors of several laws in sample and on held-out sizes; `laws` as in a fit's JSON."""
    errors = {"in sample": "in_sample", "each size left out": "leave_one_size_out", "largest from smaller": "forward"}
    series = []
    for name, key in errors.items():
        values = np.array([100 * float(law[key]) for law in laws])  # type: ignore[arg-type]
        series.append(Series(name, "points", values, np.arange(len(laws)), name, hollow=key != "in_sample"))
    x = Axis("root mean square error of the loss (%)", log=True)
    caption = "A law is for sizes that it has not seen: what counts are the held-out errors."
    view = View(tuple(series), x, Axis("", words=tuple(str(law["law"]) for law in laws)))
    return Chart("held_out", "Which law predicts", caption, (view,), height=110 + 30 * len(laws))


def in_order(runs: pd.DataFrame) -> list[str]:
    """The schemes of these runs, most bits first."""
    widths = runs[["w_grid_bits", "a_grid_bits"]].fillna(0).to_numpy(float)
    bits = {str(s): (-w, -a) for s, (w, a) in zip(runs["scheme"], widths, strict=True)}
    return sorted(bits, key=lambda s: (bits[s], s))


def decimate(y: Array, most: int) -> Array:
    """Indices, ascending, of at most `most` values: the first, the last, and the lowest and highest of each stretch.

    A spike of one step survives any thinning.
    """
    n = len(y)
    if n <= most:
        return np.arange(n)
    stretches = max((most - 2) // 2, 1)
    edges = np.linspace(0, n, stretches + 1).astype(int)
    kept = {0, n - 1}
    for a, b in itertools.pairwise(edges):
        part = y[a:b]
        if np.isfinite(part).any():
            kept |= {a + int(np.nanargmin(part)), a + int(np.nanargmax(part))}
    return np.array(sorted(kept))


def curves(metrics: pd.DataFrame, runs: pd.DataFrame, *, most_points: int = 60_000) -> Chart:
    """Training and validation loss of every run against tokens, a view for each size.

    `metrics`: tidy lines of metrics.jsonl with `row` (of `runs`); the curves are thinned to `most_points` in all.
    """
    each = min(400, max(40, most_points // max(metrics["row"].nunique(), 1)))
    parts = _lines_of(metrics)
    tokens = metrics[TOKENS].to_numpy(float)
    views = []
    kinds = [("training", TRAIN_LOSS, TRAINING_LOSS), ("validation", VAL_LOSS, LOSS)]
    several = [k for k in kinds if k[1] in metrics and metrics[metrics[k[1]].notna()]["row"].duplicated().any()]
    size_of, scheme_of = runs["params_non_embedding"].to_dict(), runs["scheme"].to_dict()
    for n in sorted({size_of[r] for r in parts if not math.isnan(size_of[r])}):
        here = [r for r in parts if size_of[r] == n]
        for name, column, label in several:
            series = []
            losses = metrics[column].to_numpy(float)
            known = ~(np.isnan(losses) | np.isnan(tokens))
            late: list[float] = []
            for scheme in in_order(runs.loc[here]):
                x, y, row = [], [], []
                for r in (r for r in here if scheme_of[r] == scheme):
                    part = parts[r][known[parts[r]]]
                    if not len(part):
                        continue
                    values = losses[part]
                    i = decimate(values, each)
                    late += values[len(values) // 10 :].tolist()
                    x += [*tokens[part][i], math.nan]
                    y += [*values[i], math.nan]
                    row += [r] * (len(i) + 1)
                if x:
                    series.append(Series(scheme, "line", np.array(x[:-1]), np.array(y[:-1]), scheme, np.array(row[:-1])))
            asked = {**_asked(size=count(n)), **({"Loss": name} if len(several) > 1 else {})}
            if series:
                shown = (0.98 * min(late), 1.02 * float(np.quantile(late, 0.995)))  # losses begin far above the rest
                views.append(View(tuple(series), Axis("training tokens"), Axis(label, log=True, shown=shown), asked))
    caption = f"One line a run, at most {each} points of it, extremes kept. The first steps may lie above: double-click."
    return Chart("curves", "How they learned", caption, tuple(views), height=500)


def _lines_of(metrics: pd.DataFrame) -> dict[int, Array]:
    """Row of a run → places of its lines in `metrics`, in the order of rows; pandas would take a millisecond for each part."""
    places: Mapping[Any, Any] = metrics.groupby("row").indices
    return {int(row): np.asarray(at) for row, at in sorted(places.items())}


def health(metrics: pd.DataFrame, runs: pd.DataFrame, names: Sequence[str]) -> Chart:
    """Median over the runs of a scheme of each logged quantity against the share of the training, with the middle 80 %."""
    grid = np.linspace(0, 100, 61)
    parts = _lines_of(metrics)
    at = metrics[STEP].to_numpy(float)
    steps, scheme_of = runs["steps"].fillna(0).to_dict(), runs["scheme"].to_dict()
    views = []
    for name in names:
        series = []
        logged = metrics[name].to_numpy(float)
        known = ~(np.isnan(logged) | np.isnan(at))
        for scheme in in_order(runs.loc[list(parts)]):
            lines = []
            for r in (r for r in parts if scheme_of[r] == scheme):
                part = parts[r][known[parts[r]]]
                if len(part) > 1 and steps[r] > 0:
                    share = 100 * at[part] / steps[r]
                    lines.append(np.interp(grid, share, logged[part], left=math.nan, right=math.nan))
            if not lines:
                continue
            table = np.array(lines)
            measured = ~np.isnan(table).all(axis=0)
            low, middle, high = np.nanquantile(table[:, measured], [0.1, 0.5, 0.9], axis=0)
            if len(lines) > 2:
                series.append(Series(scheme, "band", grid[measured], high, scheme, low=low, high=high, listed=False))
            series.append(Series(scheme, "line", grid[measured], middle, scheme))
        if series:
            y = Axis(name, log=name.startswith(GRAD_NORM))
            views.append(View(tuple(series), Axis("share of the training (%)"), y, _asked(metric=name)))
    return Chart(
        "health",
        "Signals of training",
        "Median of a scheme's runs; bands: the middle 80 % of three runs or more.",
        tuple(views),
    )


def kernels(bench: pd.DataFrame) -> Chart:
    """Speed-up of each timed implementation over its baseline, with the rounds' 20 % and 80 % quantiles."""
    views = []
    for device, some in bench.groupby("device", sort=False):
        timed = some[some["speed_up_p50"].notna() & (some["implementation"] != some["baseline"])]
        if not len(timed):
            continue
        words = tuple(f"{r.op} {r.implementation} · {r.shape}" for r in timed.itertuples())
        p20, p50, p80 = (timed[f"speed_up_p{q}"].to_numpy(float) for q in (20, 50, 80))
        ends = np.sort([p20, p80], axis=0)
        span = Series("speed-up", "span", p50, np.arange(len(timed)), low=ends[0], high=ends[1], listed=False)
        one = Series("as fast", "line", np.ones(2), np.array([-0.5, len(timed) - 0.5]), listed=False)
        x = Axis("speed-up over the baseline (bars: 20 % to 80 % of the rounds)", log=True)
        views.append(View((one, span), x, Axis("", words=words), _asked(device=str(device))))
    height = 110 + 24 * max((len(v.y.words) for v in views), default=0)
    return Chart("kernels", "Speed of the kernels", "Right of 1: faster than the baseline.", tuple(views), height)


def speed(cost: pd.DataFrame) -> Chart:
    """Training speed against size; `cost` is `tables.cost`."""
    views = []
    for device, some in cost.groupby("device", sort=False):
        series = []
        for scheme in in_order(some):
            mine = some[some["scheme"] == scheme].sort_values("params_non_embedding")
            x, y = mine["params_non_embedding"].to_numpy(float), mine["tokens_per_s"].to_numpy(float)
            series += [Series(scheme, "line", x, y, scheme, listed=False)] if len(x) > 1 else []
            series.append(Series(scheme, "points", x, y, scheme))
        views.append(
            View(
                tuple(series),
                sizes_axis(some["params_non_embedding"]),
                Axis("training speed (tokens/s)", log=True),
                _asked(device=str(device)),
            )
        )
    return Chart("speed", "Speed of training", "Median of the runs of a scheme and size.", tuple(views), height=400)


def schemes_of(runs: pd.DataFrame, points: Points | None) -> tuple[Scheme, ...]:
    """The schemes to draw: those of the points, then those that only unfinished runs have, with bits from their columns."""
    schemes = list(points.schemes) if points is not None else []
    labels = {s.label for s in schemes}
    for scheme, w, a in zip(runs["scheme"], runs["w_grid_bits"], runs["a_grid_bits"], strict=True):
        if scheme not in labels:
            labels.add(scheme)
            w_grid_bits, a_grid_bits = (0.0 if math.isnan(b) else float(b) for b in (w, a))
            schemes.append(Scheme(str(scheme), w_grid_bits, a_grid_bits, w_grid_bits, math.nan, math.nan))
    return tuple(schemes)
