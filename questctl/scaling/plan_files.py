"""The files of a plan: a config that `train` takes, and a sweep file that `sweep` takes, to be run as they are.

model     the Llama whose non-embedding parameters come nearest to the planned number, in the presets' proportions
quant     the specs of the scheme's runs
recipe    sequences, tokens a sequence, precision, validation: those of the runs behind the plan if these are run folders and
          agree, else of the preset nearest in size; the learning rate by the published rule
data      likewise of the runs behind the plan, else `--set data.source=…`, because a law predicts the loss on one text
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Layer, ModelConfig, flat_items, flatten, resolve, set_layer
from ..config.presets import FAMILIES, LAPTOP_BLOCK, PRESETS, laptop_model
from ..errors import StorageError, UsageError
from ..quant.methods import at_block, label_specs, split_rows
from ..quant.spec import ROWS
from ..store import holds_runs, runs_in
from ..sweep.costs import activation_bytes

if TYPE_CHECKING:
    from ..analysis.schemes import Scheme
    from .plan import BudgetPlan, NextRuns

LAPTOP = 5e6  # non-embedding parameters below which shapes and recipes are those of the laptop presets
ACTIVATIONS = 8 * 2**30  # bytes: with the states of the 800M preset, what a device of 24 GB holds
VOCABULARY = 50_304  # default vocabulary: that of the published runs
RECIPE = (
    *("data.seq_len", "train.batch_size", "train.precision", "train.eval_tokens"),
    *("optim.name", "optim.warmup_steps", "optim.warmup_frac"),
)
DATA = ("data.source", "data.tokenizer", "data.val_fraction", "data.dedup")
WHICH_DATA = (
    "data.source and data.tokenizer are left to you: the loss is predicted for the text of the points, and without them "
    "questctl trains on pystdlib, 12 MB"
)


# --- what the runs behind a plan say ----------------------------------------------------------------------------------


def keys_of_runs(sources: Sequence[Path], sets: Sequence[str]) -> dict[str, Any]:
    """The keys of RECIPE and DATA that the finished runs of `sources` agree on, overridden by `--set` items.

    If all runs are smaller than LAPTOP, the learning rate is among them; that of larger models depends on their size.

    If a source is a table, only the `--set` items: a table does not say how its runs were trained. Raises UsageError for a key
    that does not exist.
    """
    chosen = {".".join(map(_quoted, path)): value for path, value in set_layer(sets).values.items()}
    if not all(map(holds_runs, sources)):
        return chosen
    runs = [run for source in sources for run in runs_in(source)]
    configs = [dict(flat_items(run.config())) for run in runs if run.result() is not None]
    small = all(run.config().model.params_non_embedding < LAPTOP for run in runs)
    values = {key: {config[key] for config in configs} for key in (*RECIPE, *DATA, *(("optim.lr",) if small else ()))}
    return {key: each.pop() for key, each in values.items() if len(each) == 1} | chosen


# --- sizes and recipes ------------------------------------------------------------------------------------------------


@cache
def _presets() -> dict[str, tuple[int, dict[str, Any]]]:
    """Name of each preset → its non-embedding parameters, its keys."""
    built = {name: resolve([Layer("preset", flatten(keys, where=name))]).config for name, keys in PRESETS.items()}
    return {name: (config.model.params_non_embedding, dict(flat_items(config))) for name, config in built.items()}


def recipe(N: float) -> dict[str, Any]:
    """The keys of RECIPE from the preset nearest in size to N non-embedding parameters, and the learning rate."""
    near = min(FAMILIES["laptop" if N < LAPTOP else "published"], key=lambda name: abs(math.log(_presets()[name][0] / N)))
    keys = _presets()[near][1]
    lr = keys["optim.lr"] if N < LAPTOP else float(f"{learning_rate(N):.3g}")
    return {**{key: keys[key] for key in RECIPE}, "optim.lr": lr}


def shape(N: float) -> dict[str, int]:
    """Width, layers and heads of a Llama whose non-embedding parameters come nearest to N, in the presets' proportions.

    The published sizes have n_layer ≈ d_model/128 and heads of 128 (QuEST, arXiv 2502.05003). Laptop sizes have up to twice the
    layers that the rule of their presets gives for a width, since sizes between those of the presets are few otherwise.
    """
    models = _small_models() if N < LAPTOP else _large_models(N)
    best = min(models, key=lambda model: abs(math.log(model.params_non_embedding / N)), default=None)
    if best is None:
        raise UsageError(f"no Llama of the presets' proportions has {N:.3g} non-embedding parameters.")
    return best.model_dump(include={"n_layer", "d_model", "n_head", "d_ff"})


def _small_models() -> Iterator[ModelConfig]:
    for d_model in range(32, 321, 32):
        least = laptop_model(d_model).n_layer
        yield from (laptop_model(d_model, layers) for layers in range(least, 2 * least + 1))


def _large_models(N: float) -> Iterator[ModelConfig]:
    """For each width the number of layers that comes nearest to N, if it is in the published proportions."""
    for d in range(128, 64 * 256 + 1, 128):
        d_ff = -(-(8 * d // 3) // 256) * 256
        layers = round(N / (4 * d * d + 3 * d * d_ff + 2 * d))
        if 0.7 * d / 128 <= layers <= 1.5 * d / 128:
            yield ModelConfig(n_layer=layers, d_model=d, n_head=d // 128, d_ff=d_ff)


def learning_rate(N: float) -> float:
    """Peak learning rate of the published recipe: 1.2e-3 up to 50M parameters, then 6e-4·100M/N (QuEST, arXiv 2502.05003)."""
    return min(1.2e-3, 6e-4 * 1e8 / N)


def quant_keys(scheme: Scheme, block: int, head_width: int = 128) -> dict[str, str]:
    """The keys of a config that train a scheme: the specs of its runs, or those that its label stands for, with rotation blocks
    of `block`, in the cache of a head at most. Raises UsageError if neither gives them."""
    if scheme.full:
        return {"quant.method": "bf16"}
    label, rows = split_rows(scheme.label, {**dict.fromkeys(ROWS, block), "kv": min(block, head_width)})
    label, _, gradients = label.partition("+g.")
    if scheme.label.startswith("ptq-"):
        raise UsageError(f"--out: '{scheme.label}' is made after training; plan for bf16 and use questctl quantize.")
    if scheme.mixed:
        raise UsageError(f"--out: the layers of '{scheme.label}' have specs of their own, which its label does not say.")
    if len(scheme.specs) > 1:
        kinds = ", ".join("+".join(pair) for pair in scheme.specs)
        raise UsageError(
            f"--out: runs of '{scheme.label}' were quantized in several ways ({kinds}); give each a label of its own."
        )
    specs = at_block(scheme.specs[0], block) if scheme.specs else label_specs(label, block)
    if specs is None:
        raise UsageError(
            f"--out: how runs of '{scheme.label}' are quantized is unknown; name it like w4a4, w4a4-norot or lsq-w4a4, or add "
            "columns weights and activations with quantizer specs, such as int4-h128-rms-trust."
        )
    keys = {"quant.weights": specs[0], "quant.activations": specs[1]} | {f"quant.{key}": spec for key, spec in rows.items()}
    if gradients.endswith("-both"):
        keys["quant.backward"] = "both"
    return keys | {"quant.gradients": f"{gradients.removesuffix('-both')}-ste"} if gradients else keys


# --- files ------------------------------------------------------------------------------------------------------------


def config_file(plan: BudgetPlan, keys: Mapping[str, Any]) -> str:
    """A config for `questctl train`: the best scheme and tokens of a plan, and the model nearest to the planned size.

    `keys` are those of `keys_of_runs`. Raises UsageError if the scheme does not say how to quantize.
    """
    from ..analysis.formats import read_spec

    best = plan.options[0]
    scheme = plan.fit.points.schemes[plan.fit.points.index(best.scheme)]
    size = f"{best.scheme}, {best.N:.4g} parameters, {best.D:.4g} tokens, {6 * best.N * best.D:.3g} FLOP"
    about = f"# questctl plan: {size}; predicted {best.loss:.4f} nats/token"
    spec = read_spec(plan.limits.embedding)
    of_rows = {f"quant.{key}": str(spec) for key in ("embedding", "head") if spec and not spec.is_identity}
    planned = {**of_rows, **_model(best.N, scheme, keys), "train.tokens": round(best.D), **_start(best.share), **keys}
    return "\n".join([about, *toml_lines(planned | _micro_batch(planned)), *_comment(planned)]) + "\n"


def sweep_file(plan: NextRuns, keys: Mapping[str, Any]) -> str:
    """A sweep file with one cell for each next run; a size of a preset is named as such. `keys` as for `config_file`."""
    points, about = plan.fit.points, f"runs that sharpen {plan.goal}"
    lines = ['name = "next-runs"', f'description = "{about}"', "", "[base]", *toml_lines(keys), *_comment(keys)]
    seeds: dict[str, int] = {}  # next seed of each cell: two sizes of the points may give the same model
    for r in plan.runs:
        planned = {
            **_model(r.N, points.schemes[points.index(r.scheme)], keys),
            "train.tokens_per_param": float(f"{r.tokens_per_param:.4g}"),
            **_start(r.share),
        }
        cell = repr(planned)
        planned["train.seed"] = max(r.seed, seeds.get(cell, 0))
        seeds[cell] = planned["train.seed"] + 1
        planned |= _micro_batch({**planned, **keys})
        lines += ["", f"[[include]] # leaves {100 * r.variance:.0f} % of the variance, {r.flops:.2g} FLOP"]
        lines += toml_lines({key: value for key, value in planned.items() if key not in keys})
    return "\n".join(lines) + "\n"


def save(path: Path, text: str) -> None:
    """Write a file and the folder it is in. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise StorageError(f"{path}: cannot be written: {e.strerror}.") from e


