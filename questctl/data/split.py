"""The split: choose validation documents, leave out duplicates, and cut copied passages from the validation text.

`data.dedup` names one of two rules:

    exact   equal documents are kept once
    near    documents that are equal but for case and white space are kept once; documents that share most of their passages
            are on the same side; passages of the validation text that also stand in the training text are cut

With `exact` a document is validation text if the first 8 bytes of its BLAKE2b, as a fraction of 2⁶⁴, are below `val_fraction`.
With `near` the least hash of its half passages decides, mixed once more. Documents with the half passages A and B have the same
least hash with probability |A ∩ B| / |A ∪ B| (Broder, "On the resemblance and containment of documents", 1997), so that
versions of one text mostly stay together. Either way the side of a document depends on the document alone, so adding documents
moves no other.

With fewer than 20 / val_fraction documents, fewer than 20 would be expected on the validation side, too few for a fair choice.
Then the end of each document is validation text instead. If the documents share so much text that, of the first 20 /
val_fraction, the least hashes hold out less than a quarter or more than four times of these 20, the documents' own hashes
decide.

A passage is cut if it is longer than `CUT_BYTES`; the pieces around it become documents of their own. If almost nothing would
remain, nothing is cut, and the measured leak (leak.py) shows it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .corpora import ChatFiles, HubText, TextFiles
from .passages import Hashes, Passages, Search, mixed
from .reading import Reading

Text = TextFiles | HubText
Dedup = Literal["exact", "near"]
Rule = Literal["digest", "passages", "ends"]
Document = list[tuple[bool, str]]  # its non-empty parts, each as (whether it is held out, text)
T = TypeVar("T", str, bytes)
Item = TypeVar("Item")

EXPECTED_VAL_DOCUMENTS = 20
PASSAGE = 48  # letters: about ten words of English
STEP = 12  # letters; the first passage in each STEP letters of the training text is looked for
CUT_BYTES = 80  # shorter finds stay, as idioms; at least so many bytes are found of a copy of 128
GAP_BYTES = 32  # between two passages, and between a passage and the end of its line
BATCH_BYTES = 1 << 20
WHITE_SPACE = b" \t\n\r\v\f"
SLICE_BYTES = 1 << 18  # of text whose passages are computed at a time: they stay in the processor's cache
OVERLAP = 1 << 11  # overlap of two slices of a long text
NEAR = ("near", PASSAGE, STEP, CUT_BYTES, GAP_BYTES, SLICE_BYTES, OVERLAP)  # all that determines the result of `near`
_NO_PASSAGE = np.uint64(2**64 - 1)


def digest_of(text: str) -> int:
    """The first 8 bytes of the BLAKE2b of a document, as a big-endian number."""
    return _number(piece.encode() for _, piece in sliced(text, BATCH_BYTES))


def plain_digest_of(text: str) -> int:
    """`digest_of` a document in lower case and without ASCII white space."""
    return _number(piece.casefold().encode().translate(None, WHITE_SPACE) for _, piece in sliced(text, BATCH_BYTES))


def _number(pieces: Iterable[bytes]) -> int:
    digest = hashlib.blake2b()
    for piece in pieces:
        digest.update(piece)
    return int.from_bytes(digest.digest()[:8], "big")


@dataclass(frozen=True)
class Parts:
    """The parts of some documents after the split.

    `passages` are hashes of the passages of their training parts; those of the k-th document lie between `bounds[k]` and
    `bounds[k + 1]`.
    """

    documents: list[Document]
    passages: Hashes
    bounds: NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The rule that decides which documents, or which part of each document, are validation text."""

    fraction: float
    rule: Rule
    dedup: Dedup = "exact"

    @classmethod
    def of(cls, corpus: Text, fraction: float, dedup: Dedup, skip_bad: bool) -> Split:
        """The rule for `corpus`, chosen by its first documents."""
        if isinstance(corpus, ChatFiles):
            return cls(fraction, "digest", dedup)  # a conversation has no end that could be held out
        enough = math.ceil(EXPECTED_VAL_DOCUMENTS / fraction)
        by_passages = cls(fraction, "passages", dedup)
        documents = held_out = 0
        for texts in batches(islice(corpus.documents(Reading(skip_bad=skip_bad)), enough)):
            documents += len(texts)
            if dedup == "near":
                held_out += sum(parts[0][0] for parts in by_passages.divide(texts).documents)
        if documents < enough:
            return cls(fraction, "ends", dedup)
        sound = EXPECTED_VAL_DOCUMENTS / 4 <= held_out <= EXPECTED_VAL_DOCUMENTS * 4
        return by_passages if dedup == "near" and sound else cls(fraction, "digest", dedup)

    def key(self, text: str) -> int:
        """The key of a document; of documents with equal keys only the first is kept."""
        return digest_of(text) if self.dedup == "exact" else plain_digest_of(text)

    def divide(self, texts: Sequence[str]) -> Parts:
        """The parts of documents that are not empty."""
        hashes, owner = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        if self.rule == "ends":
            documents = [self._ends(text) for text in texts]
            if self.dedup == "near":
                _, hashes, owner = _passages(["".join(part for held_out, part in parts if not held_out) for parts in documents])
        else:
            bound = np.uint64(min(round(self.fraction * 2**64), 2**64 - 1))
            sides = np.fromiter(map(digest_of, texts), np.uint64, len(texts)) < bound
            if self.dedup == "near":
                least, hashes, owner = _passages(texts)
                if self.rule == "passages":
                    sides = np.where(least < _NO_PASSAGE, mixed(least) < bound, sides)
                hashes, owner = hashes[~sides[owner]], owner[~sides[owner]]
            documents = [[(side, text)] for side, text in zip(sides.tolist(), texts, strict=True)]
        return Parts(documents, hashes, np.searchsorted(owner, np.arange(len(texts) + 1)))

    def _ends(self, text: str) -> Document:
        cut = len(text) - round(self.fraction * len(text))
        return [(held_out, part) for held_out, part in ((False, text[:cut]), (True, text[cut:])) if part]


def _passages(texts: Sequence[str]) -> tuple[Hashes, Hashes, NDArray[np.int64]]:
    """For texts: (the least half hash of each, or `_NO_PASSAGE`; hashes of a passage in each `STEP` letters; their texts)."""
    least = np.full(len(texts), _NO_PASSAGE)
    hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for passages, owner, _ in _by_batch(texts):
        np.minimum.at(least, owner, passages.halves)
        keep = passages.thinned(STEP)
        hashes.append(passages.hashes[keep])
        owners.append(owner[keep])
    return least, np.concatenate(hashes), np.concatenate(owners)


def _by_batch(texts: Sequence[T]) -> Iterator[tuple[Passages, NDArray[np.int64], NDArray[np.int64]]]:
    """(passages, the index of the text of each, the offset of their positions in that text), a slice at a time."""
    pieces = ((number, at, piece) for number, text in enumerate(texts) for at, piece in sliced(text, SLICE_BYTES, OVERLAP))
    for batch in batches(pieces, SLICE_BYTES, lambda piece: len(piece[2])):
        passages = Passages.of([p if isinstance(p, bytes) else p.encode() for _, _, p in batch], PASSAGE)
        numbers, places = (np.array([piece[i] for piece in batch], np.int64)[passages.owner] for i in (0, 1))
        yield passages, numbers, places


def without_known(texts: Sequence[bytes], known: Iterable[Hashes]) -> list[bytes]:
    """The pieces of texts in UTF-8 that remain without the passages whose hashes are among `known`, a stream."""
    batches = [
        (passages.hashes, np.stack([passages.starts, passages.ends], axis=1) + at[:, None], owner)
        for passages, owner, at in _by_batch(texts)
    ]
    hashes, places, owner = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    search = Search(hashes)
    for stream in known:
        search.look(stream)
    repeated = search.found(hashes)
    places, owner = places[repeated], owner[repeated]
    bounds = np.searchsorted(owner, np.arange(len(texts) + 1))
    return [piece for k, text in enumerate(texts) for piece in without(text, places[bounds[k] : bounds[k + 1]])]


def sliced(text: T, size: int, overlap: int = 0) -> Iterator[tuple[int, T]]:
    """A text in slices of `size` characters or bytes plus `overlap` of the next slice, each with its position in the text."""
    if len(text) <= size:
        yield 0, text
    else:
        yield from ((at, text[at : at + size + overlap]) for at in range(0, len(text), size))


def batches(items: Iterable[Item], size: int = BATCH_BYTES, size_of: Callable[[Any], int] = len) -> Iterator[list[Item]]:
    """Consecutive items in lists; each list ends with the item by which its size reaches `size`."""
    batch, n = list[Item](), 0
    for item in items:
        batch.append(item)
        n += size_of(item)
        if n >= size:
            yield batch
            batch, n = [], 0
    if batch:
        yield batch


def training_texts(corpus: Text, split: Split, skip_bad: bool) -> Iterator[str]:
    """The training part of the corpus, without duplicates: the text on which a tokenizer may be trained."""
    known: set[int] = set()
    for texts in batches(corpus.documents(Reading(skip_bad=skip_bad))):
        new = []
        for text in texts:
            if (key := split.key(text)) not in known:
                known.add(key)
                new.append(text)
        yield from (part for parts in split.divide(new).documents for held_out, part in parts if not held_out)


def without(text: bytes, passages: NDArray[np.int64]) -> list[bytes]:
    """The rest of a text in UTF-8 without `passages`, byte ranges (n, 2) sorted by their starts.

    Passages at most `GAP_BYTES` apart are joined. A cut is extended to the ends of its lines if these are as near. If nothing
    is cut, the text is returned; from a text that was cut, pieces of up to `CUT_BYTES` are dropped.
    """
    pieces, at = [], 0
    for start, end in _joined(passages):
        if end - start > CUT_BYTES:
            line, newline = text.rfind(b"\n", max(at, start - GAP_BYTES), start), text.find(b"\n", end, end + GAP_BYTES)
            pieces.append(text[at : start if line < 0 else line + 1])
            at = _next_character(text, end) if newline < 0 else newline + 1
    return [piece for piece in (*pieces, text[at:]) if len(piece.strip()) > CUT_BYTES] if pieces else [text]


def _joined(passages: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(start, end) of passages (n, 2) after those that overlap or nearly touch were joined."""
    if len(passages):
        starts, ends = passages[:, 0], np.maximum.accumulate(passages[:, 1])
        last = np.append(np.flatnonzero(starts[1:] > ends[:-1] + GAP_BYTES), len(passages) - 1)
        yield from zip(starts[np.append(0, last[:-1] + 1)].tolist(), ends[last].tolist(), strict=True)


def _next_character(text: bytes, at: int) -> int:
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return at
