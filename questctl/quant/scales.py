"""How big one unit of the grid is: s of shape (…, 1) for z of shape (…, K), one scale per row.

| word      | s                                          | gradient of s              |
|-----------|--------------------------------------------|----------------------------|
| `rms`     | unit*(grid) · √(mean z²)                   | none (a constant of the row) |
| `absmax`  | max|z| / top(grid)                         | none                       |
| `learned` | one parameter per tensor, shape (1,)       | Σ g·(q − m·u) / √(numel·Q) |

unit* is the grid's optimum on a standard normal, top its outermost level. Statistics are taken in the dtype that `z`
comes in, which the quantizer makes at least fp32. Exact to rounding while z² neither under- nor overflows (fp32: rows of
about 1e-18 to 1e18; rows below count as zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .grids import Grid
from .parts import Part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scale(Part):
    """The size of a grid's unit."""

    learned: ClassVar[bool] = False

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """z (…, K) → s (…, 1), the scale of each row; for a learned scale the (1,) value that it starts from."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rms(Scale):
    """`rms`: the mean-squared-error optimum for normal rows (arXiv 2502.05003 §3)."""

    stem: ClassVar[str] = "rms"
    forms: ClassVar[tuple[str, ...]] = ("rms",)

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
class Learned(Scale):
    """`learned`: one trained unit per tensor, after LSQ (Esser et al. 2020, arXiv 1902.08153)."""

    stem: ClassVar[str] = "learned"
    forms: ClassVar[tuple[str, ...]] = ("learned",)
    learned: ClassVar[bool] = True

    def of(self, z: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Where the parameter starts, (1,): the optimum unit*·√(mean z²) over the whole tensor. Afterwards it is trained."""
        return Rms().of(z.reshape(1, -1), grid).reshape(1)

    @staticmethod
    def gradient_factor(numel: int, grid: Grid) -> float:
        """1/√(numel·Q), Q the outermost level in units (LSQ §2.2): brings the scale's gradient to the size of a weight's."""
        return (numel * grid.top) ** -0.5


SCALES = (Rms, AbsMax, Learned)
