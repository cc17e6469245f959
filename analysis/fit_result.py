"""The record of a fitted law: parameters, efficiencies, status, warnings and intervals, and the predictions made from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..words import choices
from .findings import Finding
from .laws import Design, Law, LawError, Param
from .objective import Objective
from .points import Points
from .schemes import Scheme, find_scheme
from .shares import at_best_share
from .solver import Problem

Array = np.ndarray
STATUSES = ("converged", "at bound", "multiple optima", "exactly determined", "not identifiable", "failed")
UNTRUSTED = STATUSES[3:]  # numbers of such a fit were not tested by runs


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law with its status and warnings.

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
    warnings: tuple[Finding, ...]
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
            self.law,
            self.design,
            self.objective.scaled(self.points.loss),
            self.points.weight,
            *box(self.coordinates),
            self.objective,
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
        """Residual degrees of freedom: points minus fitted parameters. With 0 the points cannot test the law."""
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
        eff = {} if log_eff is None else {s: float(math.exp(e)) for s, e in zip(self.points.labels, log_eff[0], strict=True)}
        return {**eff, **dict.fromkeys(self.missing)}

    @property
    def reference(self) -> Scheme:
        """The scheme whose eff is 1: the unquantized one, or else the one with the most bits."""
        return self.points.schemes[self.design.reference]

    @cached_property
    def residuals(self) -> Array:
        """The residuals in the objective: log L(θ) - log y or, for raw ones, L(θ) - y in nats/token; shape (n,)."""
        return self.objective.scaled(self.law.predict(self.theta, self.design)[0]) - self.objective.scaled(self.points.loss)

    @cached_property
    def errors(self) -> Array:
        """log L(θ) - log y, whatever the objective, shape (n,)."""
        return np.log(self.law.predict(self.theta, self.design)[0]) - np.log(self.points.loss)

    def slopes(self, x: Design) -> Array:
        """(n, p) ∂ residual / ∂θ of runs of a design; zero for fixed parameters."""
        L, J = self.law.evaluate(self.theta[None], x, True)
        assert J is not None
        return np.where(self.free, self.objective.slopes(L[0], J[0]), 0.0)

    @property
    def rms(self) -> float:
        """Root mean square of the errors (≈ relative error of the loss)."""
        return float(np.sqrt(np.mean(self.errors**2)))

    @property
    def sigma(self) -> float:
        """Standard deviation of the residuals, corrected for the parameters spent."""
        return float(np.sqrt(np.sum(self.residuals**2) / max(self.residual_dof, 1)))

    def predict(self, N: Any, D: Any, scheme: str | float | None = None, unique: float = math.inf, share: Any = None) -> Array:
        """Loss (nats/token) at parameters N and tokens D (broadcast together) for a scheme's label or bits (default: the
        reference). `unique`, the distinct tokens at most, and `share`, the share of tokens before quantization (default: the
        best), matter only to laws that include them."""
        group = self.design.reference if scheme is None else find_scheme(self.points.schemes, scheme)
        at = 0.0 if share is None else share
        N, D, at = np.broadcast_arrays(np.asarray(N, float), np.asarray(D, float), np.asarray(at, float))
        x = self.design.at(N, D, np.full(N.shape, group), unique, at)
        x = at_best_share(self, self.theta, x) if share is None else x
        return self.law.predict(self.theta, x)[0].reshape(N.shape)

    def index(self, name: str) -> int:
        """Index of a parameter in θ. Raises LawError naming the choices."""
        return place(name, self.coordinates, self.points)

    def to_dict(self) -> dict[str, Any]:
        """What `fit-scaling --json` prints; numbers only, no arrays."""
        return {
            "law": self.law.name,
            "equation": self.law.equation,
            "source": self.law.source,
            "objective": f"sum of {self.objective} on {self.objective.residuals} residuals",
            "residuals": self.objective.residuals,
            "delta": None if math.isinf(self.objective.delta) else self.objective.delta,
            "cost": self.cost,
            "n": self.n,
            "rms": self.rms,
            "params": self.params,
            "eff": self.eff,
            "fixed": self.fixed,
            "units": {p.name: p.unit for p in self.coordinates if p.unit},
            "status": self.status,
            "warnings": [warning.to_dict() for warning in self.warnings],
            "intervals": {k: list(v) for k, v in self.intervals.items()},
            "intervals_method": self.intervals_method,
            "data_hash": self.points.hash,
            "optima": self.optima,
            "starts_at_best": self.starts_at_best,
            "condition": self.condition if math.isfinite(self.condition) else None,
        }


def box(coordinates: Sequence[Param]) -> tuple[Array, Array]:
    """Lower and upper bounds of θ, (p,) each."""
    return np.array([p.lower for p in coordinates]), np.array([p.upper for p in coordinates])


def place(name: str, coordinates: Sequence[Param], points: Points) -> int:
    """Index of the parameter `name` in θ; a scheme may be named by its bits. Raises LawError naming the choices."""
    names = [p.name for p in coordinates]
    if name in names:
        return names.index(name)
    block, _, label = name.partition(".")
    if label and any(n.startswith(block + ".") for n in names):
        full = f"{block}.{points.labels[points.index(label)]}"
        if full in names:
            return names.index(full)
        raise LawError(f"{name}: the reference scheme's {block} is not a parameter")
    raise LawError(f"unknown parameter '{name}'; choices: {choices(names, name)}")
