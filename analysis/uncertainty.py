"""Uncertainty of a fit: intervals, bootstraps, and tests of whether the law has the right shape.

* `profile_intervals`: a parameter's interval ends where the best cost C over all other parameters rises to a threshold. It
  assumes no normality of θ and stops at bounds. With σ unknown the statistic is n·log(C/C_min) for least squares; for Huber it
  is 2·(C - C_min)·E[ρ'']/E[ρ'²], a likelihood ratio corrected for the misspecified noise (White 1982). The threshold makes the
  test Student's with n - p degrees of freedom, at every n: with the threshold of χ², intervals for small grids cover .87 to .90
  instead of .95.
* `bootstrap`: refits to log y* = log L̂ - v·r*, or y* = L̂ - v·r* where residuals are raw. "wild" draws one v per cluster (Wu
  1986; Cameron, Gelbach & Miller 2008), so that errors within a cluster (a scheme and size, or what the table names) stay
  correlated and every design point is kept; r* = (I - H_gg)⁻¹ r_g undoes what the fit took from the residuals of cluster g
  (CR3, Bell & McCaffrey 2002), times Student's over the normal quantile. v is normal: with signs ±1 the replicates of an eff
  that four clusters determine would be bounded, and its interval too narrow. "cases" redraws whole clusters, which makes
  parameters determined by a single cluster look too certain.
* `prediction_interval`: the interval of a new run's loss, from the bootstrap's spread and the noise of one run.
* `departures`, `contrasts`, `residual_trends`, `lack_of_fit`, `noise_floor`, `extrapolation`: whether the law's shape is right,
  and how far a question lies outside the data. Of several such tests, `holm` selects those that are significant together.

All intervals assume that the law is true. If the residuals have trends, intervals are too narrow; the held-out error and the
spread between laws (`choice`) show by how much.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .findings import Finding
from .fit_result import UNTRUSTED, Fit
from .identify import CONDITION_LIMIT, at_bound, sensitivity
from .laws import LawError
from .points import Points
from .shares import at_best_share
from .solver import CHI2_95, minimise

Array = np.ndarray


def unit_covariance(J: Array) -> Array:
    """(JᵀJ)⁻¹ (p, p) of a Jacobian (n, p): θ's covariance at a noise of one; zero for parameters that no loss depends on."""
    live = np.linalg.norm(J, axis=0) > 1e-10
    scale = np.linalg.norm(J[:, live], axis=0)
    out = np.zeros((J.shape[1], J.shape[1]))
    inverse = np.linalg.pinv((J[:, live] / scale).T @ (J[:, live] / scale), rcond=1e-13, hermitian=True)
    out[np.ix_(live, live)] = inverse / np.outer(scale, scale)
    return out


def covariance(fit: Fit) -> Array:
    """(p, p) covariance of θ from the Jacobian, s²(JᵀJ)⁻¹; zero for fixed parameters. Bounds are ignored."""
    return np.asarray(unit_covariance(sensitivity(fit)) * noise(fit) ** 2)


def noise(fit: Fit) -> float:
    """Standard deviation of the residuals: root mean square over n - p for least squares, 1.4826·median |r| for Huber."""
    dof = fit.n / max(fit.residual_dof, 1)
    if math.isinf(fit.objective.delta):
        return float(math.sqrt(np.sum(fit.points.weight * fit.residuals**2) / fit.n * dof))
    return float(1.4826 * np.median(np.abs(fit.residuals)) * math.sqrt(dof))


def statistic(fit: Fit, cost: Array) -> Array:
    """Likelihood-ratio statistic of constrained optima with these costs; it is compared with `threshold`."""
    if math.isinf(fit.objective.delta):
        return fit.n * np.log(np.maximum(cost, fit.cost) / max(fit.cost, 1e-300))
    return 2 * np.maximum(cost - fit.cost, 0) * huber_scale(fit)


BAND = 0.8  # standard deviations: the least half-width for measuring the density of errors at zero


