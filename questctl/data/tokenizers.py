"""Text ↔ token ids. A tokenizer is one class and one entry in `TOKENIZERS`, named by a word: `byte`, or `kind:argument`.

    byte              an id is a UTF-8 byte
    bpe:V             byte-pair encoding with V ids, trained on the training part of the corpus itself, and kept in the cache
    hf:NAME_OR_DIR    tokenizer.json of a model on the Hugging Face Hub, or of a folder (one that was prepared has one)

Every document is followed by the id `end`, so that no text runs into the next. The hash names what the ids mean: token files of
different hashes are different languages, whatever their words say.

`bpe:V` cuts text by one regular expression and merges bytes within the cuts (Sennrich et al., arXiv 1508.07909; byte level:
GPT-2). The expression names its characters by ranges, so that Python's `re` and the library `tokenizers` cut alike whatever
Unicode they know. Cutting and looking up whole words here is several times as fast as the library, which only ever sees words
that are new; the file it writes is a common tokenizer.json that gives the same ids anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError, MissingDependency, UsageError, unknown

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

NO_TOKENIZER = "none"  # the word of token files whose tokenizer is not known here (bin:) or does not exist (synthetic:)
DTYPES = ("uint8", "uint16", "uint32")
TABLE = "tokenizer.json"
END = "<|endoftext|>"
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<EOS>", "[SEP]")  # where tokenizer_config.json names none
TRAINING_BYTES = 4096  # of text for each id of a bpe: the first 32 MiB of the training part for bpe:8192
SMALLEST_BPE = 257  # every byte, and the end

_LETTERS = "A-Za-zÀ-\u1fff\u2c00-\u2dff\u3040-\ufaff\U00010000-\U0001efff\U00020000-\U0003ffff"  # scripts
_SPACE = " \t\n\r\x0b\x0c"
CUTS = (  # a word or up to three digits with the space before it, an English ending, punctuation, space up to the next word
    rf" ?[{_LETTERS}]+| ?[0-9]{{1,3}}|'(?:[sdmt]|ll|ve|re)| ?[^{_SPACE}0-9{_LETTERS}]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
_WORDS_KEPT = 1 << 19  # looked-up words in memory, some 100 MB at the most


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


def dtype_name(vocab_size: int) -> str:
    """The smallest of uint8, uint16 and uint32 that holds the ids below `vocab_size`."""
    return next(name for name in DTYPES if vocab_size <= 2 ** (8 * np.dtype(name).itemsize))


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


@dataclass(frozen=True)
class TableTokenizer:
    """A tokenizer.json, run by the library `tokenizers`; text that spells a special token is text."""

    word: str
    table: bytes  # tokenizer.json
    end: int

    @cached_property
    def hash(self) -> str:
        """Of the table's content, however it is laid out, and of the end."""
        content = json.dumps([json.loads(self.table), self.end], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """The highest id and one."""
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end_token(self) -> str:
        """How the table spells `end`."""
        return self._library.id_to_token(self.end) or ""

    @cached_property
    def _library(self) -> Library:
        library = _tokenizers(self.word).Tokenizer.from_str(self.table.decode())
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        return library

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """(n,) of the dtype that holds all ids."""
        if self._words is not None:
            words = self._words
            if len(words) > _WORDS_KEPT:
                words.clear()
            data = b"".join(map(words.__getitem__, words.cut(text)))
            return np.frombuffer(data, dtype_name(self.vocab_size))
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype_name(self.vocab_size))

    def decode(self, ids: ArrayLike) -> str:
        """Special tokens are shown."""
        return self._library.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    @cached_property
    def _words(self) -> _Words | None:
        """The table's own words by their ids, if it cuts as `bpe:V` does."""
        cut = json.loads(self.table).get("pre_tokenizer") == _layout()["pre_tokenizer"]
        return _Words(self._library, dtype_name(self.vocab_size)) if cut else None

    def __reduce__(self) -> tuple[Any, ...]:
        return TableTokenizer, (self.word, self.table, self.end)


class _Words(dict[str, bytes]):
    """A word of the text → its ids as they are stored."""

    def __init__(self, library: Library, dtype: str) -> None:
        self.cut = re.compile(CUTS).findall
        self._encode, self._dtype = library.encode, np.dtype(dtype)

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._encode(word, add_special_tokens=False).ids, self._dtype).tobytes()
        self[word] = ids
        return ids


# --- words ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What a tokenizer that is trained learns from: texts of the training part, the hash of all that decides them, a cache."""

    texts: Callable[[], Iterator[str]]
    key: str
    folder: Path
    report: Callable[[int, int], None] = lambda done, total: None  # bytes read, bytes that will be


def _byte(argument: str, _: Training | None) -> Tokenizer:
    if argument:
        raise UsageError(f"data.tokenizer: 'byte' takes no argument, got 'byte:{argument}'.")
    return ByteTokenizer()


