"""Find quantized layers that learn nothing because a compiler or kernel loses their gradient.

Such a fault does not change the losses of the first steps: the gradient of a layer is exactly zero, and nothing else shows it.
A correct gradient may be zero, too: below an output projection that begins at zero, where a mask passes nothing, or where no
target counts. The definition, `Quantizer.reference` under autograd, tells the two apart. It is computed only if some layer had
a zero gradient in each of the first steps; sound runs have no such layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from torch import nn

from ..quant.linear import QuantLinear, quantized_layers
from ..quant.quantizer import Quantizer
from .distributed import local

FIRST_STEPS = 3


class FirstSteps:
    """The quantized layers that no gradient has reached yet in the first steps of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._left: int | None = FIRST_STEPS  # steps that remain to be looked at; None once the layers were judged
        self.silent = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear) and m.weight.requires_grad}

    def look(self) -> None:
        """Take note of the gradients of a step."""
        if self._left:
            self._left -= 1
            self.silent = {name: layer for name, layer in self.silent.items() if not reached(layer)}

    def over(self, last: bool) -> bool:
        """Whether the first steps are over, or this step is the `last` of the run; true only once."""
        if self._left is None or (self._left and not last):
            return False
        self._left = None
        return True


def reached(layer: QuantLinear) -> bool:
    """Whether the gradient of the layer's weight, or the part of it that this process has, is not zero."""
    return layer.weight.grad is not None and bool(local(layer.weight.grad).any())


def lost(model: nn.Module, silent: Collection[str], forward_backward: Callable[[], object]) -> list[str]:
    """Those of the layers `silent` that get a gradient from `forward_backward` if quantizers compute by definition.

    Gradients are cleared before and after.
    """
    model.zero_grad()
    with by_definition(model):
        forward_backward()
    names = [name for name, m in model.named_modules() if name in silent and isinstance(m, QuantLinear) and reached(m)]
    model.zero_grad()
    return names


@contextmanager
def by_definition(model: nn.Module) -> Iterator[None]:
    """Inside a `with` block, let a model's quantizers compute by `Quantizer.reference`, and its layers without kernels."""
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    fused = [(layer, layer.fused) for layer in quantized_layers(model)]
    for quantizer in quantizers:
        vars(quantizer)["forward"] = quantizer.reference
    for layer, _ in fused:
        layer.fused = None
    try:
        yield
    finally:
        for quantizer in quantizers:
            del vars(quantizer)["forward"]
        for layer, settings in fused:
            layer.fused = settings
