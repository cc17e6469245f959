"""IsoFLOP optima: the size of least loss at each training compute, without a law, and how it grows with the compute.

    for optima in isoflop_optima(points):  optima.scheme, optima.a, optima.a_interval

Runs of one scheme whose 6·N·D differ by less than a tolerance share a budget C. At each budget with three sizes or more the
losses are fitted by a parabola in log N, whose minimum is N_opt, with D_opt = C/(6·N_opt); N_opt ∝ C^a and D_opt ∝ C^b follow
by least squares through the minima (approach 2 of Hoffmann et al., arXiv 2203.15556). Under a law A/N^α + B/D^β + E they are
a = β/(α + β) and b = α/(α + β).

A minimum outside the sizes of its budget is an edge: it is reported, but not used for exponents. The loss rises faster on one
side than on the other, so a parabola over a wide range of sizes misses N_opt by about the same factor at each budget. Exponents
are therefore more reliable than sizes.

Intervals: losses are resampled about the parabolas with the noise of the residuals, pooled over the budgets of a scheme (times
Student's over the normal quantile). They are widened if the minima scatter about their line by more than that.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .fit_result import Fit
from .planner import optimal_size
from .points import Points, narrow_groups

Array = np.ndarray
TOLERANCE = 0.1  # relative difference in 6·N·D between runs of one budget
LEAST_SIZES = 3  # of a budget, for a parabola
LEAST_BUDGETS = 3  # for a line whose exponent can be tested
REPLICATES = 1000
CLEAR_SHARE = 0.8  # share of runs in budgets of LEAST_SIZES from which a table consists of isoFLOP curves
UNSURE = 0.1  # a minimum that crosses an end of the sizes in more replicates is not told from the end
MOST_UNSURE = 0.2  # with a larger share of such budgets, those with a minimum are a biased choice
EDGES = {"": "", "below": "below the smallest size", "above": "above the largest size", "none": "no minimum"}


@dataclasses.dataclass(frozen=True)
class Budget:
    """The runs of a scheme at one compute, and the minimum of the parabola through their losses.

    `rows` (n,) are rows of the points; `curve` holds the coefficients of 1, x and x² for x = log(N / `centre`); `edge` is a key
    of EDGES, empty if the minimum lies among the sizes; N, D and loss are NaN at an edge. `unsure` is the share of replicates
    in which this changes: a minimum leaves the sizes, or an edge moves among them.
    """

    flops: float
    rows: Array
    sizes: int
    centre: float
    curve: tuple[float, float, float]
    edge: str
    N: float
    D: float
    loss: float
    unsure: float = math.nan

    def at(self, N: Array) -> Array:
        """The parabola at sizes N, nats/token."""
        return np.polyval(self.curve[::-1], np.log(np.asarray(N) / self.centre))

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        numbers = {"N": self.N, "D": self.D, "loss": self.loss, "unsure": self.unsure}
        known = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        return {"flops": self.flops, "runs": len(self.rows), "sizes": self.sizes, "edge": EDGES[self.edge], **known}


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Budgets of a scheme, ascending, and the exponents of N_opt ∝ C^a and D_opt ∝ C^b.

    `factor` is N_opt / C^a. `open` says why the budgets do not determine the exponent, which then has no interval or is NaN.
    """

    scheme: str
    budgets: tuple[Budget, ...]
    runs: int  # of the scheme
    a: float
    factor: float
    a_interval: tuple[float, float] | None
    open: str = ""

    @property
    def b(self) -> float:
        """The exponent of D_opt ∝ C^b: 1 - a, since 6·N_opt·D_opt = C."""
        return 1 - self.a

    @property
    def b_interval(self) -> tuple[float, float] | None:
        """95 % interval of b."""
        return None if self.a_interval is None else (1 - self.a_interval[1], 1 - self.a_interval[0])

    @property
    def inside(self) -> tuple[Budget, ...]:
        """The budgets whose minimum lies among their sizes."""
        return tuple(budget for budget in self.budgets if not budget.edge)

    @property
    def clear(self) -> bool:
        """Whether the runs were designed to find these minima, rather than have equal budgets by chance."""
        held = sum(len(budget.rows) for budget in self.budgets)
        return len(self.budgets) >= LEAST_BUDGETS and held >= CLEAR_SHARE * self.runs

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        ends = {"a_interval": self.a_interval, "b_interval": self.b_interval}
        numbers = {name: None if math.isnan(value) else value for name, value in (("a", self.a), ("b", self.b))}
        return {
            "scheme": self.scheme,
            "clear": self.clear,
            **numbers,
            **{name: None if pair is None else list(pair) for name, pair in ends.items()},
            "open": self.open,
            "budgets": [budget.to_dict() for budget in self.budgets],
        }


