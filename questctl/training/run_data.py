"""The text of a run: its tokens, another text in the same tokenizer, the tokenizer, and what env.json records of them."""

from __future__ import annotations

from typing import Any

from ..config import RunConfig
from ..data.packing import packs, windows_of
from ..data.size_estimate import CorpusEstimate, estimate_corpus
from ..data.tokenizers import NO_TOKENIZER, Tokenizer, is_here, load
from ..data.tokens import Dataset, prepare, require_windows, tokenizer_of, too_few_tokens
from ..data.writing import ProgressListener
from ..errors import UsageError
from ..pretrained import TEACHER, Source, same_weights
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
    """The tokens of a run's text, which is prepared first if it is not yet.

    Raises UsageError or DataError if the tokens are missing, damaged, too few, beyond the vocabulary, or not those that `run`
    began with.
    """
    d = config.data
    first = run.sibling(config.branch.source) if run and config.branch and not run.env() else run
    env = first.env() if first else {}
    rule = env.get("dedup", "exact") if d.dedup == "auto" and "data_hash" in env else d.dedup  # the rule that it began with
    data = prepare(d.source, d.tokenizer, val_fraction=d.val_fraction, dedup=rule, progress=progress)
    if packs(data, d):
        windows_of(data, "train", d)  # raises for a text whose documents are not known
    else:
        require_windows(data, d.seq_len)
    _check_vocabulary(config, data.meta.vocab_size)
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


def check_teacher(config: RunConfig, vocab_size: int | None, own: Tokenizer | None, key: str = TEACHER) -> None:
    """Check that a run's teacher uses the ids of its text: those of `own`, `vocab_size` of them (None: not known).

    `key` names the teacher in errors.

    Where both tokenizers are known to be the same, the sizes may differ, since models pad their vocabulary. A teacher whose
    tokenizer is not known, such as a GGUF file, needs the same size. Raises DataError for a teacher that is missing, UsageError
    for one whose weights have changed or whose ids differ.
    """
    source = same_weights(config.teacher.source, config.teacher.sha256, key)
    theirs, ours, text = source.model["vocab_size"], config.model.vocab_size or vocab_size, config.data.source
    alike = None if own is None else _same_ids(source, own)
    if own is not None and alike is False:
        raise UsageError(
            f"{key}: {source.name} has another tokenizer than {text}, {own.name}, so that its ids mean other text; choose "
            "one with the tokenizer of the run."
        )
    if ours is not None and theirs != ours and not (alike and theirs >= (vocab_size or 0)):
        raise UsageError(
            f"{key}: {source.name} has a vocabulary of {theirs} ids, the run on {text} one of {ours}; choose one with the same "
            "vocabulary."
        )


def _same_ids(source: Source, own: Tokenizer) -> bool | None:
    """Whether a checkpoint has the same ids as a tokenizer; None if the tokenizer of the checkpoint is not known."""
    if source.kind == "run":
        of_run = Run(source.path).env().get("tokenizer_hash")
        return None if of_run is None else bool(of_run == own.hash)
    if source.tokenizer is None:
        return None
    other = load(source.tokenizer)
    both = range(min(own.vocab_size, other.vocab_size))
    return own.hash == other.hash or all(own.decode([i]) == other.decode([i]) for i in both)


def tokenizer_here(config: RunConfig) -> Tokenizer | None:
    """The tokenizer of a run, without preparing its text; None if there is none, or if it is not on this machine."""
    text, name = config.data.source.partition(":")[0], config.data.tokenizer
    return load(name) if text not in ("bin", "synthetic") and not name.startswith("bpe") and is_here(name) else None


def text_record(data: Dataset) -> dict[str, Any]:
    """What env.json records of a run's text.

    The hashes are those that `load_data` and `load_other` compare, `dedup` is the rule of the split, and `leak` is the share of
    the validation text that also stands in the training text, if it was measured.
    """
    meta = data.meta
    return {
        "data_hash": data.data_hash,
        "tokenizer": meta.tokenizer,
        "tokenizer_hash": meta.tokenizer_hash,
        "train_tokens": len(data.train),
        "dedup": meta.dedup,
        "leak": meta.leak.share if meta.leak else None,
    }


def load_other(config: RunConfig, run: Run, source: str) -> Dataset:
    """The tokens of another text, `source`, by the tokenizer of `run`; a table is read from the run's own token files.

    Raises what `load_data` does, and UsageError for tokens whose ids differ from those of the run.
    """
    own_kind, kind = (text.partition(":")[0] for text in (config.data.source, source))
    update = {"source": source, "tokenizer": NO_TOKENIZER if kind in ("bin", "synthetic") else _tokenizer_name(config, run)}
    data = load_data(config.model_copy(update={"data": config.data.model_copy(update=update)}))
    meta, env = data.meta, run.env()
    other_hash, own_hash, own_name = meta.tokenizer_hash, env.get("tokenizer_hash"), env.get("tokenizer")
    if other_hash and own_hash and other_hash != own_hash:
        raise UsageError(
            f"--data: {source} is in the ids of {meta.tokenizer} (hash {other_hash[:8]}), {run.name} knows those of "
            f"{own_name} (hash {own_hash[:8]}); prepare its text with the run's tokenizer."
        )
    if own_hash and not other_hash:
        raise UsageError(
            f"--data: {source} holds ids of no known tokenizer, {run.name} knows those of {own_name}; name the text itself, or "
            "token files that `questctl data prepare` wrote with the run's tokenizer."
        )
    if not own_hash and (other_hash or kind != own_kind):
        raise UsageError(
            f"--data: {source} is {'text' if other_hash else 'of another kind'}, {run.name} knows the ids of "
            f"{config.data.source}, which stand for no known text; name {own_kind}: of the same ids."
        )
    return data


def _tokenizer_name(config: RunConfig, run: Run) -> str:
    """The name under which the tokenizer of a run is loaded for another text."""
    if not config.data.source.startswith("bin") and not config.data.tokenizer.startswith("bpe"):
        return config.data.tokenizer
    data = load_data(config, run)
    return data.meta.tokenizer if data.meta.tokenizer in ("byte", NO_TOKENIZER) else f"hf:{data.folder}"


def run_tokenizer(config: RunConfig, run: Run) -> Tokenizer | None:
    """The tokenizer of a run, from its token files if it has a table there; None if the text of its ids is not known."""
    if config.data.source.startswith("synthetic"):
        return None
    if config.data.tokenizer == "byte" and not config.data.source.startswith("bin"):
        return load("byte")
    return tokenizer_of(load_data(config, run))
