"""Tokenize a corpus into two token files, as a stream that can be interrupted at any moment and resumed.

    documents → batches of ~1 MB: drop duplicates by their digests, choose sides → ids by `encode` → append in order

Until it is finished and renamed, the work folder holds

    train.bin  val.bin     the ids so far
    digests                8 bytes of each document that was kept, in order
    seen                   the set of these digests (dedup.py); rebuilt from `digests` on resuming
    state.json             how much of each file counts, and the place in the corpus; written every few seconds, after the files
                           have reached the disk

To resume, the files are cut back to what state.json says, and the corpus is read from its place. What a document becomes
depends on the document alone, so an interrupted preparation ends with the same bytes as an uninterrupted one. Memory holds
a few batches, whatever the size of the corpus.

A document is validation text if the first 8 bytes of its BLAKE2b, as a fraction of 2⁶⁴, are below `val_fraction`. Equal
documents therefore fall on the same side (where one is kept), and adding documents moves no other. With fewer than
20 / val_fraction documents fewer than 20 would be expected on the validation side, and their choice would be a lottery; there
the end of each document is validation text instead.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .corpora import HubText, TextFiles
from .dedup import DocumentSet
from .encode import Encoder, Ids
from .reading import Reading
from .tokenizers import Tokenizer, dtype_name

STATE, DIGESTS, DIGEST_SET = "state.json", "digests", "seen"
EXPECTED_VAL_DOCUMENTS = 20
BATCH_BYTES = 1 << 20
CHECKPOINT_S = 5.0  # seconds of work that a kill may undo
DIGEST = np.dtype(">u8")  # big-endian, because `digest_of` takes the first 8 bytes of a BLAKE2b in this order

Text = TextFiles | HubText


@dataclass(frozen=True)
class PreparationProgress:
    """How far a preparation is."""

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


@dataclass(frozen=True)
class Split:
    """The rule that decides which documents, or which part of each document, are validation text."""

    fraction: float
    by_hash: bool  # whole documents by their digest; otherwise the end of each document

    @classmethod
    def of(cls, corpus: Text, fraction: float, skip_bad: bool) -> Split:
        """The rule for `corpus`: by hash if it has enough documents."""
        enough = math.ceil(EXPECTED_VAL_DOCUMENTS / fraction)
        return cls(fraction, sum(1 for _ in islice(corpus.documents(Reading(skip_bad=skip_bad)), enough)) == enough)

    def parts(self, text: str, digest: int) -> list[tuple[bool, str]]:
        """The parts of a document that are not empty, each as (whether it is held out, text)."""
        if self.by_hash:
            return [(digest < self.fraction * 2**64, text)]
        cut = len(text) - round(self.fraction * len(text))
        return [(held_out, part) for held_out, part in ((False, text[:cut]), (True, text[cut:])) if part]


def digest_of(text: str) -> int:
    """The first 8 bytes of the BLAKE2b of a document, as a big-endian number."""
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "big")


def training_texts(corpus: Text, fraction: float, skip_bad: bool) -> Iterator[str]:
    """The training part of the corpus, without duplicates: the text on which a tokenizer may be trained."""
    split, digests = Split.of(corpus, fraction, skip_bad), set()
    for text in corpus.documents(Reading(skip_bad=skip_bad)):
        if (digest := digest_of(text)) not in digests:
            digests.add(digest)
            yield from (part for held_out, part in split.parts(text, digest) if not held_out)


@dataclass
class Batch:
    """Consecutive documents without duplicates."""

    documents: list[list[tuple[bool, str]]]  # the parts of each; see `Split.parts`
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
    max_tokens: int | None = None
    skip_bad: bool = False
    report: ProgressListener = lambda progress: None
    check: Callable[[], None] = lambda: None  # raises if another process has taken the folder over

    documents: int = 0
    duplicates: int = 0

    def run(self) -> tuple[Sides, Reading]:
        """Write train.bin and val.bin to the disk; returns their sides, and the reading with what was skipped.

        Raises DataError and MissingDependency for the source, StorageError if a tokenizer process ends, and OSError.
        """
        dtype = dtype_name(self.tokenizer.vocab_size)
        with ExitStack() as stack:
            files = [stack.enter_context(_open(self.folder / name)) for name in ("train.bin", "val.bin", DIGESTS)]
            self.sides = Side(dtype, files[0]), Side(dtype, files[1])
            self.log, self.known_digests = files[2], DocumentSet(self.folder / DIGEST_SET)
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
            finally:  # if a line far into a corpus is broken, what was read before it is kept
                while pending and not full:
                    full = self._append(pending.popleft())
                if not full and (self.folder / STATE).exists():
                    self._save()
            for file in files:
                to_disk(file)
            return self.sides, Reading(**(self.written if full else self.reading.state()))

    def _resume(self) -> Reading:
        """Return to the stored state if there is one, else begin with empty files."""
        try:
            state = json.loads((self.folder / STATE).read_bytes())
        except (OSError, ValueError):
            self.split = Split.of(self.corpus, self.val_fraction, self.skip_bad)
            for file in (*(side.file for side in self.sides), self.log):
                assert file is not None
                file.truncate(0)
            self.written: dict[str, Any] = Reading().state()
            return Reading(skip_bad=self.skip_bad)
        self.split = Split(self.val_fraction, state["by_hash"])
        for side, (tokens, n_bytes) in zip(self.sides, state["sides"], strict=True):
            side.resume(tokens, n_bytes)
        self.documents, self.duplicates, self.written = state["documents"], state["duplicates"], state["reading"]
        self.log.truncate(self.documents * DIGEST.itemsize)
        self.log.seek(0)
        while part := self.log.read(1 << 20):
            self.known_digests.add(np.frombuffer(part, DIGEST).astype(np.uint64))
        return Reading(**self.written | {"skip_bad": self.skip_bad})

    def _save(self) -> None:
        for file in (*(side.file for side in self.sides), self.log):
            assert file is not None
            to_disk(file)
        state = {
            "by_hash": self.split.by_hash,
            "sides": [(side.tokens, side.n_bytes) for side in self.sides],
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
        documents = self.corpus.documents(self.reading)
        while True:
            texts, size = [], 0
            for text in documents:
                texts.append(text)
                size += len(text)
                if size >= BATCH_BYTES:
                    break
            if not texts:
                return
            digests = np.fromiter(map(digest_of, texts), np.uint64, len(texts))
            new = self.known_digests.add(digests).tolist()
            kept = [(text, int(digest)) for text, digest, is_new in zip(texts, digests, new, strict=True) if is_new]
            parts = [self.split.parts(text, digest) for text, digest in kept]
            ids = encoder.submit([part for document in parts for _, part in document])
            yield Batch(parts, [digest for _, digest in kept], len(texts) - len(kept), self.reading.state(), ids)

    def _append(self, batch: Batch) -> bool:
        """Write a batch; returns True if a document does not fit into `max_tokens`, at which the preparation ends."""
        ids, at = batch.ids.result(), 0
        self.check()
        for parts in batch.documents:
            rows = ids[at : at + len(parts)]
            at += len(parts)
            if self.max_tokens is not None and self.tokens + sum(map(len, rows)) > self.max_tokens:
                self.written = batch.reading
                return True
            for (held_out, text), row in zip(parts, rows, strict=True):
                self.sides[held_out].add(row, len(text.encode()) + 1)
            self.documents += 1
        self.log.write(np.array(batch.digests, np.uint64).astype(DIGEST).tobytes())
        self.duplicates += batch.duplicates
        self.written = batch.reading
        self._report_progress()
        return False

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
    for name in (DIGESTS, DIGEST_SET, STATE):
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
