"""Amounts as people write them: `7B` tokens, `2e21` FLOP, `24GB` of memory, to and from numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ..errors import UsageError

COUNT_UNITS: Mapping[str, float] = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
BYTE_UNITS: Mapping[str, float] = {
    "": 1.0,
    "B": 1.0,
    **{f"{prefix}B": 1000.0**k for k, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024.0**k for k, prefix in enumerate("KMGT", 1)},
}
_AMOUNT = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def human_count(n: float) -> str:
    """Write a count with three digits at most, for names and tables.

    >>> human_count(53440), human_count(1771200), human_count(7e9)
    ('53K', '1.8M', '7B')
    """
    for limit, unit, scale in ((1e3, "", 1.0), (9.995e5, "K", 1e3), (9.995e8, "M", 1e6), (float("inf"), "B", 1e9)):
        if n < limit:
            x = n / scale
            return f"{x:.1f}".removesuffix(".0") + unit if x < 10 and unit not in ("", "K") else f"{x:.0f}{unit}"
    raise AssertionError(n)


def human_bytes(n: float) -> str:
    """Write a number of bytes with one digit after the point, in units of 1024.

    >>> human_bytes(512), human_bytes(12 * 2**20), human_bytes(1.5e11)
    ('512 bytes', '12.0 MiB', '139.7 GiB')
    """
    if n < 2**10:
        return f"{n:.0f} bytes"
    unit, size = next(
        (unit, size) for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if n >= size
    )
    return f"{n / size:,.1f} {unit}"


def parse_amount(text: str, key: str, units: Mapping[str, float] = COUNT_UNITS) -> float:
    """Read a positive number with a unit, in any case; `units` maps each unit in capitals to its size.

    Raises UsageError, which names `key` and the units.

    >>> parse_amount("2e21", "--flops"), parse_amount("24GB", "--memory", BYTE_UNITS)
    (2e+21, 24000000000.0)
    """
    match = _AMOUNT.fullmatch(text)
    try:
        value = float(match[1]) * units[match[2].upper()] if match else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if value <= 0 or not math.isfinite(value):
        raise UsageError(f"{key}: '{text}' is not a positive amount; units: {', '.join(u for u in units if u)}.")
    return value


def parse_count(text: str, key: str) -> int:
    """Read a whole number of at least 1. Raises UsageError naming `key`.

    >>> parse_count("3B", "--max-tokens"), parse_count("1.5M", "--max-tokens"), parse_count("800", "--max-tokens")
    (3000000000, 1500000, 800)
    """
    value = round(parse_amount(text, key))
    if value < 1:
        raise UsageError(f"{key}: '{text}' is less than 1.")
    return value
