"""Scaling laws of the loss L(N, D, scheme; θ), each with its Jacobian and the linear problem that starts its fit.

    quest       A/(N·eff_g)^α + B/D^β + E                        QuEST, arXiv 2502.05003
    unified     as quest, eff a function of the format's Gaussian MSE     arXiv 2506.01863
    eff-nd      A/(N·effN_g)^α + B/(D·effD_g)^β + E              Quartet, arXiv 2505.14669
    quartet     (A/(N·eff_g)^α + B/D^β)^γ + E                    Quartet
    qat         A/N^α + B/D^β + E + k_g·D^γD/N^γN                Chen et al. 2025, arXiv 2505.14302
    offset      A/N^α + B/D^β + E + δ_g
    kumar       quest with eff = (1-e^(-Pw/γw))·(1-e^(-Pa/γa))   arXiv 2411.04330
    kumar-offset  kumar, bits counted from an offset: P - o
    chinchilla  A/N^α + B/D^β + E                                arXiv 2203.15556, 2404.10102
    repeated    quest with D' = U·(1 + R_D·(1-e^(-R/R_D))) for D, R = D/U - 1     Muennighoff et al., arXiv 2305.16264
    repeated-nd  repeated, and N likewise beyond the best size for U tokens
    switch      A/N^α + B/D^β + E + δ(N, b, S_fp, S_qat)         Apple 2025, arXiv 2509.22935
    switch-eff  quest with eff^m, m = q^τ + c·S_fp^ξ/S_qat^ω     this project
    overtrain   E + (a·M^η + b·M^-η)·C^-η, M = D/N, C = 6ND      Gadre et al., arXiv 2403.08540
    coverage    exp(a·k^-b): solved share after k samples        Large Language Monkeys, arXiv 2407.21787

Units: N parameters without embeddings and head, D tokens, U ≤ D distinct tokens among them, L nats/token, b bits per weight;
S_fp and S_qat tokens per byte of parameters, D_fp/(N·b/8) before and D_qat/(N·b/8) after quantization began, q = D_qat/D; eff
has no unit; A and B have the units that make their terms nats/token.

Shapes: n points, m parameter vectors evaluated at once, p parameters:  θ_MP, L_MN, J_MNP = ∂L/∂θ.
θ holds the logarithm of parameters that are positive and can range over decades (A, B, eff, k); `Param.log` marks them.

Every law but `quartet` is linear in its amplitudes once its exponents ν are chosen (variable projection, Golub & Pereyra
1973): `linear` returns those columns, `assemble` turns exponents and amplitudes into θ. A start is then one small linear
least-squares problem, and a global search is a grid over two to four exponents, or a sample over more. A new law is one class
and a line in LAWS.
"""

# ruff: noqa: D102 - a law's methods are described once, in Law

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar, TypeVar

import numpy as np

from ..words import choices
from .plausible import EPOCHS
from .points import Points
from .schemes import Scheme
from .tables import PointError

Array = np.ndarray
INF = math.inf
TINY = 1e-12


class LawError(ValueError):
    """A request that a law cannot answer: an unknown law, a parameter it lacks, or points without the columns it needs."""


@dataclasses.dataclass(frozen=True)
class Param:
    """One coordinate of θ: its name, bounds (in θ's own coordinate), unit, and whether θ holds its logarithm."""

    name: str
    lower: float = -INF
    upper: float = INF
    log: bool = False
    unit: str = ""

    def natural(self, theta: Array | float) -> Array:
        """θ's coordinate → the natural value."""
        return np.exp(theta) if self.log else np.asarray(theta)

    def internal(self, value: float) -> float:
        """The natural value → θ's coordinate. Raises LawError if its logarithm does not exist."""
        if self.log and value <= 0:
            raise LawError(f"{self.name} = {value:g}: must be positive")
        return math.log(value) if self.log else float(value)


@dataclasses.dataclass(frozen=True)
class Design:
    """The places where a law is evaluated: log N and log D (n,), the scheme of each row, the index of the reference scheme,
    `repeats` (n,), how often the tokens are read again after the first pass, and `share` (n,) or (m, n), the part of the tokens
    that a quantized run read before quantization began.

    `slot[i]` is the index of row i's scheme among those with parameters of their own, -1 for the reference (eff = 1).
    """

    log_N: Array
    log_D: Array
    group: Array
    schemes: tuple[Scheme, ...]
    reference: int
    repeats: Array
    share: Array

    @classmethod
    def of(cls, points: Points) -> Design:
        """The design of measured points; the reference is the unquantized scheme, or else the one with the most bits."""
        return cls(np.log(points.N), np.log(points.D), points.group, points.schemes, 0, points.repeats, points.share)

    def at(self, N: Array, D: Array, group: Array, unique: Array | float = INF, share: Array | float = 0.0) -> Design:
        """The same schemes at other N and D, with at most `unique` distinct tokens (by default all are distinct) and a `share`
        of the tokens before quantization (by default none)."""
        N, D, group, unique, share = np.broadcast_arrays(
            np.asarray(N, float), np.asarray(D, float), np.asarray(group), unique, np.asarray(share, float)
        )
        repeats = np.fmax(D / unique - 1, 0.0)
        return dataclasses.replace(
            self,
            log_N=np.log(N).ravel(),
            log_D=np.log(D).ravel(),
            group=group.ravel(),
            repeats=repeats.ravel(),
            share=share.ravel(),
        )

    def __len__(self) -> int:
        return len(self.group)

    def rows(self, index: Array) -> Design:
        """Some of the rows, by their indices."""
        columns = {name: getattr(self, name)[index] for name in ("log_N", "log_D", "group", "repeats", "share")}
        return dataclasses.replace(self, **columns)

    @cached_property
    def distinct(self) -> tuple[Array, Array]:
        """The indices of the first rows of each kind, (k,), and for each row the kind that it repeats, (n,)."""
        columns = np.stack([self.group, self.log_N, self.log_D, self.repeats, self.share], axis=1)
        _, first, kind = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        return first, kind.ravel()

    @cached_property
    def slot(self) -> Array:
        place = np.array([i - (i > self.reference) for i in range(len(self.schemes))])
        place[self.reference] = -1
        return place[self.group]

    @cached_property
    def own(self) -> tuple[Scheme, ...]:
        """Schemes with parameters of their own, in slot order."""
        return tuple(s for i, s in enumerate(self.schemes) if i != self.reference)

    @cached_property
    def onehot(self) -> Array:
        """(n, groups) membership, all schemes."""
        return np.equal.outer(self.group, np.arange(len(self.schemes))).astype(float)

    @cached_property
    def own_onehot(self) -> Array:
        """(n, slots) membership; a reference row is all zero."""
        return np.equal.outer(self.slot, np.arange(len(self.own))).astype(float)

    @cached_property
    def mean_N(self) -> float:
        return float(self.log_N.mean())

    @cached_property
    def mean_D(self) -> float:
        return float(self.log_D.mean())

    def per_row(self, field: str) -> Array:
        """An attribute of each row's scheme, shape (n,)."""
        return np.array([getattr(s, field) for s in self.schemes], float)[self.group]

    @cached_property
    def log_S(self) -> Array:
        """(n,) logarithm of the tokens per byte of parameters, D/(N·b/8) (arXiv 2509.22935)."""
        return self.log_D - self.log_N + np.log(8 / self.per_row("w_grid_bits"))


