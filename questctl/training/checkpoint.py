"""Checkpoints: a folder each, whole or absent, and nothing in them that could run.

    checkpoints/step-00000123/  model.safetensors  optimizer.safetensors
                                state.json   schema, step, the loop's counters, SHA-256 of the two files and of itself

A checkpoint is written into a temporary folder, synced, and renamed: a kill at any moment leaves the earlier ones and at most a
temporary folder that the next writer removes. On reading every hash is checked; a damaged checkpoint is set aside with a
warning, and the one before it is used. The last two are kept, so that there is one before it.

Given up: `torch.distributed.checkpoint`, whose default storage keeps its index as a pickle, which may execute what it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..errors import DataError
from ..store import sync_folder

SCHEMA_VERSION = 1
KEEP = 2

_STEP = re.compile(r"step-(\d{8,})")
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything to go on from `step`: tensors by name, and the loop's counters as plain JSON values."""

    step: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int = KEEP) -> Path:
    """Write `checkpoint` below `folder`, remove all but the newest `keep` (0: none).

    Raises OSError; the earlier ones are then intact.
    """
    folder.mkdir(exist_ok=True)
    _clear_temporaries(folder)
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    temporary.mkdir()
    try:
        hashes = {
            name: _write(temporary / name, safetensors.torch.save(_contiguous(tensors)))
            for name, tensors in ((_MODEL, checkpoint.model), (_OPTIMIZER, checkpoint.optimizer))
        }
        content = {"schema": SCHEMA_VERSION, "step": checkpoint.step, "state": checkpoint.state, "sha256": hashes}
        _write(temporary / _STATE, json.dumps({**content, "self": _digest(content)}, indent=1, allow_nan=False).encode())
        sync_folder(temporary)
        if final.exists():  # the same step of the same run: a second writing replaces the first
            _remove(final)
        os.replace(temporary, final)
        sync_folder(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in steps(folder)[:-keep]:
        _remove(folder / f"step-{old:08d}")
    return final


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints below `folder`, rising; whether they are intact is not known yet."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)))


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint below `folder`, tensors on the CPU; None if none was ever completed.

    A damaged one is renamed to `damaged-…` with a warning. Raises DataError if there are some and none is intact.
    """
    _clear_temporaries(folder)
    found = steps(folder)
    reason = ""
    for step in reversed(found):
        path = folder / f"step-{step:08d}"
        try:
            return load(path)
        except DataError as e:
            reason = str(e)
            warnings.warn(f"{reason}; going back to the checkpoint before it.", stacklevel=2)
            os.replace(path, _free(folder / f"damaged-{path.name}"))
    if found:
        raise DataError(f"{reason}, and there is none before it; remove the run (questctl runs rm) to train it anew.")
    return None


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises DataError naming the damaged file (no full stop, for a longer sentence)."""
    try:
        content = json.loads((path / _STATE).read_bytes())
        recorded = content.pop("self")
        if content["schema"] != SCHEMA_VERSION:
            found = content["schema"]
            raise DataError(f"{path / _STATE}: schema {found!r} is not the schema {SCHEMA_VERSION} that this version reads")
        if recorded != _digest(content):
            raise DataError(f"{path / _STATE}: is damaged (its hash differs)")
    except OSError as e:
        raise DataError(f"{path / _STATE}: cannot be read ({e.strerror})") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path / _STATE}: is damaged ({type(e).__name__}: {e})") from e
    model, optimizer = (load_tensors(path / name, sha256=content["sha256"][name]) for name in (_MODEL, _OPTIMIZER))
    return Checkpoint(content["step"], model, optimizer, content["state"])


def load_tensors(path: Path, *, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """A safetensors file → tensors by name. Raises DataError if it cannot be read, is damaged, or has another SHA-256."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from e
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path}: is damaged (its hash differs)")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as e:
        raise DataError(f"{path}: is damaged ({e})") from e


def model_bytes(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> bytes:
    """Tensors as the content of a safetensors file, with JSON values about them under the one metadata key `questctl`.

    One key, because safetensors writes several in an order that differs from process to process.
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
    """Delete a checkpoint so that no half of it is ever seen under its name."""
    doomed = path.with_name(f".{path.name}.old.tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _clear_temporaries(folder: Path) -> None:
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)


def _free(path: Path) -> Path:
    """`path`, with a number behind it if it is taken."""
    return next(p for i in range(10**6) if not (p := path.with_name(f"{path.name}.{i}") if i else path).exists())
