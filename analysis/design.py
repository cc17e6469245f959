"""Which run to train next: the ones that most sharpen a transition for their cost (sequential c-optimal design).

The goal is the log of a transition's D/N. Its variance follows from the fit's Jacobian by the delta method, and what one more
run would leave of it from a rank-one update (Sherman–Morrison).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from .fit_result import Fit
from .identify import sensitivity
from .laws import LawError
from .planner import SizedRecord
from .points import Points
from .transitions import iso_memory_design, loss_along, ratio_words, transitions
from .uncertainty import noise, unit_covariance

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class NextRun(SizedRecord):
    """A run worth training: it would leave `variance` of the goal's variance (1 = no gain), at 6·N·D `flops`.

    `seed` is the number of runs that its cell (scheme, N, D within 5 %) has already, so that it repeats none of them.
    """

    scheme: str
    N: float
    D: float
    flops: float
    variance: float
    seed: int = 0


def transition_error(fit: Fit, size: float, many: str | float = 8, few: str | float = 4) -> float:
    """Standard error of log D/N of the transition, by the delta method; inf without residual degrees of freedom."""
    if fit.residual_dof < 1:
        return math.inf
    gradient = transition_gradient(fit, size, fit.points.index(many), fit.points.index(few))
    C = unit_covariance(sensitivity(fit))
    return float(math.sqrt(gradient @ C @ gradient) * noise(fit))


def transition_gradient(fit: Fit, size: float, many: int, few: int) -> Array:
    """(p,) ∂ log transition / ∂θ by implicit differentiation of L_few - L_many = 0; zero for fixed parameters."""
    ratio = float(transitions(fit, fit.theta[None], size, many, few)[0])
    if not 0 < ratio < math.inf:
        raise LawError(f"the transition at {size:g} is {ratio_words(ratio)}: there is no number to sharpen")
    t = math.log(ratio)

    def gap(log_ratio: float) -> float:
        return float(
            loss_along(fit, fit.theta[None], size, np.array([log_ratio]), few)[0]
            - loss_along(fit, fit.theta[None], size, np.array([log_ratio]), many)[0]
        )

    by_few, by_many = (fit.law.jacobian(fit.theta, iso_memory_design(fit, size, np.array([t]), g))[0, 0] for g in (few, many))
    h = 1e-5
    return np.where(fit.free, (by_many - by_few) / ((gap(t + h) - gap(t - h)) / (2 * h)), 0.0)


def candidates(
    points: Points, ratios: Sequence[float] = (10, 25, 50, 100, 200, 400, 800), sizes: Sequence[float] = ()
) -> list[tuple[int, float, float]]:
    """(scheme, N, D) that could be trained next: every scheme, every size of the data, a range of tokens per parameter."""
    return [(g, float(n), float(n * r)) for g in range(len(points.schemes)) for n in (sizes or points.sizes) for r in ratios]


def _measured(points: Points, group: int, N: float, D: float) -> int:
    """How many runs a cell has, N and D within 5 %."""
    near = [np.abs(np.log(values / value)) < math.log(1.05) for values, value in ((points.N, N), (points.D, D))]
    return int(np.sum((points.group == group) & near[0] & near[1]))


def variance_left(fit: Fit, gradient: Array, C: Array, runs: Sequence[tuple[int, float, float]]) -> Array:
    """(q,) share of the goal's variance gᵀCg that one more run at each candidate would leave (Sherman–Morrison)."""
    group, N, D = (np.array(v) for v in zip(*runs, strict=True))
    at = fit.design.at(N, D, group)
    L, J = fit.law.evaluate(fit.theta[None], at, True)
    assert J is not None
    rows = np.where(fit.free, J[0] / L[0][:, None], 0.0)
    gain = (rows @ C @ gradient) ** 2 / (1 + np.einsum("qp,pr,qr->q", rows, C, rows))
    return 1 - gain / (gradient @ C @ gradient)


def next_runs(
    fit: Fit,
    size: float,
    count: int = 3,
    many: str | float = 8,
    few: str | float = 4,
    *,
    runs: Sequence[tuple[int, float, float]] = (),
    flops: float = math.inf,
    least_gain: float = 0.1,
) -> list[NextRun]:
    """The runs that most reduce the variance of the log transition per FLOP, one after the other.

    Each pick is the candidate with the largest fall in log variance per FLOP among those that remove at least `least_gain` of
    what is left (all, where none does), so that the answer does not consist of many runs too small to matter. A candidate is
    picked once: where the law is only an approximation, a repeat tells less than a new cell. `flops` caps a single run. Fewer
    runs than `count` come back where there are fewer candidates.
    """
    gradient = transition_gradient(fit, size, fit.points.index(many), fit.points.index(few))
    J = sensitivity(fit)
    pool = [c for c in (runs or candidates(fit.points)) if 6 * c[1] * c[2] <= flops]
    if not pool:
        raise LawError(f"no candidate run costs {flops:g} FLOP or less")
    cost = np.array([6 * n * d for _, n, d in pool])
    out, first = [], None
    open_ = np.ones(len(pool), bool)
    for _ in range(min(count, len(pool))):
        C = unit_covariance(J)
        first = first if first is not None else float(gradient @ C @ gradient)
        now = float(gradient @ C @ gradient)
        remaining = variance_left(fit, gradient, C, pool)
        worth = open_ & (1 - remaining >= least_gain)
        pay = np.where(worth if worth.any() else open_, -np.log(np.maximum(remaining, 1e-12)) / cost, -np.inf)
        k = int(np.argmax(pay))
        open_[k] = False
        g, n, d = pool[k]
        seed = _measured(fit.points, g, n, d)
        out.append(NextRun(fit.points.labels[g], n, d, float(cost[k]), float(remaining[k] * now / first), seed))
        at = fit.design.at(np.array([n]), np.array([d]), np.array([g]))
        L, row = fit.law.evaluate(fit.theta[None], at, True)
        assert row is not None
        J = np.concatenate([J, np.where(fit.free, row[0] / L[0][:, None], 0.0)])
    return out
