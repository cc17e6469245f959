"""Conditions that select rows of a table: `VALUE`, `A|B` or `A,B`, `!=VALUE`, `<VALUE`, `<=VALUE`, `>VALUE`, `>=VALUE`.

    says(3e7, "<=1e8")      True
    says("w4a4", "w4a4|w8a8")

Conditions that begin with a sign are joined by `&`: `>=1e7&<=1e8`. Numbers are compared as numbers, all else as text.
"""

from __future__ import annotations

import math
import re
from typing import Any

from .cells import read_number

_CONDITION = re.compile(r"(?P<sign>!=|<=|>=|<>|=<|=>|<|>|==?)\s*(?P<value>.+)")
_SIGNS = {"<>": "!=", "=<": "<=", "=>": ">="}  # as some languages write them


def written(column: str, wanted: object) -> str:
    """A condition as `--where` takes it: `scheme=w4a4`, `N<=1e8`, `N>1e7,N<1e8`."""
    parts = [part.strip() for part in str(wanted).split("&")]
    if len(parts) > 1 and all(map(_CONDITION.fullmatch, parts)):
        return ",".join(written(column, part) for part in parts)
    return f"{column}{wanted}" if str(wanted)[:1] in tuple("<>!=") else f"{column}={wanted}"


def says(cell: Any, wanted: str | float) -> bool:
    """Whether a cell meets a condition. A cell without a number or a value meets only `!=`."""
    if _equal(cell, wanted):
        return True
    text = str(wanted).strip()
    if not (match := _CONDITION.fullmatch(text)):
        return any(_equal(cell, part.strip()) for sign in "|," if sign in text for part in text.split(sign))
    if "&" in text and all(_CONDITION.fullmatch(part.strip()) for part in text.split("&")):
        return all(says(cell, part.strip()) for part in text.split("&"))
    sign, value = _SIGNS.get(match["sign"], match["sign"]), match["value"].strip()
    if sign in ("=", "=="):
        return says(cell, value)
    if sign == "!=":
        return not says(cell, value)
    return _compare(cell, sign, value)


def _equal(cell: Any, value: str | float) -> bool:
    if str(cell) == str(value):
        return True
    left, right = _float(cell), _float(value)
    return left is not None and right is not None and (left == right or math.isclose(left, right, rel_tol=1e-9))


def _compare(cell: Any, sign: str, value: str) -> bool:
    """Comparison of numbers, else of texts (dates); False for a cell without a value, or of another kind than the value."""
    left, right = _float(cell), _float(value)
    if left is not None and right is not None:
        near = math.isclose(left, right, rel_tol=1e-9)
        return near if near and "=" in sign else not near and (left < right if "<" in sign else left > right)
    if not isinstance(cell, str) or cell == "" or left is not None or right is not None:
        return False
    return (cell < value if "<" in sign else cell > value) or ("=" in sign and cell == value)


def _float(value: Any) -> float | None:
    """A number, also one written as `30M`; None for anything else, including booleans."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        value = read_number(value)
        return None if value is None else float(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number
