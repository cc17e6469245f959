"""From a few keys to the config of a run, and from a config back to the command that trains it."""

from __future__ import annotations

import shlex
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .layers import Layer, file_layer, flat_items, flatten, resolve
from .presets import PRESETS
from .sections import RunConfig, execution_keys

DEFAULT_PRESET = "53K"  # the smallest: unless a size is named, training takes about a minute


def default_layer() -> Layer:
    """The layer below all others: the smallest preset."""
    return Layer("default", {("preset",): DEFAULT_PRESET})


def make_config(file: Path | str | None = None, **sections: Any) -> RunConfig:
    """The config of a run from keys grouped as in a TOML file. Keys override the file, and the file overrides the preset.

    The default preset is the smallest. `QUESTCTL_*` variables of the environment are not read. Raises UsageError for an unknown
    key, preset or method, or a value out of range.

    >>> make_config(preset="107K", quant={"method": "quest", "bits": 4}, train={"steps": 200}).quant.label
    'quest-w4a4'
    """
    layers = [default_layer(), *([] if file is None else [file_layer(Path(file))])]
    return resolve([*layers, Layer("make_config", flatten(sections, where="make_config"))]).config


def train_command(config: RunConfig) -> str:
    """The shell command that trains the run of `config`; `questctl quantize …` for a run quantized after its training.

    The command gives the same run id unless a `QUESTCTL_*` variable sets a key. It leaves out keys that do not change the
    result, such as the device and the number of threads.
    """
    if (after := config.ptq) is not None:
        words = [after.source, "--quant", str(config.quant.weights), "--activations", str(config.quant.activations)]
        words += ["--method", after.method]
        if after.method == "gptq":
            words += ["--calibration-tokens", str(after.calibration_tokens), "--damping", f"{after.damping:g}"]
        return shlex.join(["questctl", "quantize", *words])
    values = dict(flat_items(config))

    def differences(name: str) -> int:
        return sum(values.get(key) != value for key, value in _values_of_preset(name).items())

    sizes = [name for name in PRESETS if _of_preset(name).model == config.model]
    preset = min(sizes or [DEFAULT_PRESET], key=differences)
    method, _, bits = config.quant.label.partition("-w")
    bits = bits.partition("a")[0]
    base = _of_preset(preset, method, bits)
    if base.quant != config.quant.at_once:  # no pair of --quant and --bits has this label
        method, base = "", _of_preset(preset)
    flags = ["--preset", preset, *(["-q", method, *(["-b", bits] if bits else [])] if method else [])]
    flags += ["--steps", str(config.train.steps), *(["--seed", str(config.train.seed)] if config.train.seed else [])]
    left_out = {"train.steps", "train.seed"} | execution_keys()
    of_base = _values_of_preset(preset, method, bits) if method else _values_of_preset(preset)
    for key, value in values.items():
        if key not in left_out and of_base.get(key) != value:
            flags += ["--set", f"{_quoted(key)}={value}"]
    return shlex.join(["questctl", "train", *flags])


@cache
def _of_preset(preset: str, method: str = "", bits: str = "") -> RunConfig:
    """The config of a preset with a method; without it, if the method does not exist or does not support the bits."""
    flags = {("quant", "method"): method, ("quant", "bits"): int(bits) if bits.isdigit() else bits}
    with suppress(UsageError):
        return resolve([Layer("preset", {("preset",): preset}), Layer("flags", {k: v for k, v in flags.items() if v})]).config
    return _of_preset(preset)


@cache
def _values_of_preset(preset: str, method: str = "", bits: str = "") -> dict[str, Any]:
    """The keys and values of `_of_preset`; not to be changed."""
    return dict(flat_items(_of_preset(preset, method, bits)))


def _quoted(key: str) -> str:
    """A key of `flat_items` as --set takes it: the pattern of an override in quotes."""
    head, _, rest = key.partition("quant.overrides.")
    pattern, _, side = rest.rpartition(".")
    return f'quant.overrides."{pattern}".{side}' if rest and not head else key
