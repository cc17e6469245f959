"""What a quantizer word means to a law: bits of its grid, bits as stored, and the error of its grid on a standard normal.

    int4-h64-rms-2of4pairs-trust  →  Format(bits=4, stored=2.5, mse=0.01154, rotated=True)

The words are those of `questctl.quant`, which this package does not import: a test over every word of every grid holds the two
together. The error is E[(X − s·q)²] at the grid's own scale s: for most grids the s with the least error, for an entropy-coded
one that of its rate. Also read: plain numbers (`4`, `1.585`), `e2m1`, `mxfp4`, `nvfp4`, `fp16`, `fp32`, `none`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from functools import cache

import numpy as np

Array = np.ndarray
FULL_BITS = 16.0  # at and above this width a tensor counts as not quantized
TERNARY_BITS = math.log2(3)

_half_fp4 = (0.5, 1, 1.5, 2, 3, 4, 6)  # E2M1: OCP Microscaling v1.0
FP4_LEVELS = (*(-v for v in reversed(_half_fp4)), 0, *_half_fp4)
_half_fp8 = [m * 2.0**-9 for m in range(1, 8)] + [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)][:-1]
FP8_LEVELS = (*(-v for v in reversed(_half_fp8)), 0.0, *_half_fp8)  # E4M3: OCP 8-bit floating point v1.0
_FULL = ("bf16", "fp16", "fp32", "full", "none", "noquantizer", "baseline")


@dataclasses.dataclass(frozen=True)
class Format:
    """How one operand is held: bits of a grid value, bits as stored (with masks and scales of groups), error of the grid."""

    bits: float
    stored: float
    mse: float
    rotated: bool


def read_format(word: str) -> Format | None:
    """The format that a word says, or the head of one; None where it says none. Scales of rows are not counted."""
    head, *parts = word.lower().split("-")
    known = _grid(head.removesuffix(".sr"))
    if known is None:
        return None
    bits, mse = known
    stored = bits
    for part in parts:
        if part == "2of4pairs":
            stored = stored / 2 + 0.5
        elif part == "2of4":
            stored = stored / 2 + 1
        elif match := re.fullmatch(r"sparse(\d*\.?\d+)", part):
            stored = stored * (1 - float(match[1])) + 1
    for part in parts:
        if match := re.fullmatch(r"(\w+)\.g(\d+)", part):
            stored += (8 if match[1] in ("e8m0", "e4m3") else 16) / int(match[2])
    return Format(bits, stored, mse, any(re.match(r"h\d", part) for part in parts))


def format_mse(word: str) -> float:
    """Gaussian mean squared error of a grid named by a word: `int4`, `4`, `ternary`, `fp4`, `bf16`; nan for other words."""
    found = read_format(word)
    return math.nan if found is None else found.mse


@cache
def _grid(name: str) -> tuple[float, float] | None:
    """(bits, error) of a grid; None where the name says none."""
    if name in ("fp4", "e2m1", "mxfp4", "nvfp4"):
        return 4.0, gaussian_mse(FP4_LEVELS)
    if name in ("fp8", "e4m3"):
        return 8.0, gaussian_mse(FP8_LEVELS)
    if name in ("ternary", "1.58", "1.585"):
        return TERNARY_BITS, grid_mse(TERNARY_BITS)
    if name in _FULL:
        return FULL_BITS, 0.0
    match = re.fullmatch(r"([a-z]*)(\d+(?:\.\d+)?)(?:bits?)?", name)
    if match is None or match[1] not in _ERRORS or not 0 < (bits := float(match[2])) <= 32:
        return None
    return bits, _ERRORS[match[1]](bits)


# ---------------------------------------------------------------------------------------------------- errors


@cache
def gaussian_mse(levels: tuple[float, ...]) -> float:
    """Least mean squared error with which the grid `a·levels`, at its best scale a, rounds a standard normal.

    Levels are symmetric and ascending. With boundaries midway between neighbours, `E[q²]` and `E[zq]` are sums of Φ and φ. A
    scan over the scales that put the outermost level between 0.1 and 16 σ finds the deepest minimum (fp8 has one in every
    octave), a bounded search its bottom.
    """
    from scipy.optimize import minimize_scalar

    unit = np.asarray(levels)

    def error(log_scale: float) -> float:
        level = math.exp(log_scale) * unit
        mass, first = _cells((level[1:] + level[:-1]) / 2)
        return float(1 + np.sum(level**2 * mass) - 2 * np.sum(level * first))

    scan = np.log(np.geomspace(0.1, 16, 120) / unit[-1])
    best = float(min(scan, key=error))
    step = scan[1] - scan[0]
    found = minimize_scalar(error, bounds=(best - step, best + step), method="bounded", options={"xatol": 1e-10})
    return float(found.fun)


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
    return gaussian_mse(tuple(np.linspace(-1, 1, count)))


def _cells(edges: Array) -> tuple[Array, Array]:
    """Edges between n cells (n − 1) → P(cell) and E[X; cell] of a standard normal X, (n,) each."""
    from scipy.special import ndtr

    edge = np.concatenate([[-np.inf], edges, [np.inf]])
    # the upper half by symmetry: differences of Φ near 1 have no digits left
    mass = np.where(edge[1:] > 0, ndtr(-edge[:-1]) - ndtr(-edge[1:]), np.diff(ndtr(edge)))
    return mass, -np.diff(np.exp(-0.5 * edge**2)) / math.sqrt(2 * math.pi)


def _whole(bits: float) -> int | None:
    """Levels on either side of a zero-centred grid; None for bits that are not whole."""
    return 2 ** (int(bits) - 1) - 1 if bits == int(bits) and 2 <= bits <= 12 else None


def _sint(bits: float) -> float:
    n = _whole(bits)
    return math.nan if n is None else gaussian_mse(tuple(float(k) for k in range(-n, n + 1)))


def _power(bits: float) -> float:
    """sign(k)·|k|^(1/a) at the best exponent a, after PowerQuant and NUPES (arXiv 2301.09858, 2308.05600)."""
    from scipy.optimize import minimize_scalar

    n = _whole(bits)
    if n is None or n < 2:
        return math.nan
    k = np.arange(-n, n + 1)

    def error(a: float) -> float:
        return gaussian_mse(tuple(np.sign(k) * np.abs(k) ** (1 / a)))

    return float(minimize_scalar(error, bounds=(0.4, 1.0), method="bounded", options={"xatol": 1e-4}).fun)


def _lloyd(bits: float) -> float:
    """The 2^bits levels with the least error (Lloyd 1982, Max 1960), by Lloyd's iteration."""
    if bits != int(bits) or bits > 6:
        return math.nan
    n = 2 ** int(bits)
    level = np.linspace(-1, 1, n) * math.sqrt(2 * math.log(n))
    for _ in range(20_000):
        mass, first = _cells((level[1:] + level[:-1]) / 2)
        moved = first / mass
        if np.abs(moved - level).max() < 1e-9:
            break
        level = moved
    return float(1 - np.sum(first**2 / mass))


