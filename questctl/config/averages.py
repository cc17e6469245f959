"""The value of `optim.average`: `ema:0.999`, or `lawa:5:100` for the last 5 snapshots, 100 steps apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError

FORMS = "ema:DECAY, such as ema:0.99, or lawa:COUNT:STEPS, such as lawa:5:100"
_WORD = re.compile(r"(?:ema:(?P<decay>0?\.\d+)|lawa:(?P<count>[1-9]\d{0,2}):(?P<every>[1-9]\d*))")


@dataclass(frozen=True)
class AverageSpec:
    """An average of weights: `ema` with a decay, or `lawa`, the mean of `count` snapshots that are `every` steps apart."""

    kind: str
    decay: float = 0.0
    count: int = 0
    every: int = 0

    @classmethod
    def parse(cls, text: str) -> AverageSpec:
        """The average that a text names. Raises UsageError naming optim.average, the text and the forms."""
        match = _WORD.fullmatch(text)
        if match is None:
            raise UsageError(f"optim.average: '{text}' is not of the form {FORMS}.")
        if match["decay"]:
            return cls("ema", float(match["decay"]))
        return cls("lawa", count=int(match["count"]), every=int(match["every"]))


def checked_average(value: object) -> object:
    """The text in the form that a config stores. Raises UsageError as `AverageSpec.parse` does."""
    if isinstance(value, str) and value:
        AverageSpec.parse(value)
    return value
