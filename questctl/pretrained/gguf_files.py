"""The model that a GGUF file describes: its metadata → config keys. The package `gguf` reads it.

llama.cpp rotates the pairs (2i, 2i + 1). Files of the architecture `llama` therefore have the rows of q and k reordered
(`models.pretrained` puts them back); those of qwen2 and qwen3 do not. Mistral models are `llama` there, too.
`key` is the config key that names the file, in errors.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingDependency, UsageError

FAMILIES = ("llama", "qwen2", "qwen3")
BYTE_LEVEL = "gpt2"  # the model of tokenizers that merge bytes
LLAMA3 = ("llama3:8,1,4,8192", "llama3:32,1,4,8192")  # of Llama 3.1 and 3.2: the file has only the resulting factors


def reader(path: Path, key: str) -> Any:
    """A `gguf.GGUFReader`. Raises MissingDependency without the package, DataError for a file that it cannot read."""
    try:
        return _reader(path, path.stat().st_size, path.stat().st_mtime_ns)
    except ImportError as e:
        raise MissingDependency(f"{key}: {path.name} needs gguf: pip install 'questctl[export]'.") from e
    except (OSError, ValueError, IndexError, KeyError) as e:
        raise DataError(f"{key}: {path}: is no GGUF file that can be read ({str(e).splitlines()[0]}).") from e


@lru_cache(maxsize=2)  # opening a file with a large vocabulary takes seconds; size and time identify an unchanged one
def _reader(path: Path, size: int, modified: int) -> Any:
    import gguf

    return gguf.GGUFReader(path)


def has_byte_level_tokenizer(path: Path, key: str) -> bool:
    """Whether the file has the kind of tokenizer that `data.gguf_tokenizer` reads. Raises what `reader` does."""
    model = reader(path, key).fields.get("tokenizer.ggml.model")
    return model is not None and model.contents() == BYTE_LEVEL


def model_keys(path: Path, key: str) -> dict[str, Any]:
    """The keys of the section `model`. Raises UsageError for another architecture, and what `reader` does."""
    read = reader(path, key)
    field = {name: f.contents() for name, f in read.fields.items() if not name.startswith(("tokenizer.ggml.", "GGUF."))}
    family = field.get("general.architecture")
    if family not in FAMILIES:
        raise UsageError(f"{key}: {path.name}: general.architecture: {family} is not one of {', '.join(FAMILIES)}.")
    tensors = {t.name: [int(n) for n in t.shape] for t in read.tensors}

    def value(name: str, default: Any = None) -> Any:
        entry = field.get(f"{family}.{name}", default)
        if entry is None:
            raise DataError(f"{key}: {path.name}: has no {family}.{name}.")
        return entry

    if value("expert_count", 0):
        raise UsageError(f"{key}: {path.name}: {family}: expert_count: {value('expert_count')} is not supported; only 0.")
    d, heads = int(value("embedding_length")), int(value("attention.head_count"))
    kv = int(value("attention.head_count_kv", heads))
    width = int(value("attention.key_length", d // heads))
    if int(value("rope.dimension_count", width)) != width:
        raise UsageError(f"{key}: {path.name}: {family}: rope.dimension_count: only {width}, the width of a head.")
    biases = [part for part in ("q", "k", "v", "output") if f"blk.0.attn_{part}.bias" in tensors]
    by_count = {0: "none", 3: "qkv", 4: "qkvo"}
    if len(biases) not in by_count or "token_embd.weight" not in tensors:
        raise DataError(f"{key}: {path.name}: is incomplete: it has {len(tensors)} tensors.")
    return {
        "family": family,
        "n_layer": int(value("block_count")),
        "d_model": d,
        "n_head": heads,
        "d_ff": int(value("feed_forward_length")),
        "vocab_size": tensors["token_embd.weight"][1],
        "norm_eps": _short(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(value("rope.freq_base", 10_000.0)),
        "n_kv_head": 0 if kv == heads else kv,
        "head_width": 0 if width * heads == d else width,
        "tied": "output.weight" not in tensors,
        "bias": by_count[len(biases)],
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "rope_scaling": _scaling(value, read, f"{key}: {path.name}"),
        "window": int(value("attention.sliding_window", 0)),
    }


def _short(value: float) -> float:
    """The shortest decimal number that has this value in fp32, in which the file stores it: 1e-5, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def _scaling(value: Any, read: Any, where: str) -> str:
    kind = value("rope.scaling.type", "none")
    factors = next((t for t in read.tensors if t.name == "rope_freqs.weight"), None)
    if factors is not None:
        scaling = next((text for text in LLAMA3 if _fits(text, factors.data, float(value("rope.freq_base")))), None)
        if scaling is None:
            raise UsageError(f"{where}: rope_freqs.weight: only the factors of {' or '.join(LLAMA3)}.")
        return scaling
    if kind == "none":
        return ""
    if kind == "linear":
        return f"linear:{_short(value('rope.scaling.factor')):.15g}"
    raise UsageError(f"{where}: rope.scaling.type: {kind} is not supported; only none or linear.")


def _fits(text: str, factors: Any, theta: float) -> bool:
    """Whether these factors (W/2) divide the frequencies as a scaling `llama3` does."""
    import numpy as np

    factor, low, high, length = map(float, text.partition(":")[2].split(","))
    n = len(factors)
    turns = length * theta ** (-np.arange(n) / n) / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return bool(np.allclose(factors, 1 / (kept + (1 - kept) / factor), rtol=1e-4))
