"""Token files: text is tokenized once, written once, verified, and memory-mapped from then on.

    <cache>/<key>/  train.bin  val.bin   ids, flat: uint8 up to 256 ids, uint16 up to 65,536, else uint32
                    meta.json            what they are (`Meta`); the folder appears whole, by one rename

The key holds the source's word, the tokenizer's hash, the split and a fingerprint of the source's files: a changed source is
another key. `Dataset.data_hash` identifies the tokens themselves, wherever they came from.

The split: a document is validation text if the first 8 bytes of its BLAKE2b, as a fraction of 2⁶⁴, are below `val_fraction`.
So equal documents fall on one side (and are kept once), and new documents move no old one. With fewer than 20 / val_fraction
documents that would be a lottery (fewer than 20 expected validation documents): there the end of each document is held out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config import DataConfig
from ..errors import DataError, QuestError, StorageError, UsageError
from . import corpora
from .tokenizers import NONE, Tokenizer, load

META = "meta.json"
VERIFY_BYTES = 64 * 1024 * 1024  # token files up to this size are verified whenever they are opened: some 50 ms
EXPECTED_VAL_DOCUMENTS = 20
DEFAULT = DataConfig()

_CHUNK = 1 << 24  # tokens read at a time from existing files

Progress = Callable[[int, int], None]  # (bytes or tokens done, all)


class _Record(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Shard(_Record):
    """One side of the split."""

    file: str = Field(description="relative to meta.json's folder, or absolute where the file is used in place")
    start: int = Field(0, ge=0, description="first token in the file")
    tokens: int = Field(ge=1)
    bytes_per_token: float | None = Field(gt=0, description="UTF-8 bytes of text per token; null: unknown, or no text")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the tokens' bytes")


class Meta(_Record):
    """What `meta.json` says of a pair of token files."""

    format: Literal["questctl-tokens-1"] = "questctl-tokens-1"
    source: str
    tokenizer: str = Field(description="word of the tokenizer; 'none' for bin: and synthetic:")
    tokenizer_hash: str | None = None
    dtype: str = Field(pattern="^uint(8|16|32)$")
    vocab_size: int = Field(ge=1)
    val_fraction: float
    train: Shard
    val: Shard
    entropy: float | None = Field(None, ge=0, description="entropy rate of a synthetic source, nats/token")
    documents: int = Field(0, ge=0, description="documents kept; 0 where the source has none")
    duplicates: int = Field(0, ge=0, description="equal documents left out")
    skipped: tuple[str, ...] = Field((), description="files passed over as unreadable or not UTF-8")

    @property
    def data_hash(self) -> str:
        """SHA-256 hex of dtype, vocabulary and both shards: the identity of the tokens, independent of words and paths."""
        return hashlib.sha256(f"{self.dtype} {self.vocab_size} {self.train.sha256} {self.val.sha256}".encode()).hexdigest()


FORMAT: str = Meta.model_fields["format"].default


@dataclass(frozen=True, eq=False)
class Dataset:
    """Memory-mapped tokens: `train` and `val`, each (n,), read-only; `folder` holds their meta.json."""

    train: np.memmap
    val: np.memmap
    meta: Meta
    folder: Path

    @property
    def data_hash(self) -> str:
        """See `Meta.data_hash`."""
        return self.meta.data_hash


def prepare(
    source: str,
    tokenizer: str = DEFAULT.tokenizer,
    *,
    val_fraction: float = DEFAULT.val_fraction,
    cache_dir: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Tokenize `source` into the cache, unless it is there, and open it.

    `cache_dir` holds one folder per key (default: `cache_root()`); `force` makes the files anew. `bin:` is used where it lies:
    only its meta.json goes into the cache, or not even that if it lies in a folder that `prepare` wrote. It and `synthetic:`
    are tokens already: their tokenizer is `none`, or left as the default.
    Raises UsageError for a word that cannot be meant, DataError for a missing, empty, unreadable or damaged source or token
    file, StorageError if the cache cannot be written. Safe for processes that prepare the same source at the same time.
    """
    corpus = corpora.parse(source)
    if not 0 < val_fraction < 1:
        raise UsageError(f"data.val_fraction: must lie between 0 and 1, got {val_fraction!r}.")
    if isinstance(corpus, corpora.TokenFiles) and corpus.meta and corpora.read_json(corpus.meta).get("format") == FORMAT:
        return open_dataset(corpus.meta.parent, remedy=f"copy {corpus.meta.parent} again, or prepare it again")
    encoder = load(tokenizer) if isinstance(corpus, corpora.TextFiles) else None
    if encoder is None and tokenizer not in (NONE, DEFAULT.tokenizer):
        raise UsageError(f"data.tokenizer: {source} is tokens already; '{tokenizer}' cannot apply, choose {NONE}.")

    split_rule = [val_fraction, EXPECTED_VAL_DOCUMENTS, corpora.PART_BYTES]
    identity = [FORMAT, corpus.word, encoder and encoder.hash, split_rule, corpus.fingerprint()]
    digits = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    kinds = [word.partition(":")[0] for word in (source, encoder.word if encoder else NONE)]
    folder = (cache_dir or cache_root()) / "-".join([*kinds, digits])
    if force or not folder.is_dir():
        _write_whole(folder, lambda at: _build(at, corpus, encoder, val_fraction, progress), replace=force)
    named = "" if tokenizer == DEFAULT.tokenizer else f" --tokenizer {tokenizer}"
    held_out = "" if val_fraction == DEFAULT.val_fraction else f" --val-fraction {val_fraction:g}"
    return open_dataset(folder, remedy=f"`questctl data prepare '{source}'{named}{held_out} --force` makes it anew")


