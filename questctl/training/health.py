"""The masks of a run while it trains: which share of each operand still receives gradient, and which is clamped.

    trust        share of the entries of an operand that receive gradient, the mean of m       (0: the mask is dead)
    saturation   share with |u| more than half a step above the outermost level: clamped to it

Gradient norm and loss are compared with their levels in the loop (`Counters`). All of it is a function of weights, batches and
counters, so that a run that goes on writes the same lines. Masks are looked at on a few sequences, in one forward pass without
gradients; layers that share an input are measured once, under the first one's name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .. import metrics
from ..quant.quantizer import Quantizer

SEQUENCES = 2  # of the batch, for the masks: at 128 tokens and 64 features 16 thousand entries of an input


@torch.no_grad()
def operand_shares(model: nn.Module, forward: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Trust and saturation of each operand that `forward` quantizes: `{metrics.trust("weight"): {"blocks.0.q": 0.98, …}, …}`.

    Empty for a model that quantizes nothing. Weights are taken as they arrive at their quantizer: whole, also where sharded.
    """
    seen: dict[tuple[str, str], torch.Tensor] = {}

    def watch(name: str, kind: str) -> Callable[..., None]:
        def hook(quantizer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(quantizer, Quantizer)
            seen[kind, name] = quantizer.shares(args[0])

        return hook

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if isinstance(module, Quantizer) and not module.spec.is_identity:
                name, _, role = path.rpartition(".")
                kind = "weight" if role == "weight_quantizer" else "activation"
                hooks.callback(module.register_forward_pre_hook(watch(name, kind)).remove)
                seen[kind, name] = torch.empty(0)  # their order is that of the model, and q stands for k and v
        if not seen:
            return {}
        forward()
    measured = {key: shares for key, shares in seen.items() if shares.numel()}
    values = torch.stack(list(measured.values())).tolist()
    found: dict[str, dict[str, float]] = {
        key(operand): {} for key in (metrics.trust, metrics.saturation) for operand in metrics.OPERANDS
    }
    for (kind, name), (trust, saturation) in zip(measured, values, strict=True):
        found[metrics.trust(kind)][name] = round(trust, 6)
        found[metrics.saturation(kind)][name] = round(saturation, 6)
    return {word: by_layer for word, by_layer in found.items() if by_layer}
