"""Readers of text, JSON-lines and Parquet files, chosen by the file's suffix. A reader is one function and one `READERS` entry.

    .jsonl .ndjson        each line is a JSON object with the text in a field
    .json                 a list of such objects or of texts, or lines as in .jsonl; another .json is text
    .parquet              each row has the text in a column
    anything else         UTF-8 text, cut at line ends into parts of about 64 KiB
    … .gz .zst            text or JSON, compressed; decompressed as a stream

A reader yields items in the order of the file: a document, or the `DataError` that says why a line is not a document. To resume
an interrupted preparation, a reader skips the first `start` items without parsing them.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, MissingDependency
from ..words import few
from .formats import NPY, UTF_8_MARK, format_of

PART_BYTES = 64 * 1024  # so that no single file dominates the validation text: at most about a tenth of pystdlib's
_BLOCK = 1 << 17  # bytes read at a time from a compressed file
_LINE_BYTES = 1 << 20  # read at a time of a line of text
_FIRST, _NEXT = re.compile(r"\s*\[\s*"), re.compile(r"[\s,]*")  # the text before an entry of a JSON list
ROWS = 256  # decoded at a time from a Parquet file

Item = str | DataError
Field = str | Callable[[Any, str], Item]  # name of a field, or a function of a record and its place that makes an item
Reader = Callable[[BinaryIO, str, Field, int], Iterator[Item]]  # (stream, its name in messages, field, items to skip)


def read(path: Path, raw: BinaryIO, field: Field, start: int = 0) -> Iterator[Item]:
    """Yield the items of the file `path`, opened as `raw`, without the first `start`.

    If a file cannot be read from some place on (it is not UTF-8, was cut off, or is not a Parquet file), its last item is the
    error. Raises OSError, and MissingDependency if the library that a format needs is not installed.
    """
    packed = path.suffix if path.suffix in DECOMPRESSORS else ""
    suffix = path.with_suffix("").suffix if packed else path.suffix
    stream = DECOMPRESSORS[packed](raw, str(path)) if packed else raw
    broken: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, *_zstd_errors(packed))
    reader = READERS.get(suffix, _text)
    try:
        if suffix == ".json":
            reader, stream = _reader_of_json(stream, field, otherwise=_jsonl if packed else _text)  # C4's files are .json.gz
        yield from reader(stream, str(path), field, start)
    except broken as e:
        yield DataError(f"data.source: {path} is damaged or cut off: {e}.")


def _text(stream: BinaryIO, name: str, _: Field, start: int) -> Iterator[Item]:
    yield from islice(_parts(stream, name), start, None)


def _parts(stream: BinaryIO, name: str) -> Iterator[Item]:
    at = 0
    while block := stream.read(PART_BYTES):
        head, pieces, decoder = block, list[str](), codecs.getincrementaldecoder("utf-8")()
        if at == 0 and block.startswith(UTF_8_MARK):
            block, at = block.removeprefix(UTF_8_MARK), len(UTF_8_MARK)
        last = False  # whether `block` contains the end of the part's last line, which may be as long as the file
        while block:
            if b"\0" in block:
                yield DataError(f"data.source: {name} is not text (byte 0x00 at {at + block.index(0):,}); {_about(head)}.")
                return
            line = b"" if last else stream.readline(_LINE_BYTES)
            try:
                pieces.append(decoder.decode(block, final=not line))
            except UnicodeDecodeError as e:
                place = at + len(block) - len(e.object) + e.start  # `object` begins with the rest of the block before
                yield DataError(
                    f"data.source: {name} is not UTF-8 text (byte 0x{e.object[e.start]:02x} at {place:,}); {_about(head)}."
                )
                return
            at += len(block)
            block, last = line, line.endswith(b"\n")
        pieces = ["".join(pieces)]
        yield pieces.pop()  # pop, so that the text is not held twice, nor while it is used


def _about(head: bytes) -> str:
    """What a file that is not UTF-8 text may be, by its first bytes, and a remedy."""
    marks = {
        codecs.BOM_UTF32_LE: "UTF-32",
        codecs.BOM_UTF32_BE: "UTF-32",
        codecs.BOM_UTF16_LE: "UTF-16",
        codecs.BOM_UTF16_BE: "UTF-16",
    }
    encoding = next((name for mark, name in marks.items() if head.startswith(mark)), "")
    even, odd = head[::2].count(0), head[1::2].count(0)
    if not encoding and even + odd > len(head) // 4 and min(even, odd) < max(even, odd) // 8:
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
    if encoding:
        return f"it seems to be {encoding}: iconv -f {encoding} -t UTF-8 FILE > NEW converts it"
    name = format_of(head) or ""
    endings = {"gzip": ".gz", "zstd": ".zst", "a Parquet": ".parquet"}
    if ending := next((ending for start, ending in endings.items() if name.startswith(start)), ""):
        return f"it is {name}: let its name end in {ending}"
    if head.startswith(NPY):
        return f"it is {name}: write bin: if it holds token ids"
    return f"it is {name}" if name else "file: reads text, .jsonl, .json and .parquet"


def _jsonl(stream: BinaryIO, name: str, field: Field, start: int) -> Iterator[Item]:
    for number, line in islice(((n, line) for n, line in enumerate(stream, 1) if line.strip()), start, None):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            about = f"; {_about(line)}" if b"\0" in line or format_of(line) else ""
            yield DataError(f"data.source: {name}, line {number}: is not JSON: {e}{about}.")
            continue
        yield text_of(record, field, f"{name}, line {number}")


def _reader_of_json(stream: BinaryIO, field: Field, otherwise: Reader) -> tuple[Reader, BinaryIO]:
    """The reader of a .json by its content (`otherwise` if that is neither records nor texts), and the stream to read from."""
    head = stream.read(_LINE_BYTES)
    whole: BinaryIO = io.BufferedReader(_Blocks(chain([head], iter(lambda: stream.read(_BLOCK), b""))), _BLOCK)
    text = head.removeprefix(UTF_8_MARK).decode(errors="replace").lstrip()
    if text.startswith("["):
        return (_json_list if text[1:].lstrip()[:1] in ("{", '"') else otherwise), whole
    line, _, rest = text.partition("\n")
    with suppress(ValueError, RecursionError):
        if isinstance(record := json.loads(line), dict) and (rest.strip() or field in record):
            return _jsonl, whole
    return otherwise, whole


def _json_list(stream: BinaryIO, name: str, field: Field, start: int) -> Iterator[Item]:
    """The texts of a JSON list of objects or texts. Memory holds one entry, or at least a block."""
    utf8, decoder = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder()
    buffer, at, number, size, ended = "", 0, 0, _BLOCK, False
    while True:
        try:
            if before := (_NEXT if number else _FIRST).match(buffer, at):
                at = before.end()
            if buffer.startswith("]", at):
                return
            value, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as e:
            if ended:
                yield DataError(f"data.source: {name}, entry {number + 1}: is not JSON: {e}.")
                return
            block = stream.read(size)
            ended, size = not block, 2 * size  # doubled, so that a long entry is not parsed again for each block
            try:
                buffer, at = buffer[at:] + utf8.decode(block, final=ended), 0
            except UnicodeDecodeError as error:
                yield DataError(f"data.source: {name}, entry {number + 1}: is not UTF-8 text: {error.reason}.")
                return
            continue
        number, at, size = number + 1, end, _BLOCK
        if number > start:
            where = f"{name}, entry {number}"
            plain = isinstance(value, str) and not callable(field)
            yield _encodable(value, where) if plain else text_of(value, field, where)


def _parquet(stream: BinaryIO, name: str, field: Field, start: int) -> Iterator[Item]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise MissingDependency(f"data.source: reading {name} needs pyarrow: pip install 'questctl[data]'.") from e
    try:
        file = ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        names = file.schema_arrow.names
        columns = [field] if field in names else None  # all columns if it is missing: the error names the columns with text
        groups: list[int] = []
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if groups or row + rows > start:
                groups.append(group)
            else:
                row += rows
        for batch in file.iter_batches(ROWS, groups, columns, use_threads=False):
            if row + len(batch) > start:
                for i, record in enumerate(batch.slice(max(0, start - row)).to_pylist(), max(start, row) + 1):
                    yield text_of(record, field, f"{name}, row {i}")
            row += len(batch)
    except ArrowException as e:
        yield DataError(f"data.source: {name} is not a readable Parquet file: {str(e).splitlines()[0]}.")


def text_of(record: Any, field: Field, where: str) -> Item:
    """The text of a record in `field`, which may be dotted (`meta.text`), or the error that says why there is none."""
    if callable(field):
        return field(record, where)
    value = record.get(field) if isinstance(record, dict) else None
    if value is None and "." in field:
        value = record
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        fields = [k for k, v in record.items() if isinstance(v, str)] if isinstance(record, dict) else []
        about = "; a JSON list is read from a file whose name ends in .json" if isinstance(record, list) else ""
        text = f"has no text under '{field}'; fields with text: {few(fields) or 'none'}{about}"
        return DataError(f"data.source: {where}: {text}.")
    return _encodable(value, f"{where}: '{field}'")


def _encodable(text: str, where: str) -> Item:
    try:
        text.encode()
    except UnicodeEncodeError:
        return DataError(f"data.source: {where} holds half of a surrogate pair, which is not text.")
    return text


def _gunzip(raw: BinaryIO, _: str) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]


def _unzstd(raw: BinaryIO, name: str) -> BinaryIO:
    try:
        import zstandard
    except ImportError as e:
        raise MissingDependency(f"data.source: reading {name} needs zstandard: pip install 'questctl[data]'.") from e

    def frames() -> Iterator[bytes]:  # the library's own reader does not report a truncated file
        frame, data = zstandard.ZstdDecompressor().decompressobj(), raw.read(_BLOCK)
        while data:
            yield frame.decompress(data)
            if frame.eof:
                data = frame.unused_data
                frame = zstandard.ZstdDecompressor().decompressobj()
                data = data or raw.read(_BLOCK)
            elif not (data := raw.read(_BLOCK)):
                raise EOFError("the last frame is incomplete")

    return io.BufferedReader(_Blocks(frames()), _BLOCK)


class _Blocks(io.RawIOBase):
    """An iterator of byte blocks as a readable file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._unread = blocks, b""

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the current block, or from the next one that is not empty; returns the number of bytes."""
        while not self._unread:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._unread = block
        n = min(len(buffer), len(self._unread))
        buffer[:n], self._unread = self._unread[:n], self._unread[n:]
        return n


def _zstd_errors(packed: str) -> tuple[type[Exception], ...]:
    if packed != ".zst":
        return ()
    import zstandard

    return (zstandard.ZstdError,)


DECOMPRESSORS: dict[str, Callable[[BinaryIO, str], BinaryIO]] = {".gz": _gunzip, ".zst": _unzstd}
READERS: dict[str, Reader] = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json_list, ".parquet": _parquet}  # others are text
