"""Searches that torch.compile treats as one operation: the 27 roundings of `mse` would else be most of a model's graph."""

from __future__ import annotations

import torch
from torch import Tensor

from .scales import Mse
from .spec import QuantSpec


@torch.library.custom_op("questctl::mse_scale", mutates_args=())
def mse_scale(z: Tensor, grid: str) -> Tensor:
    """z (…, K) → the scale `mse` (…, 1) of the grid with this text."""
    return Mse().of(z, QuantSpec.parse(f"{grid}-mse-ste").grid)


@mse_scale.register_fake
def _(z: Tensor, grid: str) -> Tensor:
    return z.new_empty((*z.shape[:-1], 1))
