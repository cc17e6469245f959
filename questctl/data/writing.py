"""Tokenize a corpus into two token files, as a stream that can be interrupted at any moment and resumed.

    documents → batches of ~1 MB: drop duplicates, choose sides (split.py) → ids by `encode` → append in order
              → where `data.dedup` is near: validation text without what stands in the training text

Until it is finished and renamed, the work folder holds

    train.bin  val.bin     the ids so far
    digests                8 bytes of each document that was kept, in order
    seen                   the set of these digests (dedup.py); rebuilt from `digests` on resuming
    passages               (near) the hashes of the passages of the training text
    texts  val.whole       (near) the validation text, a length before each part, and its ids; val.bin is made from them at last
    state.json             how much of each file counts, and the place in the corpus; written every few seconds, after the files
                           have reached the disk

To resume, the files are cut back to the sizes in state.json, and the corpus is read from the place there. Up to the cutting of
validation text, the result for a document depends on the document alone; the cutting is always repeated from its beginning. An
interrupted preparation therefore ends with the same bytes as an uninterrupted one. Memory holds a few batches, whatever the
size of the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .dedup import DocumentSet
from .encode import Encoder, Ids, encode
from .passages import Hashes
from .reading import Reading
from .split import BATCH_BYTES, Dedup, Parts, Split, Text, batches, without_known
from .tokenizers import Tokenizer, dtype_name, utf8_size

TRAIN, VAL = "train.bin", "val.bin"
STATE, DIGESTS, DIGEST_SET = "state.json", "digests", "seen"
PASSAGES, TEXTS, WHOLE = "passages", "texts", "val.whole"
LEAST_VAL_BYTES = 4096  # of validation text, or a quarter of it, must remain; else nothing is cut
CHECKPOINT_S = 5.0  # seconds of work that a kill may undo
DIGEST = np.dtype(">u8")  # big-endian, because `digest_of` takes the first 8 bytes of a BLAKE2b in this order
HASH = np.dtype("<u8")
_BLOCK_BYTES = 8 << 20  # of validation text whose passages are looked for at a time
_STREAM_BYTES = 8 << 20  # of hashes of the training text that are read at a time


@dataclass(frozen=True)
class PreparationProgress:
    """The progress of a preparation."""

    stage: str
    share: float | None  # of the whole preparation; None if the size of the corpus is unknown
    text_bytes: int  # so far
    tokens: int = 0  # so far


ProgressListener = Callable[[PreparationProgress], None]


@dataclass
class Side:
    """One side of the split while it is written or, without a `file`, while existing tokens are read."""

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

    def resume(self, tokens: int, n_bytes: int) -> None:
        """Cut the file back to `tokens` ids, because a kill may have left more, and hash them again."""
        assert self.file is not None
        size = tokens * np.dtype(self.dtype).itemsize
        self.file.truncate(size)
        self.file.seek(0)
        for at in range(0, size, 1 << 22):
            self.digest.update(self.file.read(min(1 << 22, size - at)))
        self.tokens, self.n_bytes = tokens, n_bytes


Sides = tuple[Side, Side]  # (training, validation), indexed by whether a text is held out


@dataclass
class Batch:
    """Consecutive documents without duplicates."""

    parts: Parts  # of each
    digests: list[int]  # of each document
    duplicates: int  # documents that were left out
    reading: dict[str, Any]  # the state of the reading after these documents
    ids: Future[list[Ids]]  # of each part of each document


@dataclass
class Writer:
    """Writes one preparation. `run()` may fail at any time; another `Writer` on the same folder resumes it."""

    folder: Path
    corpus: Text
    tokenizer: Tokenizer
    val_fraction: float
    dedup: Dedup = "exact"
    max_tokens: int | None = None
    skip_bad: bool = False
    report: ProgressListener = lambda progress: None
    check: Callable[[], None] = lambda: None  # raises if another process has taken the folder over

    documents: int = 0
    duplicates: int = 0
    cut_bytes: int = 0  # cut from validation text, because the training text has it, too

    def run(self) -> tuple[Sides, Reading]:
        """Write train.bin and val.bin to the disk; returns their sides, and the reading with what was skipped.

        Raises DataError and MissingDependency for the source, StorageError if a tokenizer process ends, and OSError.
        """
        dtype = dtype_name(self.tokenizer.vocab_size)
        with ExitStack() as stack:
            sides, logs = (TRAIN, VAL), [DIGESTS]
            if self.dedup == "near":
                sides, logs = (TRAIN, WHOLE), [DIGESTS, PASSAGES, TEXTS]
            self.files = {name: stack.enter_context(_open(self.folder / name)) for name in (*sides, *logs)}
            self.logs = {name: self.files[name] for name in logs}
            self.sides = Side(dtype, self.files[sides[0]]), Side(dtype, self.files[sides[1]])
            self.known_digests = DocumentSet(self.folder / DIGEST_SET)
            self.reading = self._resume()
            encoder = stack.enter_context(Encoder(self.tokenizer))
            last_saved = time.monotonic()
            pending: deque[Batch] = deque()
            full = False  # whether no further document fits into `max_tokens`
            try:
                for batch in self._batches(encoder):
                    pending.append(batch)
                    while pending and len(pending) > encoder.ahead and not full:
                        full = self._append(pending.popleft())
                    if full:
                        break
                    if time.monotonic() - last_saved >= CHECKPOINT_S:
                        self._save()
                        last_saved = time.monotonic()
            finally:  # if a line far into a corpus is broken, the text before it is kept
                while pending and not full:
                    full = self._append(pending.popleft())
                if not full and (self.folder / STATE).exists():
                    self._save()
            if self.dedup == "near":
                self._cut()
            for file in self.files.values():
                to_disk(file)
            return self.sides, Reading(**(self.written if full else self.reading.state()))

    def _resume(self) -> Reading:
        """Return to the stored state if there is one, else begin with empty files."""
        try:
            state = json.loads((self.folder / STATE).read_bytes())
            self.split = Split(self.val_fraction, state["rule"], self.dedup)
        except (OSError, ValueError, KeyError):  # no state, or that of another version
            self.split = Split.of(self.corpus, self.val_fraction, self.dedup, self.skip_bad)
            for file in self.files.values():
                file.truncate(0)
            self.written: dict[str, Any] = Reading().state()
            return Reading(skip_bad=self.skip_bad)
        for side, (tokens, n_bytes) in zip(self.sides, state["sides"], strict=True):
            side.resume(tokens, n_bytes)
        for name, file in self.logs.items():
            file.truncate(state["logs"][name])
            file.seek(0, os.SEEK_END)
        self.documents, self.duplicates, self.written = state["documents"], state["duplicates"], state["reading"]
        for digests in _stored(self.folder / DIGESTS, DIGEST):
            self.known_digests.add(digests)
        return Reading(**self.written | {"skip_bad": self.skip_bad})

    def _save(self) -> None:
        for file in self.files.values():
            to_disk(file)
        state = {
            "rule": self.split.rule,
            "sides": [(side.tokens, side.n_bytes) for side in self.sides],
            "logs": {name: file.tell() for name, file in self.logs.items()},
            "documents": self.documents,
            "duplicates": self.duplicates,
            "reading": self.written,
        }
        temporary = self.folder / (STATE + ".tmp")
        with temporary.open("wb") as f:
            f.write(json.dumps(state).encode())
            to_disk(f)
        temporary.replace(self.folder / STATE)

    def _batches(self, encoder: Encoder) -> Iterator[Batch]:
        for texts in batches(self.corpus.documents(self.reading), BATCH_BYTES):
            digests = np.fromiter(map(self.split.key, texts), np.uint64, len(texts))
            new = self.known_digests.add(digests)
            kept = [text for text, is_new in zip(texts, new.tolist(), strict=True) if is_new]
            parts = self.split.divide(kept)
            ids = encoder.submit([part for document in parts.documents for _, part in document])
            yield Batch(parts, digests[new].tolist(), len(texts) - len(kept), self.reading.state(), ids)

    def _append(self, batch: Batch) -> bool:
        """Write a batch; returns True if a document does not fit into `max_tokens`, at which the preparation ends."""
        ids, at, first = batch.ids.result(), 0, self.documents
        self.check()
        full = False
        for parts in batch.parts.documents:
            rows = ids[at : at + len(parts)]
            at += len(parts)
            if full := self.max_tokens is not None and self.tokens + sum(map(len, rows)) > self.max_tokens:
                break
            for (held_out, text), row in zip(parts, rows, strict=True):
                size = utf8_size(text)
                self.sides[held_out].add(row, size + 1)
                if held_out and TEXTS in self.logs:
                    self.logs[TEXTS].write(size.to_bytes(8, "little") + text.encode())
            self.documents += 1
        if PASSAGES in self.logs:
            self.logs[PASSAGES].write(batch.parts.passages[: batch.parts.bounds[self.documents - first]].astype(HASH).tobytes())
        self.written = batch.reading
        if not full:
            self.logs[DIGESTS].write(np.array(batch.digests, np.uint64).astype(DIGEST).tobytes())
            self.duplicates += batch.duplicates
            self._report_progress()
        return full

    def _cut(self) -> None:
        """Write val.bin: the validation text without passages of the training text or, if too little remains, with them."""
        for file in self.files.values():
            file.flush()
        whole = self.sides[1]
        with (self.folder / VAL).open("wb") as file:
            cut, text_bytes, left_bytes = Side(whole.dtype, file), 0, 0
            for texts in _blocks(self.folder / TEXTS):
                pieces = without_known(texts, self._training_passages())
                for piece, ids in zip(pieces, encode(self.tokenizer, [piece.decode() for piece in pieces]), strict=True):
                    cut.add(ids, len(piece) + 1)
                text_bytes += sum(map(len, texts))
                left_bytes += sum(map(len, pieces))
                done = min(1.0, text_bytes / whole.n_bytes)
                self.report(PreparationProgress("cutting copies from the validation text", done, text_bytes, cut.tokens))
            if left_bytes < min(LEAST_VAL_BYTES, text_bytes / 4):
                file.truncate(0)
                file.seek(0)
                cut, left_bytes = Side(whole.dtype, file), text_bytes
                for ids in _stored(self.folder / WHOLE, np.dtype(whole.dtype)):
                    cut.add(ids)
                cut.n_bytes = whole.n_bytes
            to_disk(file)
        self.sides, self.cut_bytes = (self.sides[0], cut), text_bytes - left_bytes

    def _training_passages(self) -> Iterator[Hashes]:
        for hashes in _stored(self.folder / PASSAGES, HASH):
            self.check()
            yield hashes

    @property
    def tokens(self) -> int:
        """The tokens of both sides so far."""
        return sum(side.tokens for side in self.sides)

    def _report_progress(self) -> None:
        size = self.corpus.size
        shares = [self.written["done"] / size] if size else []
        if self.max_tokens:
            shares.append(self.tokens / self.max_tokens)
        text = sum(side.n_bytes for side in self.sides)
        self.report(PreparationProgress("tokenizing", min(1.0, max(shares)) if shares else None, text, self.tokens))


def _stored(path: Path, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The numbers in a file, in parts of `_STREAM_BYTES`, as the machine holds them."""
    with path.open("rb") as file:
        while part := file.read(_STREAM_BYTES):
            yield np.frombuffer(part, dtype).astype(dtype.newbyteorder("="), copy=False)


