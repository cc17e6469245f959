"""Quantizers: `make_quantizer("int4-h128-rms-trust")` is a torch module that computes y = q(x) for x of shape (…, K).

A quantizer is described by its spec (spec.py), whose components are a grid, a rotation, a scale, a sparsity mask and an
estimator. Names of this package are imported when they are first used, so that specs can be checked without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .linear import QuantLinear
    from .model import quantize_model
    from .quantizer import Quantizer, make_quantizer
    from .spec import QuantSpec

__all__ = ["QuantLinear", "QuantSpec", "Quantizer", "make_quantizer", "quantize_model"]

_MODULES = {
    "QuantLinear": "linear",
    "quantize_model": "model",
    "Quantizer": "quantizer",
    "make_quantizer": "quantizer",
    "QuantSpec": "spec",
}


__getattr__ = lazy_names(__name__, _MODULES)
