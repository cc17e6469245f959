"""The format `compressed-tensors`: packed integers, one scale per row or group, and the rotation of the inputs as a transform.

    stored = d·k, whole k of 2 to 8 bits (check.py);   where the run rotates:  y = (x·H)·storedᵀ, H in `transform_config`

transformers loads such a folder but ignores `transform_config` without a warning, and then multiplies inputs by weights of
another basis. `load` reads the folder and adds the transforms; load_rotated.py in the export does the same without questctl.

N outputs, K inputs of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.version import version
from transformers import PreTrainedModel

from ..config import RunConfig
from ..models.llama import Llama
from ..pretrained import linear_name
from ..store import write_json
from . import check, load_rotated
from .hf import DTYPES, head, others, save, shape
from .weights import Weight, whole_numbers


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
        fits = check.whole(spec)
        assert fits is not None
        assert spec.scale is not None
        bits = check.signed_bits(fits[1])
        k, d = whole_numbers(name, weight)
        tensors |= {
            f"{target}.weight_packed": pack_to_int32(k, bits),
            f"{target}.weight_scale": d,
            f"{target}.weight_shape": torch.tensor(k.shape),
        }
        args = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "dynamic": False,
            "strategy": "group" if spec.scale.group else "channel",
            "group_size": spec.scale.group or None,
        }
        group = schemes.setdefault(json.dumps(args), {"targets": [], "weights": args, "format": "pack-quantized"})
        group["targets"].append(target)
        if weight.layer.rotates is not None:
            rotations.setdefault(weight.layer.rotates.block, []).append(target)
    save(folder, tensors)
    quantization: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": version,
        "format": "pack-quantized",
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
    own = {**head(model.config), "quantization_config": quantization}
    write_json(folder / "config.json", {**own, **shape(model.config, config, dtype, special)})


def load(folder: Path) -> PreTrainedModel:
    """Load the model of an export, with its transforms."""
    model: PreTrainedModel = load_rotated.load(folder)
    return model