def _entropy_coded(bits: float) -> float:
    """Cells of one width, each with its mean for a level, the width such that their entropy is `bits`."""
    from scipy.optimize import brentq

    def cells(width: float) -> tuple[Array, Array]:
        return _cells((np.arange(math.ceil(9 / width) * 2) - math.ceil(9 / width) + 0.5) * width)

    def entropy(width: float) -> float:
        mass = cells(width)[0]
        mass = mass[mass > 0]
        return float(-(mass * np.log2(mass)).sum())

    if not 0.1 <= bits <= 12:
        return math.nan
    mass, first = cells(brentq(lambda width: entropy(width) - bits, 1e-4, 12.0, xtol=1e-12))
    return float(1 - np.sum(first[mass > 0] ** 2 / mass[mass > 0]))


def _outlier_victim(bits: float) -> float:
    """−7 … 7 and outliers from 12 to 96, whose neighbour is lost: OliVe (arXiv 2304.07493), pairs of independent normals.

    X is 0 where its neighbour lies beyond 9.5 units and farther out than X; integrated on a fine grid of X.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import ndtr

    if bits != 4:
        return math.nan
    level = np.array([*range(8), 12, 16, 24, 32, 48, 64, 96], float)
    x = (np.arange(200_000) + 0.5) * (10 / 200_000)
    weight = np.exp(-0.5 * x**2) * math.sqrt(2 / math.pi) * 10 / 200_000

    def error(s: float) -> float:
        rounded = s * level[np.searchsorted((level[1:] + level[:-1]) / 2, x / s)]
        victim = 2 * ndtr(-np.maximum(x, 9.5 * s))
        return float(np.sum(weight * (victim * x**2 + (1 - victim) * (x - rounded) ** 2)))

    return float(minimize_scalar(error, bounds=(0.2, 0.8), method="bounded", options={"xatol": 1e-7}).fun)


_ERRORS: dict[str, Callable[[float], float]] = {
    "": grid_mse,
    "int": grid_mse,
    "uint": grid_mse,
    "sint": _sint,
    "lloyd": _lloyd,
    "power": _power,
    "ec": _entropy_coded,
    "olive": _outlier_victim,
}