def huber_scale(fit: Fit) -> float:
    """E[ρ'']/E[ρ'²] of the errors, which turns Huber's cost differences into a likelihood ratio (White 1982, one scalar for all
    θ).
    """
    curvature, square = huber_moments(fit)
    return curvature / square


def huber_moments(fit: Fit) -> tuple[float, float]:
    """E[ρ''] and E[ρ'²] of the errors of a Huber fit.

    Both moments are of the errors, not of the residuals: a fit with p parameters passes through about p of the points when δ
    is small, and these are left out of the count of small errors and of the n that it is divided by. Where δ is much below
    the noise, few errors lie within it, so their density is measured over a wider band.
    """
    size, delta = np.abs(fit.residuals), fit.objective.delta
    p, errors = int(fit.free.sum()), max(fit.residual_dof, 1)
    sd = 1.4826 * float(np.median(np.sort(size)[p:])) if fit.residual_dof > 1 else noise(fit)
    band = max(delta, BAND * sd)
    within = max(float(np.sum(size <= band)) - p, 1.0) / errors
    curvature = min(max(within * delta / band, 1 / fit.n), 1.0)
    return curvature, max(float(np.sum(np.minimum(size, delta) ** 2)) / errors, 1e-300)


def threshold(fit: Fit) -> float:
    """The value of the likelihood-ratio statistic beyond which a parameter value is excluded at 95 %."""
    if fit.residual_dof < 1:
        return CHI2_95
    t = student(fit)
    return float(fit.n * math.log1p(t**2 / fit.residual_dof)) if math.isinf(fit.objective.delta) else t**2


def student(fit: Fit) -> float:
    """97.5 % quantile of Student's t with the fit's residual degrees of freedom; inf without any."""
    from scipy.special import stdtrit

    return float(stdtrit(fit.residual_dof, 0.975)) if fit.residual_dof > 0 else math.inf


NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution
FLAT = 12.0  # a profile that stays below its threshold over this distance in a coordinate is flat


