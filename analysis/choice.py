"""Which law to use: laws ranked by how well they predict runs that were held out, and how far the good ones disagree.

Two held-out errors, both root mean squares of log-residuals:
    leave-one-size-out   every size in turn is predicted from the others
    forward              the largest third of the sizes is predicted from the smaller ones: the use that laws are made for
A law is clearly worse if either error is more than twice the least of all laws. The others are ranked by AICc = n·log(Σr²/n) +
2k + 2k(k+1)/(n-k-1), which uses all runs at once: it finds a planted law more often than the held-out errors do, whose few
large sizes are noisy. A law is named as the winner only in two cases: both criteria agree and the runs tell it from every other
law with as few parameters (Vuong's z of the log-likelihoods, 1989); or its AICc is lower than that of every other law by more
than 10 (Burnham & Anderson 2002). With fewer than four sizes a held-out fit would rest on two sizes, too few for any law. Then
AICc alone ranks, and a law with 10 more is clearly worse. The spread between the laws that are not clearly worse is an
uncertainty that the interval of a single law does not show.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ..words import choices, few
from .findings import Finding
from .fit import fit_law, optimum
from .fit_result import Fit
from .laws import LAWS, LawError
from .objective import Objective
from .points import Points
from .tables import PointError

Array = np.ndarray
CLEARLY_WORSE = 2.0  # times the best held-out error
CLEARLY_WORSE_AICC = 10.0
# Least difference of AICc that tells two laws apart if the held-out errors agree: from 4 on a law has considerably less support
# (Burnham & Anderson 2002). Both criteria see the same noise: with a limit of 2, a law won that was not the planted one.
CLEAR_AICC = 4.0
TOLD_APART = 1.645  # Vuong's z, one-sided 95 %: wrong winners had z of .8 and 1.3 where AICc differed by 4 and 5


@dataclasses.dataclass(frozen=True)
class Score:
    """The errors of a law, relative (root mean square of log-residuals); `forward` is nan with fewer than three sizes.

    `held_out` (n,) are the log-residuals of runs predicted from the other sizes; nan if these cannot predict a run.
    """

    law: str
    fit: Fit
    in_sample: float
    leave_one_size_out: float
    forward: float
    aicc: float
    clearly_worse: bool = False
    held_out: Array = dataclasses.field(default_factory=lambda: np.zeros(0))


@dataclasses.dataclass(frozen=True)
class Choice:
    """Laws from best to worst, and those that could not be tried with the reason."""

    scores: tuple[Score, ...]
    skipped: dict[str, str]

    @property
    def least_held_out(self) -> str:
        """The law with the least geometric mean of the two held-out errors, or with the least AICc if neither was measured."""
        return min(self.scores, key=lambda s: (_held_out_merit(s), s.aicc)).law

    @property
    def clear(self) -> bool:
        """Whether the first law is the winner: it has the least held-out errors and an AICc that is lower than the others' by
        more than 4 and not by chance, or an AICc that is lower by more than 10. With fewer than four sizes only the latter
        counts.
        """
        first, others = self.scores[0], [s for s in self.scores[1:] if not s.clearly_worse]
        decisive = all(s.aicc - first.aicc > CLEARLY_WORSE_AICC for s in others)
        few = len(first.fit.points.sizes) < 4
        agreed = not few and self.least_held_out == first.law and all(_told_apart(first, s) for s in others)
        return decisive or agreed

    @property
    def finding(self) -> Finding:
        """Which law wins, or that none does."""
        first = self.scores[0].law
        numbers = {"law": first, "least_held_out": self.least_held_out, "clear": self.clear}
        if self.clear:
            return Finding("best_law", f"Of {len(self.scores)} laws, {first} describes these runs best.", numbers)
        close = [s.law for s in self.scores[1:] if not s.clearly_worse and s.aicc - self.scores[0].aicc <= CLEARLY_WORSE_AICC]
        rivals = list(dict.fromkeys([*([self.least_held_out] if self.least_held_out != first else []), *close]))
        text = f"No law is clearly best: {first} has the least AICc, but these runs do not tell it from {few(rivals, 3)}."
        return Finding("no_best_law", text, numbers | {"rivals": rivals})

    @property
    def best(self) -> Fit:
        """The fit of the best law."""
        return self.scores[0].fit

    @property
    def rivals(self) -> tuple[Fit, ...]:
        """Fits of the laws that are not clearly worse, the best first."""
        return tuple(s.fit for s in self.scores if not s.clearly_worse)

    def spread(self, N: float, D: float, scheme: str | float | None = None) -> dict[str, float]:
        """Predicted loss (nats/token) of each law that is not clearly worse."""
        return {fit.law.name: float(fit.predict(N, D, scheme)) for fit in self.rivals}

    def to_dict(self) -> dict[str, object]:
        """Numbers for JSON."""
        shown = [f.name for f in dataclasses.fields(Score) if f.name not in ("fit", "held_out")]
        rows = [{name: getattr(s, name) for name in shown} for s in self.scores]
        return {"laws": rows, "skipped": self.skipped, "clearly_worse_beyond": CLEARLY_WORSE, "clear": self.clear}


def held_out(points: Points, law: str, test: Array, objective: Objective | None = None) -> Array:
    """Log-residuals of the rows in `test` (boolean), predicted from those that share no cluster with them; rows whose scheme
    these lack are left out."""
    rest = ~points.beside(test)
    train, rows = points.subset(rest), np.flatnonzero(test & np.isin(points.group, points.group[rest]))
    if not len(rows):
        return np.zeros(0)
    fit, _ = optimum(train, law, objective=objective, n_starts=6)
    place = {label: i for i, label in enumerate(train.labels)}
    group = np.array([place[points.labels[g]] for g in points.group[rows]], int)
    at = fit.design.at(points.N[rows], points.D[rows], group, points.unique[rows], points.share[rows])
    L = fit.law.predict(fit.theta, at)[0]
    return np.log(L) - np.log(points.loss[rows])


def rms(r: Array) -> float:
    """Root mean square; nan of nothing."""
    return float(np.sqrt(np.mean(r**2))) if len(r) else math.nan


def largest_sizes(points: Points) -> Array:
    """Rows (boolean) of the largest third of the sizes; none where fewer than three sizes would be left to fit."""
    count = max(len(points.sizes) // 3, 1)
    if len(points.sizes) - count < 2:
        return np.zeros(len(points), bool)
    return points.sizes[-count] <= points.N


def score(points: Points, law: str, *, objective: Objective | None = None) -> Score:
    """A law's errors in and out of sample on these points."""
    fit = fit_law(points, law, objective=objective)
    residuals = np.full(len(points), math.nan)
    for n in points.sizes if len(points.sizes) > 1 else ():
        test = np.equal(points.N, n)
        residuals[test & np.isin(points.group, points.group[~points.beside(test)])] = held_out(points, law, test, objective)
    last = largest_sizes(points)
    k = int(fit.free.sum()) + 1
    room = fit.n - k - 1
    aicc = (
        fit.n * math.log(max(float(np.mean(fit.residuals**2)), 1e-300))
        + 2 * k
        + (2 * k * (k + 1) / room if room > 0 else math.inf)
    )
    forward = rms(held_out(points, law, last, objective)) if last.any() else math.nan
    return Score(law, fit, fit.rms, rms(residuals[~np.isnan(residuals)]), forward, aicc, held_out=residuals)


