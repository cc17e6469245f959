"""The solver behind every fit: a Levenberg–Marquardt iteration that advances m problems at once in numpy.

It uses the law's analytic Jacobian, box bounds, and free and fixed parameters. The m problems are the starts of one fit, the
replicates of a bootstrap, the points of a profile, or the folds of a held-out comparison: all refits use this solver. Fits are
deterministic, because the starts come from a grid over the law's exponents whose amplitudes are solved linearly (variable
projection, Golub & Pereyra 1973), and rows and schemes have a canonical order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from .laws import Design, Law
from .objective import Objective

Array = np.ndarray
LARGE = 2000  # with more rows, repeated rows are merged, and the search for starts uses a sample
CHI2_95 = 3.841458820694124  # 95 % quantile of χ² with one degree of freedom


@dataclasses.dataclass(frozen=True)
class Problem:
    """A minimisation problem: a law on a design x against losses, in a box. `target` (the losses as scaled by the objective)
    and `w` are (n,), or (m, n) if each of the m problems has its own; lower and upper are (p,).
    """

    law: Law
    x: Design
    target: Array
    w: Array
    lower: Array
    upper: Array
    objective: Objective

    def merged(self) -> tuple[Problem, Array | float]:
        """A least-squares problem in which rows of equal design are merged, and the constant missing from its cost, (m,) or ().

        Σ w·(f - y)² = W·(f - ȳ)² + Σ w·(y - ȳ)² over the rows of one design, with W = Σ w and ȳ their weighted mean, so the
        optimum is the same. Other problems, and those without repeated rows, are returned as they are.
        """
        if len(self.x) <= LARGE or type(self.x) is not Design or self.x.share.ndim > 1 or math.isfinite(self.objective.delta):
            return self, 0.0
        first, kind = self.x.distinct
        if 2 * len(first) > len(self.x):
            return self, 0.0
        order = np.argsort(kind, kind="stable")
        begin = np.searchsorted(kind[order], np.arange(len(first)))

        def sums(values: Array) -> Array:
            return np.add.reduceat(values[..., order], begin, axis=-1)

        target, w = np.broadcast_arrays(self.target, self.w)
        W = sums(w)
        mean = np.where(W > 0, sums(w * target) / np.maximum(W, 1e-300), target[..., first])
        lacking = 0.5 * np.sum(w * (target - mean[..., kind]) ** 2, axis=-1)
        return dataclasses.replace(self, x=self.x.rows(first), target=mean, w=W), lacking

    def sampled(self) -> Problem:
        """The problem on a random sample of its rows that is large enough to find starts: the same share of each scheme's rows.

        A scheme keeps at least LARGE / 20 rows. A problem with at most LARGE distinct rows is returned as it is.
        """
        few = self.merged()[0]
        if len(few.x) <= LARGE or type(self.x) is not Design or few.target.ndim > 1 or few.w.ndim > 1:
            return self
        rng, n = np.random.default_rng(0), len(few.x)  # not every k-th row, since rows are in the order of a grid
        groups = [np.flatnonzero(few.x.group == g) for g in np.unique(few.x.group)]
        sizes = [min(len(rows), max(LARGE * len(rows) // n, LARGE // 20, 1)) for rows in groups]
        kept = np.sort(np.concatenate([rng.choice(r, size=k, replace=False) for r, k in zip(groups, sizes, strict=True)]))
        return dataclasses.replace(few, x=few.x.rows(kept), target=few.target[kept], w=few.w[kept])

    def cost(self, theta: Array) -> Array:
        """Cost of each of m parameter vectors, (m,); inf if the law cannot be evaluated."""
        with np.errstate(all="ignore"):
            return self.objective.cost(self.objective.scaled(self.law.predict(theta, self.x)) - self.target, self.w)


@dataclasses.dataclass(frozen=True)
class Solution:
    """m solved problems: θ (m, p), cost (m,), whether each converged, iterations used."""

    theta: Array
    cost: Array
    converged: Array
    iterations: int

    def best(self) -> Solution:
        """The problem with the least cost alone."""
        k = int(np.argmin(self.cost))
        return Solution(self.theta[k : k + 1], self.cost[k : k + 1], self.converged[k : k + 1], self.iterations)

    def joined(self, other: Solution) -> Solution:
        """The problems of both."""
        theta, cost = np.concatenate([self.theta, other.theta]), np.concatenate([self.cost, other.cost])
        return Solution(theta, cost, np.concatenate([self.converged, other.converged]), self.iterations + other.iterations)


def minimise(problem: Problem, theta: Array, free: Array, *, iterations: int = 300, tolerance: float = 1e-15) -> Solution:  # noqa: PLR0915
    """Solve m problems at once from θ (m, p); `free` (boolean) broadcasts to (m, p), and other coordinates keep their values.

    A problem has converged when the decrease predicted by the quadratic model is below `tolerance` times its cost.
    """
    few, lacking = problem.merged()
    if few is not problem:
        solution = minimise(few, theta, free, iterations=iterations, tolerance=tolerance)
        return dataclasses.replace(solution, cost=solution.cost + lacking)
    m, p = theta.shape
    law, x, objective = problem.law, problem.x, problem.objective
    target, w = (np.broadcast_to(v, (m, len(x))) for v in (problem.target, problem.w))
    lower, upper, free = (np.broadcast_to(v, (m, p)) for v in (problem.lower, problem.upper, free))
    theta = np.where(free, np.clip(theta, lower, upper), theta)
    final, final_cost, converged = theta.copy(), np.full(m, np.inf), np.zeros(m, bool)
    live = np.arange(m)  # problems still moving; all arrays below hold only those
    damping = np.full(m, 1e-3)
    with np.errstate(all="ignore"):
        cost = objective.cost(objective.scaled(law.predict(theta, x)) - target, w)
        step_count = 0
        for step_count in range(1, iterations + 1):
            L, J = law.evaluate(theta, x, True)
            assert J is not None
            r = objective.scaled(L) - target
            slope, curve = objective.derivatives(r, w)
            J = objective.slopes(L, J)
            gradient = np.matmul(slope[:, None, :], J)[:, 0, :]
            root = J * np.sqrt(curve)[:, :, None]
            H = np.matmul(root.transpose(0, 2, 1), root)
            # A parameter whose term has vanished has no gradient: without this its step would be unbounded. The criterion is a
            # change of the parameter's own size: the k of a law may be 1e9 and count through its product with N^-γ.
            mute = np.einsum("mpp->mp", H) * np.maximum(theta**2, 1.0) < 1e-20
            stuck = ~free | mute | ((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0))
            scale = np.sqrt(np.maximum(np.einsum("mpp->mp", H), 1e-300))
            scale = np.where(stuck, 1.0, scale)
            gradient = np.where(stuck, 0.0, gradient / scale)
            H /= scale[:, :, None] * scale[:, None, :]
            H[stuck[:, :, None] | stuck[:, None, :]] = 0.0
            diagonal = np.einsum("mpp->mp", H)
            diagonal[:] = 1.0
            done = np.zeros(len(live), bool)
            pending = np.arange(len(live))
            for _ in range(12):  # raise the damping until the cost falls
                move, promised = _boxed_step(
                    H[pending],
                    gradient[pending],
                    damping[pending],
                    (lower[pending] - theta[pending]) * scale[pending],
                    (upper[pending] - theta[pending]) * scale[pending],
                )
                trial = np.where(
                    stuck[pending],
                    theta[pending],
                    np.clip(theta[pending] + move / scale[pending], lower[pending], upper[pending]),
                )
                trial_cost = objective.cost(objective.scaled(law.predict(trial, x)) - target[pending], w[pending])
                small = np.abs(promised) <= tolerance * cost[pending] + 1e-29
                better = trial_cost < cost[pending]
                taken = pending[better]
                theta[taken], cost[taken] = trial[better], trial_cost[better]
                damping[taken] = np.maximum(damping[taken] * 0.15, 1e-13)
                # a predicted decrease below the rounding of the cost cannot be tested
                small |= ~better & (np.abs(promised) <= 1e-12 * cost[pending])
                done[pending[small]] = True
                failed = ~better & ~small
                pending = pending[failed]
                if not len(pending):
                    break
                damping[pending] = np.maximum(damping[pending], 1e-8) * 8
            done[pending] |= damping[pending] > 1e12
            ended = done | (step_count == iterations)
            if ended.any():
                final[live[ended]], final_cost[live[ended]] = theta[ended], cost[ended]
                converged[live[ended]] = done[ended] & np.isfinite(cost[ended]) & ~np.isin(np.flatnonzero(ended), pending)
                keep = ~ended
                live, theta, cost, damping = live[keep], theta[keep], cost[keep], damping[keep]
                target, w, lower, upper, free = target[keep], w[keep], lower[keep], upper[keep], free[keep]
                if not len(live):
                    break
    return Solution(final, final_cost, converged, step_count)


def _solve_linear(M: Array, rhs: Array) -> Array:
    """Batched solve of positive semi-definite systems with unit diagonals; a ridge of 1e-8 regularises singular ones."""
    try:
        return np.linalg.solve(M, rhs)
    except np.linalg.LinAlgError:
        return np.linalg.solve(np.nan_to_num(M, nan=0.0, posinf=0.0, neginf=0.0) + 1e-8 * np.eye(M.shape[-1]), rhs)


def _boxed_step(H: Array, g: Array, damping: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Minimise gᵀd + ½dᵀ(H + λI)d over low ≤ d ≤ high, approximately: coordinates that leave the box are put on its boundary,
    and the rest is solved again.

    H (m, p, p), g, low, high (m, p) → the step d (m, p) and its predicted decrease of gᵀd + ½dᵀHd (m,).
    """
    damped = H + damping[:, None, None] * np.eye(H.shape[-1])
    on_wall, wall = np.zeros(g.shape, bool), np.zeros(g.shape)
    for _ in range(4):
        rhs = np.where(on_wall, wall, -g - np.matmul(H, wall[:, :, None])[:, :, 0])
        M = np.where(on_wall[:, :, None] | on_wall[:, None, :], 0.0, damped)
        np.einsum("mpp->mp", M)[on_wall] = 1.0
        d = _solve_linear(M, rhs[:, :, None])[:, :, 0]
        outside = ((d < low) | (d > high)) & ~on_wall
        if not outside.any():
            break
        on_wall |= outside
        wall = np.where(outside, np.clip(d, low, high), wall)
    d = np.clip(d, low, high)
    return d, -np.sum(g * d, axis=1) - 0.5 * np.sum(d * np.matmul(H, d[:, :, None])[:, :, 0], axis=1)


