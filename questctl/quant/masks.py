"""Sparsity masks: which entries of a row may be non-zero, keep(z) → bool of the shape of z. Without a mask a row is dense.

The mask is computed from the rotated, unquantized row; the scale stays that of the dense row. Pruning is a rounding to the
level 0, so the estimator treats a pruned entry like any other: under `trust` its gradient passes while |z| is at most half a
step. This lets pruned weights grow back, as in the published 2:4 runs of arXiv 2502.05003.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .components import Component

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Mask(Component):
    """A rule for which entries are kept."""

    group: ClassVar[int] = 1  # entries that are decided together; divides K

    def keep(self, z: torch.Tensor) -> torch.Tensor:
        """z (…, K) → bool (…, K), true where the entry stays."""
        raise NotImplementedError

    def bits(self, grid_bits: float) -> float:
        """Stored bits per value, including those that say where the kept values are."""
        raise NotImplementedError


def largest(size: torch.Tensor, count: int) -> torch.Tensor:
    """(…, n) → bool (…, n), true at the `count` largest of the last dimension; of equal ones the earlier."""
    import torch

    best = size.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(-1, best, True)


@dataclass(frozen=True)
class TwoOfFourPairs(Mask):
    """`2of4pairs`: of every 4 neighbouring pairs the 2 with the smaller 2-norm are zeroed, 4 of 8 entries kept.

    The pattern of NVIDIA's sparse tensor cores for 4-bit operands. K is a multiple of 8. Equal norms keep the earlier pair.
    """

    stem: ClassVar[str] = "2of4pairs"
    forms: ClassVar[tuple[str, ...]] = ("2of4pairs",)
    group: ClassVar[int] = 8

    def keep(self, z: torch.Tensor) -> torch.Tensor:
        """z (…, K) → bool (…, K), true where the entry stays."""
        kept = largest(z.detach().unflatten(-1, (-1, 4, 2)).norm(dim=-1), 2)  # (…, K/8, 4)
        return kept.unsqueeze(-1).expand(*kept.shape, 2).reshape(z.shape)

    def bits(self, grid_bits: float) -> float:
        """Stored bits per value: half the values, and 2 + 2 bits that place the two kept pairs of every 8 values."""
        return grid_bits / 2 + 0.5


@dataclass(frozen=True)
class TwoOfFour(Mask):
    """`2of4`: of every 4 neighbours the 2 with the smaller magnitude are zeroed.

    The pattern of NVIDIA's sparse tensor cores for operands of 8 and 16 bits (Mishra et al. 2021, arXiv 2104.08378).
    """

    stem: ClassVar[str] = "2of4"
    forms: ClassVar[tuple[str, ...]] = ("2of4",)
    group: ClassVar[int] = 4

    def keep(self, z: torch.Tensor) -> torch.Tensor:
        """z (…, K) → bool (…, K); K is a multiple of 4."""
        return largest(z.detach().abs().unflatten(-1, (-1, 4)), 2).view(z.shape)

    def bits(self, grid_bits: float) -> float:
        """Half the values, and 2 + 2 bits that place the two kept ones of every 4."""
        return grid_bits / 2 + 1


@dataclass(frozen=True)
class Sparse(Mask):
    """`sparse0.5`: the ⌊f·K⌋ entries of a row with the smallest magnitude are zeroed (unstructured, Han et al. 2015)."""

    f: float
    stem: ClassVar[str] = "sparse"
    forms: ClassVar[tuple[str, ...]] = ("sparse<fraction>",)

    def __post_init__(self) -> None:
        if not 0 < self.f < 1:
            raise ValueError(f"'{self.text}': the fraction of zeros is a number between 0 and 1")

    def keep(self, z: torch.Tensor) -> torch.Tensor:
        """z (…, K) → bool (…, K)."""
        return largest(z.detach().abs(), z.shape[-1] - int(self.f * z.shape[-1]))

    def bits(self, grid_bits: float) -> float:
        """The kept values, and one bit for every value that says whether it is kept."""
        return grid_bits * (1 - self.f) + 1


MASKS = (TwoOfFourPairs, TwoOfFour, Sparse)
