"""What grids, rotations, scales, masks and estimators have in common: each is a frozen value that says itself in one word.

A word is the part's `stem`, its number if it has one, and after a dot its variant if it has one: `int4`, `h128`, `clip1.3`,
`ste`, `int4.sr`, `rms.g32`. The number is the part's only field beside `variant`; a default lets it be left out (`trust` =
`trust1`). So a new part is one small class: stem, field, and what it does.
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
    variants: ClassVar[tuple[str, ...]] = ()  # what may stand after the dot

    variant: str = dataclasses.field(default="", kw_only=True)

    @property
    def word(self) -> str:
        """The canonical word: numbers without trailing zeros, a default number or variant left out."""
        field = _number(type(self))
        number = "" if field is None or getattr(self, field.name) == field.default else plain(getattr(self, field.name))
        return self.stem + number + (f".{self.variant}" if self.variant else "")

    @classmethod
    def parse(cls, word: str) -> Self | None:
        """The part that `word` says, None if it is of another kind; ValueError if its number or variant cannot be."""
        field = _number(cls)
        match = re.fullmatch(rf"{re.escape(cls.stem)}({NUMBER})?(?:\.([a-z][a-z0-9]*))?", word)
        if match is None or (match[1] is not None and field is None) or (match[2] is not None and not cls.variants):
            return None
        variant = match[2] or ""
        if variant and variant not in cls.variants:
            raise ValueError(f"'{word}': after the dot stands one of {', '.join(cls.variants)}")
        if field is None or match[1] is None:
            return cls(variant=variant) if field is None or field.default is not dataclasses.MISSING else None
        whole = field.type == "int"
        if whole and "." in match[1]:
            raise ValueError(f"'{word}': {match[1]} is not a whole number")
        return cls(**{field.name: int(match[1]) if whole else float(match[1])}, variant=variant)


def _number(cls: type[Part]) -> dataclasses.Field[Any] | None:
    """The field that is the number of a part's word."""
    return next((f for f in dataclasses.fields(cls) if f.name != "variant"), None)


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
