"""Laws of whole loss curves: the loss at a step from the learning rates up to it, each law with its Jacobian.

With η_t the learning rate of step t, S₁(t) = Σ_{τ≤t} η_τ, drops Δη_k = η_{k-1} - η_k, and S_k(t) = Σ_{k≤τ≤t} η_τ:

    power         L0 + A·S₁^-α                                               the baseline; right for a constant rate alone
    momentum      L0 + A·S₁^-α - C·Σ_k Δη_k·(1 - e^(-κ(t-k)))/κ, λ = e^-κ     Tissue et al., arXiv 2408.11029
    multi-power   L0 + A·S₁^-α - B·Σ_k Δη_k·(1 - (1 + C·η_k^-γ·S_k)^-β)       Luo et al., arXiv 2503.12811
    joint         E + A/(N·eff)^α + B/D̂^β - F·Σ_k Δη_k·(1 - (1 + C·η_k^-γ·S_k)^-δ),   D̂ = tokens · mean rate / peak rate

`joint` is a law over N, D and precision at once: its constant is that of a final-loss law, and without falls of the rate it is
that law. Drops are those after the warm-up; the warm-up enters S₁.

The laws are evaluated in units of their own, so that no number depends on those of steps and rates: η in units of the highest
rate η*, S in units of S*, S₁ at the end of the longest curve, and t in units of its steps. So A is the loss above L0 at S*, and
B the final gain of a rate that falls to zero, both in nats/token. `published` gives the units of the papers. For `joint` each
curve's rate is in units of its own peak, and its steps are tokens.

Shapes: n points, P pairs of a point and a drop before it, m parameter vectors. A fit costs O(m·P), P ≤ points · drops.
"""

# ruff: noqa: D102 - a law's methods are described once, in Law

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from .curves import Rates
from .laws import ALPHA, AMPLITUDE, BETA, FLOOR, INF, Design, Law, Param, _log, _plain, law_of
from .schemes import Scheme
from .tables import PointError

Array = np.ndarray
LEAST_RATE = 1e-3  # of the highest rate; in η^-γ, a rate that falls to zero counts as this


def _none() -> Array:
    return np.zeros(0)


@dataclasses.dataclass(frozen=True)
class CurveDesign(Design):
    """The places where a law of curves is evaluated: n points of several curves, and P pairs of a point and an earlier drop.

    log_sum (n,) is log S₁/S*; `point` (P,) the point of each pair, ascending; `drop` (P,) Δη/η*; log_rate (P,) log η_k/η*,
    log_since (P,) log S_k/S* and `age` (P,) the steps since the drop, in units of the longest curve. `curve` (n,) is the curve
    of each point. `extra` rows stand for the prior of a fit (`curve_fit.Ridged`).
    """

    log_sum: Array = dataclasses.field(default_factory=_none)
    point: Array = dataclasses.field(default_factory=_none)
    drop: Array = dataclasses.field(default_factory=_none)
    log_rate: Array = dataclasses.field(default_factory=_none)
    log_since: Array = dataclasses.field(default_factory=_none)
    age: Array = dataclasses.field(default_factory=_none)
    curve: Array = dataclasses.field(default_factory=_none)
    extra: int = 0

    def __len__(self) -> int:
        return len(self.group) + self.extra

    def total(self, pairs: Array) -> Array:
        """(m, P) values of pairs, summed over the drops before each point: (m, n)."""
        out = np.zeros((len(pairs), len(self.group)))
        if len(self.point):
            firsts = np.flatnonzero(np.concatenate([[True], self.point[1:] != self.point[:-1]]))
            out[:, self.point[firsts]] = np.add.reduceat(pairs, firsts, axis=1)
        return out


@dataclasses.dataclass(frozen=True)
class Scales:
    """The units of a fit: the highest rate η*, S* (rate · step), and the steps of the longest curve."""

    rate: float
    sum: float
    steps: float

    @classmethod
    def of(cls, rates: Sequence[Rates], last: Sequence[float]) -> Scales:
        """The units for schedules up to their last steps."""
        sums = [float(r.sum_at(np.array([step]))[0]) for r, step in zip(rates, last, strict=True)]
        return cls(max(r.peak for r in rates), max(sums), max(last))


