"""What a run is made from, checked before torch is loaded or anything is written: its config, its layers' words, its text."""

from __future__ import annotations

import warnings
from typing import Any

from ..config import RunConfig, TrainConfig, attempt_keys, execution_keys
from ..data.size_estimate import CorpusEstimate, estimate_corpus
from ..data.tokenizers import NONE, Tokenizer, load
from ..data.tokens import Dataset, prepare, require, tokenizer_of, too_few
from ..data.writing import Told
from ..errors import UsageError
from ..quant.layer_specs import check_layers
from ..store import Run
from .branch import origin


def check(config: RunConfig, run: Run, progress: Told | None = None, *, processes: int = 1) -> Dataset:
    """The tokens of the run, or what `train` would raise about its input: UsageError, DataError, StorageError. `progress` is
    told of a corpus that has to be prepared first."""
    return load_data(_checked(config, run, processes), run, progress)


def check_dry(config: RunConfig, run: Run, *, processes: int = 1) -> CorpusEstimate:
    """What is known of the run's tokens without preparing them; raises what `check` would, as far as that is known by then."""
    return estimate_run_data(_checked(config, run, processes))


def estimate_run_data(config: RunConfig) -> CorpusEstimate:
    """What is known of the tokens that `load_data` would give, and of its errors."""
    known, length = estimate_corpus(config.data), config.data.seq_len
    if known.train_tokens is not None and known.train_tokens <= length:
        most = "" if known.exact else "at most "
        raise too_few(config.data.source, f"{most}{known.train_tokens:,} training tokens", length)
    if known.vocab_size is not None and known.vocab_exact:
        _check_vocabulary(config, known.vocab_size)
    return known


def _checked(config: RunConfig, run: Run, processes: int) -> RunConfig:
    """The config as the run goes on with it, all but its text checked."""
    check_shared(config, processes)
    check_layers(config.model, config.quant)
    run.check_writable()
    origin(config, run)
    return with_stored_execution(config, run)


def check_shared(config: RunConfig, processes: int) -> None:
    """Raises UsageError if that many processes cannot have equal parts of a batch."""
    if config.train.batch_size % processes:
        raise UsageError(
            f"train.batch_size: {config.train.batch_size} sequences cannot be shared equally by {processes} processes."
        )


def with_stored_execution(config: RunConfig, run: Run) -> RunConfig:
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
    for key in sorted(execution_keys() - attempt_keys()):
        name = key.removeprefix("train.")
        kept[name] = getattr(begun, name)
        if getattr(config.train, name) not in (kept[name], TrainConfig.model_fields[name].default):
            warnings.warn(f"{key}: {run.name} began with {kept[name]} and goes on with it.", stacklevel=3)
    steps = {int(step) for train in (begun, config.train) for step in train.keep_steps.split(",") if step}
    kept["keep_steps"] = ",".join(map(str, sorted(steps)))  # who branches from it may come later
    return config.model_copy(update={"train": config.train.model_copy(update=kept)})


def load_data(config: RunConfig, run: Run | None = None, progress: Told | None = None) -> Dataset:
    """The tokens of the run, prepared if they are not.

    Raises UsageError or DataError if they are missing, damaged, too few, beyond the vocabulary, or not those `run` began with.
    """
    data = prepare(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction, progress=progress)
    require(data, config.data.seq_len)
    _check_vocabulary(config, data.meta.vocab_size)
    first = run.sibling(config.branch.source) if run and config.branch and not run.env() else run
    env = first.env() if first else {}
    spoke, speaks = env.get("tokenizer_hash"), data.meta.tokenizer_hash
    if spoke and speaks and speaks != spoke:
        raise UsageError(
            f"data.tokenizer: {data.meta.tokenizer} of {config.data.source} has the hash {speaks[:8]}, but the run began with "
            f"{env.get('tokenizer')} of hash {spoke[:8]}: their ids mean different text."
        )
    began = env.get("data_hash", data.data_hash)
    if began != data.data_hash:
        raise UsageError(
            f"data.source: {config.data.source} is not the text that the run began with (hash {data.data_hash[:8]}, not "
            f"{began[:8]}); restore it, or remove the run (questctl runs rm) to train it anew."
        )
    return data


def _check_vocabulary(config: RunConfig, of_data: int) -> None:
    if 0 < config.model.vocab_size < of_data:
        raise UsageError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the {of_data} ids of {config.data.source}; 0 takes "
            "the vocabulary of the data."
        )


def text_record(data: Dataset) -> dict[str, Any]:
    """What a run keeps of its text in env.json: to know it again (`load_data` and `load_other` compare the hashes), and how
    long its training part is."""
    hashes = {"data_hash": data.data_hash, "tokenizer": data.meta.tokenizer, "tokenizer_hash": data.meta.tokenizer_hash}
    return {**hashes, "train_tokens": len(data.train)}


def load_other(config: RunConfig, run: Run, source: str) -> Dataset:
    """Another text in the tokenizer of `run`: one that was trained is taken from the run's own tokens.

    Raises what `load_data` does, and UsageError for tokens of a tokenizer that is not the run's.
    """
    kind = config.data.tokenizer.partition(":")[0]
    tokenizer = f"hf:{load_data(config, run).folder}" if kind == "bpe" else config.data.tokenizer
    if source.partition(":")[0] in ("bin", "synthetic"):
        tokenizer = NONE
    update = {"source": source, "tokenizer": tokenizer}
    data = load_data(config.model_copy(update={"data": config.data.model_copy(update=update)}))
    speaks, spoke = data.meta.tokenizer_hash, run.env().get("tokenizer_hash")
    if speaks and spoke and speaks != spoke:
        raise UsageError(
            f"--data: {source} is in the ids of {data.meta.tokenizer} (hash {speaks[:8]}), {run.name} knows those of "
            f"{run.env().get('tokenizer')} (hash {spoke[:8]}); prepare its text with the run's tokenizer."
        )
    return data


def run_tokenizer(config: RunConfig, run: Run) -> Tokenizer | None:
    """The run's own, from its tokens unless it needs no table; None where its data are ids that nobody can spell."""
    if config.data.source.startswith("synthetic"):
        return None
    if config.data.tokenizer == "byte" and not config.data.source.startswith("bin"):
        return load("byte")
    return tokenizer_of(load_data(config, run))
