"""The three products of a linear layer: y = x·Wᵀ, and two of the backward pass whose operands are quantized anew.

    ∂x = Q(g)·Q(Wᵀ)ᵀ   both along the outputs N          g (…, N), W (N, K)
    ∂W = Q(gᵀ)·Q(xᵀ)ᵀ  both along the tokens M           g (M, N), x (M, K)

x and W are the quantized operands of the forward pass. Each operand is rounded along the dimension that its product sums over,
as block formats require (NVIDIA 2025, arXiv 2509.25149; Quartet II, arXiv 2601.22813). With a rotation both operands of a
product are rotated with the same signs, so that the rotations cancel (HᵀH = 1) and nothing is rotated back. If both roundings
are unbiased and independent, the products are unbiased.

A weight in squares (`e4m3.b16`) has the same scales along N as along K. It is not rounded again, so that the gradient is that
of the weight of the forward pass, as in NVIDIA's recipe:

    ∂x = Q(g)·W          g along the outputs, without rotation, because W has none

Tokens are padded with zeros to whole blocks, which adds nothing to a sum. If the blocks divide a sequence, the noise is drawn
sequence by sequence, so that a batch is rounded the same, in however many parts it is computed. Only the scale of a tensor
(`e4m3`) is that of the part.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from .quantizer import Draws, Quantizer


def product(x: torch.Tensor, w: torch.Tensor, quantizer: Quantizer, *, keeps_weight: bool = False) -> torch.Tensor:
    """x (…, K), w (N, K) → x·wᵀ (…, N), whose gradients are products of operands that `quantizer` rounds.

    With `keeps_weight`, w is taken as it is.
    """
    y: torch.Tensor = _Product.apply(x, w, quantizer, keeps_weight)
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, quantizer: Quantizer, keeps_weight: bool) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.quantizer, ctx.keeps_weight = quantizer, keeps_weight
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,), (x, w) = grads, ctx.saved_tensors
        of_outputs = times_weight if ctx.keeps_weight else over_outputs
        into_x = of_outputs(g, w, ctx.quantizer).to(x.dtype) if ctx.needs_input_grad[0] else None
        into_w = over_tokens(g, x, ctx.quantizer).to(w.dtype) if ctx.needs_input_grad[1] else None
        return into_x, into_w, None, None


@torch.no_grad()
def over_outputs(g: torch.Tensor, w: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """g (…, N), w (N, K) → g·w (…, K), both rounded along N."""
    draws = quantizer.draws(g)
    with quantizer.whole():
        of_w = quantizer.draws(w.T)._replace(signs=draws.signs)
    return quantizer.turned(g, draws) @ quantizer.turned(w.T.contiguous(), of_w).T


@torch.no_grad()
def times_weight(g: torch.Tensor, w: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """g (…, N), w (N, K) → g·w (…, K), g rounded along N and w as it is."""
    rounded = quantizer.unturned(g)
    return rounded @ w.to(rounded.dtype)


@torch.no_grad()
def over_tokens(g: torch.Tensor, x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """g (…, N), x (…, K) → gᵀ·x (N, K) summed over the tokens, both rounded along them."""
    spec = quantizer.spec
    block = math.lcm(spec.rotation or 1, (spec.scale.group if spec.scale else 0) or 1, spec.grid.group)
    by_sequence = g.dim() == 3 and g.shape[1] % block == 0
    gs, xs = (t if by_sequence else _padded(t.reshape(-1, t.shape[-1]), block) for t in (g, x))
    signs = quantizer.signs(gs.shape[0] * gs.shape[1], g)

    def operand(t: torch.Tensor) -> torch.Tensor:
        if by_sequence:
            return quantizer.turned(_along_tokens(t), _token_draws(quantizer, t, signs))
        with quantizer.whole():
            return quantizer.turned(_along_tokens(t), _token_draws(quantizer, t, signs))

    return operand(gs) @ operand(xs).T


def _padded(t: torch.Tensor, block: int) -> torch.Tensor:
    """(M, C) → (1, M', C) with zeros up to a whole number of blocks."""
    return F.pad(t, (0, 0, 0, -len(t) % block)).unsqueeze(0)


def _along_tokens(t: torch.Tensor) -> torch.Tensor:
    """(B, T, C) → (C, B·T)."""
    return t.permute(2, 0, 1).reshape(t.shape[-1], -1).contiguous()


def _token_draws(quantizer: Quantizer, t: torch.Tensor, signs: tuple[torch.Tensor, ...]) -> Draws:
    """The random numbers for a rounding of t (B, T, C) along its tokens."""
    scale = quantizer.spec.scale
    assert scale is not None
    noise = _along_tokens(quantizer.uniform(t)) if quantizer.spec.grid.stochastic else None
    if not scale.corrected:
        return Draws(noise, None, signs)
    if not scale.group:
        with quantizer.whole():
            return Draws(noise, quantizer.uniform(t.new_empty(()).expand(t.shape[-1], 1)), signs)
    like = t.new_empty(()).expand(t.shape[0], t.shape[1] // scale.group, t.shape[2])
    return Draws(noise, _along_tokens(quantizer.uniform(like)).unsqueeze(-1), signs)
