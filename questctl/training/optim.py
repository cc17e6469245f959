"""AdamW with decay on the weights of linear layers only, and the learning rate as a pure function of the step.

    warm-up   lr_start → lr   by half a cosine over the first `warmup_frac` of the steps
    cosine    lr → lr_final   by half a cosine over the rest             (both together: torch's OneCycleLR, arXiv 2502.05003)
    wsd       lr, then over the last `decay_frac` lr → lr_final by 1 − √x                              (arXiv 2405.18392)
    constant  lr

Both phases may be given in steps instead (`warmup_steps`, `decay_steps`).

with lr_start = lr·start_factor and lr_final = lr·final_factor. Nothing is remembered between steps: resume is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.adamw import adamw

from ..config import OptimConfig
from ..errors import DataError
from .distributed import like, local


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0 … steps − 1) of a run of `steps`.

    The phases meet where torch's OneCycleLR lets them meet: the warm-up ends at warmup_frac·steps − 1, which need not be whole.
    """
    peak, last = config.lr, steps - 1
    start, final = peak * config.start_factor, peak * config.final_factor
    warm = config.warmup_of(steps) - 1
    if step <= warm:
        return _half_cosine(start, peak, step / warm if warm else 1.0)
    if config.schedule == "cosine":
        return _half_cosine(peak, final, (step - warm) / (last - warm))
    if config.schedule == "wsd":
        # Not steps − cooldown_of(steps) − 1, which rounds otherwise: losses of runs stay equal to the last digit.
        cool = steps - config.decay_steps - 1 if config.decay_steps else (1 - config.decay_frac) * steps - 1
        return peak if step <= cool else final + (peak - final) * (1 - math.sqrt((step - cool) / (last - cool)))
    return peak


def _half_cosine(a: float, b: float, x: float) -> float:
    return b + (a - b) * (1 + math.cos(math.pi * x)) / 2


class AdamW:
    """AdamW (arXiv 1711.05101) over all parameters of a model, through torch's fused functional form.

    Weight decay acts on the weights of linear layers (head included); the embedding, norms and learned quantizer scales are not
    decayed, as in the training code of the paper's authors (github.com/epfml/llm-baselines, `get_parameter_group_specs`). The
    class `torch.optim.AdamW` is not used because making one imports the compiler, a second or two in every process.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.config = config
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        decayed = {name: p for name, p in named.items() if id(p) in linear}
        self.groups = [
            _Group(config.weight_decay, decayed),
            _Group(0.0, {name: p for name, p in named.items() if name not in decayed}),
        ]

    @torch.no_grad()
    def step(self, lr: float, skip: torch.Tensor | None = None) -> None:
        """Update every parameter from its gradient at learning rate `lr`; if `skip` () is 1 and not 0, nothing changes.

        `skip` is read on the parameters' device, so that nobody waits for it.
        """
        c = self.config
        for group in self.groups:
            adamw(
                group.local,
                [local(_gradient(p)) for p in group.parameters],
                group.exp_avg,
                group.exp_avg_sq,
                [],
                group.steps,
                fused=True,
                found_inf=skip,
                amsgrad=False,
                maximize=False,
                lr=lr,
                beta1=c.beta1,
                beta2=c.beta2,
                eps=c.eps,
                weight_decay=group.decay,
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Both moments of every parameter, of its shape and sharded as it is: `{"blocks.0.q.weight/exp_avg": …, …}`."""
        return {
            f"{name}/{moment}": like(value, p)
            for group in self.groups
            for moment in MOMENTS
            for name, p, value in zip(group.names, group.parameters, getattr(group, moment), strict=True)
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Put `tensors()` back as they were after `step` steps. Raises DataError if they are another model's."""
        own = self.tensors()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
            strange = sorted(own.keys() ^ tensors.keys()) or ["other shapes"]
            raise DataError(f"checkpoint: the optimizer's state does not fit the model ({strange[0]}).")
        for name, value in own.items():
            value.copy_(tensors[name])
        self.go_on(step)

    def go_on(self, step: int) -> None:
        """Both moments are those after `step` steps."""
        for group in self.groups:
            for count in group.steps:
                count.fill_(step)


MOMENTS = ("exp_avg", "exp_avg_sq")


class _Group:
    """Parameters with one weight decay, and their state: lists, as the functional form takes them."""

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self.decay, self.names = decay, list(parameters)
        self.parameters: list[torch.Tensor] = list(parameters.values())
        self.local = [local(p.detach()) for p in self.parameters]  # what of them this process updates
        self.exp_avg = [torch.zeros_like(p) for p in self.local]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.local]
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]


def _gradient(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad
