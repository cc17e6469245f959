"""Learning rate and batch size from a fitted law: `optim.lr = "law:knobs.json"`, `train.batch_size = "law:knobs.json"`.

    lr* = c·N^a·D^b,    B* = k·D^β tokens          (the file of `questctl fit-knobs --json`)

N is the number of non-embedding parameters and D the number of tokens of the run. If the fit finds that schemes differ, the
factor of the run's scheme applies. The config stores the resulting numbers, so the file is not needed again, and the run id is
the same as if they had been given by hand.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError

PREFIX = "law:"
KNOB_OF = {("optim", "lr"): "lr", ("train", "batch_size"): "batch"}  # key → the knob in the file that may set it
SHIFTED = 0.05  # p-value of the test below which schemes have factors of their own
FAR = 4.0  # from this factor outside the fitted N or D on, the origin of the value says so


@dataclass(frozen=True)
class KnobValue:
    """The value of a knob by its law, and the origin to record."""

    value: float
    origin: str


def is_law(value: object) -> bool:
    """Whether a value of a config names a law."""
    return isinstance(value, str) and value.startswith(PREFIX)


def knob_by_law(key: tuple[str, str], text: str, *, N: float, D: float, scheme: str) -> KnobValue:
    """The value of `key` for a run of N parameters, D tokens and this scheme; a batch size is in tokens.

    Raises UsageError for a key without a law, DataError for a file that is missing or holds no law of the knob.
    """
    name, knob, path = ".".join(key), KNOB_OF[key], Path(text.removeprefix(PREFIX))
    try:
        fit = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{name}: {path}: there is no such file; questctl fit-knobs --json > {path} writes one.") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{name}: {path}: is no JSON that can be read: {e}.") from e
    laws = fit.get("laws", {}) if isinstance(fit, dict) and fit.get("kind") == "knobs" else None
    if laws is None:
        raise DataError(f"{name}: {path}: is not what questctl fit-knobs --json writes.")
    if knob not in laws:
        raise DataError(f"{name}: {path}: has no law of {knob}; its laws: {', '.join(laws) or 'none'}.")
    try:
        value, notes = _value(fit, laws[knob], {"N": N, "D": D}, scheme)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"{name}: {path}: its law of {knob} is not what questctl fit-knobs --json writes.") from e
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{name}: {path}: gives {value:g}, which is no positive number.")
    return KnobValue(float(f"{value:.4g}"), f"{text} ({notes})")


def _value(fit: Any, law: Any, known: dict[str, float], scheme: str) -> tuple[float, str]:
    """The value of a knob by a law of the file at N and D, and its formula with caveats."""
    value = law["factor"] * math.prod(known[k] ** power for k, power in law["exponents"].items())
    notes = " · ".join([f"{law['factor']:.4g}", *(f"{k}^{power:.3f}" for k, power in law["exponents"].items())])
    if (law.get("p_value") or 1.0) < SHIFTED and scheme in law.get("offsets", {}):
        value *= law["offsets"][scheme][0]
        notes += f" · {law['offsets'][scheme][0]:.3g} for {scheme}"
    if far := _outside(fit.get("cells", ()), {k: known[k] for k in law["exponents"]}):
        notes += f"; {far}"
    return value, notes


def _outside(cells: Any, asked: dict[str, float]) -> str:
    """A clause that says which of N and D lies far outside the fitted cells; '' if neither does."""
    for name, value in asked.items():
        values = [cell[name] for cell in cells]
        if values and not min(values) / FAR <= value <= max(values) * FAR:
            return f"{name} = {value:.3g} is far outside the {min(values):.3g} to {max(values):.3g} that were fitted"
    return ""
