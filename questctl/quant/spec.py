"""A quantizer in one word: `grid[-rotation]-scale[-sparsity]-estimator`, such as int4-h128-rms-trust; `bf16` for none.

`QuantSpec.parse` and `str` are inverse: parse(str(spec)) == spec. The scale may be left out of the input (rms). What
contradicts itself is refused here, before anything is built. Importing this module costs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import UsageError, unknown
from .components import Part
from .estimators import ESTIMATORS, STE, Estimator, Pact, Trust
from .grids import BF16, GRIDS, Grid
from .masks import MASKS, Mask
from .rotations import ROTATIONS, Hadamard
from .scales import SCALES, AbsMean, Mse, Rms, Scale

KINDS: dict[str, tuple[type[Part], ...]] = {  # field of QuantSpec → its classes, in the order of the word
    "grid": GRIDS,
    "basis": ROTATIONS,
    "scale": SCALES,
    "sparsity": MASKS,
    "estimator": ESTIMATORS,
}
TITLES = {kind: {"basis": "rotation"}.get(kind, kind) for kind in KINDS}
OPERANDS = ("weights", "activations", "gradients")
FORM = "grid[-rotation]-scale[-sparsity]-estimator"


@dataclass(frozen=True)
class QuantSpec:
    """The five parts of a quantizer; for `bf16` all but the grid are None.

    Raises UsageError if the parts contradict each other or one that is needed is missing.
    """

    grid: Grid
    basis: Hadamard | None = None
    scale: Scale | None = None
    sparsity: Mask | None = None
    estimator: Estimator | None = None

    def __post_init__(self) -> None:
        reason = _contradiction(self)
        if reason:
            raise UsageError(reason)

    @classmethod
    def parse(cls, word: str, *, key: str = "quant", operand: str = "weights") -> QuantSpec:
        """The spec that `word` says. Raises UsageError naming `key`, the word, the part and its position, and the choices.

        `operand`, one of OPERANDS: what the word is for; not every word suits what is made anew in every step.
        """
        spec = _parse(word, key)
        reason = _misplaced(spec, operand)
        if reason:
            raise UsageError(f"{key}: '{word}': {reason}.")
        return spec

    def __str__(self) -> str:
        return "-".join(part.word for part in (getattr(self, kind) for kind in KINDS) if part is not None)

    @property
    def is_identity(self) -> bool:
        """True for bf16: values pass unchanged."""
        return isinstance(self.grid, BF16)

    @property
    def rotation(self) -> int:
        """Block size of the rotation; 0 without one. The last dimension must be a multiple of it."""
        return self.basis.block if self.basis else 0

    @property
    def bits(self) -> float:
        """Stored bits per value: 4 for int4, 2.5 for int4 with 2of4pairs, 4.25 for MXFP4.

        The index of a sparsity and the scales of groups count; a scale per row or tensor does not.
        """
        values = self.sparsity.bits(self.grid.bits) if self.sparsity else self.grid.bits
        return values + (self.scale.bits if self.scale else 0.0)


def _misplaced(spec: QuantSpec, operand: str) -> str | None:
    """Why the word says nothing sensible for that operand, as a clause; None if it does."""
    assert operand in OPERANDS
    if operand == "weights" or spec.is_identity:
        return None
    if spec.grid.coded:
        return f"the entropy code of '{spec.grid.word}' is for weights, which are stored; {operand} need a grid of whole bits"
    if operand == "activations":
        return None
    assert spec.scale is not None
    assert spec.estimator is not None
    if spec.scale.learned:
        return f"'{spec.scale.word}' learns from a gradient, which gradients have none of; use another scale, such as absmax"
    if not isinstance(spec.estimator, STE):
        return f"'{spec.estimator.word}' says which inputs receive gradient, which gradients have none of; write ste"
    return None


def _contradiction(spec: QuantSpec) -> str | None:
    """Why these parts cannot stand together, as a clause; None if they can."""
    others: list[Part] = [p for p in (spec.basis, spec.scale, spec.sparsity, spec.estimator) if p is not None]
    if spec.is_identity:
        return f"bf16 is not quantized, so '{others[0].word}' has nothing to act on; write bf16 alone" if others else None
    if spec.estimator is None:
        return f"no estimator; end the word with one of: {', '.join(_forms('estimator'))}"
    if spec.scale is None:
        return f"no scale; choices: {', '.join(_forms('scale'))}"
    if spec.grid.coded and not isinstance(spec.scale, Rms):
        return (
            f"'{spec.grid.word}' has its bits at the step that the scale rms finds, not at that of '{spec.scale.word}'; "
            f"use rms or rms.g<16, 32, 64 or 128>"
        )
    if spec.grid.coded and spec.sparsity:
        return (
            f"'{spec.sparsity.word}' leaves the larger values, for "
            f"which the entropy code of '{spec.grid.word}' is not made; leave it out"
        )
    if spec.scale.learned and isinstance(spec.estimator, Trust):
        return (
            f"'{spec.estimator.word}' trusts errors up to half a step of the Gaussian-optimal scale, which a learned scale "
            "leaves; use clip<c> or ste with a learned scale"
        )
    if spec.grid.stochastic and isinstance(spec.estimator, Trust):
        return (
            f"'{spec.estimator.word}' trusts errors up to half a step, which the stochastic rounding of "
            f"'{spec.grid.word}' exceeds at random; use clip<c> or ste with it"
        )
    if isinstance(spec.scale, AbsMean) and (spec.grid.bits > 2 or len(spec.grid.levels) > 3):
        return (
            f"'{spec.scale.word}' puts the outermost level of '{spec.grid.word}' at the mean magnitude, where most would be "
            "clipped; it is a scale for int1, ternary and sint2"
        )
    if isinstance(spec.estimator, Pact) and not spec.scale.learned:
        return f"'pact' learns its clipping value, which the scale '{spec.scale.word}' leaves no room for; write learned"
    if spec.scale.learned and spec.scale.centred and isinstance(spec.estimator, STE):
        return f"the offset of '{spec.scale.word}' learns from clipped inputs, which 'ste' has none of; use clip1"
    if spec.sparsity and spec.scale.centred:
        return f"'{spec.sparsity.word}' prunes to zero, which the offset of '{spec.scale.word}' moves; use a scale without one"
    if isinstance(spec.scale, Mse) and spec.grid.stochastic:
        return (
            f"'{spec.scale.word}' searches the scale of the nearest level, which '{spec.grid.word}' does not round to; use rms"
        )
    if spec.sparsity and spec.grid.group > 1:
        return (
            f"'{spec.sparsity.word}' would prune outliers for which "
            f"'{spec.grid.word}' has given up their neighbours; leave it out"
        )
    if spec.sparsity and spec.grid.codebook:
        return (
            f"'{spec.sparsity.word}' prunes to zero, "
            f"for which the codebook '{spec.grid.word}' has no level; take another grid or leave it out"
        )
    return None


def _forms(*kinds: str) -> list[str]:
    return [form for kind in kinds for cls in KINDS[kind] for form in cls.forms]


@lru_cache(maxsize=1024)
def _parse(word: str, key: str) -> QuantSpec:
    parts: dict[str, Any] = {}
    order = list(KINDS)
    for position, text in enumerate(word.split("-"), start=1):
        where = f"{key}: '{word}', part {position}"
        kind, part = _read(text, where)
        open_kinds = order[order.index(list(parts)[-1]) + 1 :] if parts else ["grid"]
        if part is None and open_kinds:
            raise UsageError(unknown(where, text, _forms(*open_kinds), what=" or ".join(TITLES[k] for k in open_kinds)))
        if part is None:
            raise UsageError(f"{where}: '{text}' is one part too many; the form is {FORM}.")
        if kind in parts:
            raise UsageError(f"{where}: '{text}' is a second {TITLES[kind]} after '{parts[kind].word}'; the form is {FORM}.")
        if kind not in open_kinds:
            raise UsageError(f"{where}: the {TITLES[kind]} '{text}' stands in the wrong place; the form is {FORM}.")
        parts[kind] = part
    if not isinstance(parts["grid"], BF16):
        parts.setdefault("scale", Rms())
    try:
        return QuantSpec(**parts)
    except UsageError as e:  # the part that it names first stands against another
        named = {position: at for position, text in enumerate(word.split("-"), 1) if (at := str(e).find(f"'{text}'")) >= 0}
        where = f", part {min(named, key=lambda position: named[position])}" if named else ""
        raise UsageError(f"{key}: '{word}'{where}: {e}.") from None


def _read(text: str, where: str) -> tuple[str, Part | None]:
    """The kind and part that one piece of a word says; ('', None) if nothing answers to it."""
    for kind, classes in KINDS.items():
        for cls in classes:
            try:
                part = cls.parse(text)
            except ValueError as e:
                raise UsageError(f"{where}: {e}; choices: {', '.join(_forms(kind))}.") from None
            if part is not None:
                return kind, part
    return "", None


IDENTITY = QuantSpec(BF16())  # `bf16`: no quantization
