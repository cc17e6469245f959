"""Health of quantizers during training: the share of each operand that receives gradient, and the share that is clamped.

    trust        share of an operand's entries that receive gradient, which is the mean of the mask m   (0: the mask is dead)
    saturation   share of its entries that are clamped, because |u| is more than half a step above the outermost level

Both are measured on a few sequences, in one forward pass without gradients. Layers that share an input are measured once, under
the name of the first. The result is a function of weights and batches alone, so a resumed run logs the same values. The loop
itself compares loss and gradient norm with their levels (`loop.Counters`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .. import metrics
from ..quant.quantizer import Quantizer

OPERANDS = {"weight_quantizer": "weight", "input_quantizer": "activation"}  # attribute of a layer → what it quantizes
SEQUENCES = 2  # of the batch; at 128 tokens and 64 features, an input then has 16 thousand entries


@torch.no_grad()
def operand_shares(model: nn.Module, forward: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Trust and saturation of each operand that `forward` quantizes: `{metrics.trust("weight"): {"blocks.0.q": 0.98, …}, …}`.

    Empty for a model that quantizes nothing. Weights are measured where they reach their quantizer: there the weights of a
    sharded model are gathered.
    """
    shares: dict[tuple[str, str], torch.Tensor] = {}

    def watch(name: str, kind: str) -> Callable[..., None]:
        def hook(quantizer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(quantizer, Quantizer)
            shares[kind, name] = quantizer.shares(args[0])

        return hook

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            name, _, role = path.rpartition(".")
            if isinstance(module, Quantizer) and not module.spec.is_identity and role in OPERANDS:
                kind = OPERANDS[role]
                hooks.callback(module.register_forward_pre_hook(watch(name, kind)).remove)
                shares[kind, name] = torch.empty(0)  # keeps the model's order; stays empty for k and v, which share q's input
        if not shares:
            return {}
        forward()
    measured = {key: value for key, value in shares.items() if value.numel()}
    values = torch.stack(list(measured.values())).tolist()
    by_metric: dict[str, dict[str, float]] = {
        key(operand): {} for key in (metrics.trust, metrics.saturation) for operand in metrics.OPERANDS
    }
    for (kind, name), (trust, saturation) in zip(measured, values, strict=True):
        by_metric[metrics.trust(kind)][name] = round(trust, 6)
        by_metric[metrics.saturation(kind)][name] = round(saturation, 6)
    return {metric: by_layer for metric, by_layer in by_metric.items() if by_layer}
