"""Which tokens a step sees: a pure function of (seed, step, rank), so that resume is arithmetic and no state is kept.

Global sequence g = step·B + row is number i = g mod W of epoch e = g div W, W windows an epoch. Window π_e(i) is read, where
π_e is a keyed bijection of [0, W): every window once per epoch, no table, any g in constant time. Windows lie on a grid of
`seq_len` whose offset is drawn anew each epoch, so that their borders do not repeat.

π is a Feistel network on Z_a × Z_b with a = ⌈√W⌉, b = ⌈W/a⌉ and addition modulo a or b as the round's group operation
(generalised Feistel cipher and cycle walking: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). As
ab − W < a, one walk in √W steps again. The round function is the mixer of splitmix64 (Steele et al., OOPSLA 2014), cut short.
Given up: the order is well mixed, not cryptographically strong.
"""

from __future__ import annotations

from hashlib import blake2b
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Tokens = NDArray[np.unsignedinteger]  # (n,) token ids, uint8, uint16 or uint32; usually memory-mapped

_ROUNDS = 6  # an even number; after four, pairs of neighbours are still far from uniform (chi-square, W = 30 and 60)
_GOLDEN, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # splitmix64
_SHIFT, _KEEP = np.uint64(29), np.uint64(33)  # keeps 31 bits: room to add a half below 2³¹ without overflow, W below 2⁴⁰


def windows_per_epoch(n_tokens: int, seq_len: int) -> int:
    """Windows W of one epoch: as many as fit at every offset of the grid; 1 if only one fits at all, 0 if none does."""
    return max(n_tokens // seq_len - 1, int(n_tokens > seq_len))


def batch(
    tokens: Tokens, *, seed: int, step: int, batch_size: int, seq_len: int, rank: int = 0, world_size: int = 1
) -> NDArray[np.int64]:
    """Sequences of one optimizer step: tokens (n,) → (batch_size / world_size, seq_len + 1), int64.

    Row r of rank k is row k·batch_size/world_size + r of the global batch: stacking the ranks gives the same batch for every
    world size. Input is `[:, :-1]`, target `[:, 1:]`. Raises UsageError if `world_size` does not divide `batch_size`.
    """
    if batch_size % world_size:
        raise UsageError(f"train.batch_size: {batch_size} sequences cannot be shared equally by {world_size} processes.")
    windows = windows_per_epoch(len(tokens), seq_len)
    assert windows > 0, "a corpus shorter than one window is refused by tokens.require_windows"
    rows = batch_size // world_size
    first = step * batch_size + rank * rows
    starts = []
    for epoch in range(first // windows, (first + rows - 1) // windows + 1):  # one pass, two where an epoch ends in this batch
        low, high = max(first, epoch * windows), min(first + rows, (epoch + 1) * windows)
        index = np.arange(low - epoch * windows, high - epoch * windows, dtype=np.uint64)
        *keys, draw = _keys(seed, epoch)
        offset = int(draw) % min(seq_len, len(tokens) - windows * seq_len)
        starts.append(permute(index, windows, keys).astype(np.int64) * seq_len + offset)
    return _gather(tokens, np.concatenate(starts), seq_len + 1)


def validation_windows(tokens: Tokens, seq_len: int, max_tokens: int) -> NDArray[np.int64]:
    """Fixed windows that share no target, evenly spaced over `tokens` (n,): (k, seq_len + 1), int64, k·seq_len ≤ max_tokens.

    At least one window; the same for every seed, step and rank.
    """
    fit = (len(tokens) - 1) // seq_len
    k = max(1, min(fit, max_tokens // seq_len))
    return _gather(tokens, np.arange(k) * fit // k * seq_len, seq_len + 1)


def permute(index: NDArray[np.uint64], n: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    """The bijection of [0, n) that `keys` names, at each of `index` (any shape, uint64, below n)."""
    out = _feistel(index, n, keys)
    while (outside := out >= n).any():  # walk the cycle until it comes back into [0, n)
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
    """One key for each round and one for the offset of the grid."""
    digest = blake2b(f"questctl order 1: seed {seed}, epoch {epoch}".encode(), digest_size=8 * (_ROUNDS + 1)).digest()
    return list(np.frombuffer(digest, dtype="<u8").astype(np.uint64))


def _gather(tokens: Tokens, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    shape, step = (len(tokens) - length + 1, length), tokens.itemsize
    windows: Tokens = np.ndarray(shape, tokens.dtype, buffer=tokens, strides=(step, step))  # every window, no copy
    return windows[starts].astype(np.int64)
