"""The base class of grids, rotations, scales, masks and estimators: a frozen value with a short text form, such as `int4`.

The text of a component is its `stem`, its number if it has one, and a dot with its variant if it has one: `int4`, `h128`,
`clip1.3`, `ste`, `int4.sr`, `rms.g32`. The number is the only field of the component beside `variant`; where the field has a
default the number may be left out (`trust` = `trust1`). A new component is therefore one small class: its stem, its field, and
what it computes.
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
class Component:
    """One of the five components of a quantizer; subclasses add at most one number and validate it in `__post_init__`."""

    stem: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]  # what its text can look like, as error messages list the choices
    variants: ClassVar[tuple[str, ...]] = ()  # what may follow the dot

    variant: str = dataclasses.field(default="", kw_only=True)

    @property
    def text(self) -> str:
        """The canonical text: numbers without trailing zeros, the default number and variant left out."""
        field = _number(type(self))
        number = "" if field is None or getattr(self, field.name) == field.default else plain(getattr(self, field.name))
        return self.stem + number + (f".{self.variant}" if self.variant else "")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The component with this text; None if the text is that of another class.

        Raises ValueError if the stem is that of this class but the number or the variant is not allowed.
        """
        field = _number(cls)
        match = re.fullmatch(rf"{re.escape(cls.stem)}({NUMBER})?(?:\.([a-z][a-z0-9]*))?", text)
        if match is None or (match[1] is not None and field is None) or (match[2] is not None and not cls.variants):
            return None
        variant = match[2] or ""
        if variant and variant not in cls.variants:
            raise ValueError(f"'{text}': after the dot stands one of {', '.join(cls.variants)}")
        if field is None or match[1] is None:
            return cls(variant=variant) if field is None or field.default is not dataclasses.MISSING else None
        whole = field.type == "int"
        if whole and "." in match[1]:
            raise ValueError(f"'{text}': {match[1]} is not a whole number")
        return cls(**{field.name: int(match[1]) if whole else float(match[1])}, variant=variant)


def _number(cls: type[Component]) -> dataclasses.Field[Any] | None:
    """The field that holds the number of a component; None if the class has none."""
    return next((f for f in dataclasses.fields(cls) if f.name != "variant"), None)


def memo(f: Callable[P, T]) -> Callable[P, T]:
    """Cache the constants that `f` makes, keyed by its positional arguments.

    torch.compile traces through this cache, whereas it ignores `functools.cache` and would build the tensors anew at each call.
    A graph that finds no entry adds one, which invalidates the graph. So call a function once without the compiler before it is
    compiled.
    """
    results: dict[Any, T] = {}

    @wraps(f)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
        if args not in results:
            results[args] = f(*args, **kwargs)
        return results[args]

    return look_up


def plain(x: float) -> str:
    """A number as the text of a component holds it: 1.30 → '1.3', 2.0 → '2', 1e-7 → '0.0000001'.

    It has no exponent, because a minus sign separates components.
    """
    text = f"{Decimal(repr(x)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
