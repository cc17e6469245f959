"""Hashes of passages: tell whether a run of letters of a text, or of ids of a token file, also occurs elsewhere.

A passage is a run of fixed length n, hashed in 64 bits (Karp & Rabin, IBM J. Res. Dev. 31, 1987):

    h[i] = Σ_j R[x_{i+j}]·B^j,  0 ≤ j < n,   by  S[k] = Σ_m R[x_m]·B^m,  m < k:   h[i] = (S[i + n] − S[i])·B^−i   (mod 2⁶⁴)

with R and B ≡ 5 (mod 8) that were drawn once, from PCG64: hashes are the same on every machine. A few passes over an array give
the hashes of all its runs.

Of text only letters and digits count, not case, white space or punctuation. A copy that was quoted, indented or wrapped anew
has the passages of its original. Passages of text start at each word, at every `INSIDE`-th letter of a long word, and at every
character of scripts without spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

INSIDE = 32  # letters
_DRAWN = np.random.PCG64(20_250_205).random_raw(258)
_OF_BYTES: Hashes = _DRAWN[:256]  # R
_BASE, _MIX = (np.uint64(int(n) // 8 * 8 + 5) for n in _DRAWN[256:])
_SHIFT = np.uint64(32)
_LARGEST_FILTER = 26  # log₂ of its bytes

_LETTER = np.array([i >= 0x80 or chr(i).isalnum() for i in range(256)])  # every byte of a character beyond ASCII counts
_LOWER = np.array([ord(chr(i).lower()) if i < 0x80 else i for i in range(256)], np.uint8)
_NO_SPACES = 0xE0  # first byte of UTF-8 characters of three and four bytes: Chinese, Japanese, Thai, …


def mixed(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers after which every bit depends on all bits."""
    out = (values ^ (values >> _SHIFT)) * _MIX
    out ^= out >> _SHIFT
    return out


@cache
def _powers(n: int) -> tuple[Hashes, Hashes]:
    """B^k and B^−k for k < n."""
    both = []
    for base in (int(_BASE), pow(int(_BASE), -1, 2**64)):
        powers = np.full(n, np.uint64(base))
        powers[:1] = 1
        both.append(np.multiply.accumulate(powers))
    return both[0], both[1]


class Runs:
    """The hashes of runs in a sequence of items, from the hashes of the items, (n,)."""

    def __init__(self, items: Hashes) -> None:
        self.n = len(items)
        powers, self._inverse = _powers(1 << max(10, (self.n + 1).bit_length()))
        self._sums = np.zeros(self.n + 1, np.uint64)
        np.cumsum(items * powers[: self.n], out=self._sums[1:])

    def at(self, starts: NDArray[np.int64], length: int) -> Hashes:
        """The hashes of the runs of `length` items that start at `starts`, (m,) → (m,)."""
        return mixed((self._sums[starts + length] - self._sums[starts]) * self._inverse[starts])

    def all(self, length: int) -> Hashes:
        """The hashes of all runs of `length` ≥ 1 items: (n − length + 1,), or (0,)."""
        count = max(0, self.n - length + 1)
        return mixed((self._sums[length : length + count] - self._sums[:count]) * self._inverse[:count])


def id_hashes(ids: NDArray[np.unsignedinteger]) -> Hashes:
    """The hashes of single token ids, (n,) → (n,)."""
    return mixed(ids.astype(np.uint64) + _MIX)