def profile_intervals(fit: Fit, names: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """95 % profile-likelihood intervals in natural units, all ends sought at once.

    An end is a bound if the data do not exclude the bound, and infinite if the profile stays flat over ±12 in the coordinate.
    """
    pick = [fit.index(n) for n in names] if names is not None else [int(i) for i in np.flatnonzero(fit.free)]
    index, side = np.repeat(np.array(pick, int), 2), np.tile([-1.0, 1.0], len(pick))
    if not pick:
        return {}
    bound = np.where(side < 0, fit.problem.lower[index], fit.problem.upper[index])
    room = np.abs(np.where(np.isfinite(bound), bound, fit.theta[index] + side * FLAT) - fit.theta[index])
    distance = _crossings(fit, index, side, room)
    ends = np.where(~np.isfinite(bound) & (distance >= room), side * math.inf, fit.theta[index] + side * distance)
    with np.errstate(over="ignore"):
        natural = [float(fit.coordinates[k].natural(end)) for k, end in zip(index, ends, strict=True)]
    return {fit.names[k]: (natural[2 * j], natural[2 * j + 1]) for j, k in enumerate(pick)}


def _crossings(fit: Fit, index: Array, side: Array, room: Array) -> Array:
    """Distance from θ at which the profile of coordinate `index` to `side` (−1, 1) reaches its threshold, at most `room`; (m,).

    A profile is followed from its last point inside, along the direction in which the other parameters give way.
    """
    lower, upper, reach = fit.problem.lower, fit.problem.upper, math.sqrt(threshold(fit))
    C = covariance(fit)
    spread = np.sqrt(np.maximum(np.diag(C), 0))[index]
    bracket = _Bracket.of(np.minimum(np.where(spread > 0, spread * reach, 0.1 * (1 + np.abs(fit.theta[index]))), room))
    # Parameters on a bound stay there: their rows of C say nothing about the interior.
    ridge = C[index] / np.maximum(np.diag(C)[index], 1e-300)[:, None]
    ridge[:, [fit.index(name) for name in at_bound(fit)]] = 0.0
    ridge[np.arange(len(index)), index] = 1.0
    best, base = np.tile(fit.theta, (len(index), 1)), np.zeros(len(index))
    answer = np.where(room == 0, 0.0, np.nan)
    for _ in range(24):
        todo = np.flatnonzero(np.isnan(answer))
        if not len(todo):
            break
        step, rows = bracket.step[todo], np.arange(len(todo))
        begin = np.clip(best[todo] + (side[todo] * (step - base[todo]))[:, None] * ridge[todo], lower, upper)
        begin[rows, index[todo]] = fit.theta[index[todo]] + side[todo] * step
        free = np.tile(fit.free, (len(todo), 1))
        free[rows, index[todo]] = False
        solutions = minimise(fit.problem, begin, free, iterations=120, tolerance=1e-9)
        root = np.sqrt(np.maximum(statistic(fit, solutions.cost), 0))
        inside = root < reach
        best[todo[inside]], base[todo[inside]] = solutions.theta[inside], step[inside]
        met = (np.abs(root - reach) < 0.004 * reach) | (inside & (step >= room[todo]))
        answer[todo[met]] = step[met]
        closed = bracket.narrow(todo, root, reach, room)
        answer[todo[closed]] = bracket.step[todo[closed]]
    return np.where(np.isnan(answer), bracket.step, answer)


@dataclasses.dataclass(frozen=True)
class _Bracket:
    """Brackets of the places where m profiles cross their threshold: `near` is inside, `far` outside or infinite, and `step` is
    tried next. The square root of the statistic, known at both ends, is nearly linear in the distance.
    """

    step: Array
    near: Array
    far: Array
    root_near: Array
    root_far: Array

    @classmethod
    def of(cls, step: Array) -> _Bracket:
        """Initial brackets, of which only 0 is known to lie inside."""
        return cls(step, np.zeros_like(step), np.full_like(step, np.inf), np.zeros_like(step), np.full_like(step, np.inf))

    def narrow(self, i: Array, root: Array, reach: float, room: Array) -> Array:
        """Update profiles i by the roots at their steps, and choose the next steps; returns which brackets are closed."""
        for ends, roots, here in ((self.near, self.root_near, root < reach), (self.far, self.root_far, root >= reach)):
            ends[i[here]], roots[i[here]] = self.step[i[here]], root[here]
        unbounded = np.isinf(self.far[i])
        wider = np.minimum(self.step[i] * np.clip(reach / np.maximum(root, 1e-9), 1.05, 4.0), room[i])
        near, far = self.near[i], np.where(unbounded, 0.0, self.far[i])
        width, slope = far - near, np.where(unbounded, 1.0, self.root_far[i] - self.root_near[i])
        guess = near + width * (reach - self.root_near[i]) / np.maximum(slope, 1e-12)
        within = np.minimum(np.maximum(guess, near + 0.05 * width), far - 0.05 * width)
        self.step[i] = np.where(unbounded, wider, within)
        return np.asarray(~unbounded & (width < 1e-3 * far))


def profile(fit: Fit, name: str, values: Array) -> Array:
    """(m,) likelihood-ratio statistic with a parameter held at each of `values` (natural units, ascending) and the rest
    refitted."""
    i = fit.index(name)
    theta = np.tile(fit.theta, (len(values), 1))
    free = np.tile(fit.free, (len(values), 1))
    theta[:, i], free[:, i] = [fit.coordinates[i].internal(v) for v in values], False
    return statistic(fit, minimise(fit.problem, theta, free, iterations=200, tolerance=1e-9).cost)


INTERVALS = {
    "profile": "95 % profile likelihood, residuals taken as independent",
    "cluster": "95 % wild bootstrap, residuals taken as shared within {}",
}
INTERVAL_REPLICATES = 1000  # replicates of the bootstrap behind "cluster"


def allows_intervals(fit: Fit) -> bool:
    """Whether the points determine the law and test it: intervals of any other fit would be wrong, however narrow."""
    tested = fit.residual_dof > 0 and not _too_few_clusters(fit)
    return fit.status not in (*UNTRUSTED, "evaluated") and not fit.condition > CONDITION_LIMIT and tested


def _too_few_clusters(fit: Fit) -> bool:
    """Whether the table names fewer clusters than there are parameters, which could then explain every shared error."""
    return bool(fit.points.cluster) and len(set(fit.points.cluster)) < int(fit.free.sum())


def with_intervals(fit: Fit, kind: str | None = None) -> Fit:
    """The fit with its 95 % intervals of a `kind` in INTERVALS; without any if `allows_intervals` is false.

    The default kind is "cluster" if the points name clusters, else "profile".

    If residuals are correlated within clusters, profile intervals are too narrow; a warning then names the other kind. Raises
    LawError for an unknown kind.
    """
    kind = kind or ("cluster" if fit.points.cluster else "profile")
    if kind not in INTERVALS:
        raise LawError(f"unknown intervals '{kind}'; choices: {', '.join(INTERVALS)}")
    if _too_few_clusters(fit):
        count, parameters = len(set(fit.points.cluster)), int(fit.free.sum())
        text = f"{count} clusters cannot test {parameters} parameters, so no number has an interval."
        return dataclasses.replace(fit, warnings=(*fit.warnings, Finding("few_clusters", text)))
    if not allows_intervals(fit):
        return fit
    warnings, within = fit.warnings, "a named cluster" if fit.points.cluster else "a scheme and size"
    if kind == "cluster":
        intervals = bootstrap(fit, INTERVAL_REPLICATES).intervals()
    else:
        intervals = profile_intervals(fit)
        p = clustering(fit)
        if p < CLUSTERED:
            text = f"Residuals resemble each other within {within} (p = {p:.2g}): use --intervals cluster."
            warnings = (*warnings, Finding("clustered_residuals", text, {"p": p}))
    return dataclasses.replace(fit, intervals=intervals, intervals_method=INTERVALS[kind].format(within), warnings=warnings)


CLUSTERED = 0.01  # p-value below which residuals are clustered
DRAWS = 999  # simulated residuals of `clustering`


def clustering(fit: Fit) -> float:
    """p-value of a test for correlation of residuals within `clusters`, against independent normal errors; NaN without repeats.

    The statistic is Σ_g (Σ_{i in g} r_i)² / Σ r². A fit removes from the residuals what its parameters can follow, mostly
    errors that clusters share. The statistic is therefore compared with that of simulated errors from which the same was
    removed.
    """
    place = clusters(fit)
    if len(np.unique(place)) == len(place):
        return math.nan
    basis, member = _reach(fit), (place[:, None] == np.arange(place.max() + 1)).astype(float)
    weight = np.sqrt(fit.objective.derivatives(fit.residuals, fit.points.weight)[1])
    drawn = np.random.default_rng(0).standard_normal((DRAWS, fit.n))
    r = np.concatenate([(fit.residuals * weight)[None], drawn])
    r = r - (r @ basis) @ basis.T
    values = np.sum((r @ member) ** 2, axis=1) / np.maximum(np.sum(r**2, axis=1), 1e-300)
    return float(np.mean(values >= values[0] * (1 - 1e-12)))


# ------------------------------------------------------------------------------------------------ bootstrap


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Refitted parameters, theta (B, p) in the solver's coordinates, of replicates drawn as `kind` says."""

    fit: Fit
    theta: Array
    kind: str

    def __len__(self) -> int:
        return len(self.theta)

    def values(self, name: str) -> Array:
        """(B,) replicates of a parameter in natural units."""
        i = self.fit.index(name)
        return np.asarray(self.fit.coordinates[i].natural(self.theta[:, i]))

    def interval(self, name: str) -> tuple[float, float]:
        """95 % percentile interval of a parameter."""
        return quantiles(self.values(name))

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % percentile intervals of all fitted parameters."""
        return {name: self.interval(name) for name, free in zip(self.fit.names, self.fit.free, strict=True) if free}

    def eff(self) -> Array | None:
        """(B, groups) eff of every scheme; None for laws without."""
        log_eff = self.fit.law.log_eff(self.theta, self.fit.design)
        return None if log_eff is None else np.exp(log_eff)


def quantiles(values: Array) -> tuple[float, float]:
    """The ends of the middle 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def leverage(fit: Fit) -> Array:
    """(n,) diagonal of the hat matrix over the fitted parameters that are not on a bound, at most .95 (a run that a
    parameter of its own fits exactly has 1).
    """
    return np.minimum(np.sum(_reach(fit) ** 2, axis=1), 0.95)


def _reach(fit: Fit) -> Array:
    """(n, rank) orthonormal basis of the changes of residuals by fitted parameters that are not on a bound."""
    bound = at_bound(fit)
    J = sensitivity(fit)[:, [free and name not in bound for name, free in zip(fit.names, fit.free, strict=True)]]
    basis, values, _ = np.linalg.svd(J / np.maximum(np.linalg.norm(J, axis=0), 1e-300), full_matrices=False)
    return basis[:, values > 1e-10 * values.max(initial=0.0)]


def clusters(fit: Fit) -> Array:
    """(n,) cluster of each row: the one that its table names, else its scheme and size."""
    if fit.points.cluster:
        return np.unique(fit.points.cluster, return_inverse=True)[1]
    _, place = np.unique(
        np.stack([fit.points.group, np.searchsorted(fit.points.sizes, fit.points.N)], axis=1), axis=0, return_inverse=True
    )
    return place.ravel()


def bootstrap(fit: Fit, replicates: int = 1000, *, kind: str = "wild", seed: int = 0) -> Bootstrap:
    """Refit to replicates of the data; the same seed gives the same replicates. LawError for an unknown kind, or
    for a fit without residuals to draw from."""
    if kind not in ("wild", "cases"):
        raise LawError(f"unknown bootstrap '{kind}'; choices: wild, cases")
    if fit.residual_dof < 1:
        raise LawError(
            f"{fit.n} points for {int(fit.free.sum())} parameters of law {fit.law.name} leave no residuals to draw from"
        )
    rng = np.random.default_rng(seed)
    place = clusters(fit)
    count = int(place.max()) + 1
    fitted = fit.objective.scaled(fit.points.loss) + fit.residuals
    residuals = _unfitted(fit, place)
    problem, out = fit.problem, []
    if kind == "wild":
        problem = dataclasses.replace(problem, objective=dataclasses.replace(fit.objective, delta=math.inf))
    for start in range(0, replicates, 250):  # bounded memory
        m = min(250, replicates - start)
        if kind == "wild":
            drawn = dataclasses.replace(problem, target=fitted - rng.standard_normal((m, count))[:, place] * residuals)
        else:
            times = rng.multinomial(count, np.full(count, 1 / count), size=m)[:, place]
            drawn = dataclasses.replace(problem, w=problem.w * times)
        free = np.tile(fit.free, (m, 1))
        if kind == "cases":
            for i, gone in _vanishing(fit, drawn.w > 0):
                free[:, i] &= ~gone
        out.append(minimise(drawn, np.tile(fit.theta, (m, 1)), free, iterations=100, tolerance=1e-8).theta)
    return Bootstrap(fit, np.concatenate(out), kind)


def _unfitted(fit: Fit, place: Array) -> Array:
    """(n,) residuals as if the fit had not followed each cluster: (I - H_gg)⁻¹ r_g, times t(n - p)/z.

    A run with a parameter of its own has no residual, but an error like all runs: it gets the noise.

    A Huber fit responds to ρ'(r)/E[ρ''], its influence function, as a least-squares fit responds to r. Least squares is
    therefore refitted to these values; replicates of Huber's own minimum would gather at the points through which it passes. As
    ρ' is bounded, a fit removes less from it: (I - H_gg)^-¾, between CR2 and CR3, gives the right coverage
    (benchmarks/coverage.py).
    """
    least_squares = math.isinf(fit.objective.delta)
    plain = fit if least_squares else dataclasses.replace(fit, objective=dataclasses.replace(fit.objective, delta=math.inf))
    reach, residuals = _reach(plain), np.array(fit.residuals)
    if not least_squares:
        residuals = np.clip(residuals, -fit.objective.delta, fit.objective.delta) / huber_moments(fit)[0]
    root = np.sqrt(fit.points.weight)
    residuals = residuals * root
    alone = np.sum(reach**2, axis=1) > 0.999
    for g in range(int(place.max()) + 1):
        rows = np.flatnonzero((place == g) & ~alone)
        remaining, basis = np.linalg.eigh(np.eye(len(rows)) - reach[rows] @ reach[rows].T)
        taken = np.maximum(remaining, 0.05) ** (1.0 if least_squares else 0.75)
        residuals[rows] = basis @ (basis.T @ residuals[rows] / taken)
    residuals[alone] = noise(fit)
    return np.asarray(residuals / root * student(fit) / NORMAL)


def _vanishing(fit: Fit, present: Array) -> list[tuple[int, Any]]:
    """Per-scheme coordinates and the replicates in which their scheme was not drawn."""
    coordinates = []
    for g, label in enumerate(fit.points.labels):
        gone = np.logical_not(present[:, fit.points.group == g].any(axis=1))
        coordinates += [(i, gone) for i, name in enumerate(fit.names) if name.partition(".")[2] == label]
    return coordinates


def prediction_interval(
    boot: Bootstrap, N: float, D: float, scheme: str | float, unique: float = math.inf, share: float | None = None
) -> tuple[float, float]:
    """95 % interval for the loss of one new run (nats/token) if the law is true: parameter spread and the noise of a run.
    `share`, of the tokens before quantization, matters to laws that include it; the default is the best share."""
    fit = boot.fit
    at = fit.design.at(np.array([N]), np.array([D]), np.array([fit.points.index(scheme)]), unique, share or 0.0)
    at = at_best_share(fit, fit.theta, at) if share is None else at
    scaled = fit.objective.scaled
    with np.errstate(all="ignore"):
        spread = float(np.std(scaled(fit.law.predict(boot.theta, at)[:, 0])))
    centre = float(scaled(fit.law.predict(fit.theta, at)[0, 0]))
    reach = math.hypot(NORMAL * spread, student(fit) * noise(fit))  # the replicates' spread already has Student's factor
    low, high = fit.objective.unscaled(np.array([centre - reach, centre + reach]))
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------ is the law's shape right?


@dataclasses.dataclass(frozen=True)
class Trend:
    """Residuals of one scheme: mean and root mean square, and the slope per factor e of N that the law misses, with its t-value
    and two-sided p-value; NaN if its runs do not determine it. The unit is that of the objective: relative, or nats/token.
    """

    scheme: str
    runs: int
    mean: float
    slope: float
    t: float
    p: float
    rms: float


def residual_trends(fit: Fit) -> list[Trend]:
    """Mean and slope of each scheme's residuals: under the right law the means are near zero and the slopes are noise."""
    slopes, t_values, p_values = departures(fit, _slopes(fit), together=True)
    residuals = [fit.residuals[fit.points.group == g] for g in range(len(fit.points.labels))]
    return [
        Trend(label, len(r), float(r.mean()), float(slope), float(t), float(p), float(np.sqrt(np.mean(r**2))))
        for label, r, slope, t, p in zip(fit.points.labels, residuals, slopes, t_values, p_values, strict=True)
    ]


def bent(fit: Fit) -> list[str]:
    """The schemes whose residuals are trends in N, most bits first.

    They are selected one by one, the most significant first, and the others are tested given those selected, because a scheme
    whose trend bends the fit causes trends in the residuals of the others.
    """
    columns, groups = _slopes(fit), list[int]()
    while holm(p := departures(fit, columns, together=True, beside=groups)[2]).any():
        groups.append(int(np.nanargmin(p)))
    return [fit.points.labels[g] for g in sorted(groups)]


def _slopes(fit: Fit) -> Array:
    """(n, groups) log N of the runs of each scheme."""
    return (fit.points.group[:, None] == np.arange(len(fit.points.labels))) * np.log(fit.points.N / fit.points.sizes[0])[
        :, None
    ]


EXACT = 1e-9  # relative precision of measured losses: smaller residuals are rounding


def departures(fit: Fit, columns: Array, *, together: bool = False, beside: Sequence[int] = ()) -> tuple[Array, Array, Array]:
    """Test whether the law lacks a term: for each of k columns (n, k), its coefficient in the residuals, t and two-sided p.

    This is the added-variable test (Cook & Weisberg 1982, §2.4): what the fitted parameters and the columns named by `beside`
    can explain is projected out of column and residuals. The noise is estimated over all runs from what the column, or all
    columns `together`, leave unexplained, with n - p - 1 or n - p - rank degrees of freedom. So a departure does not inflate
    the noise by which it is judged, and three runs of a scheme that happen to agree do not make it look large. NaN if the
    parameters can explain the whole column, or if no degrees of freedom remain.
    """
    from scipy.special import stdtr

    weight = np.sqrt(fit.objective.derivatives(fit.residuals, fit.points.weight)[1])
    x, r = columns * weight[:, None], fit.residuals * weight
    Q = _reach(fit)
    Q = np.linalg.qr(np.concatenate([Q, x[:, list(beside)]], axis=1))[0]
    rest, r = x - Q @ (Q.T @ x), r - Q @ (Q.T @ r)
    size = np.sum(rest**2, axis=0)
    size[size <= 1e-8 * np.sum(x**2, axis=0)] = math.nan
    slope = rest.T @ r / size
    rank, explained = 1, slope**2 * size
    if together:
        basis, values, _ = np.linalg.svd(rest, full_matrices=False)
        basis = basis[:, values > 1e-6 * values.max(initial=0.0)]
        rank, explained = basis.shape[1], np.sum((basis.T @ r) ** 2)
    dof = fit.n - Q.shape[1] - rank
    noise = np.sqrt(np.maximum((r @ r - explained) / dof, EXACT**2)) if dof > 0 else math.nan
    t = slope * np.sqrt(size) / noise
    return slope, t, 2 * stdtr(max(dof, 1), -np.abs(t))


def contrasts(fit: Fit, columns: Array) -> Array:
    """(k,) two-sided p of contrasts (n, k) of the residuals, if many runs may break the law at once.

    Such runs would pull a least-squares fit towards them and dominate its noise. So the residuals are those of a fit by Huber's
    ρ with δ at a tenth of the noise, nearly least absolute deviations. The noise is 1.4826 times the median of all but the p
    smallest |r|, whose efficiency of .37 leaves that share of n - p degrees of freedom (Rousseeuw & Croux 1993).
    """
    from scipy.special import stdtr

    robust = dataclasses.replace(fit, objective=dataclasses.replace(fit.objective, delta=max(noise(fit) / 10, EXACT)))
    robust = dataclasses.replace(robust, theta=minimise(robust.problem, fit.theta[None], fit.free).theta[0])
    spent = int(fit.free.sum())
    if fit.n - spent < 2:
        return np.full(columns.shape[1], math.nan)
    sd = max(1.4826 * float(np.median(np.sort(np.abs(robust.residuals))[spent:])), EXACT)
    t = columns.T @ robust.residuals / (np.linalg.norm(columns, axis=0) * sd)
    return np.asarray(2 * stdtr(max(0.37 * (fit.n - spent), 1), -np.abs(t)))


def holm(p: Array, level: float = 0.01) -> Array:
    """Which of several p-values are significant; the probability of any false positive is at most `level` (Holm 1979).

    NaN stands for a test that could not be made and does not count. The default level is one in a hundred, because a verdict
    makes several such tests.
    """
    p, out = np.asarray(p, float), np.zeros(np.shape(p), bool)
    order = np.argsort(p, kind="stable")[: int(np.sum(~np.isnan(p)))]
    for k, i in enumerate(order):
        if p[i] > level / (len(order) - k):
            break
        out[i] = True
    return out


def log_eff_gradient(fit: Fit) -> Array:
    """(groups, p) ∂ log eff / ∂θ of every scheme, by central differences. The law must have eff."""

    def log_eff(theta: Array) -> Array:
        value = fit.law.log_eff(theta, fit.design)
        assert value is not None
        return value

    step = 1e-5 * np.diag(1 + np.abs(fit.theta))
    return np.asarray(((log_eff(fit.theta + step) - log_eff(fit.theta - step)) / (2 * np.diag(step)[:, None])).T)


def eff_differences(fit: Fit, pairs: Sequence[tuple[str, str]]) -> tuple[Array, Array]:
    """For each pair of schemes, log eff of the second minus that of the first, and its two-sided p (Wald, n - p degrees)."""
    from scipy.special import stdtr

    first, second = (np.array([fit.points.labels.index(pair[i]) for pair in pairs], int) for i in (0, 1))
    value = fit.law.log_eff(fit.theta[None], fit.design)
    assert value is not None
    gradient, gain = log_eff_gradient(fit), value[0][second] - value[0][first]
    slope = gradient[second] - gradient[first]
    error = np.sqrt(np.einsum("kp,pq,kq->k", slope, covariance(fit), slope))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, gain / error, np.sign(gain) * math.inf)
    return gain, 2 * stdtr(max(fit.n - int(fit.free.sum()), 1), -np.abs(t))