def cache_root() -> Path:
    """`$QUESTCTL_CACHE/data`, else `$XDG_CACHE_HOME/questctl/data`, else `~/.cache/questctl/data`."""
    if base := os.environ.get("QUESTCTL_CACHE"):
        return Path(base) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "questctl" / "data"


def open_dataset(folder: Path, *, verify: bool | None = None, remedy: str = "prepare it again") -> Dataset:
    """Open a folder of token files. Sizes are always checked, SHA-256 if `verify` (None: up to `VERIFY_BYTES`).

    Raises DataError naming the file, what was expected and, by `remedy`, how to make it anew.
    """
    try:
        meta = Meta.model_validate_json((folder / META).read_bytes())
    except OSError as e:
        raise DataError(f"{folder / META} cannot be read ({e.strerror}); {remedy}.") from e
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{folder / META} is damaged ({place + ': ' if place else ''}{first['msg']}); {remedy}.") from e
    train, val = (_map(folder / shard.file, shard, np.dtype(meta.dtype), verify, remedy) for shard in (meta.train, meta.val))
    return Dataset(train, val, meta, folder)


def require(dataset: Dataset, seq_len: int) -> None:
    """Raise DataError unless both sides hold at least one window of `seq_len` + 1 tokens."""
    train, val = len(dataset.train), len(dataset.val)
    if min(train, val) <= seq_len:
        raise DataError(
            f"data.source: {dataset.meta.source} is too small: {train:,} training and {val:,} validation tokens, "
            f"but data.seq_len {seq_len} needs at least {seq_len + 1:,} of each."
        )


# --- reading ----------------------------------------------------------------------------------------------------------


