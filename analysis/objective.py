"""What a fit minimises over its log-residuals: least squares, or Huber's loss for data with outliers.

Σ w_i·ρ(r_i) with r_i = log L(θ; x_i) - log y_i, and ρ(r) = ½r² (least squares) or Huber's: ½r² for |r| ≤ δ and
δ|r| - ½δ² beyond. The sum, not the mean, because a small mean stops an optimizer early.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .laws import LawError

Array = np.ndarray


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


def objective_from(text: str | float | Objective | None) -> Objective:
    """`None` or `"lsq"` → least squares; a number or `"huber:1e-3"` → Huber(δ)."""
    if isinstance(text, Objective):
        return text
    if text is None or text in ("lsq", "least squares"):
        return Objective()
    try:
        return Objective(float(str(text).lower().removeprefix("huber").strip(":()")))
    except ValueError:
        raise LawError(f"unknown objective '{text}'; choices: lsq, huber:DELTA (e.g. huber:1e-3)") from None
