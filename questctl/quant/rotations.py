"""In which basis a row is quantized: z = x·H, H block-diagonal, orthonormal and constant.

Legend: K contraction width, b block, R rows.

The Hadamard matrix in Sylvester's order is H₁ = [1], H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]], here divided by √b: entries ±b^(−1/2),
symmetric, its own inverse. One dense (b, b) product per block: at b ≤ 128 a matrix product beats the log₂ b passes of the
butterfly on a CPU (64 wide, 2048 rows, one core: 0.25 ms against 0.4 ms or more), and is one operation for autograd and
compilers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .parts import Part, memo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Hadamard(Part):
    """`h128`: Hadamard blocks of that size, a power of two ≥ 2 (arXiv 2502.05003 §3 uses 128)."""

    block: int
    stem: ClassVar[str] = "h"
    forms: ClassVar[tuple[str, ...]] = ("h<power of two>",)

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1) or self.block > 2**16:
            raise ValueError(f"'h{self.block}': a rotation block is a power of two from 2 to 65536")

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, K), z = x·H per block, in the dtype of `x`, also under autocast. K is a multiple of the block."""
        import torch

        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.rotate(x)
        return (x.reshape(-1, self.block) @ matrix(self.block, x.dtype, x.device)).view(x.shape)

    def unrotate(self, z: torch.Tensor) -> torch.Tensor:
        """(…, K) → (…, K), x = z·Hᵀ per block: the inverse, and the backward pass of `rotate`."""
        return self.rotate(z)  # H is symmetric


ROTATIONS = (Hadamard,)


@memo
def matrix(block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The orthonormal (block, block) Hadamard matrix in Sylvester's order."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        h = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while len(h) < block:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        return (h / block**0.5).to(dtype=dtype, device=device)
