"""Scales: the size of one unit of the grid, s of shape (…, 1) for z of shape (…, K), one scale per row.

| text      | s                                                                   | gradient of s                |
|-----------|---------------------------------------------------------------------|------------------------------|
| `rms`     | unit*(grid) · √(mean z²)                                            | none (a constant of the row) |
| `mse`     | the s with the least Σ(z − s·grid(z/s))², searched around that of `rms` | none                      |
| `absmax`  | max|z| / top(grid)                                                  | none                         |
| `absmean` | mean|z| / top(grid); one positive level only                        | none                         |
| `e8m0`    | 2^(⌊log₂ max|z|⌋ − ⌊log₂ top⌋); MXFP4 is `fp4-e8m0.g32`              | none                         |
| `e4m3`    | t·E4M3(max|z|/(top·t)), t = max|tensor|/(top·448); NVFP4 is `fp4-e4m3.g16` | none                   |
| `ue8m0`, `ue4m3` | the same, rounded up: nothing is clipped, as unbiased rounding needs | none             |
| `eden`    | as `e4m3`; values are multiplied by Σz²/Σz·q instead, rounded at random to E4M3 | none         |
| `e4m3x`   | as `e4m3` for max|z| on 6 or on 4, whichever has less squared error ("four over six") | none   |
| `meanstd` | √(mean (z − b)²) / top(grid) around b = mean z                      | none                         |
| `learned` | one parameter per tensor, shape (1,)                                | Σ g·(q − m·u) / √(numel·Q)   |
| `learned.r` | one parameter per row of a weight, shape (N, 1)                     | Σ over the row / √(K·Q)      |
| `learned.o` | `learned`, around a learned offset b, shape (1,)                   | and of b: Σ g·(1 − m) / √(numel·Q) |

With an offset b, the formula holds for z − b, and b is added to the result.

unit* is the grid's optimum on a standard normal, and top its outermost level. The variant after a dot says which values share a
scale: with `.g16`, `.g32`, `.g64` or `.g128` that many neighbours of a row, with `.b16` or `.b32` those of a square of 16 or 32
rows, with `.t` the whole tensor, and without a variant a row. Squares are for weights: the transposed weight has the transposed
codes, so that the backward pass can multiply by it as it is (products.py). The scales of groups and squares are counted as
stored bits: 16 for each, 8 for `e8m0` and `e4m3`. Statistics are computed in the dtype of `z`, which the quantizer makes at
least fp32. They are exact to rounding while z² neither under- nor overflows (fp32: rows of about 1e-18 to 1e18; smaller rows
count as zero).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .components import Component, memo
from .grids import FP8, Grid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scale(Component):
    """The size of a grid's unit. A new scale defines `of` for a row; groups and tensors are rows of another view (`share`)."""

    learned: ClassVar[bool] = False
    stored_bits: ClassVar[int] = 16  # of one scale
    variants: ClassVar[tuple[str, ...]] = ("g16", "g32", "g64", "g128", "b16", "b32", "t")

    @property
    def group(self) -> int:
        """How many neighbours of a row share a scale; 0 if the row or the tensor does. Divides K."""
        return int(self.variant[1:]) if self.variant.startswith(("g", "b")) else 0

    @property
    def rows(self) -> int:
        """How many rows share the scales of their groups: those of a square, else 1. Divides N."""
        return self.group if self.variant.startswith("b") else 1

    @property
    def bits(self) -> float:
        """Bits per value that the scales of groups take; scales of rows and tensors are not counted."""
        return self.stored_bits / (self.group * self.rows) if self.group else 0.0

    @property
    def by_row(self) -> bool:
        """Whether the scales of a row follow from that row alone, so that rows of several tensors can be rounded together."""
        return not self.learned and self.variant != "t" and self.rows == 1

    def share(self, z: torch.Tensor) -> torch.Tensor:
        """z (…, K) → a view whose last dimension shares a scale: (…, K/group, group), for a tensor (1, numel).

        In squares, the same groups of several rows share it.
        """
        if self.group:
            return z.unflatten(-1, (-1, self.group))
        return z.reshape(1, -1) if self.variant == "t" else z

    def centres(self, shared: torch.Tensor) -> torch.Tensor:
        """`centre` of what shares a scale, (…, 1), for values in the view of `share`."""
        return self.centre(shared) if self.rows == 1 else _to_rows(self.centre(_squares(shared, self.rows)), self.rows)

    def sizes(self, shared: torch.Tensor, grid: Grid) -> torch.Tensor:
        """`of` what shares a scale, (…, 1), for values in the view of `share`, minus their offset."""
        return self.of(shared, grid) if self.rows == 1 else _to_rows(self.of(_squares(shared, self.rows), grid), self.rows)

    @property
    def centred(self) -> bool:
        """Whether the levels lie around an offset instead of zero."""
        return False

    def centre(self, z: torch.Tensor) -> torch.Tensor:
        """z (…, K) → b (…, 1), the offset of each row; for a learned offset its initial value (1,)."""
        raise NotImplementedError

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """z (…, K) minus its offset → s (…, 1), the scale of each row; for a learned scale its initial value (1,)."""
        raise NotImplementedError

    @property
    def corrected(self) -> bool:
        """Whether levels are multiplied by another scale (`correction`) than the one with which they were rounded."""
        return False

    def correction(self, z: torch.Tensor, q: torch.Tensor, grid: Grid, noise: torch.Tensor | None) -> torch.Tensor:
        """z, q (…, K), noise (…, 1) uniform on [0, 1) → the scale (…, 1) by which levels are multiplied."""
        raise NotImplementedError


