"""Gradient estimators: which entries receive gradient, the mask m of  out = s·(m·u + (q − m·u).detach()).

u (…, K) is the input in units of the scale, and q the level it is rounded to (0 where pruned). Masks are constants of the
backward pass. They are 0 or 1, except those of the smooth estimators.

| text        | m = 1 where                                | source                               |
|-------------|--------------------------------------------|--------------------------------------|
| `ste`       | everywhere                                 | Bengio et al. 2013, arXiv 1308.3432  |
| `clip<c>`   | |u| ≤ c·top, top the outermost level       | c = 1.3: 1-bit runs of 2502.05003    |
| `trust<f>`  | |u − q| ≤ f·(half the local step); f = 1 if left out | arXiv 2502.05003 §3        |
| `pact`      | |u| ≤ top; only clipped inputs move a learned scale | arXiv 1805.06085            |
| `tanh<w>`   | m = the slope of the smoothed staircase, steps of ½(1 + tanh(x/w)) | after arXiv 1908.05033 |
| `erf<w>`    | m = the same, steps of the normal distribution, width w |                           |

A learned scale receives g·(q − m·u), as the formula says. Under `pact` it receives g·(1 − m)·q, the gradient of the clipping
value alone.

On a uniform grid half a step is T = α*/(2^b − 1) in units of σ, the published threshold. For other grids (fp4, lloyd) the paper
gives no rule, and its code uses the threshold of another grid. Here the step is local: the gap between the levels around |u|,
and the outermost gap beyond the grid. So `trust` has one meaning for every grid: gradient passes inside the grid and half a
step beyond it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from .components import Component
from .grids import Grid

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Estimator(Component):
    """A rule for m. Most estimators are intervals, m = (|u| ≤ bound), and define only the bound."""

    lsq_factor: ClassVar[bool] = True  # whether the gradient of a learned scale is multiplied by LSQ's 1/√(numel·Q)

    def bound(self, grid: Grid) -> float | None:
        """The largest |u| that receives gradient on a dense row, in units of the scale; None if m is not an interval."""
        raise NotImplementedError

    def mask(self, u: torch.Tensor, q: torch.Tensor, grid: Grid) -> torch.Tensor:
        """u, q (…, K) → m (…, K), bool; of the dtype of u for smooth estimators."""
        bound = self.bound(grid)
        assert bound is not None
        return u.abs() <= bound

    def residual(self, u: torch.Tensor, q: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """u, q, m (…, K) → the derivative of the output with respect to a learned scale, (…, K)."""
        return q - m * u


@dataclass(frozen=True)
class STE(Estimator):
    """`ste`: the gradient passes straight through."""

    stem: ClassVar[str] = "ste"
    forms: ClassVar[tuple[str, ...]] = ("ste",)

    def bound(self, grid: Grid) -> float:
        """∞: all entries receive gradient."""
        return math.inf


@dataclass(frozen=True)
class Clip(Estimator):
    """`clip1.3`: gradient up to c times the outermost level."""

    c: float
    stem: ClassVar[str] = "clip"
    forms: ClassVar[tuple[str, ...]] = ("clip<c>",)

    def __post_init__(self) -> None:
        if not 0 < self.c < 1e6:
            raise ValueError(f"'{self.text}': the clip factor is a number above 0 (and below a million)")

    def bound(self, grid: Grid) -> float:
        """c·top plus a millionth, since rounding can put the entry that sets an absmax scale an ulp above top."""
        return self.c * grid.top * (1 + 1e-6)


@dataclass(frozen=True)
class Trust(Estimator):
    """`trust`: gradient where the rounding error is at most half a step (times the factor)."""

    factor: float = 1.0
    stem: ClassVar[str] = "trust"
    forms: ClassVar[tuple[str, ...]] = ("trust", "trust<factor>")

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1e6:
            raise ValueError(f"'{self.text}': the trust factor is a number above 0 (and below a million)")

    def bound(self, grid: Grid) -> float | None:
        """top + f·half a step.

        None for a factor below 1, which masks entries between levels, too, and for the pairs of `olive4`, where a victim is far
        from the level 0 that it gets.
        """
        return grid.top + self.factor * grid.half_step if self.factor >= 1 and grid.group == 1 else None

    def mask(self, u: torch.Tensor, q: torch.Tensor, grid: Grid) -> torch.Tensor:
        """|u − q| ≤ f·(half the local step), also for pruned entries (q = 0)."""
        return (u - q).abs() <= self.factor * grid.local_half_step(u)


@dataclass(frozen=True)
class Pact(Estimator):
    """`pact`: the clipping value α = s·top is learned from the inputs beyond it, dy/dα = sign(x) there and 0 inside.

    Choi et al. 2018, arXiv 1805.06085 §3, for inputs of both signs: the paper's clips ReLU outputs to [0, α]. So
    dL/ds = Σ g·q over |u| > top, with no further factor. (The public code of arXiv 2502.05003 gives the input no gradient;
    here, as in the paper, it is 1 inside.)
    """

    stem: ClassVar[str] = "pact"
    forms: ClassVar[tuple[str, ...]] = ("pact",)
    lsq_factor: ClassVar[bool] = False

    def bound(self, grid: Grid) -> float:
        """The outermost level."""
        return grid.top

    def residual(self, u: torch.Tensor, q: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """The outermost level where the input is clipped, 0 inside."""
        return q * ~m


@dataclass(frozen=True)
class Smooth(Estimator):
    """m = Σ (step at edge e)·f((u − e)/w)/w over the edges between the levels: the slope of the smoothed staircase.

    w is `width` times half the outermost step. With a small width gradient passes near the edges only; with a large one,
    everywhere inside the grid and, fading, beyond it. Each edge costs one pass over the data, so this suits grids with few
    levels.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        if not 1e-3 <= self.width <= 1e3:
            raise ValueError(f"'{self.text}': the width of a smooth estimator is a number from 0.001 to 1000")

    def bound(self, grid: Grid) -> None:
        """None, since m is not an interval."""
        return

    def kernel(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K) → f(x) (…, K), the density that smooths a step."""
        raise NotImplementedError

    def mask(self, u: torch.Tensor, q: torch.Tensor, grid: Grid) -> torch.Tensor:
        """u (…, K) → m (…, K)."""
        w = self.width * grid.half_step
        steps = zip(grid.edges, pairwise(grid.levels), strict=True)
        slopes = (self.kernel((u - e) / w) * ((b - a) / w) for e, (a, b) in steps)
        m = next(slopes)
        for slope in slopes:
            m += slope
        return m


@dataclass(frozen=True)
class Tanh(Smooth):
    """`tanh`, `tanh<width>`: steps of ½(1 + tanh), after Differentiable Soft Quantization (arXiv 1908.05033)."""

    stem: ClassVar[str] = "tanh"
    forms: ClassVar[tuple[str, ...]] = ("tanh", "tanh<width>")

    def kernel(self, x: torch.Tensor) -> torch.Tensor:
        """½ sech² x."""
        return (1 - x.tanh().square()).mul_(0.5)


@dataclass(frozen=True)
class Erf(Smooth):
    """`erf`, `erf<width>`: m is the slope of E[grid(u + ε)] with normal noise ε of standard deviation w."""

    stem: ClassVar[str] = "erf"
    forms: ClassVar[tuple[str, ...]] = ("erf", "erf<width>")

    def kernel(self, x: torch.Tensor) -> torch.Tensor:
        """φ(x)."""
        return x.square().mul_(-0.5).exp_().mul_((2 * math.pi) ** -0.5)


ESTIMATORS = (STE, Clip, Trust, Pact, Tanh, Erf)
