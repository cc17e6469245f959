"""Quantizers as words: `make_quantizer("int4-h128-rms-trust")` is a torch module with y = q(x), x of shape (…, K).

Nothing is imported before it is asked for, so that words can be checked without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .linear import QuantLinear, quantize_model
    from .quantizer import Quantizer, make_quantizer
    from .spec import QuantSpec

__all__ = ["QuantLinear", "QuantSpec", "Quantizer", "make_quantizer", "quantize_model"]

_HOME = {
    "QuantLinear": "linear",
    "quantize_model": "linear",
    "Quantizer": "quantizer",
    "make_quantizer": "quantizer",
    "QuantSpec": "spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
