"""The two streams: lines and JSON of results on stdout; notes, warnings and errors on stderr."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def stdout(at_least: int = 200) -> Console:
    """The console for results. Off a terminal it is `at_least` characters wide, so that no cell is cut."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else max(200, at_least), soft_wrap=False, highlight=False)


def stderr() -> Console:
    """The console for progress, notes, warnings and errors."""
    from rich.console import Console

    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 200, highlight=False)


def say(text: str = "") -> None:
    """Print a line of the result."""
    stdout().print(text, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Tell what happens."""
    stderr().print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Warn of a request that is not carried out as made, or of a doubtful result."""
    _labelled("warning", "yellow", text)


def error(text: str) -> None:
    """Say why the command fails."""
    _labelled("error", "red", text)


def _labelled(label: str, style: str, text: str) -> None:
    from rich.text import Text

    stderr().print(Text.assemble((f"{label}: ", f"bold {style}"), text), soft_wrap=True)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Show every UserWarning that is raised inside as a line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: warn(str(message))
        yield


class LogHandler(logging.Handler):
    """Shows log records on stderr: information as a note, warnings and errors with their label."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        show = error if record.levelno >= logging.ERROR else warn if record.levelno >= logging.WARNING else note
        show(record.getMessage())


def show_log() -> None:
    """Show from now on what the package logs, at level INFO and above."""
    logger = logging.getLogger("questctl")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, LogHandler) for handler in logger.handlers):
        logger.addHandler(LogHandler())


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json_text(value))


def json_text(value: Any) -> str:
    """A value as a JSON document; NaN and infinities, which JSON cannot express, become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):  # a numpy scalar
        return _finite(value.item())
    return value if isinstance(value, str | int | float | bool | None) else str(value)