def _squares(groups: torch.Tensor, rows: int) -> torch.Tensor:
    """Groups (…, N, K/g, g) → (…, N/rows, K/g, rows·g), the values of each square in one row."""
    return groups.unflatten(-3, (-1, rows)).transpose(-3, -2).flatten(-2)


def _to_rows(of_squares: torch.Tensor, rows: int) -> torch.Tensor:
    """(…, N/rows, K/g, 1) → (…, N, K/g, 1): what squares have, for each of their rows."""
    return of_squares.repeat_interleave(rows, dim=-3)


@dataclass(frozen=True)
class Rms(Scale):
    """`rms`: the mean-squared-error optimum for normal rows (arXiv 2502.05003 §3)."""

    stem: ClassVar[str] = "rms"
    forms: ClassVar[tuple[str, ...]] = ("rms", "rms.g<16, 32, 64 or 128>", "rms.b<16 or 32>", "rms.t")

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """s = unit*·√(mean z²)."""
        import torch

        return torch.linalg.vector_norm(z, dim=-1, keepdim=True) * (grid.unit / z.shape[-1] ** 0.5)


@dataclass(frozen=True)
class AbsMax(Scale):
    """`absmax`: the largest entry of the row is the outermost level; nothing is clipped."""

    stem: ClassVar[str] = "absmax"
    forms: ClassVar[tuple[str, ...]] = ("absmax",)

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """s = max|z| / top."""
        return z.abs().amax(dim=-1, keepdim=True) / grid.top


@dataclass(frozen=True)
class AbsMean(Scale):
    """`absmean`: the mean magnitude of the row is the positive level; for grids with only one (`int1`, `ternary`, `sint2`).

    BitNet (arXiv 2310.11453) and, with `ternary-absmean.t`, BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764, eqs. 1 to 3).
    """

    stem: ClassVar[str] = "absmean"
    forms: ClassVar[tuple[str, ...]] = ("absmean",)

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """s = mean|z| / top."""
        return z.abs().mean(dim=-1, keepdim=True) / grid.top


@dataclass(frozen=True)
class Mse(Scale):
    """`mse`: the scale with the least squared error on the row itself, never worse than that of `rms`.

    The row is rounded once at each trial s, to levels q. The candidate is then s' = ⟨z, q⟩ / ⟨q, q⟩, the best scale for these
    levels, whose error is no larger. Trials are unit*·√(mean z²)·2^(k/4) for k = −8 … 8, then steps of 2^(1/8), 2^(1/16) and
    2^(1/32) around the best, and finally, twice, the best s' itself. These are 27 roundings, meant for weights and comparisons,
    not for speed. The error has many nearly equal minima.
    """

    stem: ClassVar[str] = "mse"
    forms: ClassVar[tuple[str, ...]] = ("mse",)

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The best scale found; 0 for rows of zeros."""
        import torch

        text = _text(grid)
        if torch.compiler.is_compiling():
            scale: torch.Tensor = torch.ops.questctl.mse_scale(z, text)  # opaque.py
            return scale
        start = Rms().of(z, grid)
        tiny = torch.finfo(z.dtype).tiny

        def rounded(s: torch.Tensor) -> torch.Tensor:
            return grid.quantize(z / s.clamp_min(tiny))

        def error(s: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
            return (z - s * q).square().sum(dim=-1, keepdim=True)

        tried, best, least = start, start, torch.full_like(start, math.inf)

        def attempt(s: torch.Tensor) -> None:
            nonlocal tried, best, least
            q = rounded(s)
            square = q.square().sum(dim=-1, keepdim=True)
            fitted = torch.where(square > 0, (z * q).sum(dim=-1, keepdim=True) / square.clamp_min(tiny), s)
            e = error(fitted, q)
            better = e < least
            tried, best = torch.where(better, s, tried), torch.where(better, fitted, best)
            least = torch.minimum(e, least)

        for k in range(-8, 9):
            attempt(start * 2 ** (k / 4))
        for step in (8, 16, 32):
            middle = tried
            attempt(middle * 2 ** (1 / step))
            attempt(middle * 2 ** (-1 / step))
        for _ in range(2):
            attempt(best)
        return torch.where(error(best, rounded(best)) < error(start, rounded(start)), best, start)


@memo
def _text(grid: Grid) -> str:
    """The text of a grid, which torch.compile cannot trace."""
    return grid.text


@dataclass(frozen=True)
class MeanStd(Scale):
    """`meanstd`: levels around the mean of the row, the outermost one standard deviation away.

    With `int1` this is the binary set {b − σ, b + σ} of AdaBin's weights (Tu et al. 2022, arXiv 2208.08084 §3.2).
    """

    stem: ClassVar[str] = "meanstd"
    forms: ClassVar[tuple[str, ...]] = ("meanstd",)

    @property
    def centred(self) -> bool:
        """Always true."""
        return True

    def centre(self, z: torch.Tensor) -> torch.Tensor:
        """b = mean z."""
        return z.mean(dim=-1, keepdim=True)

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """s = √(mean z²) / top of the centred row."""
        import torch

        return torch.linalg.vector_norm(z, dim=-1, keepdim=True) / (z.shape[-1] ** 0.5 * grid.top)


@dataclass(frozen=True)
class E8M0(Scale):
    """`e8m0`: a power of two from the largest entry, the shared exponent of OCP Microscaling Formats v1.0 (2023, §6.3).

    Entries between top and twice the power of two below it are clipped, as there. MXFP4 is `fp4-e8m0.g32`, MXFP8
    `fp8-e8m0.g32`.
    """

    stem: ClassVar[str] = "e8m0"
    forms: ClassVar[tuple[str, ...]] = ("e8m0", "e8m0.g32", "e8m0.b32")
    stored_bits: ClassVar[int] = 8

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """s = 2^(⌊log₂ max|z|⌋ − ⌊log₂ top⌋), within 2^±127; 0 for a row of zeros."""
        import torch

        peak = z.abs().amax(dim=-1, keepdim=True)
        exponent = torch.frexp(peak).exponent - math.frexp(grid.top)[1]  # each is one above its ⌊log₂⌋
        return torch.where(peak > 0, torch.ldexp(torch.ones_like(peak), exponent.clamp(-127, 127)), peak)


@dataclass(frozen=True)
class E4M3(Scale):
    """`e4m3`: the scale of the largest entry in 8-bit floating point, below one scale of the tensor in full precision.

    NVFP4 is `fp4-e4m3.g16` (NVIDIA 2025, arXiv 2509.25149, appendix B): the tensor's scale puts its largest group on 448, the
    largest E4M3 number. A group's is at least 2^−9, the smallest: entries far below it round to zero by themselves. Weights in
    training have `e4m3.b16` there.
    """

    stem: ClassVar[str] = "e4m3"
    forms: ClassVar[tuple[str, ...]] = ("e4m3", "e4m3.g16", "e4m3.b16")
    stored_bits: ClassVar[int] = 8

    @property
    def by_row(self) -> bool:
        """False: every scale also depends on that of the tensor."""
        return False

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """s = t·E4M3(max|z| / (top·t)), t = max|tensor| / (top·448)."""
        import torch

        peak = z.abs().amax(dim=-1, keepdim=True)
        tensor = peak.amax() / (grid.top * 448.0)
        ratio = peak / grid.top / tensor.clamp_min(torch.finfo(z.dtype).tiny)
        return tensor * FP8().quantize(ratio).clamp_min(2.0**-9)


@dataclass(frozen=True)
class UpE8M0(Scale):
    """`ue8m0`: the smallest power of two at which no entry is beyond the grid, as TetraJet (arXiv 2502.20853) has it."""

    stem: ClassVar[str] = "ue8m0"
    forms: ClassVar[tuple[str, ...]] = ("ue8m0", "ue8m0.g32")
    stored_bits: ClassVar[int] = 8

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """s = 2^⌈log₂(max|z| / top)⌉, within 2^±127; 0 for a row of zeros."""
        import torch

        ratio = z.abs().amax(dim=-1, keepdim=True) / grid.top
        mantissa, exponent = torch.frexp(ratio)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)  # a power of two stays as it is
        return torch.where(ratio > 0, torch.ldexp(torch.ones_like(ratio), exponent.clamp(-127, 127)), ratio)


HEADROOM = 256.0  # in place of 448 for the largest group where scales may still grow: by 1.5 in four over six


@dataclass(frozen=True)
class UpE4M3(E4M3):
    """`ue4m3`: as `e4m3`, each scale rounded up to the next E4M3 number, so that no entry is beyond the grid."""

    stem: ClassVar[str] = "ue4m3"
    forms: ClassVar[tuple[str, ...]] = ("ue4m3", "ue4m3.g16")

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """s = t·⌈max|z| / (top·t)⌉ in E4M3, t = max|tensor| / (top·256)."""
        peak = z.abs().amax(dim=-1, keepdim=True)
        tensor, ratio = _below_tensor(peak, grid)
        return tensor * FP8().above(ratio).clamp_min(2.0**-9)


@dataclass(frozen=True)
class FourOverSix(E4M3):
    """`e4m3x`: the largest entry of a group on 6 or on 4, whichever has less squared error (arXiv 2512.02010; 2601.22813)."""

    stem: ClassVar[str] = "e4m3x"
    forms: ClassVar[tuple[str, ...]] = ("e4m3x", "e4m3x.g16")

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The better of s = t·E4M3(max|z| / (top·t)) and s = t·E4M3(1.5·max|z| / (top·t)), t = max|tensor| / (top·256)."""
        import torch

        tensor, ratio = _below_tensor(z.abs().amax(dim=-1, keepdim=True), grid)
        six, four = (tensor * FP8().quantize(ratio * factor).clamp_min(2.0**-9) for factor in (1.0, 1.5))
        tiny = torch.finfo(z.dtype).tiny
        errors = [(z - s * grid.quantize(z / s.clamp_min(tiny))).square().sum(dim=-1, keepdim=True) for s in (six, four)]
        return torch.where(errors[1] < errors[0], four, six)


