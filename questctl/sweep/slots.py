"""Slots for runs on this machine: the GPUs and memory that this process may use, and how several runs share one device.

    slots = GPUs × processes per GPU,  or processes at a time on the CPU;  CPUs are divided evenly among the slots

Each process of a cell takes one slot, those of one cell on different GPUs, or on the CPU. Workers of one supervisor share a
`Pool` of slots. Each takes the first free cell that fits on what is left (`first_fit`). Cells of many processes come first in
the order, so that small ones fill the gaps. A claim on slots is a file that the worker and its children hold locked.

Runs that share a device hold a shared lock on it. A run that ran out of memory there takes the device alone: it holds the lock
of the *door*, so that no other run enters, and waits for the exclusive lock of the *room* until the others have left. The locks
belong to processes and vanish with them; the last process removes the files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TextIO

from ..config import RunConfig, human_bytes
from ..errors import UsageError
from ..store import Run
from ..system import cpu_count
from .costs import flops_per_token, memory_bytes, rows_at_once, sized
from .sweep_file import Cell

LAPTOP_PARAMS = 5_000_000  # up to this size two one-thread runs beat one run with two threads
# A model whose step is below this trains with one thread. Beside other work (load 13 on 2 CPUs, two pairs each), a step of 53K
# W4A4 (1.1e9) took 0.7 and 2.0 times as long with a second thread, one of 214K W4A4 (3.6e9) 0.6 times.
ONE_THREAD_FLOPS = 2e9
BUSY = 0.5  # with so many CPUs busy with other programs, a small model's second thread does harm
CUDA_CONTEXT_BYTES = 2**30  # a process on a GPU takes 0.4 to 0.8 GiB before its first tensor
FILL = 0.85  # usable share of a GPU's memory: the estimate leaves out workspaces and fragmentation
CORES_PER_RUN = 2  # on a GPU: one thread launches kernels, one does everything else

JobsPerGPU = int | Literal["auto"]


@dataclass(frozen=True)
class GPU:
    """A GPU, with its `id` as in CUDA_VISIBLE_DEVICES; `memory` in bytes, 0 if it is not known."""

    id: str
    name: str
    memory: int


@dataclass(frozen=True)
class Slot:
    """A place for one process at a time. CUDA_VISIBLE_DEVICES is set to `gpu` (None: left as it is)."""

    gpu: str | None = None
    beside: int = 1  # number of slots on this device, including this one
    cpus: int = 0  # CPUs that a process may use here; 0: torch's choice
    memory: float = math.inf  # bytes of the device that all its processes may need together


def host_memory() -> int:
    """Bytes of memory of this machine, or of its control group if that has a limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max", or no such file
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def visible_gpus() -> list[GPU]:
    """The NVIDIA GPUs that this process may use, as nvidia-smi lists them, without torch and without a CUDA context."""
    machine = _nvidia_smi()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [gpu for _, gpu in machine]
    gpus = []
    for entry in (entry.strip() for entry in visible.split(",")):
        if not machine or not entry or entry in ("-1", "NoDevFiles"):
            break  # CUDA ignores what follows an invalid entry
        named = [gpu for uuid, gpu in machine if entry in (gpu.id, uuid) or uuid.startswith(f"{entry}-")]
        gpus.append(GPU(entry, named[0].name if named else "GPU", named[0].memory if named else 0))
    return gpus