def curve_design(
    rates: Sequence[Rates],
    steps: Sequence[Array],
    scales: Scales,
    *,
    N: Sequence[float] = (),
    group: Sequence[int] = (),
    schemes: tuple[Scheme, ...] = (),
) -> CurveDesign:
    """The design of points at `steps` of curves with these schedules, one after the other. The cost is O(points · drops).

    A drop between two knots falls at their middle, to the rate at the second.
    """
    columns: dict[str, list[Array]] = {k: [] for k in ("log_sum", "point", "drop", "log_rate", "log_since", "age", "curve")}
    n = 0
    for c, (schedule, step) in enumerate(zip(rates, steps, strict=True)):
        sums = schedule.sum_at(step)
        k = np.flatnonzero(np.diff(schedule.lr)) + 1
        k = k[k > schedule.warmup]
        middle, at = 0.5 * (schedule.sums[k] + schedule.sums[k - 1]), 0.5 * (schedule.step[k] + schedule.step[k - 1])
        since = sums[:, None] - middle
        t, d = np.nonzero(since > 1e-12 * scales.sum)
        columns["log_sum"].append(np.log(sums / scales.sum))
        columns["point"].append(t + n)
        columns["drop"].append((schedule.lr[k - 1] - schedule.lr[k])[d] / scales.rate)
        columns["log_rate"].append(np.log(np.maximum(schedule.lr[k] / scales.rate, LEAST_RATE))[d])
        columns["log_since"].append(np.log(since[t, d] / scales.sum))
        columns["age"].append((np.asarray(step)[t] - at[d]) / scales.steps)
        columns["curve"].append(np.full(len(step), c))
        n += len(step)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    which = joined["curve"]
    sizes = np.log(np.asarray(N or [1.0] * len(rates), float))[which]
    groups = np.asarray(group or [0] * len(rates))[which]
    tokens = joined["log_sum"] + math.log(scales.sum)
    return CurveDesign(sizes, tokens, groups, schemes or (None,), 0, *np.zeros((2, n)), **joined)  # type: ignore[arg-type]


class CurveLaw(Law):
    """A law of curves: a Law on a CurveDesign. in_auto is False, since these are no laws of final losses."""

    in_auto: ClassVar[bool] = False
    uses_D: ClassVar[bool] = False
    uses_scheme: ClassVar[bool] = False
    prior: ClassVar[dict[str, tuple[float, float]]] = {}  # parameter → natural value, standard deviation of its θ
    prior_source: ClassVar[str] = ""

    @abc.abstractmethod
    def published(self, theta: Array, scales: Scales) -> dict[str, float]:
        """The parameters in the units of the law's paper: rates and steps as the curves give them."""


LEVEL = Param("L0", 0.0, INF, unit="nats/token")
LIFT = Param("A", -30.0, 30.0, log=True, unit="nats/token")
GAIN = Param("B", -30.0, 10.0, log=True, unit="nats/token")
SHAPE = (  # of the multi-power law's G: C in units of 1/S*
    Param("C", -20.0, 40.0, log=True),
    Param("beta", math.log(0.01), math.log(20.0), log=True),
    Param("gamma", 0.0, 4.0),
)


class Power(CurveLaw):
    """L0 + A·S₁^-α: the law of a curve of constant rate, from which other laws subtract a gain."""

    name, equation, source = "power", "L0 + A·S1^-α", "baseline of arXiv 2503.12811"
    shared: ClassVar[tuple[Param, ...]] = (LIFT, ALPHA, LEVEL)
    searched: ClassVar[tuple[str, ...]] = ("alpha",)
    grid: ClassVar[tuple[Sequence[float], ...]] = (tuple(np.geomspace(0.05, 2.0, 20)),)

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        assert isinstance(x, CurveDesign)
        a, alpha, L0 = (theta[:, i : i + 1] for i in range(3))
        lift = np.exp(a - alpha * x.log_sum)
        L, columns = lift + L0, [lift, -lift * x.log_sum, np.ones_like(lift)]
        if theta.shape[1] > 3:
            amplitude = np.exp(theta[:, 3:4])
            total, slopes = self.gain(theta[:, 4:], x, need_jacobian)
            L = L - amplitude * total
            columns += [-amplitude * total, *(-amplitude * slope for slope in slopes)]
        return L, np.stack(columns, axis=2) if need_jacobian else None

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        assert isinstance(x, CurveDesign)
        lift = np.exp(-nu[:, :1] * x.log_sum)
        columns = [lift, np.ones_like(lift)]
        if nu.shape[1] > 1:  # the third is among the parameters that must be positive
            columns.insert(1, -self.gain(self._inner(nu[:, 1:]), x, False)[0])
        return np.stack(columns, axis=2), *_plain(y, len(nu))

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        if c.shape[1] == 2:
            return np.stack([_log(c[:, 0]), nu[:, 0], np.maximum(c[:, 1], 0)], axis=1)
        head = np.stack([_log(c[:, 0]), nu[:, 0], np.maximum(c[:, 2], 0), _log(c[:, 1])], axis=1)
        return np.concatenate([head, self._inner(nu[:, 1:])], axis=1)

    def gain(self, nu: Array, x: CurveDesign, need: bool) -> tuple[Array, list[Array]]:
        """(m, n) Σ_k Δη_k·G for the parameters ν of G, and its derivatives by their θ: zero and none, as this law has no G."""
        assert nu.shape[1] == 0, f"law {self.name} has parameters of a gain, but no gain"
        return np.zeros((len(nu), len(x))), []

    def _inner(self, nu: Array) -> Array:
        """The parameters of G as θ holds them."""
        return np.stack([np.log(v) if p.log else v for p, v in zip(self.shared[4:], nu.T, strict=True)], axis=1)

    def published(self, theta: Array, scales: Scales) -> dict[str, float]:
        values = {p.name: float(p.natural(t)) for p, t in zip(self.shared, theta, strict=True)}
        return {**values, "A": values["A"] * scales.sum ** values["alpha"]}


