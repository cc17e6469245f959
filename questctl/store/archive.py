"""The archive of a folder of runs: finished runs in one file, which is read with the methods of a path.

    runs/archive.zip    <run>/<file> for each file of each run, and <run>/SHA256SUMS, the hashes of its files

A folder of runs has one archive at most. It is a zip file, so any unpacker opens it, and `sha256sum -c` checks what it unpacks.
Weights are stored as they are, everything else is deflated. `ArchivedPath` stands for a file or a folder in an archive. A `Run`
at such a path is read like one in a folder; an attempt to write raises the error of a read-only file system.

packing.py changes archives.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import IO, Any

from ..errors import DataError
from .files import copied

ARCHIVE = "archive.zip"
SUFFIX = ".zip"
SUMS = "SHA256SUMS"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")  # of a run
REMEDY = "put a copy in its place, or move it out of the folder of runs"
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OverflowError)  # what zipfile raises for it


class Archive:
    """An archive that is open for reading; `files` and `folders` have paths in it as keys, `runs` the names of its runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.mtime = path, path.stat().st_mtime
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGE as e:
            raise DataError(f"{path}: is damaged ({str(e).rstrip('.')}); {REMEDY}.") from e
        self.files = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}
        self.folders: dict[str, list[str]] = {"": []}  # folder → names of its entries
        for inner in self.files:
            parts = inner.split("/")
            if len(parts) < 2 or not NAME.fullmatch(parts[0]) or not all(part.strip(".") for part in parts):
                raise DataError(f"{path}: is no archive of runs (it holds {inner!r}); {REMEDY}.")
            for i, part in enumerate(parts):
                names = self.folders.setdefault("/".join(parts[:i]), [])
                if i == len(parts) - 1 or "/".join(parts[: i + 1]) not in self.folders:
                    names.append(part)
        self.runs = frozenset(name for name in self.folders[""] if f"{name}/{SUMS}" in self.files)

    def files_of(self, folder: str) -> Iterator[str]:
        """The files in a folder and in those below it."""
        for name in self.folders.get(folder, ()):
            inner = f"{folder}/{name}"
            if inner in self.files:
                yield inner
            else:
                yield from self.files_of(inner)

    def read(self, inner: str) -> bytes:
        """The content of a file, checked by its CRC. Raises DataError if it is damaged, FileNotFoundError if it is absent."""
        content = io.BytesIO()
        self.copy(inner, content)
        return content.getvalue()

    def copy(self, inner: str, target: IO[bytes] | None = None) -> str:
        """Write the content of a file to `target`; its SHA-256. Raises what `read` raises."""
        if (info := self.files.get(inner)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.path}/{inner}")
        try:
            with self._zip.open(info) as source:
                return copied(source, target)
        except DAMAGE as e:
            raise DataError(f"{self.path}/{inner}: is damaged ({str(e).rstrip('.')}); {REMEDY}.") from e


def open_archive(path: Path) -> Archive:
    """The archive at `path`, read again only after the file has changed. Raises DataError if it is damaged, or OSError."""
    status = path.stat()
    return _opened(str(path), status.st_size, status.st_mtime_ns, status.st_ino, os.getpid())


@lru_cache(maxsize=8)  # after a fork the file is opened anew, because two processes would share its position
def _opened(path: str, *_: int) -> Archive:
    return Archive(Path(path))


def is_archive(path: Path) -> bool:
    """Whether `path` is to be read as an archive: a file whose name ends in .zip."""
    return path.suffix == SUFFIX and path.is_file()


def located(path: Path | str) -> Path:
    """A path, as an `ArchivedPath` where one of the folders in it is an archive."""
    if isinstance(path, ArchivedPath) or f"{SUFFIX}/" not in str(path):
        return Path(path) if isinstance(path, str) else path
    inner = ArchivedPath(path)
    return inner if is_archive(inner.archive) else Path(path)


class ArchivedPath(PosixPath):
    """A file or a folder in an archive: `<archive>/<run>/<file>`. It is read as any path; all else raises OSError (EROFS)."""

    def _place(self) -> tuple[Archive, str]:
        file, _, inner = f"{self}/".rpartition(f"{SUFFIX}/")
        return open_archive(Path(file + SUFFIX)), inner.rstrip("/")

    @property
    def archive(self) -> Path:
        """The file of the archive."""
        return Path(f"{self}/".rpartition(f"{SUFFIX}/")[0] + SUFFIX)

    def __fspath__(self) -> str:
        """Raise OSError: there is no such file for the operating system."""
        raise self._read_only()

    def _read_only(self) -> OSError:
        return OSError(errno.EROFS, "the run is in an archive (questctl runs restore takes it out)", str(self))

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Kind and size, and the time of the archive. Raises FileNotFoundError."""
        archive, inner = self._place()
        if (info := archive.files.get(inner)) is not None:
            mode, size = stat.S_IFREG | 0o444, info.file_size
        elif inner in archive.folders:
            mode, size = stat.S_IFDIR | 0o555, 0
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return os.stat_result((mode, 0, 0, 1, 0, 0, size, archive.mtime, archive.mtime, archive.mtime))

    def _is(self, kind: str) -> bool:
        try:
            archive, inner = self._place()
        except FileNotFoundError:
            return False
        return inner in (archive.files if kind == "file" else archive.folders)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether the archive contains it."""
        return self._is("file") or self._is("folder")

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a file."""
        return self._is("file")

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a folder."""
        return self._is("folder")

    def read_bytes(self) -> bytes:
        """The content. Raises FileNotFoundError, or DataError if it is damaged."""
        archive, inner = self._place()
        return archive.read(inner)

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        """The content as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """The content as a file to be read. Raises OSError for a mode that writes."""
        if set(mode) & set("wax+"):
            raise self._read_only()
        return io.BytesIO(self.read_bytes()) if "b" in mode else io.StringIO(self.read_text(encoding="utf-8"))

    def iterdir(self) -> Iterator[ArchivedPath]:  # type: ignore[override]
        """The entries of the folder."""
        archive, inner = self._place()
        return (self / name for name in archive.folders.get(inner, ()))

    def rglob(self, pattern: str, **_: Any) -> Iterator[ArchivedPath]:  # type: ignore[override]
        """The files and folders below this one whose names match."""
        for path in self.iterdir():
            if fnmatchcase(path.name, pattern):
                yield path
            if path.is_dir():
                yield from path.rglob(pattern)
