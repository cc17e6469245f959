"""Curves drawn with characters: a sparkline in one line, and several curves over one axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """At most `width` bars between the lowest and the highest value; each bar is the mean of its share of the values.

    >>> sparkline([8, 7, 6, 5, 4, 3, 2, 1])
    '█▇▆▅▄▃▂▁'
    """
    n = min(width, len(values))
    shares = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    means = [sum(share) / len(share) for share in shares]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(BARS[min(int((m - low) / span * len(BARS)), len(BARS) - 1)] for m in means)


def drawing(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    width: int = 64,
    height: int = 14,
    x_label: Callable[[float], str] = "{:g}".format,
) -> list[str]:
    """Draw curves over one axis as lines of text, with a logarithmic y axis.

    `curves` maps the letter that draws a curve to its points (x, y), positive and ascending in x. Where curves meet, the letter
    of the first one is shown. The y axis ends at the highest value after the first tenth of each curve; `x_label` writes the
    two ends of the x axis.
    """
    late = [y for curve in curves.values() for _, y in curve[len(curve) // 10 :]]
    low, high, end = math.log(min(late)), math.log(max(late)), max(curve[-1][0] for curve in curves.values())
    start = min(curve[0][0] for curve in curves.values())
    rows = [[" "] * width for _ in range(height)]
    for letter, curve in reversed(list(curves.items())):
        for column in range(width):
            x = start + (end - start) * column / (width - 1)
            if not curve[0][0] <= x <= curve[-1][0] * (1 + 1e-9):
                continue
            y = math.log(min(curve, key=lambda point: abs(point[0] - x))[1])
            if y <= high + 1e-12:
                rows[round((high - y) / (high - low or 1.0) * (height - 1))][column] = letter
    labels = {0: f"{math.exp(high):.3f}", height - 1: f"{math.exp(low):.3f}"}
    left, right = x_label(start), x_label(end)
    out = [f"{labels.get(i, ''):>8} │{''.join(row)}".rstrip() for i, row in enumerate(rows)]
    return [*out, f"{'':>8} └{'─' * width}", f"{'':>10}{left}{right:>{width - len(left)}}"]