def alternatives(fit: Fit) -> tuple[Fit, ...]:
    """The fit, and fits of the other laws whose error on its points is at most CLEARLY_WORSE times the least.

    Errors are in sample, over the residual degrees of freedom. This quick look at how far laws disagree takes a sixth of the
    work of `choose`. Returns only the fit if it holds parameters fixed or has no residual degrees of freedom.
    """
    points = fit.points
    if fit.fixed or fit.residual_dof < 1:
        return (fit,)
    others = []
    for law in LAWS.values():
        if law.name == fit.law.name or not law.suits(points):
            continue
        try:
            other = optimum(points, law, objective=fit.objective, n_starts=6)[0]
        except PointError:
            continue
        if other.status != "failed" and other.residual_dof > 0:
            others.append(other)
    least = min(f.sigma for f in (fit, *others))
    return (fit, *(f for f in others if f.sigma <= CLEARLY_WORSE * least))


def choose(points: Points, laws: Sequence[str] = (), *, objective: Objective | None = None) -> Choice:
    """All laws that these points allow, ranked as this module says. PointError if none can be fitted."""
    tried, skipped = [], {}
    for name in laws or LAWS:
        law = LAWS.get(name)
        if law is None:
            raise LawError(f"unknown law '{name}'; choices: {choices(LAWS, name)}")
        if not laws and not law.suits(points):
            continue
        try:
            tried.append(score(points, name, objective=objective))
        except PointError as error:
            skipped[name] = str(error)
    if not tried:
        raise PointError("no law can be fitted to these points: " + "; ".join(f"{k}: {v}" for k, v in skipped.items()))
    least = min(s.aicc for s in tried)
    if len(points.sizes) < 4:
        worse = {s.law: s.aicc - least > CLEARLY_WORSE_AICC for s in tried}
    else:
        errors = {s.law: np.log(np.maximum([s.leave_one_size_out, s.forward], 1e-12)) for s in tried}
        best = np.min(list(errors.values()), axis=0)
        worse = {name: bool(np.max(e - best) > math.log(CLEARLY_WORSE)) for name, e in errors.items()}
    ranked = sorted(tried, key=lambda s: (worse[s.law], s.aicc))
    return Choice(tuple(dataclasses.replace(s, clearly_worse=worse[s.law]) for s in ranked), skipped)


def _told_apart(first: Score, other: Score) -> bool:
    """Whether the runs prefer the first law: by AICc, and against a law with no more parameters also by Vuong's z.

    z = Σ m/(√n·sd m), m (n,) the differences of the runs' log-likelihoods, each law with its own variance.
    """
    if other.aicc - first.aicc <= CLEAR_AICC:
        return False
    if other.fit.free.sum() > first.fit.free.sum():
        return True  # with more parameters it may fit noise, which AICc accounts for and likelihoods do not
    m = _log_likelihoods(first.fit) - _log_likelihoods(other.fit)
    return float(m.sum()) >= TOLD_APART * math.sqrt(len(m)) * float(m.std())


def _log_likelihoods(fit: Fit) -> Array:
    """(n,) normal log-likelihoods of the runs, without the constant."""
    variance = max(float(np.mean(fit.residuals**2)), 1e-300)
    return -0.5 * (np.log(variance) + fit.residuals**2 / variance)


def _held_out_merit(s: Score) -> float:
    """Geometric mean of the held-out errors, inf if one is missing."""
    errors = np.log(np.maximum([s.leave_one_size_out, s.forward], 1e-12))
    return math.inf if np.isnan(errors).any() else float(np.mean(errors))
