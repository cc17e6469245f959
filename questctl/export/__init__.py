"""A run as files that other programs read: which formats there are, and the number formats of what they do not quantize.

    run → weights.py: levels and scales of each layer → one writer a format → read back → report.py: how far it is from the run

`hf` keeps quantized weights and inputs (`questctl.export.hf` registers it with transformers, and each export holds the same
code in one file). `hf-dense`, `compressed-tensors` and `gguf` carry the weights alone. What a format would silently compute
otherwise is refused by check.py, before torch is loaded or anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One target: what it is, and the number formats that `--dtype` may name; the first is the default."""

    summary: str
    dtypes: tuple[str, ...]


FORMATS: dict[str, Format] = {
    "hf": Format("packed weights with their quantizers, for transformers", ("fp32", "bf16")),
    "hf-dense": Format("plain LlamaForCausalLM with dequantized weights", ("fp32", "bf16")),
    "compressed-tensors": Format("packed integers, for transformers and vLLM", ("fp32", "bf16")),
    "gguf": Format("one file for llama.cpp", ("f32", "f16", "q8_0", "exact", "tq1_0", "tq2_0", "q4_0", "q5_0")),
}
