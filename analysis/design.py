"""Sequential optimal design of experiments: the next runs to train, those that most sharpen an answer for their cost.

The question is the log of a transition's D/N, log eff of several schemes, or the log of their losses at one size and length.
Its gradient G (k, p) with respect to θ gives the summed variance tr(G C Gᵀ) by the delta method, where C is θ's covariance. A
rank-one update of C (Sherman–Morrison) gives the variance after one more run. With one row of G this is c-optimal design, with
several A-optimal (Atkinson & Donev 1992).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from .fit_result import Fit
from .identify import sensitivity
from .laws import Design, LawError
from .planner import SizedRecord
from .points import Points
from .shares import at_best_share, has_share
from .transitions import iso_memory_design, loss_along, ratio_words, transitions
from .uncertainty import log_eff_gradient, noise, unit_covariance

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class NextRun(SizedRecord):
    """A run worth training. After it and those before it, the share `variance` of the goal's variance remains (1 = no gain).

    It costs 6·N·D `flops`, and `seconds` if the time of runs is known. `seed` is the number of runs that its cell (scheme, N, D
    within 5 %) has already, so that it repeats none of them.
    """

    scheme: str
    N: float
    D: float
    flops: float
    variance: float
    seed: int = 0
    seconds: float | None = None
    share: float | None = None  # of the tokens before quantization: the best one, if the law includes it


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

    # a best share adds nothing: the loss does not change with it to first order
    at = [at_best_share(fit, fit.theta, iso_memory_design(fit, size, np.array([t]), g)) for g in (few, many)]
    by_few, by_many = (fit.law.jacobian(fit.theta, x)[0, 0] for x in at)
    h = 1e-5
    return np.where(fit.free, (by_many - by_few) / ((gap(t + h) - gap(t - h)) / (2 * h)), 0.0)


RATIOS = (1, 2.5, 5, 10, 25, 50, 100, 200, 400, 800)  # tokens per parameter of candidates


def candidates(
    points: Points, ratios: Sequence[float] = (), sizes: Sequence[float] = (), lengths: Sequence[float] = ()
) -> list[tuple[int, float, float]]:
    """(scheme, N, D) that could be trained next: every scheme, every size of the data, a range of tokens per parameter.

    By default the range begins at 10, or at the least of the data if that is lower. `lengths` are numbers of tokens instead.
    """
    if lengths:
        return [(g, float(n), float(d)) for g in range(len(points.schemes)) for n in (sizes or points.sizes) for d in lengths]
    least = min(10.0, float(points.tokens_per_param.min()) / 1.05)
    ratios = ratios or [r for r in RATIOS if r >= least]
    return [(g, float(n), float(n * r)) for g in range(len(points.schemes)) for n in (sizes or points.sizes) for r in ratios]


def _measured(points: Points, group: int, N: float, D: float) -> int:
    """The number of runs of a cell, with N and D within 5 %."""
    near = [np.abs(np.log(values / value)) < math.log(1.05) for values, value in ((points.N, N), (points.D, D))]
    return int(np.sum((points.group == group) & near[0] & near[1]))


def _share(fit: Fit, g: int, N: float, D: float) -> float | None:
    """The best share of a run, if the law includes it."""
    if not has_share(fit, fit.points.schemes[g]):
        return None
    return float(at_best_share(fit, fit.theta, fit.design.at(np.array([N]), np.array([D]), np.array([g]))).share[0, 0])


def goal_error(fit: Fit, gradient: Array) -> float:
    """Root mean square of the standard errors of k quantities with gradients (k, p) or (p,); inf without residual degrees of
    freedom."""
    if fit.residual_dof < 1:
        return math.inf
    G = np.atleast_2d(gradient)
    return math.sqrt(_variance(G, unit_covariance(sensitivity(fit))) / len(G)) * noise(fit)


def eff_gradient(fit: Fit, schemes: Sequence[str | float] = ()) -> Array:
    """(k, p) ∂ log eff / ∂θ of these schemes, by default all but the reference. LawError for a law or points without eff."""
    if fit.law.log_eff(fit.theta[None], fit.design) is None:
        raise LawError(f"law {fit.law.name} has no eff to sharpen")
    groups = [fit.points.index(s) for s in schemes] or list(range(len(fit.points.schemes)))
    rows = [g for g in dict.fromkeys(groups) if g != fit.design.reference]
    if not rows:
        raise LawError("eff of the reference scheme is 1: there is no other scheme to sharpen")
    return np.where(fit.free, log_eff_gradient(fit)[rows], 0.0)


def loss_at(fit: Fit, N: float, D: float, schemes: Sequence[str | float] = ()) -> Array:
    """(k,) predicted loss of these schemes, all by default, at one size and length; each at its best share."""
    return np.asarray(fit.law.predict(fit.theta, _at(fit, N, D, schemes))[0])


def loss_gradient(fit: Fit, N: float, D: float, schemes: Sequence[str | float] = ()) -> Array:
    """(k, p) ∂ log L / ∂θ of the losses of `loss_at`."""
    slopes = fit.law.jacobian(fit.theta, _at(fit, N, D, schemes))[0] / loss_at(fit, N, D, schemes)[:, None]
    return np.where(fit.free, slopes, 0.0)


def _at(fit: Fit, N: float, D: float, schemes: Sequence[str | float]) -> Design:
    groups = list(dict.fromkeys(fit.points.index(s) for s in schemes)) or list(range(len(fit.points.schemes)))
    return at_best_share(fit, fit.theta, fit.design.at(np.array([N]), np.array([D]), np.array(groups)))


def _variance(G: Array, C: Array) -> float:
    """tr(G C Gᵀ)."""
    return float(np.einsum("kp,pq,kq->", G, C, G))


def variance_left(fit: Fit, gradient: Array, C: Array, runs: Sequence[tuple[int, float, float]]) -> Array:
    """(q,) share of the goal's variance that one more run at each candidate would leave; gradient (k, p) or (p,)."""
    G = np.atleast_2d(gradient)
    group, N, D = (np.array(v) for v in zip(*runs, strict=True))
    rows = _rows(fit, N, D, group)
    gain = np.sum((rows @ C @ G.T) ** 2, axis=1) / (1 + np.einsum("qp,pr,qr->q", rows, C, rows))
    return np.asarray(1 - gain / _variance(G, C))