def isoflop_optima(
    points: Points, *, tolerance: float = TOLERANCE, replicates: int = REPLICATES, seed: int = 0
) -> tuple[IsoFlop, ...]:
    """The optima of each scheme that has a budget with three sizes or more, most bits first; empty if none has."""
    out = []
    for g, label in enumerate(points.labels):
        rows = np.flatnonzero(points.group == g)
        budgets = _budgets(points, rows, tolerance)
        if budgets:
            out.append(_optima(points, label, len(rows), budgets, replicates, np.random.default_rng([seed, g])))
    return tuple(out)


def _budgets(points: Points, rows: Array, tolerance: float) -> list[Budget]:
    """The budgets among these rows, ascending in FLOP."""
    if np.isnan(points.D[rows]).any():
        return []
    flops = 6 * points.N[rows] * points.D[rows]
    order = np.argsort(flops, kind="stable")
    ends = np.cumsum([len(part) for part in narrow_groups(flops[order], math.log(1 + tolerance))])
    parts = np.split(order, ends[:-1])
    return [_parabola(points, rows[part]) for part in parts if len(np.unique(points.N[rows[part]])) >= LEAST_SIZES]


def _basis(points: Points, rows: Array) -> tuple[float, Array]:
    """The centre of log N, and (n, 3) columns 1, x, x² of the runs of a budget."""
    centre = float(np.log(points.N[rows]).mean())
    return math.exp(centre), np.vander(np.log(points.N[rows]) - centre, 3, increasing=True)


def _parabola(points: Points, rows: Array) -> Budget:
    """The budget of these rows, with the weighted least-squares parabola and where its minimum lies."""
    centre, basis = _basis(points, rows)
    root = np.sqrt(points.weight[rows])
    curve = np.linalg.lstsq(basis * root[:, None], points.loss[rows] * root, rcond=None)[0]
    flops = float(np.exp(np.mean(np.log(6 * points.N[rows] * points.D[rows]))))
    x, low, high = _vertex(curve), basis[:, 1].min(), basis[:, 1].max()
    edge = "none" if math.isnan(x) else "below" if x < low else "above" if x > high else ""
    N = centre * math.exp(x) if not edge else math.nan
    loss = float(np.polyval(curve[::-1], x)) if not edge else math.nan
    sizes = len(np.unique(points.N[rows]))
    return Budget(
        flops, rows, sizes, centre, (float(curve[0]), float(curve[1]), float(curve[2])), edge, N, flops / (6 * N), loss
    )


def _vertex(curve: Array) -> float:
    """The x of a parabola's minimum; NaN without one."""
    return float(-curve[1] / (2 * curve[2])) if curve[2] > 0 else math.nan