# A logarithm of 300 is far beyond any term and keeps exp finite; an eff of e^±40 is not determined by the runs.
AMPLITUDE = Param("A", -300.0, 300.0, log=True)
ALPHA, BETA = Param("alpha", 1e-4, 4.0), Param("beta", 1e-4, 4.0)
TOKENS = Param("B", -300.0, 300.0, log=True)
FLOOR = Param("E", 0.0, INF, unit="nats/token")
SUM_OF_POWERS = (AMPLITUDE, ALPHA, TOKENS, BETA, FLOOR)


def _powers(nu: Array, x: Design) -> tuple[Array, Array]:
    """(m, n) centred powers (N/N₀)^-ν₀ and (D/D₀)^-ν₁, N₀ and D₀ the geometric means."""
    return np.exp(-nu[:, :1] * (x.log_N - x.mean_N)), np.exp(-nu[:, 1:2] * (x.log_D - x.mean_D))


def _log(c: Array) -> Array:
    return np.log(np.maximum(c, TINY))


@dataclasses.dataclass(frozen=True)
class Law(abc.ABC):
    """A law of the loss. It has no state: θ is always passed in."""

    name: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    shared: ClassVar[tuple[Param, ...]]  # parameters that all schemes share, first in θ
    own: ClassVar[tuple[Param, ...]] = ()  # per-scheme parameters, e.g. eff; blocks after the shared ones
    uses_D: ClassVar[bool] = True
    uses_scheme: ClassVar[bool] = True
    uses_repeats: ClassVar[bool] = False  # depends on how often tokens were read again
    uses_share: ClassVar[bool] = False  # depends on the share of tokens before quantization
    one_per_width: ClassVar[bool] = False  # distinguishes schemes only by the bits of their weights
    uses_mse: ClassVar[bool] = False  # eff follows from the errors of the grids, so that a format without runs has one
    counterpart: ClassVar[str] = ""  # if eff follows from the format: the law with a free eff for each scheme
    sign_free: ClassVar[bool] = False  # per-scheme amplitudes may be negative
    in_auto: ClassVar[bool] = True  # compared if no law is named; laws of other quantities than the loss are not
    grid: ClassVar[tuple[Sequence[float], ...]]  # values of the exponents ν whose product is the global search
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta")  # the shared parameters that ν stands for, a column each

    def params(self, schemes: Sequence[Scheme], reference: int = 0) -> tuple[Param, ...]:
        """The parameters in θ's order; per-scheme ones are named `eff.w4a4`."""
        own = [
            dataclasses.replace(p, name=f"{p.name}.{s.label}")
            for p in self.own
            for i, s in enumerate(schemes)
            if i != reference
        ]
        return self.shared + tuple(own)

    def block(self, theta: Array, x: Design, which: int = 0) -> Array:
        """(m, n) value of the `which`-th per-scheme parameter at each row; 0 (its neutral value) for the reference."""
        first, k = len(self.shared) + which * len(x.own), len(x.own)
        padded = np.concatenate([theta[:, first : first + k], np.zeros((len(theta), 1))], axis=1)
        return padded[:, x.slot]  # slot -1 is the padding

    def predict(self, theta: Array, x: Design) -> Array:
        """L of shape (m, n) in nats/token for θ of shape (m, p)."""
        return self.evaluate(np.atleast_2d(theta), x, False)[0]

    def jacobian(self, theta: Array, x: Design) -> Array:
        """∂L/∂θ of shape (m, n, p)."""
        J = self.evaluate(np.atleast_2d(theta), x, True)[1]
        assert J is not None
        return J

    @abc.abstractmethod
    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        """(L_MN, J_MNP or None)."""

    def exponents(self, y: Array) -> Array:
        """Exponents of the global search, (m, q): the product of `grid`."""
        return np.stack([axis.ravel() for axis in np.meshgrid(*self.grid, indexing="ij")], axis=1).astype(float)

    def limit_exponents(self, nu: Array, y: Array) -> Array:
        """Exponents (m, q) after a random move, moved back to where this law can be evaluated on losses y (n,)."""
        return nu

    @abc.abstractmethod
    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        """For exponents ν (m, q) and losses y (n,): columns (m, n, k), target (m, n), row weight (m, n) of the linear
        problem."""

    @abc.abstractmethod
    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        """θ (m, p) from exponents (m, q) and amplitudes (m, k)."""

    def check(self, points: Points) -> None:
        """Raises PointError if the points lack values that this law needs."""
        if self.uses_D and np.isnan(points.D).any():
            raise PointError(f"law {self.name} needs the training tokens; name their column by --map D=COLUMN", column="D")

    def suits(self, points: Points) -> bool:
        """Whether the law is compared with others if no law is named."""
        late = not self.uses_share or len(points.shares) > 1
        return self.in_auto and late and self.uses_scheme == (len(points.schemes) > 1)

    def undetermined(self, points: Points) -> dict[str, str]:
        """Parameters that these points cannot determine, with the reason: they are held at θ = 0 and get no number."""
        return {}

    def log_eff(self, theta: Array, x: Design) -> Array | None:
        """(m, groups) log of the parameter efficiency of each scheme; None for laws without eff."""
        return None

    def _jacobian(self, shared: Sequence[Array], own: Sequence[Array], x: Design) -> Array:
        """Lay out J: one (m, n) column per shared parameter, one (m, n) derivative per block of per-scheme parameters."""
        m, n = np.broadcast_shapes(*(c.shape for c in [*shared, *own]))
        s, k = len(shared), len(x.own)
        J = np.zeros((m, n, s + k * len(own)))
        for i, column in enumerate(shared):
            J[:, :, i] = column
        rows = np.flatnonzero(x.slot >= 0)
        for b, column in enumerate(own):
            J[:, rows, s + b * k + x.slot[rows]] = column[:, rows]
        return J


