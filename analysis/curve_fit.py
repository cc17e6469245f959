"""Fit a law of loss curves: the solver of final-loss laws, a ridge towards a prior, and intervals for correlated errors.

    fit = fit_curves(curves, "multi-power")
    fit.predict(rates, steps), fit.interval(rates, steps)

The objective is Σ w·ρ(log L - log y) with Huber's ρ of 1e-3. Each curve has the same weight, however often it was logged.
Starts come from variable projection (`solver.starts`).

These laws are sloppy: very different parameters fit three schedules equally well, but predict a long cosine or a deep cut of
the rate wrongly. So a ridge draws θ to the prior of the law: Σ_k s·φ·(θ_k - c_k)²/(2·sd_k²), φ = δ·max(δ, median |residual|).
Its strength s is 1 for fewer than ENOUGH_SCHEDULES curves, else that of STRENGTHS with the least error on held-out schedules.

Intervals: the errors of neighbours on a curve are not independent. They are modelled as AR(1) along each curve; correlation and
variance are estimated by matching moments of the residuals, corrected for the parameters fitted. The covariance of θ is the
sandwich H⁻¹·(JᵀWRWJ + prior)·H⁻¹. Quantiles are Student's; the degrees of freedom are the effective number of independent
points for ρ and σ, n/(1 + 2/(1-ρ²)), minus the parameters. The errors on held-out schedules widen the intervals further.
"""

# ruff: noqa: D102

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .curve_laws import CurveDesign, CurveLaw, Scales, curve_design, get_curve_law, require_sizes
from .curves import MOST_CHANGES, Curve, Rates
from .fit_result import box
from .laws import Design, Law, LawError, Param
from .objective import Objective, objective_from
from .schemes import Scheme, read_scheme
from .solver import Problem, Solution, minimise, starts
from .tables import PointError

Array = np.ndarray
STRENGTHS = (0.1, 1.0, 10.0)  # of the ridge, compared on held-out schedules
DEFAULT_STRENGTH = 1.0
LATER = 0.4  # share of the points of one or two curves that is held out to measure the error of a forecast
ENOUGH_SCHEDULES = 6  # from so many on, the error on held-out schedules chooses the strength
CURVE_WEIGHT = 128.0  # weight of each curve, however often it was logged
FINE_CHANGES = 1024  # of a predicted schedule: steep falls near the end need more than a fit does
DELTA = 1e-3  # Huber's, as published for these laws
UNSEEN_GAIN = 0.5  # standard deviation of log B if no rate has fallen yet
SMALL = 1e-4  # residual of the ridge per unit of θ: far below δ, so that Huber's loss is a square there


@dataclasses.dataclass(frozen=True)
class Ridged(Law):
    """A law of curves with an extra row e^(SMALL·(θ - centre)) for each coordinate: its log residual is the ridge's."""

    law: CurveLaw
    centre: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", self.law.shared)
        object.__setattr__(self, "searched", self.law.searched)
        object.__setattr__(self, "grid", self.law.grid)

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        L, J = self.law.evaluate(theta, x, need_jacobian)
        rows = np.exp(SMALL * (theta - self.centre))
        if J is not None:
            J = np.concatenate([J, SMALL * rows[:, :, None] * np.eye(theta.shape[1])], axis=1)
        return np.concatenate([L, rows], axis=1), J

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        n = len(x.group)
        columns, target, weight = self.law.linear(nu, x, y[:n])
        wide = [(0, 0), (0, len(y) - n)]
        return np.pad(columns, [*wide, (0, 0)]), np.pad(target, wide), np.pad(weight, wide)

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        return self.law.assemble(nu, c, x)


