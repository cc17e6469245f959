"""Token files: text is tokenized and written once, and is memory-mapped whenever it is used.

    <cache>/<key>/  train.bin  val.bin   flat files of ids: uint8 up to 256 ids, uint16 up to 65,536, otherwise uint32
                    train.marks …        of chat files: a byte a token, 1 if it is learned, 2 if it begins a conversation
                    meta.json            what they hold (`Meta`)
                    tokenizer.json       if the tokenizer has a table, so that the folder can be used elsewhere

The key is a hash of the source, the tokenizer's hash, the rules of the split and a fingerprint of the source's files, so that a
changed source gets a new folder. `Dataset.data_hash` identifies the tokens themselves, wherever they come from.

Files are written into a hidden folder beside the final one (see `writing`), under a lease, and one rename completes them. If a
preparation is killed, the next one of the same key resumes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config import DataConfig
from ..errors import DataError, QuestError, StorageError, UsageError, unknown
from ..store.lease import Lease, LeaseHeld
from . import chat, corpora, leak, readers, split, tokenizers, writing
from .formats import Layout, check_width
from .leak import Leak
from .reading import Reading
from .split import Dedup
from .tokenizers import NO_TOKENIZER, TABLE, Tokenizer, dtype_name
from .writing import PreparationProgress, ProgressListener, Side, Sides, to_disk

META = "meta.json"
VERIFY_BYTES = 64 * 1024 * 1024  # token files up to this size are verified whenever they are opened, in about 50 ms
DEFAULT = DataConfig()

RULES = ("auto", "exact", "near")
MEASURED_TOKENS = 1 << 30  # most training tokens for which the leak is measured without a request: half a minute

UNFINISHED_DAYS = 7  # after so many days an interrupted preparation is removed by the next one in the same folder
POLL_S = 0.2  # between two checks whether another process has finished preparing

_CHUNK = 1 << 24  # tokens read at a time from existing files
Encoding = Tokenizer | chat.ChatTokenizer


class _Record(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Shard(_Record):
    """The tokens of one side of the split, a part of a file."""

    file: str = Field(description="relative to meta.json's folder, or absolute where the file is used in place")
    start: int = Field(0, ge=0, description="first token in the file")
    tokens: int = Field(ge=1)
    bytes_per_token: float | None = Field(gt=0, description="UTF-8 bytes of text per token; null: unknown, or no text")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the tokens' bytes")
    marks: str | None = Field(None, description="SHA-256 of the marks of a chat file's tokens; null: all tokens are learned")
    learned: int | None = Field(None, description="tokens that are learned, if not all are")


class Meta(_Record):
    """The content of `meta.json`, which describes a pair of token files."""

    format: Literal["questctl-tokens-1"] = "questctl-tokens-1"
    source: str
    tokenizer: str = Field(description="name of the tokenizer; 'none' for bin: and synthetic:")
    tokenizer_hash: str | None = None
    end_token: str | None = Field(None, description="spelling of the id after each document, where the tokenizer has a table")
    dtype: str = Field(pattern="^uint(8|16|32)$")
    vocab_size: int = Field(ge=1)
    val_fraction: float
    train: Shard
    val: Shard
    entropy: float | None = Field(None, ge=0, description="entropy rate of a synthetic source, nats/token")
    documents: int = Field(0, ge=0, description="distinct documents; 0 if the source does not consist of documents")
    dedup: Dedup = Field("exact", description="rule by which duplicates were left out and documents split")
    duplicates: int = Field(0, ge=0, description="documents left out because they equal another")
    cut_bytes: int = Field(0, ge=0, description="bytes of validation text left out because they stand in the training text")
    leak: Leak | None = Field(None, description="validation text that stands in the training text; null: not measured")
    skipped: tuple[str, ...] = Field((), description="files skipped because they are unreadable or not UTF-8")
    bad: int = Field(0, ge=0, description="broken lines and files skipped at the user's request")
    first_bad: str = Field("", description="the error of the first of them")
    max_tokens: int | None = Field(None, ge=1, description="limit of tokens that the user set; null: the whole source")
    key: str | None = Field(None, description="hash of source, tokenizer, split and limit; null: written by an older version")

    @property
    def data_hash(self) -> str:
        """The identity of the tokens, independent of names and paths: SHA-256 (hex) of dtype, vocabulary and both shards."""
        marks = "".join(f" {side.marks}" for side in (self.train, self.val) if side.marks)
        about = f"{self.dtype} {self.vocab_size} {self.train.sha256} {self.val.sha256}{marks}"
        return hashlib.sha256(about.encode()).hexdigest()

    @property
    def doubts(self) -> list[str]:
        """Warnings about these tokens, in whole sentences, to be read before a model is trained on them."""
        return [*_leak_doubt(self), *_vocabulary_doubt(self)]


def _leak_doubt(meta: Meta) -> Iterator[str]:
    if meta.leak is not None and meta.leak.share > leak.WARN_ABOVE:
        way_out = (
            "pystdlib:clean leaves such text out"
            if meta.source == "pystdlib"
            else "data.dedup=near leaves such text out"
            if meta.dedup == "exact" and meta.documents
            else "keep texts that repeat each other on one side"
        )
        yield (
            f"data.source: {100 * meta.leak.share:.3g} % of the validation text of {meta.source} also stands in its training "
            f"text (windows of {meta.leak.window} tokens), and a loss on it measures memory: {way_out}."
        )


def _vocabulary_doubt(meta: Meta) -> Iterator[str]:
    kind, _, asked = meta.tokenizer.partition(":")
    if kind.startswith("bpe") and meta.vocab_size < int(asked):
        yield (
            f"data.tokenizer: {meta.tokenizer} has {meta.vocab_size:,} ids: the training text of {meta.source} has no more "
            f"pairs to merge; {kind}:{meta.vocab_size} says the same, and a larger text allows more."
        )


FORMAT: str = Meta.model_fields["format"].default


@dataclass(frozen=True, eq=False)
class Dataset:
    """Memory-mapped, read-only tokens: `train` and `val`, each (n,). `folder` holds their meta.json.

    The tokens of chat files have marks beside them, uint8 (n,).
    """

    train: np.memmap
    val: np.memmap
    meta: Meta
    folder: Path
    train_marks: np.memmap | None = None
    val_marks: np.memmap | None = None

    @property
    def data_hash(self) -> str:
        """The identity of the tokens; see `Meta.data_hash`."""
        return self.meta.data_hash


def prepare(
    source: str,
    tokenizer: str = DEFAULT.tokenizer,
    *,
    val_fraction: float = DEFAULT.val_fraction,
    dedup: str = DEFAULT.dedup,
    max_tokens: int | None = None,
    out: Path | None = None,
    skip_bad: bool = False,
    cache_dir: Path | None = None,
    force: bool = False,
    progress: ProgressListener | None = None,
) -> Dataset:
    """Tokenize `source` into the cache, or into the folder `out`, and open the tokens.

    Tokens that exist already are only opened, unless `force` asks to make them anew. `cache_dir` holds one folder per key
    (default: `cache_root()`). At most `max_tokens` tokens are written, as whole documents of both sides together. With
    `skip_bad` broken lines and files are skipped and counted.

    `dedup` is the rule by which duplicates are kept out of the validation side (split.py): `exact`, `near`, or `auto`, which is
    `exact` for `pystdlib` and for text that an earlier version prepared by that rule, and `near` for all other text.

    The sources `bin:` and `synthetic:` are tokens already; for them `tokenizer` must be `none` or the default. The files of
    `bin:` stay where they are: only a meta.json is written for them, and none if they are in a folder that `prepare` wrote.

    Several processes may prepare the same source at the same time, and a preparation that was killed is resumed.

    Raises UsageError for a malformed source or tokenizer name and for an `out` that holds something else; DataError for a
    source or token file that is missing, empty, unreadable or damaged; StorageError if the folder cannot be written;
    Unreachable for `hf:` without a network; MissingDependency if a library that the source needs is not installed.
    """
    corpus = corpora.parse(source)
    if not 0 < val_fraction < 1:
        raise UsageError(f"data.val_fraction: must lie between 0 and 1, got {val_fraction!r}.")
    if dedup not in RULES:
        raise UsageError(unknown("data.dedup", dedup, RULES))
    if max_tokens is not None and (max_tokens < 1 or not isinstance(corpus, corpora.TextFiles | corpora.HubText)):
        raise UsageError(f"max_tokens: {source} is tokens already; only text can be cut to a number of tokens.")
    if folder := _complete(corpus):
        return open_dataset(folder, remedy=f"copy {folder} again, or prepare it again")
    request = _Request(corpus, source, tokenizer, val_fraction, max_tokens, skip_bad, cache_dir or cache_root())
    remedy = f"`{_command(source, tokenizer, val_fraction, dedup, max_tokens, out)}` makes it anew"
    if not force and (folder := request.existing(dedup, out)):
        return open_dataset(folder, remedy=remedy)
    preparation = request.preparation(_rules(corpus, dedup)[0], progress or (lambda _: None))
    folder = out.absolute() if out else preparation.folder(request.root)
    if out:
        _refuse_other(folder, preparation.key, force=force)
    _write_whole(folder, preparation, replace=force)
    return open_dataset(folder, remedy=remedy)


def prepared(
    source: str, tokenizer: str, *, val_fraction: float, dedup: str = DEFAULT.dedup, cache_dir: Path | None = None
) -> Meta | None:
    """The meta.json of tokens that are prepared already; None if `prepare` would have to write them first.

    Nothing is trained, fetched or verified. Raises UsageError and DataError as `prepare` does for malformed sources and
    tokenizer names and for missing files.
    """
    corpus = corpora.parse(source)
    folder = _complete(corpus)
    if folder is None:
        request = _Request(corpus, source, tokenizer, val_fraction, None, False, cache_dir or cache_root())
        folder = request.existing(dedup) if tokenizers.is_here(tokenizer) else None
    return _read_meta(folder, "prepare it again") if folder else None


def with_leak(dataset: Dataset) -> Dataset:
    """The dataset with its leak measured, which is stored in its meta.json if that can be written.

    The leak is measured when token files are prepared, except by earlier versions, for more than `MEASURED_TOKENS`, and for
    `synthetic:`, which has no text to leak.
    """
    meta = dataset.meta
    if meta.leak is not None or meta.entropy is not None or meta.train.marks:  # conversations share their system prompts
        return dataset
    meta = meta.model_copy(update={"leak": leak.measure(dataset.train, dataset.val, meta.val.bytes_per_token)})
    with contextlib.suppress(OSError):
        _write_meta(dataset.folder, meta, f".{META}.{os.getpid()}")
    return replace(dataset, meta=meta)


def _rules(corpus: corpora.Corpus, dedup: str) -> tuple[Dedup, ...]:
    """The rules that `dedup` stands for: the first for new tokens, the others for tokens that exist."""
    if dedup == "near" and isinstance(corpus, corpora.ChatFiles):
        raise UsageError(f"data.dedup: near cuts passages, which would cut the conversations of {corpus.source}; choose exact.")
    text = isinstance(corpus, corpora.TextFiles | corpora.HubText) and not isinstance(corpus, corpora.ChatFiles)
    if dedup == "exact" or not text:
        return ("exact",)
    if dedup == "near":
        return ("near",)
    return ("exact",) if corpus.source == "pystdlib" else ("near", "exact")  # losses on pystdlib are compared with older ones


@dataclass(frozen=True)
class _Request:
    """The arguments of `prepare`."""

    corpus: corpora.Corpus
    source: str
    tokenizer: str
    val_fraction: float
    max_tokens: int | None
    skip_bad: bool
    root: Path

    @cached_property
    def _fingerprint(self) -> str:
        return self.corpus.fingerprint()

    def existing(self, dedup: str, out: Path | None = None) -> Path | None:
        """The folder of finished tokens that match, in the cache or at `out`. No tokenizer is trained to find it."""
        for rule in _rules(self.corpus, dedup):
            with contextlib.suppress(_Untrained):
                preparation = self.preparation(rule, None)
                folder = out.absolute() if out else preparation.folder(self.root)
                if (folder / META).exists() and (out is None or corpora.read_json(folder / META).get("key") == preparation.key):
                    return folder
        return None

    def preparation(self, dedup: Dedup, report: ProgressListener | None) -> _Preparation:
        """Everything that determines what is written. Without `report` it raises _Untrained instead of training."""
        corpus, max_tokens = self.corpus, self.max_tokens
        if isinstance(corpus, corpora.HubText):
            max_tokens = max_tokens or corpus.max_tokens
        if isinstance(corpus, corpora.TokenFiles | corpora.Markov) and self.tokenizer not in (NO_TOKENIZER, DEFAULT.tokenizer):
            raise UsageError(
                f"data.tokenizer: {self.source} is tokens already; '{self.tokenizer}' cannot apply, choose {NO_TOKENIZER}."
            )
        rule: list[Any] = [self.val_fraction, split.EXPECTED_VAL_DOCUMENTS, readers.PART_BYTES]
        rule += split.NEAR if dedup == "near" else ()
        encoder: Encoding | None = None
        if isinstance(corpus, corpora.ChatFiles):
            corpus, encoder = self._chat(corpus)
        elif isinstance(corpus, corpora.TextFiles | corpora.HubText):
            with _cache_errors(self.root):
                training = self._training(corpus, dedup, [rule, self._fingerprint], report)
                encoder = tokenizers.load(self.tokenizer, training)
        identity: list[Any] = [FORMAT, corpus.source, encoder and encoder.hash, rule, self._fingerprint]
        identity += [max_tokens] if max_tokens else []
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        listener = report or (lambda _: None)
        return _Preparation(self.source, corpus, encoder, self.val_fraction, dedup, key, max_tokens, self.skip_bad, listener)

    def _chat(self, corpus: corpora.ChatFiles) -> tuple[corpora.ChatFiles, chat.ChatTokenizer]:
        """The corpus with the template of its tokenizer, and the tokenizer of its documents."""
        if self.tokenizer.startswith("bpe"):
            raise UsageError(
                f"data.tokenizer: {self.tokenizer} is trained on text, and {corpus.source} holds conversations; choose "
                "hf:FOLDER, or byte for prompts and completions as texts."
            )
        encoder = tokenizers.load(self.tokenizer)
        template = chat.template_of(*tokenizers.template_files(self.tokenizer))
        return replace(corpus, template=template, tokenizer=self.tokenizer), chat.ChatTokenizer(encoder, template)

    def _training(
        self, corpus: split.Text, dedup: Dedup, identity: list[Any], report: ProgressListener | None
    ) -> tokenizers.Training:
        """The training text of a `bpe:`: the training part of the corpus. Its key covers everything that determines that part.

        Without `report` its texts raise _Untrained.
        """
        parts = [corpus.source, tokenizers.CUTS, tokenizers.TRAINING_BYTES, *identity]

        def tell(done: int, total: int) -> None:
            if report:
                report(PreparationProgress("training the tokenizer", done / total, done))

        def texts() -> Iterator[str]:
            if report is None:
                raise _Untrained
            rule = split.Split.of(corpus, self.val_fraction, dedup, self.skip_bad)
            return split.training_texts(corpus, rule, self.skip_bad)

        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return tokenizers.Training(texts, key, self.root / "tokenizers", tell)


class _Untrained(Exception):
    """Raised instead of training a tokenizer."""


def _complete(corpus: corpora.Corpus) -> Path | None:
    """The folder of a `bin:` source if `prepare` wrote it; such a folder is complete in itself."""
    if isinstance(corpus, corpora.TokenFiles) and corpus.meta and corpora.read_json(corpus.meta).get("format") == FORMAT:
        return corpus.meta.parent
    return None


def _command(source: str, tokenizer: str, val_fraction: float, dedup: str, max_tokens: int | None, out: Path | None) -> str:
    options = [
        "" if tokenizer == DEFAULT.tokenizer else f" --tokenizer {tokenizer}",
        "" if val_fraction == DEFAULT.val_fraction else f" --val-fraction {val_fraction:g}",
        "" if dedup == DEFAULT.dedup else f" --dedup {dedup}",
        f" --max-tokens {max_tokens}" if max_tokens and "tokens=" not in source else "",
        f" --out {out}" if out else "",
    ]
    return f"questctl data prepare '{source}'{''.join(options)} --force"


def tokenizer_of(dataset: Dataset) -> Tokenizer | None:
    """The tokenizer of a dataset, from the dataset's own folder; None if the tokens come without one (`bin:`, `synthetic:`).

    Raises DataError if the folder's tokenizer.json is missing, damaged, or not the one that meta.json names.
    """
    meta = dataset.meta
    if meta.tokenizer == NO_TOKENIZER:
        return None
    if meta.tokenizer == "byte":
        return tokenizers.load("byte")
    path = dataset.folder / TABLE
    try:
        tokenizer = tokenizers.from_table(meta.tokenizer, path.read_bytes(), json.dumps({"eos_token": meta.end_token}).encode())
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}.") from e
    if tokenizer.hash != meta.tokenizer_hash:
        expected = str(meta.tokenizer_hash)[:12]
        raise DataError(f"{path} is not the tokenizer of these tokens: its hash is {tokenizer.hash[:12]}…, not {expected}….")
    return tokenizer


def cache_root() -> Path:
    """The folder of the token cache.

    It is `$QUESTCTL_CACHE/data`, else `$XDG_CACHE_HOME/questctl/data`, else `~/.cache/questctl/data`.
    """
    if base := os.environ.get("QUESTCTL_CACHE"):
        return Path(base) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "questctl" / "data"


def open_dataset(folder: Path, *, verify: bool | None = None, remedy: str = "prepare it again") -> Dataset:
    """Open a folder of token files.

    The sizes of the files are always checked. Their SHA-256 is checked if `verify` is true, and by default for files of up to
    `VERIFY_BYTES`. Raises DataError, which names the file, what was expected, and the `remedy`.
    """
    meta = _read_meta(folder, remedy)
    shards = (meta.train, meta.val)
    train, val = (_map(folder / shard.file, shard, np.dtype(meta.dtype), verify, remedy) for shard in shards)
    marks = (
        _map(folder / _marks(s.file), s.model_copy(update={"sha256": s.marks}), np.dtype(np.uint8), verify, remedy)
        if s.marks
        else None
        for s in shards
    )
    return Dataset(train, val, meta, folder, *marks)


def _read_meta(folder: Path, remedy: str) -> Meta:
    try:
        meta = Meta.model_validate_json((folder / META).read_bytes())
    except OSError as e:
        raise DataError(f"{folder / META} cannot be read ({e.strerror}); {remedy}.") from e
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{folder / META} is damaged ({place + ': ' if place else ''}{first['msg']}); {remedy}.") from e
    return meta


def require_windows(dataset: Dataset, seq_len: int) -> None:
    """Raise DataError unless both sides hold at least one window of `seq_len` + 1 tokens."""
    train, val = len(dataset.train), len(dataset.val)
    if min(train, val) <= seq_len:
        limit = f", since it was prepared with --max-tokens {dataset.meta.max_tokens:,}" if dataset.meta.max_tokens else ""
        raise too_few_tokens(dataset.meta.source, f"{train:,} training and {val:,} validation tokens{limit}", seq_len)


def too_few_tokens(source: str, available: str, seq_len: int) -> DataError:
    """The error for a source too small for windows of `seq_len`; `available` says how many tokens it has."""
    return DataError(
        f"data.source: {source} is too small: {available}, but data.seq_len {seq_len} needs at least {seq_len + 1:,} of each."
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def _map(path: Path, shard: Shard, dtype: np.dtype[Any], verify: bool | None, remedy: str) -> np.memmap:
    end = (shard.start + shard.tokens) * dtype.itemsize
    try:
        size = path.stat().st_size
        if size < end or (size > end and not Path(shard.file).is_absolute()):
            raise DataError(f"{path} is damaged: {size:,} bytes where {end:,} were expected; {remedy}.")
        tokens = np.memmap(path, dtype, mode="r", offset=shard.start * dtype.itemsize, shape=(shard.tokens,))
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror}); {remedy}.") from e
    if verify is None:
        verify = tokens.nbytes <= VERIFY_BYTES
    if verify and (digest := hashlib.sha256(tokens.data).hexdigest()) != shard.sha256:
        raise DataError(f"{path} is damaged: its SHA-256 is {digest[:12]}…, not {shard.sha256[:12]}… as {META} says; {remedy}.")
    return tokens


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Preparation:
    """Everything that determines what is written."""

    source: str
    corpus: corpora.Corpus
    tokenizer: Encoding | None
    val_fraction: float
    dedup: Dedup
    key: str
    max_tokens: int | None
    skip_bad: bool
    report: ProgressListener

    def folder(self, root: Path) -> Path:
        """The folder of the tokens in the cache."""
        kinds = [name.partition(":")[0] for name in (self.source, self.tokenizer.name if self.tokenizer else NO_TOKENIZER)]
        return root / "-".join([*kinds, self.key[:16]])


def _write_whole(folder: Path, preparation: _Preparation, *, replace: bool) -> None:
    """Build a hidden folder beside `folder` and rename it, so that other processes see either nothing or all of it.

    One process does this at a time. If it fails, the hidden folder stays if it holds a state from which another can resume.
    """
    partial = folder.with_name(f".{folder.name}.{preparation.key[:16]}.partial")
    with _cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        while True:
            try:
                lease = Lease(partial.with_suffix(".lease")).claim()
                break
            except LeaseHeld:
                time.sleep(POLL_S)
        try:
            if _holds_something(folder) and not replace:
                return
            if replace:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            if not (partial / META).exists():  # else the process before was killed right before the rename
                _build(partial, preparation, lease.check)
            writing.tidy(partial)
            lease.check()
            if replace:
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(old := partial.with_name(f"{partial.name}.{secrets.token_hex(4)}.old"))
                    shutil.rmtree(old)
            partial.rename(folder)
        finally:
            if not (partial / writing.STATE).exists():
                shutil.rmtree(partial, ignore_errors=True)
            lease.release()


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextlib.contextmanager
def _cache_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except QuestError:
        raise
    except OSError as e:
        why = e.strerror or e
        raise StorageError(f"{root}: the token cache cannot be written: {why}; set QUESTCTL_CACHE to another folder.") from e


def _refuse_other(folder: Path, key: str, *, force: bool) -> None:
    """Raise UsageError if `folder` holds anything but the tokens of this key, or, with `force`, anything but tokens."""
    if (folder / META).is_file():
        meta = corpora.read_json(folder / META)
        if meta.get("format") == FORMAT and (force or meta.get("key") == key):
            return
        raise UsageError(f"--out: {folder} holds other tokens, of {meta.get('source')}; name another folder, or give --force.")
    if folder.exists() and (not folder.is_dir() or _holds_something(folder)):
        raise UsageError(f"--out: {folder} holds something other than token files; name another folder.")
    if not force and (others := [p for p in folder.parent.glob(f".{folder.name}.*.partial") if key[:16] not in p.name]):
        raise UsageError(
            f"--out: {others[0]} is an unfinished preparation of other tokens for this folder; finish or remove it."
        )


_HIDDEN = re.compile(r"\..+\.([0-9a-f]{8}(\.old)?|partial|partial\.[0-9a-f]{8}\.old|lease(\..*)?)")


def _remove_stale(root: Path) -> None:
    """Remove what killed preparations left in `root`.

    A folder from which another process can resume is removed after `UNFINISHED_DAYS`, everything else after an hour.
    """
    now = time.time()
    for path in root.glob(".*"):
        if _HIDDEN.fullmatch(path.name):
            with contextlib.suppress(OSError):
                age = now - max(p.stat().st_mtime for p in (path, *(path.iterdir() if path.is_dir() else ())))
                if age > (UNFINISHED_DAYS * 86_400 if path.name.endswith(".partial") else 3600):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _build(folder: Path, preparation: _Preparation, check: Callable[[], None]) -> None:
    """Write the token files into `folder`, and then meta.json by a rename, which marks them as complete."""
    corpus = preparation.corpus
    more: dict[str, Any] = {"key": preparation.key, "val_fraction": preparation.val_fraction, "dedup": preparation.dedup}
    if isinstance(corpus, corpora.TextFiles | corpora.HubText):
        meta = _tokenize(folder, corpus, preparation, check, more)
    elif isinstance(corpus, corpora.TokenFiles):
        meta = _adopt(corpus, preparation.val_fraction, preparation.report, more)
    else:
        dtype = dtype_name(corpus.vocab_size)
        with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
            meta = _generate(corpus, (Side(dtype, train), Side(dtype, val)), preparation.val_fraction, more)
            for file in (train, val):
                to_disk(file)
    if meta.entropy is None and meta.train.tokens <= MEASURED_TOKENS and not meta.train.marks:
        train_ids, val_ids = (
            _map(folder / side.file, side, np.dtype(meta.dtype), False, "") for side in (meta.train, meta.val)
        )

        def tell(share: float) -> None:
            check()
            if train_ids.nbytes > VERIFY_BYTES:  # otherwise it takes a second or two
                read = round(share * train_ids.nbytes)
                preparation.report(PreparationProgress("looking for validation text in the training text", share, read))

        meta = meta.model_copy(update={"leak": leak.measure(train_ids, val_ids, meta.val.bytes_per_token, tell)})
    _write_meta(folder, meta)


def _write_meta(folder: Path, meta: Meta, temporary: str = f"{META}.tmp") -> None:
    path = folder / temporary
    with path.open("wb") as f:
        f.write(meta.model_dump_json(indent=1).encode())
        to_disk(f)
    path.replace(folder / META)


def _tokenize(
    folder: Path, corpus: split.Text, preparation: _Preparation, check: Callable[[], None], more: dict[str, Any]
) -> Meta:
    tokenizer = preparation.tokenizer
    assert tokenizer is not None
    plain = tokenizer.tokenizer if isinstance(tokenizer, chat.ChatTokenizer) else tokenizer
    if isinstance(plain, tokenizers.TableTokenizer):
        (folder / TABLE).write_bytes(plain.table)
        more["end_token"] = plain.end_token
    writer = writing.Writer(
        folder,
        corpus,
        tokenizer,
        preparation.val_fraction,
        preparation.dedup,
        preparation.max_tokens,
        preparation.skip_bad,
        preparation.report,
        check,
    )
    sides, reading = writer.run()
    if isinstance(tokenizer, chat.ChatTokenizer):
        sides, more["marks"] = _without_marks(folder, sides, plain.vocab_size)
    return _meta(
        corpus.source,
        plain.vocab_size,
        sides,
        reading,
        tokenizer=plain.name,
        tokenizer_hash=plain.hash,
        documents=writer.documents,
        duplicates=writer.duplicates,
        cut_bytes=writer.cut_bytes,
        max_tokens=preparation.max_tokens,
        **more,
    )


def _marks(name: str) -> str:
    """The file of the marks beside a file of tokens."""
    return str(Path(name).with_suffix(".marks"))


def _without_marks(folder: Path, sides: Sides, vocab_size: int) -> tuple[Sides, list[tuple[str, int]]]:
    """Divide files of ids with marks into files of each; returns the sides, and hash and number of learned tokens of each.

    After a kill in between, the preparation begins anew: the state for resuming is removed first.
    """
    (folder / writing.STATE).unlink(missing_ok=True)
    dtype, plain, about = dtype_name(vocab_size), [], []
    for side, name in zip(sides, (writing.TRAIN, writing.VAL), strict=True):
        (folder / name).rename(folder / f"{name}.marked")
        with (folder / name).open("wb") as ids_file, (folder / _marks(name)).open("wb") as marks_file:
            ids, marks, learned = Side(dtype, ids_file), Side("uint8", marks_file), 0
            for both in np.split(np.fromfile(folder / f"{name}.marked", side.dtype), range(_CHUNK, side.tokens, _CHUNK)):
                ids.add(both & chat.ID)
                marks.add(both >> 30)
                learned += int((both >> 30 == 1).sum())
            for file in (ids_file, marks_file):
                to_disk(file)
        (folder / f"{name}.marked").unlink()
        plain.append(ids)
        about.append((marks.digest.hexdigest(), learned))
    return (plain[0], plain[1]), about


def _generate(corpus: corpora.Markov, sides: Sides, val_fraction: float, more: dict[str, Any]) -> Meta:
    """Write a Markov chain, whose end is the validation side."""
    cut = corpus.tokens - round(val_fraction * corpus.tokens)
    for side, ids in zip(sides, np.split(corpus.chain(), [cut]), strict=True):
        side.add(ids)
    return _meta(corpus.source, corpus.vocab_size, sides, entropy=corpus.entropy(), **more)


def _adopt(corpus: corpora.TokenFiles, val_fraction: float, report: ProgressListener, more: dict[str, Any]) -> Meta:
    """Read existing files for their hashes and their largest id. Without a val.bin the end of train.bin is held out."""
    described, vocab, bytes_per_token = corpus.description()
    layout = corpus.layout(corpus.train)
    dtype = str(layout.dtype)
    train = _flat(corpus.train, layout)
    cut = len(train) if corpus.val else len(train) - round(val_fraction * len(train))
    val, start = train[cut:], layout.start + cut
    if corpus.val:
        of_val = corpus.layout(corpus.val)
        if of_val.dtype != dtype:
            raise DataError(f"data.source: {corpus.train} holds {dtype} and {corpus.val} holds {of_val.dtype}.")
        val, start = _flat(corpus.val, of_val), of_val.start
    guessed = described is None and layout == Layout(dtype)
    if guessed and vocab is None:
        _check_widths(corpus, dtype)
    val_name = str((corpus.val or corpus.train).resolve())
    sides = (
        Side(dtype, name=str(corpus.train.resolve()), start=layout.start, bytes_per_token=bytes_per_token),
        Side(dtype, name=val_name, start=start, bytes_per_token=bytes_per_token),
    )
    largest, done, total = 0, 0, cut + len(val)
    for side, ids in zip(sides, (train[:cut], val), strict=True):
        for at in range(0, len(ids), _CHUNK):
            chunk = ids[at : at + _CHUNK]
            side.add(chunk)
            largest = max(largest, int(chunk.max()))
            done += len(chunk)
            report(PreparationProgress("reading", done / total, done * chunk.itemsize, done))
        if vocab is not None and largest >= vocab:
            holds = f"{side.name} holds id {largest:,}, but its vocabulary has {vocab:,} ids"
            raise DataError(f"data.source: {holds}; is {dtype} the right dtype?")
    if guessed and vocab is not None:
        _check_widths(corpus, dtype)
    return _meta(corpus.source, vocab or largest + 1, sides, **more)


def _check_widths(corpus: corpora.TokenFiles, dtype: str) -> None:
    for path in filter(None, (corpus.train, corpus.val)):
        check_width(path, dtype)


def _flat(path: Path, layout: Layout) -> NDArray[np.unsignedinteger]:
    """The ids of a file, memory-mapped."""
    dtype = np.dtype(layout.dtype)
    try:
        n_bytes, size = path.stat().st_size, dtype.itemsize
        if n_bytes == 0 or (n_bytes % size and layout.tokens is None):
            raise DataError(f"data.source: {path} has {n_bytes:,} bytes, which is not a positive number of {dtype} ids.")
        shape = None if layout.tokens is None else (layout.tokens,)
        return np.memmap(path, dtype, mode="r", offset=layout.start * size, shape=shape)
    except OSError as e:
        raise DataError(f"data.source: {path} cannot be read: {e.strerror}.") from e


def _shard(side: Side) -> Shard:
    name = Path(side.file.name).name if side.file else side.name
    rate = side.n_bytes / side.tokens if side.n_bytes else side.bytes_per_token
    return Shard(file=name, start=side.start, tokens=side.tokens, bytes_per_token=rate, sha256=side.digest.hexdigest())


def _meta(
    source: str,
    vocab_size: int,
    sides: Sides,
    reading: Reading | None = None,
    *,
    val_fraction: float,
    tokenizer: str = NO_TOKENIZER,
    marks: Sequence[tuple[str, int]] = (),
    **more: Any,
) -> Meta:
    reading = reading or Reading()
    if error := writing.too_small(source, sides, val_fraction, reading, more.get("max_tokens")):
        raise error
    shards = [_shard(side) for side in sides]
    for i, (digest, learned) in enumerate(marks):
        shards[i] = shards[i].model_copy(update={"marks": digest, "learned": learned})
    return Meta(
        source=source,
        tokenizer=tokenizer,
        dtype=sides[0].dtype,
        vocab_size=vocab_size,
        val_fraction=val_fraction,
        train=shards[0],
        val=shards[1],
        skipped=tuple(reading.skipped),
        bad=reading.bad,
        first_bad=reading.first_bad,
        **more,
    )
