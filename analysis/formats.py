"""Names of number formats in tables, and their meaning: grid bits, stored bits, and the grid's error on a standard normal.

    int4-h64-rms-2of4pairs-trust  →  Format(bits=4, stored=2.5, mse=0.01154, rotated=True)

Names are specs of `questctl.quant`, whose grids know their bits and errors, the beginnings of such specs (`int4`, `int4-h64`),
numbers of bits (`4`, `1.585`), and common names of formats: `e2m1`, `mxfp4`, `nvfp4`, `e4m3`, `fp16`, `fp32`, `none`. Numbers
of bits beyond the grids of questctl (`int12`, `10`) mean the uniform grid of that width.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache

from ..errors import UsageError
from ..quant.grids import FP4, FP8, GRIDS, Grid, gaussian_optimum
from ..quant.spec import QuantSpec

FULL_BITS = 16.0  # at and above this width a tensor counts as not quantized
TERNARY_BITS = math.log2(3)
FP4_LEVELS, FP8_LEVELS = FP4().levels, FP8().levels
OTHER_NAMES = {  # common name of a grid → its name in a spec
    **dict.fromkeys(("e2m1", "mxfp4", "nvfp4"), "fp4"),
    **dict.fromkeys(("e4m3", "e4m3fn", "mxfp8", "fp8_e4m3", "float8"), "fp8"),
    **dict.fromkeys(("1.58", "1.585", "b1.58", "bitnet", "1.58bit", "w1.58"), "ternary"),
    **dict.fromkeys(("e5m2", "fp8_e5m2"), "8"),
    **dict.fromkeys(("mxfp6", "e3m2", "e2m3", "fp6_e3m2", "fp6_e2m3"), "fp6"),
    **dict.fromkeys(("fp4_e2m1", "float4"), "fp4"),
    "binary": "int1",
    **{f"mxint{bits}": f"int{bits}" for bits in (4, 8)},
    **dict.fromkeys(("bfloat16", "float16", "float32", "half", "fp64", "tf32"), "bf16"),
    **dict.fromkeys(("fp16", "fp32", "full", "none", "noquantizer", "baseline"), "bf16"),
}
NAMED_WIDTH = re.compile(r"(?P<stem>[a-z]*)(?P<bits>\d+(?:\.\d+)?)(?: ?bits?)?")
UNIFORM = ("", "int", "uint")  # stems of names that mean the uniform grid of that many bits


@dataclasses.dataclass(frozen=True)
class Format:
    """The format of one operand: bits of a grid value, bits as stored (with masks and scales of groups), error of the grid."""

    bits: float
    stored: float
    mse: float
    rotated: bool


@cache
def read_format(name: str) -> Format | None:
    """The format that a name means; None if it means none. Scales of rows and tensors are not counted."""
    head = _head(name)
    if (spec := read_spec(name)) is not None:
        return Format(spec.grid.bits, spec.bits, 0.0 if spec.is_identity else spec.grid.mse, bool(spec.rotation))
    if head == "bf16":
        return Format(FULL_BITS, FULL_BITS, 0.0, False)
    if _spec(head) is None and (match := NAMED_WIDTH.fullmatch(head)) and 0 < (bits := float(match["bits"])) <= 32:
        if match["stem"] in UNIFORM:
            return Format(bits, bits, grid_mse(bits), False)
        if match["stem"] in {grid.stem.rstrip("0123456789") for grid in GRIDS}:
            return Format(bits, bits, math.nan, False)  # a width for which questctl has no such grid
    return None


def _head(name: str) -> str:
    """The grid of a format's name, as specs call it."""
    head = name.lower().partition("-")[0]
    return OTHER_NAMES.get(head.removesuffix(".sr"), head)


@cache
def read_spec(name: str) -> QuantSpec | None:
    """The spec that a name means, with the scale `rms` and the estimator `ste` where it has none; None if it means none."""
    head, rest = _head(name), name.lower().partition("-")[2]
    return _spec(f"{head}-{rest}" if rest else head)


def format_mse(name: str) -> float:
    """Gaussian mean squared error of a format: `int4`, `4`, `ternary`, `fp4`, `bf16`; nan for other names."""
    named = read_format(name)
    return math.nan if named is None else named.mse


def _spec(text: str) -> QuantSpec | None:
    """The spec that `text` is or begins: a missing estimator is completed, and components that questctl lacks are skipped."""
    head, *rest = text.split("-")
    spec = _parsed(text) or _parsed(head)
    if spec is not None and rest and _parsed(text) is None:
        for component in rest:
            longer = _parsed(f"{head}-{component}")
            head, spec = (f"{head}-{component}", longer) if longer is not None else (head, spec)
    return spec


@cache
def _parsed(text: str) -> QuantSpec | None:
    for whole in (text, f"{text}-ste"):
        try:
            return QuantSpec.parse(whole)
        except UsageError:
            continue
    return None


@cache
def gaussian_mse(levels: tuple[float, ...]) -> float:
    """Least mean squared error with which the grid `a·levels`, at its best scale a, rounds a standard normal.

    Levels are symmetric and ascending.
    """
    reach = Grid.reach if len(levels) <= 2**8 else 8.0  # grids with more levels reach farther into the tail
    return gaussian_optimum(levels, FP8.reach if levels == FP8_LEVELS else reach)[1]


def grid_mse(bits: float) -> float:
    """Gaussian mean squared error of the grid with 2^bits levels equally spaced from -s to s, at its best s (QuEST, arXiv
    2502.05003).

    0 at 16 bits and above; nan where 2^bits is not a whole number of levels.
    """
    if bits >= FULL_BITS:
        return 0.0
    count = round(2**bits)
    if count < 2 or abs(2**bits - count) > 0.01:
        return math.nan
    return gaussian_mse(tuple(k - (count - 1) / 2 for k in range(count)))
