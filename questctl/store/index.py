"""The index of a folder of runs: values from the files of finished runs, so that a list of thousands need not read them again.

    runs/.index    the SHA-256 of the rest; JSON: for each run the stat values of its files, and the values read from them

The index is only a cache. The files are the truth: an entry is valid only while size, times and inode of each file are those at
the time of reading, and only for the same code. A file that changed in the last seconds is not entered, because the clock of a
file system may be too coarse to show a second change. An index that is missing, damaged or of other code is made anew, unless
the folder cannot be written. If several processes write it, the last one wins; all of them write correct entries.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..system import package_folder
from .files import sha256, write_bytes

NAME = ".index"
DECIDING = ("config", "quant", "store")  # the folders whose code determines the values
LEAST_NEW = 64  # new entries that are worth writing the file; or 1/SHARE_NEW of the old ones
SHARE_NEW = 50
SETTLED_NS = 2_000_000_000  # a file this old has a change time that any clock can tell from a later one

Looks = tuple[int, ...]  # size, times of content and inode, and inode of each file; zeros for one that is missing


@cache
def code() -> str:
    """A hash of the code that determines the values."""
    digest = hashlib.sha256()
    for folder in DECIDING:
        for path in sorted(package_folder(folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def looks_of(folder: str, names: Sequence[str]) -> Looks:
    """The stat values of the files of a folder."""
    looks: list[int] = []
    for name in names:
        try:
            s = os.stat(f"{folder}/{name}")
            looks += (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino)
        except OSError:
            looks += (0, 0, 0, 0)
    return tuple(looks)


class Index:
    """The index in a folder of runs, read from it; `write` brings the file up to date."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._old = self._read()
        self._kept: dict[str, list[Any]] = {}
        self._new = 0

    def _read(self) -> dict[str, list[Any]]:
        """The entries of the file; none if it is missing, damaged, or of other code."""
        try:
            digest, _, content = self.path.read_bytes().partition(b"\n")
            stored = json.loads(content) if sha256(content) == digest.decode() else {}
            return dict(stored["runs"]) if stored.get("code") == code() else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def get(self, run: str, looks: Looks) -> list[Any] | None:
        """The values of a run whose files have these stat values; None if they are not known."""
        entry = self._old.get(run)
        if entry is None or entry[0] != list(looks):
            return None
        self._kept[run] = entry
        values: list[Any] = entry[1]
        return values

    def put(self, run: str, looks: Looks, values: list[Any]) -> None:
        """Enter the values of a run. `looks` were taken before the values were read."""
        if time.time_ns() - max(looks[1::4] + looks[2::4]) > SETTLED_NS:
            self._kept[run] = [looks, values]
            self._new += 1

    def write(self) -> None:
        """Write the entries of all runs asked for so far, if the file lacks many of them and can be written."""
        if self._new >= LEAST_NEW or self._new * SHARE_NEW > len(self._old) > 0:
            content = json.dumps({"code": code(), "runs": self._kept}, separators=(",", ":")).encode()
            with suppress(OSError):
                write_bytes(self.path, f"{sha256(content)}\n".encode() + content)
