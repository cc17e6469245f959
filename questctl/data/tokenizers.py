"""Text ↔ token ids. A tokenizer is one class and one entry in `TOKENIZERS`, named by a word: `byte`, or `kind:argument`.

Every document is followed by the id `end`, so that no text runs into the next. The hash names what the ids mean: token files of
different hashes are different languages, whatever their words say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UsageError, unknown

NONE = "none"  # the word of token files whose tokenizer is not known here (bin:) or does not exist (synthetic:)


class Tokenizer(Protocol):
    """What preparation and generation need of a tokenizer."""

    @property
    def word(self) -> str:
        """The word that `load` reads."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; all are below it."""

    @property
    def end(self) -> int:
        """The id after each document; counted as one byte."""

    @property
    def hash(self) -> str:
        """SHA-256 hex of the mapping."""

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """Ids of `text`, (n,), without `end`."""

    def decode(self, ids: ArrayLike) -> str:
        """Text of ids (n,); what is not valid UTF-8 becomes U+FFFD."""


@dataclass(frozen=True)
class ByteTokenizer:
    """The id of a token is its UTF-8 byte; NUL, which text does not hold, ends a document."""

    word: str = "byte"
    vocab_size: int = 256
    end: int = 0

    @property
    def hash(self) -> str:
        """Of the definition, as there is no table."""
        return hashlib.sha256(b"id = UTF-8 byte; end = 0").hexdigest()

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """(len(text.encode()),) uint8."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: ArrayLike) -> str:
        """The inverse of `encode`."""
        return np.asarray(ids, dtype=np.uint8).tobytes().decode(errors="replace")


# kind → maker of a tokenizer from its argument ('' if the word has none)
TOKENIZERS: dict[str, Callable[[str], Tokenizer]] = {"byte": lambda _: ByteTokenizer()}


def load(word: str) -> Tokenizer:
    """The tokenizer of a word. Raises UsageError naming the choices."""
    kind, colon, argument = word.partition(":")
    if kind not in TOKENIZERS:
        raise UsageError(unknown("data.tokenizer", word, TOKENIZERS, what="tokenizer"))
    tokenizer = TOKENIZERS[kind](argument)
    if colon and ":" not in tokenizer.word:
        raise UsageError(f"data.tokenizer: '{kind}' takes no argument, got '{word}'.")
    return tokenizer
