"""This process and its package: CPUs, temporary environment variables, stop signals, and the version of questctl."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

PACKAGE = Path(__file__).resolve().parent


def package_folder(name: str) -> Path:
    """The folder `name` of the package. Three are links to folders beside it, which are taken where a clone has no links."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def package_version(name: str = "questctl") -> str:
    """The version of an installed package, by default of questctl; `0+unknown` if it cannot be determined.

    If questctl is not installed, its version is read from the pyproject.toml of the source tree.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        if name != "questctl":
            return "0+unknown"
        import tomllib

        try:
            project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        except (OSError, tomllib.TOMLDecodeError, KeyError):
            return "0+unknown"
        return str(project["version"])


# Waiting threads should sleep, not spin. OpenMP reads this variable when torch loads OpenMP, so every process that will load
# torch needs it before. On cores shared with other programs, a step of 53K W4A4 takes 300 ms with two spinning threads, 50 ms
# with two sleeping ones, and 45 ms with one thread.
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "passive"}


def wait_passively() -> None:
    """Let waiting OpenMP threads of this process and of those that it starts sleep, unless the user has set this."""
    for name, value in PASSIVE_WAITING.items():
        os.environ.setdefault(name, value)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Ctrl-C, a scheduler, a lost terminal, SLURM


def watched_signals() -> tuple[signal.Signals, ...]:
    """The STOP_SIGNALS, without SIGHUP if it is ignored: under `nohup` a run must outlive its terminal."""
    return tuple(s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN)


@contextmanager
def temporary_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the duration of a `with` block, and restore their values afterwards.

    Modules imported and processes started inside the block see the new values.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def cpu_count(root: Path = Path("/")) -> int:
    """The number of CPUs that this process may use, at least 1.

    It is the least of the CPUs in its affinity mask, the CPU quotas of its control groups (rounded up), and the CPUs of its
    SLURM task (`SLURM_CPUS_PER_TASK`). A container that is limited to two CPUs of a large machine has two. `root` is the folder
    in which /proc and /sys are looked up.
    """
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    limits += [math.ceil(quota) for quota in _cgroup_quotas(root)]
    if (task := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal() and int(task):
        limits.append(int(task))
    return max(1, min(limits))


class OtherWork:
    """The work of other programs on the CPUs of this process, from the creation of this object on."""

    LEAST_S = 0.2  # the kernel counts in hundredths of a second

    def __init__(self) -> None:
        self._begin = self._read()

    def cpus(self) -> float:
        """The mean number of these CPUs that other programs kept busy; waits until at least `LEAST_S` have passed."""
        busy, own, clock = self._begin
        time.sleep(max(0.0, self.LEAST_S - (time.perf_counter() - clock)))
        now = self._read()
        return max(0.0, (now[0] - busy - (now[1] - own)) / (now[2] - clock))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Busy seconds of these CPUs, CPU seconds of this process and its ended children, and the clock, in seconds."""
        import psutil

        mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        busy = 0.0
        for number, cpu in enumerate(psutil.cpu_times(percpu=True)):
            if mine is None or number in mine:
                busy += sum(cpu) - cpu.idle - getattr(cpu, "iowait", 0.0) - getattr(cpu, "guest", 0.0)
        return busy, sum(os.times()[:4]), time.perf_counter()


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in CPUs, of the control groups of this process and of the groups that contain these.

    Lines of /proc/self/cgroup are `id:controllers:path`. Version 2 names no controllers and has one file, `cpu.max`; version 1
    has a tree for each set of controllers. In a container the path may be that of the host, which cannot be seen from inside;
    the top of the tree is then the container's own group.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            inside = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
            for tree in (controllers, "cpu") if controllers else (".", "unified"):
                for depth in range(len(inside) + 1):
                    yield from _quota(root.joinpath("sys/fs/cgroup", tree, *inside[:depth]))


def _quota(group: Path) -> Iterator[float]:
    """The CPU quota of one control group, if it has one: microseconds of CPU time per period."""
    with suppress(OSError, ValueError):  # no such file, or "max": unlimited
        quota, period = map(int, (group / "cpu.max").read_text().split())
        yield quota / period
    with suppress(OSError, ValueError):
        quota = int((group / "cpu.cfs_quota_us").read_text())
        if quota > 0:  # -1: unlimited
            yield quota / int((group / "cpu.cfs_period_us").read_text())


def hub_answers() -> bool:
    """Whether the Hugging Face Hub may be reachable. Without it, a look-up that must fail is retried for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    import urllib.request

    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname, 443)
    except OSError:
        return False
    return True