@dataclass(frozen=True)
class Passages:
    """The passages of several texts in order, each array (n,).

    `halves` are the hashes of their first halves. `owner` is the index of each passage's text. The passage starts at byte
    `starts` of that text, and `letter` is the index of its first letter among the text's letters.
    """

    hashes: Hashes
    halves: Hashes
    owner: NDArray[np.int64]
    starts: NDArray[np.int64]
    letter: NDArray[np.int64]
    _last: NDArray[np.int64]  # index of the last letter of each, among those of all texts
    _first_byte: NDArray[np.int64]  # of each text
    _is_letter: NDArray[np.bool_]  # whether each byte of the texts is part of a letter

    @classmethod
    def of(cls, texts: Sequence[bytes], length: int) -> Passages:
        """The passages of `length` letters of texts in UTF-8; those with fewer letters have none."""
        raw = np.frombuffer(b"".join(texts), np.uint8)
        sizes = np.fromiter(map(len, texts), np.int64, len(texts))
        first_byte = np.cumsum(sizes) - sizes
        is_letter = _LETTER[raw]
        count = np.cumsum(is_letter.astype(np.int32), dtype=np.int32)  # letters up to each byte
        begins = is_letter.copy()
        np.greater(is_letter[1:], is_letter[:-1], out=begins[1:])
        begins |= raw >= _NO_SPACES
        begins[first_byte[sizes > 0]] = is_letter[first_byte[sizes > 0]]
        places = np.flatnonzero(begins)
        letters = np.diff(count[places], append=count[-1:] + 1)  # of each word
        if (more := (letters - 1) // INSIDE).any():
            words = np.repeat(np.arange(len(places)), more)
            number = np.arange(len(words)) - (np.cumsum(more) - more)[words] + 1  # of each place inside a word
            inside = np.flatnonzero(is_letter)[count[places[words]] - 1 + INSIDE * number]
            begins[inside[raw[inside] & 0xC0 != 0x80]] = True
            places = np.flatnonzero(begins)
        at = count[places].astype(np.int64) - 1  # the number of the first letter of each
        owner = np.searchsorted(first_byte, places, side="right") - 1
        letters_before = np.append(0, count)[np.append(first_byte, len(raw))].astype(np.int64)
        whole = at + length <= letters_before[owner + 1]
        at, owner, places = at[whole], owner[whole], places[whole]
        runs = Runs(_OF_BYTES[_LOWER[raw[is_letter]]])
        return cls(
            runs.at(at, length),
            runs.at(at, length // 2),
            owner,
            places - first_byte[owner],
            at - letters_before[owner],
            at + length - 1,
            first_byte,
            is_letter,
        )

    @property
    def ends(self) -> NDArray[np.int64]:
        """For each passage, the byte of its text right after its last letter."""
        return np.flatnonzero(self._is_letter)[self._last] + 1 - self._first_byte[self.owner]

    def thinned(self, step: int) -> NDArray[np.bool_]:
        """Which passages to keep so that at most one starts in every `step` letters: True for the first."""
        cell = self.letter // step
        keep = np.ones(len(cell), bool)
        keep[1:] = (cell[1:] != cell[:-1]) | (self.owner[1:] != self.owner[:-1])
        return keep


class Search:
    """A search for some hashes in a stream of hashes that is too long for memory."""

    def __init__(self, wanted: Hashes) -> None:
        self._wanted = np.unique(wanted)
        self._found = np.zeros(len(self._wanted), bool)

    @cached_property
    def _filter(self) -> tuple[np.uint64, NDArray[np.bool_]]:
        """A table of the first bits of the wanted hashes, a quick test that rules out nearly all of a stream."""
        bits = min(max((16 * len(self._wanted)).bit_length(), 10), _LARGEST_FILTER)
        shift, table = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        table[self._wanted >> shift] = True
        return shift, table

    def look(self, stream: Hashes) -> None:
        """Look for the wanted hashes in the next part of the stream."""
        if not len(self._wanted):
            return
        shift, table = self._filter
        likely = stream[table[stream >> shift]]
        place = np.minimum(np.searchsorted(self._wanted, likely), len(self._wanted) - 1)
        self._found[place[self._wanted[place] == likely]] = True

    def found(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Whether each of these hashes (n,), all of them wanted, has occurred so far."""
        return self._found[np.searchsorted(self._wanted, hashes)]
