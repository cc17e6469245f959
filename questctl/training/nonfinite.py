"""Find the first tensor that is not finite, by running a step again while watching the outputs of modules and the gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

UNNAMED = (  # the answers if every tensor is finite
    "the norm of the gradients is not finite, although each gradient is",
    "the loss is not finite, although every output is",
)


def first_nonfinite(model: nn.Module, forward_backward: Callable[[], float]) -> str:
    """A clause on the first tensor that is not finite, such as 'output of blocks.0.down is not finite'.

    The parameters are checked first. Then `forward_backward` runs, which returns the loss in nats/token and leaves gradients.
    Meanwhile the outputs of modules and the gradients are checked in the order in which they are computed. If all are finite,
    the answer is one of `UNNAMED`: the loss, or else the gradient norm. Gradients are cleared before and after.
    """
    for name, p in model.named_parameters():
        if not bool(p.isfinite().all()):
            return f"parameter {name} is not finite"
    nonfinite: list[str] = []

    def watch_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not nonfinite and isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
                nonfinite.append(f"output of {name} is not finite")

        return hook

    def watch_gradient(name: str) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            if not nonfinite and p.grad is not None and not bool(p.grad.isfinite().all()):
                nonfinite.append(f"gradient of {name} is not finite")

        return hook

    model.zero_grad()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(watch_output(name)).remove)
        for name, p in model.named_parameters():
            if p.requires_grad:
                hooks.callback(p.register_post_accumulate_grad_hook(watch_gradient(name)).remove)
        loss = torch.tensor(forward_backward())
    model.zero_grad()
    if nonfinite:
        return nonfinite[0]
    return UNNAMED[0] if bool(loss.isfinite()) else UNNAMED[1]