def _plain(y: Array, m: int) -> tuple[Array, Array]:
    """Target and weight of a law that is linear in its amplitudes; the relative error approximates the log-residual."""
    return np.broadcast_to(y, (m, len(y))), np.broadcast_to(1 / y, (m, len(y)))


# Exponents from a twentieth of to three times the values found in practice (.05 … 1).
_EXPONENTS = tuple(np.geomspace(0.02, 1.6, 12))
_FEW = tuple(np.geomspace(0.03, 1.2, 7))
_PASSES = (math.log(0.1), math.log(1e4))  # bounds of R_D and R_N: a tenth of a pass; so many that repeats lose nothing


class Quest(Law):
    """A/(N·eff_g)^α + B/D^β + E, eff(reference) = 1."""

    name, equation, source = "quest", "A/(N·eff)^α + B/D^β + E", "QuEST, arXiv 2502.05003"
    shared: ClassVar[tuple[Param, ...]] = SUM_OF_POWERS
    own: ClassVar[tuple[Param, ...]] = (Param("eff", -40.0, 40.0, log=True),)
    grid: ClassVar[tuple[Sequence[float], ...]] = (_EXPONENTS, _EXPONENTS)

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E = (theta[:, i : i + 1] for i in range(5))
        size = x.log_N + self.block(theta, x)
        n_term, d_term = np.exp(a - alpha * size), np.exp(b - beta * x.log_D)
        L = n_term + d_term + E
        if not need_jacobian:
            return L, None
        return L, self._jacobian([n_term, -n_term * size, d_term, -d_term * x.log_D, np.ones_like(L)], [-alpha * n_term], x)

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        n_term, d_term = _powers(nu, x)
        columns = np.concatenate([n_term[:, :, None] * x.onehot, d_term[:, :, None], np.ones((*n_term.shape, 1))], axis=2)
        return columns, *_plain(y, len(nu))

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        alpha, beta, k = nu[:, 0], nu[:, 1], len(x.schemes)
        level = _log(c[:, :k])
        a0 = level[:, x.reference]
        eff = -(np.delete(level, x.reference, axis=1) - a0[:, None]) / alpha[:, None]
        shared = [a0 + alpha * x.mean_N, alpha, _log(c[:, k]) + beta * x.mean_D, beta, np.maximum(c[:, k + 1], 0)]
        return np.concatenate([np.stack(shared, axis=1), eff], axis=1)

    def log_eff(self, theta: Array, x: Design) -> Array | None:
        """The per-scheme block, with 0 for the reference."""
        return _insert_reference(theta[:, len(self.shared) : len(self.shared) + len(x.own)], x)


def _insert_reference(block: Array, x: Design) -> Array:
    return np.insert(block, x.reference, 0.0, axis=1)


class EffND(Quest):
    """A/(N·effN_g)^α + B/(D·effD_g)^β + E: a format may cost parameters and data."""

    name, equation, source = "eff-nd", "A/(N·eff)^α + B/(D·effD)^β + E", "Quartet, arXiv 2505.14669"
    own: ClassVar[tuple[Param, ...]] = (Param("eff", -40.0, 40.0, log=True), Param("effD", -14.0, 5.0, log=True))

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E = (theta[:, i : i + 1] for i in range(5))
        size, tokens = x.log_N + self.block(theta, x), x.log_D + self.block(theta, x, 1)
        n_term, d_term = np.exp(a - alpha * size), np.exp(b - beta * tokens)
        L = n_term + d_term + E
        if not need_jacobian:
            return L, None
        shared = [n_term, -n_term * size, d_term, -d_term * tokens, np.ones_like(L)]
        return L, self._jacobian(shared, [-alpha * n_term, -beta * d_term], x)

    def undetermined(self, points: Points) -> dict[str, str]:
        few = (s.label for g, s in enumerate(points.schemes) if g and len(points.subset(points.group == g).ratios) < 2)
        return dict.fromkeys((f"effD.{label}" for label in few), "D/N does not vary in the runs of its scheme")

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        n_term, d_term = _powers(nu, x)
        columns = [n_term[:, :, None] * x.onehot, d_term[:, :, None] * x.onehot, np.ones((*n_term.shape, 1))]
        return np.concatenate(columns, axis=2), *_plain(y, len(nu))

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        k, r = len(x.schemes), x.reference
        n_level, d_level = _log(c[:, :k]), _log(c[:, k : 2 * k])
        shared = np.stack(
            [
                n_level[:, r] + nu[:, 0] * x.mean_N,
                nu[:, 0],
                d_level[:, r] + nu[:, 1] * x.mean_D,
                nu[:, 1],
                np.maximum(c[:, 2 * k], 0),
            ],
            axis=1,
        )
        eff = [
            -(np.delete(level, r, axis=1) - level[:, r : r + 1]) / e
            for level, e in ((n_level, nu[:, :1]), (d_level, nu[:, 1:2]))
        ]
        return np.concatenate([shared, eff[0], np.clip(eff[1], -14.0, 5.0)], axis=1)


class Quartet(Quest):
    """(A/(N·eff_g)^α + B/D^β)^γ + E. Not linear in E: E and γ join the exponents of the search."""

    name, equation, source = "quartet", "(A/(N·eff)^α + B/D^β)^γ + E", "Quartet, arXiv 2505.14669"
    shared: ClassVar[tuple[Param, ...]] = (*SUM_OF_POWERS, Param("gamma", 0.02, 5.0))
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "gamma", "E")
    grid: ClassVar[tuple[Sequence[float], ...]] = (
        tuple(np.geomspace(0.1, 2.5, 7)),
        tuple(np.geomspace(0.1, 2.5, 7)),
        (0.15, 0.25, 0.4, 0.7, 1.0),
        (0.0, 0.25, 0.5, 0.7, 0.85),
    )

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E, gamma = (theta[:, i : i + 1] for i in range(6))
        size = x.log_N + self.block(theta, x)
        n_term, d_term = np.exp(a - alpha * size), np.exp(b - beta * x.log_D)
        inner = n_term + d_term
        outer = inner**gamma
        L = outer + E
        if not need_jacobian:
            return L, None
        slope = gamma * outer / inner
        shared = [
            slope * n_term,
            -slope * n_term * size,
            slope * d_term,
            -slope * d_term * x.log_D,
            np.ones_like(L),
            outer * np.log(inner),
        ]
        return L, self._jacobian(shared, [-alpha * slope * n_term], x)

    def exponents(self, y: Array) -> Array:
        """The product of the grid, E as a share of the lowest loss."""
        nu = Law.exponents(self, y)
        nu[:, 3] *= y.min()
        return nu

    def limit_exponents(self, nu: Array, y: Array) -> Array:
        """E stays below the lowest loss."""
        nu[:, 3] = np.minimum(nu[:, 3], 0.95 * y.min())
        return nu

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        n_term, d_term = _powers(nu, x)
        gamma, E = nu[:, 2:3], nu[:, 3:4]
        target = (y - E) ** (1 / gamma)
        columns = np.concatenate([n_term[:, :, None] * x.onehot, d_term[:, :, None]], axis=2)
        return columns, target, gamma * (y - E) / target / y  # d log L = γ·z^(γ-1)/L · dz

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        return np.insert(Quest.assemble(self, nu, np.concatenate([c, nu[:, 3:4]], axis=1), x), 5, nu[:, 2], axis=1)


class Repeated(Quest):
    """quest with D' = U·(1 + R_D·(1 - e^(-R/R_D))) in place of D, R = D/U - 1: each pass over the U distinct tokens is worth
    less than the one before, and all passes after the first are together worth at most R_D·U new tokens.
    """

    name, equation = "repeated", "A/(N·eff)^α + B/D'^β + E, D' = U·(1 + R_D·(1-e^(-(D/U-1)/R_D)))"
    source = "Muennighoff et al., arXiv 2305.16264"
    shared: ClassVar[tuple[Param, ...]] = (*SUM_OF_POWERS, Param("R_D", *_PASSES, log=True, unit="passes"))
    uses_repeats = True
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "R_D")
    grid: ClassVar[tuple[Sequence[float], ...]] = (_EXPONENTS, _EXPONENTS, tuple(np.log((1.5, 4.0, 10.0, 25.0, 80.0))))

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E, log_R = (theta[:, i : i + 1] for i in range(6))
        size = x.log_N + self.block(theta, x)
        worth, by_R, _ = _saturated(x.repeats, log_R)
        tokens = x.log_D - np.log1p(x.repeats) + worth
        n_term, d_term = np.exp(a - alpha * size), np.exp(b - beta * tokens)
        L = n_term + d_term + E
        if not need_jacobian:
            return L, None
        shared = [n_term, -n_term * size, d_term, -d_term * tokens, np.ones_like(L), -beta * d_term * by_R]
        return L, self._jacobian(shared, [-alpha * n_term], x)

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        worth = _saturated(x.repeats, nu[:, 2:3])[0] - np.log1p(x.repeats)
        columns, target, weight = Quest.linear(self, nu, x, y)
        columns[:, :, -2] *= np.exp(-nu[:, 1:2] * worth)
        return columns, target, weight

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        return np.insert(Quest.assemble(self, nu, c, x), 5, nu[:, 2], axis=1)

    def check(self, points: Points) -> None:
        """The distinct tokens are known."""
        Law.check(self, points)
        if np.isnan(points.unique).all():
            raise PointError(
                f"law {self.name} needs the distinct tokens of each run; name their column by --map unique_tokens=COLUMN, or "
                "compute them from epochs by --map 'unique_tokens=D/epochs'",
                column="unique_tokens",
            )

    def suits(self, points: Points) -> bool:
        """With few passes, repeats cost little at any R_D, so only more passes tell this law from others."""
        return self.in_auto and bool((points.repeats > EPOCHS - 1).any())

    def undetermined(self, points: Points) -> dict[str, str]:
        return {} if points.repeats.any() else {"R_D": "no run read a token twice"}


def _saturated(repeats: Array, log_R: Array) -> tuple[Array, Array, Array]:
    """The worth of a unit and its x `repeats`: log h for h = 1 + R·(1 - e^(-x/R)), with ∂log h/∂log R and ∂log h/∂x."""
    R = np.exp(log_R)
    decay = np.exp(-repeats / R)
    gained = -R * np.expm1(-repeats / R)
    h = 1 + gained
    return np.log1p(gained), (gained - repeats * decay) / h, decay / h


class RepeatedND(Repeated):
    """repeated, where parameters beyond the best size for U tokens are worth less, too.

    That size is U_N = G·(G·U)^(β/α) with G = (αA/(βB))^(1/(α+β)), the optimum of the law without repeats. N' = U_N·(1 + R_N·(1
    - e^(-R/R_N))) for R = N·eff/U_N - 1 > 0, else N' = N·eff.
    """

    name, equation = "repeated-nd", "A/N'^α + B/D'^β + E, N' and D' saturating with R_N, R_D beyond the best size for U, and U"
    shared: ClassVar[tuple[Param, ...]] = (*Repeated.shared, Param("R_N", *_PASSES, log=True, unit="passes"))
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "R_D", "R_N")
    grid: ClassVar[tuple[Sequence[float], ...]] = (*Repeated.grid, tuple(np.log((1.5, 10.0, 80.0))))

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E, log_R, log_RN = (theta[:, i : i + 1] for i in range(7))
        size, unique = x.log_N + self.block(theta, x), x.log_D - np.log1p(x.repeats)
        worth, by_R, _ = _saturated(x.repeats, log_R)
        tokens = unique + worth
        log_G = (np.log(alpha) + a - np.log(beta) - b) / (alpha + beta)
        best = log_G + beta / alpha * (unique + log_G)
        excess = np.minimum(np.maximum(size - best, 0.0), 600.0)  # log N·eff/U_N; e^600 parameters are beyond any model
        gain, by_RN, slope = _saturated(np.expm1(excess), log_RN)
        by_size = np.where(excess > 0, slope * np.exp(excess), 1.0)  # ∂log N'/∂log N; ∂log N'/∂log U_N is 1 minus this
        params = np.where(excess > 0, best + gain, size)
        n_term, d_term = np.exp(a - alpha * params), np.exp(b - beta * tokens)
        L = n_term + d_term + E
        if not need_jacobian:
            return L, None
        by_G = 1 + beta / alpha
        by_a = by_G / (alpha + beta)
        by_alpha = by_G * (1 / alpha - log_G) / (alpha + beta) - beta / alpha**2 * (unique + log_G)
        by_beta = -by_G * (1 / beta + log_G) / (alpha + beta) + (unique + log_G) / alpha
        by_best = -alpha * n_term * (1 - by_size)  # ∂L/∂log U_N
        shared = [
            n_term + by_best * by_a,
            -n_term * params + by_best * by_alpha,
            d_term - by_best * by_a,
            -d_term * tokens + by_best * by_beta,
            np.ones_like(L),
            -beta * d_term * by_R,
            np.where(excess > 0, -alpha * n_term * by_RN, 0.0),
        ]
        return L, self._jacobian(shared, [-alpha * n_term * by_size], x)

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        return np.insert(Repeated.assemble(self, nu, c, x), 6, nu[:, 3], axis=1)


class Chinchilla(Law):
    """A/N^α + B/D^β + E, the same for all schemes."""

    name, equation, source = (
        "chinchilla",
        "A/N^α + B/D^β + E",
        "Hoffmann et al., arXiv 2203.15556; Besiroglu et al., arXiv 2404.10102",
    )
    shared: ClassVar[tuple[Param, ...]] = SUM_OF_POWERS
    uses_scheme = False
    grid: ClassVar[tuple[Sequence[float], ...]] = (_EXPONENTS, _EXPONENTS)

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E = (theta[:, i : i + 1] for i in range(5))
        n_term, d_term = np.exp(a - alpha * x.log_N), np.exp(b - beta * x.log_D)
        L = n_term + d_term + E
        if not need_jacobian:
            return L, None
        return L, self._jacobian([n_term, -n_term * x.log_N, d_term, -d_term * x.log_D, np.ones_like(L)], [], x)

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        n_term, d_term = _powers(nu, x)
        return np.stack([n_term, d_term, np.ones_like(n_term)], axis=2), *_plain(y, len(nu))

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        alpha, beta = nu[:, 0], nu[:, 1]
        return np.stack(
            [_log(c[:, 0]) + alpha * x.mean_N, alpha, _log(c[:, 1]) + beta * x.mean_D, beta, np.maximum(c[:, 2], 0)], axis=1
        )


class Offset(Chinchilla):
    """Chinchilla + δ_g: a format costs the same number of nats at every size."""

    name, equation, source = "offset", "A/N^α + B/D^β + E + δ", "the plainest alternative"
    own: ClassVar[tuple[Param, ...]] = (Param("delta", unit="nats/token"),)
    uses_scheme, sign_free = True, True

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        L, J = Chinchilla.evaluate(self, theta[:, :5], x, need_jacobian)
        L = L + self.block(theta, x)
        return L, None if J is None else np.concatenate([J, np.broadcast_to(x.own_onehot, (*L.shape, len(x.own)))], axis=2)

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        columns, target, weight = Chinchilla.linear(self, nu, x, y)
        return (
            np.concatenate([columns, np.broadcast_to(x.own_onehot, (*columns.shape[:2], len(x.own)))], axis=2),
            target,
            weight,
        )

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        return np.concatenate([Chinchilla.assemble(self, nu, c[:, :3], x), c[:, 3:]], axis=1)


class Qat(Chinchilla):
    """Chinchilla + k_g·D^γD/N^γN: the error of a format grows with data and shrinks with size."""

    name, equation, source = "qat", "A/N^α + B/D^β + E + k·D^γD/N^γN", "Chen et al. 2025, arXiv 2505.14302"
    shared: ClassVar[tuple[Param, ...]] = (*Chinchilla.shared, Param("gamma_D", -2.0, 2.0), Param("gamma_N", -2.0, 2.0))
    own: ClassVar[tuple[Param, ...]] = (Param("k", 0.0, unit="nats/token at N = D = 1"),)
    uses_scheme = True
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "gamma_D", "gamma_N")
    grid: ClassVar[tuple[Sequence[float], ...]] = (_FEW, _FEW, (0.0, 0.08, 0.2), (0.0, 0.1, 0.25, 0.5))

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E, gD, gN = (theta[:, i : i + 1] for i in range(7))
        n_term, d_term = np.exp(a - alpha * x.log_N), np.exp(b - beta * x.log_D)
        shape = np.exp(gD * x.log_D - gN * x.log_N)
        q_term = self.block(theta, x) * shape
        L = n_term + d_term + E + q_term
        if not need_jacobian:
            return L, None
        shared = [n_term, -n_term * x.log_N, d_term, -d_term * x.log_D, np.ones_like(L), q_term * x.log_D, -q_term * x.log_N]
        return L, self._jacobian(shared, [shape], x)

    def _shape(self, nu: Array, x: Design) -> Array:
        return np.exp(nu[:, 2:3] * (x.log_D - x.mean_D) - nu[:, 3:4] * (x.log_N - x.mean_N))

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        columns, target, weight = Chinchilla.linear(self, nu, x, y)
        return np.concatenate([columns, self._shape(nu, x)[:, :, None] * x.own_onehot], axis=2), target, weight

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        gD, gN = nu[:, 2:3], nu[:, 3:4]
        k = np.maximum(c[:, 3:], 0) * np.exp(gN * x.mean_N - gD * x.mean_D)
        return np.concatenate([Chinchilla.assemble(self, nu[:, :2], c[:, :3], x), gD, gN, k], axis=1)


@dataclasses.dataclass(frozen=True)
class _EffLaw(Law, abc.ABC):
    """A/(N·eff)^α + B/D^β + E with eff a function of the format and a few parameters φ: `_eff` returns log eff and ∂/∂φ.

    For given (α, β, φ), eff is a known factor in N's power, so only A, B and E remain to be solved for.
    """

    @abc.abstractmethod
    def _eff(self, phi: Array, x: Design) -> tuple[Array, list[Array]]:
        """log eff (m, n) and its derivatives (m, n) by each of φ (m, q)."""

    def _phi(self, nu: Array) -> Array:
        """φ of the search's exponents."""
        return nu[:, 2:]

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E = (theta[:, i : i + 1] for i in range(5))
        log_eff, slopes = self._eff(theta[:, 5:], x)
        size = x.log_N + log_eff
        n_term, d_term = np.exp(a - alpha * size), np.exp(b - beta * x.log_D)
        L = n_term + d_term + E
        if not need_jacobian:
            return L, None
        shared = [n_term, -n_term * size, d_term, -d_term * x.log_D, np.ones_like(L), *(-alpha * n_term * s for s in slopes)]
        return L, self._jacobian(shared, [], x)

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        n_term, d_term = _powers(nu, x)
        n_term = n_term * np.exp(-nu[:, :1] * self._eff(self._phi(nu), x)[0])
        return np.stack([n_term, d_term, np.ones_like(n_term)], axis=2), *_plain(y, len(nu))

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        alpha, beta = nu[:, 0], nu[:, 1]
        shared = [_log(c[:, 0]) + alpha * x.mean_N, alpha, _log(c[:, 1]) + beta * x.mean_D, beta, np.maximum(c[:, 2], 0)]
        return np.concatenate([np.stack(shared, axis=1), self._phi(nu)], axis=1)

    def log_eff(self, theta: Array, x: Design) -> Array | None:
        """eff relative to the reference scheme."""
        each = dataclasses.replace(
            x, log_N=np.zeros(len(x.schemes)), log_D=np.zeros(len(x.schemes)), group=np.arange(len(x.schemes))
        )
        log_eff = self._eff(theta[:, 5:], each)[0]
        return log_eff - log_eff[:, x.reference : x.reference + 1]


class Unified(_EffLaw):
    """quest with eff = Π over weights and activations of tanh(F·log₄(1/MSE))^C, with two parameters for all formats.

    MSE is the format's error on a standard normal. The factors are the bounded representation capacity of arXiv 2506.01863.
    """

    name, equation = "unified", "A/(N·eff)^α + B/D^β + E, eff = Π tanh(F·log₄(1/MSE))^C"
    source = "Panferov et al., arXiv 2506.01863"
    uses_mse, counterpart = True, "quest"
    shared: ClassVar[tuple[Param, ...]] = (
        *SUM_OF_POWERS,
        Param("F", 0.005, 20.0),
        Param("C", 0.01, 20.0),
    )
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "F", "C")
    grid: ClassVar[tuple[Sequence[float], ...]] = (_FEW, _FEW, (0.1, 0.2, 0.35, 0.6, 1.0), (0.4, 0.7, 1.2, 2.0, 3.5))

    def _eff(self, phi: Array, x: Design) -> tuple[Array, list[Array]]:
        F, C = phi[:, :1], phi[:, 1:2]
        log_eff, dF = np.zeros((len(phi), len(x))), np.zeros((len(phi), len(x)))
        for field in ("w_mse", "a_mse"):
            mse = x.per_row(field)
            capacity = np.where(mse > 0, -np.log(np.maximum(mse, 1e-300)) / math.log(4), INF)
            t = np.tanh(F * capacity)
            log_eff += np.log(t)
            with np.errstate(invalid="ignore"):
                dF += np.where(mse > 0, capacity * (1 - t**2) / t, 0.0)
        return C * log_eff, [C * dF, log_eff]

    def check(self, points: Points) -> None:
        """Every scheme needs a known Gaussian MSE."""
        Law.check(self, points)
        for s in points.schemes:
            if math.isnan(s.w_mse + s.a_mse):
                raise PointError(
                    f"law {self.name} needs the Gaussian MSE of scheme '{s.label}', which is unknown", column="scheme"
                )


class Kumar(_EffLaw):
    """quest with eff = (1 - e^(-Pw/γw))·(1 - e^(-Pa/γa)), P the bits of weights and activations."""

    name, equation = "kumar", "A/(N·eff)^α + B/D^β + E, eff = (1-e^(-Pw/γw))·(1-e^(-Pa/γa))"
    source = "Kumar et al., arXiv 2411.04330"
    counterpart = "quest"
    shared: ClassVar[tuple[Param, ...]] = (
        *SUM_OF_POWERS,
        Param("gamma_w", 0.02, 60.0, unit="bits"),
        Param("gamma_a", 0.02, 60.0, unit="bits"),
    )
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "gamma_w", "gamma_a")
    grid: ClassVar[tuple[Sequence[float], ...]] = (_FEW, _FEW, (0.5, 1.2, 2.5, 6.0, 15.0), (0.5, 1.2, 2.5, 6.0, 15.0))

    def _eff(self, phi: Array, x: Design) -> tuple[Array, list[Array]]:
        log_eff, widths, offsets = np.zeros((len(phi), len(x))), [], []
        for i, field in enumerate(("w_grid_bits", "a_grid_bits")):
            gamma = phi[:, i : i + 1]
            ratio = (x.per_row(field) - (phi[:, i + 2 : i + 3] if phi.shape[1] > 2 else 0.0)) / gamma
            share = -np.expm1(-ratio)  # not positive if the offset exceeds the bits; the fit steps back from the nan
            log_eff = log_eff + np.log(share)
            slope = np.exp(-ratio) / share / gamma  # ∂ log share / ∂ bits
            widths.append(-slope * ratio)
            offsets.append(-slope)
        return log_eff, widths + offsets[: phi.shape[1] - 2]


class KumarOffset(Kumar):
    """kumar with bits counted from an offset: eff = (1 - e^(-(Pw-ow)/γw))·(1 - e^(-(Pa-oa)/γa))."""

    name, equation = "kumar-offset", "A/(N·eff)^α + B/D^β + E, eff = (1-e^(-(Pw-ow)/γw))·(1-e^(-(Pa-oa)/γa))"
    shared: ClassVar[tuple[Param, ...]] = (
        *Kumar.shared,
        Param("offset_w", -10.0, 7.9, unit="bits"),
        Param("offset_a", -10.0, 7.9, unit="bits"),
    )

    def _phi(self, nu: Array) -> Array:
        return np.concatenate([nu[:, 2:4], np.full((len(nu), 2), 0.3)], axis=1)


LEAST_SHARE = 0.01  # least share of the tokens in S_fp of law switch, because S_fp = 0 may have no power