@dataclasses.dataclass(frozen=True)
class CurveFit:
    """A fitted law of curves.

    `theta` (p,) is in the solver's coordinates, `params` in natural ones, `published` in the units of the law's paper.
    `strength` is that of the ridge. `left_out` maps each strength to its mean absolute error (nats/token) on held-out
    schedules, or on held-out ends for fewer than three curves; `left_out_rms` is what the error of the chosen strength adds to
    the errors of the fit, in log loss. `rho` and `sigma` are the correlation and standard deviation of log errors along a
    curve.
    """

    law: CurveLaw
    curves: tuple[Curve, ...]
    schemes: tuple[Scheme, ...]
    scales: Scales
    objective: Objective
    theta: Array
    cost: float
    converged: bool
    strength: float
    left_out: dict[float, float]
    left_out_rms: float
    covariance: Array
    rho: float
    sigma: float
    dof: float

    @cached_property
    def coordinates(self) -> tuple[Any, ...]:
        return self.law.params(self.schemes)

    @cached_property
    def params(self) -> dict[str, float]:
        """Natural values, in the units of `curve_laws`."""
        return {p.name: float(p.natural(t)) for p, t in zip(self.coordinates, self.theta, strict=True)}

    @cached_property
    def published(self) -> dict[str, float]:
        """The parameters in the units of the law's paper."""
        return self.law.published(self.theta, self.scales)

    def design(self, rates: Rates, steps: Array, curve: Curve | None = None) -> CurveDesign:
        """The design of steps of one schedule, for a run like `curve` (default: the first of the fit)."""
        like = self.curves[0] if curve is None else curve  # not `or`: a curve without rows is false
        return _design(self.law, [dataclasses.replace(like, rates=rates)], [steps], self.schemes, self.scales, FINE_CHANGES)[0]

    def predict(self, rates: Rates, steps: Any, curve: Curve | None = None) -> Array:
        """Loss (n,), nats/token, at steps of a run with this schedule."""
        return self.law.predict(self.theta, self.design(rates, np.atleast_1d(np.asarray(steps, float)), curve))[0]

    def interval(
        self, rates: Rates, steps: Any, curve: Curve | None = None, *, level: float = 0.95, new_run: bool = True
    ) -> tuple[Array, Array]:
        """(low, high), (n,) each: of the measured loss of a new run, or without `new_run` of the law's own loss."""
        L, slopes = self._slopes(rates, steps, curve)
        variance = np.einsum("np,pq,nq->n", slopes, self.covariance, slopes)
        if new_run:
            variance = variance + self.sigma**2 + self.left_out_rms**2
        half = self._quantile(level) * np.sqrt(variance)
        return L * np.exp(-half), L * np.exp(half)

    def gain(
        self, rates: Rates, other: Rates, step: float, curve: Curve | None = None, *, level: float = 0.95
    ) -> tuple[float, float, float]:
        """(estimate, low, high) of the law's loss at `step` with the schedule `other`, minus that with `rates`; nats/token.

        The interval is narrower than those of the two losses, because they share most of their uncertainty.
        """
        (L, slopes), (L_other, slopes_other) = (self._slopes(r, step, curve) for r in (rates, other))
        moved = (L_other[:, None] * slopes_other - L[:, None] * slopes)[0]
        half = self._quantile(level) * math.sqrt(max(float(moved @ self.covariance @ moved), 0.0))
        estimate = float(L_other[0] - L[0])
        return estimate, estimate - half, estimate + half

    def _slopes(self, rates: Rates, steps: Any, curve: Curve | None) -> tuple[Array, Array]:
        """(n,) losses at steps and (n, p) the slopes of their logs."""
        x = self.design(rates, np.atleast_1d(np.asarray(steps, float)), curve)
        L, J = self.law.evaluate(self.theta[None], x, True)
        assert J is not None
        return L[0], J[0] / L[0][:, None]

    def _quantile(self, level: float) -> float:
        """Student's quantile of a two-sided interval."""
        from scipy.special import stdtrit

        return float(stdtrit(self.dof, 0.5 + level / 2))

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        return {
            "law": self.law.name,
            "equation": self.law.equation,
            "source": self.law.source,
            "objective": f"sum of {self.objective} on log residuals",
            "cost": self.cost,
            "converged": self.converged,
            "curves": [c.name for c in self.curves],
            "params": self.params,
            "published_units": self.published,
            "units": {p.name: p.unit for p in self.coordinates if p.unit},
            "scales": dataclasses.asdict(self.scales),
            "prior": self.law.prior_source if self.strength else "",
            "strength": self.strength,
            "error_left_out": {str(k): v for k, v in self.left_out.items()},
            "error_correlation": self.rho,
            "error_sd": self.sigma,
        }


