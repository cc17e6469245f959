"""Training through the fused kernels: both operands as integer codes, their product exact, one pass over memory each way.

    o_x, s_x, m_x = quantize(x)      o_w, s_w, m_w = quantize(W)      y = (o_x·o_wᵀ) ⊙ s_x ⊙ s_wᵀ
    ∂x = (m_x ⊙ (∂y·Ŵ))·H            ∂W = (m_w ⊙ (∂yᵀ·X̂))·H           Ŵ = s_w ⊙ o_w, X̂ = s_x ⊙ o_x

For the backward pass stay the codes (1 byte a value) and the packed masks (1 bit). Between the two functions below a quantized
tensor is codes and scale, and a `handle` of its shape without memory, along which the gradient ∂X̂ travels: so a shared input is
quantized once and its gradients meet before they are masked and rotated once; and a weight's wait for the end of the step.

The ops are those of kernels/: Triton on a GPU, torch on a CPU. They take int grids to 7 bits with row scales (`rms`), plain
rotations of 32 to 256, no sparsity, and estimators that are intervals.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .grids import Int
from .scales import Rms
from .spec import QuantSpec

BLOCKS = (0, 32, 64, 128, 256)  # rotations of kernels/hadamard.py, and none
MASK_BITS = 8  # a packed mask holds whole bytes


class Settings(NamedTuple):
    """The numbers that the kernels take for a spec: see kernels/fake_quant.py."""

    bits: int
    alpha: float
    limit: float
    block: int


class Codes(NamedTuple):
    """A quantized tensor (…, K): odd codes int8, scale fp32 (…, 1), and what carries its gradient."""

    handle: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor


def settings(spec: QuantSpec, width: int) -> Settings | None:
    """What the kernels need to quantize rows of `width` by `spec`; None where they cannot."""
    grid, basis, scale, estimator = spec.grid, spec.basis, spec.scale, spec.estimator
    if not isinstance(grid, Int) or grid.b > 7 or grid.variant or spec.sparsity or not isinstance(scale, Rms) or scale.variant:
        return None
    if spec.rotation not in BLOCKS or (basis and basis.variant) or width % MASK_BITS or estimator is None:
        return None
    bound = estimator.bound(grid)
    if bound is None:
        return None
    return Settings(grid.b, grid.unit * grid.top, 2 * bound if bound < math.inf else math.inf, spec.rotation)


def quantize(x: torch.Tensor, how: Settings) -> Codes:
    """x (…, K) → its codes; the gradient of the handle, masked and rotated back, is that of x."""
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return Codes(*_Quantize.apply(x, how, dtype))


def product(x: Codes, w: Codes) -> torch.Tensor:
    """x (…, K), w (N, K) → y (…, N) in the dtype of x's handle: the exact integer product times both scales."""
    y: torch.Tensor = _Product.apply(*x, *w)
    return y


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: Settings, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        from ..kernels import fake_quant

        codes, scale, mask = fake_quant.quantize(x, *how)
        ctx.save_for_backward(mask)
        ctx.block, ctx.dtype = how.block, x.dtype
        ctx.mark_non_differentiable(codes, scale)
        return torch.zeros((), dtype=dtype, device=x.device).expand(x.shape), codes, scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from ..kernels.fake_quant import mask_rotate

        (mask,) = ctx.saved_tensors
        return mask_rotate(grads[0].contiguous(), mask, ctx.block).to(ctx.dtype), None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: torch.Tensor) -> torch.Tensor:
        from ..kernels.int_gemm import int_gemm

        handle, x, x_scale, _, w, w_scale = operands
        ctx.save_for_backward(x, x_scale, w, w_scale)
        return int_gemm(x, w, x_scale, w_scale, handle.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = grads
        x, x_scale, w, w_scale = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ (w * w_scale).to(g.dtype)
        if ctx.needs_input_grad[3]:
            grad_w = g.flatten(0, -2).T @ (x * x_scale).to(g.dtype).flatten(0, -2)
        return grad_x, None, None, grad_w, None, None
