"""Whether a run is compiled (`train.compile`), and where compiled code is kept.

    saving = tokens · layers · width · SAVED_S          cost = FIRST_S + layers · LAYER_S          seconds

On a GPU `auto` compiles. On a CPU it does where the saving was measured for such a model, is at least LEAST_SAVING_S, and is
MARGIN times the cost; where the saving is unknown, it does not. All is computed from the config and the kind of the device: the
last bits of a loss depend on the path, and must not depend on what else a machine does, or on whether a run is a cell of a
sweep. LEAST_SAVING_S is above what the presets save at their own lengths, so that their losses stay what they were.

env.json records the path that a run takes, and all its attempts on the same kind of device take it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config import RunConfig

# Seconds saved per token, layer and channel of the residual path: fused passes over memory are what is saved, and they grow
# with these. Unquantized 107K (two layers of width 64) in fp32 goes from 46 to 61 thousand tokens a second on one thread of an
# AMD EPYC. Of time of the processor, side by side on a busy machine, such a step takes 1.30 times as long eager as compiled,
# one of two layers of width 160 1.15 times; the saving is .83 as much per channel there. W4A4 of 107K takes 1.09 times.
SAVED_S = 0.8 * (1 / 46e3 - 1 / 61e3) / (2 * 64)
WIDEST = 160  # of which a saving was measured; with the width, products take a larger share of the time
SHARE = 0.12  # of the time of a run that compiling it saves, at the least
FIRST_S, LAYER_S = 20.0, 10.0  # to compile a model; 36 s for the two layers of 107K
LEAST_SAVING_S = 1800.0
MARGIN = 10.0


def compiles(config: RunConfig, device: str) -> bool:
    """Whether a new run of this config is compiled on a kind of device, `cpu` or `cuda`."""
    mode = config.train.compile
    if mode != "auto" or device != "cpu":
        return mode != "off"
    return saving_s(config) >= max(LEAST_SAVING_S, MARGIN * cost_s(config))


def saving_s(config: RunConfig) -> float:
    """Seconds that compiling saves a run on a CPU; 0 where that was not measured: quantized, wide, with a teacher, in bf16."""
    quants = [quant for _, quant in config.stages]
    plain = all(q.weights.is_identity and q.activations.is_identity and q.gradients.is_identity for q in quants)
    plain = plain and not any(q.overrides for q in quants)
    if not plain or config.teacher.source or config.train.precision != "fp32" or config.model.d_model > WIDEST:
        return 0.0
    return config.new_tokens * config.model.n_layer * config.model.d_model * SAVED_S


def cost_s(config: RunConfig) -> float:
    """Seconds to compile the model of a run on a CPU, once for each stage of its precision schedule."""
    return len(config.stages) * (FIRST_S + config.model.n_layer * LAYER_S)


def path_of(config: RunConfig, env: Mapping[str, Any], device: str) -> bool:
    """Whether a run is compiled whose env.json holds `env`: as it began on this kind of device, else as its config says.

    Runs that began before their path was recorded have `auto` compiled on a GPU alone.
    """
    attempts = env.get("attempts", [])
    if not attempts or ("cuda" if attempts[-1].get("gpu") else "cpu") != device:
        return compiles(config, device)
    mode = config.train.compile
    return bool(env.get("compiled", mode == "on" or (mode == "auto" and device == "cuda")))


def keep_compiled_code() -> None:
    """Let the compiler keep its code in the user's cache, for other processes and later runs, unless the user chose a folder.

    The folder is one for each processor and version of torch: a home folder may be shared by different machines.
    """
    with suppress(OSError):
        folder = code_folder()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def code_folder() -> Path:
    """Where compiled code is kept: `$QUESTCTL_CACHE/compiled`, else `~/.cache/questctl/compiled`, and a name in it."""
    import hashlib

    import torch

    from ..kernels import native

    made_for = f"{torch.__version__}|{native.processor()}"
    return native.cache_folder().parent / "compiled" / hashlib.sha256(made_for.encode()).hexdigest()[:16]
