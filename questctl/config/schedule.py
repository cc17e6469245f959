"""The precision schedule of a run: full precision, then the quantizers of each stage, then those of the section `quant`.

    step 0 ── bf16 ── s₁ ── stage 1 ── s₂ ── stage 2 ── … ── s ── quant.weights, quant.activations ── steps

`quant.start` is s, and `quant.stages` has the rest as text: `0.25:quest-w8a8, 0.5:quest-w4a4`. A place below 1 is a share of
the run; from 1 on it is a number of steps. `cooldown` is the step at which the schedule wsd begins to lower the learning rate,
so that the cool-down and the quantized training coincide (called fusion in arXiv 2509.22935).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ..errors import UsageError
from ..quant.methods import label_specs
from ..quant.spec import OPERANDS, QuantSpec

COOLDOWN = "cooldown"
Place = float | str  # a share below 1, a number of steps, or COOLDOWN


class StageText(NamedTuple):
    """One entry of `quant.stages`: where it begins, and its specs."""

    start: Place
    weights: QuantSpec
    activations: QuantSpec

    def __str__(self) -> str:
        return f"{self.start if self.start == COOLDOWN else format(self.start, '.12g')}:{self.weights}/{self.activations}"


def parse_place(value: object, *, key: str) -> Place:
    """A place as a user writes it → a number, or `cooldown`. Raises UsageError naming `key` for anything else."""
    try:
        number = COOLDOWN if value == COOLDOWN else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not (isinstance(number, str) or 0 <= number <= 1 or (number > 1 and number.is_integer())):
        raise UsageError(f"{key}: {value!r} is neither a share of the run below 1, nor a number of steps, nor {COOLDOWN}.")
    return number


def parse_stages(text: str, block: int = 128) -> tuple[StageText, ...]:
    """The stages of a text such as `0.25:quest-w8a8, 0.5:int4-h32-rms-trust/int4-h32-rms-trust`.

    A label of a scheme stands for its specs with rotations of `block`. Raises UsageError for another form.
    """
    stages = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        place, colon, words = entry.partition(":")
        weights, slash, activations = (word.strip() for word in words.strip().partition("/"))
        specs = (weights, activations) if slash else label_specs(words.strip(), block)
        if not colon or specs is None:
            raise UsageError(
                f"quant.stages: '{entry}' is not of the form START:SCHEME, such as 0.25:quest-w8a8, "
                "or START:WEIGHTS/ACTIVATIONS with two quantizer specs."
            )
        w, a = (QuantSpec.parse(s, key="quant.stages", operand=o) for s, o in zip(specs, OPERANDS[:2], strict=True))
        stages.append(StageText(parse_place(place, key="quant.stages"), w, a))
    return tuple(stages)


def step_of(place: Place, steps: int, cooldown: float) -> int:
    """The step of a place in a run of `steps`, which lowers the learning rate over its last `cooldown` steps."""
    if isinstance(place, str):
        return steps - round(cooldown)
    return round(place * steps) if place < 1 else int(place)


def check_order(named: Sequence[tuple[str, int]], steps: int) -> None:
    """Raises UsageError unless the steps of these (name, step) pairs rise and lie before the end of the run."""
    for (before, first), (name, second) in pairwise(named):
        if second <= first:
            raise UsageError(f"{name}: step {second} is not after {before}, step {first}.")
    name, last = named[-1]
    if last >= max(1, steps):
        raise UsageError(f"{name}: step {last} is not before the end of the run, {steps} steps.")
