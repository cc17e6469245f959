"""Supercollapse: loss curves of a family of runs, divided by their last loss, coincide as functions of the share of training.

    ℓ(u) = log L(u·T) - log L(T),    u the share of training
    deviation of a run   √ mean over u of (ℓ(u) - median of the family at u)²
    outlier              deviation ≥ OUTLYING times that of the median run, and ≥ OUTLYING times the noise

A family has one scheme, one schedule by shape, and tokens per parameter within a factor of ALIKE. With a sound recipe, curves
of all sizes collapse to within the noise of seeds. A run that deviates therefore has a problem with its learning rate, its data
or its initialisation (Qiu et al., arXiv 2507.02119, who subtract the irreducible loss first).

The noise is that of repeated runs, if two of a family have the same N and tokens, else the scatter of a run's own lines.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .charts import Axis, Chart, Series, View
from .curves import Curve
from .forecasts import unfinished

Array = np.ndarray
BINS = 24  # of the share of training after the warm-up
LEAST_RUNS = 4  # of a family
ALIKE = 1.25  # ratio of tokens per parameter within a family
SAME_SHAPE = 0.02  # of the peak: largest difference of the schedules of a family
OUTLYING = 3.0


@dataclasses.dataclass(frozen=True)
class Family:
    """Runs that should collapse: ℓ (runs, BINS) at shares `u` (BINS,), each run's deviation, and the noise; logs of losses.

    `repeats` is the number of runs from which the noise was estimated, 0 for the scatter of metric lines. `outliers` are names
    of runs.
    """

    scheme: str | None
    runs: tuple[str, ...]
    u: Array
    curves: Array
    deviation: Array
    noise: float
    repeats: int
    outliers: tuple[str, ...]

    @property
    def spread(self) -> float:
        """The deviation of the median run."""
        return float(np.median(self.deviation))

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON; logs of losses."""
        arrays = {"u": self.u.tolist(), "deviation": self.deviation.tolist(), "curves": self.curves.tolist()}
        about = {"scheme": self.scheme, "runs": list(self.runs), "spread": self.spread, "noise": self.noise}
        return {**about, "repeats": self.repeats, "outliers": list(self.outliers), **arrays}

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        noise = f"{self.repeats} repeated runs" if self.repeats else "the scatter of their lines"
        start = f"{len(self.runs)} runs of {self.scheme or 'one scheme'}, divided by their last loss, coincide within "
        start += f"{100 * self.spread:.2f} % ({100 * self.noise:.2f} % by {noise})"
        if not self.outliers:
            return start + "."
        worst = self.runs[int(np.argmax(self.deviation))]
        others = f", and so do {len(self.outliers) - 1} others" if len(self.outliers) > 1 else ""
        return start + f", but {worst} leaves them by {100 * self.deviation.max():.2f} %{others}."


def families(curves: Sequence[Curve]) -> list[Family]:
    """The families of finished curves that have LEAST_RUNS or more, by scheme and tokens per parameter."""
    by_scheme: dict[str, list[tuple[float, str, Array, Curve]]] = {}
    for c in curves:
        if not unfinished(c) and len(c) - c.first >= BINS:
            by_scheme.setdefault(c.scheme or "", []).append((_per_param(c), c.name, _shape(c), c))
    out = []
    for scheme in sorted(by_scheme):
        left = sorted(by_scheme[scheme], key=lambda known: known[:2])
        while left:
            ratio, _, shape, _ = left[0]
            near = [r <= ALIKE * ratio and bool(np.abs(other - shape).max() <= SAME_SHAPE) for r, _, other, _ in left]
            same = [known[3] for known, is_near in zip(left, near, strict=True) if is_near]
            left = [known for known, is_near in zip(left, near, strict=True) if not is_near]
            if len(same) >= LEAST_RUNS:
                out.append(_family(same))
    return out


def chart(families: Sequence[Family]) -> Chart:
    """ℓ of the runs of each family as ratios of losses; runs that leave it are named in the legend."""
    views = []
    for family in families:
        series = [
            Series(name, "line", 100 * family.u, np.exp(row), family.scheme, listed=name in family.outliers)
            for name, row in zip(family.runs, family.curves, strict=True)
        ]
        asked = {"family": f"{family.scheme or 'all'}, {len(family.runs)} runs"}
        views.append(View(tuple(series), Axis("share of the training (%)"), Axis("loss / last loss"), asked))
    caption = "Sound runs of one recipe coincide over all sizes, once divided by their last loss (arXiv 2507.02119)."
    return Chart("collapse", "Whether families coincide", caption, tuple(views))


def _per_param(c: Curve) -> float:
    """Tokens per parameter, or 0 if the source does not give them."""
    ratio = c.tokens_per_step * float(c.rates.step[-1]) / c.N
    return ratio if math.isfinite(ratio) else 0.0


def _shape(c: Curve) -> Array:
    """The schedule as shares of its peak, at shares of its length, without the first tenth, where warm-ups differ by steps."""
    return c.rates.rate_at(np.linspace(0.1, 1, 91) * c.rates.step[-1]) / c.rates.peak


def _family(curves: Sequence[Curve]) -> Family:
    begin = max(float(c.step[c.first] / c.rates.step[-1]) for c in curves)
    edges = np.linspace(begin, 1, BINS + 1)
    rows, errors = [], []
    for c in curves:
        share, loss = c.step[c.first :] / c.rates.step[-1], np.log(c.loss[c.first :])
        place = np.clip(np.searchsorted(edges, share, side="right") - 1, 0, BINS - 1)
        inside = share >= edges[0]
        count = np.bincount(place[inside], minlength=BINS)
        mean = np.bincount(place[inside], loss[inside], minlength=BINS) / np.maximum(count, 1)
        mean = np.interp(np.arange(BINS), np.flatnonzero(count), mean[count > 0])
        # Neighbours differ by the trend and by twice the variance of a line; the median ignores the few steep places.
        scatter = float(np.median(np.abs(np.diff(loss, 2)))) / (0.6745 * math.sqrt(6)) if len(loss) > 2 else 0.0
        rows.append(mean - mean[-1])
        errors.append(scatter * math.sqrt(1 / max(np.median(count), 1) + 1 / max(count[-1], 1)))
    matrix = np.stack(rows)
    deviation = np.sqrt(np.mean((matrix - np.median(matrix, axis=0)) ** 2, axis=1))
    repeated = _repeated(curves)
    noise, repeats = float(np.median(errors)), sum(len(group) for group in repeated)
    if repeated:
        square = sum(float(np.sum((matrix[g] - matrix[g].mean(axis=0)) ** 2)) for g in repeated)
        noise = math.sqrt(square / (BINS * sum(len(g) - 1 for g in repeated)))
    limit = OUTLYING * max(float(np.median(deviation)), noise)
    names = tuple(c.name for c in curves)
    outliers = tuple(name for name, d in zip(names, deviation, strict=True) if d >= limit)
    return Family(curves[0].scheme, names, 0.5 * (edges[1:] + edges[:-1]), matrix, deviation, noise, repeats, outliers)


def _repeated(curves: Sequence[Curve]) -> list[list[int]]:
    """Indices of runs that, judging by N, tokens and rates, differ only in their seed."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, c in enumerate(curves):
        key = (c.N, c.tokens_per_step, float(c.rates.step[-1]), c.rates.peak)
        if not any(math.isnan(value) for value in key):
            groups.setdefault(key, []).append(i)
    return [group for group in groups.values() if len(group) > 1]
