"""One formula for every quantizer, and the quick way to compute it.

    z = x·H;  s = scale(z);  u = z/s;  q = keep(z)·grid(u);  m = mask(u, q);  y = s·(m·u + (q − m·u).detach())

x (…, K) → y (…, K), in the rotated basis where the spec has a rotation. The value of y is s·q; the gradient of x is m·g,
rotated back; a learned scale receives Σ g·(q − m·u), which is LSQ's gradient; other scales are constants of the row.

`Quantizer.reference` is this formula under autograd and is the definition. `forward` computes the same numbers with a
hand-written backward pass, about a third of the operations: small models on a CPU are bound by the number of operations.
Everything is computed in fp32 (fp64 for fp64 input), also for bf16 input and under autocast; y has the dtype of x. A row
of zeros gives zeros, and its gradient passes as the mask of u = 0 says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .assign import check_width
from .scales import Learned
from .spec import QuantSpec

SMALLEST_SCALE = 2.0**-120  # 1/s stays finite, and so does z/s: rows that small are zero for all purposes


class Quantizer(nn.Module):
    """`y = q(x)`, x (…, K) → y (…, K); K must be a multiple of the rotation's block and the mask's group.

    A pure function of x, and of the parameter `scale` (1,) where the spec's scale is learned. That starts as the optimum
    for a standard normal; `calibrate` sets it from data. `numel` is how many values share the scale in LSQ's gradient
    factor: all of a weight; for an activation the features (its default, K).
    """

    def __init__(self, spec: QuantSpec, *, numel: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.numel = numel
        learned = spec.scale is not None and spec.scale.learned
        unit = 0.0 if spec.is_identity else spec.grid.unit  # derives it here and now, not in the first step
        self.scale = nn.Parameter(torch.tensor([unit])) if learned else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K) → y (…, K), same dtype."""
        if self.spec.is_identity:
            return x
        y: torch.Tensor = _Quantize.apply(x, self.scale, self.spec, self._factor(x))
        return y

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The formula as it stands, differentiated by autograd: the definition of `forward`."""
        spec = self.spec
        if spec.is_identity:
            return x
        assert spec.scale is not None
        assert spec.estimator is not None
        z = _wide(x)
        z = spec.basis.rotate(z) if spec.basis else z
        if self.scale is None:
            s = spec.scale.of(z.detach(), spec.grid)
        else:
            factor = self._factor(x)
            s = self.scale.to(z.dtype).abs()
            s = s * factor + (s - s * factor).detach()  # the value of s, its gradient times the factor
        u = z * _reciprocal(s)
        with torch.no_grad():
            q = spec.grid.quantize(u)
            if spec.sparsity:
                q = q * spec.sparsity.keep(z)
            m = spec.estimator.mask(u, q, spec.grid)
        # s·m·u is m·z, and is written so: a row of zeros has s = 0, which would swallow its gradient
        return (m * z + s * (q - m * u).detach()).to(x.dtype)

    @torch.no_grad()
    def calibrate(self, x: torch.Tensor) -> None:
        """Set a learned scale to the Gaussian optimum for all of x (…, K); nothing to do for other scales."""
        if self.scale is not None:
            assert self.spec.scale is not None
            z = _wide(x)
            z = self.spec.basis.rotate(z) if self.spec.basis else z
            self.scale.copy_(self.spec.scale.of(z, self.spec.grid))

    def extra_repr(self) -> str:
        """The spec's word."""
        return str(self.spec)

    def _factor(self, x: torch.Tensor) -> float:
        return 1.0 if self.scale is None else Learned.gradient_factor(self.numel or x.shape[-1], self.spec.grid)


def make_quantizer(word: str, in_features: int | None = None) -> Quantizer:
    """The quantizer that a word such as 'int4-h128-rms-trust' names.

    Raises UsageError for a word that cannot be, or whose rotation or mask does not divide `in_features` where that is given.
    """
    spec = QuantSpec.parse(word)
    if in_features is not None:
        check_width(spec, in_features, where=f"quant: '{word}'")
    return Quantizer(spec)


class _Quantize(torch.autograd.Function):
    """`Quantizer.reference`, with the backward pass written out: keeps u or m for it, and q − m·u for a learned scale."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor | None, spec: QuantSpec, factor: float) -> torch.Tensor:
        assert spec.scale is not None
        assert spec.estimator is not None
        grid = spec.grid
        z = _wide(x)
        z = spec.basis.rotate(z) if spec.basis else z
        s = spec.scale.of(z, grid) if scale is None else scale.to(z.dtype).abs()
        u = z * _reciprocal(s)
        q = grid.quantize(u)
        if spec.sparsity:
            q *= spec.sparsity.keep(z)
        ctx.spec, ctx.factor, ctx.bound = spec, factor, None
        mask = residual = sign = None
        bound = None if spec.sparsity else spec.estimator.bound(grid)
        if scale is not None:
            m = spec.estimator.mask(u, q, grid)
            residual, sign = q - m * u, scale.sign()
        if bound is None or (bound < math.inf and x.is_cuda):
            mask = spec.estimator.mask(u, q, grid)  # 1 byte per value
        elif bound < math.inf:
            mask, ctx.bound = u, _next_above(bound, u.dtype)  # on a CPU bool tensors cost more than the memory of u
        ctx.save_for_backward(mask, residual, sign)
        return q.mul_(s).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        (g,) = grads
        mask, residual, sign = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            wide = _wide(g)
            if ctx.bound is not None:
                # g where |u| < bound, else 0, in one fused pass
                wide = torch.ops.aten.hardtanh_backward(wide, mask, -ctx.bound, ctx.bound)
            elif mask is not None:
                wide = wide * mask
            grad_x = (spec.basis.unrotate(wide) if spec.basis else wide).to(g.dtype)
        if residual is not None and ctx.needs_input_grad[1]:
            grad_scale = (_wide(g) * residual).sum().mul(ctx.factor).to(sign.dtype) * sign
        return grad_x, grad_scale, None, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reciprocal(s: torch.Tensor) -> torch.Tensor:
    return s.clamp_min(SMALLEST_SCALE).reciprocal()


def _next_above(bound: float, dtype: torch.dtype) -> float:
    """The smallest number of `dtype` above `bound` (rounded to it), so that < means ≤."""
    digits = 53 if dtype == torch.float64 else 24
    mantissa, exponent = math.frexp(bound)
    return math.ldexp(round(math.ldexp(mantissa, digits)) + 1, exponent - digits)
