"""Put quantized layers in place of those of a model: its linear layers, and if asked for its embedding, head and cache.

quantize_model(model, QuantConfig(weights="int4-h128-rms-trust", activations="int4-h128-rms-trust"))
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import QuantConfig
from .by_row import quantize_rows
from .layer_specs import SCOPE, layer_specs
from .linear import QuantLinear, replace_modules


def quantize_model(model: nn.Module, quant: QuantConfig, *, rotate_back: bool = False) -> nn.Module:
    """Replace the linear layers below `blocks.` by `QuantLinear` with the specs of `quant`, in place; returns the model.

    Embedding, head, keys and values are quantized by by_row.py, if `quant` says so.
    `rotate_back`, for weights that were trained without quantization, is that of `QuantLinear`. Layers with bf16 on both sides
    stay as they are unless gradients are quantized. Raises UsageError as `layer_specs` does.
    """
    linears = {n: m for n, m in model.named_modules() if n.startswith(SCOPE) and isinstance(m, nn.Linear)}
    specs = layer_specs({name: linear.in_features for name, linear in linears.items()}, quant)
    layers: dict[nn.Module, nn.Module] = {}
    for name, (weights, activations) in specs.items():
        if not (weights.is_identity and activations.is_identity and quant.gradients.is_identity):
            triple = weights, activations, quant.gradients
            how: dict[str, Any] = {"rotate_back": rotate_back, "backward": quant.backward, "name": name}
            layers[linears[name]] = QuantLinear.from_linear(linears[name], *triple, **how)
    replace_modules(model, layers)
    if quant.by_row:
        quantize_rows(model, quant)
    return model
