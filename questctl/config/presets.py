"""Model sizes with their training recipes: `--preset 30M` is a layer of config values that all others override.

Sizes from 30M up and their recipes are those of QuEST (arXiv 2502.05003): C4, sequences of 512 tokens, 512 sequences a step, a
learning rate that falls with the size, and 100 training tokens per parameter of the round number in the name (3e9 for 30M), in
whole steps of 2^18 tokens. Laptop sizes keep the shape (SwiGLU hidden width 8/3 d_model rounded up, untied head) at widths that
train in seconds on one core. They are named by their non-embedding parameters; their rotation block is the largest that divides
width and hidden width.
"""

from __future__ import annotations

from typing import Any


def _published(n_layer: int, d_model: int, n_head: int, lr: float, tokens: float) -> dict[str, Any]:
    return {
        "model": {"n_layer": n_layer, "d_model": d_model, "n_head": n_head, "ffn_multiple_of": 256},
        "data": {"seq_len": 512},
        "optim": {"lr": lr},
        "quant": {"block": 128},
        "train": {"batch_size": 512, "tokens": tokens // 2**18 * 2**18, "precision": "bf16", "eval_tokens": 4_194_304},
    }


def _laptop(n_layer: int, d_model: int, block: int) -> dict[str, Any]:
    return {
        "model": {"n_layer": n_layer, "d_model": d_model, "n_head": d_model // 32, "ffn_multiple_of": 64},
        "data": {"seq_len": 128},
        "optim": {"lr": 3e-3},
        "quant": {"block": block},
        "train": {"batch_size": 16, "tokens_per_param": 20, "precision": "fp32", "eval_tokens": 131_072},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "53K": _laptop(1, 64, 64),
    "107K": _laptop(2, 64, 64),
    "214K": _laptop(4, 64, 64),
    "640K": _laptop(3, 128, 128),
    "1.3M": _laptop(3, 192, 64),
    "1.8M": _laptop(4, 192, 64),
    "30M": _published(6, 640, 5, 1.2e-3, 3e9),
    "50M": _published(7, 768, 6, 1.2e-3, 5e9),
    "100M": _published(8, 1024, 8, 6e-4, 1e10),
    "200M": _published(10, 1280, 10, 3e-4, 2e10),
    "430M": _published(13, 1664, 13, 1.5e-4, 4.3e10),
    "800M": _published(16, 2048, 16, 7.5e-5, 8e10),
    "1600M": _published(20, 2560, 20, 3.75e-5, 1.6e11),
}
