"""A teacher: a frozen model whose predictions a run learns from beside the text (Hinton et al., arXiv 1503.02531).

    L = (1 − w)·CE(y, q) + w·τ²·KL(p_τ ‖ q_τ),    p_τ = softmax(z_teacher/τ),  q_τ = softmax(z/τ),  q = q_1
    ∂L/∂z = (1 − w)·(q − y) + w·τ·(q_τ − p̃)

The factor τ² keeps the size of the gradient when τ changes. Without `top_k`, p̃ is p_τ. With it, the divergence is that of k +
1 classes: the teacher's k likeliest ids, and all others, R, as one class. It is never more than the divergence over all ids
(data-processing inequality), and

    p̃ = p_τ on the k ids,   q_τ·Σ_R p_τ / Σ_R q_τ on the others

The teacher then gives the total probability of the other ids, and only the text says how they differ. If they were left out of
the sum, the student would learn that they never occur.

The teacher computes without gradients, each process for its own sequences. A quantized run as a teacher computes with its
quantized weights and inputs, and its weights are packed; other checkpoints are in full precision.

Legend: n positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ModelConfig, RunConfig, TeacherConfig
from ..data.packing import IGNORED
from ..models.pretrained import dense_model
from ..pretrained import TEACHER, same_weights
from ..quant.packed import freeze
from ..store import Run
from .loading import load_model

VALUES_AT_A_TIME = 2**22  # logits whose softmax is in memory together: 16 MiB in fp32


class Teacher:
    """The frozen model of `teacher.source` on a device, and the loss that a student of it minimizes."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Load the model. Raises DataError if the source is missing or damaged, UsageError if its weights have changed."""
        self.config = config.teacher
        source = same_weights(config.teacher.source, config.teacher.sha256, TEACHER)
        self.shape = ModelConfig(**source.model)
        if source.kind == "run":
            model: nn.Module = freeze(load_model(Run(source.path)))
        else:
            model = dense_model(source)
        dtype = torch.bfloat16 if config.teacher_precision == "bf16" else torch.float32
        self.model = model.to(device, dtype).requires_grad_(False).eval()

    def losses(
        self, logits: torch.Tensor, tokens: torch.Tensor, targets: torch.Tensor, first: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """L (), and cross-entropy and divergence (2,) in nats/token, of the student's logits (B, T, V) for tokens (B, T).

        `first` is the argument of `Llama.forward` for packed sequences.
        """
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            taught = self.model(tokens, None, first)
        mixed: torch.Tensor
        mixed, measured = Mixture.apply(logits.flatten(0, 1), taught.flatten(0, 1), targets.flatten(), self.config)
        return mixed, measured

    def flops_per_token(self, seq_len: int) -> int:
        """Operations of the teacher's forward pass."""
        return self.shape.forward_flops(seq_len, self.shape.vocab_size)


class Mixture(torch.autograd.Function):
    """L of this module's equation, a mean over the positions that count, with its gradient by formula.

    The gradient is computed together with the loss, a part of the positions at a time. This keeps one gradient in the dtype of
    the logits; autograd would keep a softmax of each model in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, taught: torch.Tensor, targets: torch.Tensor, about: TeacherConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of student and teacher (n, V), targets (n,) → L (), [cross-entropy, divergence] (2,), fp32."""
        gradient = torch.empty_like(logits)
        counted = targets != IGNORED
        n = counted.sum().clamp(min=1)
        sums = torch.zeros(2, dtype=torch.float32, device=logits.device)
        rows = max(1, VALUES_AT_A_TIME // logits.shape[1])
        for at in range(0, len(logits), rows):
            some = slice(at, at + rows)
            of_text, towards_text = cross_entropy(logits[some].float(), targets[some].clamp(min=0))
            of_teacher, towards_teacher = divergence(logits[some].float(), taught[some].float(), about)
            keep = counted[some].float()
            sums += torch.stack([of_text @ keep, of_teacher @ keep])
            mixed = towards_text.mul_(1 - about.weight).add_(towards_teacher, alpha=about.weight * about.temperature)
            gradient[some] = mixed.mul_((keep / n)[:, None])
        ctx.save_for_backward(gradient)
        measured = sums / n
        ctx.mark_non_differentiable(measured)
        scale = about.weight * about.temperature**2
        return (1 - about.weight) * measured[0] + scale * measured[1], measured

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient with respect to the student's logits (n, V)."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


def cross_entropy(z: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V) and targets (n,) → −ln q(y) (n,), and its gradient q − y (n, V)."""
    log_q = F.log_softmax(z, -1)
    loss = -log_q.gather(1, targets[:, None])[:, 0]
    q = log_q.exp_()
    q[torch.arange(len(q), device=q.device), targets] -= 1
    return loss, q


def divergence(z: torch.Tensor, taught: torch.Tensor, about: TeacherConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of student and teacher (n, V) → KL (n,) at the temperature, and τ·∂KL/∂z = q_τ − p̃ (n, V).

    Vocabularies that are padded to different sizes share their first ids. The teacher gives the others probability 0.
    """
    surplus = z.shape[1] - taught.shape[1]
    taught = F.pad(taught, (0, surplus), value=-torch.inf) if surplus > 0 else taught[:, : z.shape[1]]
    log_p, log_q = F.log_softmax(taught / about.temperature, -1), F.log_softmax(z / about.temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    if not 0 < about.top_k < z.shape[1]:
        terms = p * (log_q - log_p)
        return -(terms.nan_to_num_(nan=0.0) if surplus > 0 else terms).sum(-1), q.sub_(p)
    top_p, ids = p.topk(about.top_k)
    log_top_p, log_top_q = log_p.gather(1, ids), log_q.gather(1, ids)
    rest_p = p.scatter(1, ids, 0.0).sum(-1)
    rest_q = q.scatter(1, ids, 0.0).sum(-1)
    tiny = torch.finfo(torch.float32).tiny
    ratio = rest_p.clamp(min=tiny) / rest_q.clamp(min=tiny)
    kl = (top_p * (log_top_p - log_top_q)).sum(-1) + rest_p * ratio.log()
    target = (q * ratio[:, None]).scatter_(1, ids, top_p)
    return kl, q.sub_(target)
