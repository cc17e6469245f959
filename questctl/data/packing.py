"""Documents packed whole into sequences, for models that attend within a document only (`data.packing = documents`).

    documents → pieces of up to T + 1 tokens → sequences of T + 1, each piece in the one where the least room remains

The pieces are packed longest first: best-fit decreasing ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830). Only
documents longer than a sequence are cut, and every token is in the same piece as the token before it that predicts it. The rest
of a sequence is padding, which is no target. Text is one stream of tokens in which `end` follows each document. A packed
document begins with the `end` before it, from which its first token is predicted, as in windows of the stream.

The conversations of a chat file are always packed. They begin with their own first token, which is no target; of the other
tokens, those to be learned are targets.

A packed sequence is an array (3, T): the inputs, the targets (`IGNORED` if they do not count), and for each input the position
of the first token of its piece. The order in which training reads sequences is that of `sampler`, without a grid.

Legend: N tokens of a text, T of a sequence, n sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..errors import UsageError
from .sampler import Tokens, in_order
from .tokens import Dataset, tokenizer_of

IGNORED = -100  # as a target: it does not count, as for torch's cross_entropy
Rows = NDArray[np.int64]  # (n, 3, T)


@dataclass(frozen=True, eq=False)
class Packing:
    """Tokens (N,) as packed sequences. `counted` (N,) says which are targets; None: all."""

    tokens: Tokens
    counted: Tokens | None
    seq_len: int
    padding: int  # id that fills up a sequence
    starts: NDArray[np.int64]  # start of each piece, ordered by sequence
    lengths: NDArray[np.int64]
    first: NDArray[np.int64]  # index of the first piece of each sequence, and the number of pieces

    @property
    def sequences(self) -> int:
        """The sequences of an epoch."""
        return len(self.first) - 1

    @property
    def filled(self) -> float:
        """The share of the sequences that is not padding."""
        return float(self.lengths.sum()) / max(1, self.sequences * (self.seq_len + 1))

    def batch(self, *, seed: int, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Rows:
        """The sequences of one step, (batch_size / world_size, 3, T), int64; as `sampler.batch`."""
        read = in_order(self.sequences, seed, step, batch_size, rank, world_size)
        return self.rows(np.concatenate([index for index, _ in read]))

    def validation(self, max_tokens: int) -> Rows:
        """The sequences of an evaluation, evenly spaced: at most `max_tokens` with their padding, but one at least."""
        k = max(1, min(self.sequences, max_tokens // self.seq_len))
        return self.rows(np.arange(k) * self.sequences // k)

    def rows(self, index: NDArray[np.int64]) -> Rows:
        """The sequences with these indices (n,)."""
        shape = len(index), self.seq_len + 1
        ids, counts, begins = np.full(shape, self.padding), np.zeros(shape, bool), np.ones(shape, bool)
        for row, i in enumerate(index.tolist()):
            at = 0
            for piece in range(self.first[i], self.first[i + 1]):
                n = int(self.lengths[piece])
                target, source = slice(at, at + n), slice(self.starts[piece], self.starts[piece] + n)
                ids[row, target], begins[row, at + 1 : at + n] = self.tokens[source], False
                counts[row, target] = True if self.counted is None else self.counted[source]
                at += n
        targets = np.where(counts & ~begins, ids, IGNORED)
        first = np.maximum.accumulate(np.where(begins, np.arange(self.seq_len + 1), 0), axis=1)
        return np.stack([ids[:, :-1], targets[:, 1:], first[:, :-1]], axis=1)


def windows_of(data: Dataset, side: str, config: DataConfig) -> Tokens | Packing:
    """The tokens of a side, "train" or "val": a stream to be read in windows, or packed, as `data.packing` says.

    Raises UsageError for ids without a known tokenizer, since they do not show where documents end.
    """
    if not packs(data, config):
        tokens: Tokens = getattr(data, side)
        return tokens
    return _packed(data, side, config.seq_len)


def packs(data: Dataset, config: DataConfig) -> bool:
    """Whether a run reads its text in packed sequences."""
    return config.packing == "documents" or data.meta.train.marks is not None


@lru_cache(maxsize=4)
def _packed(data: Dataset, side: str, seq_len: int) -> Packing:
    tokens, tokenizer, marks = getattr(data, side), tokenizer_of(data), getattr(data, f"{side}_marks")
    if marks is not None:
        starts = np.flatnonzero(np.asarray(marks) & 2)
        stops = np.append(starts[1:], len(tokens)) - 1  # without the `end` after each
        padding = tokenizer.end if tokenizer else 0
        return pack(tokens, seq_len, np.stack([starts, stops], axis=1), np.asarray(marks) & np.uint8(1), padding)
    if tokenizer is None:
        raise UsageError(
            f"data.packing: documents: {data.meta.source} holds ids of no known tokenizer, which do not tell where documents "
            "end; choose stream."
        )
    return pack(tokens, seq_len, documents_of(tokens, tokenizer.end), padding=tokenizer.end)


def parts(rows: Any) -> Any:
    """Sequences, (n, T + 1) of a stream or (n, 3, T) packed → inputs and targets (n, T) and, if packed, first places (n, T)."""
    return (rows[:, :-1], rows[:, 1:]) if rows.ndim == 2 else (rows[:, 0], rows[:, 1], rows[:, 2])


def pack(tokens: Tokens, seq_len: int, bounds: NDArray[np.int64], counted: Tokens | None = None, padding: int = 0) -> Packing:
    """Pack documents, whose (start, stop) are `bounds` (k, 2). A document of one token has no target and is left out."""
    starts, n = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
    pieces = np.maximum(-(-(n - 1) // seq_len), 0)  # each piece has one token more than targets: the last of the piece before
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + number * seq_len
    lengths = np.minimum(np.repeat(n, pieces) - number * seq_len, seq_len + 1)
    owner = best_fit(lengths, seq_len + 1)
    order = np.argsort(owner, kind="stable")
    first = np.searchsorted(owner[order], np.arange(owner.max(initial=-1) + 2))
    return Packing(tokens, counted, seq_len, padding, starts[order], lengths[order], first)


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The index of the sequence of each piece (k,): longest first, each where the least room remains, else in a new one."""
    owner = np.zeros(len(lengths), np.int64)
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # remaining room → sequences with it, newest last
    some = 0  # bit r is set if room[r] is not empty
    n = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[i])
        if fitting := some >> size:
            left = size + (fitting & -fitting).bit_length() - 1
            number = room[left].pop()
            if not room[left]:
                some ^= 1 << left
        else:
            left, number, n = capacity, n, n + 1
        owner[i] = number
        room[left - size].append(number)
        some |= 1 << (left - size)
    return owner


def documents_of(tokens: Tokens, end: int) -> NDArray[np.int64]:
    """(start, stop) of each document of a stream (k, 2), each with the `end` before it."""
    ends = np.flatnonzero(np.asarray(tokens) == end)
    stops = np.append(ends + 1, len(tokens)) if len(ends) == 0 or ends[-1] + 1 < len(tokens) else ends + 1
    return np.stack([np.append(0, stops[:-1] - 1), stops], axis=1)
