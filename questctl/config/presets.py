"""Model sizes with their training recipes: `--preset 30M` is a layer of config values that all others override.

There are three families. The published sizes (30M to 1600M) and their recipes are those of QuEST (arXiv 2502.05003): C4,
sequences of 512 tokens, 512 sequences a step, a learning rate that falls with the size, and 100 training tokens per parameter
of the round number in the name (3e9 for 30M), in whole steps of 2^18 tokens.

The laptop sizes train in seconds to minutes on one core. They are one family, so that losses fall with N by one law: each is 32
wider than the one before, with heads of width 32 and a SwiGLU hidden width of 8/3 d_model rounded up to a multiple of 32, and
has max(2, d_model / 64) layers, rounded down. A single layer would be another kind of model: it cannot look up what followed an
earlier occurrence of a token (an induction head needs two layers, arXiv 2209.11895). Rotations have blocks of 32, the largest
that fits all sizes. Names begin with `laptop-`, because two sizes have as many parameters as an old preset, but another recipe.

A run that begins with a checkpoint has no preset: `CONTINUED` is its recipe. Its learning rate is that of quantization-aware
training of pretrained models in the literature (2e-5 in arXiv 2305.17888 and 2502.02631), without weight decay.

The old laptop sizes are kept, so that their runs keep their ids. They do not form a family (53K has one layer), and their
recipe is worse: AdamW at a learning rate of 3e-3 with 16 sequences a step.
"""

from __future__ import annotations

from typing import Any

from .sections import ModelConfig

LAPTOP_BLOCK = 32  # of rotations


def _published(n_layer: int, d_model: int, n_head: int, lr: float, tokens: float) -> dict[str, Any]:
    return {
        "model": {"n_layer": n_layer, "d_model": d_model, "n_head": n_head, "ffn_multiple_of": 256},
        "data": {"seq_len": 512},
        "optim": {"lr": lr},
        "quant": {"block": 128},
        "train": {"batch_size": 512, "tokens": tokens // 2**18 * 2**18, "precision": "bf16", "eval_tokens": 4_194_304},
    }


def laptop_model(d_model: int, n_layer: int = 0) -> ModelConfig:
    """The shape of the laptop family at a width that is a multiple of 32; with `n_layer` 0, its rule sets the layers."""
    d_ff = -(-(8 * d_model // 3) // 32) * 32
    return ModelConfig(n_layer=n_layer or max(2, d_model // 64), d_model=d_model, n_head=d_model // 32, d_ff=d_ff)


def laptop_recipe(params: int) -> dict[str, Any]:
    """Optimizer, learning rate, warm-up and batch of a laptop size of `params` non-embedding parameters, as keys by section.

    Muon at 4e-3 with a short warm-up was measured only at 107K (docs/how-to/train.md has the table); the other sizes use the
    same values.
    """
    return {"optim": {"name": "muon", "lr": 4e-3, "warmup_steps": 20.0}, "train": {"batch_size": 8}}


def _laptop(d_model: int) -> dict[str, Any]:
    model = laptop_model(d_model)
    recipe = laptop_recipe(model.params_non_embedding)
    return {
        "model": {**model.model_dump(include={"n_layer", "d_model", "n_head"}), "ffn_multiple_of": 32},
        "data": {"seq_len": 128},
        "optim": recipe["optim"],
        "quant": {"block": LAPTOP_BLOCK},
        "train": {**recipe["train"], "tokens_per_param": 20, "precision": "fp32", "eval_tokens": 131_072},
    }


def _old(n_layer: int, d_model: int, block: int) -> dict[str, Any]:
    return {
        "model": {"n_layer": n_layer, "d_model": d_model, "n_head": d_model // 32, "ffn_multiple_of": 64},
        "data": {"seq_len": 128},
        "optim": {"lr": 3e-3},
        "quant": {"block": block},
        "train": {"batch_size": 16, "tokens_per_param": 20, "precision": "fp32", "eval_tokens": 131_072},
    }


FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "laptop": {
        "laptop-27K": _laptop(32),
        "laptop-107K": _laptop(64),
        "laptop-222K": _laptop(96),
        "laptop-402K": _laptop(128),
        "laptop-636K": _laptop(160),
        "laptop-1.3M": _laptop(192),
        "laptop-1.8M": _laptop(224),
    },
    "published": {
        "30M": _published(6, 640, 5, 1.2e-3, 3e9),
        "50M": _published(7, 768, 6, 1.2e-3, 5e9),
        "100M": _published(8, 1024, 8, 6e-4, 1e10),
        "200M": _published(10, 1280, 10, 3e-4, 2e10),
        "430M": _published(13, 1664, 13, 1.5e-4, 4.3e10),
        "800M": _published(16, 2048, 16, 7.5e-5, 8e10),
        "1600M": _published(20, 2560, 20, 3.75e-5, 1.6e11),
    },
    "old": {
        "53K": _old(1, 64, 64),
        "107K": _old(2, 64, 64),
        "214K": _old(4, 64, 64),
        "640K": _old(3, 128, 128),
        "1.3M": _old(3, 192, 64),
        "1.8M": _old(4, 192, 64),
    },
}
CONTINUED: dict[str, Any] = {  # replaces the preset of runs that begin with a checkpoint
    "data": {"seq_len": 512},
    "optim": {"lr": 2e-5, "weight_decay": 0.0},
    "train": {"batch_size": 8, "steps": 200, "eval_tokens": 65_536},
}
PRESETS: dict[str, dict[str, Any]] = {name: keys for family in FAMILIES.values() for name, keys in family.items()}
