"""Which entries receive gradient: the mask m of  out = s·(m·u + (q − m·u).detach()).

u (…, K) is the input in units of the scale, q the level it became (0 where pruned). Each mask is 0/1 and constant in the
backward pass.

| word        | m = 1 where                                | source                               |
|-------------|--------------------------------------------|--------------------------------------|
| `ste`       | everywhere                                 | Bengio et al. 2013, arXiv 1308.3432  |
| `clip<c>`   | |u| ≤ c·top, top the outermost level       | c = 1.3: 1-bit runs of 2502.05003    |
| `trust<f>`  | |u − q| ≤ f·(half the local step); f = 1 if left out | arXiv 2502.05003 §3        |

On a uniform grid half a step is T = α*/(2^b − 1) in units of σ, the published threshold. On other grids (fp4, lloyd) the
paper gives no rule and its code borrows the threshold of another grid; here the step is the local one: the gap between
the levels around |u|, and beyond the grid the outermost gap. So `trust` means the same for every grid: all inside it and
half a step beyond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .grids import Grid
from .parts import Part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Estimator(Part):
    """A rule for m. Most are intervals, m = (|u| ≤ bound), and need to say only the bound."""

    def bound(self, grid: Grid) -> float | None:
        """The largest |u| that receives gradient on a dense row, in units of the scale; None where m is no interval."""
        raise NotImplementedError

    def mask(self, u: torch.Tensor, q: torch.Tensor, grid: Grid) -> torch.Tensor:
        """u, q (…, K) → m (…, K), bool."""
        bound = self.bound(grid)
        assert bound is not None
        return u.abs() <= bound


@dataclass(frozen=True)
class STE(Estimator):
    """`ste`: the gradient passes straight through."""

    stem: ClassVar[str] = "ste"
    forms: ClassVar[tuple[str, ...]] = ("ste",)

    def bound(self, grid: Grid) -> float:
        """No bound."""
        return math.inf


@dataclass(frozen=True)
class Clip(Estimator):
    """`clip1.3`: gradient up to c times the outermost level."""

    c: float
    stem: ClassVar[str] = "clip"
    forms: ClassVar[tuple[str, ...]] = ("clip<c>",)

    def __post_init__(self) -> None:
        if not 0 < self.c < 1e6:
            raise ValueError(f"'{self.word}': the clip factor is a number above 0 (and below a million)")

    def bound(self, grid: Grid) -> float:
        """c·top, and a millionth more: the entry that made an absmax scale comes out an ulp above top or below."""
        return self.c * grid.top * (1 + 1e-6)


@dataclass(frozen=True)
class Trust(Estimator):
    """`trust`: gradient where the rounding error is at most half a step (times the factor)."""

    factor: float = 1.0
    stem: ClassVar[str] = "trust"
    forms: ClassVar[tuple[str, ...]] = ("trust", "trust<factor>")

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1e6:
            raise ValueError(f"'{self.word}': the trust factor is a number above 0 (and below a million)")

    def bound(self, grid: Grid) -> float | None:
        """top + f·half; a factor below 1 also distrusts entries between the levels, so that m is no interval."""
        return grid.top + self.factor * grid.half_step if self.factor >= 1 else None

    def mask(self, u: torch.Tensor, q: torch.Tensor, grid: Grid) -> torch.Tensor:
        """|u − q| ≤ f·half(u), which also covers pruned entries (q = 0)."""
        return (u - q).abs() <= self.factor * grid.local_half_step(u)


ESTIMATORS = (STE, Clip, Trust)
