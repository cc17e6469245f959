"""The text of a run: its tokens, another text in the same tokenizer, the tokenizer, and what env.json records of them."""

from __future__ import annotations

from typing import Any

from ..config import RunConfig
from ..data.size_estimate import CorpusEstimate, estimate_corpus
from ..data.tokenizers import NO_TOKENIZER, Tokenizer, load
from ..data.tokens import Dataset, prepare, require_windows, tokenizer_of, too_few_tokens
from ..data.writing import ProgressListener
from ..errors import UsageError
from ..store import Run


def estimate_run_data(config: RunConfig) -> CorpusEstimate:
    """An estimate of the tokens that `load_data` would return, without preparing them.

    Raises what `load_data` does, as far as known: DataError for too few tokens, UsageError for too small a vocabulary.
    """
    estimate, length = estimate_corpus(config.data), config.data.seq_len
    if estimate.train_tokens is not None and estimate.train_tokens <= length:
        most = "" if estimate.exact else "at most "
        raise too_few_tokens(config.data.source, f"{most}{estimate.train_tokens:,} training tokens", length)
    if estimate.vocab_size is not None and estimate.vocab_exact:
        _check_vocabulary(config, estimate.vocab_size)
    return estimate


def load_data(config: RunConfig, run: Run | None = None, progress: ProgressListener | None = None) -> Dataset:
    """The tokens of a run's config, prepared if they are not yet.

    Raises UsageError or DataError if they are missing, damaged, too few, beyond the vocabulary, or not those that `run` began
    with.
    """
    data = prepare(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction, progress=progress)
    require_windows(data, config.data.seq_len)
    _check_vocabulary(config, data.meta.vocab_size)
    first = run.sibling(config.branch.source) if run and config.branch and not run.env() else run
    env = first.env() if first else {}
    tokenizer_before, tokenizer_hash = env.get("tokenizer_hash"), data.meta.tokenizer_hash
    if tokenizer_before and tokenizer_hash and tokenizer_hash != tokenizer_before:
        raise UsageError(
            f"data.tokenizer: {data.meta.tokenizer} of {config.data.source} has the hash {tokenizer_hash[:8]}, but the run "
            f"began with {env.get('tokenizer')} of hash {tokenizer_before[:8]}: their ids mean different text."
        )
    data_before = env.get("data_hash", data.data_hash)
    if data_before != data.data_hash:
        raise UsageError(
            f"data.source: {config.data.source} is not the text that the run began with (hash {data.data_hash[:8]}, not "
            f"{data_before[:8]}); restore it, or remove the run (questctl runs rm) to train it anew."
        )
    return data


def _check_vocabulary(config: RunConfig, of_data: int) -> None:
    if 0 < config.model.vocab_size < of_data:
        raise UsageError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the {of_data} ids of {config.data.source}; 0 takes "
            "the vocabulary of the data."
        )


def text_record(data: Dataset) -> dict[str, Any]:
    """What env.json records of a run's text: the hashes that `load_data` and `load_other` compare, and its training tokens."""
    hashes = {"data_hash": data.data_hash, "tokenizer": data.meta.tokenizer, "tokenizer_hash": data.meta.tokenizer_hash}
    return {**hashes, "train_tokens": len(data.train)}


def load_other(config: RunConfig, run: Run, source: str) -> Dataset:
    """Another text, `source`, in the tokenizer of `run`; a trained tokenizer is read from the run's own token files.

    Raises what `load_data` does, and UsageError for token files of another tokenizer.
    """
    kind = config.data.tokenizer.partition(":")[0]
    tokenizer = f"hf:{load_data(config, run).folder}" if kind == "bpe" else config.data.tokenizer
    if source.partition(":")[0] in ("bin", "synthetic"):
        tokenizer = NO_TOKENIZER
    update = {"source": source, "tokenizer": tokenizer}
    data = load_data(config.model_copy(update={"data": config.data.model_copy(update=update)}))
    other_hash, own_hash = data.meta.tokenizer_hash, run.env().get("tokenizer_hash")
    if other_hash and own_hash and other_hash != own_hash:
        raise UsageError(
            f"--data: {source} is in the ids of {data.meta.tokenizer} (hash {other_hash[:8]}), {run.name} knows those of "
            f"{run.env().get('tokenizer')} (hash {own_hash[:8]}); prepare its text with the run's tokenizer."
        )
    return data


def run_tokenizer(config: RunConfig, run: Run) -> Tokenizer | None:
    """The tokenizer of a run, from its token files unless it needs no table; None where its ids stand for no known text."""
    if config.data.source.startswith("synthetic"):
        return None
    if config.data.tokenizer == "byte" and not config.data.source.startswith("bin"):
        return load("byte")
    return tokenizer_of(load_data(config, run))
