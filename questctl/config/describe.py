"""Show a config: as TOML, key by key with the origin and meaning of each value, and the table of presets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .amounts import human_count
from .layers import Layer, Resolved, flat_items, flatten, known_keys, resolve
from .presets import FAMILIES
from .sections import RunConfig


@dataclass(frozen=True)
class Explained:
    """One key of a config: its value, the origin of the value (`default`, `preset 53K`, `--lr`, …), and what the key means."""

    key: str
    value: Any
    origin: str
    meaning: str


@dataclass(frozen=True)
class PresetRow:
    """A model size with its recipe; `warmup` is in steps, and `block` is the size of rotation blocks.

    `family` is laptop, published or old: only sizes of one family differ in nothing but size.
    """

    family: str
    preset: str
    params_non_embedding: int
    layers: int
    width: int
    heads: int
    hidden: int
    sequence: int
    batch: int
    optimizer: str
    lr: str
    warmup: int
    tokens: str
    block: int


def explain_config(resolved: Resolved) -> list[Explained]:
    """Every key of a config, in the order of the tree; `resolved` is what `questctl.config.resolve` returns."""
    meanings = {".".join(key): text for key, text in known_keys().items()}
    return [Explained(key, value, resolved.origins[key], meanings.get(key, "")) for key, value in flat_items(resolved.config)]


def preset_table() -> list[PresetRow]:
    """All presets by family, each from the smallest model to the largest."""
    rows = []
    for family, name, values in ((family, *preset) for family, presets in FAMILIES.items() for preset in presets.items()):
        c = resolve([Layer("preset", flatten(values, where=name))]).config
        m = c.model
        shape = (m.params_non_embedding, m.n_layer, m.d_model, m.n_head, m.d_ff)
        optimizer = (c.data.seq_len, c.train.batch_size, c.optim.name, f"{c.optim.lr:g}", round(c.warmup_steps))
        rows.append(PresetRow(family, name, *shape, *optimizer, human_count(c.tokens), values["quant"]["block"]))
    return rows


def to_toml(config: RunConfig) -> str:
    """The config as TOML, a table per section. `--config` and `make_config(file=…)` read it back to the same run id."""
    lines = [f"# run id {config.run_id}"]
    for section, values in config.model_dump(mode="json").items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
        for pattern, specs in values.get("overrides", {}).items():
            lines += [f"overrides.{json.dumps(pattern)}.{side} = {json.dumps(spec)}" for side, spec in specs.items() if spec]
    return "\n".join(lines)
