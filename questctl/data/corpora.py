"""Where documents come from. A source is a word, `kind` or `kind:rest`; `SOURCES` maps each kind to the reader of its words.

    pystdlib                     the running Python's own library, ~12 MB of text (Python and English); tests are left out
    pysite: | pysite:numpy,rich  sources of all or of the named installed packages; tests are left out
    file:PATH                    UTF-8 text, .jsonl or .parquet with the text under "text", .gz and .zst of these; a folder
                                 stands for all its files but hidden ones; PATH may hold * ? [ ] and **
    file:PATH:FIELD              … under another field
    hf:NAME[/CONFIG][:FIELD]     a data set of the Hugging Face Hub (owner/name), or a folder that `datasets` can load
                                 (hf:./dir), streamed; `?split=train&revision=main&tokens=3B` says more
    bin:PATH                     token ids as a flat file, or a folder with train.bin and val.bin (nanoGPT's layout: uint16);
                                 `?dtype=uint32&vocab=100277` or a meta.json with `dtype`, `vocab_size` beside it says more
    synthetic:markov             a Markov chain whose entropy rate is known; `?vocab=64&order=1&tokens=4000000&seed=0`

A text document is a file, a part of about 64 KiB of a longer file (cut at a line's end), or a line of .jsonl. The order is
that of the names, never that of the file system. Python sources that cannot be read or decoded are passed over and counted;
in `file:` they are errors.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import parse_count
from ..errors import DataError, UsageError, unknown
from . import readers
from .hub import HubText
from .reading import Reading
from .source_files import file_size, fingerprint, unreadable, visible_files
from .tokenizers import DTYPES


@dataclass(frozen=True)
class TextFiles:
    """Files of text in the order of their names."""

    word: str
    files: tuple[tuple[str, Path], ...]  # (name, path)
    field: str = "text"  # of .jsonl and .parquet
    lenient: bool = False  # pass over what cannot be read

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file_size(path) for _, path in self.files)

    def fingerprint(self) -> str:
        """Changes when the files do (see `fingerprint`)."""
        return fingerprint(self.files, lenient=self.lenient)

    def documents(self, reading: Reading | None = None) -> Iterator[str]:
        """The documents after `reading.place`, none empty; `reading` is kept up to date with the last one given.

        Raises DataError if a file cannot be read, is not UTF-8, or a line is not what it should be, naming file and place.
        """
        reading = reading or Reading()
        first, start = reading.place or (0, 0)
        before = sum(file_size(path) for _, path in self.files[:first])
        for number, (name, path) in enumerate(self.files[first:], first):
            try:
                with path.open("rb") as raw:
                    for n, item in enumerate(readers.read(path, raw, self.field, start), start + 1):
                        reading.place, reading.done = (number, n), before + raw.tell()
                        if isinstance(item, str):
                            if item:
                                reading.good += 1
                                yield item
                        elif self.lenient:
                            reading.skipped.append(name)
                        else:
                            reading.pass_over(item)
            except OSError as e:
                if not self.lenient:
                    raise unreadable(path, e) from e
                reading.skipped.append(name)
            before, start = before + file_size(path), 0
            reading.place, reading.done = (number + 1, 0), before


@dataclass(frozen=True)
class TokenFiles:
    """Token files that exist already and stay where they are."""

    word: str
    train: Path
    val: Path | None  # None: the end of `train` is held out
    meta: Path | None
    options: tuple[tuple[str, str], ...] = ()

    def fingerprint(self) -> str:
        """Changes when the files do (see `fingerprint`)."""
        return fingerprint((str(path), path) for path in (self.train, self.val, self.meta) if path)

    def description(self) -> tuple[str, int | None, float | None]:
        """(dtype, vocab_size, bytes_per_token), from the word, else from meta.json, else (uint16, None, None).

        Raises DataError if meta.json is not an object of such values, or the dtype is not one of `DTYPES`.
        """
        meta: dict[str, Any] = read_json(self.meta) if self.meta else {}
        options = dict(self.options)
        dtype = options.get("dtype", meta.get("dtype", "uint16"))
        vocab = int(options["vocab"]) if "vocab" in options else meta.get("vocab_size")
        bytes_per_token = meta.get("bytes_per_token")
        if dtype not in DTYPES:
            raise DataError(unknown(f"{self.meta}: dtype", dtype, DTYPES, what="dtype"))
        for key, value, kind in (("vocab_size", vocab, int), ("bytes_per_token", bytes_per_token, int | float)):
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or value <= 0):
                raise DataError(f"{self.meta}: {key} must be a positive number, got {value!r}.")
        return dtype, vocab, bytes_per_token


@dataclass(frozen=True)
class Markov:
    """Chain of order k over v symbols: P(x_t | x_{t−k} … x_{t−1}), drawn at random, in multiples of 1/4096, all positive.

    h = −Σ_s π_s Σ_x P(x|s) ln P(x|s)  nats/token,  π the stationary distribution of the v^k contexts (Cover & Thomas,
    Elements of Information Theory, theorem 4.2.4). Drawn with integers and raw PCG64 words only: the same tokens anywhere.
    """

    vocab_size: int = 64
    order: int = 1
    tokens: int = 4_000_000
    seed: int = 0

    RESOLUTION = 4096

    @property
    def word(self) -> str:
        """The whole word, defaults included."""
        return f"synthetic:markov?vocab={self.vocab_size}&order={self.order}&tokens={self.tokens}&seed={self.seed}"

    @property
    def contexts(self) -> int:
        """Number of contexts, v^k."""
        return self.vocab_size**self.order

    def fingerprint(self) -> str:
        """The word says it all."""
        return self.word

    def counts(self) -> NDArray[np.int64]:
        """P in units of 1/4096: (v^k, v), rows sum to 4096. A row is 1 + shares in proportion to 1/u, u uniform: a few likely
        symbols and a long tail."""
        v, spare = self.vocab_size, self.RESOLUTION - self.vocab_size
        u = np.random.PCG64([self.seed, 0]).random_raw(self.contexts * v).reshape(self.contexts, v) >> np.uint64(44)  # 20 bits
        weights = (2**40 // (u.astype(np.int64) + 1)).astype(np.int64)
        shares = weights * spare // weights.sum(axis=1, keepdims=True)  # below 2⁵²
        rest = spare - shares.sum(axis=1)
        shares[np.arange(self.contexts), weights.argmax(axis=1)] += rest
        return 1 + shares

    def stationary(self) -> NDArray[np.float64]:
        """π, (v^k,): the fixed point of π ← π P, to 1e-14 in total variation per step."""
        p = self.counts() / self.RESOLUTION
        pi = np.full(self.contexts, 1 / self.contexts)
        while True:
            step = (pi[:, None] * p).reshape(self.vocab_size, -1).sum(axis=0)  # drop the oldest symbol, append the new one
            if np.abs(step - pi).sum() < 1e-14:
                return step / step.sum()
            pi = step

    def entropy(self) -> float:
        """Entropy rate h in nats/token: the lowest loss that any model can reach."""
        p = self.counts() / self.RESOLUTION
        return float(-(self.stationary() @ (p * np.log(p)).sum(axis=1)))

    def chain(self) -> NDArray[np.uint8]:
        """The ids, (tokens,), begun in the context of zeros."""
        v, younger = self.vocab_size, self.contexts // self.vocab_size
        symbols = np.tile(np.arange(v, dtype=np.uint8), self.contexts)
        table = np.repeat(symbols, self.counts().ravel()).reshape(self.contexts, self.RESOLUTION)
        following = [row.tobytes() for row in table]  # following[context][12 random bits] = next symbol
        source, out, context = np.random.PCG64([self.seed, 1]), bytearray(), 0
        while len(out) < self.tokens:
            for draw in (source.random_raw(min(self.tokens - len(out), 1 << 20)) >> np.uint64(52)).tolist():
                symbol = following[context][draw]
                out.append(symbol)
                context = context % younger * v + symbol
        return np.frombuffer(out, dtype=np.uint8)


Corpus = TextFiles | HubText | TokenFiles | Markov


def parse(word: str) -> Corpus:
    """The corpus of a word. Raises UsageError for a word that cannot be meant, DataError for files that are not there."""
    kind, colon, rest = word.partition(":")
    if kind not in SOURCES:
        raise UsageError(unknown("data.source", word, SOURCES, what="source"))
    return SOURCES[kind](word, rest if colon else None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError naming the file if it cannot be read or is something else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: is not JSON: {e}.") from e
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object, not {type(value).__name__}.")
    return value


# --- the kinds of sources ---------------------------------------------------------------------------------------------


def _pystdlib(word: str, rest: str | None) -> Corpus:
    if rest is not None:
        raise UsageError(f"data.source: 'pystdlib' takes no argument, got '{word}'.")
    root = Path(sysconfig.get_path("stdlib"))
    return _not_empty(TextFiles("pystdlib", tuple(_python_files(root)), lenient=True), f"no Python sources in {root}")


def _pysite(word: str, rest: str | None) -> Corpus:
    names = sorted({name.strip().replace("-", "_") for name in (rest or "").split(",")} - {""})
    tops = {  # import name → its folder or file; the first place on the list wins, as in an import
        entry.stem: entry
        for root in reversed(_site_folders())
        for entry in sorted(root.iterdir())
        if entry.stem.isidentifier()
        and entry.stem != "__pycache__"
        and (entry.suffix == ".py" or (entry.suffix == "" and entry.is_dir()))
    }
    for name in names:
        if name not in tops:
            raise UsageError(unknown("data.source", name, sorted(tops), what="installed package"))
    files = [
        (name, path)
        for top in names or sorted(tops)
        for name, path in (_python_files(tops[top], f"{top}/") if tops[top].is_dir() else [(f"{top}.py", tops[top])])
    ]
    return _not_empty(TextFiles("pysite:" + ",".join(names), tuple(files), lenient=True), "no Python sources in these packages")


def _site_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(p) for p in dict.fromkeys((paths["purelib"], paths["platlib"])) if Path(p).is_dir()]


def _python_files(root: Path, prefix: str = "") -> list[tuple[str, Path]]:
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in left_out]
        found += [Path(folder, f) for f in files if f.endswith(".py")]
    return sorted((prefix + path.relative_to(root).as_posix(), path) for path in found)


def _file(word: str, rest: str | None) -> Corpus:
    if not rest:
        raise UsageError(f"data.source: '{word}' names no file; write file:PATH.")
    pattern, field = os.path.expanduser(rest), "text"
    head, colon, tail = pattern.rpartition(":")
    if colon and tail and "/" not in tail and not os.path.exists(pattern):
        pattern, field = head, tail
    if os.path.isdir(pattern):
        files = visible_files(Path(pattern))
    else:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files = [(name, Path(name)) for name in found if os.path.isfile(name)]
    return _not_empty(TextFiles(word, tuple(files), field=field), f"no file matches '{pattern}'")


def _hub(word: str, rest: str | None) -> Corpus:
    name, _, query = (rest or "").partition("?")
    options = _options(word, query, ("split", "revision", "tokens"))
    name, _, field = name.partition(":")
    name = os.path.expanduser(name)
    parts = name.split("/")
    if local := next(("/".join(parts[:n]) for n in (len(parts), len(parts) - 1) if os.path.isdir("/".join(parts[:n]))), None):
        data_set, config = local, name[len(local) + 1 :]
    elif name.startswith(("/", ".")):
        raise DataError(f"data.source: {name} is no folder.")
    else:
        data_set, config = "/".join(parts[:2]), "/".join(parts[2:])
    if not data_set.strip("/") or (len(parts) > 3 and not local):
        raise UsageError(f"data.source: '{word}' names no data set; write hf:OWNER/NAME[/CONFIG][:FIELD] or hf:./FOLDER.")
    tokens = parse_count(options["tokens"], f"data.source: {word}: tokens") if "tokens" in options else None
    return HubText(data_set, config or None, field or "text", options.get("split", "train"), options.get("revision"), tokens)


def _bin(word: str, rest: str | None) -> Corpus:
    name, _, query = (rest or "").partition("?")
    if not name:
        raise UsageError(f"data.source: '{word}' names no file; write bin:PATH.")
    options = _options(word, query, ("dtype", "vocab"))
    if "dtype" in options and options["dtype"] not in DTYPES:
        raise UsageError(unknown("data.source", options["dtype"], DTYPES, what=f"dtype of bin:{name}"))
    if "vocab" in options:
        _whole(word, "vocab", options["vocab"], 1, 2**32)
    path = Path(name).expanduser()
    train = path / "train.bin" if os.path.isdir(path) else path
    if not os.path.isfile(train):
        raise DataError(f"data.source: {train} does not exist; bin: reads a file of token ids, or a folder with train.bin.")
    val, meta = train.with_name("val.bin"), train.with_name("meta.json")
    has_val = train.name == "train.bin" and val.is_file()
    return TokenFiles(word, train, val if has_val else None, meta if meta.is_file() else None, tuple(sorted(options.items())))


def _synthetic(word: str, rest: str | None) -> Corpus:
    kind, _, query = (rest or "").partition("?")
    if kind != "markov":
        raise UsageError(unknown("data.source", word, ["synthetic:markov"], what="source"))
    given = _options(word, query, ("vocab", "order", "tokens", "seed"))
    vocab = _whole(word, "vocab", given.get("vocab", "64"), 2, 256)
    order = _whole(word, "order", given.get("order", "1"), 1, 14)
    if vocab**order > 2**14:
        raise UsageError(f"data.source: {word}: vocab^order is {vocab**order:,} contexts; at most {2**14:,} are possible.")
    tokens = _whole(word, "tokens", given.get("tokens", "4000000"), 1, 10**9)
    return Markov(vocab, order, tokens, _whole(word, "seed", given.get("seed", "0"), 0, 2**32 - 1))


SOURCES: dict[str, Callable[[str, str | None], Corpus]] = {
    "pystdlib": _pystdlib,
    "pysite": _pysite,
    "file": _file,
    "hf": _hub,
    "bin": _bin,
    "synthetic": _synthetic,
}


def _not_empty(corpus: TextFiles, why: str) -> TextFiles:
    if not corpus.files:
        raise DataError(f"data.source: {corpus.word}: {why}.")
    return corpus


def _options(word: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    """'a=1&b=2' → {'a': '1', 'b': '2'}."""
    options = {}
    for item in filter(None, query.split("&")):
        key, _, value = item.partition("=")
        if key not in known:
            raise UsageError(unknown("data.source", key, known, what=f"option of {word.partition('?')[0]}"))
        options[key] = value
    return options


def _whole(word: str, key: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise UsageError(f"data.source: {word}: {key} must be a whole number from {low:,} to {high:,}, got '{text}'.")
    return int(text)
