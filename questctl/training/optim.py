"""AdamW with weight decay on linear layers only, and learning-rate schedules as pure functions of the step.

    warm-up   lr_start → lr   by half a cosine over the first `warmup_frac` of the steps
    cosine    lr → lr_final   by half a cosine over the rest             (both together: torch's OneCycleLR, arXiv 2502.05003)
    wsd       lr, then over the last `decay_frac` lr → lr_final by 1 − √x                              (arXiv 2405.18392)
    constant  lr

with lr_start = lr·start_factor and lr_final = lr·final_factor. Warm-up and decay may be set in steps instead (`warmup_steps`,
`decay_steps`). The rate depends on the step alone, so a checkpoint does not store it.
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
    """The learning rate of optimizer step `step` (0 … steps − 1) of a run of `steps` steps.

    As in torch's OneCycleLR, the warm-up ends at warmup_frac·steps − 1, which need not be a whole number.
    """
    peak, last = config.lr, steps - 1
    start, final = peak * config.start_factor, peak * config.final_factor
    warm = config.warmup_of(steps) - 1
    if step <= warm:
        return _half_cosine(start, peak, step / warm if warm else 1.0)
    if config.schedule == "cosine":
        return _half_cosine(peak, final, (step - warm) / (last - warm))
    if config.schedule == "wsd":
        # Not steps − cooldown_of(steps) − 1: it rounds differently, which would change the last digits of losses.
        cool = steps - config.decay_steps - 1 if config.decay_steps else (1 - config.decay_frac) * steps - 1
        return peak if step <= cool else final + (peak - final) * (1 - math.sqrt((step - cool) / (last - cool)))
    return peak


def _half_cosine(a: float, b: float, x: float) -> float:
    return b + (a - b) * (1 + math.cos(math.pi * x)) / 2


class AdamW:
    """AdamW (arXiv 1711.05101) for all parameters of a model, through torch's fused functional form.

    Weight decay applies to the weights of linear layers (head included), but not to the embedding, norms and learned quantizer
    scales, as in the code of the paper's authors (github.com/epfml/llm-baselines, `get_parameter_group_specs`). The class
    `torch.optim.AdamW` is not used, because creating one imports the compiler, which takes a second or two in every process.
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
        """Update every parameter from its gradient at learning rate `lr`, unless `skip` () is 1.

        `skip` is read on the parameters' device, so that the host need not wait for it.
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
        """Both moments of every parameter, with its shape and sharding: `{"blocks.0.q.weight/exp_avg": …, …}`."""
        return {
            f"{name}/{moment}": like(value, p)
            for group in self.groups
            for moment in MOMENTS
            for name, p, value in zip(group.names, group.parameters, getattr(group, moment), strict=True)
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Restore the moments `tensors` of step `step`. Raises DataError if they do not fit the model."""
        moments = self.tensors()
        if {k: v.shape for k, v in moments.items()} != {k: v.shape for k, v in tensors.items()}:
            differences = sorted(moments.keys() ^ tensors.keys()) or ["other shapes"]
            raise DataError(f"checkpoint: the optimizer's state does not fit the model ({differences[0]}).")
        for name, value in moments.items():
            value.copy_(tensors[name])
        self.set_step(step)

    def set_step(self, step: int) -> None:
        """Set the number of steps that both moments have taken, on which AdamW's bias correction depends."""
        for group in self.groups:
            for count in group.steps:
                count.fill_(step)


MOMENTS = ("exp_avg", "exp_avg_sq")


class _Group:
    """Parameters with the same weight decay, and their state, as the lists that the functional form takes."""

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self.decay, self.names = decay, list(parameters)
        self.parameters: list[torch.Tensor] = list(parameters.values())
        self.local = [local(p.detach()) for p in self.parameters]  # the parts that this process updates
        self.exp_avg = [torch.zeros_like(p) for p in self.local]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.local]
        self.steps = [torch.zeros((), device=p.device) for p in self.parameters]


def _gradient(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad
