"""The files of `plan --out`: a config for `train`, a plan for `sweep`, to be run as they are.

model     the Llama whose non-embedding parameters come nearest to N, in the presets' proportions
quant     the words of the scheme's runs
recipe    sequences, tokens a sequence, precision, validation: those of the runs behind the plan where these are run folders and
          agree, else of the preset nearest in size; the learning rate by the published rule
data      of the runs behind the plan likewise, else `--set data.source=…`: what a law predicts is a loss on one text
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console
from ..config import Layer, ModelConfig, flat_items, flatten, resolve, set_layer
from ..config.presets import PRESETS
from ..errors import StorageError, UsageError
from ..quant.methods import at_block, label_specs
from ..store import runs_in
from ..sweep.costs import memory_bytes, params_total

if TYPE_CHECKING:
    from ..analysis.design import NextRun
    from ..analysis.fit_result import Fit
    from ..analysis.planner import Option
    from ..analysis.schemes import Scheme

LAPTOP = 5e6  # non-embedding parameters below which shapes and recipes are those of the laptop presets
MIXED = re.compile(r"\+[0-9a-f]{4}$")  # in the label of runs whose layers have words of their own
ACTIVATIONS = 8 * 2**30  # bytes: with the states of the 800M preset, what a device of 24 GB holds
VOCABULARY = 50_304  # where the text leaves it open: that of the published runs
RECIPE = ("data.seq_len", "train.batch_size", "train.precision", "train.eval_tokens")
DATA = ("data.source", "data.tokenizer", "data.val_fraction")


WHICH_DATA = (
    "data.source and data.tokenizer are left to you: the loss is predicted for the text of the points, and without them "
    "questctl trains on pystdlib, 12 MB"
)


def given(sources: Sequence[Path], sets: Sequence[str]) -> dict[str, Any]:
    """The keys of RECIPE and DATA that the runs behind a plan agree on, and those of `--set` items, which win.

    A table says none of the former. Raises UsageError for a key that does not exist.
    """
    said = {".".join(map(_part, path)): value for path, value in set_layer(sets).values.items()}
    if not all(source.is_dir() for source in sources):
        return said
    runs = [run for source in sources for run in runs_in(source)]
    seen = [dict(flat_items(run.config())) for run in runs if run.result() is not None]
    alike = {key: {config[key] for config in seen} for key in (*RECIPE, *DATA)}
    return {key: values.pop() for key, values in alike.items() if len(values) == 1} | said


def _part(text: str) -> str:
    """A part of a dotted key as TOML."""
    return text if re.fullmatch(r"[\w-]+", text) else json.dumps(text)


def _lines(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in keys.items()]


def _data(keys: Mapping[str, Any]) -> list[str]:
    return [] if "data.source" in keys else [f"# {WHICH_DATA}"]


def recipe(N: float) -> dict[str, Any]:
    """RECIPE of the preset nearest in size to N non-embedding parameters, and the learning rate."""
    near = min((n for n in _sizes() if (n < LAPTOP) == (N < LAPTOP)), key=lambda n: abs(math.log(n / N)))
    return {**{key: _sizes()[near][1][key] for key in RECIPE}, "optim.lr": float(f"{learning_rate(N):.3g}")}


@cache
def _sizes() -> dict[int, tuple[str, dict[str, Any]]]:
    """Non-embedding parameters of each preset → its name, its keys."""
    built = {name: resolve([Layer("preset", flatten(values, where=name))]).config for name, values in PRESETS.items()}
    return {config.model.params_non_embedding: (name, dict(flat_items(config))) for name, config in built.items()}


def shape(N: float) -> dict[str, int]:
    """Width, layers and heads of a Llama whose non-embedding parameters come nearest to N, in the presets' proportions.

    The published sizes have n_layer ≈ d_model/128 and heads of 128 (QuEST, arXiv 2502.05003); laptop sizes are widths of 64.
    """
    small = N < LAPTOP
    unit, multiple = (64, 64) if small else (128, 256)
    best: tuple[float, dict[str, int]] | None = None
    for d in range(unit, 64 * 256 + 1, unit):
        d_ff = -(-(8 * d // 3) // multiple) * multiple
        layers = round(N / (4 * d * d + 3 * d * d_ff + 2 * d))
        low, high = (1, 8) if small else (0.7 * d / 128, 1.5 * d / 128)
        if not low <= layers <= high:
            continue
        dims = {"n_layer": layers, "d_model": d, "n_head": d // (32 if small else 128), "d_ff": d_ff}
        off = abs(math.log(ModelConfig(**dims).params_non_embedding / N))
        if best is None or off < best[0]:
            best = off, dims
    if best is None:
        raise UsageError(f"no Llama of the presets' proportions has {N:.3g} non-embedding parameters.")
    return best[1]


def learning_rate(N: float) -> float:
    """Peak learning rate of the published recipe: 1.2e-3 up to 50M parameters, then 6e-4·100M/N (QuEST, arXiv 2502.05003)."""
    return 3e-3 if N < LAPTOP else min(1.2e-3, 6e-4 * 1e8 / N)


def quant_keys(scheme: Scheme, block: int) -> dict[str, str]:
    """The keys of a config that train a scheme: the words of its runs, or those that its label stands for, their rotations in
    blocks of `block`. Raises UsageError where neither says them."""
    if scheme.full:
        return {"quant.method": "bf16"}
    label, _, gradients = scheme.label.partition("+g.")
    if scheme.label.startswith("ptq-"):
        raise UsageError(f"--out: '{scheme.label}' is made after training; plan for bf16 and use questctl quantize.")
    if MIXED.search(scheme.label):
        raise UsageError(f"--out: the layers of '{scheme.label}' have words of their own, which its label does not say.")
    if len(scheme.specs) > 1:
        kinds = ", ".join("+".join(pair) for pair in scheme.specs)
        raise UsageError(
            f"--out: runs of '{scheme.label}' were quantized in several ways ({kinds}); give each a label of its own."
        )
    words = at_block(scheme.specs[0], block) if scheme.specs else label_specs(label, block)
    if words is None:
        raise UsageError(
            f"--out: how runs of '{scheme.label}' are quantized is unknown; name it like w4a4, w4a4-norot or lsq-w4a4, or add "
            "columns weights and activations with quantizer specs, such as int4-h128-rms-trust."
        )
    keys = {"quant.weights": words[0], "quant.activations": words[1]}
    return keys | {"quant.gradients": f"{gradients}-ste"} if gradients else keys


def config(option: Option, scheme: Scheme, given: Mapping[str, Any]) -> str:
    """A config for `questctl train`: the planned scheme and tokens, and the model nearest to the planned size."""
    plan = f"{option.scheme}, {option.N:.4g} parameters, {option.D:.4g} tokens, {6 * option.N * option.D:.3g} FLOP"
    about = f"# questctl plan: {plan}; predicted {option.loss:.4f} nats/token"
    keys = {**_model(option.N, scheme), "train.tokens": round(option.D), **given}
    return "\n".join([about, *_lines(keys | _micro_batch(keys)), *_data(keys)]) + "\n"


def sweep(fit: Fit, runs: Sequence[NextRun], goal: tuple[float, str, str], given: Mapping[str, Any]) -> str:
    """A plan for `questctl sweep` with one cell per run; sizes of presets are named as such."""
    about = f"runs that sharpen the transition from {goal[1]} to {goal[2]} bits at {goal[0]:.3g} parameters"
    lines = ['name = "next-runs"', f'description = "{about}"', "", "[base]", *_lines(given), *_data(given)]
    seeds: dict[str, int] = {}  # the next one of each cell: two sizes of the points may have one model
    for r in runs:
        scheme = fit.points.schemes[fit.points.index(r.scheme)]
        keys = {**_model(r.N, scheme), "train.tokens_per_param": float(f"{r.D / r.N:.4g}")}
        cell = repr(keys)
        keys["train.seed"] = max(r.seed, seeds.get(cell, 0))
        seeds[cell] = keys["train.seed"] + 1
        keys |= _micro_batch({**keys, **given})
        lines += ["", f"[[include]] # leaves {100 * r.variance:.0f} % of the variance, {r.flops:.2g} FLOP"]
        lines += _lines({key: value for key, value in keys.items() if key not in given})
    return "\n".join(lines) + "\n"


def _model(N: float, scheme: Scheme) -> dict[str, Any]:
    """The keys of model, recipe and scheme; a preset of exactly N parameters is named as such."""
    if round(N) in _sizes():
        name, built = _sizes()[round(N)]
        dims = {key.partition(".")[2]: value for key, value in built.items() if key.startswith("model.")}
        keys: dict[str, Any] = {"preset": name}
    else:
        dims = shape(N)
        keys = {**{f"model.{key}": value for key, value in dims.items()}, **recipe(N)}
    return keys | quant_keys(scheme, ModelConfig(**dims).rotation_block)


def _micro_batch(keys: Mapping[str, Any]) -> dict[str, int]:
    """Sequences of a backward pass, the most whose activations take up to ACTIVATIONS, where a batch is more; none of it enters
    a run's id. Raises UsageError for what `--set` contradicts."""
    given = flatten(tomllib.loads("\n".join(_lines(keys))), where="--set")
    config = resolve([Layer("plan", given)]).config.with_vocabulary(VOCABULARY)
    rows = batch = config.train.batch_size

    def activations() -> int:
        train = config.train.model_copy(update={"micro_batch": rows})
        return memory_bytes(config.model_copy(update={"train": train})) - 16 * params_total(config)

    while rows % 2 == 0 and activations() > ACTIVATIONS:
        rows //= 2
    return {} if rows == batch or config.train.micro_batch else {"train.micro_batch": rows}


def save(path: Path, text: str, command: str) -> None:
    """Write the file, say how to run it, and what it lacks. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as e:
        raise StorageError(f"{path}: cannot be written: {e.strerror}.") from e
    console.note(f"wrote {path}: questctl {command} {path}")
    if WHICH_DATA in text:
        console.warn(f"{path}: {WHICH_DATA}; name it by --set data.source=… --set data.tokenizer=…")
