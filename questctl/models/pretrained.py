"""A model with the weights of an existing checkpoint (`model.init`, `teacher.source`), read tensor by tensor.

    run, folder of transformers, GGUF file → (name, tensor)* → Llama, quantized afterwards

Weights are taken from a run before rounding, in the basis of their layer's input. A layer that quantizes only its rotated
weight multiplies x by WH, a rotated parametrisation; another model therefore takes WH as its weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
import safetensors
import torch

from ..config import ModelConfig, QuantConfig, RunConfig
from ..errors import DataError
from ..pretrained import Source, gguf_files, gguf_name, hf_name, same_weights
from ..quant.layer_specs import rotated_weights
from .llama import Llama, build_model

Tensors = Iterator[tuple[str, torch.Tensor]]


def initial_model(model: ModelConfig, quant: QuantConfig, seed: int, *, rotate_back: bool = True) -> Llama:
    """The model that training begins with: `build_model` with the weights of `model.init` or, without it, random ones.

    Memory is that of the model and of one tensor. Raises DataError for a checkpoint that is missing, damaged or does not fit,
    and UsageError for one whose weights have changed.
    """
    if not model.init:
        return build_model(model, quant, seed, rotate_back=rotate_back)
    source = same_weights(model.init, model.init_sha256)
    return build_model(model, quant, seed, rotate_back=rotate_back, prepare=lambda llama: fill(llama, source))


def dense_model(source: Source) -> Llama:
    """The model of a checkpoint without quantizers. Raises DataError for one that is damaged or does not fit its config."""
    return build_model(ModelConfig(**source.model), QuantConfig(), 0, prepare=lambda llama: fill(llama, source))


@torch.no_grad()
def fill(llama: Llama, source: Source) -> None:
    """Copy the weights of a checkpoint into a model without quantizers. Raises DataError if one is missing or does not fit."""
    missing = dict(llama.named_parameters())
    for name, tensor in tensors(source, llama.config, list(missing)):
        p = missing.pop(name)
        if p.shape != tensor.shape:
            raise DataError(f"{source.key}: {source.name}: {name} has the shape {_shape(tensor)}, its config says {_shape(p)}.")
        p.copy_(tensor)
    if missing:
        raise DataError(
            f"{source.key}: {source.name}: has no {next(iter(missing))} ({len(missing)} of its tensors are missing)."
        )


def tensors(source: Source, model: ModelConfig, names: list[str]) -> Tensors:
    """The tensors of a checkpoint, in the order of its files; `names` are the names in our model."""
    if source.kind == "gguf":
        return _of_gguf(source, model, names)
    if source.kind == "run":
        return _of_run(source, names)
    return _of_safetensors(source, {hf_name(name): name for name in names})


def _of_safetensors(source: Source, ours: Mapping[str, str]) -> Tensors:
    for path in source.files:
        try:
            with safetensors.safe_open(path, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118
                    if name in ours:
                        yield ours[name], f.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as e:
            raise DataError(f"{source.key}: {path}: is damaged ({e}).") from e


def _of_run(source: Source, names: list[str]) -> Tensors:
    config = RunConfig.from_json(_stored(source), where=str(source.path / "config.json"))
    rotations = {} if config.rotate_back else rotated_weights(config.model, config.remaining_quant)
    for name, tensor in _of_safetensors(source, {name: name for name in names}):
        basis = rotations.get(name.removesuffix(".weight"))
        yield name, basis.rotate(tensor) if basis else tensor


def _stored(source: Source) -> dict[str, object]:
    values = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key != "seal"}


def _of_gguf(source: Source, model: ModelConfig, names: list[str]) -> Tensors:
    import gguf

    permuted = model.family in ("llama", "mistral")
    ours = {gguf_name(name): name for name in names}
    for tensor in gguf_files.reader(source.path, source.key).tensors:
        if (name := ours.get(tensor.name)) is None:
            continue
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as e:
            raise DataError(f"{source.key}: {source.name}: {tensor.name}: {tensor.tensor_type.name} is not read.") from e
        value = torch.from_numpy(np.array(values, dtype=np.float32))
        part = name.split(".")[-2]
        if permuted and part in ("q", "k"):
            value = halves(value, model.n_head if part == "q" else model.kv_heads)
        yield name, value


def interleaved(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows (N, …) of each head from (half, pair) to (pair, half), the order of llama.cpp."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows (N, …) of each head from (pair, half) back to (half, pair)."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _shape(x: torch.Tensor) -> str:
    return "×".join(map(str, x.shape))
