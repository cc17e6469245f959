"""Where runs can be put: the GPUs that this process may use, its cores and memory, and how several runs share one device.

    slots = GPUs × runs a GPU,  or runs at a time on the CPU;  cores are divided evenly among the slots

Runs beside each other hold a shared lock on their device. A run that ran out of memory there takes it once alone: it waits at
the door, behind which nobody else enters, until the others have left. The locks belong to processes and vanish with them; who
leaves last removes their files.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TextIO

from ..errors import UsageError
from ..system import cpu_count
from .costs import memory_bytes, sized
from .sweep_file import Cell

LAPTOP_PARAMETERS = 5_000_000  # up to this size two one-thread runs beat one run with two threads
CUDA_CONTEXT_BYTES = 2**30  # a process on a GPU takes 0.4 to 0.8 GiB before its first tensor
FILL = 0.85  # of a GPU's memory, since the estimate leaves out workspaces and what the allocator cuts off
CORES_A_RUN = 2  # on a GPU one thread launches kernels, and one is for all else

JobsPerGPU = int | Literal["auto"]


@dataclass(frozen=True)
class GPU:
    """A GPU as CUDA_VISIBLE_DEVICES calls it; `memory` in bytes, 0 where nobody says."""

    id: str
    name: str
    memory: int


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time. `gpu` goes into CUDA_VISIBLE_DEVICES (None: it stays as it is)."""

    gpu: str | None = None
    beside: int = 1  # slots on this device, this one included


def host_memory() -> int:
    """Bytes of memory of this machine, or of its control group."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max", or no such file
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def gpus() -> list[GPU]:
    """The NVIDIA GPUs that this process may use, asked of nvidia-smi, without torch and without a context on any of them."""
    known = _nvidia_smi()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [gpu for _, gpu in known]
    found = []
    for word in visible.split(","):
        if not known or not word.strip() or word.strip() in ("-1", "NoDevFiles"):
            break  # CUDA ignores what follows an invalid entry
        named = [gpu for uuid, gpu in known if word.strip() in (gpu.id, uuid) or uuid.startswith(f"{word.strip()}-")]
        found.append(GPU(word.strip(), named[0].name if named else "GPU", named[0].memory if named else 0))
    return found


@cache
def _nvidia_smi() -> list[tuple[str, GPU]]:
    """(uuid, GPU) of every GPU of this machine."""
    words = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits")
    try:
        lines = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        rows = [[part.strip() for part in line.split(",", 3)] for line in lines]
        return [(uuid, GPU(index, name, int(mib) * 2**20)) for index, uuid, mib, name in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def slots(cells: Sequence[Cell], jobs: int = 0, jobs_per_gpu: JobsPerGPU = 1) -> list[Slot]:
    """The slots of this machine for `cells`; `jobs` is their number (0: `jobs_per_gpu` on every GPU; without GPUs or where all
    cells stay on the CPU, one a core if all are of laptop size, else one).

    `jobs_per_gpu` "auto": as many as fit by `memory_bytes` of the largest cell, with two cores for each.
    """
    wanted = {c.config.train.device for c in cells}
    devices = gpus() if wanted != {"cpu"} else []
    if not devices:
        small = all(c.config.model.params_non_embedding <= LAPTOP_PARAMETERS for c in cells)
        n = jobs or (cpu_count() if small else 1)
        return [Slot(None, n)] * n
    if any(":" in device for device in wanted):  # the sweep file says itself which GPU a run takes
        n = jobs or 1
        return [Slot(None, n)] * n
    n = jobs or len(devices) * (_fitting(cells, devices) if jobs_per_gpu == "auto" else jobs_per_gpu)
    on = [devices[i % len(devices)].id for i in range(n)]
    return [Slot(gpu, on.count(gpu)) for gpu in on]


def _fitting(cells: Sequence[Cell], devices: Sequence[GPU]) -> int:
    """How many of the largest cell fit on the smallest GPU, at least one."""
    need = max(map(memory_bytes, sized(cells)), default=0) + CUDA_CONTEXT_BYTES
    by_memory = int(FILL * min(gpu.memory for gpu in devices) / need)
    return max(1, min(by_memory, cpu_count() // CORES_A_RUN // len(devices)))


@contextmanager
def turn(slot: Slot, runs: Path, *, alone: bool) -> Iterator[None]:
    """Use the slot's device beside the other slots of the same folder of runs, or, once they have left it, alone."""
    if slot.beside == 1:
        yield
        return
    key = hashlib.sha256(f"{runs.resolve()} {slot.gpu}".encode()).hexdigest()[:12]
    stem = Path(tempfile.gettempdir()) / f"questctl-{os.getuid()}-{key}"
    paths = stem.with_suffix(".door"), stem.with_suffix(".room")
    entered = False
    while not entered:
        with paths[0].open("w") as door, paths[1].open("w") as room:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            entered = _is(door, paths[0]) and _is(room, paths[1])  # else who left last has removed them meanwhile
            fcntl.flock(door, fcntl.LOCK_UN)
            if entered:
                try:
                    yield
                finally:
                    with suppress(OSError):  # others are in the room: would block
                        fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if _is(room, paths[1]):  # not between the two locks either
                            for path in paths:
                                path.unlink(missing_ok=True)


def _is(file: TextIO, path: Path) -> bool:
    """Whether this open file is the one that has the name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def require_memory(cells: Sequence[Cell], devices: Sequence[GPU]) -> None:
    """Raises UsageError naming the first cell that fits on none of `devices`, or not on this machine where it trains there."""
    largest = max(devices, key=lambda gpu: gpu.memory, default=None)
    for cell, c in zip(cells, sized(cells), strict=True):
        on_gpu = largest is not None and c.train.device != "cpu"
        have, where = (largest.memory, largest.name) if on_gpu and largest else (host_memory(), "the memory of this machine")
        need = memory_bytes(c)
        if 0 < have < need:
            rows = c.train.micro_batch or c.train.batch_size
            raise UsageError(
                f"{cell.run_id}: needs {need / 2**30:,.1f} GiB at the least, with {rows} sequences of {c.data.seq_len} in a "
                f"backward pass; the largest device has {have / 2**30:,.1f} GiB ({where}). Set train.micro_batch to a smaller "
                f"divisor of {c.train.batch_size}, or --force."
            )
