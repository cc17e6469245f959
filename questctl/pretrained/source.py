"""A checkpoint that a model begins with or learns from: its kind, the model it describes, and the hash of its weights.

    runs/NAME/        config.json + model.safetensors of a finished run
    FOLDER/           config.json + safetensors of transformers, in one file or in several
    FILE.gguf         a file of llama.cpp
    hf:OWNER/NAME     such a folder on the Hugging Face Hub, which is fetched into the hub's own cache

A config names it in `model.init` or `teacher.source`. Nothing here loads torch; `models.pretrained` reads the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, QuestError, UsageError
from . import folders, gguf_files, hub

INIT, TEACHER = "model.init", "teacher.source"  # the keys that name one
KINDS = "a run's folder, a folder of transformers, a .gguf file, or hf:OWNER/NAME"


@dataclass(frozen=True)
class Source:
    """A checkpoint: `name` is what the user wrote, `model` are keys of the section `model`, `files` hold the weights."""

    name: str
    kind: Literal["run", "folder", "gguf"]
    path: Path
    model: Mapping[str, Any]
    files: tuple[Path, ...]
    tokenizer: str | None  # as `data.tokenizer` names it; None if it has none
    key: str = INIT  # the config key that names it, for errors

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of its file of weights; of several files, that of their hashes in the order of their names."""
        digests = [_sha256(path, *_stamp(path)) for path in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def open_source(name: str, key: str = INIT) -> Source:
    """The checkpoint that a key names.

    Raises UsageError and DataError, one sentence with the choices, and Unreachable for the hub.
    """
    path = hub.fetched(name.removeprefix("hf:"), key) if name.startswith("hf:") else Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        keys, has_tokenizer = _of_gguf(path, key, *_stamp(path))
        return Source(name, "gguf", path, keys, (path,), f"gguf:{name}" if has_tokenizer else None, key)
    if not path.is_dir():
        packed = next(iter(sorted(path.parent.glob("*.zip"))), None)
        way_out = f"; if it is in {packed}, questctl runs restore {path.name} takes it out" if packed else ""
        raise DataError(f"{key}: '{name}' is not here{way_out}; it takes {KINDS}.")
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise DataError(f"{key}: {name} has no config.json; it takes {KINDS}.") from e
    except (OSError, ValueError) as e:
        raise DataError(f"{key}: {path / 'config.json'}: cannot be read ({e}).") from e
    if isinstance(values, dict) and {"schema", "model", "data"} <= values.keys():
        return _of_run(name, path, values, key)
    if not isinstance(values, dict):
        raise DataError(f"{key}: {path / 'config.json'}: describes no model; it takes {KINDS}.")
    keys = folders.model_keys(values, f"{key}: {name}")
    files = folders.weight_files(path)
    for file in files:
        folders.check_dtypes(file)
    tokenizer = (name if name.startswith("hf:") else f"hf:{name}") if (path / "tokenizer.json").is_file() else None
    return Source(name, "folder", path, keys, files, tokenizer, key)


def _of_run(name: str, path: Path, values: Mapping[str, Any], key: str) -> Source:
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise DataError(f"{key}: {name}: the run has no model.safetensors yet; questctl train finishes it.")
    keys = {k: v for k, v in values["model"].items() if not k.startswith("init")}
    if not keys.get("vocab_size"):
        keys["vocab_size"] = folders.header(weights)["embed.weight"]["shape"][0]
    tokenizer = values["data"].get("tokenizer", "byte")
    return Source(name, "run", path, keys, (weights,), tokenizer, key)


def same_weights(name: str, sha256: str, key: str = INIT) -> Source:
    """The checkpoint that a key names; its weights must have the hash with which a run began.

    Raises DataError if it is missing, UsageError if its weights have changed.
    """
    try:
        source = open_source(name, key)
    except QuestError as e:
        raise type(e)(f"{str(e).removesuffix('.')}: the run began with it (hash {sha256[:8]}).") from e
    if source.sha256 != sha256:
        raise UsageError(
            f"{key}: {name} has other weights (hash {source.sha256[:8]}) than the run began with ({sha256[:8]}); restore "
            "them, or begin another run."
        )
    return source


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


@cache
def _of_gguf(path: Path, key: str, size: int, modified: int) -> tuple[dict[str, Any], bool]:
    return gguf_files.model_keys(path, key), gguf_files.has_byte_level_tokenizer(path, key)


@cache  # the arguments identify an unchanged file: cells of a sweep share the result
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
