"""Numbers as people write them in tables: `30M`, `1.5e9`, `4,21`, `30,000,000`, `30 000 000`, `12 %`.

    column_numbers({"loss": ["4,21", "3,9"]}, ";")     decides for a whole table what its commas and dots mean
    read_number("0.75B")                               7.5e8

A comma is a decimal sign in some countries and separates thousands in others. A single cell, such as `4,211`, can be read both
ways. A column mostly cannot, and the columns of one file share their convention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

Number = int | float
MISSING = ("", "nan", "na", "n/a", "null", "none", "<na>", "#n/a", "-", "--")  # cells that hold no value, in lower case
SUFFIXES = {
    **dict.fromkeys(("k", "thousand"), 1e3),
    **dict.fromkeys(("m", "million", "mio"), 1e6),
    **dict.fromkeys(("b", "g", "bn", "billion"), 1e9),
    **dict.fromkeys(("t", "tn", "trillion"), 1e12),
    "%": 1e-2,
}
_SPACES = " \u00a0\u2009\u202f'_"  # separate thousands in every convention
_PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_TAIL = rf"(?P<exponent>e[+-]?\d+)?\s*(?P<suffix>{'|'.join(map(re.escape, sorted(SUFFIXES, key=len, reverse=True)))})?"
_SPACED = re.compile(rf"[+-]?\d{{1,3}}(?:[{_SPACES}]\d{{3}})+(?![\d{_SPACES}])")


def _grammar(decimal: str, group: str) -> re.Pattern[str]:
    d, g = re.escape(decimal), re.escape(group)
    return re.compile(
        rf"(?P<sign>[+-]?)(?P<whole>[1-9]\d{{0,2}}(?:{g}\d{{3}})+|\d+)?(?:{d}(?P<part>\d*))?{_TAIL}", re.IGNORECASE
    )


_POINT, _COMMA = _grammar(".", ","), _grammar(",", ".")


def read_number(text: str) -> Number | None:
    """The number that a text with a decimal point means; None if it is not a number. Integers stay exact up to 18 digits."""
    text = _closed(text)
    if re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    if _PLAIN.fullmatch(text):
        return float(text)
    return _number(_POINT.fullmatch(text))


def is_percentage(text: str) -> bool:
    """Whether a cell is a number with a percent sign."""
    return text.strip().endswith("%") and read_number(text) is not None


def column_numbers(columns: Mapping[str, Sequence[str]], delimiter: str) -> dict[str, list[Number | str | None]]:
    """The columns that hold nothing but numbers, and missing cells as None.

    A column in which a number has a suffix or a percent sign stays text, with a decimal point, because the reader of the column
    decides what a unit means. Raises ValueError for a column whose commas can be read both ways.
    """
    used = {name: [cell for cell in map(_closed, cells) if cell.lower() not in MISSING] for name, cells in columns.items()}
    used = {name: cells for name, cells in used.items() if cells}
    commas = any(_needs(cells, _COMMA, _POINT) for cells in used.values())  # whether some column can only have decimal commas
    points = any(_needs(cells, _POINT, _COMMA) for cells in used.values())
    out: dict[str, list[Number | str | None]] = {}
    for name, cells in used.items():
        grammar = _convention(name, cells, delimiter, commas, points)
        if grammar is None:
            continue
        out[name] = [None if (c := _closed(cell)).lower() in MISSING else _value(c, grammar) for cell in columns[name]]
    return out


def _convention(name: str, cells: Sequence[str], delimiter: str, commas: bool, points: bool) -> re.Pattern[str] | None:
    """The grammar of a column's numbers, which says what commas and dots mean; None if it is not a column of numbers."""
    if all(_PLAIN.fullmatch(cell) for cell in cells):
        grouped = all(re.fullmatch(r"[1-9]\d{0,2}(\.\d{3})+", cell) for cell in cells if "." in cell)
        return _COMMA if commas and not points and grouped and any("." in cell for cell in cells) else _POINT
    point, comma = _all(cells, _POINT), _all(cells, _COMMA)
    if not (point and comma):
        return _POINT if point else _COMMA if comma else None
    if not any("," in cell for cell in cells):
        return _POINT
    if commas != points:
        return _COMMA if commas else _POINT
    if delimiter == ";":
        return _COMMA
    if delimiter == ",":
        return _POINT
    example = next(cell for cell in cells if "," in cell)
    decimal, thousands = example.replace(",", "."), example.replace(",", "")
    raise ValueError(
        f"column '{name}': '{example}' may mean {decimal} or {thousands}; write it with a decimal point, without commas"
    )


def _needs(cells: Sequence[str], grammar: re.Pattern[str], other: re.Pattern[str]) -> bool:
    """Whether one grammar explains a column and the other does not."""
    return _all(cells, grammar) and not _all(cells, other)


def _all(cells: Iterable[str], grammar: re.Pattern[str]) -> bool:
    return all(
        (grammar.fullmatch(cell) and re.search(r"\d", cell)) or (_PLAIN.fullmatch(cell) and "." not in cell) for cell in cells
    )


def _value(cell: str, grammar: re.Pattern[str]) -> Number | str:
    match = grammar.fullmatch(cell)
    if grammar is _POINT or match is None:
        plain = cell if match is None or match["suffix"] is None else cell.replace(",", "")
        if match is not None and match["suffix"] is not None:
            return plain
        number = read_number(cell)
    else:
        if match["suffix"] is not None:
            return cell.replace(".", "").replace(",", ".")
        number = _number(match)
    assert number is not None, cell
    return number


def _number(match: re.Match[str] | None) -> Number | None:
    if match is None or not (match["whole"] or match["part"]):
        return None
    whole = re.sub(r"[.,]", "", match["whole"] or "0")
    text = f"{match['sign']}{whole}" + (f".{match['part']}" if match["part"] else "") + (match["exponent"] or "")
    if match["suffix"] is None and re.fullmatch(r"[+-]?\d{1,18}", text):
        return int(text)
    number = float(text) * SUFFIXES[match["suffix"].lower()] if match["suffix"] else float(text)
    return number if math.isinf(number) or match["suffix"] in (None, "%") else float(f"{number:.15g}")


_UNIT = re.compile(r"(?<=[\dA-Z.])\s*(?:tok(?:en)?|param(?:eter)?)s?$", re.IGNORECASE)  # redundant after a number


def _closed(text: str) -> str:
    """A cell without surrounding spaces, without those between thousands, and without a unit as in `2e10 tokens`."""
    text = text.strip().replace("\u2212", "-")
    if text[:1] in "+-.0123456789" and (unit := _UNIT.search(text)):
        text = text[: unit.start()]
    return re.sub(rf"[{_SPACES}]", "", match[0]) + text[match.end() :] if (match := _SPACED.match(text)) else text
