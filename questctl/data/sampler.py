"""The data order: which tokens a training step reads. It is a pure function of (seed, step, rank), so resuming needs no state.

With W windows per epoch and B sequences per step, global sequence g = step·B + row is number i = g mod W of epoch e = g div W.
It reads window π_e(i), where π_e is a keyed bijection of [0, W). Every window is therefore read once per epoch, without a table
and with any g in constant time. Windows lie on a grid of `seq_len` whose offset is drawn anew for each epoch, so that documents
are not cut at the same places every time.

π is a Feistel network on Z_a × Z_b with a = ⌈√W⌉ and b = ⌈W/a⌉, whose rounds add modulo a or b. An image outside [0, W) is
mapped again until it lies inside (generalised Feistel cipher and cycle walking: Black & Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002). Because ab − W < a, only about one image in √W needs this. The round function is a shortened mixer of
splitmix64 (Steele et al., OOPSLA 2014). The resulting order is well mixed, but not cryptographically strong.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Tokens = NDArray[np.unsignedinteger]  # (n,) token ids, uint8, uint16 or uint32; usually memory-mapped

_ROUNDS = 6  # must be even; after four rounds pairs of neighbours are still far from uniform (chi-square, W = 30 and 60)
_GOLDEN, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # splitmix64
_SHIFT, _KEEP = np.uint64(29), np.uint64(33)  # keeps 31 bits: a half below 2³¹ can be added without overflow, for W below 2⁴⁰


def windows_per_epoch(n_tokens: int, seq_len: int) -> int:
    """The windows W of one epoch: as many as fit at every offset of the grid, but 1 if only one fits, and 0 if none does."""
    return max(n_tokens // seq_len - 1, int(n_tokens > seq_len))


def batch(
    tokens: Tokens, *, seed: int, step: int, batch_size: int, seq_len: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """The sequences of one optimizer step: tokens (n,) → (batch_size / world_size, seq_len + 1), int64.

    The inputs are `[:, :-1]` and the targets `[:, 1:]`. Row r of rank k is row k·batch_size/world_size + r of the global batch,
    so the ranks together read the same batch for every world size. Raises UsageError if `world_size` does not divide
    `batch_size`.
    """
    windows = windows_per_epoch(len(tokens), seq_len)
    assert windows > 0, "a corpus shorter than one window is refused by tokens.require_windows"
    starts = [
        index * seq_len + draw % min(seq_len, len(tokens) - windows * seq_len)
        for index, draw in in_order(windows, seed, step, batch_size, rank, world_size)
    ]
    return _gather(tokens, np.concatenate(starts), seq_len + 1)


def in_order(
    windows: int, seed: int, step: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """For each epoch in a step: the indices of the windows that the step reads, (n,), and a random number of the epoch.

    Raises UsageError if `world_size` does not divide `batch_size`.
    """
    if batch_size % world_size:
        raise UsageError(f"train.batch_size: {batch_size} sequences cannot be shared equally by {world_size} processes.")
    rows = batch_size // world_size
    first = step * batch_size + rank * rows
    for epoch in range(first // windows, (first + rows - 1) // windows + 1):  # several if an epoch ends within this batch
        low, high = max(first, epoch * windows), min(first + rows, (epoch + 1) * windows)
        index = np.arange(low - epoch * windows, high - epoch * windows, dtype=np.uint64)
        *keys, draw = _keys(seed, epoch)
        yield permute(index, windows, keys).astype(np.int64), int(draw)


def validation_windows(tokens: Tokens, seq_len: int, max_tokens: int) -> NDArray[np.int64]:
    """The windows of an evaluation, evenly spaced over `tokens` (n,): (k, seq_len + 1), int64.

    They share no target and are the same for every seed, step and rank. k·seq_len ≤ `max_tokens`, but there is at least one.
    """
    fit, k = (len(tokens) - 1) // seq_len, evaluated_tokens(len(tokens), seq_len, max_tokens) // seq_len
    return _gather(tokens, np.arange(k) * fit // k * seq_len, seq_len + 1)


def evaluated_tokens(n_tokens: int, seq_len: int, max_tokens: int) -> int:
    """The number of targets of `validation_windows`, at most `max_tokens`; less if the text has fewer."""
    return max(1, min((n_tokens - 1) // seq_len, max_tokens // seq_len)) * seq_len


def permute(index: NDArray[np.uint64], n: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    """The image of each `index` (any shape, uint64, below n) under the bijection of [0, n) that `keys` determine."""
    out = _feistel(index, n, keys)
    while (outside := out >= n).any():  # follow the cycle until it comes back into [0, n)
        out[outside] = _feistel(out[outside], n, keys)
    return out


def _feistel(index: NDArray[np.uint64], n: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    a = isqrt(n - 1) + 1
    sizes = np.uint64(a), np.uint64(-(-n // a))
    left, right = np.divmod(index, sizes[1])
    for j, key in enumerate(keys):
        h = (right ^ key) * _GOLDEN
        h ^= h >> _SHIFT
        h *= _MIX
        h >>= _KEEP
        h += left
        h %= sizes[j % 2]
        left, right = right, h
    return left * sizes[1] + right


def _keys(seed: int, epoch: int) -> list[np.uint64]:
    """One key for each round, and one for the offset of the grid."""
    digest = blake2b(f"questctl order 1: seed {seed}, epoch {epoch}".encode(), digest_size=8 * (_ROUNDS + 1)).digest()
    return list(np.frombuffer(digest, dtype="<u8").astype(np.uint64))


def _gather(tokens: Tokens, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    shape, step = (len(tokens) - length + 1, length), tokens.itemsize
    windows: Tokens = np.ndarray(shape, tokens.dtype, buffer=tokens, strides=(step, step))  # every window, no copy
    return windows[starts].astype(np.int64)