@dataclass(frozen=True)
class Eden(E4M3):
    """`eden`: rounds to nearest; the scale c = Σz²/Σz·q undoes the shrinking (arXiv 2108.08842; Quartet II, 2601.22813).

    After two rotations with fresh signs (`h128.ff`) the result is unbiased as far as 10⁵ draws can tell; after one (`h128.f`),
    the bias is .2 % of its norm. Its squared error is .42 times that of stochastic rounding. c itself is rounded stochastically
    to E4M3.
    """

    stem: ClassVar[str] = "eden"
    forms: ClassVar[tuple[str, ...]] = ("eden", "eden.g16")

    @property
    def corrected(self) -> bool:
        """True."""
        return True

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """As `e4m3`, with room above the largest group for its correction."""
        tensor, ratio = _below_tensor(z.abs().amax(dim=-1, keepdim=True), grid)
        return tensor * FP8().quantize(ratio).clamp_min(2.0**-9)

    def correction(self, z: torch.Tensor, q: torch.Tensor, grid: Grid, noise: torch.Tensor | None) -> torch.Tensor:
        """Σz²/Σz·q, rounded to E4M3 in units of the tensor's scale; 0 if all levels are 0."""
        import torch

        product = (z * q).sum(dim=-1, keepdim=True)
        tensor, _ = _below_tensor(z.abs().amax(dim=-1, keepdim=True), grid)
        tiny = torch.finfo(z.dtype).tiny
        ratio = z.square().sum(dim=-1, keepdim=True) / product.clamp_min(tiny) / tensor.clamp_min(tiny)
        rounded = FP8().quantize(ratio) if noise is None else FP8().round_at_random(ratio, noise)
        return torch.where(product > 0, tensor * rounded, torch.zeros_like(product))


