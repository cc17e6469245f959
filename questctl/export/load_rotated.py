"""Load this folder with transformers and add the rotations of its `transform_config`, which transformers ignores.

    from load_rotated import load
    model = load("FOLDER")            # or: python load_rotated.py FOLDER

This needs transformers and compressed-tensors. Without the rotations the model multiplies its inputs by weights of another
basis, and its output is noise. vLLM reads `transform_config` by itself, but only on CUDA (by the package hadacore).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from compressed_tensors.transform import TransformConfig, apply_transform_config
from transformers import AutoConfig, AutoModelForCausalLM


def load(folder: str | Path, **options: Any) -> Any:
    """The model, ready for evaluation; `options` go to `from_pretrained`."""
    quantization = AutoConfig.from_pretrained(folder).quantization_config
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    transforms = quantization.get("transform_config")
    if transforms:
        apply_transform_config(model, TransformConfig(**transforms))
    return model.eval()


if __name__ == "__main__":
    sys.stdout.write(f"{load(sys.argv[1])}\n")