def fit_curves(
    curves: Sequence[Curve],
    law: str | CurveLaw = "multi-power",
    *,
    objective: str | float | Objective | None = DELTA,
    ridge: float | None = None,
    n_starts: int = 4,
) -> CurveFit:
    """Fit a law to the curves after their warm-up. `ridge` is a strength, 0 for none; None leaves it to the rule above.

    Raises PointError for curves of constant rate if the law needs falls, for too few points, or, for the law joint, without N
    and tokens; LawError for an unknown law or a negative ridge.
    """
    law, objective = get_curve_law(law), objective_from(objective)
    if not curves:
        raise PointError("no curves to fit")
    if ridge is not None and ridge < 0:
        raise LawError(f"ridge = {ridge:g}: must not be negative")
    curves = tuple(sorted(curves, key=lambda c: (c.name, c.steps)))
    schemes = _schemes(law, curves)
    thin = [curve.thinned() for curve in curves]
    x, scales = _design(law, curves, [step for step, _ in thin], schemes, None)
    data = _Data(law, law.params(schemes), x, np.concatenate([y for _, y in thin]), objective)
    if len(law.shared) > 3 and not len(x.point) and (ridge == 0 or not law.prior):
        raise PointError(f"law {law.name} needs a curve whose rate falls; law power reads curves of constant rate")
    if len(data.loss) < len(data.coordinates):
        raise PointError(f"{len(data.loss)} points cannot fit the {len(data.coordinates)} parameters of law {law.name}")

    # A weak ridge first: it steadies the search, and the residuals then show the size of the errors.
    unit = DELTA if math.isinf(objective.delta) else objective.delta
    weak = data.weights(0.01 * unit**2)
    begin = starts(data.problem(weak), {}, count=n_starts)
    if not len(begin):
        raise PointError(f"law {law.name} cannot be evaluated on these curves")
    near = _reach(data, weak, begin)
    best = near.theta[np.argmin(near.cost)]
    error = float(np.median(np.abs(data.errors(best[None])[0])))
    phi = error**2 if math.isinf(objective.delta) else objective.delta * max(objective.delta, error)

    strengths: tuple[float, ...] = (ridge,) if ridge is not None else (0.0,)
    if ridge is None and data.pull.any():
        strengths = STRENGTHS if len(curves) >= ENOUGH_SCHEDULES else (DEFAULT_STRENGTH,)
    rows = np.stack([data.weights(s * phi) for s in strengths])
    full = _reach(data, rows, np.repeat(best[None], len(rows), axis=0))
    mean, rms = _left_out(data, rows, full.theta, len(curves))
    chosen = int(np.argmin(mean))
    theta = full.theta[chosen]
    covariance, rho, sigma, dof = _uncertainty(data, theta, strengths[chosen] * phi * data.pull * SMALL**2)
    if not len(x.point):  # the gain of a fall of the rate comes from the prior alone
        place = [p.name for p in data.coordinates].index("B") if law.prior else -1
        covariance[place, place] += UNSEEN_GAIN**2 if law.prior else 0.0
    return CurveFit(
        *(law, curves, schemes, scales, objective, theta, float(full.cost[chosen]), bool(full.converged[chosen])),
        strength=strengths[chosen],
        left_out=dict(zip(strengths, mean.tolist(), strict=True)),
        left_out_rms=math.sqrt(max(float(rms[chosen]) ** 2 - sigma**2, 0.0)),
        covariance=covariance,
        rho=rho,
        sigma=sigma,
        dof=dof,
    )


@dataclasses.dataclass(frozen=True)
class _Data:
    """The data of a fit: a law, its coordinates, its design, the losses (n,) there, and the objective."""

    law: CurveLaw
    coordinates: tuple[Param, ...]
    x: CurveDesign
    loss: Array
    objective: Objective

    @cached_property
    def curve_weight(self) -> Array:
        """(n,) weights with which each curve has CURVE_WEIGHT."""
        return CURVE_WEIGHT / np.bincount(self.x.curve)[self.x.curve]

    @cached_property
    def centre(self) -> Array:
        """(p,) the centre of the prior of θ; 0 for coordinates without one."""
        prior = [(p, self.law.prior.get(p.name)) for p in self.coordinates]
        return np.array([p.internal(known[0]) if known else 0.0 for p, known in prior])

    @cached_property
    def pull(self) -> Array:
        """(p,) 1/(sd·SMALL)² of the prior; 0 for coordinates without one."""
        known = [self.law.prior.get(p.name) for p in self.coordinates]
        return np.array([1 / (each[1] * SMALL) ** 2 if each else 0.0 for each in known])

    def weights(self, strength: float) -> Array:
        """(n + p,) weights of the points and, at this strength times φ, of the prior."""
        return np.concatenate([self.curve_weight, strength * self.pull])

    def problem(self, w: Array, delta: float | None = None) -> Problem:
        """The problem at weights (n + p,) or (m, n + p), if given with another δ of Huber's."""
        objective = self.objective if delta is None else dataclasses.replace(self.objective, delta=delta)
        x = dataclasses.replace(self.x, extra=len(self.coordinates))
        target = np.concatenate([objective.scaled(self.loss), objective.scaled(np.ones(x.extra))])
        return Problem(Ridged(self.law, self.centre), x, target, w, *box(self.coordinates), objective)

    def errors(self, theta: Array) -> Array:
        """(m, n) log L - log y."""
        return np.asarray(np.log(self.law.predict(theta, self.x)) - np.log(self.loss))


