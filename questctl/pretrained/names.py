"""The names of a model's tensors here, in transformers and in GGUF.

blocks.0.q.weight      model.layers.0.self_attn.q_proj.weight    blk.0.attn_q.weight
blocks.0.ffn_norm.weight  model.layers.0.post_attention_layernorm.weight  blk.0.ffn_norm.weight
"""

from __future__ import annotations

EMBED, HEAD = "embed.weight", "head.weight"
OUTSIDE = {  # name → those of transformers and GGUF
    "embed": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
}
INSIDE = {  # the same of the parts of a block
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}


def hf_name(name: str) -> str:
    """The name of a tensor in transformers: blocks.0.q.weight → model.layers.0.self_attn.q_proj.weight."""
    return _translated(name, 0, "model.layers")


def gguf_name(name: str) -> str:
    """The name of a tensor in GGUF: blocks.0.q.weight → blk.0.attn_q.weight."""
    return _translated(name, 1, "blk")


def linear_name(name: str) -> str:
    """The name of a layer in transformers: blocks.0.q → model.layers.0.self_attn.q_proj."""
    return hf_name(f"{name}.weight").removesuffix(".weight")


def _translated(name: str, column: int, blocks: str) -> str:
    match name.split("."):
        case ["blocks", i, part, kind]:
            return f"{blocks}.{i}.{INSIDE[part][column]}.{kind}"
        case [part, kind]:
            return f"{OUTSIDE[part][column]}.{kind}"
    raise AssertionError(name)
