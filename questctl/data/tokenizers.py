"""Tokenizers, which turn text into token ids and back. A tokenizer is named `byte` or `kind:argument`:

    byte              an id is a UTF-8 byte
    bpe:V             byte-pair encoding with V ids, trained on the training part of the corpus itself and kept in the cache
    bpe.llama3:V      the same with the words of Llama 3, which llama.cpp splits identically: for runs exported to GGUF
    hf:NAME_OR_DIR    the tokenizer.json of a model on the Hugging Face Hub, or of a folder (such as one of prepared tokens)
    gguf:FILE         the byte-level BPE inside a file of llama.cpp

Each kind has an entry in `TOKENIZERS`. Every document is followed by the id `end`, so that documents stay apart. The hash of
a tokenizer identifies what its ids mean: token files of different hashes cannot be mixed, even if the names are the same.

`bpe:V` splits text into words by one regular expression, `word_rules.CUTS`, and merges bytes within a word (Sennrich et al.,
arXiv 1508.07909; on bytes as in GPT-2). The expression lists its characters as ranges, so that Python's `re` and the library
`tokenizers` split alike whatever version of Unicode they implement. Splitting text and looking up known words in Python is
several times as fast as the library, which is called only for new words. The tokenizer.json is an ordinary one and gives the
same ids in other programs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError, MissingDependency, UsageError, unknown
from .word_rules import CUT, CUTS, OWN, family_of, layout

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

NO_TOKENIZER = "none"  # the tokenizer name of tokens whose tokenizer is unknown (bin:) or does not exist (synthetic:)
DTYPES = ("uint8", "uint16", "uint32")
TABLE = "tokenizer.json"
END = "<|endoftext|>"
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<EOS>", "[SEP]")  # tried if tokenizer_config.json names none
TRAINING_BYTES = 4096  # of text per id of a bpe; bpe:8192 is trained on the first 32 MiB of the training part
SMALLEST_BPE = 257  # one id for every byte, and one for the end

_PIECE = 1 << 20  # characters
_MOST_WORDS = 1 << 19  # words whose ids are kept in memory: at most about 100 MB


class Tokenizer(Protocol):
    """The interface of a tokenizer for preparation and generation."""

    @property
    def name(self) -> str:
        """The name from which `load` makes this tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of ids; all ids are below it."""

    @property
    def end(self) -> int:
        """The id after each document. It counts as one byte of text."""

    @property
    def hash(self) -> str:
        """The SHA-256 (hex) of the mapping from text to ids."""

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """The ids of `text`, (n,), without `end`."""

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids (n,). Bytes that are not valid UTF-8 become U+FFFD."""


def utf8_size(text: str) -> int:
    """The number of bytes of a text in UTF-8, without a copy of a long one."""
    return sum(len(text[at : at + _PIECE].encode()) for at in range(0, len(text), _PIECE))


def dtype_name(vocab_size: int) -> str:
    """The smallest of uint8, uint16 and uint32 that holds all ids below `vocab_size`."""
    return next(name for name in DTYPES if vocab_size <= 2 ** (8 * np.dtype(name).itemsize))


@dataclass(frozen=True)
class ByteTokenizer:
    """The tokenizer whose ids are UTF-8 bytes. NUL, which does not occur in text, ends a document."""

    name: str = "byte"
    vocab_size: int = 256
    end: int = 0

    @property
    def hash(self) -> str:
        """The hash of the definition, because there is no table."""
        return hashlib.sha256(b"id = UTF-8 byte; end = 0").hexdigest()

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """The ids, (len(text.encode()),), uint8."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids (n,), uint8."""
        return np.asarray(ids, dtype=np.uint8).tobytes().decode(errors="replace")