def _left_out(data: _Data, rows: Array, theta: Array, curves: int) -> tuple[Array, Array]:
    """Mean absolute error (nats/token) and RMS log error on held-out schedules, (m,) each, for m rows of weights.

    `theta` (m, p) are the fits to all schedules. For fewer than three curves the ends are held out instead, LATER of their
    points.
    """
    held = np.equal.outer(np.arange(curves), data.x.curve)
    if curves < 3:
        ends = np.searchsorted(data.x.curve, np.arange(curves), side="right")
        count = np.bincount(data.x.curve)
        late = np.arange(len(data.loss)) >= (ends - LATER * count)[data.x.curve]
        held, curves = late[None], 1
    mask = np.concatenate([~held, np.ones((curves, len(data.coordinates)), bool)], axis=1)
    folds = (rows[:, None, :] * mask).reshape(-1, rows.shape[1])
    begin = np.repeat(theta, curves, axis=0)
    refit = minimise(data.problem(folds), begin, np.ones(theta.shape[1], bool), iterations=60, tolerance=1e-8).theta
    errors = data.errors(refit).reshape(len(rows), curves, -1)
    absolute = np.where(held, np.abs(np.expm1(errors)) * data.loss, 0.0).sum(axis=2) / held.sum(axis=1)
    square = np.where(held, errors**2, 0.0).sum(axis=2) / held.sum(axis=1)
    return absolute.mean(axis=1), np.sqrt(square.mean(axis=1))


def _reach(data: _Data, w: Array, begin: Array) -> Solution:
    """The optimum of each start at its weights, reaching Huber's δ through larger ones; flat valleys are walked to 1e-9."""
    theta, free = begin, np.ones(begin.shape[1], bool)
    for factor in () if math.isinf(data.objective.delta) else (16, 4):
        eased = data.problem(w, factor * data.objective.delta)
        theta = minimise(eased, theta, free, iterations=25, tolerance=1e-5).theta
    return minimise(data.problem(w), theta, free, iterations=120, tolerance=1e-9)


def saw_a_fall(fit: CurveFit) -> bool:
    """Whether a rate falls before any fitted point: only then do the data tell the gain of a fall."""
    return any(bool(np.any(np.diff(c.rates.cut(c.steps).lr)[c.rates.warmup :] < 0)) for c in fit.curves)


def _schemes(law: CurveLaw, curves: Sequence[Curve]) -> tuple[Scheme, ...]:
    if not law.uses_scheme:
        return ()
    require_sizes([c.name for c in curves], [c.N for c in curves], [c.tokens_per_step for c in curves])
    unknown = (math.nan,) * 5
    schemes = [read_scheme(label) or Scheme(label, *unknown) for label in {c.scheme or "bf16" for c in curves}]
    return tuple(sorted(schemes, key=lambda s: (-np.nan_to_num(s.w_stored_bits), s.label)))


def _design(
    law: CurveLaw,
    curves: Sequence[Curve],
    steps: Sequence[Array],
    schemes: tuple[Scheme, ...],
    scales: Scales | None,
    changes: int = MOST_CHANGES,
) -> tuple[CurveDesign, Scales]:
    """The design of these steps of curves, in units of `scales` (None: those of the curves), with at most so many changes."""
    if law.uses_scheme:
        rates = [c.rates.scaled(c.tokens_per_step, 1 / c.rates.peak) for c in curves]
        steps = [step * c.tokens_per_step for step, c in zip(steps, curves, strict=True)]
        labels = [s.label for s in schemes]
        group = [labels.index(c.scheme or "bf16") for c in curves]
    else:
        rates, group = [c.rates for c in curves], []
    scales = scales or Scales.of(rates, [float(step[-1]) for step in steps])
    thin = [r.thinned(changes) for r in rates]
    N = [c.N for c in curves] if law.uses_scheme else []
    return curve_design(thin, steps, scales, N=N, group=group, schemes=schemes), scales