@cache
def _nvidia_smi() -> list[tuple[str, GPU]]:
    """(uuid, GPU) of every GPU of this machine."""
    command = ("nvidia-smi", "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits")
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        rows = [[part.strip() for part in line.split(",", 3)] for line in lines]
        return [(uuid, GPU(index, name, int(mib) * 2**20)) for index, uuid, mib, name in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def slots(cells: Sequence[Cell], jobs: int = 0, jobs_per_gpu: JobsPerGPU = 1) -> list[Slot]:
    """The slots of this machine for `cells`; `jobs` is their number.

    With `jobs` 0 there are `jobs_per_gpu` slots on every GPU. Without GPUs, or if all cells train on the CPU, there is one slot
    per CPU if all cells are of laptop size, else one slot. `jobs_per_gpu` "auto" gives a GPU as many slots as the smallest cell
    fits into its memory (`memory_bytes`), with two CPUs for each; the memory of the GPU then limits which cells run at a time.
    """
    wanted = {c.config.train.device for c in cells}
    devices = visible_gpus() if wanted != {"cpu"} else []
    if not devices:
        small = all(c.config.model.params_non_embedding <= LAPTOP_PARAMS for c in cells)
        n = jobs or (cpu_count() if small else 1)
        return [Slot(None, n)] * n
    if any(":" in device for device in wanted):  # the sweep file itself names the GPU of each run
        n = jobs or 1
        return [Slot(None, n)] * n
    by_memory = jobs_per_gpu == "auto"
    counts = [_fitting(cells, devices, gpu) if jobs_per_gpu == "auto" else jobs_per_gpu for gpu in devices]
    on = [gpu for i in range(max(counts)) for gpu, count in zip(devices, counts, strict=True) if i < count]
    if jobs:
        on = [devices[i % len(devices)] for i in range(jobs)]
    return [Slot(gpu.id, on.count(gpu), memory=FILL * gpu.memory if by_memory and gpu.memory else math.inf) for gpu in on]


def divided(places: Sequence[Slot]) -> list[Slot]:
    """The places with the CPUs of this machine divided evenly among them."""
    share = max(1, cpu_count() // len(places))
    return [replace(slot, cpus=share) for slot in places]


def useful_threads(config: RunConfig, cpus: int) -> int:
    """The CPU threads of a run that may use `cpus` CPUs (0: torch's choice).

    If set, `train.threads` decides. A model whose step takes less than `ONE_THREAD_FLOPS` gets one thread.
    """
    step = config.train.batch_size * config.data.seq_len * flops_per_token(config)
    return config.train.threads or (1 if step < ONE_THREAD_FLOPS and not config.train.device.startswith("cuda") else cpus)


def threads_warning(config: RunConfig, run: Run, others: float) -> str:
    """A warning if a run begins with several threads and one would be faster: a small model beside other work; else ''.

    `others` is the number of CPUs that other programs use. A number of threads that the user set is left alone.
    """
    cpus = cpu_count()
    chosen = config.train.threads or "OMP_NUM_THREADS" in os.environ or run.exists() or config.train.device.startswith("cuda")
    if chosen or cpus == 1 or others < BUSY or useful_threads(config, cpus) > 1:
        return ""
    return (
        f"other programs use {others:.1f} of the {cpus} CPUs; beside them a model this small trains faster with "
        f"--set train.threads=1 than with {cpus} threads that wait for each other. A run keeps the number that it begins with."
    )


def _fitting(cells: Sequence[Cell], devices: Sequence[GPU], gpu: GPU) -> int:
    """How many runs of the smallest cell fit on one of the GPUs, at least one."""
    need = min((need.memory for need in needs(cells).values()), default=CUDA_CONTEXT_BYTES)
    return max(1, min(int(FILL * gpu.memory / need), cpu_count() // CORES_PER_RUN // len(devices)))


# --- what cells take --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What a cell takes on one node: a slot for each process, and bytes of memory for each."""

    processes: int = 1
    memory: float = 0.0


def needs(cells: Sequence[Cell], *, memory: bool = True) -> dict[str, Need]:
    """Run id → what the cell takes on one node; without `memory`, memory counts as 0."""
    if not memory:
        return {cell.run_id: Need(cell.nproc // cell.nodes) for cell in cells}
    return {
        cell.run_id: Need(cell.nproc // cell.nodes, memory_bytes(config, cell.nproc) + CUDA_CONTEXT_BYTES)
        for cell, config in zip(cells, sized(cells), strict=True)
    }


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPUs of the machine (`gpu` None): slots, and bytes of memory that its processes may need together."""

    gpu: str | None
    slots: int
    memory: float = math.inf


def first_fit(left: Sequence[Device], need: Need) -> list[int] | None:
    """The indices of the first devices with room for the processes; None if there is not enough room.

    `left` is the free part of each device. Each process takes a GPU of its own; on CPUs all share the one device.
    """
    fitting = [i for i, device in enumerate(left) if device.slots and need.memory <= device.memory]
    if fitting and left[fitting[0]].gpu is None:
        return fitting[:1] * need.processes if left[fitting[0]].slots >= need.processes else None
    return fitting[: need.processes] if len(fitting) >= need.processes else None


class Claim:
    """The slots of one cell, as one `Slot`, until `close`. Children forked in the meantime keep them until they end."""

    def __init__(self, slot: Slot, file: TextIO | None = None) -> None:
        self.slot, self._file = slot, file

    def close(self) -> None:
        """Give the slots back. The lock is not released but closed, so that a child which still lives keeps it."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Pool:
    """The slots that the workers of one supervisor share; without a folder, the slots of a single worker.

    `shared`: whether others put runs on the same device.
    """

    devices: tuple[Device, ...] = (Device(None, 1),)
    cpus: int = 0  # CPUs that a process may use; 0: torch's choice
    folder: Path | None = None
    shared: bool = False

    @classmethod
    def of(cls, places: Sequence[Slot], folder: Path | None = None) -> Pool:
        """The pool of these slots."""
        counts = Counter((slot.gpu, slot.memory) for slot in places)
        devices = tuple(Device(gpu, n, memory) for (gpu, memory), n in counts.items())
        return cls(devices, places[0].cpus if places else 0, folder)

    @property
    def by_memory(self) -> bool:
        """Whether memory limits which runs share a device."""
        return any(device.memory < math.inf for device in self.devices)

    def fits(self, need: Need) -> bool:
        """Whether there are enough slots for a cell if nothing else runs. (`require_memory` checks the memory.)"""
        return first_fit(self.devices, self._within(need)) is not None

    def _within(self, need: Need) -> Need:
        """The need, with memory cut to that of its devices: a cell that is larger but tried nevertheless has them to itself."""
        most = sorted((device.memory for device in self.devices), reverse=True)
        return replace(need, memory=min(need.memory, most[min(need.processes, len(most)) - 1]))

    def take(self, need: Need) -> Claim | None:
        """Take slots for a cell, if there is room for it now."""
        need = self._within(need)
        if self.folder is None:
            return self._claim(self.devices, need, None)
        self.folder.mkdir(exist_ok=True)  # it may have been deleted, as temporary files are
        with (self.folder / "lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return self._claim(self._left(), need, self.folder)

    def _claim(self, left: Sequence[Device], need: Need, folder: Path | None) -> Claim | None:
        where = first_fit(left, need)
        if where is None:
            return None
        gpus = [self.devices[i].gpu for i in where]
        beside = max(self.devices[i].slots // (need.processes if gpus[0] is None else 1) for i in where)
        names = None if gpus[0] is None else ",".join(map(str, gpus))
        slot = Slot(names, max(1 + self.shared, beside), self.cpus)
        if folder is None:
            return Claim(slot)
        file = tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False)  # noqa: SIM115 (open while it is taken)
        json.dump({"devices": where, "memory": need.memory}, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        return Claim(slot, file)  # type: ignore[arg-type]

    def _left(self) -> list[Device]:
        """The free part of the devices; also removes claim files that no process holds any more."""
        assert self.folder is not None
        left = list(self.devices)
        for path in self.folder.glob("*.json"):
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    taken: Mapping[str, Any] = json.load(file)
                    for i in taken["devices"]:
                        left[i] = replace(left[i], slots=left[i].slots - 1, memory=left[i].memory - taken["memory"])
        return left


def that_fit(cells: Sequence[Cell], places: Sequence[Slot], nodes: int = 1) -> list[Cell]:
    """The cells that a worker with these places can train; in a SLURM job of several nodes, the cells of as many nodes."""
    pool = Pool.of(places)
    return [c for c in cells if c.nodes == nodes and (nodes > 1 or pool.fits(Need(c.nproc)))]


def require_places(cells: Sequence[Cell], places: Sequence[Slot]) -> None:
    """Raises UsageError for the first cell of several nodes, or of more processes than there are places for on this machine."""
    pool = Pool.of(places)
    gpus = any(slot.gpu is not None for slot in places)
    for cell in cells:
        if cell.nodes > 1:
            raise UsageError(
                f"resources: {cell.run_id} takes {cell.nodes} nodes, and this is one machine; set nodes = 1, or "
                "use --launcher slurm or ray."
            )
        if cell.nproc > 1 and not pool.fits(Need(cell.nproc)):
            have = f"{len(pool.devices)} GPU{'s' * (len(pool.devices) > 1)}" if gpus else f"places for {len(places)}"
            more = "" if gpus else f"--jobs {cell.nproc}, or "
            raise UsageError(
                f"resources: {cell.run_id} takes {cell.nproc} processes, and this machine has {have}; {more}a smaller nproc."
            )


@contextmanager
def turn(slot: Slot, runs: Path, *, alone: bool) -> Iterator[None]:
    """Use the slot's device for a `with` block: beside other runs of the same folder, or `alone`, once they have left it."""
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
            entered = _is(door, paths[0]) and _is(room, paths[1])  # else the last run to leave has removed the files
            fcntl.flock(door, fcntl.LOCK_UN)
            if entered:
                try:
                    yield
                finally:
                    with suppress(OSError):  # other runs are in the room, so the lock would block
                        fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if _is(room, paths[1]):  # and no run removed it between the two locks
                            for path in paths:
                                path.unlink(missing_ok=True)


def _is(file: TextIO, path: Path) -> bool:
    """Whether `path` still names this open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def require_memory(cells: Sequence[Cell], devices: Sequence[GPU]) -> None:
    """Raises UsageError for the first cell that fits on none of `devices` or, if it trains on the CPU, not in memory."""
    largest = max(devices, key=lambda gpu: gpu.memory, default=None)
    firsts: dict[int, Cell] = {}
    for cell in cells:
        firsts.setdefault(id(cell.first), cell)  # cells that differ only in their seeds need the same
    chosen = list(firsts.values())
    for cell, c in zip(chosen, sized(chosen), strict=True):
        on_gpu = largest is not None and c.train.device != "cpu"
        have, where = (largest.memory, largest.name) if on_gpu and largest else (host_memory(), "the memory of this machine")
        need = memory_bytes(c, cell.nproc)
        here = 1 if on_gpu else cell.nproc // cell.nodes
        if 0 < have < need * here:
            rows, each = rows_at_once(c, cell.nproc), f" in each of {cell.nproc} processes" if cell.nproc > 1 else ""
            raise UsageError(
                f"{cell.run_id}: needs at least {human_bytes(need)}{each}, with {rows} sequences of {c.data.seq_len} in a "
                f"backward pass; the largest device has {human_bytes(have)} ({where}). Set train.micro_batch to a smaller "
                f"divisor of {c.train.batch_size}, more processes with parallel = 'fsdp' in [resources], or --force."
            )