def _rows(fit: Fit, N: Array, D: Array, group: Array) -> Array:
    """(q, p) ∂ residual / ∂θ of runs, each at its best share; zero for fixed parameters."""
    return fit.slopes(at_best_share(fit, fit.theta, fit.design.at(N, D, group)))


def next_runs(
    fit: Fit,
    gradient: Array,
    count: int = 3,
    *,
    runs: Sequence[tuple[int, float, float]] = (),
    seconds: Callable[[int, float, float], float] | None = None,
    flops: float = math.inf,
    least_gain: float = 0.1,
) -> list[NextRun]:
    """The runs that most reduce the variance of a goal for their cost, one after the other; gradient (k, p) or (p,).

    The cost is in FLOP, or in seconds if `seconds(group, N, D)` is given. Each pick is the candidate with the largest fall in
    log variance per cost among those that remove at least `least_gain` of the remaining variance (or among all, if none does),
    so that the answer does not consist of many runs too small to matter. A candidate is picked once, because a repeat tells
    less than a new cell if the law is only an approximation. `flops` limits a single run. Fewer runs than `count` are returned
    if there are fewer candidates.
    """
    G, J = np.atleast_2d(gradient), sensitivity(fit)
    pool = [c for c in (runs or candidates(fit.points)) if 6 * c[1] * c[2] <= flops]
    if not pool:
        raise LawError(f"no candidate run costs {flops:g} FLOP or less")
    cost = np.array([seconds(*c) if seconds else 6 * c[1] * c[2] for c in pool])
    out, open_ = [], np.ones(len(pool), bool)
    first = _variance(G, unit_covariance(J))
    for _ in range(min(count, len(pool))):
        C = unit_covariance(J)
        remaining = variance_left(fit, G, C, pool)
        worth = open_ & (1 - remaining >= least_gain)
        pay = np.where(worth if worth.any() else open_, -np.log(np.maximum(remaining, 1e-12)) / cost, -np.inf)
        k = int(np.argmax(pay))
        open_[k] = False
        g, n, d = pool[k]
        J = np.concatenate([J, _rows(fit, np.array([n]), np.array([d]), np.array([g]))])
        left, seed = _variance(G, unit_covariance(J)) / first, _measured(fit.points, g, n, d)
        time = float(cost[k]) if seconds else None
        out.append(NextRun(fit.points.labels[g], n, d, 6 * n * d, left, seed, time, _share(fit, g, n, d)))
    return out
