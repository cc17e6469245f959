"""Checkpoints of a run: atomic, verified, written in the background, and free of pickles.

    checkpoints/step-00000123/  model.safetensors  optimizer.safetensors        (written by one process)
                                shard-00001-….safetensors  shard-00002-… …      (by several processes, each its own part)
                                state.json   schema, step, the loop's counters, SHA-256 of the other files and of itself

A checkpoint is written into a temporary folder, synced, and renamed. A kill at any moment therefore leaves the earlier
checkpoints intact, and at most a temporary folder that the next writer removes. Every hash is checked on reading. A damaged
checkpoint is renamed with a warning, and the one before it is used; the last two are kept so that there is one.

The files have the format of the safetensors storage of `torch.distributed.checkpoint`. Several processes write and read through
that module; a single process writes the same format itself, because importing the module takes a second. Any number of
processes, sharded or not, can therefore resume from what any other number wrote. The module's default storage is not used,
because its index is a pickle, and loading a pickle can execute code.

Training waits only while the state is copied. A thread writes the copy, one checkpoint at a time; if it fails, the error is
raised at the next step.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from ..errors import DataError
from ..store import checkpoint_name, checkpoint_steps, sync_folder
from .distributed import SINGLE_PROCESS, World

T = TypeVar("T")

SCHEMA_VERSION = 1
KEEP = 2  # checkpoints, so that there is one before a damaged one

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to resume after `step`."""

    step: int
    model: dict[str, torch.Tensor]  # name → tensor
    optimizer: dict[str, torch.Tensor]  # name/moment → tensor
    state: dict[str, Any]  # the loop's counters as JSON values


class Background:
    """Runs one piece of work at a time in a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Wait for the previous work, raise its error if it failed, and start `work`."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as e:
            self._error = e

    def check(self) -> None:
        """Raise the error of work that has failed, without waiting for work that is still running."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the work, and raise its error if it failed."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait for the work, without raising its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def snapshot(checkpoint: Checkpoint) -> Checkpoint:
    """A copy on the CPU that later steps do not change; of sharded tensors, this process's part."""

    def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}

    return replace(checkpoint, model=copied(checkpoint.model), optimizer=copied(checkpoint.optimizer))


def save(folder: Path, checkpoint: Checkpoint, *, keep: int = KEEP, world: World = SINGLE_PROCESS) -> Path:
    """Write `checkpoint` below `folder`, and remove all but the newest `keep` checkpoints (0: remove none).

    All processes of `world` must call it. Raises OSError and, with several processes, torch's CheckpointException; the earlier
    checkpoints are then intact.
    """
    final = folder / checkpoint_name(checkpoint.step)

    def begin() -> Path:
        folder.mkdir(exist_ok=True)
        _clear_temporaries(folder)
        # The name is unique to this call, because a process whose run was taken over may still be writing the same step.
        own = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
        own.mkdir()
        return own

    temporary = world.on_rank0(begin)
    if world.size > 1:
        hashes = _write_shards(temporary, checkpoint, world)
        world.on_rank0(lambda: _publish(temporary, final, checkpoint, hashes, keep))
        return final
    try:
        hashes = {
            name: _write(temporary / name, safetensors.torch.save(_contiguous(tensors)))
            for name, tensors in ((_MODEL, checkpoint.model), (_OPTIMIZER, checkpoint.optimizer))
        }
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _publish(temporary, final, checkpoint, hashes, keep)
    return final


def _write_shards(folder: Path, checkpoint: Checkpoint, world: World) -> dict[str, str]:
    """Write the part of each process; returns the SHA-256 of every file."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save({**checkpoint.model, **checkpoint.optimizer}, storage_writer=writer, process_group=world.agreeing)
    shard = folder / f"shard-{world.rank + 1:05d}-model-00001-of-00001.safetensors"
    hashes = {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest()} if shard.exists() else {}
    return {name: digest for hashes_of_rank in world.all(hashes) for name, digest in hashes_of_rank.items()}


def _publish(temporary: Path, final: Path, checkpoint: Checkpoint, hashes: Mapping[str, str], keep: int) -> None:
    """Complete the checkpoint in `temporary`, rename it to `final`, and remove older checkpoints."""
    folder = final.parent
    try:
        content = {"schema": SCHEMA_VERSION, "step": checkpoint.step, "state": checkpoint.state, "sha256": hashes}
        _write(temporary / _STATE, json.dumps({**content, "self": _digest(content)}, indent=1, allow_nan=False).encode())
        sync_folder(temporary)
        if final.exists():  # a checkpoint of the same step and run: the second write replaces the first
            _remove(final)
        os.replace(temporary, final)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoint_steps(folder)[:-keep]:
        _remove(folder / checkpoint_name(old))


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint below `folder`, with its tensors on the CPU; None if there is no checkpoint.

    A damaged checkpoint is renamed to `damaged-…` with a warning. Raises DataError if all checkpoints are damaged.
    """
    return _newest(folder, load)


def find_latest(folder: Path) -> Path | None:
    """The folder of the newest intact checkpoint; the same choice, warnings and errors as `load_latest`."""
    return _newest(folder, verify)


