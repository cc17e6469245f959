"""Streams that never end a command: closed, full and of any encoding; what stdout did not take shows in the exit code.

A run that has trained for hours must not end because the pipe that reads its progress was closed. So no write raises. A lost
note is lost; a lost result is an error, but only at the end.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from .letters import legible

CLOSED_PIPE = 128 + 13  # the exit code of a program that SIGPIPE ends: the reader wants no more, which is no news to it
LOST = 1


class Guarded:
    """A text stream whose writes raise neither OSError nor UnicodeEncodeError; the first OSError is kept in `error`."""

    def __init__(self, stream: TextIO | None) -> None:
        self._missing = stream is None
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write the text, in letters that the stream can encode; returns its length."""
        try:
            if self._missing:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._stream.write(legible(text, self.encoding))
        except (OSError, ValueError) as e:  # ValueError: the stream object is closed
            self.error = self.error or e
        return len(text)

    def flush(self) -> None:
        """Send what is buffered."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as e:
            self.error = self.error or e

    @property
    def encoding(self) -> str:
        """The encoding of the stream; UTF-8 for a stream of characters."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guarded(stream: TextIO | None) -> Any:
    """The stream, guarded. One that does not exist (None, as Python says after `2>&-`) refuses everything."""
    return stream if isinstance(stream, Guarded) else Guarded(stream)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees at once what is written to the stream."""
    with suppress(ValueError):  # the stream is closed
        return stream is not None and stream.isatty()
    return False


@contextmanager
def guarded_streams(report: Callable[[str], None]) -> Iterator[None]:
    """Guard sys.stdout and sys.stderr while a program runs in the `with` block; its exit code says what became of stdout.

    A program that would end with 0 although stdout did not take all of its output ends with CLOSED_PIPE, or with LOST after
    `report` has been called with a sentence. Raises SystemExit, as the program did. A stream that has failed leads nowhere
    afterwards, so that Python does not try again when it ends.
    """
    before, code = (sys.stdout, sys.stderr), None
    out, err = sys.stdout, sys.stderr = guarded(sys.stdout), guarded(sys.stderr)
    try:
        try:
            yield
        except SystemExit as e:
            code = e.code or 0
        out.flush()
        if isinstance(out.error, BrokenPipeError):
            code = code or CLOSED_PIPE
        elif out.error is not None:
            reason = getattr(out.error, "strerror", None) or out.error
            report(f"stdout: the result could not be written: {reason}; the work itself is done.")
            code = code or LOST
    finally:
        for stream in (out, err):
            stream.flush()
            if stream.error is not None:
                with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:  # a stream in memory has no number
                    os.dup2(nowhere.fileno(), stream.fileno())
        sys.stdout, sys.stderr = before
    if code is not None:
        raise SystemExit(code)


def open_missing_streams() -> None:
    """Give stdin, stdout and stderr their numbers back where the shell has closed them (`2>&-`).

    Otherwise the next file that is opened, perhaps a checkpoint, gets the number 2, and a library that writes messages to
    stderr writes them into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError as e:
            if e.errno != errno.EBADF:
                continue
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            if number == 0:
                sys.stdin = open(number, encoding="utf-8", closefd=False)  # noqa: SIM115
