"""Inputs of linear layers whose computation can be fused with their quantization: an RMSNorm, or SiLU(gate)·up.

    Normed: x·gain / √(mean(x²) + eps)        Gated: silu(gate) ⊙ up

`linear.fan_out` takes such an input in place of a tensor, before it is computed. Layers that quantize by a fused kernel compute
and quantize it in one pass (fused.py). All others call `value_of` once and get what the plain modules compute.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Normed(NamedTuple):
    """The RMSNorm of x (…, K), not computed yet."""

    norm: nn.RMSNorm
    x: torch.Tensor

    def value(self) -> torch.Tensor:
        """The normalised x, (…, K)."""
        y: torch.Tensor = self.norm(self.x)
        return y


class Gated(NamedTuple):
    """SiLU(gate)·up, both (…, K), not computed yet."""

    gate: torch.Tensor
    up: torch.Tensor

    def value(self) -> torch.Tensor:
        """The product, (…, K)."""
        return F.silu(self.gate) * self.up


FusableInput = Normed | Gated


def value_of(x: torch.Tensor | FusableInput) -> torch.Tensor:
    """A tensor as it is; an input that is not computed yet, computed."""
    return x if isinstance(x, torch.Tensor) else x.value()