def _optima(points: Points, label: str, runs: int, budgets: list[Budget], replicates: int, rng: np.random.Generator) -> IsoFlop:
    """The exponents through the minima of a scheme's budgets, with an interval if residuals determine the noise."""
    from scipy.special import stdtrit

    residuals = [points.loss[b.rows] / b.at(points.N[b.rows]) - 1 for b in budgets]
    dof = sum(len(r) - 3 for r in residuals)
    if dof > 0:
        noise = math.sqrt(sum(float(points.weight[b.rows] @ r**2) for b, r in zip(budgets, residuals, strict=True)) / dof)
        noise *= float(stdtrit(dof, 0.975)) / 1.959963984540054
        drawn = [_drawn_minima(points, budget, noise, replicates, rng) for budget in budgets]
        leaves = [float(each[:, 1].mean()) for each in drawn]
        budgets = [dataclasses.replace(b, unsure=1 - x if b.edge else x) for b, x in zip(budgets, leaves, strict=True)]
    inside = [i for i, budget in enumerate(budgets) if not budget.edge]
    unsure = sum(budget.unsure > UNSURE for budget in budgets)
    nothing = IsoFlop(label, tuple(budgets), runs, math.nan, math.nan, None)
    if len(inside) < LEAST_BUDGETS:
        why = f"only {len(inside)} of {len(budgets)} have their least loss among the sizes"
        return dataclasses.replace(nothing, open=why)
    if unsure > MOST_UNSURE * len(budgets):
        why = f"at {unsure} of {len(budgets)} noise can move the least loss over an end of the sizes"
        return dataclasses.replace(nothing, open=why)
    log_C = np.log([budgets[i].flops for i in inside])
    log_N = np.log([budgets[i].N for i in inside])
    a, log_factor = np.polyfit(log_C, log_N, 1)
    law = dataclasses.replace(nothing, a=float(a), factor=math.exp(log_factor))
    if dof < 1:
        return dataclasses.replace(law, open="three runs each leave nothing to measure the noise by")
    spread = np.stack([drawn[i][:, 0] for i in inside], axis=1)
    x = log_C - log_C.mean()
    slopes = spread @ x / (x @ x)
    scatter = log_N - np.polyval([a, log_factor], log_C)
    excess = math.sqrt(float(scatter @ scatter) / (len(inside) - 2) / max(float(np.mean(spread.var(axis=0))), 1e-300))
    low, high = np.quantile(a + max(excess, 1.0) * (slopes - slopes.mean()), [0.025, 0.975])
    return dataclasses.replace(law, a_interval=(float(low), float(high)))


def _drawn_minima(points: Points, budget: Budget, noise: float, replicates: int, rng: np.random.Generator) -> Array:
    """(replicates, 2) log N of the minimum, clipped to the range of sizes; and whether it was clipped."""
    _, basis = _basis(points, budget.rows)
    root = np.sqrt(points.weight[budget.rows])
    solve = np.linalg.pinv(basis * root[:, None])
    named = [points.cluster[i] if points.cluster else i for i in budget.rows]
    draw = rng.standard_normal((replicates, len(named)))[:, np.unique(named, return_inverse=True)[1]]
    errors = noise * (basis @ budget.curve) * draw
    curves = budget.curve + errors @ solve.T  # a weighted run has the error noise / root and counts by root
    low, high = basis[:, 1].min(), basis[:, 1].max()
    with np.errstate(divide="ignore", invalid="ignore"):
        x = -curves[:, 1] / (2 * curves[:, 2])
    ends = np.where(curves @ [1, low, low**2] < curves @ [1, high, high**2], low, high)
    x = np.where(curves[:, 2] > 0, x, ends)
    leaves = (curves[:, 2] <= 0) | (x < low) | (x > high)
    return np.stack([np.clip(x, low, high) + math.log(budget.centre), leaves], axis=1)


def law_exponent(fit: Fit, optima: IsoFlop) -> float | None:
    """a of N_opt ∝ C^a by a fitted law, between the least and the largest budget; None for a law without tokens."""
    ends = [optima.budgets[0].flops, optima.budgets[-1].flops]
    if not fit.law.uses_D or not ends[0] < ends[1]:
        return None
    sizes = [optimal_size(fit, fit.points.index(optima.scheme), flops)[0] for flops in ends]
    return math.log(sizes[1] / sizes[0]) / math.log(ends[1] / ends[0])