def noise_floor(points: Points) -> tuple[float, int] | None:
    """(standard deviation of log loss between repeats of a cell, degrees of freedom); None if no cell was repeated."""
    return _between_repeats(points, np.log(points.loss))


def _between_repeats(points: Points, values: Array) -> tuple[float, int] | None:
    """Standard deviation of `values` (n,) within cells, with its degrees of freedom."""
    cell = points.cell
    times = np.bincount(cell)
    dof = int(np.sum(times - 1))
    if not dof:
        return None
    mean = np.bincount(cell, values) / times
    return float(np.sqrt(np.sum((values - mean[cell]) ** 2) / dof)), dof


def lack_of_fit(fit: Fit) -> tuple[float, float] | None:
    """(F, p-value) of the residuals against repeats of cells (pure error); None if no cell was repeated."""
    floor = _between_repeats(fit.points, fit.objective.scaled(fit.points.loss))
    if floor is None:
        return None
    from scipy.special import fdtrc

    pure, dof = floor[0] ** 2 * floor[1], floor[1]
    rest = fit.residual_dof - dof
    if rest < 1:
        return None
    F = (float(np.sum(fit.residuals**2)) - pure) / rest / max(pure / dof, 1e-300)
    return F, float(fdtrc(rest, dof, max(F, 0.0)))


def extrapolation(points: Points, N: float, D: float, scheme: str | float | None = None) -> dict[str, float]:
    """The factors by which a question lies outside the data in N, D and D/N (1 = inside), for the runs of one scheme or all."""
    rows = np.ones(len(points), bool) if scheme is None else points.group == points.index(scheme)
    out = {}
    for name, value, measured in (
        ("N", N, points.N[rows]),
        ("D", D, points.D[rows]),
        ("D/N", D / N, points.tokens_per_param[rows]),
    ):
        out[name] = float(max(value / measured.max(), measured.min() / value, 1.0))
    return out
