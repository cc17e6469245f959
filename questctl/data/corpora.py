"""Sources of training text. A source is written `kind` or `kind:rest`; `SOURCES` maps each kind to the function that parses it.

    pystdlib  pystdlib:clean     the standard library of the running Python: ~12 MB of Python and English, without its tests;
                                 split by data.dedup exact, or near (clean)
    pysite: | pysite:numpy,rich  the Python files of all or of the named installed packages, without their tests
    file:PATH                    UTF-8 text, or .jsonl or .parquet with the text in the field "text"; each also as .gz or .zst.
                                 A folder stands for all its files except hidden ones; PATH may contain * ? [ ] and **
    file:PATH:FIELD              the same, with the text in another field
    chat:PATH                    conversations in .jsonl, .json or .parquet: `messages`, or `prompt` and `completion` (chat.py)
    hf:NAME[/CONFIG][:FIELD]     a data set of the Hugging Face Hub (owner/name), or a folder that `datasets` can load
                                 (hf:./dir), streamed; options: `?split=train&revision=main&tokens=3B`
    bin:PATH                     a file of token ids, or a folder with train.bin and val.bin: flat (nanoGPT's layout: uint16),
                                 with the header of llm.c, .npy, or Megatron's with its .idx; `?dtype=uint32&vocab=100277` or
                                 a meta.json beside it gives `dtype` and `vocab_size`
    synthetic:markov             a Markov chain with a known entropy rate; `?vocab=64&order=1&tokens=4000000&seed=0`

A document is a file, a part of about 64 KiB of a longer file (cut at the end of a line), or a line of .jsonl. Documents come in
the order of the file names, because the order of the file system differs between machines. `pystdlib` and `pysite` skip and
count files that cannot be read or decoded; in `file:` such files are errors.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import parse_count
from ..errors import DataError, UsageError, unknown
from . import readers
from .chat import Template, rendered
from .formats import Layout, index_of, layout_of
from .hub import HubText
from .reading import Reading
from .source_files import file_size, fingerprint, unreadable, visible_files
from .tokenizers import DTYPES


@dataclass(frozen=True)
class TextFiles:
    """Text files, in the order of their names."""

    source: str
    files: tuple[tuple[str, Path], ...]  # (name, path)
    field: str = "text"  # of .jsonl and .parquet
    lenient: bool = False  # skip files that cannot be read or decoded

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(file_size(path) for _, path in self.files)

    def fingerprint(self) -> str:
        """A hash that changes when the files change; see `source_files.fingerprint`."""
        return fingerprint(self.files, lenient=self.lenient)

    def taken(self) -> readers.Field:
        """The field of a record, or the function of it, that gives a document."""
        return self.field

    def documents(self, reading: Reading | None = None) -> Iterator[str]:
        """Yield the documents after `reading.place`, without empty ones, and advance `reading` with each of them.

        Raises DataError, which names the file and the place, if a file cannot be read or is not UTF-8, or if a line is not a
        JSON object with the text in its field.
        """
        reading = reading or Reading()
        first, start = reading.place or (0, 0)
        before = sum(file_size(path) for _, path in self.files[:first])
        for number, (name, path) in enumerate(self.files[first:], first):
            try:
                with path.open("rb") as raw:
                    for n, item in enumerate(readers.read(path, raw, self.taken(), start), start + 1):
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
class ChatFiles(TextFiles):
    """Conversations; their documents are rendered by `chat.rendered` with the template of a tokenizer."""

    template: Template | None = None
    tokenizer: str = ""

    def taken(self) -> readers.Field:
        """The whole record, rendered."""
        needs = (
            f"data.source: {self.source} needs a chat template, and the tokenizer {self.tokenizer} has none; choose a "
            "data.tokenizer=hf:FOLDER that has, or a file with prompt and completion as texts."
        )
        return lambda record, where: rendered(record, self.template, where, needs)


@dataclass(frozen=True)
class TokenFiles:
    """Existing token files, which are used in place."""

    source: str
    train: Path
    val: Path | None  # None: the end of `train` is held out for validation
    meta: Path | None
    options: tuple[tuple[str, str], ...] = ()

    def fingerprint(self) -> str:
        """A hash that changes when the files change; see `source_files.fingerprint`."""
        tokens = [path for path in (self.train, self.val) if path]
        files = [*tokens, self.meta, *map(index_of, tokens)]
        return fingerprint((str(path), path) for path in files if path)

    def layout(self, path: Path) -> Layout:
        """The layout of `train` or `val`, with the dtype from its file, the options, or meta.json, else uint16.

        Raises DataError for a file of another format, and if two of these sources contradict each other.
        """
        layout, described = layout_of(path), self.description()[0]
        if layout.dtype and described not in (None, layout.dtype):
            raise DataError(f"data.source: {path} says that its ids are {layout.dtype}, but {self.source} says {described}.")
        return replace(layout, dtype=layout.dtype or described or "uint16")

    def sizes(self) -> tuple[int, int | None]:
        """The number of ids in `train` and, if it exists, in `val`."""

        def size(path: Path) -> int:
            layout = self.layout(path)
            return layout.tokens or file_size(path) // np.dtype(layout.dtype).itemsize

        return size(self.train), size(self.val) if self.val else None

    def description(self) -> tuple[str | None, int | None, float | None]:
        """(dtype, vocab_size, bytes_per_token); None for values that are not given.

        Each value comes from the options of the source, else from meta.json. Raises DataError if meta.json does not hold such
        values, or if the dtype is not one of `DTYPES`.
        """
        meta: dict[str, Any] = read_json(self.meta) if self.meta else {}
        options = dict(self.options)
        dtype = options.get("dtype", meta.get("dtype"))
        vocab = int(options["vocab"]) if "vocab" in options else meta.get("vocab_size")
        bytes_per_token = meta.get("bytes_per_token")
        if dtype is not None and dtype not in DTYPES:
            raise DataError(unknown(f"{self.meta}: dtype", dtype, DTYPES, what="dtype"))
        for key, value, kind in (("vocab_size", vocab, int), ("bytes_per_token", bytes_per_token, int | float)):
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or value <= 0):
                raise DataError(f"{self.meta}: {key} must be a positive number, got {value!r}.")
        return dtype, vocab, bytes_per_token


@dataclass(frozen=True)
class Markov:
    """A Markov chain of order k over v symbols, with random transition probabilities P(x_t | x_{t−k} … x_{t−1}).

    All probabilities are positive multiples of 1/4096. The entropy rate is

        h = −Σ_s π_s Σ_x P(x|s) ln P(x|s)   nats/token,

    where π is the stationary distribution of the v^k contexts (Cover & Thomas, Elements of Information Theory, theorem 4.2.4).
    The chain is drawn from raw PCG64 output with integer arithmetic only, so its tokens are the same on every machine.
    """

    vocab_size: int = 64
    order: int = 1
    tokens: int = 4_000_000
    seed: int = 0

    RESOLUTION = 4096

    @property
    def source(self) -> str:
        """The source in full, with the defaults of its options."""
        return f"synthetic:markov?vocab={self.vocab_size}&order={self.order}&tokens={self.tokens}&seed={self.seed}"

    @property
    def contexts(self) -> int:
        """The number of contexts, v^k."""
        return self.vocab_size**self.order

    def fingerprint(self) -> str:
        """The source itself, because it determines every token."""
        return self.source

    def counts(self) -> NDArray[np.int64]:
        """P in units of 1/4096, (v^k, v); each row sums to 4096.

        Each entry is 1 plus a share of the remaining 4096 − v units in proportion to 1/u with u uniform, which gives a few
        likely symbols and a long tail.
        """
        v, to_share = self.vocab_size, self.RESOLUTION - self.vocab_size
        u = np.random.PCG64([self.seed, 0]).random_raw(self.contexts * v).reshape(self.contexts, v) >> np.uint64(44)  # 20 bits
        weights = (2**40 // (u.astype(np.int64) + 1)).astype(np.int64)
        shares = weights * to_share // weights.sum(axis=1, keepdims=True)  # the product is below 2⁵²
        rest = to_share - shares.sum(axis=1)
        shares[np.arange(self.contexts), weights.argmax(axis=1)] += rest
        return 1 + shares

    def stationary(self) -> NDArray[np.float64]:
        """The stationary distribution π, (v^k,): π ← π P is iterated until Σ|Δπ| of a step is below 1e-14."""
        p = self.counts() / self.RESOLUTION
        pi = np.full(self.contexts, 1 / self.contexts)
        while True:
            step = (pi[:, None] * p).reshape(self.vocab_size, -1).sum(axis=0)  # drop the oldest symbol, append the new one
            if np.abs(step - pi).sum() < 1e-14:
                return step / step.sum()
            pi = step

    def entropy(self) -> float:
        """The entropy rate h in nats/token, which is the lowest loss that any model can reach."""
        p = self.counts() / self.RESOLUTION
        return float(-(self.stationary() @ (p * np.log(p)).sum(axis=1)))

    def chain(self) -> NDArray[np.uint8]:
        """The token ids, (tokens,). The chain starts in the context that consists of zeros."""
        v, without_oldest = self.vocab_size, self.contexts // self.vocab_size
        symbols = np.tile(np.arange(v, dtype=np.uint8), self.contexts)
        table = np.repeat(symbols, self.counts().ravel()).reshape(self.contexts, self.RESOLUTION)
        following = [row.tobytes() for row in table]  # following[context][12 random bits] = next symbol
        generator, out, context = np.random.PCG64([self.seed, 1]), bytearray(), 0
        while len(out) < self.tokens:
            for draw in (generator.random_raw(min(self.tokens - len(out), 1 << 20)) >> np.uint64(52)).tolist():
                symbol = following[context][draw]
                out.append(symbol)
                context = context % without_oldest * v + symbol
        return np.frombuffer(out, dtype=np.uint8)


Corpus = TextFiles | HubText | TokenFiles | Markov


def parse(source: str) -> Corpus:
    """The corpus that a source names. Raises UsageError if the source is malformed, DataError if its files do not exist."""
    kind, colon, rest = source.partition(":")
    if kind not in SOURCES:
        if source and not colon and (Path(source).exists() or Path(source).suffix or "/" in source):
            kind = "bin" if Path(source).suffix == ".bin" or (Path(source) / "train.bin").is_file() else "file"
            hub = "" if Path(source).exists() or source.count("/") != 1 else f", a data set of the Hub hf:{source}"
            raise UsageError(f"data.source: '{source}' names no kind of source; a path is written {kind}:{source}{hub}.")
        raise UsageError(unknown("data.source", source, SOURCES, what="source"))
    return SOURCES[kind](source, rest if colon else None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError, which names the file, if it cannot be read or holds no object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}.") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: is not JSON: {e}.") from e
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object, not {type(value).__name__}.")
    return value


# --- one parser for each kind of source -------------------------------------------------------------------------------


def _pystdlib(source: str, rest: str | None) -> Corpus:
    if rest not in (None, "clean"):
        raise UsageError(f"data.source: 'pystdlib' takes no argument, got '{source}'; there is also 'pystdlib:clean'.")
    root = Path(sysconfig.get_path("stdlib"))
    return _not_empty(TextFiles(source, tuple(_python_files(root)), lenient=True), f"no Python sources in {root}")


def _pysite(source: str, rest: str | None) -> Corpus:
    names = sorted({name.strip().replace("-", "_") for name in (rest or "").split(",")} - {""})
    packages = {  # import name → its folder or file; the first folder of the list wins, as in an import
        entry.stem: entry
        for root in reversed(_site_folders())
        for entry in sorted(root.iterdir())
        if entry.stem.isidentifier()
        and entry.stem != "__pycache__"
        and (entry.suffix == ".py" or (entry.suffix == "" and entry.is_dir()))
    }
    for name in names:
        if name not in packages:
            raise UsageError(unknown("data.source", name, sorted(packages), what="installed package"))
    files = [
        (name, path)
        for package, top in ((name, packages[name]) for name in names or sorted(packages))
        for name, path in (_python_files(top, f"{package}/") if top.is_dir() else [(f"{package}.py", top)])
    ]
    return _not_empty(TextFiles("pysite:" + ",".join(names), tuple(files), lenient=True), "no Python sources in these packages")


def _site_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(p) for p in dict.fromkeys((paths["purelib"], paths["platlib"])) if Path(p).is_dir()]


def _python_files(root: Path, prefix: str = "") -> list[tuple[str, Path]]:
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in excluded]
        paths += [Path(folder, f) for f in files if f.endswith(".py")]
    return sorted((prefix + path.relative_to(root).as_posix(), path) for path in paths)


def _file(source: str, rest: str | None) -> Corpus:
    if not rest:
        raise UsageError(f"data.source: '{source}' names no file; write file:PATH.")
    pattern, field = os.path.expanduser(rest), "text"
    head, colon, tail = pattern.rpartition(":")
    if colon and tail and "/" not in tail and not os.path.exists(pattern):
        pattern, field = head, tail
    if os.path.isdir(pattern):
        files = visible_files(Path(pattern))
    else:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files = [(name, Path(name)) for name in matches if os.path.isfile(name)]
    return _not_empty(TextFiles(source, tuple(files), field=field), f"no file matches '{pattern}'")


def _chat(source: str, rest: str | None) -> Corpus:
    if not rest:
        raise UsageError(f"data.source: '{source}' names no file; write chat:PATH.")
    texts = _file(source, rest)
    assert isinstance(texts, TextFiles)
    for name, path in texts.files:
        suffix = path.with_suffix("").suffix if path.suffix in readers.DECOMPRESSORS else path.suffix
        if suffix not in readers.READERS:
            raise UsageError(f"data.source: {name} holds no records; chat: reads {', '.join(readers.READERS)}.")
    return ChatFiles(source, texts.files)


def _hub(source: str, rest: str | None) -> Corpus:
    name, _, query = (rest or "").partition("?")
    options = _options(source, query, ("split", "revision", "tokens"))
    name, _, field = name.partition(":")
    name = os.path.expanduser(name)
    parts = name.split("/")
    if local := next(("/".join(parts[:n]) for n in (len(parts), len(parts) - 1) if os.path.isdir("/".join(parts[:n]))), None):
        data_set, config = local, name[len(local) + 1 :]
    elif name.startswith(("/", ".")):
        raise DataError(f"data.source: {name} is not a folder.")
    else:
        data_set, config = "/".join(parts[:2]), "/".join(parts[2:])
    if not data_set.strip("/") or (len(parts) > 3 and not local):
        raise UsageError(f"data.source: '{source}' names no data set; write hf:OWNER/NAME[/CONFIG][:FIELD] or hf:./FOLDER.")
    tokens = parse_count(options["tokens"], f"data.source: {source}: tokens") if "tokens" in options else None
    return HubText(data_set, config or None, field or "text", options.get("split", "train"), options.get("revision"), tokens)


def _bin(source: str, rest: str | None) -> Corpus:
    name, _, query = (rest or "").partition("?")
    if not name:
        raise UsageError(f"data.source: '{source}' names no file; write bin:PATH.")
    options = _options(source, query, ("dtype", "vocab"))
    if "dtype" in options and options["dtype"] not in DTYPES:
        raise UsageError(unknown("data.source", options["dtype"], DTYPES, what=f"dtype of bin:{name}"))
    if "vocab" in options:
        _whole(source, "vocab", options["vocab"], 1, 2**32)
    path = Path(name).expanduser()
    train = path / "train.bin" if os.path.isdir(path) else path
    if not os.path.isfile(train):
        raise DataError(f"data.source: {train} does not exist; bin: reads a file of token ids, or a folder with train.bin.")
    val, meta = train.with_name("val.bin"), train.with_name("meta.json")
    has_val = train.name == "train.bin" and val.is_file()
    return TokenFiles(source, train, val if has_val else None, meta if meta.is_file() else None, tuple(sorted(options.items())))


def _synthetic(source: str, rest: str | None) -> Corpus:
    kind, _, query = (rest or "").partition("?")
    if kind != "markov":
        raise UsageError(unknown("data.source", source, ["synthetic:markov"], what="source"))
    options = _options(source, query, ("vocab", "order", "tokens", "seed"))
    vocab = _whole(source, "vocab", options.get("vocab", "64"), 2, 256)
    order = _whole(source, "order", options.get("order", "1"), 1, 14)
    if vocab**order > 2**14:
        raise UsageError(f"data.source: {source}: vocab^order is {vocab**order:,} contexts; at most {2**14:,} are possible.")
    tokens = _whole(source, "tokens", options.get("tokens", "4000000"), 1, 10**9)
    return Markov(vocab, order, tokens, _whole(source, "seed", options.get("seed", "0"), 0, 2**32 - 1))


SOURCES: dict[str, Callable[[str, str | None], Corpus]] = {
    "pystdlib": _pystdlib,
    "pysite": _pysite,
    "file": _file,
    "chat": _chat,
    "hf": _hub,
    "bin": _bin,
    "synthetic": _synthetic,
}


def _not_empty(corpus: TextFiles, why: str) -> TextFiles:
    if not corpus.files:
        raise DataError(f"data.source: {corpus.source}: {why}.")
    return corpus


def _options(source: str, query: str, allowed: tuple[str, ...]) -> dict[str, str]:
    """'a=1&b=2' → {'a': '1', 'b': '2'}. Raises UsageError for an option that is not `allowed`."""
    options = {}
    for item in filter(None, query.split("&")):
        key, _, value = item.partition("=")
        if key not in allowed:
            raise UsageError(unknown("data.source", key, allowed, what=f"option of {source.partition('?')[0]}"))
        options[key] = value
    return options


def _whole(source: str, key: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise UsageError(f"data.source: {source}: {key} must be a whole number from {low:,} to {high:,}, got '{text}'.")
    return int(text)
