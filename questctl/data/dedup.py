"""Deduplication of documents: a set of their 64-bit digests in a memory-mapped file, so that a large corpus needs no memory.

The set is a hash table with open addressing and linear probing (Knuth, The Art of Computer Programming 3, 6.4), to which
digests are added in batches. The file is doubled at half load, so a digest takes 16 to 32 bytes of disk.

Two different documents can share a digest, and then the second one is lost. Of n documents n²/2⁶⁵ pairs do so on average: one
in a million for six million documents, which is three billion tokens of web text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]

_FIRST_SLOTS = 1 << 12
_CHUNK = 1 << 16
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio; makes the slot independent of the split, which goes by magnitude


class DocumentSet:
    """A growing set of document digests on disk. An existing file at `path` is replaced."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._table = self._empty(_FIRST_SLOTS)

    def add(self, digests: Digests) -> NDArray[np.bool_]:
        """Add digests (n,), which may repeat each other; → (n,), True where a digest occurs for the first time."""
        digests = np.where(digests == 0, np.uint64(1), digests)  # 0 marks an empty slot
        new = np.zeros(len(digests), bool)
        new[np.unique(digests, return_index=True)[1]] = True
        while 2 * (self.count + len(digests)) > len(self._table):
            self._grow()
        new[new] = self._insert(self._table, digests[new])
        self.count += int(new.sum())
        return new

    def _insert(self, table: Digests, digests: Digests) -> NDArray[np.bool_]:
        """Put distinct digests (n,) into a table with enough room; → (n,), True where a digest was not in the table before."""
        new, pending = np.zeros(len(digests), bool), np.arange(len(digests))
        slots = (digests * _MIX) >> np.uint64(64 - (len(table).bit_length() - 1))
        while len(pending):
            occupants = table[slots[pending]]
            free = pending[occupants == 0]
            table[slots[free]] = digests[free]  # if several digests want the same slot, the last one gets it
            placed = table[slots[pending]] == digests[pending]
            new[pending[placed & (occupants == 0)]] = True
            pending = pending[~placed]
            slots[pending] = (slots[pending] + np.uint64(1)) & np.uint64(len(table) - 1)
        return new

    def _grow(self) -> None:
        old = self._table
        self._table = self._empty(2 * len(old))
        for at in range(0, len(old), _CHUNK):
            part = old[at : at + _CHUNK]
            self._insert(self._table, part[part != 0])

    def _empty(self, slots: int) -> Digests:
        self.path.unlink(missing_ok=True)  # the old table stays mapped while `_grow` reads it
        return np.memmap(self.path, np.uint64, mode="w+", shape=(slots,))
