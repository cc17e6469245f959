"""Export a finished run to formats that other programs read: `export_run(…)` → `AccuracyCard`.

    run → check.py → weights.py: levels, scales → one writer per format → read back → accuracy.py → model_card.py

`hf` keeps quantized weights and inputs (`questctl.export.hf` registers it with transformers, and each export holds the same
code in one file). `hf-dense`, `compressed-tensors` and `gguf` carry the weights alone. What a format would silently compute
differently is refused by check.py, before torch is imported or anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FORMATS", "Format", "export_run"]


@dataclass(frozen=True)
class Format:
    """An export format: what it is, and the number formats that `dtype` may name, the default first."""

    summary: str
    dtypes: tuple[str, ...]


FORMATS: dict[str, Format] = {
    "hf": Format("packed weights with their quantizers, for transformers", ("fp32", "bf16")),
    "hf-dense": Format("plain LlamaForCausalLM with dequantized weights", ("fp32", "bf16")),
    "compressed-tensors": Format("packed integers, for transformers and vLLM", ("fp32", "bf16")),
    "gguf": Format("one file for llama.cpp", ("f32", "f16", "q8_0", "exact", "tq1_0", "tq2_0", "q4_0", "q5_0")),
}


def __getattr__(name: str) -> Any:
    if name == "export_run":
        from .api import export_run

        return export_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