class Momentum(Power):
    """L0 + A·S₁^-α - C·S₂, S₂ the sum of a momentum of the drops that decays by λ a step."""

    name, equation, source = "momentum", "L0 + A·S1^-α - C·S2", "Tissue et al., arXiv 2408.11029"
    # κ of the longest curve: λ = .99 … .9999 a step for curves of 1e3 to 1e5 steps, and a decade more on both sides
    shared: ClassVar[tuple[Param, ...]] = (*Power.shared, GAIN, Param("kappa", math.log(0.1), math.log(1e5), log=True))
    searched: ClassVar[tuple[str, ...]] = ("alpha", "kappa")
    grid: ClassVar[tuple[Sequence[float], ...]] = (tuple(np.geomspace(0.1, 1.5, 8)), tuple(np.geomspace(1.0, 1e3, 9)))

    def gain(self, nu: Array, x: CurveDesign, need: bool) -> tuple[Array, list[Array]]:
        kappa = np.exp(nu[:, :1])
        left = np.exp(-kappa * x.age)
        total = x.total(x.drop * (1 - left))
        return total, [x.total(x.drop * kappa * x.age * left)] if need else []

    def published(self, theta: Array, scales: Scales) -> dict[str, float]:
        values = super().published(theta, scales)
        kappa = values.pop("kappa") / scales.steps
        return {**values, "C": values.pop("B") / scales.rate * kappa, "lambda": math.exp(-kappa)}


def _multi_power(inner: Array, x: CurveDesign, need: bool) -> tuple[Array, list[Array]]:
    """Σ_k Δη_k·(1 - (1 + C·η_k^-γ·S_k)^-β) for (m, 3) log C, log β, γ, and its derivatives by these."""
    c, beta, gamma = inner[:, :1], np.exp(inner[:, 1:2]), inner[:, 2:3]
    ratio = np.exp(np.minimum(c + x.log_since - gamma * x.log_rate, 300.0))
    log_grown = np.log1p(ratio)
    left = np.exp(-beta * log_grown)
    total = x.total(x.drop * (1 - left))
    if not need:
        return total, []
    by_c = x.drop * beta * left * (ratio / (1 + ratio))
    return total, [x.total(by_c), x.total(x.drop * beta * log_grown * left), x.total(-by_c * x.log_rate)]


class MultiPower(Power):
    """L0 + A·S₁^-α - B·Σ_k Δη_k·G(η_k^-γ·S_k), G(x) = 1 - (1 + C·x)^-β."""

    name, equation = "multi-power", "L0 + A·S1^-α - B·Σ Δη·(1 - (1 + C·η^-γ·S)^-β)"
    source = "Luo et al., arXiv 2503.12811"
    shared: ClassVar[tuple[Param, ...]] = (*Power.shared, GAIN, *SHAPE)
    searched: ClassVar[tuple[str, ...]] = ("alpha", "C", "beta", "gamma")
    grid: ClassVar[tuple[Sequence[float], ...]] = ((0.25, 0.45, 0.7), (30.0, 300.0, 3e3), (0.3, 0.8), (0.3, 0.7))
    # B of 363.8 nats per unit of rate at a highest rate of 3e-4. The widths were tuned on its 25M curves (docs/decisions.md).
    prior: ClassVar[dict[str, tuple[float, float]]] = {
        "alpha": (0.508, 0.01),
        "B": (0.109, 0.01),
        "C": (2700.0, 0.3),
        "beta": (0.583, 0.4),
        "gamma": (0.641, 0.2),
    }
    prior_source: ClassVar[str] = "the parameters published for 25M by arXiv 2503.12811"

    def gain(self, nu: Array, x: CurveDesign, need: bool) -> tuple[Array, list[Array]]:
        return _multi_power(nu, x, need)

    def published(self, theta: Array, scales: Scales) -> dict[str, float]:
        values = super().published(theta, scales)
        C = values["C"] * scales.rate ** values["gamma"] / scales.sum
        return {**values, "B": values["B"] / scales.rate, "C": C}


