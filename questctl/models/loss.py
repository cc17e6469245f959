"""The cross-entropy of a model's last product, without the logits of the whole batch.

    loss = Σᵢ (log Σᵥ exp(xᵢ·wᵥ) − xᵢ·w_yᵢ)      ∂loss/∂X = G·W,  ∂loss/∂W = Gᵀ·X,  G = softmax(X·Wᵀ) − onehot(y)

With a vocabulary of 50,304 and 8,192 tokens, logits, their softmax and their gradient take 5 GB in fp32, far more than the rest
of a small model. Rows of logits do not depend on each other, and the gradient G of a row follows from that row alone. So the
rows are taken a few at a time, and the gradients are computed together with the loss, in the forward pass (as in Liger Kernel,
arXiv 2410.10989). The products are those of the plain loss, three of the same size; only the order of sums over rows differs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..data.packing import IGNORED


def summed_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    """The summed loss (), in nats and fp32, of the logits x·weightᵀ, `rows` of them at a time.

    x (n, D), weight (V, D), targets (n,) int64; targets of -100 do not count.
    """
    if not torch.is_grad_enabled():
        return _in_pieces(x, weight, targets, rows, False, False)[0]
    loss: torch.Tensor = _SummedLoss.apply(x, weight, targets, rows)
    return loss


class _SummedLoss(torch.autograd.Function):
    """`summed_loss`; its gradients are computed in the forward pass, and the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
        loss, *gradients = _in_pieces(x, weight, targets, rows, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        of_x, of_weight = (None if g is None else g * grads[0] for g in ctx.saved_tensors)
        return of_x, of_weight, None, None


def _in_pieces(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss, and the gradients of x (n, D) and weight (V, D), as far as they are needed."""
    loss = torch.zeros((), device=x.device)
    of_x = torch.empty_like(x) if wants_x else None
    of_weight = torch.zeros_like(weight) if wants_weight else None
    for at in range(0, len(x), rows):
        piece, y = x[at : at + rows], targets[at : at + rows]
        log_p = F.log_softmax(F.linear(piece, weight).float(), -1)
        counts = y != IGNORED
        place = y.clamp(min=0)[:, None]
        loss -= (log_p.gather(1, place)[:, 0] * counts).sum()
        if of_x is None and of_weight is None:
            continue
        g = log_p.exp_().scatter_add_(1, place, torch.full_like(place, -1, dtype=log_p.dtype)).mul_(counts[:, None])
        g = g.to(weight.dtype)
        if of_x is not None:
            of_x[at : at + rows] = g @ weight
        if of_weight is not None:
            of_weight += g.T @ piece
    return loss, of_x, of_weight
