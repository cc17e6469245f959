"""How far a fitted number can be trusted.

* `profile_intervals`: where the best cost C over all other parameters rises to its threshold; no normality of θ assumed,
  stops at
  bounds. With σ unknown the statistic is n·log(C/C_min) for least squares, 2·(C - C_min)/s² for Huber; the threshold is
  χ²(1)'s 95 % quantile where n ≥ 4p, else the one that makes the test Student's with n - p degrees of freedom.

Intervals here take the law as true and the residuals as independent. Where the residuals are trends (`residual_trends`)
they overstate
certainty; held-out error (`choice`) and the spread between laws say by how much.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .fit import CHI2_95, Fit, minimise
from .identify import CONDITION_LIMIT, sensitivity

Array = np.ndarray


def covariance(fit: Fit) -> Array:
    """(p, p) covariance of θ from the Jacobian, s²(JᵀJ)⁻¹; zero for fixed parameters. Bounds are ignored."""
    J = sensitivity(fit)
    live = np.linalg.norm(J, axis=0) > 0
    out = np.zeros((len(fit.theta), len(fit.theta)))
    scale = np.linalg.norm(J[:, live], axis=0)
    core = np.linalg.pinv((J[:, live] / scale).T @ (J[:, live] / scale), rcond=1e-13, hermitian=True)
    out[np.ix_(live, live)] = core / np.outer(scale, scale) * noise(fit) ** 2
    return out


def noise(fit: Fit) -> float:
    """Standard deviation of the log-residuals: root mean square over n - p for least squares, 1.4826·median |r| for Huber."""
    spare = fit.n / max(fit.n - int(fit.free.sum()), 1)
    if math.isinf(fit.objective.delta):
        return float(math.sqrt(np.sum(fit.points.weight * fit.residuals**2) / fit.n * spare))
    return float(1.4826 * np.median(np.abs(fit.residuals)) * math.sqrt(spare))


def _statistic(fit: Fit, cost: Array) -> Array:
    """Likelihood-ratio statistic of constrained optima."""
    if math.isinf(fit.objective.delta):
        return fit.n * np.log(np.maximum(cost, fit.cost) / max(fit.cost, 1e-300))
    return 2 * np.maximum(cost - fit.cost, 0) / max(noise(fit), 1e-150) ** 2 * huber_efficiency(fit)


def huber_efficiency(fit: Fit) -> float:
    """Share by which Huber's cost differences stand for a likelihood ratio: E[ρ'']·s²/E[ρ'²] (White 1982, one scalar for
    all θ)."""
    inside = np.abs(fit.residuals) <= fit.objective.delta
    slope = np.clip(fit.residuals, -fit.objective.delta, fit.objective.delta)
    return float(max(inside.mean(), 1 / fit.n) * noise(fit) ** 2 / max(np.mean(slope**2), 1e-300))


def threshold(fit: Fit) -> float:
    """What the likelihood-ratio statistic has to exceed to exclude a value at 95 %."""
    spare = fit.n - int(fit.free.sum())
    if fit.n >= 4 * fit.free.sum() or spare < 1:
        return CHI2_95
    from scipy.special import stdtrit

    return float(fit.n * math.log1p(stdtrit(spare, 0.975) ** 2 / spare))


def profile_intervals(fit: Fit, names: list[str] | None = None) -> dict[str, tuple[float, float]]:  # noqa: PLR0915
    """95 % profile-likelihood intervals in natural units, all ends sought at once.

    An end is a bound where the data do not exclude the bound, and infinite where the profile stays flat over ±12 in the
    coordinate.
    """
    pick = [fit.index(n) for n in names] if names is not None else [int(i) for i in np.flatnonzero(fit.free)]
    if not pick:
        return {}
    lower, upper = fit.problem.lower, fit.problem.upper
    C = covariance(fit)
    spread = np.sqrt(np.maximum(np.diag(C), 0))
    index = np.repeat(pick, 2)
    side = np.tile([-1.0, 1.0], len(pick))
    edge = np.where(side < 0, lower[index], upper[index])
    edge = np.where(np.isfinite(edge), edge, fit.theta[index] + side * 12)
    room = np.abs(edge - fit.theta[index])
    reach = math.sqrt(threshold(fit))
    start = np.where(spread[index] > 0, spread[index] * reach, 0.1 * (1 + np.abs(fit.theta[index])))
    step = np.minimum(start, room)
    near, far = np.zeros(len(index)), np.full(len(index), np.inf)  # distance known to be inside, outside
    root_near, root_far = np.zeros(len(index)), np.full(len(index), np.inf)
    # A profile is followed from its last point inside, along the direction in which the other parameters give way.
    ridge = C[index] / np.maximum(np.diag(C)[index], 1e-300)[:, None]
    best, base = np.tile(fit.theta, (len(index), 1)), np.zeros(len(index))
    answer = np.full(len(index), np.nan)
    answer[room == 0] = 0.0
    for _ in range(24):
        todo = np.flatnonzero(np.isnan(answer))
        if not len(todo):
            break
        begin = np.clip(best[todo] + (side * (step - base))[todo, None] * ridge[todo], lower, upper)
        rows = np.arange(len(todo))
        begin[rows, index[todo]] = fit.theta[index[todo]] + side[todo] * step[todo]
        free = np.tile(fit.free, (len(todo), 1))
        free[rows, index[todo]] = False
        got = minimise(fit.problem, begin, free, iterations=120, tolerance=1e-9)
        root = np.sqrt(np.maximum(_statistic(fit, got.cost), 0))
        inside = root < reach
        best[todo[inside]], base[todo[inside]] = got.theta[inside], step[todo[inside]]
        hit = np.abs(root - reach) < 0.004 * reach
        answer[todo[hit]] = step[todo[hit]]
        at_edge = inside & (step[todo] >= room[todo])
        answer[todo[at_edge]] = room[todo[at_edge]]
        for i, r, is_inside in zip(todo, root, inside, strict=True):
            if is_inside:
                near[i], root_near[i] = step[i], r
            else:
                far[i], root_far[i] = step[i], r
            if math.isinf(far[i]):
                step[i] = min(step[i] * min(max(reach / max(r, 1e-9), 1.05), 4.0), room[i])
            else:  # the root of the statistic is nearly linear in the distance
                guess = near[i] + (far[i] - near[i]) * (reach - root_near[i]) / max(root_far[i] - root_near[i], 1e-12)
                width = far[i] - near[i]
                step[i] = min(max(guess, near[i] + 0.05 * width), far[i] - 0.05 * width)
                if width < 1e-3 * far[i]:
                    answer[i] = step[i]
    answer = np.where(np.isnan(answer), step, answer)
    free_edge = ~np.isfinite(np.where(side < 0, lower[index], upper[index])) & (answer >= room)
    out = {}
    for j, k in enumerate(pick):
        p, at = fit.coordinates[k], float(fit.theta[k])
        ends = [
            -np.inf if free_edge[2 * j] else at - answer[2 * j],
            np.inf if free_edge[2 * j + 1] else at + answer[2 * j + 1],
        ]
        with np.errstate(over="ignore"):
            out[p.name] = (float(p.natural(ends[0])), float(p.natural(ends[1])))
    return out


def with_intervals(fit: Fit) -> Fit:
    """The fit with its 95 % profile intervals filled in; a fit that does not determine its parameters or left no residual freedom keeps
    none."""
    if fit.status == "failed" or fit.condition > CONDITION_LIMIT or fit.n <= int(fit.free.sum()):
        return fit
    return dataclasses.replace(
        fit, intervals=profile_intervals(fit), intervals_method="95 % profile likelihood, residuals taken as independent"
    )
