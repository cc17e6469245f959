"""Scaling of rotary frequencies for longer texts than those of the first training, written as a text without blanks.

    linear:F                    every frequency is divided by F (arXiv 2306.15595)
    llama3:F,LOW,HIGH,T         that of long waves is divided by F, of short ones kept; mixed from T/LOW to T/HIGH tokens
    yarn:F,T[,M[,FAST,SLOW]]    as llama3, by the number of turns in T tokens (arXiv 2309.00071); cos and sin times M

F is the factor, T the sequence length of the first training. M is 0.1·ln F + 1 unless given; FAST and SLOW are 32 and 1.
`models.llama.rotary_tables` computes the frequencies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SCALING_FORMS = ("linear:F", "llama3:F,LOW,HIGH,T", "yarn:F,T[,M[,FAST,SLOW]]")
_COUNTS = {"linear": (1,), "llama3": (4,), "yarn": (2, 3, 5)}  # kind → how many numbers it takes


class Scaling(NamedTuple):
    """A parsed text; numbers that its kind does not have are yarn's defaults."""

    kind: str
    factor: float
    length: float = 0.0  # T
    low: float = 1.0  # LOW, or SLOW
    high: float = 4.0  # HIGH, or FAST
    magnitude: float = 1.0  # M


def parse_scaling(text: str) -> Scaling | None:
    """The scaling of a text; None for an empty one. Raises ValueError, whose message lists the forms."""
    if not text:
        return None
    kind, _, rest = text.partition(":")
    try:
        numbers = [float(number) for number in rest.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in _COUNTS.get(kind, ()) or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"model.rope_scaling: {text!r} is none of {', '.join(SCALING_FORMS)}, with positive numbers.")
    factor = numbers[0]
    if kind == "linear":
        return Scaling(kind, factor)
    if kind == "llama3":
        return Scaling(kind, factor, low=numbers[1], high=numbers[2], length=numbers[3])
    default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    magnitude = numbers[2] if len(numbers) > 2 else default
    fast, slow = numbers[3:] or (32.0, 1.0)
    return Scaling(kind, factor, length=numbers[1], low=slow, high=fast, magnitude=magnitude)


def scaling_text(kind: str, *numbers: float) -> str:
    """The text of a kind and its numbers, whole ones without a point."""
    return f"{kind}:{','.join(f'{number:.15g}' for number in numbers)}"


def checked_scaling(value: object) -> object:
    """The text in the form that a config stores. Raises ValueError as `parse_scaling` does."""
    if not isinstance(value, str) or not parse_scaling(value):
        return value
    kind, _, rest = value.partition(":")
    return scaling_text(kind, *(float(number) for number in rest.split(",")))
