"""Fit a law: minimise  Σ w_i·ρ(r_i),  r_i = log L(θ; x_i) - log y_i,  over a box.

ρ(r) = ½r² (least squares) or Huber's: ½r² for |r| ≤ δ and δ|r| - ½δ² beyond. The sum, not the mean: a small mean stops an
optimizer early.

Everything that refits, refits through one solver, `minimise`: a Levenberg–Marquardt iteration with analytic Jacobian, box
bounds and free/fixed parameters that advances m problems at once in numpy. The m problems are the starts of one fit, the
replicates of a bootstrap, the points of a profile, the folds of a held-out comparison. Fits are deterministic: the starts
come from a grid over the law's exponents whose amplitudes are solved linearly (variable projection), and rows and schemes
have a canonical order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .laws import Design, Law, LawError, Param, get_law
from .points import PointError, Points, find_scheme

Array = np.ndarray
CHI2_95 = 3.841458820694124  # 95 % quantile of χ² with one degree of freedom
STATUSES = ("converged", "at bound", "multiple optima", "exactly determined", "not identifiable", "failed")
UNTRUSTED = STATUSES[3:]  # no number of such a fit is to be used as if runs had tested it


@dataclasses.dataclass(frozen=True)
class Objective:
    """Least squares (δ = inf) or Huber(δ) on log-residuals, always the weighted sum."""

    delta: float = math.inf

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise LawError(f"huber delta = {self.delta:g}: must be positive")

    def __str__(self) -> str:
        return "least squares" if math.isinf(self.delta) else f"huber({self.delta:g})"

    def cost(self, r: Array, w: Array) -> Array:
        """Σ w·ρ(r) over the last axis; inf where r is not finite."""
        size = np.abs(r)
        rho = (
            0.5 * r * r
            if math.isinf(self.delta)
            else np.where(size <= self.delta, 0.5 * r * r, self.delta * (size - 0.5 * self.delta))
        )
        total = np.sum(w * rho, axis=-1)
        return np.where(np.isfinite(total), total, np.inf)

    def derivatives(self, r: Array, w: Array) -> tuple[Array, Array]:
        """(ρ'(r)·w, curvature weight): beyond δ the curvature is that of the majorizing parabola, δ/|r|."""
        if math.isinf(self.delta):
            return w * r, w
        shrink = self.delta / np.maximum(np.abs(r), self.delta)
        return w * shrink * r, w * shrink


def objective_from(word: str | float | Objective | None) -> Objective:
    """`None` or `"lsq"` → least squares; a number or `"huber:1e-3"` → Huber(δ)."""
    if isinstance(word, Objective):
        return word
    if word is None or word in ("lsq", "least squares"):
        return Objective()
    try:
        return Objective(float(str(word).lower().removeprefix("huber").strip(":()")))
    except ValueError:
        raise LawError(f"unknown objective '{word}'; choices: lsq, huber:DELTA (e.g. huber:1e-3)") from None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised: a law on a design x against log-losses, in a box. `log_y` and `w` are (n,), or (m, n) when each of
    the m problems has its own; lower and upper are (p,).
    """

    law: Law
    x: Design
    log_y: Array
    w: Array
    lower: Array
    upper: Array
    objective: Objective

    def cost(self, theta: Array) -> Array:
        """Cost of each of m parameter vectors, (m,); inf where the law cannot be evaluated."""
        with np.errstate(all="ignore"):
            return self.objective.cost(np.log(self.law.predict(theta, self.x)) - self.log_y, self.w)


@dataclasses.dataclass(frozen=True)
class Solution:
    """m solved problems: θ (m, p), cost (m,), whether each converged, iterations used."""

    theta: Array
    cost: Array
    converged: Array
    iterations: int


def minimise(problem: Problem, theta: Array, free: Array, *, iterations: int = 300, tolerance: float = 1e-15) -> Solution:  # noqa: PLR0915
    """Solve m problems at once from θ (m, p); `free` (boolean) broadcasts to (m, p), what is not free keeps its value.

    A problem has converged when the quadratic model promises less than `tolerance` of its cost.
    """
    m, p = theta.shape
    law, x, objective = problem.law, problem.x, problem.objective
    log_y, w = (np.broadcast_to(v, (m, len(x))) for v in (problem.log_y, problem.w))
    lower, upper, free = (np.broadcast_to(v, (m, p)) for v in (problem.lower, problem.upper, free))
    theta = np.where(free, np.clip(theta, lower, upper), theta)
    final, final_cost, converged = theta.copy(), np.full(m, np.inf), np.zeros(m, bool)
    live = np.arange(m)  # problems still moving; all arrays below hold only those
    damping = np.full(m, 1e-3)
    with np.errstate(all="ignore"):
        cost = objective.cost(np.log(law.predict(theta, x)) - log_y, w)
        step_count = 0
        for step_count in range(1, iterations + 1):
            L, J = law.evaluate(theta, x, True)
            assert J is not None
            r = np.log(L) - log_y
            slope, curve = objective.derivatives(r, w)
            J /= L[:, :, None]
            gradient = np.matmul(slope[:, None, :], J)[:, 0, :]
            root = J * np.sqrt(curve)[:, :, None]
            H = np.matmul(root.transpose(0, 2, 1), root)
            # A parameter whose term has vanished has nothing to say: without this its step would be without bound.
            mute = np.einsum("mpp->mp", H) < 1e-20
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
                trial_cost = objective.cost(np.log(law.predict(trial, x)) - log_y[pending], w[pending])
                small = np.abs(promised) <= tolerance * cost[pending] + 1e-29
                better = trial_cost < cost[pending]
                taken = pending[better]
                theta[taken], cost[taken] = trial[better], trial_cost[better]
                damping[taken] = np.maximum(damping[taken] * 0.15, 1e-13)
                # a promise below the rounding of the cost can neither be kept nor broken
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
                log_y, w, lower, upper, free = log_y[keep], w[keep], lower[keep], upper[keep], free[keep]
                if not len(live):
                    break
    return Solution(final, final_cost, converged, step_count)


def _solve(M: Array, rhs: Array) -> Array:
    """Batched solve of positive semi-definite systems with unit diagonals; a singular one is eased by a ridge of 1e-8."""
    try:
        return np.linalg.solve(M, rhs)
    except np.linalg.LinAlgError:
        return np.linalg.solve(np.nan_to_num(M, nan=0.0, posinf=0.0, neginf=0.0) + 1e-8 * np.eye(M.shape[-1]), rhs)


def _boxed_step(H: Array, g: Array, damping: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Minimise gᵀd + ½dᵀ(H + λI)d over low ≤ d ≤ high, nearly: coordinates that leave the box are put on its wall, the rest
    solved again.

    H (m, p, p), g, low, high (m, p) → the step d (m, p) and the decrease of gᵀd + ½dᵀHd that it promises (m,).
    """
    damped = H + damping[:, None, None] * np.eye(H.shape[-1])
    on_wall, wall = np.zeros(g.shape, bool), np.zeros(g.shape)
    for _ in range(4):
        rhs = np.where(on_wall, wall, -g - np.matmul(H, wall[:, :, None])[:, :, 0])
        M = np.where(on_wall[:, :, None] | on_wall[:, None, :], 0.0, damped)
        np.einsum("mpp->mp", M)[on_wall] = 1.0
        d = _solve(M, rhs[:, :, None])[:, :, 0]
        outside = ((d < low) | (d > high)) & ~on_wall
        if not outside.any():
            break
        on_wall |= outside
        wall = np.where(outside, np.clip(d, low, high), wall)
    d = np.clip(d, low, high)
    return d, -np.sum(g * d, axis=1) - 0.5 * np.sum(d * np.matmul(H, d[:, :, None])[:, :, 0], axis=1)


def starts(problem: Problem, fixed: Mapping[int, float], *, count: int, seed: int = 0) -> Array:
    """The `count` best θ of the law's global search: amplitudes by linear least squares at every exponent on the grid.

    Amplitudes that come out negative are set to zero and the rest solved again. Seed 0 is the grid alone; another seed moves
    every node at random by up to half a spacing, for checking that the optimum does not depend on where the search began.
    """
    law, x, y = problem.law, problem.x, np.exp(problem.log_y)
    nu = law.exponents(y)
    if seed:
        rng = np.random.default_rng(seed)
        spacing = np.array([abs(np.diff(np.log(np.maximum(axis, 1e-2)))).mean() / 2 for axis in law.grid])
        nu = nu * np.exp(rng.uniform(-spacing, spacing, nu.shape))
        if law.name == "quartet":
            nu[:, 3] = np.minimum(nu[:, 3], 0.95 * y.min())
    with np.errstate(all="ignore"):
        columns, target, weight = law.linear(nu, x, y)
        weight = weight * np.sqrt(problem.w)
        A = columns * weight[:, :, None]
        G = np.matmul(A.transpose(0, 2, 1), A)
        rhs = np.matmul(A.transpose(0, 2, 1), (target * weight)[:, :, None])[:, :, 0]
        scale = np.sqrt(np.maximum(np.einsum("mkk->mk", G), 1e-300))
        G /= scale[:, :, None] * scale[:, None, :]
        np.einsum("mkk->mk", G)[:] += 1e-11
        rhs /= scale
        positive = np.zeros(G.shape[-1], bool) if any(p.name == "delta" for p in law.own) else np.ones(G.shape[-1], bool)
        positive[:3] = True
        zero = np.zeros(rhs.shape, bool)
        c = rhs
        for _ in range(4):
            M = np.where(zero[:, :, None] | zero[:, None, :], 0.0, G)
            np.einsum("mkk->mk", M)[zero] = 1.0
            c = _solve(M, np.where(zero, 0.0, rhs)[:, :, None])[:, :, 0]
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


# ---------------------------------------------------------------------------------------------------- results


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law, and what is doubtful about it.

    `theta` (p,) is in the solver's coordinates, `params` and `eff` in natural ones. `intervals` maps a parameter's name
    (`E`, `alpha`, `eff.w4a4`) to its 95 % interval, empty until `uncertainty.profile_intervals` has filled it.
    `missing` are schemes that were asked for and have no runs: their eff is None.
    """

    law: Law
    points: Points
    objective: Objective
    theta: Array
    cost: float
    status: str
    warnings: tuple[str, ...]
    fixed: dict[str, float]
    missing: tuple[str, ...] = ()
    undetermined: tuple[str, ...] = ()
    intervals: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    intervals_method: str = ""
    optima: int = 1
    starts_at_best: float = 1.0
    condition: float = math.nan

    @cached_property
    def design(self) -> Design:
        """The design the law was fitted on."""
        return Design.of(self.points)

    @cached_property
    def coordinates(self) -> tuple[Param, ...]:
        """θ's coordinates, in order."""
        return self.law.params(self.points.schemes, self.design.reference)

    @cached_property
    def problem(self) -> Problem:
        """The problem that was solved."""
        return Problem(
            self.law, self.design, np.log(self.points.loss), self.points.weight, *_box(self.coordinates), self.objective
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of θ's coordinates."""
        return tuple(p.name for p in self.coordinates)

    @property
    def free(self) -> Array:
        """(p,) which coordinates were fitted."""
        return np.array([name not in self.fixed and name not in self.undetermined for name in self.names])

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.points)

    @property
    def residual_dof(self) -> int:
        """Residual degrees of freedom: points less fitted parameters. Without any, nothing tests the law."""
        return self.n - int(self.free.sum())

    @cached_property
    def params(self) -> dict[str, float | None]:
        """All parameters but eff, in natural units; None for those the points cannot determine."""
        pairs = [(p, t) for p, t in zip(self.coordinates, self.theta, strict=True) if not p.name.startswith("eff.")]
        return {p.name: None if p.name in self.undetermined else float(p.natural(t)) for p, t in pairs}

    @cached_property
    def eff(self) -> dict[str, float | None]:
        """Scheme → N-efficiency relative to the reference scheme; None for schemes without runs, empty for laws without eff."""
        log_eff = self.law.log_eff(self.theta[None], self.design)
        known = {} if log_eff is None else {s: float(math.exp(e)) for s, e in zip(self.points.labels, log_eff[0], strict=True)}
        return {**known, **dict.fromkeys(self.missing)}

    @cached_property
    def residuals(self) -> Array:
        """log L(θ) - log y, shape (n,)."""
        return np.log(self.law.predict(self.theta, self.design)[0]) - np.log(self.points.loss)

    @property
    def rms(self) -> float:
        """Root mean square of the log-residuals (≈ relative error of the loss)."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def sigma(self) -> float:
        """Standard deviation of the log-residuals, corrected for the parameters spent."""
        return float(np.sqrt(np.sum(self.residuals**2) / max(self.residual_dof, 1)))

    def predict(self, N: Any, D: Any, scheme: str | float | None = None) -> Array:
        """Loss (nats/token) at parameters N and tokens D (broadcast together) for a scheme's label or bits (default: the
        reference)."""
        group = self.design.reference if scheme is None else find_scheme(self.points.schemes, scheme)
        N, D = np.broadcast_arrays(np.asarray(N, float), np.asarray(D, float))
        return self.law.predict(self.theta, self.design.at(N, D, np.full(N.shape, group)))[0].reshape(N.shape)

    def index(self, name: str) -> int:
        """Place of a parameter in θ; LawError naming the choices."""
        return _place(name, self.coordinates, self.points)

    def to_dict(self) -> dict[str, Any]:
        """What `fit-scaling --json` prints; numbers only, no arrays."""
        return {
            "law": self.law.name,
            "equation": self.law.equation,
            "source": self.law.source,
            "objective": f"sum of {self.objective} on log residuals",
            "delta": None if math.isinf(self.objective.delta) else self.objective.delta,
            "cost": self.cost,
            "n": self.n,
            "rms": self.rms,
            "params": self.params,
            "eff": self.eff,
            "fixed": self.fixed,
            "units": {p.name: p.unit for p in self.coordinates if p.unit},
            "status": self.status,
            "warnings": list(self.warnings),
            "intervals": {k: list(v) for k, v in self.intervals.items()},
            "intervals_method": self.intervals_method,
            "data_hash": self.points.hash,
            "optima": self.optima,
            "starts_at_best": self.starts_at_best,
            "condition": self.condition if math.isfinite(self.condition) else None,
        }


def _box(coordinates: Sequence[Param]) -> tuple[Array, Array]:
    return np.array([p.lower for p in coordinates]), np.array([p.upper for p in coordinates])


def _place(name: str, coordinates: Sequence[Param], points: Points) -> int:
    names = [p.name for p in coordinates]
    if name in names:
        return names.index(name)
    block, _, label = name.partition(".")
    if label and any(n.startswith(block + ".") for n in names):
        full = f"{block}.{points.labels[points.index(label)]}"
        if full in names:
            return names.index(full)
        raise LawError(f"{name}: the reference scheme's {block} is not a parameter")
    raise LawError(f"unknown parameter '{name}'; choices: {', '.join(names)}")


def fit_law(
    points: Points,
    law: str | Law = "quest",
    *,
    objective: str | float | Objective | None = None,
    fix: Mapping[str, float] | None = None,
    schemes: Sequence[str] = (),
    seed: int = 0,
    n_starts: int = 16,
) -> Fit:
    """The global optimum of a law on `points`, with a status and warnings that say how far to trust it.

    `fix` holds parameters (`{"E": 1.69, "eff.w4a4": .7}`) at natural values. `schemes` are labels that an answer is wanted for:
    those without runs get None. Raises PointError for fewer points than parameters or a law whose columns are missing,
    LawError for an unknown law or parameter.
    """
    from .identify import diagnose

    fit, found = optimum(points, law, objective=objective, fix=fix, seed=seed, n_starts=n_starts)
    return diagnose(dataclasses.replace(fit, missing=_missing(points, schemes)), found)


def optimum(
    points: Points,
    law: str | Law,
    *,
    objective: str | float | Objective | None = None,
    fix: Mapping[str, float] | None = None,
    seed: int = 0,
    n_starts: int = 16,
) -> tuple[Fit, Solution]:
    """`fit_law` without the diagnosis: the best of all starts, and all of them."""
    law = get_law(law)
    law.check(points)
    goal = objective_from(objective)
    x = Design.of(points)
    coordinates = law.params(points.schemes, x.reference)
    fixed = {_place(k, coordinates, points): float(v) for k, v in (fix or {}).items()}
    held = {i: coordinates[i].internal(v) for i, v in fixed.items()}
    for i, value in fixed.items():
        if not coordinates[i].lower <= held[i] <= coordinates[i].upper:
            raise LawError(
                f"{coordinates[i].name} = {value:g}: outside its bounds [{coordinates[i].lower:g}, {coordinates[i].upper:g}]"
            )
    loose = tuple(
        name for name in law.undetermined(points) if coordinates[_place(name, coordinates, points)].name not in (fix or {})
    )
    held |= {_place(name, coordinates, points): 0.0 for name in loose}
    free = np.array([i not in held for i in range(len(coordinates))])
    if len(points) < free.sum():
        raise PointError(f"{len(points)} points cannot fit the {int(free.sum())} parameters of law {law.name}")
    problem = Problem(law, x, np.log(points.loss), points.weight, *_box(coordinates), goal)
    begin = starts(problem, held, count=n_starts, seed=seed)
    if not len(begin):
        raise PointError(f"law {law.name} cannot be evaluated on these points")
    found = solve(problem, begin, free)
    best = int(np.argmin(found.cost))
    theta, cost = found.theta[best], float(found.cost[best])
    names = {coordinates[i].name: v for i, v in fixed.items()}
    status = "converged" if found.converged[best] else "failed"
    return Fit(law, points, goal, theta, cost, status, (), names, undetermined=loose), found


def evaluate(
    points: Points, law: str | Law, values: Mapping[str, float], *, objective: str | float | Objective | None = None
) -> Fit:
    """A law at given parameters, e.g. published ones: its cost on these points. Status "evaluated".

    Per-scheme parameters that are not given are fitted, the rest held, and named in a warning. LawError for a missing
    shared parameter.
    """
    law = get_law(law)
    absent = [p.name for p in law.shared if p.name not in values]
    if absent:
        raise LawError(f"law {law.name} needs a value for {', '.join(absent)}")
    known = {k: v for k, v in values.items() if not k.endswith(f".{points.labels[0]}")}
    fit = fit_law(points, law, objective=objective, fix=known)
    fitted = [name for name, free in zip(fit.names, fit.free, strict=True) if free]
    note = (f"no value was given for {', '.join(fitted)}: fitted, the rest held",) if fitted else ()
    return dataclasses.replace(fit, status="evaluated", warnings=(*points.notes, *note))


def solve(problem: Problem, begin: Array, free: Array) -> Solution:
    """`minimise`, reaching a small Huber δ through larger ones: the optimum of one δ is a good start for the next."""
    goal = problem.objective.delta
    if not math.isinf(goal):
        with np.errstate(all="ignore"):
            spread = float(np.median(np.abs(np.log(problem.law.predict(begin[:1], problem.x)) - problem.log_y)))
        delta = max(spread, goal)
        while delta > goal * 2:
            eased = dataclasses.replace(problem, objective=Objective(delta))
            begin = minimise(eased, begin, free, iterations=40, tolerance=1e-6).theta
            delta /= 4
    # All starts come near their optimum; only the few best are worth walking to the end of a flat valley.
    near = minimise(problem, begin, free, iterations=150)
    unfinished = [i for i in np.argsort(near.cost)[:3] if not near.converged[i]]
    if not unfinished:
        return near
    last = minimise(problem, near.theta[unfinished], free, iterations=400 if math.isinf(goal) else 3000)
    theta, cost, converged = near.theta.copy(), near.cost.copy(), near.converged.copy()
    theta[unfinished], cost[unfinished], converged[unfinished] = last.theta, last.cost, last.converged
    return Solution(theta, cost, converged, near.iterations + last.iterations)


def _missing(points: Points, schemes: Sequence[str]) -> tuple[str, ...]:
    out = []
    for label in schemes:
        try:
            points.index(label)
        except PointError:
            out.append(str(label))
    return tuple(out)
