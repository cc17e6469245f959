"""The model that a folder of transformers describes: config.json → config keys, and the safetensors files of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError

Values = Mapping[str, Any]

FAMILIES = {  # architecture in config.json → model.family
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("F32", "BF16", "F16")  # of weights, as safetensors names them
ALWAYS = {  # required values of fields, if present, for the model to be supported
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
}


def model_keys(values: Values, where: str) -> dict[str, Any]:
    """The keys of the section `model` for a config.json.

    Raises UsageError, which names the architecture and the first field that does not fit, for another model.
    """
    names = values.get("architectures") or [values.get("model_type", "no architecture")]
    name = str(names[0])
    if name not in FAMILIES:
        raise UsageError(f"{where}: architectures: {name} is not one of {', '.join(FAMILIES)}.")
    family = FAMILIES[name]

    def refuse(field: str, value: Any, choices: str) -> UsageError:
        return UsageError(f"{where}: {name}: {field}: {value!r} is not supported; {choices}.")

    for field, allowed in ALWAYS.items():
        if field in values and values[field] not in allowed:
            raise refuse(field, values[field], f"only {' or '.join(map(repr, allowed))}")

    def number(field: str, default: int | float | None = None, kind: Callable[[Any], Any] = int) -> Any:
        value = values.get(field)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise refuse(field, value, "a positive number is needed")
        return kind(value)

    d, heads = number("hidden_size"), number("num_attention_heads")
    width = number("head_dim", 128 if family == "qwen3" else max(1, d // heads))
    kv = number("num_key_value_heads", heads if family == "llama" else {"mistral": 8}.get(family, 32))
    keys = {
        "family": family,
        "n_layer": number("num_hidden_layers"),
        "d_model": d,
        "n_head": heads,
        "d_ff": number("intermediate_size"),
        "vocab_size": number("vocab_size"),
        "norm_eps": number("rms_norm_eps", 1e-6, float),
        "n_kv_head": 0 if kv == heads else kv,
        "head_width": 0 if width * heads == d else width,
        "tied": bool(values.get("tie_word_embeddings")),
        "bias": "qkv" if family == "qwen2" else "qkvo" if values.get("attention_bias") else "none",
        "qk_norm": family == "qwen3",
        "window": _window(values, family, refuse),
    }
    if values.get("attention_bias") and family == "mistral":
        raise refuse("attention_bias", True, "only False")
    theta, scaling = _rotary(values, refuse)
    return {**keys, "rope_theta": theta, "rope_scaling": scaling}


def _window(values: Values, family: str, refuse: Callable[[str, Any, str], UsageError]) -> int:
    """The window of attention that all layers share; 0 without one."""
    if family == "llama":
        return 0
    if family == "mistral":
        return int(values.get("sliding_window", 4096) or 0)
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    layers, first = int(values["num_hidden_layers"]), values.get("max_window_layers", 28)
    kinds = values.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    slides = {kind == "sliding_attention" and window is not None for kind in kinds[:layers]}
    if len(slides) > 1:
        field = "layer_types" if values.get("layer_types") else "max_window_layers"
        raise refuse(field, values.get(field, first), "either all layers have the sliding window or none")
    return int(window or 0) if slides == {True} else 0


def _rotary(values: Values, refuse: Callable[[str, Any, str], UsageError]) -> tuple[float, str]:
    """`rope_theta` and `rope_scaling`, from rope_parameters (transformers 5) or from the keys of these names."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or parameters
    where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    theta = float(parameters.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise refuse(f"{where}.partial_rotary_factor", scaling["partial_rotary_factor"], "only 1")
    known = {"default": (), "linear": ("factor",)}
    known["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    known["yarn"] = ("factor", "original_max_position_embeddings")
    if kind not in known:
        raise refuse(f"{where}.rope_type", kind, f"only {', '.join(known)}")
    numbers = []
    for field in known[kind]:
        value = scaling.get(field)
        if value is None and field == "original_max_position_embeddings":
            value = values.get("max_position_embeddings")
        if not isinstance(value, int | float) or value <= 0:
            raise refuse(f"{where}.{field}", value, "a positive number is needed")
        numbers.append(value)
    if kind == "yarn":
        for field in ("mscale", "mscale_all_dim"):
            if scaling.get(field):
                raise refuse(f"{where}.{field}", scaling[field], "give attention_factor instead")
        if scaling.get("truncate") is False:
            raise refuse(f"{where}.truncate", False, "only True")
        factor = scaling.get("attention_factor")
        ends = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
        if ends != (32, 1) and factor is None:
            raise refuse(f"{where}.beta_fast", ends[0], "other values than 32 and 1 need an attention_factor")
        numbers += [factor, *(ends if ends != (32, 1) else ())] if factor is not None else []
    return theta, f"{kind}:{','.join(f'{x:.15g}' for x in numbers)}" if numbers else ""


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, by name. Raises DataError if one, or all, are missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise DataError(f"{index}: cannot be read ({type(e).__name__}: {e}).") from e
    else:
        names = ["model.safetensors"]
        if not (folder / names[0]).is_file():
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            beside = f"; {others[0]} is a pickle, which is not read: save the model as safetensors" if others else ""
            raise DataError(f"{folder}: has no weights: neither model.safetensors nor {index.name}{beside}.")
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: is missing; {index.name} names it.")
    return tuple(folder / name for name in names)


def check_dtypes(path: Path) -> None:
    """Raises DataError if a safetensors file is damaged, or has weights of a type that is not read."""
    for name, about in header(path).items():
        if about["dtype"] not in DTYPES:
            raise DataError(f"{path}: {name} has the type {about['dtype']}, which is not one of {', '.join(DTYPES)}.")


def header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor → dtype, shape and data_offsets, from the head of a safetensors file. Raises DataError if it is damaged."""
    try:
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if not 0 < size < path.stat().st_size:
                raise ValueError("its head is longer than the file")
            tensors = json.loads(f.read(size))
        tensors.pop("__metadata__", None)
        end = max((about["data_offsets"][1] for about in tensors.values()), default=0)
        if 8 + size + end != path.stat().st_size:
            raise ValueError("it is cut off")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path}: is damaged ({e}).") from e
    return dict(tensors)
