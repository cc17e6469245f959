"""Reading and writing of files that must survive a kill, a full disk and a crash.

A small file is replaced atomically: it is written to a temporary file beside it, synced and renamed, and the folder is synced,
so that no reader sees half of it. A sealed JSON file contains the SHA-256 of its content, which is verified on reading. A line
is appended to a log in one write. Text after the last newline is a line that was not finished, and readers ignore it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, StorageError
from ..metrics import STEP

BLOCK = 1 << 20  # bytes that are copied at a time


def now() -> str:
    """The current time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def sha256(data: bytes) -> str:
    """The SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def copied(source: IO[bytes], target: IO[bytes] | None = None) -> str:
    """Write the rest of `source` to `target`, if given, block by block; returns its SHA-256."""
    digest = hashlib.sha256()
    while block := source.read(BLOCK):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()


@contextmanager
def storage_errors(path: Path, verb: str) -> Iterator[None]:
    """Turn an OSError in the `with` block into a StorageError that says that `path` cannot be `verb` (such as "written")."""
    try:
        yield
    except StorageError:
        raise
    except OSError as e:
        raise StorageError(f"{path}: cannot be {verb}: {e.strerror or e}.") from e


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of `path` atomically and durably. Raises StorageError, after which the old content is intact."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with storage_errors(path, "written"):
        try:
            with temporary.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names of files in `folder` to the disk, so that renames survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Replace the content of `path` by indented JSON, atomically and durably. Raises StorageError."""
    write_bytes(path, _json(value).encode())


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` of the object and its SHA-256 under the key `seal`, which `read_json` verifies and removes."""
    write_bytes(path, sealed(value).encode())


def sealed(value: Mapping[str, Any]) -> str:
    """The text that `write_sealed` writes."""
    return _json({**value, "seal": _seal(value)})


def _seal(value: Mapping[str, Any]) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, verified if it is sealed. Files of early versions are not sealed.

    Raises DataError, which names the file and the `remedy`, if the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise DataError(f"{path}: is missing; {remedy}.") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}.") from e
    except ValueError as e:  # not JSON, or not UTF-8
        raise DataError(f"{path}: is damaged ({e}); {remedy}.") from e
    if not isinstance(value, dict):
        raise DataError(f"{path}: is damaged (not a JSON object); {remedy}.")
    seal = value.pop("seal", None)
    if seal is not None and seal != _seal(value):
        raise DataError(f"{path}: is damaged, or was edited (its hash differs); {remedy}.")
    return value


def append_line(path: Path, value: Mapping[str, Any]) -> bytes:
    """Append a JSON object as a line, in one write; returns the line. Raises StorageError."""
    return append_lines(path, [value])


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> bytes:
    """Append JSON objects as lines, in one write; returns the lines. Raises StorageError."""
    lines = b"".join(json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n" for value in values)
    with storage_errors(path, "written"):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(fd, lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # only a part was written
        finally:
            os.close(fd)
    return lines


def read_lines(path: Path, remedy: str, *, key: str = STEP) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, each of which must have `key`; empty if the file does not exist.

    Raises DataError, which names the line and the `remedy`, if a line is damaged.
    """
    return [value for _, value in _parsed_lines(path, remedy, key)]


def lines_before(path: Path, step: int, remedy: str) -> bytes:
    """The lines of a file of JSON lines whose key `step` is less than `step`, as bytes. Raises DataError as `read_lines`."""
    return b"".join(line + b"\n" for line, value in _parsed_lines(path, remedy, STEP) if value[STEP] < step)


def _parsed_lines(path: Path, remedy: str, key: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for i, line in enumerate(lines[:-1], start=1):  # text after the last newline is an unfinished line
        try:
            value = json.loads(line)
            value[key]
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path}: line {i} is damaged; {remedy}.") from e
        yield line, value


def last_line(path: Path) -> dict[str, Any]:
    """The object in the last complete line of a file of JSON lines, read from its end; empty if there is none."""
    with suppress(FileNotFoundError), path.open("rb") as f:
        end, length = f.seek(0, os.SEEK_END), 8192
        while True:
            f.seek(max(0, end - length))
            for line in reversed(f.read().split(b"\n")):
                with suppress(ValueError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        return value
            if length >= end:
                break
            length *= 8  # the line is longer than expected, as with many layers
    return {}
