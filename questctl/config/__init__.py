"""The configuration of a run: its sections, its identity (the run id), the layers its values come from, and the presets."""

from .amounts import human_count, parse_count
from .layers import (
    SHORTHAND,
    Layer,
    Resolved,
    env_layer,
    file_layer,
    flat_items,
    flatten,
    known_keys,
    parse_value,
    read_toml,
    resolve,
    set_layer,
)
from .presets import PRESETS
from .sections import (
    BranchConfig,
    DataConfig,
    LayerQuant,
    ModelConfig,
    OptimConfig,
    PTQConfig,
    QuantConfig,
    RunConfig,
    Section,
    TrainConfig,
    attempt_keys,
    execution_keys,
)
from .validation import broken

__all__ = [
    "PRESETS",
    "SHORTHAND",
    "BranchConfig",
    "DataConfig",
    "Layer",
    "LayerQuant",
    "ModelConfig",
    "OptimConfig",
    "PTQConfig",
    "QuantConfig",
    "Resolved",
    "RunConfig",
    "Section",
    "TrainConfig",
    "attempt_keys",
    "broken",
    "env_layer",
    "execution_keys",
    "file_layer",
    "flat_items",
    "flatten",
    "human_count",
    "known_keys",
    "parse_count",
    "parse_value",
    "read_toml",
    "resolve",
    "set_layer",
]
