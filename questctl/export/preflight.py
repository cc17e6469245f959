"""What an export needs before torch is loaded: a finished run, and a place to write to."""

from __future__ import annotations

from pathlib import Path

from ..config import RunConfig
from ..errors import DataError, UsageError
from ..store import Run


def require_finished(run: Run) -> RunConfig:
    """The config of a finished run. Raises DataError if it is not finished."""
    config = run.config()
    if run.result() is None:
        raise DataError(f"export: {run.name} is not finished ({run.state()}); questctl train goes on with it.")
    return config


def require_free(out: Path) -> None:
    """Raises UsageError if there is something at `out` already, StorageError if nothing can be written there."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out: {out} exists and is not an empty folder; name another one, or remove it.")
    Run(out).check_writable()
