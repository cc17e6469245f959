"""The index of a folder of runs: what the files of finished runs say, so that a list of thousands need not read them again.

    runs/.index    the SHA-256 of what follows; JSON: for each run the looks of its files, and the values read from them

It is a cache and nothing else. The files are the truth: an entry counts only while size, times and inode of each file are those
at which it was read, by the same code. A file that changed in the last seconds is not entered, because the clock of a file
system may be too coarse to show a second change. An index that is missing, damaged or of other code is made anew; one that
cannot be written is not. Of several processes that write it the last one wins, and each of them wrote what is true.
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
DECIDING = ("config", "quant", "store")  # the folders whose code decides what is entered
LEAST_NEW = 64  # entries that are worth writing the file, or one in SHARE_NEW of those that it has
SHARE_NEW = 50
SETTLED_NS = 2_000_000_000  # since its last change a file is older than the steps of any clock

Looks = tuple[int, ...]  # size, times of content and inode, and inode of each file; zeros for one that is missing


@cache
def code() -> str:
    """A hash of the code that decides what is entered."""
    digest = hashlib.sha256()
    for folder in DECIDING:
        for path in sorted(package_folder(folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def looks_of(folder: str, names: Sequence[str]) -> Looks:
    """How the files of a folder look."""
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
        """The values of a run whose files look so; None if they are not known."""
        entry = self._old.get(run)
        if entry is None or entry[0] != list(looks):
            return None
        self._kept[run] = entry
        values: list[Any] = entry[1]
        return values

    def put(self, run: str, looks: Looks, values: list[Any]) -> None:
        """Enter the values of a run, which were read after its files looked so."""
        if time.time_ns() - max(looks[1::4] + looks[2::4]) > SETTLED_NS:
            self._kept[run] = [looks, values]
            self._new += 1

    def write(self) -> None:
        """Replace the file by the entries of the runs that were asked for, if it lacks many of them and can be written."""
        if self._new >= LEAST_NEW or self._new * SHARE_NEW > len(self._old) > 0:
            content = json.dumps({"code": code(), "runs": self._kept}, separators=(",", ":")).encode()
            with suppress(OSError):
                write_bytes(self.path, f"{sha256(content)}\n".encode() + content)
