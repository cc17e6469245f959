"""The learning rate as a line through points: `optim.knots = "0.3:1, 0.7:0.5, 1:0.05"` for `optim.schedule = "knots"`.

Each point is SHARE:FACTOR: at this share of the steps after the warm-up, the rate is this factor of the peak. The line begins
with the peak at the end of the warm-up. `questctl forecast --optimize` writes such schedules.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from ..errors import UsageError

Knots = tuple[tuple[float, float], ...]


@lru_cache(maxsize=64)
def parse_knots(text: str) -> Knots:
    """The points of a text, (share in (0, 1], factor in [0, 1]) with ascending shares. Raises UsageError."""
    knots = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        share, colon, factor = entry.partition(":")
        try:
            point = float(share), float(factor)
        except ValueError:
            point = -1.0, -1.0
        if not colon or not 0 < point[0] <= 1 or not 0 <= point[1] <= 1:
            raise UsageError(
                f"optim.knots: '{entry}' is not SHARE:FACTOR, a share above 0 of the steps and a factor of the peak rate, "
                "each at most 1, such as 0.7:0.5."
            )
        knots.append(point)
    for (before, _), (after, _) in pairwise(knots):
        if after <= before:
            raise UsageError(f"optim.knots: the share {after:g} does not lie behind {before:g}; shares must ascend.")
    return tuple(knots)


def format_knots(knots: Iterable[tuple[float, float]]) -> str:
    """The text of points, to four digits."""
    return ", ".join(f"{share:.4g}:{factor:.4g}" for share, factor in knots)
