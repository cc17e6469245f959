"""The choice whether a run is compiled (`train.compile`), and the folder of compiled code.

    saving = tokens · layers · width · SAVED_S          cost = FIRST_S + layers · LAYER_S          seconds

On a GPU `auto` compiles. On a CPU it compiles only if the saving was measured for such a model, is at least LEAST_SAVING_S, and
is at least MARGIN times the cost. The choice follows from the config and the kind of the device alone. It decides the last bits
of a loss, which must not depend on what else a machine does, or on whether a run is a cell of a sweep. LEAST_SAVING_S is above
what the presets save at their own lengths, so that their losses stay what they were.

env.json records whether a run is compiled, and all its attempts on the same kind of device do the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config import RunConfig

# Seconds saved per token, layer and channel of the residual stream. Compiling saves passes over memory by fusing them, and
# these grow with all three. Unquantized 107K (two layers of width 64) in fp32 goes from 46 to 61 thousand tokens a second on
# one thread of an AMD EPYC. In processor time, measured side by side on a busy machine, an eager step of it takes 1.30 times as
# long as a compiled one. At width 160 it is 1.15 times, a saving .83 as large per channel. For W4A4 of 107K it is 1.09 times.
SAVED_S = 0.8 * (1 / 46e3 - 1 / 61e3) / (2 * 64)
WIDEST = 160  # the widest model whose saving was measured; in wider ones products take a larger share of the time
SHARE = 0.12  # of a run's time, at the least, that compiling saves
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
    """Seconds that compiling saves a run on a CPU; 0 if not measured: quantized or wide models, with a teacher, in bf16."""
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
    """Whether a run with this `env` (its env.json) is compiled: as it began on this kind of device, else as its config says.

    In runs from before this was recorded, `auto` compiles only on a GPU.
    """
    attempts = env.get("attempts", [])
    if not attempts or ("cuda" if attempts[-1].get("gpu") else "cpu") != device:
        return compiles(config, device)
    mode = config.train.compile
    return bool(env.get("compiled", mode == "on" or (mode == "auto" and device == "cuda")))


def keep_compiled_code() -> None:
    """Let the compiler keep its code in the user's cache, for other processes and later runs, unless the user chose a folder.

    Each kind of processor and version of torch has its own folder, since different machines may share a home folder.
    """
    with suppress(OSError):
        folder = code_folder()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def code_folder() -> Path:
    """The folder of compiled code: a name in `$QUESTCTL_CACHE/compiled` or, without it, `~/.cache/questctl/compiled`."""
    import hashlib

    import torch

    from ..kernels import native

    made_for = f"{torch.__version__}|{native.processor()}"
    return native.cache_folder().parent / "compiled" / hashlib.sha256(made_for.encode()).hexdigest()[:16]
