"""The formats `hf` and `hf-dense`: folders that transformers loads. Importing this module registers the type `quest_llama`.

    hf        model.safetensors of packed codes and steps, modeling_quest.py: weights and inputs quantized as in training
    hf-dense  dequantized weights in the basis of x under the architecture of the model's family: inputs are not quantized

`hf` has a model type of its own on purpose. As a `llama` with an unknown `quantization_config`, the folder would also load
without its code: with a warning, and with random weights in place of the packed ones.

N outputs, K inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from ..config import ModelConfig, RunConfig
from ..config.rope import parse_scaling
from ..kernels.pack import pack
from ..models.llama import Llama
from ..pretrained import hf_name, linear_name
from ..quant.layer_specs import layer_shapes
from ..quant.storage import code_bits
from ..store import write_json
from . import bundle, modeling
from .check import architecture_of
from .modeling import QuestLlamaConfig, QuestLlamaForCausalLM, QuestLlamaModel
from .weights import Codes, Weight, tables

CODE_FILE = "modeling_quest.py"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TITLE = """The network of this folder for transformers (trust_remote_code=True). It needs torch and transformers only.

Gathered by questctl (MIT licence) from its own sources, so that it computes what the training computed."""

AutoConfig.register(QuestLlamaConfig.model_type, QuestLlamaConfig, exist_ok=True)
AutoModel.register(QuestLlamaConfig, QuestLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(QuestLlamaConfig, QuestLlamaForCausalLM, exist_ok=True)


def write_hf(
    folder: Path, model: Llama, config: RunConfig, weights: Mapping[str, Weight], dtype: str, special: Mapping[str, Any]
) -> None:
    """Write config, packed weights and code.

    `dtype` is that of tensors in full precision: norms, and unquantized embedding, head and layers. `special` holds the special
    ids of the tokenizer.
    """
    tensors, specs = others(model, DTYPES[dtype]), {}
    for name, weight in weights.items():
        layer, place = weight.layer, linear_name(name)
        codes = weight.stored if isinstance(weight.stored, Codes) else None
        if codes is None and layer.activations.is_identity:
            tensors[f"{place}.weight"] = weight.dense.to(DTYPES[dtype])
            continue
        spec = str(layer.weights) if codes else "bf16"
        about: dict[str, Any] = {"weights": spec, "activations": str(layer.activations)}
        if codes is None:
            assert isinstance(weight.stored, torch.Tensor)
            tensors[f"{place}.weight"] = weight.stored
        else:
            if layer.rotates and layer.activations.is_identity:
                about["unrotate"] = True
            packed = stored(codes)
            if "keep" in packed:
                about["keep"] = True
            tensors |= {f"{place}.{key}": value for key, value in packed.items()}
        if weight.input_quantizer is not None:
            quantizer = weight.input_quantizer.state_dict()
            tensors |= {f"{place}.input_quantizer.{key}": value for key, value in quantizer.items()}
        specs[place] = about
    for name, table in tables(model).items():
        assert isinstance(table.stored, Codes)
        place = hf_name(f"{name}.weight").removesuffix(".weight")
        del tensors[f"{place}.weight"]
        tensors |= {f"{place}.{key}": value for key, value in stored(table.stored).items()}
    save(folder, tensors)
    auto = {"AutoConfig": f"modeling_quest.{QuestLlamaConfig.__name__}"}
    auto["AutoModel"] = f"modeling_quest.{QuestLlamaModel.__name__}"  # vLLM builds the model by this entry
    auto["AutoModelForCausalLM"] = f"modeling_quest.{QuestLlamaForCausalLM.__name__}"
    own = {"model_type": QuestLlamaConfig.model_type, "architectures": [QuestLlamaForCausalLM.__name__], "auto_map": auto}
    own |= {"rope_text": model.config.rope_scaling} if model.config.rope_scaling else {}
    own |= {"quest_rows": {key: str(spec) for key, spec in config.quant.by_row.items()}} if config.quant.by_row else {}
    tie = {}
    if model.config.tied and "embedding" in config.quant.by_row:  # transformers can only tie weights, not codes
        tie = {"tie_word_embeddings": False, "quest_tied": True}
    write_json(folder / "config.json", {**own, **shape(model.config, config, dtype, special), **tie, "quest": specs})
    (folder / CODE_FILE).write_text(bundle.bundle(Path(modeling.__file__), TITLE), encoding="utf-8")


def stored(codes: Codes) -> dict[str, torch.Tensor]:
    """The tensors that `QuestLinear` loads: codes, steps, offsets, keep."""
    spec, (_, width) = codes.spec, codes.shape
    levels = torch.tensor(spec.grid.levels)
    q = codes.levels()
    index = torch.bucketize(q, (levels[1:] + levels[:-1]) / 2)
    pruned = levels[index] != q  # q = 0 on a grid without it
    bits = code_bits(spec, width)
    packed = index.to(torch.uint8) if bits == 8 else pack((2 * index + 1 - 2**bits).to(torch.int8), bits)
    tensors = {"codes": packed, "steps": codes.scale.squeeze(-1) if codes.scale.dim() > 1 else codes.scale}
    if codes.offset is not None:
        tensors["offsets"] = codes.offset.squeeze(-1) if codes.offset.dim() > 1 else codes.offset
    if bool(pruned.any()):
        tensors["keep"] = pack(torch.where(pruned, -1, 1).to(torch.int8), 1)
    return tensors


def write_dense(folder: Path, model: Llama, config: RunConfig, dtype: str, special: Mapping[str, Any]) -> None:
    """Write `model`, which has plain linear layers, under the architecture of its family."""
    save(folder, {hf_name(name): p.detach().to(DTYPES[dtype]) for name, p in model.named_parameters()})
    write_json(folder / "config.json", {**head(model.config), **shape(model.config, config, dtype, special)})


def head(model: ModelConfig) -> dict[str, Any]:
    """The entries of a config.json that name the architecture."""
    family, architecture = architecture_of(model)
    return {"model_type": family, "architectures": [architecture]}


def others(model: Llama, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Embedding, norms, biases and head under the names of transformers: all tensors but the weights of the blocks' layers.

    An embedding or head that is quantized is dequantized.
    """
    linear = {f"{name}.weight" for name in layer_shapes(model.config)}
    own = {name: p.detach() for name, p in model.named_parameters() if name not in linear and "_quantizer." not in name}
    own |= {f"{name}.weight": table.dense for name, table in tables(model).items()}
    return {hf_name(name): p.to(dtype) for name, p in own.items()}


