"""The objective of a fit: least squares, or Huber's loss for data with outliers.

Σ w_i·ρ(r_i) with r_i = log L(θ; x_i) - log y_i, or L - y ("raw", in nats/token), and ρ(r) = ½r² (least squares) or Huber's:
½r² for |r| ≤ δ and δ|r| - ½δ² beyond. It is the sum, not the mean, because a small mean stops an optimizer early.

Log residuals assume that the errors of runs are equal shares of their losses; raw residuals assume equal errors in nats, which
gives small models, whose losses are high, more weight.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .laws import LawError

Array = np.ndarray


RESIDUALS = ("log", "raw")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Least squares (δ = inf) or Huber(δ), always the weighted sum, of residuals of log L or of L (`residuals`: log, raw)."""

    delta: float = math.inf
    residuals: str = "log"

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise LawError(f"huber delta = {self.delta:g}: must be positive")
        if self.residuals not in RESIDUALS:
            raise LawError(f"unknown residuals '{self.residuals}'; choices: {', '.join(RESIDUALS)}")

    def scaled(self, loss: Array) -> Array:
        """Losses on the scale of the residuals: log L, or L."""
        return np.log(loss) if self.residuals == "log" else np.asarray(loss)

    def unscaled(self, scaled: Array) -> Array:
        """The inverse of `scaled`."""
        return np.exp(scaled) if self.residuals == "log" else np.asarray(scaled)

    def slopes(self, loss: Array, jacobian: Array) -> Array:
        """∂ scaled / ∂θ (…, n, p) of losses (…, n) whose ∂L/∂θ is `jacobian`."""
        return jacobian / loss[..., None] if self.residuals == "log" else jacobian

    def per_log(self, loss: Array) -> Array | float:
        """∂ scaled / ∂ log L."""
        return 1.0 if self.residuals == "log" else loss

    def shown(self, error: float) -> str:
        """An error on the scale of the residuals, with its unit."""
        return f"{100 * error:.2g} %" if self.residuals == "log" else f"{error:.2g} nats/token"

    def __str__(self) -> str:
        return "least squares" if math.isinf(self.delta) else f"huber({self.delta:g})"

    def cost(self, r: Array, w: Array) -> Array:
        """Σ w·ρ(r) over the last axis; inf if an r is not finite."""
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


def objective_from(text: str | float | Objective | None, residuals: str = "log") -> Objective:
    """`None` or `"lsq"` → least squares; a number or `"huber:1e-3"` → Huber(δ); of `residuals` on logs or raw losses."""
    if isinstance(text, Objective):
        return text
    if text is None or text in ("lsq", "least squares"):
        return Objective(residuals=residuals)
    try:
        delta = float(str(text).lower().removeprefix("huber").strip(":()"))
    except ValueError:
        raise LawError(f"unknown objective '{text}'; choices: lsq, huber:DELTA (e.g. huber:1e-3)") from None
    return Objective(delta, residuals)
