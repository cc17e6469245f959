"""Which documents there have been: a set of 64-bit digests in a memory-mapped file, so that it costs no memory of the process.

Open addressing with linear probing (Knuth, The Art of Computer Programming 3, 6.4), a batch at a time. The file is doubled
at half load, so a digest takes 16 to 32 bytes of disk. Of n documents, n²/2⁶⁵ pairs would be taken for equal that are not:
one in a million for six million documents, which is three billion tokens of web text.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]

_FIRST_SLOTS = 1 << 12
_CHUNK = 1 << 16
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio: the slot is not the split's criterion, which is the digest's size


class Seen:
    """A growing set on disk; the file at `path` is begun anew."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._table = self._empty(_FIRST_SLOTS)

    def add(self, digests: Digests) -> NDArray[np.bool_]:
        """Add digests (n,), equal ones allowed; → (n,) True where one is here for the first time."""
        digests = np.where(digests == 0, np.uint64(1), digests)  # 0 is an empty slot
        new = np.zeros(len(digests), bool)
        new[np.unique(digests, return_index=True)[1]] = True
        while 2 * (self.count + len(digests)) > len(self._table):
            self._grow()
        new[new] = self._insert(self._table, digests[new])
        self.count += int(new.sum())
        return new

    def _insert(self, table: Digests, digests: Digests) -> NDArray[np.bool_]:
        """Put different digests (n,) into a table with room; → (n,) True where it was not there before."""
        new, left = np.zeros(len(digests), bool), np.arange(len(digests))
        slots = (digests * _MIX) >> np.uint64(64 - (len(table).bit_length() - 1))
        while len(left):
            found = table[slots[left]]
            free = left[found == 0]
            table[slots[free]] = digests[free]  # of several that want one slot the last gets it
            placed = table[slots[left]] == digests[left]
            new[left[placed & (found == 0)]] = True
            left = left[~placed]
            slots[left] = (slots[left] + np.uint64(1)) & np.uint64(len(table) - 1)
        return new

    def _grow(self) -> None:
        old = self._table
        self._table = self._empty(2 * len(old))
        for at in range(0, len(old), _CHUNK):
            part = old[at : at + _CHUNK]
            self._insert(self._table, part[part != 0])

    def _empty(self, slots: int) -> Digests:
        self.path.unlink(missing_ok=True)  # an older table stays mapped until it has been read
        return np.memmap(self.path, np.uint64, mode="w+", shape=(slots,))
