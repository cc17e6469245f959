"""Checks of a run before torch is imported and before anything is written: its config, the specs of its layers, its text."""

from __future__ import annotations

import warnings
from typing import Any

from ..config import RunConfig, TrainConfig, attempt_keys, execution_keys
from ..data.size_estimate import CorpusEstimate
from ..data.tokens import Dataset, tokenizer_of, with_leak
from ..data.writing import ProgressListener
from ..errors import UsageError
from ..pretrained import TEACHER, same_weights
from ..quant.layer_specs import check_layers
from ..store import Run
from .branch import branch_checkpoint
from .run_data import check_teacher, estimate_run_data, load_data, tokenizer_here

QUICK_TOKENS = 1 << 26  # of training text, at most, whose leak is measured before a run (2 s) if preparation did not


def check(config: RunConfig, run: Run, progress: ProgressListener | None = None, *, processes: int = 1) -> Dataset:
    """Check a run as `train` would, and return its tokens.

    A corpus that is not prepared yet is prepared, which `progress` follows. Raises what `train` raises about its input:
    UsageError, DataError, StorageError.
    """
    data = load_data(_checked(config, run, processes), run, progress)
    if config.teacher.source:
        check_teacher(config, data.meta.vocab_size, tokenizer_of(data))
    return with_leak(data) if len(data.train) <= QUICK_TOKENS else data


def check_dry(config: RunConfig, run: Run, *, processes: int = 1) -> CorpusEstimate:
    """Check a run without preparing its corpus; an estimate of its tokens. Raises what `check` does, as far as known."""
    estimate = estimate_run_data(_checked(config, run, processes))
    if config.teacher.source:
        check_teacher(config, estimate.vocab_size if estimate.vocab_exact else None, tokenizer_here(config))
    return estimate


def _checked(config: RunConfig, run: Run, processes: int) -> RunConfig:
    """The config with which the run starts or resumes, after all checks but those of its text."""
    check_shared(config, processes)
    for _, quant in config.stages:
        check_layers(config.model, quant)
    if config.model.init:
        same_weights(config.model.init, config.model.init_sha256)
    if config.teacher.source:  # before its text is prepared, which may take long
        same_weights(config.teacher.source, config.teacher.sha256, TEACHER)
    run.check_writable()
    branch_checkpoint(config, run)
    return with_stored_execution(config, run)


def check_shared(config: RunConfig, processes: int) -> None:
    """Raises UsageError if that many processes cannot have equal parts of a batch."""
    if config.train.batch_size % processes:
        raise UsageError(
            f"train.batch_size: {config.train.batch_size} sequences cannot be shared equally by {processes} processes."
        )


def with_stored_execution(config: RunConfig, run: Run) -> RunConfig:
    """`config` with the execution fields that the run began with, so that all its attempts compute the same.

    Fields that every attempt may choose (device, divergence rules) stay. Warns of each field for which `config` has another
    value. Raises DataError or UsageError if the stored config is damaged or of another experiment.
    """
    if config.ptq is not None:
        raise UsageError(f"ptq: {config.run_id} is not trained; it is made from {config.ptq.source}.")
    if not run.exists():
        return config
    run.create(config)  # raises if the folder holds another experiment
    begun = run.config().train
    kept: dict[str, Any] = {}
    for key in sorted(execution_keys() - attempt_keys()):
        name = key.removeprefix("train.")
        kept[name] = getattr(begun, name)
        if getattr(config.train, name) not in (kept[name], TrainConfig.model_fields[name].default):
            warnings.warn(f"{key}: {run.name} began with {kept[name]} and continues with it.", stacklevel=3)
    steps = {int(step) for train in (begun, config.train) for step in train.keep_steps.split(",") if step}
    kept["keep_steps"] = ",".join(map(str, sorted(steps)))  # a run that branches from it may be added later
    return config.model_copy(update={"train": config.train.model_copy(update=kept)})