def starts(problem: Problem, fixed: Mapping[int, float], *, count: int, seed: int = 0) -> Array:
    """The `count` best θ of the law's global search: amplitudes by linear least squares at every exponent on the grid.

    `fixed` holds coordinates of θ at values. Exponents among them are held in the search, too, so that amplitudes are solved
    for the exponents that the fit will have; other coordinates are set in θ afterwards. Negative amplitudes are set to zero and
    the rest is solved again. Seed 0 is the grid itself; another seed moves every node at random by up to half a spacing, to
    check that the optimum does not depend on the starts.
    """
    problem, _ = problem.merged()
    law, x, y = problem.law, problem.x, problem.objective.unscaled(problem.target)
    nu = law.exponents(y)
    names = [p.name for p in law.shared]
    held = {law.searched.index(names[i]): v for i, v in fixed.items() if i < len(names) and names[i] in law.searched}
    if seed:
        rng = np.random.default_rng(seed)
        spacing = np.array([abs(np.diff(np.log(np.maximum(axis, 1e-2)))).mean() / 2 for axis in law.grid])
        nu = nu * np.exp(rng.uniform(-spacing, spacing, nu.shape))
        nu = law.limit_exponents(nu, y)
    for column, value in held.items():
        nu[:, column] = value
    if held:
        nu = np.unique(nu, axis=0)
    with np.errstate(all="ignore"):
        columns, target, weight = law.linear(nu, x, y)
        weight = weight * problem.objective.per_log(y) * np.sqrt(problem.w)  # a law gives the weight for log residuals
        A = columns * weight[:, :, None]
        G = np.matmul(A.transpose(0, 2, 1), A)
        rhs = np.matmul(A.transpose(0, 2, 1), (target * weight)[:, :, None])[:, :, 0]
        scale = np.sqrt(np.maximum(np.einsum("mkk->mk", G), 1e-300))
        G /= scale[:, :, None] * scale[:, None, :]
        np.einsum("mkk->mk", G)[:] += 1e-11
        rhs /= scale
        positive = np.full(G.shape[-1], not law.sign_free)
        positive[:3] = True  # A, B and E
        zero = np.zeros(rhs.shape, bool)
        c = rhs
        for _ in range(4):
            M = np.where(zero[:, :, None] | zero[:, None, :], 0.0, G)
            np.einsum("mkk->mk", M)[zero] = 1.0
            c = _solve_linear(M, np.where(zero, 0.0, rhs)[:, :, None])[:, :, 0]
            negative = (c < 0) & positive
            if not negative.any():
                break
            zero |= negative
        theta = law.assemble(nu, np.where(positive, np.maximum(c, 0), c) / scale, x)
        for i, value in fixed.items():
            theta[:, i] = value
        cost = problem.cost(theta)
    order = np.argsort(cost, kind="stable")
    return theta[order[np.isfinite(cost[order])][:count]]