def shape(model: ModelConfig, config: RunConfig, dtype: str, special: Mapping[str, Any]) -> dict[str, Any]:
    """The other entries of a config.json. `max_position_embeddings` is the sequence length of the training, or that of the
    checkpoint that it began with, which `special` holds then."""
    family, _ = architecture_of(model)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if scaling := parse_scaling(model.rope_scaling):
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            rope["original_max_position_embeddings"] = int(scaling.length)
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        if scaling.kind == "yarn":
            rope |= {"attention_factor": scaling.magnitude, "beta_fast": scaling.high, "beta_slow": scaling.low}
    of_family: dict[str, Any] = {"rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}} if scaling else {}
    if family == "mistral":
        of_family["sliding_window"] = model.window or None
    elif family != "llama":
        of_family |= {"use_sliding_window": model.window > 0, "sliding_window": model.window or None, "max_window_layers": 0}
        of_family["layer_types"] = ["sliding_attention" if model.window else "full_attention"] * model.n_layer
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.width_of_head,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": rope,
        **of_family,
        "max_position_embeddings": config.data.seq_len,
        "initializer_range": model.init_std,
        "attention_bias": model.bias == "qkvo",
        "mlp_bias": False,
        "tie_word_embeddings": model.tied,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
        **special,
    }


def save(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write model.safetensors, readable by all users."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = folder / "model.safetensors"
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable only by its owner


def load(folder: Path) -> PreTrainedModel:
    """Load the model of an `hf` or `hf-dense` export with the classes of this package."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval()
