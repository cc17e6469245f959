"""The export formats, and the number formats that each of them can store."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """An export format: what it is, and the number formats that `dtype` may name, the default first."""

    summary: str
    dtypes: tuple[str, ...]


BLOCKS = (  # of GGUF; and q8_0
    *("q1_0", "tq1_0", "tq2_0", "q2_k", "q3_k", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k"),
    "mxfp4",
)

FORMATS: dict[str, Format] = {
    "hf": Format("packed weights with their quantizers, for transformers", ("fp32", "bf16")),
    "hf-dense": Format("plain LlamaForCausalLM with dequantized weights", ("fp32", "bf16")),
    "compressed-tensors": Format("packed integers, for transformers and vLLM", ("fp32", "bf16")),
    "gguf": Format("one file for llama.cpp", ("f32", "f16", "q8_0", "exact", *BLOCKS)),
}