def _blocks(path: Path) -> Iterator[list[bytes]]:
    """The stored validation texts, in lists of about `_BLOCK_BYTES`."""
    with path.open("rb") as file:
        texts = (file.read(int.from_bytes(head, "little")) for head in iter(lambda: file.read(8), b""))
        yield from batches(texts, _BLOCK_BYTES)


def _open(path: Path) -> BinaryIO:
    """Open a file to read its content and write behind it; create it if it does not exist."""
    path.touch()
    return path.open("r+b")


def to_disk(file: BinaryIO) -> None:
    """Force what was written to the disk, so that it survives a loss of power."""
    file.flush()
    os.fsync(file.fileno())


def tidy(folder: Path) -> None:
    """Remove the files that are needed only to resume."""
    for name in (DIGESTS, DIGEST_SET, PASSAGES, TEXTS, WHOLE, STATE):
        (folder / name).unlink(missing_ok=True)


def too_small(
    source: str, sides: Sides, val_fraction: float, reading: Reading | None = None, max_tokens: int | None = None
) -> DataError | None:
    """The error for a source of which one side is empty; None if both hold tokens."""
    train, val = sides
    if train.tokens and val.tokens:
        return None
    if max_tokens:
        empty = " and ".join(name for name, side in (("training", train), ("validation", val)) if not side.tokens)
        return DataError(
            f"--max-tokens: {max_tokens:,} tokens of {source} hold no whole document for {empty}; allow more of them, or hold "
            f"out another share than data.val_fraction {val_fraction:g}."
        )
    why = f" ({reading.bad:,} lines or files were skipped; the first: {reading.first_bad})" if reading and reading.bad else ""
    return DataError(
        f"data.source: {source} is too small: {train.tokens:,} tokens remain for training and {val.tokens:,} for "
        f"validation at data.val_fraction {val_fraction:g}{why}."
    )
