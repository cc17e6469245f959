"""Predict downstream error from validation loss: Err(L) = ε - k·e^(-γL)  (Gadre et al., arXiv 2403.08540, equation 5).

L is a validation loss in nats/token, Err an error rate averaged over tasks. ε and k enter linearly: for each γ they follow from
a least-squares problem with two columns, so the fit is a search over γ alone. Residuals are those of the error itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .tables import PointError

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Downstream:
    """Err(L) = epsilon - k·exp(-gamma·L), and the sum of squared residuals it was fitted with."""

    epsilon: float
    k: float
    gamma: float
    cost: float

    def predict(self, loss: Array | float) -> Array:
        """Error rate at a loss in nats/token."""
        return self.epsilon - self.k * np.exp(-self.gamma * np.asarray(loss, float))


def fit_downstream(loss: Array, error: Array) -> Downstream:
    """Least squares over (ε, k, γ), γ in [.01, 20] per nat. PointError for fewer than four models or values that are not
    finite."""
    from scipy.optimize import minimize_scalar

    loss, error = np.asarray(loss, float), np.asarray(error, float)
    for i, pair in enumerate(zip(loss, error, strict=True)):
        if not np.isfinite(pair).all():
            raise PointError(f"loss {pair[0]:g}, error {pair[1]:g}: must be finite", row=f"model {i + 1}")
    if len(loss) < 4:
        raise PointError(f"{len(loss)} models cannot fit ε, k and γ")

    def solve(log_gamma: float) -> tuple[float, Array]:
        columns = np.stack([np.ones_like(loss), -np.exp(-np.exp(log_gamma) * (loss - loss.mean()))], axis=1)
        c = np.linalg.lstsq(columns, error, rcond=None)[0]
        return float(np.sum((columns @ c - error) ** 2)), c

    grid = np.linspace(np.log(0.01), np.log(20), 120)
    k = int(np.argmin([solve(g)[0] for g in grid]))
    around = (grid[max(k - 1, 0)], grid[min(k + 1, len(grid) - 1)])
    best = float(minimize_scalar(lambda g: solve(g)[0], bounds=around, method="bounded", options={"xatol": 1e-10}).x)
    cost, (epsilon, scaled) = solve(best)
    gamma = float(np.exp(best))
    return Downstream(float(epsilon), float(scaled * np.exp(gamma * loss.mean())), gamma, cost)