PATHS, STEPS = 3, 16  # optima from which `lead_to` starts, and its steps to the fixed values
SCATTERED = 32  # further starts of `lead_to`, scattered by half a unit in each coordinate


def lead_to(problem: Problem, fixed: Mapping[int, float], begin: Array, free: Array) -> Array:
    """Starts for a fit with fixed coordinates: the best optima without them, led to the fixed values in steps.

    `begin` (m, p) are starts of the fit without fixed coordinates, and `free` (p,) are those that this fit may move. Each step
    moves the fixed coordinates a part of the way and solves the rest again, so that an amplitude and its exponent, which are
    correlated, move together. A plain grid of exponents would miss the narrow valley that a fixed amplitude leaves. A fixed
    value may also lie far outside the range of the grid; starts scattered around those of the search (seeded) reach the optima
    there.
    """
    optima = solve(problem, begin, free)
    theta = optima.theta[np.argsort(optima.cost, kind="stable")[:PATHS]]
    index, value = list(fixed), np.array(list(fixed.values()))
    first, free = theta[:, index], np.isin(np.arange(theta.shape[1]), index, invert=True) & free
    for share in np.linspace(0, 1, STEPS + 1)[1:]:
        theta = theta.copy()
        theta[:, index] = (1 - share) * first + share * value
        theta = minimise(problem, theta, free, iterations=40, tolerance=1e-9).theta
    rng = np.random.default_rng(0)
    around = begin[rng.integers(len(begin), size=SCATTERED)] + rng.normal(0, 0.5, (SCATTERED, begin.shape[1])) * free
    theta = np.concatenate([theta, np.clip(around, problem.lower, problem.upper)])
    theta[:, index] = value
    return theta[np.isfinite(problem.cost(theta))]


