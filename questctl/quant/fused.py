"""Training with fused kernels: both operands are integer codes, and their product is exact.

    o_x, s_x, m_x = quantize(x)      o_w, s_w, m_w = quantize(W)      y = (o_x·o_wᵀ) ⊙ s_x ⊙ s_wᵀ
    ∂x = (m_x ⊙ (∂y·Ŵ))·H            ∂W = (m_w ⊙ (∂yᵀ·X̂))·H           Ŵ = s_w ⊙ o_w, X̂ = s_x ⊙ o_x

Each operand is quantized in one pass over memory. The codes (1 byte a value) and the packed masks (1 bit) are saved for the
backward pass. `quantize` returns codes, scale and a `handle`: a tensor of the operand's shape without memory of its own,
through which autograd passes the gradient ∂X̂. So an input that several layers share is quantized once; its gradients are
summed, and the sum is masked and rotated once. The gradients of a weight are summed until the end of the step.

An input that is an RMSNorm or a SiLU·mul (fusable.py) is computed and quantized in the same pass and never stored. Its handle
passes the gradient on to the tensors from which the input is computed; only these are saved.

The operations are those of kernels/: Triton on a GPU, torch on a CPU. They support int grids up to 7 bits with row scales
(`rms`), plain rotations of 32 to 256, no sparsity, and estimators whose mask is an interval.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .fusable import FusableInput, Gated, Normed, unaliased
from .grids import Int
from .scales import Rms
from .spec import QuantSpec

BLOCKS = (0, 32, 64, 128, 256)  # blocks of kernels/hadamard.py; 0: no rotation
MASK_BITS = 8  # a packed mask holds whole bytes


class Settings(NamedTuple):
    """The arguments with which the kernels compute a spec; see kernels/fake_quant.py."""

    bits: int
    alpha: float
    limit: float
    block: int


class Codes(NamedTuple):
    """A quantized tensor (…, K): the handle of its gradient, odd codes int8, scale fp32 (…, 1)."""

    handle: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor


def settings(spec: QuantSpec, width: int) -> Settings | None:
    """The arguments with which the kernels compute `spec` for rows of `width`; None if they do not support it."""
    grid, basis, scale, estimator = spec.grid, spec.basis, spec.scale, spec.estimator
    if not isinstance(grid, Int) or grid.b > 7 or grid.variant or spec.sparsity or not isinstance(scale, Rms) or scale.variant:
        return None
    if spec.rotation not in BLOCKS or (basis and basis.variant) or width % MASK_BITS or estimator is None:
        return None
    bound = estimator.bound(grid)
    if bound is None:
        return None
    return Settings(grid.b, grid.unit * grid.top, 2 * bound if bound < math.inf else math.inf, spec.rotation)


def quantize(x: torch.Tensor | FusableInput, how: Settings) -> Codes:
    """x (…, K) → its codes. The gradient of x is that of the handle, masked and rotated back."""
    with torch.no_grad():
        codes, scale, mask = in_one_pass(x, how)
    dtype = product_dtype(x)
    if isinstance(x, Normed):
        assert x.norm.eps is not None
        x = _Normed.apply(x.x, x.norm.weight, x.norm.eps, dtype)
    elif isinstance(x, Gated):
        x = _Gated.apply(x.gate, x.up, dtype)
    return Codes(_Masked.apply(x, mask, how.block, dtype), codes, scale)


def in_one_pass(x: torch.Tensor | FusableInput, how: Settings, *, mask: bool = True) -> tuple[torch.Tensor, ...]:
    """x (…, K) → codes int8 (…, K), scale fp32 (…, 1) and, with `mask`, the packed mask uint8 (…, K/8); no gradients."""
    from ..kernels import fake_quant, norm_quant

    limit = how.limit if mask else None
    if isinstance(x, Normed):
        assert x.norm.eps is not None
        return norm_quant.rmsnorm_quantize(x.x, x.norm.weight, x.norm.eps, how.bits, how.alpha, limit, how.block)
    if isinstance(x, Gated):
        return norm_quant.silu_mul_quantize(x.gate, x.up, how.bits, how.alpha, limit, how.block)
    if mask:
        return fake_quant.quantize(x, *how)
    return fake_quant.quantize_codes(x, how.bits, how.alpha, how.block)


def product_dtype(x: torch.Tensor | FusableInput) -> torch.dtype:
    """The dtype of a product with x: that of autocast if it is on, else that of x or of what x is computed from."""
    like = x if isinstance(x, torch.Tensor) else x.like
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


def product(x: Codes, w: Codes) -> torch.Tensor:
    """x (…, K), w (N, K) → y (…, N) in the dtype of the handle of x: the exact integer product times both scales."""
    y: torch.Tensor = _Product.apply(*x, *w)
    return y


def _handle(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return unaliased(torch.zeros((), dtype=dtype, device=like.device).expand(like.shape))


class _Masked(torch.autograd.Function):
    """The handle of a quantized tensor; its backward pass masks and rotates."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.block, ctx.dtype = block, x.dtype
        return _handle(x, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from ..kernels.fake_quant import mask_rotate

        (mask,) = ctx.saved_tensors
        return mask_rotate(grads[0].contiguous(), mask, ctx.block).to(ctx.dtype), None, None, None


class _Normed(torch.autograd.Function):
    """The handle of an RMSNorm that is not stored."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return _handle(x, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from ..kernels.norm_quant import rmsnorm_backward

        x, gain = ctx.saved_tensors
        return *rmsnorm_backward(grads[0], x, gain, ctx.eps), None, None


class _Gated(torch.autograd.Function):
    """The handle of a SiLU·mul that is not stored."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _handle(gate, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from ..kernels.norm_quant import silu_mul_backward

        gate, up = ctx.saved_tensors
        return *silu_mul_backward(grads[0], gate, up), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: torch.Tensor) -> torch.Tensor:
        from ..kernels.int_gemm import int_gemm

        handle, x, x_scale, _, w, w_scale = operands
        ctx.save_for_backward(x, x_scale, w, w_scale)
        return unaliased(int_gemm(x, w, x_scale, w_scale, handle.dtype))

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
