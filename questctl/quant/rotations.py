"""Hadamard rotations: the basis in which rows are quantized, z = x·H with H block-diagonal, orthonormal and constant.

Legend: K contraction width, b block, R rows.

The Hadamard matrix in Sylvester's order is H₁ = [1], H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]], here divided by √b. Its entries are
±b^(−1/2); it is symmetric and its own inverse. On a GPU each block is one dense (b, b) product. On a CPU a block of 128 or more
is two small products, since H_b = H_{b/n} ⊗ H_n: a block, laid out as rows of n, is multiplied by H_n from the right and by
H_{b/n} from the left. That takes b/n + n multiply-adds an entry instead of b (b = 128, a million entries, one core: 1.4 ms,
against 3.8 for the dense product and at least 1.1 for a mixture of butterflies and products, which takes four operations).

The variant `.s` first flips signs of the columns of x: z = (x·D)·H with D = diag(±1), which is drawn once for all runs and is
the same in every block (a randomised Hadamard rotation, arXiv 2402.04396). A plain block gathers the constant part of a row in
one entry; with random signs no such direction is singled out. The variant `.f`, for gradients only, has fresh signs at each
use; `.ff` does so twice, (x·D₁·H)·D₂·H, after which rows of any distribution are nearly normal. `rotate` of these two is that
of the plain block, and the caller flips the signs (`Quantizer.turned`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .components import Component, memo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hadamard(Component):
    """`h128`: Hadamard blocks of this size, a power of two ≥ 2 (arXiv 2502.05003 §3 uses 128)."""

    block: int
    stem: ClassVar[str] = "h"
    forms: ClassVar[tuple[str, ...]] = ("h<power of two>", "h<power of two>.s", "h<power of two>.f", "h<power of two>.ff")
    variants: ClassVar[tuple[str, ...]] = ("s", "f", "ff")

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1) or self.block > 2**16:
            raise ValueError(f"'h{self.block}': a rotation block is a power of two from 2 to 65536")

    @property
    def fresh(self) -> int:
        """How often fresh signs are drawn at each use: twice for `.ff`, once for `.f`, else never."""
        return self.variant.count("f")

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, K), z = x·M per block, M = H or D·H, in the dtype of `x`, also under autocast."""
        if self.variant != "s" and self.block >= 128 and x.device.type == "cpu":
            return self._times_factors(x)
        return self._times(x, matrix(self.block, x.dtype, x.device, self.variant == "s"))

    def unrotate(self, z: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, K), x = z·Mᵀ per block: the inverse, and the backward pass of `rotate`."""
        if self.variant != "s":
            return self.rotate(z)  # H is symmetric
        return self._times(z, matrix(self.block, z.dtype, z.device, True).T)

    def _times(self, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        import torch

        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._times(x, m)
        return (x.reshape(-1, self.block) @ m).view(x.shape)

    def _times_factors(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._times_factors(x)
        inner = max(16, 1 << self.block.bit_length() // 2)
        right, left = (matrix(n, x.dtype, x.device) for n in (inner, self.block // inner))
        blocks = (x.reshape(-1, inner) @ right).view(-1, len(left), inner)
        return torch.bmm(left.expand(len(blocks), -1, -1), blocks).view(x.shape)  # `matmul` would copy `left` for every block


ROTATIONS = (Hadamard,)


@memo
def matrix(block: int, dtype: torch.dtype, device: torch.device, signs: bool = False) -> torch.Tensor:
    """The orthonormal (block, block) Hadamard matrix in Sylvester's order; with `signs` its rows times the signs D."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        h = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while len(h) < block:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        if signs:  # Python's generator gives the same bits for a seed in every version
            h = torch.tensor(random.Random(block).choices((1.0, -1.0), k=block), dtype=h.dtype, device="cpu")[:, None] * h
        return (h / block**0.5).to(dtype=dtype, device=device)
