"""Inputs of linear layers whose computation can be fused with their quantization: an RMSNorm, or SiLU(gate)·up.

    Normed: x·gain / √(mean(x²) + eps)        Gated: silu(gate) ⊙ up

`linear.fan_out` takes such an input in place of a tensor, before it is computed. Layers that quantize by a fused kernel compute
and quantize it in one pass (fused.py). All others call `value_of` once and get what the plain modules compute.

On a CPU this RMSNorm takes fewer passes over memory than the module does, with the same bits (kernels/native.py). x is also
used by the residual stream. To get the same bits, the backward pass adds its gradient to that of the residual stream in the
order of autograd, so the residual stream must lead through this norm: after `value`, go on with `through` of the `Normed` in
place of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import native


@dataclass
class Normed:
    """The RMSNorm of x (…, K), not computed yet."""

    norm: nn.RMSNorm
    x: torch.Tensor

    def __post_init__(self) -> None:
        self.through = self.x

    def value(self) -> torch.Tensor:
        """The normalised x, (…, K)."""
        y: torch.Tensor
        if not (_few_passes(self.norm) and is_plain(self.x) and self.x.is_contiguous()):
            y = self.norm(self.x)
        elif torch.is_grad_enabled():
            y, self.through = _RMSNorm.apply(self.x, self.norm.weight, self.norm.eps)
        else:
            y = _normed(self.x, self.norm)
        return y

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the shape, dtype and device of the value."""
        return self.x


def _few_passes(norm: nn.RMSNorm) -> bool:
    """Whether the module computes what native.py does, and has no hooks."""
    plain = type(norm) is nn.RMSNorm and norm.eps is not None and is_plain(norm.weight) and norm.weight.ndim == 1
    return plain and not (norm._forward_hooks or norm._forward_pre_hooks) and native.usable("norm_rows") is not None


def is_plain(x: torch.Tensor) -> bool:
    """Whether x is an fp32 tensor on a CPU, and nothing is being traced."""
    return (
        type(x) in (torch.Tensor, nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def unaliased(x: torch.Tensor) -> torch.Tensor:
    """What an autograd function returns in place of x, which shares memory with an input or an intermediate tensor.

    Under torch.compile it is a tensor of its own: torch 2.11 loses gradients where an alias is returned, such as a view or a
    conversion that does nothing. The copy is fused with what comes before it.
    """
    return x.clone() if torch.compiler.is_compiling() else x


def _normed(x: torch.Tensor, norm: nn.RMSNorm) -> torch.Tensor:
    lib = native.usable("norm_rows")
    assert lib is not None
    assert norm.eps is not None
    return native.norm_rows(x, norm.weight, norm.eps, lib)[0]


class _RMSNorm(torch.autograd.Function):
    """x (…, K) → its RMSNorm, and x itself; the gradient through the norm is added to that of the second output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        lib = native.usable("norm_rows")
        assert lib is not None
        y, r = native.norm_rows(x, gain, eps, lib)
        ctx.save_for_backward(x, r, gain)
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        g, elsewhere = grads
        x, r, gain = ctx.saved_tensors
        if g is None:
            return elsewhere, None, None
        lib = native.library()
        assert lib is not None
        return *native.norm_rows_backward(g, x, r, gain, elsewhere, lib), None


class Gated(NamedTuple):
    """SiLU(gate)·up, both (…, K), not computed yet."""

    gate: torch.Tensor
    up: torch.Tensor

    def value(self) -> torch.Tensor:
        """The product, (…, K)."""
        return F.silu(self.gate) * self.up

    @property
    def like(self) -> torch.Tensor:
        """A tensor of the shape, dtype and device of the value."""
        return self.up


FusableInput = Normed | Gated


def value_of(x: torch.Tensor | FusableInput) -> torch.Tensor:
    """A tensor as it is; an input that is not computed yet, computed."""
    return x if isinstance(x, torch.Tensor) else x.value()
