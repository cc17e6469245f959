"""The spec of a quantizer: `grid[-rotation]-scale[-sparsity]-estimator`, such as int4-h128-rms-trust; `bf16` for none.

`QuantSpec.parse` and `str` are inverses: `QuantSpec.parse(str(spec)) == spec`. A text without a scale means the scale `rms`.
Components that contradict each other are refused here, before anything is built. This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import UsageError, unknown
from .components import Component
from .estimators import ESTIMATORS, STE, Estimator, Pact, Trust
from .grids import BF16, GRIDS, Grid
from .masks import MASKS, Mask
from .rotations import ROTATIONS, Hadamard
from .scales import E4M3, SCALES, AbsMean, Mse, Rms, Scale

KINDS: dict[str, tuple[type[Component], ...]] = {  # field of QuantSpec → the classes of its component, in the order of the text
    "grid": GRIDS,
    "basis": ROTATIONS,
    "scale": SCALES,
    "sparsity": MASKS,
    "estimator": ESTIMATORS,
}
TITLES = {kind: {"basis": "rotation"}.get(kind, kind) for kind in KINDS}
OPERANDS = ("weights", "activations", "gradients")
ROWS = {"embedding": "a token's vector", "head": "a token's vector", "kv": "the vector of a head"}  # read one by one
FORM = "grid[-rotation]-scale[-sparsity]-estimator"


@dataclass(frozen=True)
class QuantSpec:
    """The five components of a quantizer; for `bf16` all but the grid are None.

    Raises UsageError if components contradict each other or if one that is needed is missing.
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
    def parse(cls, text: str, *, key: str = "quant", operand: str = "weights") -> QuantSpec:
        """The spec with this text.

        `operand`, one of OPERANDS or ROWS, is what the spec quantizes: some components make sense for stored weights only.
        Raises UsageError naming `key`, the text, the component at fault with its position, and the choices.
        """
        spec = _parse(text, key)
        reason = _misplaced(spec, operand)
        if reason:
            raise UsageError(f"{key}: '{text}': {reason}.")
        return spec

    def __str__(self) -> str:
        return "-".join(component.text for kind in KINDS if (component := getattr(self, kind)) is not None)

    @property
    def is_identity(self) -> bool:
        """Whether this is bf16, which passes values unchanged."""
        return isinstance(self.grid, BF16)

    @property
    def draws(self) -> bool:
        """Whether training with this spec draws random numbers: for levels, for signs of a rotation, or for scales."""
        fresh = self.basis is not None and self.basis.fresh > 0
        return self.grid.stochastic or fresh or (self.scale is not None and self.scale.corrected)

    @property
    def rotation(self) -> int:
        """Block size of the rotation; 0 without one. The last dimension must be a multiple of it."""
        return self.basis.block if self.basis else 0

    @property
    def bits(self) -> float:
        """Stored bits per value: 4 for int4, 2.5 for int4 with 2of4pairs, 4.25 for MXFP4.

        The places of the values that a mask keeps and the scales of groups count; a scale per row or tensor does not.
        """
        values = self.sparsity.bits(self.grid.bits) if self.sparsity else self.grid.bits
        return values + (self.scale.bits if self.scale else 0.0)


def _misplaced(spec: QuantSpec, operand: str) -> str | None:
    """Why this spec makes no sense for `operand`, as a clause; None if it makes sense."""
    assert operand in (*OPERANDS, *ROWS)
    if spec.is_identity:
        return None
    if operand != "gradients" and spec.basis and spec.basis.fresh:
        return f"'{spec.basis.text}' has fresh signs at each use, as gradients may have; for {operand} use h{spec.rotation}.s"
    if operand != "gradients" and spec.scale and spec.scale.corrected:
        return f"'{spec.scale.text}' corrects the shrinking of unbiased gradients; for {operand} use e4m3.g16"
    if operand == "weights":
        return None
    if spec.scale and spec.scale.rows > 1:
        other = "use rms or e8m0.g32" if operand in ROWS else f"use g{spec.scale.group}"
        return f"'{spec.scale.text}' has a scale for squares of a layer's weight, which {operand} have not; {other}"
    if operand in ROWS:
        return _not_by_row(spec, ROWS[operand])
    if spec.grid.coded:
        return f"the entropy code of '{spec.grid.text}' is for weights, which are stored; {operand} need a grid of whole bits"
    assert spec.scale is not None
    if operand == "activations":
        if spec.scale.learned and spec.scale.variant == "r":
            return f"'{spec.scale.text}' has a scale for each row of a weight, and rows of activations are tokens; use learned"
        return None
    assert spec.scale is not None
    assert spec.estimator is not None
    if spec.scale.learned:
        return f"'{spec.scale.text}' learns from a gradient, which gradients have none of; use another scale, such as absmax"
    if not isinstance(spec.estimator, STE):
        return f"'{spec.estimator.text}' says which inputs receive gradient, which gradients have none of; write ste"
    return None


def _not_by_row(spec: QuantSpec, row: str) -> str | None:
    """Why rows that are read one by one, such as `row`, cannot be quantized by this spec, as a clause; None if they can."""
    assert spec.scale is not None
    if spec.grid.stochastic:
        return f"'{spec.grid.text}' rounds at random, but {row} has one value wherever it is read; leave out the .sr"
    if spec.grid.coded:
        return f"'{spec.grid.text}' is an entropy code, in which {row} cannot be found by itself; use a grid of whole bits"
    if spec.sparsity:
        return f"'{spec.sparsity.text}' leaves out values for faster products, and {row} is read whole; leave it out"
    if spec.scale.learned:
        return f"'{spec.scale.text}' is a parameter of a layer, but {row} has a scale that follows from its values; use rms"
    if spec.scale.variant == "t" or isinstance(spec.scale, E4M3):
        return f"'{spec.scale.text}' has a scale of the whole tensor, but {row} is read by itself; use rms or e8m0"
    return None


