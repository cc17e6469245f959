"""What grids, rotations, scales, masks and estimators have in common: each is a frozen value that says itself in one word.

A word is the part's `stem` followed by its number, if it has one: `int4`, `h128`, `clip1.3`, `ste`. The number is the
part's only field; a default lets it be left out (`trust` = `trust1`). So a new part is one small class: stem, field, and
what it does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import wraps
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NUMBER = r"[0-9]+(?:\.[0-9]+)?"


@dataclass(frozen=True)
class Part:
    """One of the five parts of a quantizer; subclasses add at most one number and validate it in `__post_init__`."""

    stem: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]  # how its words look, as the choices of an error show them

    @property
    def word(self) -> str:
        """The canonical word: numbers without trailing zeros, a default number left out."""
        numbers = (getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return self.stem + "".join(plain(x) for x in numbers)

    @classmethod
    def parse(cls, word: str) -> Self | None:
        """The part that `word` says, None if it is of another kind; ValueError with the reason if its number cannot be."""
        field = next(iter(dataclasses.fields(cls)), None)
        match = re.fullmatch(f"{re.escape(cls.stem)}({NUMBER})?", word)
        if match is None or (match[1] is not None and field is None):
            return None
        if match[1] is None:
            return cls() if field is None or field.default is not dataclasses.MISSING else None
        if field is not None and field.type == "int" and "." in match[1]:
            raise ValueError(f"'{word}': {match[1]} is not a whole number")
        return cls(int(match[1]) if field is not None and field.type == "int" else float(match[1]))  # type: ignore[call-arg]


def memo(f: Callable[P, T]) -> Callable[P, T]:
    """`functools.cache` for constant tensors, which torch.compile can look into (the other it ignores and rebuilds)."""
    known: dict[Any, T] = {}

    @wraps(f)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
        if args not in known:
            known[args] = f(*args, **kwargs)
        return known[args]

    return look_up


def plain(x: float) -> str:
    """A number as a word holds it: 1.30 → '1.3', 2.0 → '2', 1e-7 → '0.0000001' (a word has no room for a minus sign)."""
    text = f"{Decimal(repr(x)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