@dataclass(frozen=True)
class TableTokenizer:
    """A tokenizer.json that the library `tokenizers` runs. Text that happens to spell a special token is encoded as text."""

    name: str
    table: bytes  # content of tokenizer.json
    end: int

    @cached_property
    def hash(self) -> str:
        """The hash of the end and of the table's content, whatever the layout of its JSON."""
        content = json.dumps([json.loads(self.table), self.end], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._library.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end_token(self) -> str:
        """The token whose id is `end`."""
        return self._library.id_to_token(self.end) or ""

    @cached_property
    def _library(self) -> Library:
        library = library_of(self)
        library.encode_special_tokens = True
        return library

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """The ids, (n,), in the smallest dtype that holds the vocabulary."""
        if self._words is not None:
            words = self._words
            if len(words) > _MOST_WORDS:
                words.clear()
            data = b"".join(map(words.__getitem__, words.cut(text)))
            return np.frombuffer(data, dtype_name(self.vocab_size))
        return np.array(self._library.encode(text, add_special_tokens=False).ids, dtype_name(self.vocab_size))

    @cached_property
    def cuts(self) -> bool:
        """Whether a text may be cut between a letter or digit and a space before another without changing its ids.

        This holds if the tokenizer first splits text into words that end there at the latest, and if ids depend on nothing
        outside a word: for `CUTS`, and for the words of known families.
        """
        return bool(self.family) and json.loads(self.table).get("normalizer") is None

    @cached_property
    def family(self) -> str:
        """The family of the table's words, see `word_rules`; "" for words that are not known here."""
        return family_of(json.loads(self.table))

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids (n,), with special tokens spelled out."""
        return self._library.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    @cached_property
    def _words(self) -> _Words | None:
        """The ids of words, if the table splits text as `bpe:V` does; other tables are left to the library."""
        splits_alike = json.loads(self.table).get("pre_tokenizer") == layout(OWN)["pre_tokenizer"]
        return _Words(self._library, dtype_name(self.vocab_size)) if splits_alike else None

    def __reduce__(self) -> tuple[Any, ...]:
        return TableTokenizer, (self.name, self.table, self.end)


def library_of(tokenizer: TableTokenizer) -> Library:
    """A new tokenizer of the library, which encodes text that spells a special token as that token."""
    library: Library = _tokenizers(tokenizer.name).Tokenizer.from_str(tokenizer.table.decode())
    library.no_truncation()
    library.no_padding()
    return library


class _Words(dict[str, bytes]):
    """A word of the text → its ids, as bytes of the dtype in which they are stored."""

    def __init__(self, library: Library, dtype: str) -> None:
        self.cut = re.compile(CUTS).findall
        self._encode, self._dtype = library.encode, np.dtype(dtype)

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._encode(word, add_special_tokens=False).ids, self._dtype).tobytes()
        self[word] = ids
        return ids


def pieces(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """A long text in pieces of about a million characters whose ids, one after the other, are those of the text.

    It is a single piece if the tokenizer does not say where a text may be cut.
    """
    if isinstance(tokenizer, ByteTokenizer):
        yield from (text[at : at + _PIECE] for at in range(0, len(text), _PIECE))
    elif isinstance(tokenizer, TableTokenizer) and tokenizer.cuts:
        yield from _between_words(text)
    else:
        yield text


def _between_words(text: str) -> Iterator[str]:
    at = 0
    while len(text) - at > _PIECE and (cut := CUT.search(text, at + _PIECE)):
        yield text[at : cut.start()]
        at = cut.start()
    yield text[at:] if at else text


# --- names ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """The text on which a tokenizer is trained, and the folder of trained tokenizers."""

    texts: Callable[[], Iterator[str]]  # of the training part of the corpus
    key: str  # hash of everything that determines these texts
    folder: Path  # of the cache
    report: Callable[[int, int], None] = lambda done, total: None  # called with the bytes read and the bytes to read


def _byte(argument: str, _: Training | None) -> Tokenizer:
    if argument:
        raise UsageError(f"data.tokenizer: 'byte' takes no argument, got 'byte:{argument}'.")
    return ByteTokenizer()


def _bpe_size(argument: str, kind: str = "bpe") -> int:
    if not (argument.isascii() and argument.isdigit() and SMALLEST_BPE <= int(argument) <= 2**20):
        raise UsageError(
            f"data.tokenizer: {kind}:V needs a number of ids from {SMALLEST_BPE} to 1,048,576, got '{kind}:{argument}'."
        )
    return int(argument)


def _bpe(argument: str, training: Training | None, kind: str = "bpe") -> Tokenizer:
    size = _bpe_size(argument, kind)
    name = f"{kind}:{size}"
    if training is None:
        raise UsageError(f"data.tokenizer: {name} is trained on a corpus; name a folder that was prepared with it: hf:FOLDER.")
    path = training.folder / f"{kind}-{size}-{training.key[:16]}.json"
    try:
        table = path.read_bytes()
    except FileNotFoundError:
        table = train_bpe(training.texts(), size, training.report, family=kind.partition(".")[2] or OWN)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(table)
        temporary.replace(path)
    return from_table(name, table)


def _hf(argument: str, _: Training | None) -> Tokenizer:
    if not argument:
        raise UsageError("data.tokenizer: 'hf' needs a name: hf:OWNER/MODEL, or a folder, hf:./FOLDER.")
    from . import hub

    return from_table(f"hf:{argument}", *hub.tokenizer_files(argument))


def _gguf(argument: str, _: Training | None) -> Tokenizer:
    from . import gguf_tokenizer

    return from_table(f"gguf:{argument}", *gguf_tokenizer.tokenizer_files(argument))


# kind → function that makes the tokenizer from its argument ('' if the name has none)
TOKENIZERS: dict[str, Callable[[str, Training | None], Tokenizer]] = {
    "byte": _byte,
    "bpe": _bpe,
    "bpe.llama3": partial(_bpe, kind="bpe.llama3"),
    "hf": _hf,
    "gguf": _gguf,
}


def load(name: str, training: Training | None = None) -> Tokenizer:
    """The tokenizer with this name; `training` is needed only for `bpe:`.

    Raises UsageError, which lists the choices, for an unknown name, DataError for a damaged table, Unreachable for `hf:`
    without a network, and MissingDependency if the library `tokenizers` is not installed.
    """
    kind, _, argument = name.partition(":")
    if kind not in TOKENIZERS:
        raise UsageError(unknown("data.tokenizer", name, TOKENIZERS, what="tokenizer"))
    return TOKENIZERS[kind](argument, training)


def template_files(name: str) -> tuple[bytes | None, bytes | None]:
    """The contents of chat_template.jinja and tokenizer_config.json that belong to a tokenizer; None for a missing one.

    Raises what `load` does for a tokenizer of the hub or of a file.
    """
    kind, _, argument = name.partition(":")
    if kind == "hf":
        from . import hub

        return hub.template_files(argument)
    if kind == "gguf":
        from . import gguf_tokenizer

        return None, gguf_tokenizer.tokenizer_files(argument)[1]
    return None, None


def is_here(name: str) -> bool:
    """Whether the tokenizer can be loaded without the hub. Nothing is fetched to find out."""
    kind, _, argument = name.partition(":")
    return kind != "hf" or os.path.isdir(os.path.expanduser(argument))


def vocabulary(name: str) -> int | None:
    """The number of ids of a tokenizer that may not be trained yet: for `bpe:V` the upper bound V; None if only the hub knows.

    Raises UsageError and DataError as `load` does.
    """
    kind, _, argument = name.partition(":")
    if kind.startswith("bpe") and kind in TOKENIZERS:
        return _bpe_size(argument, kind)
    return load(name).vocab_size if is_here(name) else None


def from_table(name: str, table: bytes, config: bytes | None = None) -> TableTokenizer:
    """The tokenizer of a tokenizer.json; `config` is the tokenizer_config.json beside it, which names the end of a text.

    Raises DataError if the table is damaged or has no such token.
    """
    library = _tokenizers(name)
    try:
        tokenizer = library.Tokenizer.from_str(table.decode())
        eos = json.loads(config).get("eos_token") if config else None
    except Exception as e:  # the library raises bare Exceptions
        raise DataError(f"data.tokenizer: {name}: its {TABLE} cannot be read: {str(e).splitlines()[0]}.") from e
    eos = eos.get("content") if isinstance(eos, dict) else eos
    end = next((i for token in ([eos] if eos else ENDS) if (i := tokenizer.token_to_id(token)) is not None), None)
    if end is None:
        raise DataError(f"data.tokenizer: {name} has no token that ends a text ({eos or ', '.join(ENDS)}).")
    return TableTokenizer(name, table, end)


# --- training ---------------------------------------------------------------------------------------------------------


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    family: str = OWN,
) -> bytes:
    """Train a byte-level BPE with at most `vocab_size` ids on the words of a family, and return its tokenizer.json.

    Id 0 is the end, and ids 1 to 256 are the bytes. Training uses the first `TRAINING_BYTES · vocab_size` bytes of `texts`, and
    the same texts give the same table.
    """
    library = _tokenizers(f"bpe:{vocab_size}")
    total = TRAINING_BYTES * vocab_size

    def first_texts() -> Iterator[str]:
        done = 0
        for text in texts:
            yield from _between_words(text)
            done += utf8_size(text)
            report(min(done, total), total)
            if done >= total:
                return

    tokenizer = library.Tokenizer.from_str(json.dumps(layout(family)))
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(first_texts(), trainer)
    return tokenizer.to_str().encode()


def _tokenizers(name: str) -> Any:
    try:
        import tokenizers
    except ImportError as e:
        raise MissingDependency(
            f"data.tokenizer: {name} needs the library tokenizers: pip install 'questctl[data]'; the tokenizer byte needs none."
        ) from e
    return tokenizers