def _uncertainty(data: _Data, theta: Array, penalty: Array) -> tuple[Array, float, float, float]:
    """Covariance (p, p) of θ, ρ and σ of AR(1) log errors along the curves, and the effective degrees of freedom."""
    x, loss = data.x, data.loss
    L, J = data.law.evaluate(theta[None], x, True)
    assert J is not None
    J, r = J[0] / L[0][:, None], np.log(L[0]) - np.log(loss)
    _, w = data.objective.derivatives(r, data.curve_weight)
    scale = np.sqrt(np.einsum("np,n,np->p", J, w, J) + penalty)
    scale = np.where(scale > 0, scale, 1.0)
    H = np.einsum("np,n,nq->pq", J, w, J) / np.outer(scale, scale) + np.diag(penalty / scale**2)
    values, vectors = np.linalg.eigh(H)
    kept = values > 1e-12 * values.max()
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T / np.outer(scale, scale)
    blocks = [np.flatnonzero(x.curve == c) for c in np.unique(x.curve)]
    ends = inverse @ (J * w[:, None]).T  # (p, n): how errors move θ
    measured = sum(float(r[b][1:] @ r[b][:-1]) for b in blocks) / max(float(r @ r), 1e-300)
    grid = np.concatenate([np.linspace(-0.5, 0.9, 29), 1 - np.geomspace(0.09, 0.002, 24)])
    moments = [_moments(rho, blocks, J, ends.T) for rho in grid]  # residuals are (I - J·ends) times errors
    ratios = np.array([lag / square for square, lag in moments])
    place = int(np.argmin(np.abs(ratios - measured)))
    rho, square = float(grid[place]), moments[place][0]
    sigma2 = float(r @ r) / max(square, 1e-9)
    spread = sum(ends[:, b] @ _toeplitz(rho, len(b)) @ ends[:, b].T for b in blocks)
    long_run = sigma2 * (1 + rho) / (1 - rho)
    covariance = sigma2 * spread + long_run * inverse @ np.diag(penalty) @ inverse
    # From n points the long-run variance σ²(1+ρ)/(1-ρ) is as uncertain as a variance from ν independent ones:
    # 2/ν = 4/(n(1-ρ²)) + 2/n.
    dof = max(len(loss) / (1 + 2 / (1 - rho**2)) - float(kept.sum()), 2.0)
    return covariance, rho, math.sqrt(sigma2), min(dof, 1e6)


@lru_cache(maxsize=128)
def _toeplitz(rho: float, n: int) -> Array:
    """(n, n) ρ^|i-j|."""
    k = np.arange(n)
    return np.asarray(np.sign(rho) ** np.abs(np.subtract.outer(k, k)) * np.abs(rho) ** np.abs(np.subtract.outer(k, k)))


def _moments(rho: float, blocks: Sequence[Array], left: Array, right: Array) -> tuple[float, float]:
    """E[Σ r²]/σ² and E[Σ r_i·r_{i-1}]/σ² of residuals r = (I - left·rightᵀ)·e, for AR(1) errors e of correlation ρ.

    With R the correlation of e, S the shift that pairs neighbours: tr(S·M·R·Mᵀ) with M = I - left·rightᵀ.
    """
    square = lag = 0.0
    inner = sum(right[b].T @ _toeplitz(rho, len(b)) @ right[b] for b in blocks)
    for b in blocks:
        R = _toeplitz(rho, len(b))
        moved, ends = R @ right[b], left[b]
        square += len(b) - 2 * float(np.sum(ends * moved)) + float(np.einsum("np,pq,nq->", ends, inner, ends))
        lag += (len(b) - 1) * rho - float(np.sum(ends[1:] * moved[:-1])) - float(np.sum(ends[:-1] * moved[1:]))
        lag += float(np.einsum("np,pq,nq->", ends[1:], inner, ends[:-1]))
    return square, lag
