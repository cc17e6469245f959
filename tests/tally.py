"""Counts of the fault suite over all its tests, printed at the end and quoted in the documentation."""

from __future__ import annotations

from collections import Counter

COUNTS: Counter[str] = Counter()
LINES: list[str] = []  # measurements, in words


def summary() -> list[str]:
    """Lines to print; none if no fault was made."""
    kills = sum(n for what, n in COUNTS.items() if what.startswith("killed: "))
    rows = [f"{n:6d}  {what}" for what, n in sorted(COUNTS.items())]
    return [f"{kills:6d}  kills in all", *rows, *LINES] if COUNTS or LINES else []