HOPS, MISSES = 12, 2  # scatters of `hop` at the most, and in vain before it ends
MANY_EXPONENTS = 4  # laws with more than these have valleys enough to need it


def hop(problem: Problem, found: Solution, begin: Array, free: Array) -> Solution:
    """`found`, and a better optimum if starts scattered around its best and around `begin` (m, p), again and again, reach one.

    The search over exponents is too coarse for laws with many of them once other coordinates are fixed.
    """
    rng, now, misses = np.random.default_rng(1), found.best(), 0
    for _ in range(HOPS):
        near = np.concatenate([np.repeat(now.theta, SCATTERED, axis=0), begin[rng.integers(len(begin), size=SCATTERED)]])
        around = near + rng.normal(0, 0.5, near.shape) * free
        around = np.where(free, np.clip(around, problem.lower, problem.upper), now.theta)
        more = solve(problem, around[np.isfinite(problem.cost(around))], free)
        better = len(more.cost) > 0 and more.cost.min() < now.cost[0] * (1 - 1e-6)
        now, misses = (more.best(), 0) if better else (now, misses + 1)
        if misses == MISSES:
            break
    return found.joined(now) if now.cost[0] < found.cost.min() else found


def polish(problem: Problem, start: Solution, free: Array) -> Solution:
    """The optima of a problem, from those of its sample; starts that reached the same optimum continue as one."""
    _, first, met = np.unique(np.round(np.log(np.maximum(start.cost, 1e-300)), 6), return_index=True, return_inverse=True)
    final = minimise(problem, start.theta[first], free, iterations=400 if math.isinf(problem.objective.delta) else 3000)
    met = met.ravel()
    return Solution(final.theta[met], final.cost[met], final.converged[met], start.iterations + final.iterations)


def solve(problem: Problem, begin: Array, free: Array) -> Solution:
    """`minimise`, reaching a small Huber δ through larger ones: the optimum of one δ is a good start for the next."""
    final_delta = problem.objective.delta
    if not math.isinf(final_delta):
        with np.errstate(all="ignore"):
            first = problem.objective.scaled(problem.law.predict(begin[:1], problem.x))
            spread = float(np.median(np.abs(first - problem.target)))
        delta = max(spread, final_delta)
        while delta > final_delta * 2:
            eased = dataclasses.replace(problem, objective=dataclasses.replace(problem.objective, delta=delta))
            begin = minimise(eased, begin, free, iterations=40, tolerance=1e-6).theta
            delta /= 4
    # All starts come near their optimum; only the best few are followed to the end of a flat valley.
    near = minimise(problem, begin, free, iterations=150)
    unfinished = [i for i in np.argsort(near.cost)[:3] if not near.converged[i]]
    if not unfinished:
        return near
    last = minimise(problem, near.theta[unfinished], free, iterations=400 if math.isinf(final_delta) else 3000)
    theta, cost, converged = near.theta.copy(), near.cost.copy(), near.converged.copy()
    theta[unfinished], cost[unfinished], converged[unfinished] = last.theta, last.cost, last.converged
    return Solution(theta, cost, converged, near.iterations + last.iterations)