def _map(path: Path, shard: Shard, dtype: np.dtype[Any], verify: bool | None, remedy: str) -> np.memmap:
    end = (shard.start + shard.tokens) * dtype.itemsize
    try:
        found = path.stat().st_size
        if found < end or (found > end and not Path(shard.file).is_absolute()):
            raise DataError(f"{path} is damaged: {found:,} bytes where {end:,} were expected; {remedy}.")
        tokens = np.memmap(path, dtype, mode="r", offset=shard.start * dtype.itemsize, shape=(shard.tokens,))
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror}); {remedy}.") from e
    if verify is None:
        verify = tokens.nbytes <= VERIFY_BYTES
    if verify and (digest := hashlib.sha256(tokens.data).hexdigest()) != shard.sha256:
        raise DataError(f"{path} is damaged: its SHA-256 is {digest[:12]}…, not {shard.sha256[:12]}… as {META} says; {remedy}.")
    return tokens


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_whole(folder: Path, build: Callable[[Path], None], *, replace: bool) -> None:
    """Let `build` fill a folder beside `folder`, then rename it: others see nothing or all of it. The first of two wins."""
    ours = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        ours.mkdir(parents=True)
        build(ours)
        if replace:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old := ours.with_name(ours.name + ".old"))
                shutil.rmtree(old)
        try:
            ours.rename(folder)
        except OSError:
            if not (folder / META).exists():
                raise
    except QuestError:
        raise
    except OSError as e:
        why = e.strerror or e
        raise StorageError(f"{folder.parent}: the token cache cannot be written: {why}; QUESTCTL_CACHE names another.") from e
    finally:
        shutil.rmtree(ours, ignore_errors=True)


def _build(
    folder: Path, corpus: corpora.Corpus, tokenizer: Tokenizer | None, val_fraction: float, progress: Progress | None
) -> None:
    """Write the token files, then meta.json, into `folder`."""
    if isinstance(corpus, corpora.TokenFiles):
        meta = _adopt(corpus, val_fraction, progress)
    else:
        with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
            if isinstance(corpus, corpora.TextFiles):
                assert tokenizer is not None
                dtype = dtype_name(tokenizer.vocab_size)
                meta = _tokenize(corpus, tokenizer, (_Side(dtype, train), _Side(dtype, val)), val_fraction, progress)
            else:
                dtype = dtype_name(corpus.vocab_size)
                meta = _generate(corpus, (_Side(dtype, train), _Side(dtype, val)), val_fraction)
            for file in (train, val):
                _to_disk(file)
    with (folder / META).open("wb") as f:
        f.write(meta.model_dump_json(indent=1).encode())
        _to_disk(f)


def _tokenize(
    corpus: corpora.TextFiles, tokenizer: Tokenizer, sides: Sides, val_fraction: float, progress: Progress | None
) -> Meta:
    end, total, done = np.array([tokenizer.end]), corpus.size, 0
    skipped: list[str] = []
    documents: Counter[str] = Counter()
    for held_out, text in _split(corpus, val_fraction, skipped, documents):
        n_bytes = len(text.encode()) + 1
        sides[held_out].add(np.concatenate((tokenizer.encode(text), end)), n_bytes)
        done += n_bytes
        if progress:
            progress(min(done, total), total)
    return _meta(
        corpus.word, tokenizer.vocab_size, sides, val_fraction, tokenizer=tokenizer.word, tokenizer_hash=tokenizer.hash,
        documents=documents["kept"], duplicates=documents["duplicate"], skipped=tuple(skipped),
    )  # fmt: skip


def _split(
    corpus: corpora.TextFiles, val_fraction: float, skipped: list[str], documents: Counter[str]
) -> Iterator[tuple[bool, str]]:
    """(held out?, text) of each document or, where documents are few, of its beginning and its end."""
    enough = math.ceil(EXPECTED_VAL_DOCUMENTS / val_fraction)
    by_hash = sum(1 for _ in islice(corpus.documents([]), enough)) == enough
    seen = set()
    for text in corpus.documents(skipped):
        digest = hashlib.blake2b(text.encode()).digest()[:8]
        documents["duplicate" if digest in seen else "kept"] += 1
        if digest in seen:
            continue
        seen.add(digest)
        if by_hash:
            yield int.from_bytes(digest, "big") < val_fraction * 2**64, text
        else:
            cut = len(text) - round(val_fraction * len(text))
            yield from ((held_out, part) for held_out, part in ((False, text[:cut]), (True, text[cut:])) if part)


def _generate(corpus: corpora.Markov, sides: Sides, val_fraction: float) -> Meta:
    """The chain's end is held out."""
    cut = corpus.tokens - round(val_fraction * corpus.tokens)
    for side, ids in zip(sides, np.split(corpus.chain(), [cut]), strict=True):
        side.add(ids)
    return _meta(corpus.word, corpus.vocab_size, sides, val_fraction, entropy=corpus.entropy())