def _newest(folder: Path, read: Callable[[Path], T]) -> T | None:
    _clear_temporaries(folder)
    steps = checkpoint_steps(folder)
    reason = ""
    for step in reversed(steps):
        path = folder / checkpoint_name(step)
        try:
            return read(path)
        except DataError as e:
            reason = str(e)
            warnings.warn(f"{reason}; going back to the checkpoint before it.", stacklevel=2)
            os.replace(path, _free(folder / f"damaged-{path.name}"))
    if steps:
        raise DataError(f"{reason}, and there is none before it; remove the run (questctl runs rm) to train it anew.")
    return None


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Raises DataError, which names the damaged file. Its message has no full stop, so that callers can extend the sentence.
    """
    content = _read_state(path)
    parts: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
    for name, digest in content["sha256"].items():
        data = _read(path / name, digest)
        offsets = _offsets(data)
        for key, tensor in _parse(path / name, data).items():
            parts.setdefault(key, []).append((offsets.get(key, (0,) * tensor.ndim), tensor))
    tensors = {key: _assembled(parts_of_tensor) for key, parts_of_tensor in parts.items()}
    model = {key: t for key, t in tensors.items() if "/" not in key}
    optimizer = {key: t for key, t in tensors.items() if "/" in key}
    return Checkpoint(content["step"], model, optimizer, content["state"])


def load_into(path: Path, tensors: dict[str, torch.Tensor], world: World) -> dict[str, Any]:
    """Read a verified checkpoint into sharded `tensors` by name, each process its part; returns the loop's counters.

    Raises DataError if the checkpoint does not fit the tensors.
    """
    import torch.distributed.checkpoint as dcp

    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), process_group=world.agreeing)
    except dcp.CheckpointException as e:
        raise DataError(f"{path}: is not a checkpoint of this model: {next(iter(e.failures.values()))[0]}.") from e
    state: dict[str, Any] = _read_state(path)["state"]
    return state


def step_of(path: Path) -> int:
    """The step of a checkpoint folder. Raises DataError as `load` does."""
    step: int = _read_state(path)["step"]
    return step


def verify(path: Path) -> Path:
    """Check the hash of every file in a checkpoint folder; returns `path`. Raises DataError as `load` does."""
    for name, digest in _read_state(path)["sha256"].items():
        _read(path / name, digest)
    return path


def _read_state(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / _STATE).read_bytes())
        recorded = content.pop("self")
        if content["schema"] != SCHEMA_VERSION:
            schema = content["schema"]
            raise DataError(f"{path / _STATE}: schema {schema!r} is not the schema {SCHEMA_VERSION} that this version reads")
        if recorded != _digest(content):
            raise DataError(f"{path / _STATE}: is damaged (its hash differs)")
    except OSError as e:
        raise DataError(f"{path / _STATE}: cannot be read ({e.strerror})") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path / _STATE}: is damaged ({type(e).__name__}: {e})") from e
    state: dict[str, Any] = content
    return state


def load_tensors(path: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name. Raises DataError if it is unreadable, damaged, or has another SHA-256."""
    return _parse(path, _read(path, sha256))


def _read(path: Path, sha256: str | None = None) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from e
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path}: is damaged (its hash differs)")
    return data


def _offsets(data: bytes) -> dict[str, tuple[int, ...]]:
    """The offsets of tensor parts within their tensors, by name, from a safetensors file of torch.distributed.checkpoint.

    Empty for other files, which contain whole tensors.
    """
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    info = json.loads(header.get("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
    return {key: tuple(about["saved_offsets"]) for key, about in info.items()}


def _assembled(parts: Sequence[tuple[tuple[int, ...], torch.Tensor]]) -> torch.Tensor:
    """The tensor that consists of these parts, each given with its offset."""
    if len(parts) == 1:
        return parts[0][1]
    shape = [max(o[i] + t.shape[i] for o, t in parts) for i in range(parts[0][1].ndim)]
    out = parts[0][1].new_empty(shape)
    for offset, t in parts:
        out[tuple(slice(o, o + n) for o, n in zip(offset, t.shape, strict=True))] = t
    return out


def _parse(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as e:
        raise DataError(f"{path}: is damaged ({e})") from e


def model_bytes(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> bytes:
    """The content of a safetensors file of `tensors`, with the JSON values `about` under its one metadata key `questctl`.

    There is only one key, because safetensors writes several keys in an order that differs between processes.
    """
    return safetensors.torch.save(_contiguous(tensors), {"questctl": json.dumps(about)})


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _write(path: Path, data: bytes) -> str:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return hashlib.sha256(data).hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted folder never has the name of a checkpoint."""
    renamed = path.with_name(f".{path.name}.old.tmp")
    os.replace(path, renamed)
    shutil.rmtree(renamed)


def _clear_temporaries(folder: Path) -> None:
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)  # another process may still be writing it; our folder has another name


def _free(path: Path) -> Path:
    """`path`, or the first of `path.1`, `path.2`, … that does not exist."""
    return next(p for i in range(10**6) if not (p := path.with_name(f"{path.name}.{i}") if i else path).exists())