class Joint(CurveLaw):
    """E + A/(N·eff)^α + B/D̂^β - F·Σ_k Δη_k·G: a final-loss law minus the gain by falls of the rate."""

    name, equation = "joint", "E + A/(N·eff)^α + B/D̂^β - F·Σ Δη·(1 - (1 + C·η^-γ·S)^-δ)"
    source = "quest (arXiv 2502.05003) with the falls of the rate of arXiv 2503.12811"
    shared: ClassVar[tuple[Param, ...]] = (
        *(AMPLITUDE, ALPHA, Param("B", -300.0, 300.0, log=True), BETA, FLOOR),
        *(dataclasses.replace(GAIN, name="F"), SHAPE[0], dataclasses.replace(SHAPE[1], name="delta"), SHAPE[2]),
    )
    own: ClassVar[tuple[Param, ...]] = (Param("eff", -40.0, 40.0, log=True),)
    uses_D, uses_scheme = True, True
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "C")
    grid: ClassVar[tuple[Sequence[float], ...]] = (tuple(np.geomspace(0.05, 1.2, 8)),) * 2 + ((30.0, 3e3),)
    INNER = (math.log(0.583), 0.641)  # δ and γ at which the search begins

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        assert isinstance(x, CurveDesign)
        a, alpha, b, beta, E, f = (theta[:, i : i + 1] for i in range(6))
        size = x.log_N + self.block(theta, x)
        n_term, d_term, amplitude = np.exp(a - alpha * size), np.exp(b - beta * x.log_D), np.exp(f)
        total, slopes = _multi_power(theta[:, 6:9], x, need_jacobian)
        L = n_term + d_term + E - amplitude * total
        if not need_jacobian:
            return L, None
        shared = [n_term, -n_term * size, d_term, -d_term * x.log_D, np.ones_like(L), -amplitude * total]
        shared += [-amplitude * slope for slope in slopes]
        return L, self._jacobian(shared, [-alpha * n_term], x)

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        assert isinstance(x, CurveDesign)
        n_term, d_term = np.exp(-nu[:, :1] * (x.log_N - x.mean_N)), np.exp(-nu[:, 1:2] * (x.log_D - x.mean_D))
        inner = np.concatenate([np.log(nu[:, 2:3]), np.tile(self.INNER, (len(nu), 1))], axis=1)
        gain = -_multi_power(inner, x, False)[0]
        columns = [n_term[:, :, None] * x.onehot, d_term[:, :, None], gain[:, :, None], np.ones((*n_term.shape, 1))]
        return np.concatenate(columns, axis=2), *_plain(y, len(nu))

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        alpha, beta, k = nu[:, 0], nu[:, 1], len(x.schemes)
        level = _log(c[:, :k])
        a0 = level[:, x.reference]
        eff = -(np.delete(level, x.reference, axis=1) - a0[:, None]) / alpha[:, None]
        shared = [a0 + alpha * x.mean_N, alpha, _log(c[:, k]) + beta * x.mean_D, beta, np.maximum(c[:, k + 2], 0)]
        shared += [_log(c[:, k + 1]), np.log(nu[:, 2]), *(np.full(len(nu), v) for v in self.INNER)]
        return np.concatenate([np.stack(shared, axis=1), eff], axis=1)

    def log_eff(self, theta: Array, x: Design) -> Array | None:
        first = len(self.shared)
        return np.insert(theta[:, first : first + len(x.own)], x.reference, 0.0, axis=1)

    def published(self, theta: Array, scales: Scales) -> dict[str, float]:
        """C per token: its S is in units of S*."""
        values = {p.name: float(p.natural(t)) for p, t in zip(self.shared, theta[: len(self.shared)], strict=True)}
        return {**values, "C": values["C"] / scales.sum}


CURVE_LAWS: dict[str, CurveLaw] = {law.name: law for law in (MultiPower(), Momentum(), Power(), Joint())}


def get_curve_law(name: str | CurveLaw) -> CurveLaw:
    """The law of this name; LawError naming the choices."""
    return law_of(CURVE_LAWS, name, "law of curves")


def require_sizes(names: Sequence[str], N: Sequence[float], tokens: Sequence[float]) -> None:
    """Raises PointError if a curve lacks N or tokens, which the joint law needs."""
    for name, size, per_step in zip(names, N, tokens, strict=True):
        if not size > 0:
            raise PointError(f"law joint needs the N of the curve {name}", column="N")
        if not per_step > 0:
            raise PointError(f"law joint needs the tokens of the curve {name}", column="tokens")
