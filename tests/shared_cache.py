"""A result that is computed once for all workers of a test session, and kept in pytest's cache until its key changes."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def computed_once(folder: Path, name: str, key: str, compute: Callable[[], Any]) -> Any:
    """The JSON value of `compute()`, from `folder` where it has been computed under this key before.

    A worker that comes while another one computes waits for it: the lock file is held meanwhile. Only the newest key is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["key"] == key:
                return stored["value"]
        value = compute()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"key": key, "value": value}))
        os.replace(temporary, path)
        return value


def digest(paths: Iterable[Path], *versions: str) -> str:
    """A key that changes with the name or content of any file, and with any version."""
    key = hashlib.sha256("\n".join(versions).encode())
    for path in sorted(paths):
        key.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return key.hexdigest()
