"""The non-increasing schedule with the least predicted loss by a law of curves, from the end of the warm-up to the last step.

    minimise over d ≥ 0, Σ d ≤ 1    L(steps; η),   η(u) = peak·f(u),   f a line through (0, 1) and (u_k, 1 - Σ_{j≤k} d_j)

u is the share of the steps after the warm-up, at PIECES places that lie closer together towards the end, where laws of curves
need more detail. Only the shape is free, because no law of curves predicts the effect of a higher peak.
"""

from __future__ import annotations

import math

import numpy as np

from .curve_fit import CurveFit
from .curves import Curve, Rates

Array = np.ndarray
PIECES = 24
INNER = 20  # points of the schedule in a piece: for the law a slope is a series of drops between points
CROWDING = 1.5  # exponent with which places crowd towards the end
STRAIGHT = 0.004  # of the peak: points that lie nearer to the line through their neighbours are dropped


def with_shape(places: Array, factors: Array, begin: Rates, steps: float) -> Rates:
    """The schedule that begins as `begin` does until the end of its warm-up, and then follows the points (k,) to `steps`."""
    warm = begin.warmup
    first = float(begin.step[warm])
    fine = np.interp(np.arange(len(places) * INNER + 1) / INNER, np.arange(len(places) + 1), np.append(0.0, places))
    shape = np.interp(fine, np.append(0.0, places), np.append(1.0, factors))
    head = begin.step[:warm], begin.lr[:warm]
    return Rates(np.append(head[0], first + fine * (steps - first)), np.append(head[1], begin.peak * shape))


def best_shape(fit: CurveFit, curve: Curve, steps: float) -> tuple[Array, Array]:
    """Places u (k,) and factors f (k,) of the best schedule for a run like `curve` of `steps` steps.

    The search (scipy's SLSQP) starts from a cosine, a line and two late cool-downs, and keeps the best result.
    """
    from scipy.optimize import LinearConstraint, minimize

    places = 1 - (1 - np.arange(1, PIECES + 1) / PIECES) ** CROWDING
    begin = curve.rates

    def loss(drops: Array) -> float:
        factors = np.clip(1 - np.cumsum(drops), 0.0, 1.0)
        return math.log(float(fit.predict(with_shape(places, factors, begin, steps), steps, curve)[0]))

    shapes = [0.5 * (1 + np.cos(np.pi * places)), 1 - places, *(np.minimum(1, (1 - places) / share) for share in (0.2, 0.5))]
    whole = LinearConstraint(np.ones((1, PIECES)), 0.0, 1.0)
    ends = [
        minimize(loss, -np.diff(shape, prepend=1.0), method="SLSQP", bounds=[(0, 1)] * PIECES, constraints=[whole])
        for shape in shapes
    ]
    best = min(ends, key=lambda end: float(end.fun))
    return straightened(places, np.clip(1 - np.cumsum(np.maximum(best.x, 0)), 0.0, 1.0))


def straightened(places: Array, factors: Array) -> tuple[Array, Array]:
    """The same line with as few points as keep it within STRAIGHT of every point given (Douglas and Peucker's rule)."""
    u, f = np.append(0.0, places), np.append(1.0, factors)
    kept = {0, len(u) - 1}
    spans = [(0, len(u) - 1)]
    while spans:
        a, b = spans.pop()
        off = np.abs(f[a : b + 1] - np.interp(u[a : b + 1], u[[a, b]], f[[a, b]]))
        if b - a > 1 and off.max() > STRAIGHT:
            middle = a + int(off.argmax())
            kept.add(middle)
            spans += [(a, middle), (middle, b)]
    order = sorted(kept - {0})
    return u[order], f[order]
