"""What a run is made from, checked before torch is loaded or anything is written: its config, its layers' words, its text."""

from __future__ import annotations

import warnings
from typing import Any

from ..config import Attempt, Execution, RunConfig, TrainConfig
from ..data.tokens import Dataset, prepare, require
from ..errors import UsageError
from ..quant.assign import check_layers
from ..store import Run
from .branch import origin


def check(config: RunConfig, run: Run) -> None:
    """Raise what `train` would raise about its input: UsageError, DataError, StorageError."""
    check_layers(config.model, config.quant)
    run.check_writable()
    origin(config, run)
    load_data(as_begun(config, run), run)


def as_begun(config: RunConfig, run: Run) -> RunConfig:
    """`config` with the execution fields that the run began with, so that its parts fit together, but for those
    that every attempt may choose anew (device, divergence rules).

    Warns of each field that was asked for otherwise. Raises DataError or UsageError if the stored config is damaged or of
    another experiment.
    """
    if config.ptq is not None:
        raise UsageError(f"ptq: {config.run_id} is not trained; it is made from {config.ptq.source}.")
    if not run.exists():
        return config
    run.create(config)  # refuses another experiment
    begun = run.config().train
    kept: dict[str, Any] = {}
    for name, info in TrainConfig.model_fields.items():
        if Execution in info.metadata and Attempt not in info.metadata:
            kept[name] = getattr(begun, name)
            if getattr(config.train, name) not in (kept[name], info.default):
                warnings.warn(f"train.{name}: {run.name} began with {kept[name]} and goes on with it.", stacklevel=3)
    steps = {int(step) for train in (begun, config.train) for step in train.keep_steps.split(",") if step}
    kept["keep_steps"] = ",".join(map(str, sorted(steps)))  # who branches from it may come later
    return config.model_copy(update={"train": config.train.model_copy(update=kept)})


def load_data(config: RunConfig, run: Run | None = None) -> Dataset:
    """The tokens of the run.

    Raises UsageError or DataError if they are missing, damaged, too few, beyond the vocabulary, or not those `run` began with.
    """
    data = prepare(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction)
    require(data, config.data.seq_len)
    if 0 < config.model.vocab_size < data.meta.vocab_size:
        raise UsageError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the {data.meta.vocab_size} ids of "
            f"{config.data.source}; 0 takes the vocabulary of the data."
        )
    first = run.sibling(config.branch.source) if run and config.branch and not run.env() else run
    began = first.env().get("data_hash", data.data_hash) if first else data.data_hash
    if began != data.data_hash:
        raise UsageError(
            f"data.source: {config.data.source} is not the text that the run began with (hash {data.data_hash[:8]}, not "
            f"{began[:8]}); restore it, or remove the run (questctl runs rm) to train it anew."
        )
    return data
