"""What is done with a trained model: quantize it, allocate bits to its layers, probe its gradients under quantization.

api.py          the public calls; they check a request before torch is imported
quantize.py     round to nearest, and GPTQ
allocate.py     one spec per layer within a budget of bits
probe.py        gradients, masks, errors and distributions, layer by layer;  probe_tables.py shows them
preflight.py    the checks, and the config of a quantized run
"""

from __future__ import annotations

from ..lazy import lazy_names

__all__ = ["QuantizedRun", "allocate_bits", "probe_run", "quantize_run"]


__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "api"))
