"""The files of a source: which files a folder holds, their sizes, and a fingerprint that changes when they change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import DataError

CONTENT_LIMIT = 100_000_000  # bytes up to which a corpus is identified by its content; hashing more would take too long


def fingerprint(files: Iterable[tuple[str, Path]], *, lenient: bool = False) -> str:
    """A SHA-256 (hex) that changes when the files change.

    It covers the names and contents of the files or, if they have more than `CONTENT_LIMIT` bytes together, their names, paths,
    sizes and modification times. Raises DataError if a file cannot be read, unless `lenient`.
    """
    files = list(files)
    by_content = sum(file_size(path) for _, path in files) <= CONTENT_LIMIT
    h = hashlib.sha256()
    for name, path in files:
        try:
            stat = path.stat()
            content = path.read_bytes() if by_content else f"{path.resolve()} {stat.st_mtime_ns}".encode()
            h.update(f"{name}\0{stat.st_size}\0".encode(errors="surrogateescape") + content)
        except OSError as e:
            if not lenient:
                raise unreadable(path, e) from e
            h.update(f"{name}\0unreadable".encode(errors="surrogateescape"))
    return h.hexdigest()


def visible_files(root: Path) -> list[tuple[str, Path]]:
    """All files below `root` with their names relative to it, sorted; files and folders that begin with a dot are excluded."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        paths += [Path(folder, f) for f in files if not f.startswith(".")]
    return sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())


def unreadable(path: Path, e: OSError) -> DataError:
    """The error for a source file that cannot be read."""
    return DataError(f"data.source: {path} cannot be read: {e.strerror}.")


def file_size(path: Path) -> int:
    """The size of a file in bytes; 0 if it is not accessible, because reading it will raise the error."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
