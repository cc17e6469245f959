"""An input of linear layers that is not computed yet: what it is made of, and its value.

    Normed: x·gain / √(mean(x²) + eps)        Gated: silu(gate) ⊙ up

`linear.fan_out` takes one in place of a tensor. Layers ask for the value, once, and get what the plain modules compute; only
those whose inputs go through a kernel that has this step built in take it as it is (fused.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Normed(NamedTuple):
    """RMSNorm of x (…, K)."""

    norm: nn.RMSNorm
    x: torch.Tensor

    def value(self) -> torch.Tensor:
        """(…, K)."""
        y: torch.Tensor = self.norm(self.x)
        return y


class Gated(NamedTuple):
    """SiLU(gate)·up, of (…, K) each."""

    gate: torch.Tensor
    up: torch.Tensor

    def value(self) -> torch.Tensor:
        """(…, K)."""
        return F.silu(self.gate) * self.up


Source = Normed | Gated


def value_of(x: torch.Tensor | Source) -> torch.Tensor:
    """x itself, or its value."""
    return x if isinstance(x, torch.Tensor) else x.value()
