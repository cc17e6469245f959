"""Grids: a grid is a symmetric set of levels in units of the scale, and the rounding to them.

u = z/s (…, K) → q = grid(u), the nearest level, elementwise. One unit is one step of a uniform grid (int4: ±0.5 … ±7.5;
ternary: −1, 0, 1), the `a` of FP4 (±0 … ±6 a), or one σ of a Lloyd–Max grid. Grids are odd functions: ties go away from zero
(int) or to the even mantissa (fp4, fp8, ternary, sint), and 0 goes to a level of its own sign.

The variant `.sr` of a grid rounds stochastically in training: to one of the two levels around u, so that E[q] = u within the
grid (Gupta et al. 2015, arXiv 1502.02551). The levels, scales and errors that are derived here are those of nearest rounding.

Each grid has an optimal unit for a standard normal X: the one that minimises MSE(s) = E[(X − s·grid(X/s))²], derived from the
Gaussian integral. As the edges of cells lie midway between levels, moving them does not change the error to first order, and
the optimum solves  E[X·q] = s·E[q²].

At 1 to 4 bits `unit` is the published constant, not the derived optimum, so that runs and outputs can be compared with
published ones. The published minimiser stopped on the flat bottom of the error, up to 3e-5 away from the optimum, where the
error is larger by a factor of less than 1 + 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from .components import Component, memo

if TYPE_CHECKING:
    import torch


PUBLISHED_ALPHA = {1: 0.7978845587, 2: 1.4935346, 3: 2.0510681, 4: 2.5139306}  # arXiv 2502.05003 and its public code


@dataclass(frozen=True)
class Grid(Component):
    """A set of levels with its rounding. A new grid defines `levels`, and `quantize` if there is a faster way than a table."""

    variants: ClassVar[tuple[str, ...]] = ("sr",)
    reach: ClassVar[float] = 5.0  # the optimal scale puts the outermost level below this many σ
    group: ClassVar[int] = 1  # neighbours that are rounded together; divides K
    codebook: ClassVar[bool] = False  # levels are a table without zero: pruned values have no code
    coded: ClassVar[bool] = False  # stored by an entropy code: weights only, and only the scale that gives the stated rate

    @property
    def stochastic(self) -> bool:
        """Whether this is the variant `.sr`: training rounds by `round_at_random`."""
        return self.variant == "sr"

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """All levels in rising order, in units of the scale."""
        raise NotImplementedError

    @cached_property
    def edges(self) -> tuple[float, ...]:
        """The edges between the cells of the levels, in rising order: midway between levels."""
        return tuple((a + b) / 2 for a, b in pairwise(self.levels))

    @property
    def bits(self) -> float:
        """Stored bits per value: log2 of the number of levels."""
        return math.log2(len(self.levels))

    @property
    def top(self) -> float:
        """The outermost level."""
        return self.levels[-1]

    @property
    def half_step(self) -> float:
        """Half the gap between the two outermost levels."""
        return (self.levels[-1] - self.levels[-2]) / 2

    @cached_property
    def unit(self) -> float:
        """The scale for a standard normal; α* of the paper is `unit * top` for uniform grids, `unit` for fp4."""
        return gaussian_optimum(self.levels, self.reach)[0]

    @cached_property
    def mse(self) -> float:
        """E[(X − X̂)²] of a standard normal at the optimal scale."""
        return gaussian_optimum(self.levels, self.reach)[1]

    def quantize(self, u: torch.Tensor) -> torch.Tensor:
        """u (…, K) → q (…, K), the level of the cell that u lies in; a new tensor of the same dtype. NaN stays NaN."""
        import torch

        magnitudes, edges, _ = _table(self, u.dtype, u.device)
        nearest = magnitudes[torch.bucketize(u.abs().contiguous(), edges)]
        return torch.where(u.isnan(), u, torch.copysign(nearest, u))

    def round_at_random(self, u: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """u (…, K), noise (…, K) uniform on [0, 1) → q (…, K), one of the two levels around u.

        The upper one has the probability that makes E[q] = u. Beyond the grid q is the outermost level.
        """
        import torch

        levels = _levels(self, u.dtype, u.device)
        above = torch.bucketize(u, levels).clamp_(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        q = torch.where(noise * (high - low) < u - low, high, low)
        return torch.where(u.isnan(), u, q)

    def local_half_step(self, u: torch.Tensor) -> torch.Tensor | float:
        """Half the gap between the levels on either side of each |u| (beyond the grid: the outermost), in units."""
        import torch

        magnitudes, _, halves = _table(self, u.dtype, u.device)
        return halves[torch.bucketize(u.abs().contiguous(), magnitudes)]


@dataclass(frozen=True)
class Uniform(Grid):
    """Base of grids with equally spaced levels, one unit apart."""

    def local_half_step(self, u: torch.Tensor) -> float:
        """½, everywhere."""
        return 0.5


@dataclass(frozen=True)
class Int(Uniform):
    """`int1` … `int8`: 2^b levels ±½, ±1½, … (mid-rise: zero is no level; arXiv 2502.05003 §3)."""

    b: int
    stem: ClassVar[str] = "int"
    forms: ClassVar[tuple[str, ...]] = tuple(f"int{b}" for b in range(1, 9))

    def __post_init__(self) -> None:
        if not 1 <= self.b <= 8:
            raise ValueError(f"'int{self.b}': integer grids have 1 to 8 bits")

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """−(2^b − 1)/2 … (2^b − 1)/2 in steps of 1."""
        return tuple(k - (2**self.b - 1) / 2 for k in range(2**self.b))

    @property
    def top(self) -> float:
        """(2^b − 1)/2."""
        return (2**self.b - 1) / 2

    @property
    def half_step(self) -> float:
        """½."""
        return 0.5

    @cached_property
    def unit(self) -> float:
        """α*/top, with the published α* at 1 to 4 bits (at 8 bits 3.885 is published, but 3.922 is optimal)."""
        return PUBLISHED_ALPHA[self.b] / self.top if self.b in PUBLISHED_ALPHA else super().unit

    def quantize(self, u: torch.Tensor) -> torch.Tensor:
        """sign(u)·(⌊|u|⌋ + ½) within the grid, computed from the magnitude, so that the function is odd to the last bit."""
        return u.abs().floor_().clamp_(max=self.top - 0.5).add_(0.5).copysign_(u)


@dataclass(frozen=True)
class Whole(Uniform):
    """Base of grids of whole numbers from −top to top."""

    def quantize(self, u: torch.Tensor) -> torch.Tensor:
        """round(u) within the grid."""
        return u.clamp(-self.top, self.top).round_()


@dataclass(frozen=True)
class Ternary(Whole):
    """`ternary`: −1, 0, 1: three levels, log2 3 = 1.58 bits. (The published code's "1.585 bits" has four.)"""

    stem: ClassVar[str] = "ternary"
    forms: ClassVar[tuple[str, ...]] = ("ternary",)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """−1, 0, 1."""
        return (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class SInt(Whole):
    """`sint2` … `sint8`: whole numbers, zero among them, −(2^(b−1) − 1) … 2^(b−1) − 1; stored in b bits.

    Two's complement has one more level on the negative side. It is not used, as in common integer kernels ("narrow range"), so
    that the grid is symmetric; at 2 bits it is the ternary grid.
    """

    b: int
    stem: ClassVar[str] = "sint"
    forms: ClassVar[tuple[str, ...]] = tuple(f"sint{b}" for b in range(2, 9))

    def __post_init__(self) -> None:
        if not 2 <= self.b <= 8:
            raise ValueError(f"'sint{self.b}': zero-centred integer grids have 2 to 8 bits")

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """−(2^(b−1) − 1) … 2^(b−1) − 1 in steps of 1."""
        n = 2 ** (self.b - 1) - 1
        return tuple(float(k) for k in range(-n, n + 1))

    @property
    def bits(self) -> float:
        """b."""
        return float(self.b)


@dataclass(frozen=True)
class FP4(Grid):
    """`fp4`: E2M1, ±(0, 0.5, 1, 1.5, 2, 3, 4, 6); stored in 4 bits, as zero has two signs (OCP Microscaling v1.0, 2023)."""

    stem: ClassVar[str] = "fp4"
    forms: ClassVar[tuple[str, ...]] = ("fp4",)

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The 15 distinct values."""
        half = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
        return (*(-x for x in reversed(half)), 0.0, *half)

    @property
    def bits(self) -> float:
        """4."""
        return 4.0

    def quantize(self, u: torch.Tensor) -> torch.Tensor:
        """The sum of three uniform pieces: steps of ½ up to 2, of 1 up to 4, of 2 up to 6. This is faster than a table."""
        low, mid = u.clamp(-2, 2), u.clamp(-4, 4)
        fine = (low * 2).round_().mul_(0.5)
        middle = (mid - low).round_()
        coarse = u.clamp(-6, 6).sub_(mid).mul_(0.5).round_().mul_(2)
        return fine.add_(middle).add_(coarse)


@dataclass(frozen=True)
class FP8(Grid):
    """`fp8`: E4M3, ±0 … ±448: 4 bits of exponent, 3 of mantissa, no infinity (OCP 8-bit floating point v1.0, 2023).

    The error has a minimum in every octave of the scale, all nearly equally deep; the deepest puts 448 at 9.2 σ.
    """

    stem: ClassVar[str] = "fp8"
    forms: ClassVar[tuple[str, ...]] = ("fp8",)
    reach: ClassVar[float] = 16.0

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The 253 distinct finite values: m·2^−9 below 2^−6 (subnormal), (1 + m/8)·2^e for e = −6 … 8, m = 0 … 7, to 448."""
        half = [m * 2.0**-9 for m in range(1, 8)] + [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)]
        half.pop()  # 480 is the code of NaN
        return (*(-x for x in reversed(half)), 0.0, *half)

    @property
    def bits(self) -> float:
        """8."""
        return 8.0

    def quantize(self, u: torch.Tensor) -> torch.Tensor:
        """Rounded by conversion to the format, ties to the even mantissa."""
        import torch

        return u.clamp(-448, 448).to(torch.float8_e4m3fn).to(u.dtype)

    def above(self, u: torch.Tensor) -> torch.Tensor:
        """u (…, K), not negative → the smallest number of the format that is not below each."""
        import torch

        levels = _table(self, u.dtype, u.device)[0]
        return levels[torch.bucketize(u, levels).clamp_(max=len(levels) - 1)]


@dataclass(frozen=True)
class Olive(Grid):
    """`olive4`: outlier–victim pairs: −7 … 7, and ±12, 16, 24, 32, 48, 64, 96 for outliers (Guo et al. 2023, arXiv 2304.07493).

    An outlier (beyond 9.5, nearer to 12 than to 7) is marked by the code −8 of its neighbour in the pair, the victim, whose
    value becomes 0. Of two outliers in a pair the larger one stays. The values of outliers are the paper's abfloat, E2M1 with
    bias 2. Unit and error are derived for pairs of independent normals.
    """

    stem: ClassVar[str] = "olive4"
    forms: ClassVar[tuple[str, ...]] = ("olive4",)
    variants: ClassVar[tuple[str, ...]] = ()
    group: ClassVar[int] = 2
    edge: ClassVar[float] = 9.5

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The 29 values."""
        half = (*(float(k) for k in range(1, 8)), 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)
        return (*(-x for x in reversed(half)), 0.0, *half)

    @property
    def bits(self) -> float:
        """4."""
        return 4.0

    @cached_property
    def unit(self) -> float:
        """The minimum of `pair_error`."""
        return minimum(self.pair_error, 0.2, 0.8, 1e-9)

    @cached_property
    def mse(self) -> float:
        """`pair_error` at its minimum."""
        return self.pair_error(self.unit)

    def pair_error(self, s: float) -> float:
        """E[(X − X̂)²] at scale s.

        It is the error of the nearest level, plus X² − (X − X̂)² if X is the victim of its neighbour Y ~ N(0, 1). An X inside
        the edge of outliers is a victim with probability P(|Y| > edge); an X beyond the edge, with P(|Y| > |X|).
        """
        extra = 0.0
        within = 2 * tail(self.edge * s)
        for level, lo, hi in _cells(self.levels):
            a, b = lo * s, hi * s
            if level < self.edge:
                first, mass = within * (density(a) - density(b)), within * (tail(a) - tail(b))
            else:  # ∫ xφ·2·tail and ∫ φ·2·tail
                squares = (tail(a * 2**0.5) - tail(b * 2**0.5)) / (2 * math.pi**0.5)  # ∫ φ²
                first = 2 * (density(a) * tail(a) - density(b) * tail(b) - squares)
                mass = tail(a) ** 2 - tail(b) ** 2
            extra += 2 * (2 * s * level * first - (s * level) ** 2 * mass)
        return gaussian_error(self.levels, s) + extra

    def quantize(self, u: torch.Tensor) -> torch.Tensor:
        """u (…, K), K even → q (…, K): the nearest level, and 0 for the neighbour of an outlier."""
        q = super().quantize(u)
        size = u.abs().unflatten(-1, (-1, 2))
        out = size > self.edge
        first = (out[..., :1] & ~(out[..., 1:] & (size[..., 1:] > size[..., :1]))).squeeze(-1)  # the second is the victim
        q.unflatten(-1, (-1, 2))[..., 1].masked_fill_(first, 0.0)
        q.unflatten(-1, (-1, 2))[..., 0].masked_fill_(out[..., 1] & ~first, 0.0)
        return q


@dataclass(frozen=True)
class Power(Grid):
    """`power3` … `power8`: ±n·(k/n)^(1/a), k = 0 … n = 2^(b−1) − 1: whole numbers in the basis sign(x)·|x|^a.

    After PowerQuant and NUPES (Yvinec et al. 2023, arXiv 2301.09858 and 2308.05600). The exponent a has the least squared error
    on a standard normal. Values are rounded to the nearest level; rounding |x|^a to the nearest whole number instead has a
    larger error.
    """

    b: int
    stem: ClassVar[str] = "power"
    forms: ClassVar[tuple[str, ...]] = tuple(f"power{b}" for b in range(3, 9))

    def __post_init__(self) -> None:
        if not 3 <= self.b <= 8:
            raise ValueError(f"'power{self.b}': power-exponent grids have 3 to 8 bits")

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The levels for the optimal exponent."""
        return power_levels(2 ** (self.b - 1) - 1, gaussian_exponent(self.b))

    @property
    def bits(self) -> float:
        """b."""
        return float(self.b)


@dataclass(frozen=True)
class Lloyd(Grid):
    """`lloyd1` … `lloyd4`: the 2^b levels with the least squared error on a standard normal (Lloyd 1982, Max 1960), in σ."""

    b: int
    stem: ClassVar[str] = "lloyd"
    codebook: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = tuple(f"lloyd{b}" for b in range(1, 5))

    def __post_init__(self) -> None:
        if not 1 <= self.b <= 4:
            raise ValueError(f"'lloyd{self.b}': Lloyd–Max grids have 1 to 4 bits")

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The levels, each the centroid of its own cell."""
        half = lloyd_max(2 ** (self.b - 1))
        return (*(-x for x in reversed(half)), *half)


@dataclass(frozen=True)
class EntropyCoded(Grid):
    """`ec1.5` … `ec8`, any number of bits per weight: cells of equal width, whose indices are stored by an entropy code.

    Cells end at ±½, ±1½, …; each level is the mean of a normal within its cell. The unit, the width of a cell in σ, is the one
    at which the entropy of the cells of a standard normal is the stated rate R. The squared error is 1.42 times the theoretical
    minimum 2^(−2R) (πe/6 times for many bits: Gish and Pierce 1968); for int4 it is 3.0 times the minimum, for lloyd4 2.4
    times. Fractional bits are after Q-Palette (Lee and Song 2025, arXiv 2509.20214), whose codebooks have several dimensions.

    `bits` are those of an ideal code (arithmetic coding) for normal rows. A Huffman code of single values takes 0.16 bits more
    at 1.5 bits, 0.11 at 2, and at most 0.07 from 2.25 on. Rows that are not normal take more or fewer bits. Levels end at 8 σ.
    """

    rate: float
    stem: ClassVar[str] = "ec"
    forms: ClassVar[tuple[str, ...]] = ("ec<1.5 to 8>",)
    coded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1.5 <= self.rate <= 8:
            raise ValueError(f"'{self.text}': entropy-coded grids have 1.5 to 8 bits")

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Centroids of the cells, in units of their width."""
        half = [centroid((k - 0.5) * self.unit, (k + 0.5) * self.unit) / self.unit for k in range(1, self._outermost + 1)]
        return (*(-x for x in reversed(half)), 0.0, *half)

    @cached_property
    def edges(self) -> tuple[float, ...]:
        """±½, ±1½, …"""
        return tuple(k + 0.5 for k in range(-self._outermost, self._outermost))

    @property
    def _outermost(self) -> int:
        """The index of the outermost cell."""
        return math.ceil(8 / self.unit)

    @property
    def bits(self) -> float:
        """The rate."""
        return self.rate

    @cached_property
    def unit(self) -> float:
        """The width of a cell in σ: the root of entropy = rate."""
        return bisect(lambda width: cell_entropy(width) - self.rate, 1e-3, 4.0)

    @cached_property
    def mse(self) -> float:
        """E[(X − X̂)²] of a standard normal."""
        return gaussian_error(self.levels, self.unit, self.edges)

    def local_half_step(self, u: torch.Tensor) -> torch.Tensor:
        """The largest rounding error in the cell of each |u|; in the outermost cell, half the gap to the next lower level."""
        import torch

        _, edges, _ = _table(self, u.dtype, u.device)
        return _reaches(self, u.dtype, u.device)[torch.bucketize(u.abs(), edges)]


@dataclass(frozen=True)
class BF16(Grid):
    """`bf16`: no quantization; a spec with this grid has no other component."""

    stem: ClassVar[str] = "bf16"
    variants: ClassVar[tuple[str, ...]] = ()
    forms: ClassVar[tuple[str, ...]] = ("bf16",)

    @property
    def bits(self) -> float:
        """16."""
        return 16.0

    @classmethod
    def parse(cls, text: str) -> BF16 | None:
        """The grid if `text` is 'bf16', else None: a grid without number and variant."""
        return cls() if text == cls.stem else None


GRIDS = (Int, SInt, Ternary, FP4, FP8, Lloyd, Power, Olive, EntropyCoded, BF16)


# --- the Gaussian integral, without torch -------------------------------------------------------------------------------


def density(x: float) -> float:
    """φ(x) of the standard normal."""
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def tail(x: float) -> float:
    """P(X > x) of the standard normal."""
    return math.erfc(x / math.sqrt(2)) / 2


def _cells(levels: tuple[float, ...], edges: tuple[float, ...] | None = None) -> list[tuple[float, float, float]]:
    """(level, lower edge, upper edge) of the cells of the non-negative half line; the edges are midway if none are given."""
    half = [x for x in levels if x >= 0]
    between = [(a + b) / 2 for a, b in pairwise(half)] if edges is None else [e for e in edges if e > 0]
    return [(level, lo, hi) for level, (lo, hi) in zip(half, pairwise([0.0, *between, math.inf]), strict=True)]


def gaussian_moments(levels: tuple[float, ...], s: float, edges: tuple[float, ...] | None = None) -> tuple[float, float]:
    """E[X·q] and E[q²] for a standard normal X and the level q of the symmetric `levels` that X/s is rounded to."""
    p = [(level, density(lo * s) - density(hi * s), tail(lo * s) - tail(hi * s)) for level, lo, hi in _cells(levels, edges)]
    return 2 * math.fsum(level * m for level, m, _ in p), 2 * math.fsum(level**2 * w for level, _, w in p)


def gaussian_error(levels: tuple[float, ...], s: float, edges: tuple[float, ...] | None = None) -> float:
    """E[(X − s·q)²] of a standard normal at scale s."""
    cross, square = gaussian_moments(levels, s, edges)
    return 1 - 2 * s * cross + s * s * square


@cache
def gaussian_optimum(levels: tuple[float, ...], reach: float = 5.0) -> tuple[float, float]:
    """(unit, MSE) of the scale that minimises the squared error of symmetric `levels` on a standard normal.

    A scan over scales that put the outermost level below `reach` σ finds the basin; bisection of the stationarity condition
    E[X·q] − s·E[q²] then finds the minimum to the last digit.
    """

    def error(s: float) -> float:
        return gaussian_error(levels, s)

    scan = [reach / levels[-1] * (i + 1) / 64 for i in range(64)]
    best = min(scan, key=error)

    def slope(s: float) -> float:
        cross, square = gaussian_moments(levels, s)
        return cross - s * square

    unit = bisect(slope, best - scan[0], best + scan[0])
    return unit, error(unit)


def cell_entropy(width: float) -> float:
    """Entropy, in bits, of the index k of the cell (k ± ½)·width in which a standard normal lies; it falls with the width."""
    masses, k = [1 - 2 * tail(width / 2)], 1
    while (k - 0.5) * width < 9:
        masses.append(tail((k - 0.5) * width) - tail((k + 0.5) * width))
        k += 1
    return -math.fsum((2 if k else 1) * p * math.log2(p) for k, p in enumerate(masses) if p > 0)


def power_levels(n: int, a: float) -> tuple[float, ...]:
    """±n·(k/n)^(1/a) for k = 0 … n in rising order."""
    half = [n * (k / n) ** (1 / a) for k in range(1, n + 1)]
    return (*(-x for x in reversed(half)), 0.0, *half)


@cache
def gaussian_exponent(b: int) -> float:
    """The exponent a of the b-bit power grid with the least squared error on a standard normal, to 1e-5.

    The error at the best scale, as a function of the exponent, is flat and has one minimum between 0.4 (close to 1/3, the cube
    root, which is optimal for many levels) and 1 (the uniform grid).
    """
    n = 2 ** (b - 1) - 1
    return minimum(lambda a: gaussian_optimum(power_levels(n, a))[1], 0.4, 1.0, 1e-5)


def minimum(f: Callable[[float], float], lo: float, hi: float, width: float) -> float:
    """The minimiser, to `width`, of a function `f` with one minimum between `lo` and `hi`, by golden-section search."""
    golden = (math.sqrt(5) - 1) / 2
    a, b = hi - golden * (hi - lo), lo + golden * (hi - lo)
    fa, fb = f(a), f(b)
    while hi - lo > width:
        if fa < fb:
            hi, b, fb = b, a, fa
            a = hi - golden * (hi - lo)
            fa = f(a)
        else:
            lo, a, fa = a, b, fb
            b = lo + golden * (hi - lo)
            fb = f(b)
    return (lo + hi) / 2


def bisect(f: Callable[[float], float], lo: float, hi: float) -> float:
    """The root of a decreasing function `f` between `lo` and `hi`, to the last digit."""
    while lo < (mid := (lo + hi) / 2) < hi:
        lo, hi = (mid, hi) if f(mid) > 0 else (lo, mid)
    return mid


@cache
def lloyd_max(n: int) -> tuple[float, ...]:
    """The n positive levels of the Lloyd–Max grid with 2n levels: each is the mean of the normal within its cell.

    They are found by shooting, since Lloyd's iteration is slow. The first level determines the upper edge of its cell, whose
    centroid it must be; the edge determines the next level by reflection, and so on. The first level is right if the last one
    is the centroid of the open tail.
    """

    def grid(first: float) -> tuple[list[float], float]:
        """The levels that follow from the first, and how far the last lies below the centroid of its cell."""
        levels, lo = [first], 0.0
        for _ in range(n - 1):
            level = levels[-1]
            if density(lo) / tail(lo) <= level:  # even the open tail's centroid is lower: the first level was too high
                return levels, -math.inf
            hi = bisect(lambda x, lo=lo, c=level: c - centroid(lo, x), lo, lo + 8.0)  # type: ignore[misc]
            lo = hi
            levels.append(2 * hi - level)
        return levels, density(lo) / tail(lo) - levels[-1]

    first = bisect(lambda x: grid(x)[1], 0.0, 1.0)
    return tuple(grid(first)[0])


def centroid(lo: float, hi: float) -> float:
    """E[X | lo < X < hi] of the standard normal."""
    mass = tail(lo) - tail(hi)
    return (density(lo) - density(hi)) / mass if mass > 0 else lo


@memo
def _table(grid: Grid, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Non-negative levels (n), the edges between them (n − 1), and half the gap below each level and above the last (n + 1)."""
    import torch

    half = [x for x in grid.levels if x >= 0]
    gaps = [half[0], *((b - a) / 2 for a, b in pairwise(half)), grid.half_step]  # the gap across zero is 2·half[0] wide
    edges = [e for e in grid.edges if e > 0]
    return tuple(torch.tensor(x, dtype=dtype, device=device) for x in (half, edges, gaps))  # type: ignore[return-value]


@memo
def _levels(grid: Grid, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All levels in rising order (n)."""
    import torch

    return torch.tensor(grid.levels, dtype=dtype, device=device)


@memo
def _reaches(grid: Grid, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The largest error within each cell of the non-negative half line (n); in the last cell, half the outermost gap."""
    import torch

    cells = _cells(grid.levels, grid.edges)
    reach = [max(level - lo, hi - level) if hi < math.inf else grid.half_step for level, lo, hi in cells]
    return torch.tensor(reach, dtype=dtype, device=device)