class SwitchEff(Quest):
    """quest for runs that are quantized late: log eff_g, that of a run quantized from its first step, times m(S_fp, S_qat).

    Quantized training has a cost that grows with its length (q^τ), and it has to undo what full precision has settled
    (c·S_fp^ξ/S_qat^ω). If quantization begins with the run, m = 1 and the law is quest. The best share lies in between. As S
    grows, it moves towards more quantized tokens if ξ > ω, as arXiv 2509.22935 finds, and towards fewer if ξ < ω.
    """

    name, equation = "switch-eff", "A/(N·eff^m)^α + B/D^β + E, m = q^τ + c·S_fp^ξ/S_qat^ω"
    source = "this project; eff of QuEST, arXiv 2502.05003, S of arXiv 2509.22935"
    counterpart = "quest"
    shared: ClassVar[tuple[Param, ...]] = (
        *SUM_OF_POWERS,
        Param("tau", 0.0, 20.0),
        Param("c", -60.0, 20.0, log=True),
        Param("xi", 1e-3, 6.0),
        Param("omega", 0.0, 6.0),
    )
    uses_share = True
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "tau", "c", "xi", "omega")
    grid: ClassVar[tuple[Sequence[float], ...]] = (
        *((0.06, 0.15, 0.3, 0.55, 0.9),) * 2,
        (0.2, 0.6, 1.5),
        tuple(np.log((0.003, 0.03, 0.2))),
        (0.3, 0.8),
        (0.3, 0.8),
    )

    @staticmethod
    def _multiple(phi: Array, x: Design) -> tuple[Array, list[Array]]:
        """m (m, n) and its derivatives by tau, log c, xi and omega, φ (m, 4) in this order."""
        tau, log_c, xi, omega = (phi[:, i : i + 1] for i in range(4))
        late = x.share > 0
        log_q, log_fp = np.log1p(-x.share), np.log(np.where(late, x.share, 1.0)) + x.log_S
        stays = np.exp(tau * log_q)
        undoes = np.where(late, np.exp(log_c + xi * log_fp - omega * (log_q + x.log_S)), 0.0)
        return stays + undoes, [stays * log_q, undoes, undoes * log_fp, -undoes * (log_q + x.log_S)]

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, alpha, b, beta, E = (theta[:, i : i + 1] for i in range(5))
        log_eff = self.block(theta, x)
        times, slopes = self._multiple(theta[:, 5:9], x)
        size = x.log_N + log_eff * times
        n_term, d_term = np.exp(a - alpha * size), np.exp(b - beta * x.log_D)
        L = n_term + d_term + E
        if not need_jacobian:
            return L, None
        by_times = -alpha * n_term * log_eff
        shared = [n_term, -n_term * size, d_term, -d_term * x.log_D, np.ones_like(L), *(by_times * s for s in slopes)]
        return L, self._jacobian(shared, [-alpha * n_term * times], x)

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        """quest's eff of all runs of a scheme, divided by the mean m of these runs."""
        theta = Quest.assemble(self, nu, c, x)
        times = self._multiple(nu[:, 2:], x)[0] @ x.own_onehot / np.maximum(x.own_onehot.sum(axis=0), 1)
        own = theta[:, 5:] / np.maximum(times, 1e-3)
        return np.concatenate([theta[:, :5], nu[:, 2:], np.clip(own, -40, 40)], axis=1)

    def log_eff(self, theta: Array, x: Design) -> Array | None:
        """log eff of runs that are quantized from the first step."""
        return Quest.log_eff(self, theta, x)

    def check(self, points: Points) -> None:
        """Every quantized run saw some tokens while quantized."""
        Law.check(self, points)
        _check_shares(self, points)

    def undetermined(self, points: Points) -> dict[str, str]:
        reason = "every quantized run is quantized from its first step"
        return {} if points.share.any() else dict.fromkeys(("tau", "c", "xi", "omega"), reason)


class Switch(Chinchilla):
    """Chinchilla + δ, δ = θ·2^(-κb) + φ·2^(-χb)/(N^ψ·S_qat^ω) + λ·2^(-μb)/(N^ν·S_fp^ξ·S_qat^ρ), b the bits of a weight.

    δ is 0 in full precision. The signs of ψ, ν, ξ and ρ are free: the published form has them positive, although more tokens in
    full precision should make a weight harder to move. For runs quantized from the first step, S_fp is that of 1 % of their
    tokens (LEAST_SHARE). The law does not distinguish schemes with equal bits of weights, whatever their activations.
    """

    name = "switch"
    equation = "A/N^α + B/D^β + E + θ·2^(-κb) + φ·2^(-χb)/(N^ψ·S_qat^ω) + λ·2^(-μb)/(N^ν·S_fp^ξ·S_qat^ρ)"
    source = "Apple 2025, arXiv 2509.22935"
    shared: ClassVar[tuple[Param, ...]] = (
        *Chinchilla.shared,
        Param("theta", -60.0, 60.0, log=True, unit="nats/token"),
        Param("kappa", 0.0, 12.0, unit="1/bit"),
        Param("phi", -120.0, 120.0, log=True),
        Param("chi", 0.0, 12.0, unit="1/bit"),
        Param("psi", -2.0, 2.0),
        Param("omega", 0.0, 4.0),
        Param("lambda", -120.0, 120.0, log=True),
        Param("mu", 0.0, 12.0, unit="1/bit"),
        Param("nu", -2.0, 2.0),
        Param("xi", -3.0, 3.0),
        Param("rho", -3.0, 3.0),
    )
    uses_scheme, uses_share, one_per_width = True, True, True
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta", "kappa", "chi", "psi", "omega", "mu", "nu", "xi", "rho")
    grid: ClassVar[tuple[Sequence[float], ...]] = (
        *((0.1, 0.6),) * 2,
        *((0.3, 2.0), (0.3, 2.0), (-0.2, 0.4), (0.1, 1.0)),
        *((0.3, 2.0), (-0.2, 0.4), (-0.8, 0.8), (0.1, 1.0)),
    )
    SAMPLES = 4000

    def exponents(self, y: Array) -> Array:
        """A sample of the box between the ends of `grid`: a grid over ten exponents would be too large."""
        low, high = np.array(self.grid, float).T
        return low + (high - low) * np.random.default_rng(0).random((self.SAMPLES, len(low)))

    @staticmethod
    def _logs(x: Design) -> tuple[Array, Array, Array]:
        """(n,) b·log 2, log S_qat and log S_fp."""
        return (
            x.per_row("w_grid_bits") * math.log(2),
            np.log1p(-x.share) + x.log_S,
            np.log(np.maximum(x.share, LEAST_SHARE)) + x.log_S,
        )

    @staticmethod
    def _quantized(x: Design) -> Array:
        """(n,) 1 for schemes with a δ, 0 in full precision."""
        return np.array([not s.full for s in x.schemes], float)[x.group]

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        L, J = Chinchilla.evaluate(self, theta[:, :5], x, need_jacobian)
        bits, qat, fp = self._logs(x)
        t, kappa, f, chi, psi, omega, lam, mu, nu, xi, rho = (theta[:, i : i + 1] for i in range(5, 16))
        counts = self._quantized(x)
        first = counts * np.exp(t - kappa * bits)
        second = counts * np.exp(f - chi * bits - psi * x.log_N - omega * qat)
        third = counts * np.exp(lam - mu * bits - nu * x.log_N - xi * fp - rho * qat)
        L = L + first + second + third
        if J is None:
            return L, None
        columns = [
            *(first, -first * bits),
            *(second, -second * bits, -second * x.log_N, -second * qat),
            *(third, -third * bits, -third * x.log_N, -third * fp, -third * qat),
        ]
        return L, np.concatenate([J, np.stack(columns, axis=2)], axis=2)

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        columns, target, weight = Chinchilla.linear(self, nu, x, y)
        bits, qat, fp = (v - v.mean() for v in self._logs(x))
        size, counts = x.log_N - x.mean_N, self._quantized(x)
        _, _, kappa, chi, psi, omega, mu, nu_, xi, rho = (nu[:, i : i + 1] for i in range(10))
        terms = [
            np.exp(-kappa * bits),
            np.exp(-chi * bits - psi * size - omega * qat),
            np.exp(-mu * bits - nu_ * size - xi * fp - rho * qat),
        ]
        return np.concatenate([columns, counts[:, None] * np.stack(terms, axis=2)], axis=2), target, weight

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        plain = Chinchilla.assemble(self, nu[:, :2], c[:, :3], x)
        bits, qat, fp = (v.mean() for v in self._logs(x))
        kappa, chi, psi, omega, mu, nu_, xi, rho = nu[:, 2:].T
        level = _log(c[:, 3:])
        first = [level[:, 0] + kappa * bits, kappa]
        second = [level[:, 1] + chi * bits + psi * x.mean_N + omega * qat, chi, psi, omega]
        third = [level[:, 2] + mu * bits + nu_ * x.mean_N + xi * fp + rho * qat, mu, nu_, xi, rho]
        return np.concatenate([plain, np.stack([*first, *second, *third], axis=1)], axis=1)

    def check(self, points: Points) -> None:
        """Quantized runs of two shares or more, each with some quantized tokens."""
        Law.check(self, points)
        _check_shares(self, points)
        if len(points.shares) < 2:
            raise PointError(f"law {self.name} needs quantized runs of several shares of full precision", column="tokens_fp")