def _bpe_size(argument: str) -> int:
    if not (argument.isascii() and argument.isdigit() and SMALLEST_BPE <= int(argument) <= 2**20):
        raise UsageError(f"data.tokenizer: bpe:V needs a number of ids from {SMALLEST_BPE} to 1,048,576, got 'bpe:{argument}'.")
    return int(argument)


def _bpe(argument: str, training: Training | None) -> Tokenizer:
    word = f"bpe:{_bpe_size(argument)}"
    if training is None:
        raise UsageError(f"data.tokenizer: {word} is trained on a corpus; name a folder that was prepared with it: hf:FOLDER.")
    path = training.folder / f"bpe-{_bpe_size(argument)}-{training.key[:16]}.json"
    try:
        table = path.read_bytes()
    except FileNotFoundError:
        table = train_bpe(training.texts(), int(argument), training.report)
        path.parent.mkdir(parents=True, exist_ok=True)
        ours = path.with_name(f".{path.name}.{os.getpid()}")
        ours.write_bytes(table)
        ours.replace(path)
    return from_table(word, table)


def _hf(argument: str, _: Training | None) -> Tokenizer:
    if not argument:
        raise UsageError("data.tokenizer: 'hf' needs a name: hf:OWNER/MODEL, or a folder, hf:./FOLDER.")
    from . import hub

    return from_table(f"hf:{argument}", *hub.tokenizer_files(argument))


# kind → maker of a tokenizer from its argument ('' if the word has none)
TOKENIZERS: dict[str, Callable[[str, Training | None], Tokenizer]] = {"byte": _byte, "bpe": _bpe, "hf": _hf}


def load(word: str, training: Training | None = None) -> Tokenizer:
    """The tokenizer of a word. Raises UsageError naming the choices, DataError for a damaged table, Unreachable for `hf:`
    without a network, MissingDependency without the library."""
    kind, _, argument = word.partition(":")
    if kind not in TOKENIZERS:
        raise UsageError(unknown("data.tokenizer", word, TOKENIZERS, what="tokenizer"))
    return TOKENIZERS[kind](argument, training)


def is_here(word: str) -> bool:
    """False for a word that only the hub could explain: nothing is fetched to find out."""
    kind, _, argument = word.partition(":")
    return kind != "hf" or os.path.isdir(os.path.expanduser(argument))


def vocabulary(word: str) -> int | None:
    """Ids of a tokenizer before there is one: of `bpe:V` V, the most that it may have; None where that is not known here.

    Raises UsageError and DataError as `load` does.
    """
    kind, _, argument = word.partition(":")
    if kind == "bpe":
        return _bpe_size(argument)
    return load(word).vocab_size if is_here(word) else None


def from_table(word: str, table: bytes, config: bytes | None = None) -> TableTokenizer:
    """The tokenizer of a tokenizer.json; `config` is the tokenizer_config.json beside it, which names the end of a text.

    Raises DataError if it is damaged or has no such end.
    """
    library = _tokenizers(word)
    try:
        read = library.Tokenizer.from_str(table.decode())
        named = json.loads(config).get("eos_token") if config else None
    except Exception as e:  # the library raises bare Exceptions
        raise DataError(f"data.tokenizer: {word}: its {TABLE} cannot be read: {str(e).splitlines()[0]}.") from e
    named = named.get("content") if isinstance(named, dict) else named
    end = next((i for t in ([named] if named else ENDS) if (i := read.token_to_id(t)) is not None), None)
    if end is None:
        raise DataError(f"data.tokenizer: {word} has no token that ends a text ({named or ', '.join(ENDS)}).")
    return TableTokenizer(word, table, end)


# --- training ---------------------------------------------------------------------------------------------------------


def train_bpe(texts: Iterable[str], vocab_size: int, report: Callable[[int, int], None] = lambda done, total: None) -> bytes:
    """tokenizer.json of a byte-level BPE with at most `vocab_size` ids; id 0 is the end, ids 1 to 256 are the bytes.

    Learns from the first `TRAINING_BYTES · vocab_size` bytes of `texts`; the same texts give the same table.
    """
    library = _tokenizers(f"bpe:{vocab_size}")
    total = TRAINING_BYTES * vocab_size

    def some() -> Iterator[str]:
        done = 0
        for text in texts:
            yield text
            done += len(text.encode())
            report(min(done, total), total)
            if done >= total:
                return

    tokenizer = library.Tokenizer.from_str(json.dumps(_layout()))
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(some(), trainer)
    return tokenizer.to_str().encode()


def _layout() -> dict[str, Any]:
    """An untrained tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": CUTS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }


def _tokenizers(word: str) -> Any:
    try:
        import tokenizers
    except ImportError as e:
        raise MissingDependency(
            f"data.tokenizer: {word} needs the library tokenizers: pip install 'questctl[data]'; byte needs none."
        ) from e
    return tokenizers