def _below_tensor(peak: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entries of groups (…, 1) → the scale () of the tensor, and those of groups in its units, before rounding."""
    import torch

    tensor = peak.amax() / (grid.top * HEADROOM)
    return tensor, peak / grid.top / tensor.clamp_min(torch.finfo(peak.dtype).tiny)


@dataclass(frozen=True)
class Learned(Scale):
    """`learned`: one trained unit per tensor, after LSQ (Esser et al. 2020, arXiv 1902.08153).

    `learned.r` has one for each row of a weight, as ParetoQ (Liu et al. 2025, arXiv 2502.02631) has it. `learned.o` has a
    trained offset too, after LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576). training/optim.py says when training sets them from
    data, and how gradients move them.
    """

    stem: ClassVar[str] = "learned"
    forms: ClassVar[tuple[str, ...]] = ("learned", "learned.r", "learned.o")
    learned: ClassVar[bool] = True
    variants: ClassVar[tuple[str, ...]] = ("r", "o")

    @property
    def centred(self) -> bool:
        """Whether this is `learned.o`."""
        return self.variant == "o"

    def centre(self, z: torch.Tensor) -> torch.Tensor:
        """The initial offset, (1,): the mean of the tensor."""
        return z.mean().reshape(1)

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The initial scale: the optimum unit*·√(mean z²) over the whole tensor (1,), or over each row (…, 1)."""
        if self.variant == "r":
            return Rms().of(z, grid)
        return Rms().of(z.reshape(1, -1), grid).reshape(1)

    @staticmethod
    def gradient_factor(numel: int, grid: Grid) -> float:
        """1/√(numel·Q), Q the outermost level (LSQ §2.2), which makes the scale's gradient about as large as a weight's."""
        return (numel * grid.top) ** -0.5


SCALES = (Rms, Mse, AbsMax, AbsMean, MeanStd, E8M0, E4M3, UpE8M0, UpE4M3, FourOverSix, Eden, Learned)
