"""The format `compressed-tensors`: packed integers, one scale per row or group, and the rotation of the inputs as a transform.

    stored = d·k, whole k of 2 to 8 bits, or t·e·FP4 (check.py)
    y = (x·H)·storedᵀ where the run rotates, H in `transform_config`

transformers loads such a folder but ignores `transform_config` without a warning, and then multiplies inputs by weights of
another basis. `load` reads the folder and adds the transforms; load_rotated.py in the export does the same without questctl.

N outputs, K inputs of a layer.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import RunConfig
from ..models.llama import Llama
from ..pretrained import linear_name
from ..store import write_json
from . import check, load_rotated
from .hf import DTYPES, head, others, save, shape
from .weights import Weight, block_floats, whole_numbers


def write(
    folder: Path, model: Llama, config: RunConfig, weights: Mapping[str, Weight], dtype: str, special: Mapping[str, Any]
) -> None:
    """Write the folder. Raises UsageError for a layer whose rounded weights are on no grid with one scale each."""
    tensors = others(model, DTYPES[dtype])
    schemes: dict[str, dict[str, Any]] = {}
    rotations: dict[int, list[str]] = {}
    plain = ["lm_head"]
    for name, weight in weights.items():
        spec, target = weight.layer.weights, linear_name(name)
        if spec.is_identity:
            tensors[f"{target}.weight"] = weight.dense.to(DTYPES[dtype])
            plain.append(target)
            continue
        own, args, kind = (floats if check.block_float(spec) else integers)(name, weight)
        tensors |= {f"{target}.{key}": value for key, value in own.items()}
        group = schemes.setdefault(json.dumps(args), {"targets": [], "weights": args, "format": kind})
        group["targets"].append(target)
        if weight.layer.rotates is not None:
            rotations.setdefault(weight.layer.rotates.block, []).append(target)
    save(folder, tensors)
    kinds = {group["format"] for group in schemes.values()}
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": importlib.metadata.version("compressed-tensors"),
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(schemes.values())},
        "ignore": plain,
    }
    if rotations:
        quantization["transform_config"] = {
            "config_groups": {
                f"h{block}": {"type": "hadamard", "head_dim": block, "apply": [{"targets": targets, "location": "input"}]}
                for block, targets in rotations.items()
            }
        }
        (folder / "load_rotated.py").write_bytes(Path(load_rotated.__file__).read_bytes())
    named = {**head(model.config), "quantization_config": quantization}
    write_json(folder / "config.json", {**named, **shape(model.config, config, dtype, special)})


Layer = tuple[dict[str, torch.Tensor], dict[str, Any], str]  # tensors, arguments of the scheme, name of the format


def integers(name: str, weight: Weight) -> Layer:
    """Whole numbers of 2 to 8 bits and their scales."""
    from compressed_tensors.compressors.pack_quantized import pack_to_int32  # the package takes seconds to import

    spec = weight.layer.weights
    fits = check.whole(spec)
    assert fits is not None
    assert spec.scale is not None
    bits = check.signed_bits(fits[1])
    k, d = whole_numbers(name, weight)
    tensors = {"weight_packed": pack_to_int32(k, bits), "weight_scale": d, "weight_shape": torch.tensor(k.shape)}
    strategy = {"strategy": "group" if spec.scale.group else "channel", "group_size": spec.scale.group or None}
    return tensors, {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}, "pack-quantized"


def floats(name: str, weight: Weight) -> Layer:
    """FP4, two in a byte, with the scales of NVFP4 (E4M3, and the reciprocal of one for the tensor) or MXFP4 (exponents)."""
    codes, scales, whole = block_floats(name, weight)
    tensors = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4}
    args = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    if check.block_float(weight.layer.weights) == "nvfp4":
        tensors |= {"weight_scale": scales.to(torch.float8_e4m3fn), "weight_global_scale": whole.reciprocal().reshape(1)}
        more = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        return tensors, {**args, **more}, "nvfp4-pack-quantized"
    tensors["weight_scale"] = (scales.log2() + 127).clamp(0, 254).to(torch.uint8)
    return tensors, {**args, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, "mxfp4-pack-quantized"


def load(folder: Path) -> PreTrainedModel:
    """Load the model of an export, with its transforms."""
    model: PreTrainedModel = load_rotated.load(folder)
    return model