def _quoted(text: str) -> str:
    """A part of a dotted key as TOML."""
    return text if re.fullmatch(r"[\w-]+", text) else json.dumps(text)


def toml_lines(keys: Mapping[str, Any]) -> list[str]:
    """Keys of a config as lines of TOML, each with its whole name: `optim.lr = 0.004`."""
    return [f"{key} = {json.dumps(value)}" for key, value in keys.items()]


def _comment(keys: Mapping[str, Any]) -> list[str]:
    """A comment on what the file leaves to the reader."""
    return [] if "data.source" in keys else [f"# {WHICH_DATA}"]


def _model(N: float, scheme: Scheme, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of model, recipe and scheme. A preset of exactly N parameters is used by name; of several, the one whose recipe
    agrees most with `keys`, those of the runs behind the plan."""

    def differences(name: str) -> int:
        return sum(_presets()[name][1].get(key, value) != value for key, value in keys.items())

    names = [name for name, (params, _) in _presets().items() if params == round(N)]
    if names:
        name = min(names, key=differences)
        of_preset = PRESETS[name]["model"]
        return {"preset": name} | quant_keys(
            scheme, PRESETS[name]["quant"]["block"], of_preset["d_model"] // of_preset["n_head"]
        )
    dims = shape(N)
    block = LAPTOP_BLOCK if N < LAPTOP else ModelConfig.model_validate(dims).rotation_block
    return {**{f"model.{key}": value for key, value in dims.items()}, **recipe(N)} | quant_keys(
        scheme, block, dims["d_model"] // dims["n_head"]
    )


def _start(share: float | None) -> dict[str, float]:
    """When to quantize, to a hundredth of the run; empty if the plan does not say, or says from the first step."""
    return {"quant.start": round(share, 2)} if share is not None and share >= 0.005 else {}


def _micro_batch(keys: Mapping[str, Any]) -> dict[str, int]:
    """Sequences of a backward pass: the most whose activations take up to ACTIVATIONS, if a batch has more. This does not
    change the run's id. Raises UsageError if `--set` contradicts it."""
    values = flatten(tomllib.loads("\n".join(toml_lines(keys))), where="--set")
    config = resolve([Layer("plan", values)]).config.with_vocabulary(VOCABULARY)
    rows = batch = config.train.batch_size

    def activations() -> int:
        train = config.train.model_copy(update={"micro_batch": rows})
        return activation_bytes(config.model_copy(update={"train": train}))

    while rows % 2 == 0 and activations() > ACTIVATIONS:
        rows //= 2
    return {} if rows == batch or config.train.micro_batch else {"train.micro_batch": rows}
