"""The right to write into one run folder: a file that names its holder and beats, and that one other process may take over.

    claim      the whole record, linked to the lease's name (O_EXCL where there are no links): the file system picks the winner
    heartbeat  a thread renews the file's mtime every `stale_after / 4` seconds
    stale      its process is gone (same machine: at once), or its mtime is older than `stale_after` by the file system's clock
    takeover   the same on `<lease>.after.<hash of the stale record>`, then rename onto the lease: one successor per holder

A holder that was stopped, or whose machine slept, may come back after a takeover. It must ask `check()` before every write; the
lease then carries another token, and `LeaseLost` ends it before it disturbs its successor. No lock of the file system is needed
(many cluster file systems have none that works), only exclusive creation and atomic rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import RunFailed, UsageError

STALE_AFTER_S = 60.0


class LeaseHeld(UsageError):
    """Another live process holds the lease."""


class LeaseLost(RunFailed):
    """The lease was taken over or removed while this process slept; it must not write any more."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: the content of the file."""

    token: str  # of this one claim
    host: str  # for people
    machine: str  # host name, boot and process namespace: where `pid` and `started` mean something
    pid: int
    started: str  # start of the process, so that a reused pid is not mistaken for it

    @classmethod
    def me(cls) -> Holder:
        """This process, with a fresh token."""
        return cls(secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()) or "")

    def is_dead(self) -> bool:
        """True only if the process certainly no longer exists: same machine, and no such pid or another start time."""
        return self.machine == _machine() and _start_of(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def read_holder(path: Path) -> Holder | None:
    """The holder that the lease file names; None if there is no file, or nothing readable in it (yet)."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def is_live(path: Path, stale_after: float = STALE_AFTER_S) -> bool:
    """True if the lease file exists and is not stale. Looks only; for listings, so the local clock is good enough."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    holder = read_holder(path)
    return not (holder and holder.is_dead()) and age <= stale_after


class Lease:
    """A claim on `path`, held from `claim()` to `release()`; also a context manager. `stale_after` in seconds."""

    def __init__(self, path: Path, *, stale_after: float = STALE_AFTER_S) -> None:
        self.path, self.stale_after = path, stale_after
        self.holder = Holder.me()
        self._record = json.dumps(asdict(self.holder)).encode()
        self._released = threading.Event()

    def claim(self) -> Self:
        """Take the lease. Raises LeaseHeld if a live process has it, OSError if the folder cannot be written."""
        while not self._create(self.path) and not self._take_over():
            pass  # it was released between the two; try again
        threading.Thread(target=self._beat, name=f"lease {self.path.parent.name}", daemon=True).start()
        return self

    def is_mine(self) -> bool:
        """True while the file still carries this claim's token. Raises OSError if it cannot be read."""
        try:
            return self.path.read_bytes() == self._record
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises LeaseLost if another process has taken over; call it before every write."""
        if not self.is_mine():
            now = read_holder(self.path) or "another process"
            raise LeaseLost(f"{self.path.parent}: {now} took this run over while this process stood still; it goes on there.")

    def release(self) -> None:
        """Give the lease back; a lost one is left to its new holder."""
        self._released.set()
        if self.is_mine():
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.claim()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _create(self, path: Path) -> bool:
        """Create `path` with this holder's record, whole at once; False if it exists."""
        temporary = self._temporary()
        try:
            temporary.write_bytes(self._record)
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOTDIR):
                raise
            return self._create_without_links(path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_without_links(self, path: Path) -> bool:
        """As `_create`; a kill between the two calls leaves an empty record, which counts by age alone."""
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(fd, self._record)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return True

    def _temporary(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{self.holder.token}.tmp")

    def _take_over(self) -> bool:
        """Succeed the present holder if it is stale; False if there is none any more. Raises LeaseHeld if it is alive.

        The marker excludes all others who judged the same holder stale. A successor that died holding it is itself succeeded;
        should two do that at once, the later rename wins and the other learns it at its next `check()`.
        """
        old = self._require_stale(self.path)
        if old is None:
            return False
        marker = self.path.with_name(f"{self.path.name}.after.{hashlib.sha256(old).hexdigest()[:16]}")
        if not self._create(marker):
            if self._require_stale(marker) is not None:
                marker.unlink(missing_ok=True)
            if not self._create(marker):
                raise LeaseHeld(self._held(marker))
        with suppress(FileNotFoundError):  # another has succeeded the same holder, and is done already
            if self.path.read_bytes() == old:
                os.replace(marker, self.path)
                return True
        marker.unlink(missing_ok=True)
        return False

    def _require_stale(self, path: Path) -> bytes | None:
        """The record in `path` if its holder is stale, None if the file is gone. Raises LeaseHeld if the holder is alive."""
        try:
            record, beat = path.read_bytes(), path.stat().st_mtime
        except FileNotFoundError:
            return None
        holder = read_holder(path)
        if (holder and holder.is_dead()) or self._now_there() - beat > self.stale_after:
            return record
        raise LeaseHeld(self._held(path))

    def _held(self, path: Path) -> str:
        who = read_holder(path)
        return f"{self.path.parent}: {who or 'another process'} is working on this run; wait for it, or stop it first."

    def _now_there(self) -> float:
        """The time by the clock that stamps mtimes, which on a network file system is not this machine's."""
        probe = self._temporary()
        try:
            with probe.open("wb") as f:
                return os.fstat(f.fileno()).st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(self.stale_after / 4):
            with suppress(OSError):  # a hiccup of the file system; the next beat tries again
                if not self.is_mine():
                    return
                os.utime(self.path)


def _machine() -> str:
    """Name of the space in which process ids are unique until the next boot."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _start_of(pid: int) -> str | None:
    """When process `pid` started, in whatever unit the machine counts; None if it does not exist or is a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # proc(5): state is 3, starttime 22
        return None if state in "ZX" else fields[18]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.NoSuchProcess:
        return None