def _adopt(corpus: corpora.TokenFiles, val_fraction: float, progress: Progress | None) -> Meta:
    """Read existing files once, for their hashes and their largest id. Without a val.bin the end of the file is held out."""
    dtype, vocab, bytes_per_token = corpus.description()
    train = _flat(corpus.train, dtype)
    cut = len(train) if corpus.val else len(train) - round(val_fraction * len(train))
    val, start = (_flat(corpus.val, dtype), 0) if corpus.val else (train[cut:], cut)
    val_name = str((corpus.val or corpus.train).resolve())
    sides = (
        _Side(dtype, name=str(corpus.train.resolve()), bytes_per_token=bytes_per_token),
        _Side(dtype, name=val_name, start=start, bytes_per_token=bytes_per_token),
    )
    largest, done, total = 0, 0, cut + len(val)
    for side, ids in zip(sides, (train[:cut], val), strict=True):
        for at in range(0, len(ids), _CHUNK):
            chunk = ids[at : at + _CHUNK]
            side.add(chunk)
            largest = max(largest, int(chunk.max()))
            done += len(chunk)
            if progress:
                progress(done, total)
        if vocab is not None and largest >= vocab:
            raise DataError(f"data.source: {side.name} holds id {largest:,}, its vocabulary only {vocab:,} ids; is it {dtype}?")
    return _meta(corpus.word, vocab or largest + 1, sides, val_fraction)


def _flat(path: Path, dtype: str) -> NDArray[np.unsignedinteger]:
    try:
        n_bytes, size = path.stat().st_size, np.dtype(dtype).itemsize
        if n_bytes == 0 or n_bytes % size:
            raise DataError(f"data.source: {path} has {n_bytes:,} bytes, which is no positive number of {dtype} ids.")
        return np.memmap(path, dtype, mode="r")
    except OSError as e:
        raise DataError(f"data.source: {path} cannot be read: {e.strerror}.") from e


def dtype_name(vocab_size: int) -> str:
    """The smallest of uint8, uint16 and uint32 that holds the ids below `vocab_size`."""
    return next(name for name in corpora.DTYPES if vocab_size <= 2 ** (8 * np.dtype(name).itemsize))


@dataclass
class _Side:
    """One side of the split while it is written (or, without a file, only read)."""

    dtype: str
    file: BinaryIO | None = None
    name: str = ""
    start: int = 0
    bytes_per_token: float | None = None
    tokens: int = 0
    n_bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, ids: NDArray[np.integer], n_bytes: int = 0) -> None:
        """Append ids (n,) that stand for `n_bytes` bytes of text."""
        data = np.ascontiguousarray(ids, self.dtype).data
        self.digest.update(data)
        self.tokens += len(ids)
        self.n_bytes += n_bytes
        if self.file:
            self.file.write(data)

    def shard(self) -> Shard:
        """What meta.json says of it."""
        name = Path(self.file.name).name if self.file else self.name
        rate = self.n_bytes / self.tokens if self.n_bytes else self.bytes_per_token
        return Shard(file=name, start=self.start, tokens=self.tokens, bytes_per_token=rate, sha256=self.digest.hexdigest())


Sides = tuple[_Side, _Side]  # training, validation: indexed by "held out?"


def _meta(source: str, vocab_size: int, sides: Sides, val_fraction: float, *, tokenizer: str = NONE, **more: Any) -> Meta:
    train, val = sides
    if not (train.tokens and val.tokens):
        raise DataError(
            f"data.source: {source} is too small: {train.tokens:,} tokens remain for training and {val.tokens:,} for "
            f"validation at data.val_fraction {val_fraction:g}."
        )
    return Meta(
        source=source, tokenizer=tokenizer, dtype=train.dtype, vocab_size=vocab_size, val_fraction=val_fraction,
        train=train.shard(), val=val.shard(), **more,
    )  # fmt: skip


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
