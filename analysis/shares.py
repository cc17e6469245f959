"""When to quantize: the share of the tokens in full precision at which a law has the least loss.

    at_best_share(fit, theta, x)      the design x, each θ and row at its own best share

The share is 0 for a law without shares, for a fit whose runs do not determine it, and for a scheme in full precision.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from .laws import Design
from .points import SAME_SHARE, Points
from .schemes import Scheme

if TYPE_CHECKING:
    from .fit_result import Fit

Array = np.ndarray
MOST_SHARE = 0.99  # beyond it a run is rounded rather than trained
NODES = np.array([0, 0.01, 0.02, 0.04, 0.07, *np.arange(0.1, 0.96, 0.05), 0.97, 0.98, MOST_SHARE])
AT_ONCE = 1e6  # losses computed at once, which bounds the memory
GOLDEN = (math.sqrt(5) - 1) / 2


def knows_shares(fit: Fit) -> bool:
    """Whether a fit determines when to quantize."""
    return fit.law.uses_share and not fit.undetermined


def has_share(fit: Fit, scheme: Scheme) -> bool:
    """Whether a fit determines when to quantize a scheme."""
    return knows_shares(fit) and not scheme.full


def at_best_share(fit: Fit, theta: Array, x: Design, *, steps: int = 20) -> Design:
    """x with the shares (m, n) of least loss for θ (m, p), by golden-section search around the best of 25 nodes.

    As a function of the share, every law here has one minimum, possibly at an end; the nodes guard against a second.
    """
    if not knows_shares(fit):
        return x
    theta = np.atleast_2d(theta)
    if (most := max(int(AT_ONCE / len(NODES) / len(x)), 1)) < len(theta):
        parts = [at_best_share(fit, theta[i : i + most], x, steps=steps).share for i in range(0, len(theta), most)]
        return dataclasses.replace(x, share=np.concatenate(parts))

    def loss(share: Array) -> Array:
        L = fit.law.predict(theta, dataclasses.replace(x, share=share))
        return np.where(np.isnan(L), np.inf, L)

    with np.errstate(all="ignore"):
        nodes = x.at(*(np.repeat(v, len(NODES)) for v in (np.exp(x.log_N), np.exp(x.log_D), x.group)))
        nodes = dataclasses.replace(nodes, share=np.tile(NODES, len(x)), repeats=np.repeat(x.repeats, len(NODES)))
        L = fit.law.predict(theta, nodes).reshape(len(theta), len(x), len(NODES))
        L = np.where(np.isnan(L), np.inf, L)
        k, least = L.argmin(axis=2), L.min(axis=2)
        low, high = NODES[np.maximum(k - 1, 0)], NODES[np.minimum(k + 1, len(NODES) - 1)]
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        at_left, at_right = loss(left), loss(right)
        for _ in range(steps):
            falls = at_left > at_right
            low, high = np.where(falls, left, low), np.where(falls, high, right)
            new = np.where(falls, low + GOLDEN * (high - low), high - GOLDEN * (high - low))
            at_new = loss(new)
            left, right = np.where(falls, right, new), np.where(falls, new, left)
            at_left, at_right = np.where(falls, at_right, at_new), np.where(falls, at_new, at_left)
        inner = (low + high) / 2
        share = np.where(loss(inner) < least, inner, NODES[k])
    full = np.array([s.full for s in x.schemes])[x.group]
    return dataclasses.replace(x, share=np.where(full, 0.0, share))


def best_share(fit: Fit, theta: Array, x: Design) -> float:
    """The best share of a design of one row for one θ (p,)."""
    return float(np.ravel(at_best_share(fit, theta, x, steps=40).share)[0])


def share_words(share: float | None) -> str:
    """A share of tokens in words; empty if the law has none."""
    return "" if share is None else f", {100 * share:.3g} % of them before quantization"


def outside_shares(points: Points, share: float) -> str:
    """A warning if a share lies outside those of the quantized runs; else empty."""
    low, high = float(points.shares[0]), float(points.shares[-1])
    if low - SAME_SHARE <= share <= high + SAME_SHARE:
        return ""
    return f"a share of {share:.2g} before quantization lies outside the data ({low:.2g} to {high:.2g})"