def _contradiction(spec: QuantSpec) -> str | None:
    """Why these components contradict each other, as a clause; None if they do not."""
    others: list[Component] = [c for c in (spec.basis, spec.scale, spec.sparsity, spec.estimator) if c is not None]
    if spec.is_identity:
        return f"bf16 is not quantized, so '{others[0].text}' has nothing to act on; write bf16 alone" if others else None
    if spec.estimator is None:
        return f"no estimator; end the spec with one of: {', '.join(_forms('estimator'))}"
    if spec.scale is None:
        return f"no scale; choices: {', '.join(_forms('scale'))}"
    if spec.grid.coded and not isinstance(spec.scale, Rms):
        return (
            f"'{spec.grid.text}' has its bits at the step that the scale rms finds, not at that of '{spec.scale.text}'; "
            f"use rms or rms.g<16, 32, 64 or 128>"
        )
    if spec.grid.coded and spec.sparsity:
        return (
            f"'{spec.sparsity.text}' leaves the larger values, for "
            f"which the entropy code of '{spec.grid.text}' is not made; leave it out"
        )
    if spec.scale.learned and isinstance(spec.estimator, Trust):
        return (
            f"'{spec.estimator.text}' trusts errors up to half a step of the Gaussian-optimal scale, which a learned scale "
            "leaves; use clip<c> or ste with a learned scale"
        )
    if spec.grid.stochastic and isinstance(spec.estimator, Trust):
        return (
            f"'{spec.estimator.text}' trusts errors up to half a step, which the stochastic rounding of "
            f"'{spec.grid.text}' exceeds at random; use clip<c> or ste with it"
        )
    if isinstance(spec.scale, AbsMean) and (spec.grid.bits > 2 or len(spec.grid.levels) > 3):
        return (
            f"'{spec.scale.text}' puts the outermost level of '{spec.grid.text}' at the mean magnitude, where most would be "
            "clipped; it is a scale for int1, ternary and sint2"
        )
    if isinstance(spec.estimator, Pact) and not spec.scale.learned:
        return f"'pact' learns its clipping value, which the scale '{spec.scale.text}' leaves no room for; write learned"
    if spec.scale.learned and spec.scale.centred and isinstance(spec.estimator, STE):
        return f"the offset of '{spec.scale.text}' learns from clipped inputs, which 'ste' has none of; use clip1"
    if spec.sparsity and spec.scale.centred:
        return f"'{spec.sparsity.text}' prunes to zero, which the offset of '{spec.scale.text}' moves; use a scale without one"
    if isinstance(spec.scale, Mse) and spec.grid.stochastic:
        return (
            f"'{spec.scale.text}' searches the scale of the nearest level, which '{spec.grid.text}' does not round to; use rms"
        )
    if spec.sparsity and spec.grid.group > 1:
        return (
            f"'{spec.sparsity.text}' would prune outliers for which "
            f"'{spec.grid.text}' has given up their neighbours; leave it out"
        )
    if spec.sparsity and spec.grid.codebook:
        return (
            f"'{spec.sparsity.text}' prunes to zero, "
            f"for which the codebook '{spec.grid.text}' has no level; take another grid or leave it out"
        )
    return None


def _forms(*kinds: str) -> list[str]:
    return [form for kind in kinds for cls in KINDS[kind] for form in cls.forms]


@lru_cache(maxsize=1024)
def _parse(text: str, key: str) -> QuantSpec:
    components: dict[str, Any] = {}
    order = list(KINDS)
    for position, piece in enumerate(text.split("-"), start=1):
        where = f"{key}: '{text}', component {position}"
        kind, component = _read(piece, where)
        open_kinds = order[order.index(list(components)[-1]) + 1 :] if components else ["grid"]
        if component is None and open_kinds:
            raise UsageError(unknown(where, piece, _forms(*open_kinds), what=" or ".join(TITLES[k] for k in open_kinds)))
        if component is None:
            raise UsageError(f"{where}: '{piece}' is one component too many; the form is {FORM}.")
        if kind in components:
            first = components[kind].text
            raise UsageError(f"{where}: '{piece}' is a second {TITLES[kind]} after '{first}'; the form is {FORM}.")
        if kind not in open_kinds:
            raise UsageError(f"{where}: the {TITLES[kind]} '{piece}' stands in the wrong place; the form is {FORM}.")
        components[kind] = component
    if not isinstance(components["grid"], BF16):
        components.setdefault("scale", Rms())
    try:
        return QuantSpec(**components)
    except UsageError as e:  # the message gives the position of the component that it names first
        named = {position: at for position, piece in enumerate(text.split("-"), 1) if (at := str(e).find(f"'{piece}'")) >= 0}
        where = f", component {min(named, key=lambda position: named[position])}" if named else ""
        raise UsageError(f"{key}: '{text}'{where}: {e}.") from None


def _read(piece: str, where: str) -> tuple[str, Component | None]:
    """The kind and the component of one piece between dashes; ('', None) if no class knows the piece."""
    for kind, classes in KINDS.items():
        for cls in classes:
            try:
                component = cls.parse(piece)
            except ValueError as e:
                raise UsageError(f"{where}: {e}; choices: {', '.join(_forms(kind))}.") from None
            if component is not None:
                return kind, component
    return "", None


IDENTITY = QuantSpec(BF16())  # `bf16`: no quantization
