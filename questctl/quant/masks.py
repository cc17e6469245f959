"""Which entries may be non-zero: keep(z) → bool, of the shape of z. Absent = dense.

The mask is drawn from the rotated, unquantized row; the scale stays that of the dense row. A pruned entry is one more rounding,
to the level 0, so the estimator judges it like any other: under `trust` its gradient passes while |z| is at most half a step.
(So do the published 2:4 runs of arXiv 2502.05003; it lets pruned weights grow back.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .parts import Part

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TwoOfFourPairs(Part):
    """`2of4pairs`: of every 4 neighbouring pairs the 2 with the smaller 2-norm are zeroed, 4 of 8 entries kept.

    The pattern of NVIDIA's sparse tensor cores for 4-bit operands. K is a multiple of 8. Equal norms keep the earlier pair.
    """

    stem: ClassVar[str] = "2of4pairs"
    forms: ClassVar[tuple[str, ...]] = ("2of4pairs",)
    group: ClassVar[int] = 8  # entries that are decided together

    def keep(self, z: torch.Tensor) -> torch.Tensor:
        """z (…, K) → bool (…, K), true where the entry stays."""
        import torch

        pairs = z.detach().unflatten(-1, (-1, 4, 2)).norm(dim=-1)  # (…, K/8, 4)
        best = pairs.sort(dim=-1, descending=True, stable=True).indices[..., :2]
        kept = torch.zeros_like(pairs, dtype=torch.bool).scatter_(-1, best, True)
        return kept.unsqueeze(-1).expand(*kept.shape, 2).reshape(z.shape)

    def bits(self, grid_bits: float) -> float:
        """Stored bits per value: half the values, and 2 + 2 bits that place the two kept pairs of every 8 values."""
        return grid_bits / 2 + 0.5


MASKS = (TwoOfFourPairs,)
