"""Transitions: the tokens per parameter from which fewer bits beat more bits at equal memory and training FLOP.

At a size X, the model of X parameters at 16 bits and the ones of X·16/P parameters at P bits take the same memory; trained
with the same FLOP, the model at P bits sees D·P/16 tokens. The transition from P to Q < P bits is the D/N (of the 16-bit
model) from which Q is better. It may be 0 (always) or infinite (never): both are answers. If the law includes when runs are
quantized, each model is quantized at its best share of the tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from .fit_result import Fit
from .laws import Design, LawError
from .shares import at_best_share
from .uncertainty import Bootstrap

Array = np.ndarray
LOG_RATIOS = np.log(np.geomspace(1e-3, 1e9, 481))  # tokens per parameter searched for a transition


def iso_memory_loss(fit: Fit, theta: Array, size: float, log_ratio: Array, scheme: int) -> Array:
    """Loss (m, q) at each log D/N (q,) of the model with the memory and training FLOP of one of `size` 16-bit parameters."""
    x = iso_memory_design(fit, size, log_ratio, scheme)
    return fit.law.predict(theta, at_best_share(fit, theta, x, steps=14))


def iso_memory_design(fit: Fit, size: float, log_ratio: Array, scheme: int) -> Design:
    """The design of the models of `iso_memory_loss`, (q,)."""
    factor = 16 / fit.points.schemes[scheme].w_stored_bits
    return fit.design.at(np.array(size * factor), size * np.exp(log_ratio) / factor, np.array(scheme))


def transitions(fit: Fit, theta: Array, size: float, many: int, few: int) -> Array:
    """(m,) D/N of the 16-bit model of `size` parameters from which on scheme `few` always beats scheme `many`; 0: at any D/N,
    inf: never."""
    with np.errstate(all="ignore"):
        gap = iso_memory_loss(fit, theta, size, LOG_RATIOS, few) - iso_memory_loss(fit, theta, size, LOG_RATIOS, many)
    worse = ~(gap < 0)
    last = worse.shape[1] - 1 - np.argmax(worse[:, ::-1], axis=1)  # the last ratio at which `few` is not better
    out = np.where(worse.any(axis=1), np.inf, 0.0)
    inside = np.flatnonzero(worse.any(axis=1) & (last < len(LOG_RATIOS) - 1))
    ends = np.minimum(last[inside] + np.array([[0], [1]]), len(LOG_RATIOS) - 1)

    def gap_at(log_ratio: Array) -> Array:
        return loss_along(fit, theta[inside], size, log_ratio, few) - loss_along(fit, theta[inside], size, log_ratio, many)

    out[inside] = np.exp(_root(gap_at, LOG_RATIOS[ends], gap[inside, ends]))
    return out


def _root(function: Callable[[Array], Array], ends: Array, values: Array) -> Array:
    """(m,) where m functions, `values` at `ends` (2, m), become negative: Illinois method, or bisection if it fails."""
    (low, high), (above, below) = ends.copy(), values.copy()
    place, gone = np.full(len(low), np.nan), np.zeros(len(low))  # the side on which each bracket was last moved
    for _ in range(34):
        with np.errstate(all="ignore"):
            secant = low + (high - low) * (above / (above - below))
        before, place = place, np.where((secant >= low) & (secant <= high), secant, (low + high) / 2)
        value = function(place)
        side = np.where(value < 0, -1.0, 1.0)
        again = side == gone  # halve the weight of the end that stays, or it would stay for ever
        above, below = np.where(again & (side < 0), above / 2, above), np.where(again & (side > 0), below / 2, below)
        low, above = np.where(side < 0, low, place), np.where(side < 0, above, value)
        high, below = np.where(side < 0, place, high), np.where(side < 0, value, below)
        gone = side
        if (np.abs(place - before) < 1e-12).all():
            break
    return place


def loss_along(fit: Fit, theta: Array, size: float, log_ratio: Array, scheme: int) -> Array:
    """Loss (m,) of each θ at its own log D/N, from the diagonals of blocks of 100 θ at 100 designs."""
    out = np.empty(len(theta))
    for start in range(0, len(theta), 100):
        part = slice(start, start + 100)
        out[part] = np.diagonal(iso_memory_loss(fit, theta[part], size, log_ratio[part], scheme))
    return out


@dataclasses.dataclass(frozen=True)
class Transition:
    """From `ratio` tokens per parameter of the 16-bit model of `size` on, `few` beats `many`; its 95 % interval may be None."""

    size: float
    many: str
    few: str
    ratio: float
    interval: tuple[float, float] | None = None

    @property
    def words(self) -> str:
        """The answer in words."""
        return ratio_words(self.ratio) + (
            f" [{ratio_words(self.interval[0])}, {ratio_words(self.interval[1])}]" if self.interval else ""
        )


def ratio_words(ratio: float) -> str:
    """A transition's D/N, `never` or `always`."""
    return "never" if math.isinf(ratio) else "always" if ratio == 0 else f"{ratio:.3g}"


def transition(fit: Fit, size: float, many: str | float = 8, few: str | float = 4, boot: Bootstrap | None = None) -> Transition:
    """The transition between two schemes. Raises PointError if one of them has no runs, and LawError for laws without
    schemes."""
    if not fit.law.uses_scheme:
        raise LawError(f"law {fit.law.name} does not tell schemes apart")
    a, b = fit.points.index(many), fit.points.index(few)
    if fit.points.schemes[b].w_stored_bits >= fit.points.schemes[a].w_stored_bits:
        raise LawError(f"transition: '{few}' does not have fewer bits than '{many}'")
    ratio = float(transitions(fit, fit.theta[None], size, a, b)[0])
    interval = None
    if boot is not None:
        drawn = transitions(fit, boot.theta, size, a, b)
        low, high = np.quantile(drawn, 0.025, method="lower"), np.quantile(drawn, 0.975, method="higher")
        interval = (float(low), float(high))
    return Transition(size, fit.points.labels[a], fit.points.labels[b], ratio, interval)


def best_per_bit(boot: Bootstrap, schemes: Sequence[str | float]) -> dict[str, float]:
    """Share of the replicates in which each scheme maximises eff/bits."""
    index = [boot.fit.points.index(s) for s in schemes]
    eff = boot.eff()
    if eff is None:
        raise LawError(f"law {boot.fit.law.name} has no eff")
    bits = np.array([boot.fit.points.schemes[i].w_stored_bits for i in index])
    winner = np.argmax(eff[:, index] / bits, axis=1)
    return {boot.fit.points.labels[i]: float(np.mean(winner == k)) for k, i in enumerate(index)}


def best_format(boot: Bootstrap, schemes: Sequence[str | float], size: float, ratio: float) -> dict[str, float]:
    """Probability that each scheme has the lowest loss at the memory of `size` 16-bit parameters and the FLOP of `ratio`
    tokens per parameter of that model.
    """
    index = [boot.fit.points.index(s) for s in schemes]
    loss = np.concatenate([iso_memory_loss(boot.fit, boot.theta, size, np.array([math.log(ratio)]), i) for i in index], axis=1)
    winner = np.argmin(loss, axis=1)
    return {boot.fit.points.labels[i]: float(np.mean(winner == k)) for k, i in enumerate(index)}
