"""Leases: the exclusive right to write into a run folder, held by a file with a heartbeat, which expires with its process.

    claim      the complete record is hard-linked to the lease's name (or created with O_EXCL where links are not supported),
               so that the file system decides which of several processes succeeds
    heartbeat  a thread renews the mtime of its own file every `stale_after / 4` seconds: one operation, on the open file;
               beside many others every `stale_after / 3`
    stale      the holder's process has ended (detected at once on the same machine), or the mtime is older than `stale_after`
               seconds by the clock of the file system
    takeover   a process claims `<lease>.after.<hash of the stale record>` and renames it to the lease, so that a stale holder
               has only one successor

A holder that was suspended, or whose machine slept, may continue after a takeover. It must therefore call `check()` before
every write: the lease then has another token, and `LeaseLost` ends the old holder before it disturbs its successor. Leases need
only exclusive creation and atomic rename. File locks are not used, because they do not work on many cluster file systems.
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
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import RunFailed, UsageError

STALE_AFTER_S = 60.0
MANY = 16  # with more other writers on the file system, a holder makes fewer writes


class LeaseHeld(UsageError):
    """Another live process holds the lease."""


class LeaseLost(RunFailed):
    """The lease was taken over or removed while this process was suspended; the process must not write any more."""


@dataclass(frozen=True)
class Holder:
    """The holder of a lease, which is the content of the file."""

    token: str  # different for every claim
    host: str  # for messages
    machine: str  # host name, boot and process namespace, within which `pid` and `started` are valid
    pid: int
    started: str  # start time of the process, because a pid may be reused
    since: str = ""  # when the lease was asked for, ISO 8601 in UTC by the holder's clock; empty in leases of version 0.1

    @classmethod
    def me(cls) -> Holder:
        """This process, with a new token."""
        token, since = secrets.token_hex(8), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(token, socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()) or "", since)

    def is_dead(self) -> bool:
        """Whether the process certainly does not exist any more: on this machine, its pid is free or has another start time."""
        return self.machine == _machine() and _start_of(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def read_holder(path: Path) -> Holder | None:
    """The holder of the lease at `path`; None if there is no file, or if its record is not complete yet."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def is_live(path: Path, stale_after: float = STALE_AFTER_S) -> bool:
    """Whether the lease at `path` exists and is not stale. For listings: it changes nothing and trusts the local clock."""
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    holder = read_holder(path)
    return not (holder and holder.is_dead()) and age <= stale_after


class Lease:
    """A claim on the lease file `path`, held from `claim()` to `release()` or within a `with` block.

    A holder without a heartbeat for `stale_after` seconds may be replaced. `beside` is the number of other writers on the same
    file system, as far as is known; a writer may then write less often.
    """

    def __init__(self, path: Path, *, stale_after: float = STALE_AFTER_S, beside: int = 0) -> None:
        self.path, self.stale_after, self.beside = path, stale_after, beside
        self.holder = Holder.me()
        self._record = json.dumps(asdict(self.holder)).encode()
        self._released, self._beating = threading.Event(), threading.Lock()
        self._file = -1

    def claim(self) -> Self:
        """Take the lease. Raises LeaseHeld if a live process holds it, and OSError if the folder cannot be written."""
        while not self._create(self.path) and not self._take_over():
            pass  # the lease was released between the two calls; try again
        self._file = self._open()
        threading.Thread(target=self._beat, name=f"lease {self.path.parent.name}", daemon=True).start()
        return self

    def is_mine(self) -> bool:
        """Whether the file still has this claim's token. Raises OSError if it cannot be read."""
        try:
            return self.path.read_bytes() == self._record
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raise LeaseLost if another process has taken over. To be called before every write."""
        if not self.is_mine():
            holder = read_holder(self.path) or "another process"
            raise LeaseLost(f"{self.path.parent}: {holder} took this run over while this process was suspended.")

    def release(self) -> None:
        """Give the lease up. A lease that was lost is left to its new holder."""
        self._released.set()
        with self._beating:
            if self._file >= 0:
                os.close(self._file)
            self._file = -1
        if self.is_mine():
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.claim()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _create(self, path: Path) -> bool:
        """Create `path` with this holder's complete record; False if it exists."""
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
        """`_create` without hard links. A kill before the write leaves an empty record, which becomes stale by its age."""
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
        """Replace a stale holder; False if the lease was released meanwhile. Raises LeaseHeld if the holder is alive.

        The marker excludes other processes that found the same holder stale. A successor that died with the marker is replaced
        in turn. Should two processes do so at once, the later rename wins, and the other learns of it at its next `check()`.
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
        with suppress(FileNotFoundError):  # another process replaced the same holder and has finished already
            if self.path.read_bytes() == old:
                os.replace(marker, self.path)
                return True
        marker.unlink(missing_ok=True)
        return False

    def _require_stale(self, path: Path) -> bytes | None:
        """The record in `path` if its holder is stale; None if there is no file. Raises LeaseHeld if the holder is alive."""
        try:
            record, beat = path.read_bytes(), path.stat().st_mtime
        except FileNotFoundError:
            return None
        holder = read_holder(path)
        if (holder and holder.is_dead()) or self._file_system_time() - beat > self.stale_after:
            return record
        raise LeaseHeld(self._held(path))

    def _held(self, path: Path) -> str:
        """The sentence of LeaseHeld. Of a holder on another machine only its last heartbeat is known."""
        holder = read_holder(path)
        since = f" since {_minute(datetime.fromisoformat(holder.since))}" if holder and holder.since else ""
        sentence = f"{self.path.parent}: {holder or 'another process'} is working on this run{since}"
        if holder and holder.machine == _machine():
            return f"{sentence}; wait for it, or stop it first."
        try:
            beat = path.stat().st_mtime
        except OSError:  # released meanwhile
            return f"{sentence}; wait for it."
        ago, until = self._file_system_time() - beat, datetime.fromtimestamp(beat + self.stale_after, UTC)
        return (
            f"{sentence}; its last sign of life is {max(0.0, ago):.0f} s old, and without another until {until:%H:%M:%S} UTC "
            "the run is free. Wait for it, or stop it first."
        )

    def _file_system_time(self) -> float:
        """The time by the clock that sets mtimes, which for a network file system is the server's."""
        probe = self._temporary()
        try:
            with probe.open("wb") as f:
                return os.fstat(f.fileno()).st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _open(self) -> int:
        """A descriptor of this claim's file, which a successor's file does not change; -1 if it is replaced already."""
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1
        if os.read(file, len(self._record) + 1) == self._record:
            return file
        os.close(file)
        return -1

    def _beat(self) -> None:
        while not self._released.wait(self.stale_after / (3 if self.beside > MANY else 4)):
            with self._beating, suppress(OSError):  # a transient error of the file system; the next heartbeat tries again
                if self._file < 0:
                    self._file = self._open()
                if self._file >= 0:
                    os.utime(self._file)


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _machine() -> str:
    """The name of the space in which process ids are unique: host, boot and process namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _start_of(pid: int) -> str | None:
    """The start time of process `pid`, in a unit of this system; None if the process does not exist or is a zombie."""
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
