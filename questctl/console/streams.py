"""The two streams: lines and JSON of results on stdout; notes, warnings and errors on stderr."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .guard import guarded, is_terminal
from .letters import legible

if TYPE_CHECKING:
    from rich.console import Console


def stdout(at_least: int = 200) -> Console:
    """The console for results. Off a terminal it is `at_least` characters wide, so that no cell is cut."""
    from rich.console import Console

    width = None if is_terminal(sys.stdout) else max(200, at_least)
    return Console(file=sys.stdout, width=width, highlight=False, emoji=False)


def stderr() -> Console:
    """The console for progress, notes, warnings and errors. Nothing that goes wrong with the stream raises an error."""
    from rich.console import Console

    return Console(file=guarded(sys.stderr), width=None if is_terminal(sys.stderr) else 200, highlight=False, emoji=False)


def say(text: str = "", *, as_is: bool = False) -> None:
    """Print a line of the result. On a terminal it is wrapped between words, unless it is to be copied `as_is`."""
    if as_is:
        guarded(sys.stdout).write(f"{text}\n")
        return
    console = stdout()
    console.print(_fitting(text, console), markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a note about progress."""
    console = stderr()
    console.print(_fitting(text, console), markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Warn of a request that is not carried out as made, or of a doubtful result."""
    _labelled("warning", "yellow", text)


def error(text: str) -> None:
    """Say why the command fails."""
    _labelled("error", "red", text)


def _labelled(label: str, style: str, text: str) -> None:
    from rich.text import Text

    console = stderr()
    body = _fitting(f"{label}: {text}", console).removeprefix(f"{label}: ")
    console.print(Text.assemble((f"{label}: ", f"bold {style}"), body), soft_wrap=True)


def _fitting(text: str, console: Console) -> str:
    """The text with line breaks between words; a terminal by itself would break it anywhere."""
    return (
        "\n".join(line for part in text.split("\n") for line in wrapped(part, console.width)) if console.is_terminal else text
    )


def wrapped(line: str, width: int) -> list[str]:
    """The line in pieces of at most `width` characters, or of one longer word; bullets have a hanging indent.

    >>> wrapped("* a sentence of 12 % and more", 14)
    ['* a sentence', '  of 12 % and', '  more']
    """
    from rich.cells import cell_len

    if cell_len(line) <= width:
        return [line]
    hang = " " * len(_HANGING.match(line)[0])  # type: ignore[index]
    pieces: list[str] = []
    words = _BETWEEN_WORDS.split(_INTERVAL.sub(lambda match: match[0].replace(" ", "\0"), line))
    for word in (word.replace("\0", " ") for word in words):
        if pieces and cell_len(pieces[-1]) + 1 + cell_len(word) <= width:
            pieces[-1] += f" {word}"
        else:
            pieces.append(hang + word if pieces else word)
    return pieces


_HANGING = re.compile(r"\s*(?:\* )?")  # the indent of a bullet or an indented line
_INTERVAL = re.compile(r"\S+ \[[^\[\] ]+, [^\[\] ]+\]")  # 2.35 [2.32, 2.37]
_BETWEEN_WORDS = re.compile(r"(?<=[^\s*]) (?=\S)(?!%|±)(?<!± )")  # a number stays with its percent sign and its error


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
    """From now on, show the package's log records of level INFO and above."""
    logger = logging.getLogger("questctl")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, LogHandler) for handler in logger.handlers):
        logger.addHandler(LogHandler())


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    text = json_text(value)
    lossless = legible(text, sys.stdout.encoding or "utf-8") == text
    sys.stdout.write(text if lossless else json_text(value, ascii=True))


def json_text(value: Any, *, ascii: bool = False) -> str:
    """A value as a JSON document; NaN and infinities, which JSON cannot express, become null; `ascii` escapes letters."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=ascii) + "\n"


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
