"""Readers of text, JSON-lines and Parquet files, chosen by the file's suffix. A reader is one function and one `READERS` entry.

    .jsonl .ndjson        each line is a JSON object with the text in a field; compressed also as .json.gz, .json.zst
    .parquet              each row has the text in a column
    anything else         UTF-8 text, cut at line ends into parts of about 64 KiB
    … .gz .zst            text or JSON lines, compressed; decompressed as a stream

A reader yields items in the order of the file: a document, or the `DataError` that says why a line is not a document. To resume
an interrupted preparation, a reader skips the first `start` items without parsing them.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError, MissingDependency

PART_BYTES = 64 * 1024  # so that no single file dominates the validation text: at most about a tenth of pystdlib's
_BLOCK = 1 << 17  # bytes read at a time from a compressed file
ROWS = 256  # decoded at a time from a Parquet file

Item = str | DataError
Reader = Callable[[BinaryIO, str, str, int], Iterator[Item]]  # (stream, its name in messages, field, items to skip)


def read(path: Path, raw: BinaryIO, field: str, start: int = 0) -> Iterator[Item]:
    """Yield the items of the file `path`, opened as `raw`, without the first `start`.

    If a file cannot be read beyond some place (it is not UTF-8, was cut off, or is not a Parquet file), its last item is the
    error that says so. Raises OSError, and MissingDependency if the library that a format needs is not installed.
    """
    packed = path.suffix if path.suffix in DECOMPRESSORS else ""
    suffix = path.with_suffix("").suffix if packed else path.suffix
    suffix = ".jsonl" if packed and suffix == ".json" else suffix  # C4's files are called .json.gz
    stream = DECOMPRESSORS[packed](raw, str(path)) if packed else raw
    broken: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, *_zstd_errors(packed))
    try:
        yield from READERS.get(suffix, _text)(stream, str(path), field, start)
    except broken as e:
        yield DataError(f"data.source: {path} is damaged or cut off: {e}.")


def _text(stream: BinaryIO, name: str, _: str, start: int) -> Iterator[Item]:
    yield from islice(_parts(stream, name), start, None)


def _parts(stream: BinaryIO, name: str) -> Iterator[Item]:
    at = 0
    while part := stream.read(PART_BYTES):
        part += stream.readline()
        try:
            yield part.decode()
        except UnicodeDecodeError as e:
            why = f"is not UTF-8 text (byte 0x{part[e.start]:02x} at {at + e.start:,}); file: reads text, .jsonl and .parquet"
            yield DataError(f"data.source: {name} {why}.")
            return
        at += len(part)


def _jsonl(stream: BinaryIO, name: str, field: str, start: int) -> Iterator[Item]:
    for number, line in islice(((n, line) for n, line in enumerate(stream, 1) if line.strip()), start, None):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            yield DataError(f"data.source: {name}, line {number}: is not JSON: {e}.")
            continue
        yield text_of(record, field, f"{name}, line {number}")


def _parquet(stream: BinaryIO, name: str, field: str, start: int) -> Iterator[Item]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise MissingDependency(f"data.source: reading {name} needs pyarrow: pip install 'questctl[data]'.") from e
    try:
        file = ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        names = file.schema_arrow.names
        columns = [field] if field in names else None  # all columns if it is missing: the error names those that hold text
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


def text_of(record: Any, field: str, where: str) -> Item:
    """The text of a record in `field`, which may be dotted (`meta.text`), or the error that says why there is none."""
    value = record.get(field) if isinstance(record, dict) else None
    if value is None and "." in field:
        value = record
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        fields = [k for k, v in record.items() if isinstance(v, str)] if isinstance(record, dict) else []
        return DataError(f"data.source: {where}: has no text under '{field}'; fields with text: {', '.join(fields) or 'none'}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        return DataError(f"data.source: {where}: '{field}' holds half of a surrogate pair, which is not text.")
    return value


def _gunzip(raw: BinaryIO, _: str) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]


def _unzstd(raw: BinaryIO, name: str) -> BinaryIO:
    try:
        import zstandard
    except ImportError as e:
        raise MissingDependency(f"data.source: reading {name} needs zstandard: pip install 'questctl[data]'.") from e

    def frames() -> Iterator[bytes]:  # not the library's own reader, which does not report a file that was cut off
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
READERS: dict[str, Reader] = {".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}  # anything else is text
