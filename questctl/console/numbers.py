"""Numbers as people read them: table cells, rough values, durations."""

from __future__ import annotations

import math
from typing import Any


def number(cell: Any) -> str:
    """A table cell as text.

    Floats get four significant digits, or four decimals between 0.01 and 10; integers, and floats from 10,000 to 10 million,
    get separators of thousands; None and NaN become a dash.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        size = abs(cell)
        if 1e4 <= size < 1e7:
            return f"{cell:,.0f}"
        return f"{cell:.4f}" if 0.01 <= size < 10 else f"{cell:.2f}" if 10 <= size < 100 else f"{cell:.4g}"
    return str(cell)


def rough(value: float | None) -> str | None:
    """An estimate in three significant digits: 1234.5 → '1,234', 0.98765 → '0.988'."""
    return value if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


YEAR_S = 365.25 * 86400


def duration(seconds: float) -> str:
    """95 → '1m35s', 5400 → '1h30m', 300000 → '3d11h', 1e11 → '3,169 years'; NaN is unknown."""
    if math.isnan(seconds):
        return "unknown"
    if seconds >= 1e6 * YEAR_S:
        return "over a million years"
    s = int(seconds + 0.5)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 48 * 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h" if s < 1000 * 86400 else f"{s / YEAR_S:,.{s < 10 * YEAR_S:d}f} years"


UNITS = (  # name, seconds, used below so many seconds
    ("second", 1, 90),
    ("minute", 60, 5400),
    ("hour", 3600, 48 * 3600),
    ("day", 86400, 1000 * 86400),
    ("year", YEAR_S, math.inf),
)


def duration_range(low: float, high: float) -> str:
    """Two durations, rounded away from each other: (340, 530) → '5 to 9 minutes', (50, 200) → '50 seconds to 4 minutes'."""
    if low >= 1e6 * YEAR_S:
        return duration(low)
    (a, unit_a), (b, unit_b) = _in_units(low, math.floor), _in_units(min(high, 1e6 * YEAR_S), math.ceil)
    if unit_a == unit_b:
        return f"about {_counted(b, unit_b)}" if a == b else f"{a:,} to {_counted(b, unit_b)}"
    return f"{_counted(a, unit_a)} to {_counted(b, unit_b)}" if a else f"up to {_counted(b, unit_b)}"


def _in_units(seconds: float, rounding: Any) -> tuple[int, str]:
    """The time in the first unit of UNITS that fits, as a whole number with at most two significant digits."""
    name, size, _ = next(unit for unit in UNITS if seconds < unit[2])
    value = rounding(seconds / size)
    step = 10 ** max(0, len(str(value)) - 2) if value >= 100 else 5 if value >= 30 else 1
    return rounding(value / step) * step, name


def _counted(n: int, unit: str) -> str:
    return f"{n:,} {unit}{'s' * (n != 1)}"