def _check_shares(law: Law, points: Points) -> None:
    """Raises PointError for a run that was quantized only after its training."""
    for i in np.flatnonzero(points.share >= 1):
        raise PointError(f"law {law.name} needs training after quantization", row=points.where[i], column="tokens_fp")


class Overtrain(Law):
    """E + (a·M^η + b·M^-η)·C^-η with M = D/N tokens per parameter and C = 6ND FLOP."""

    name, equation, source = "overtrain", "E + (a·M^η + b·M^-η)·C^-η, M = D/N, C = 6ND", "Gadre et al., arXiv 2403.08540"
    shared: ClassVar[tuple[Param, ...]] = (
        Param("a", -300.0, 300.0, log=True),
        Param("b", -300.0, 300.0, log=True),
        Param("eta", 1e-4, 4.0),
        FLOOR,
    )
    uses_scheme = False
    searched: ClassVar[tuple[str, ...]] = ("eta",)
    grid: ClassVar[tuple[Sequence[float], ...]] = (tuple(np.geomspace(0.01, 1.0, 40)),)

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        a, b, eta, E = (theta[:, i : i + 1] for i in range(4))
        log_M, log_C = x.log_D - x.log_N, x.log_D + x.log_N + math.log(6)
        up, down = np.exp(a + eta * (log_M - log_C)), np.exp(b - eta * (log_M + log_C))
        L = up + down + E
        if not need_jacobian:
            return L, None
        return L, self._jacobian([up, down, up * (log_M - log_C) - down * (log_M + log_C), np.ones_like(L)], [], x)

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        # M/C = 1/(6N²) and MC = 6D²: the law is chinchilla with α = β = 2η
        n_term, d_term = np.exp(-2 * nu * (x.log_N - x.mean_N)), np.exp(-2 * nu * (x.log_D - x.mean_D))
        return np.stack([n_term, d_term, np.ones_like(n_term)], axis=2), *_plain(y, len(nu))

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        eta = nu[:, 0]
        six = math.log(6) * eta
        return np.stack(
            [_log(c[:, 0]) + 2 * eta * x.mean_N + six, _log(c[:, 1]) + 2 * eta * x.mean_D + six, eta, np.maximum(c[:, 2], 0)],
            axis=1,
        )


class Coverage(Law):
    """c(k) = exp(a·k^-b), a < 0: the share of problems solved after k samples. Column N (or k) holds k, column loss (or
    coverage) c."""

    name, equation, source = "coverage", "exp(-a·k^-b)", "Large Language Monkeys, arXiv 2407.21787"
    shared: ClassVar[tuple[Param, ...]] = (Param("a", -300.0, 300.0, log=True), Param("b", 1e-4, 4.0))
    uses_scheme, uses_D, in_auto = False, False, False
    searched: ClassVar[tuple[str, ...]] = ("b",)
    grid: ClassVar[tuple[Sequence[float], ...]] = (tuple(np.geomspace(0.01, 3.0, 40)),)

    def evaluate(self, theta: Array, x: Design, need_jacobian: bool) -> tuple[Array, Array | None]:
        miss = np.exp(theta[:, :1] - theta[:, 1:2] * x.log_N)
        c = np.exp(-miss)
        return c, self._jacobian([-c * miss, c * miss * x.log_N], [], x) if need_jacobian else None

    def linear(self, nu: Array, x: Design, y: Array) -> tuple[Array, Array, Array]:
        column = np.exp(-nu * (x.log_N - x.mean_N))
        return column[:, :, None], np.broadcast_to(-np.log(y), column.shape), np.ones_like(column)

    def assemble(self, nu: Array, c: Array, x: Design) -> Array:
        return np.stack([_log(c[:, 0]) + nu[:, 0] * x.mean_N, nu[:, 0]], axis=1)

    def check(self, points: Points) -> None:
        """A coverage is below one."""
        for i in np.flatnonzero(points.loss >= 1):
            raise PointError(f"{points.loss[i]:g} is no coverage below 1", row=points.where[i], column="loss")


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Quest(),
        Unified(),
        EffND(),
        Quartet(),
        Qat(),
        Offset(),
        Repeated(),
        RepeatedND(),
        Kumar(),
        KumarOffset(),
        Switch(),
        SwitchEff(),
        Chinchilla(),
        Overtrain(),
        Coverage(),
    )
}


def get_law(name: str | Law) -> Law:
    """The law of this name; LawError naming the choices."""
    return law_of(LAWS, name, "law")


L = TypeVar("L", bound=Law)


def law_of(laws: Mapping[str, L], name: str | L, what: str) -> L:
    """The entry of `laws` under `name`, or the law itself; LawError naming the choices, as kinds of `what`."""
    if not isinstance(name, str):
        return name
    if name not in laws:
        raise LawError(f"unknown {what} '{name}'; choices: {choices(laws, name)}")
    return laws[name]
