"""Streams that never end a command, even if closed, full or of another encoding; lost results show in the exit code.

A run that has trained for hours must not end because the reader of its progress has closed the pipe. So no write raises an
error. A lost note is ignored; a lost result is an error, but only at the end.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from .letters import legible

CLOSED_PIPE = 128 + 13  # as of a program ended by SIGPIPE; no message, since the reader has closed the pipe itself
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
    """The stream, guarded. A missing stream (None, as in Python after `2>&-`) counts as one that fails."""
    return stream if isinstance(stream, Guarded) else Guarded(stream)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is an open terminal."""
    with suppress(ValueError):  # the stream is closed
        return stream is not None and stream.isatty()
    return False


@contextmanager
def guarded_streams(report: Callable[[str], None]) -> Iterator[None]:
    """Guard sys.stdout and sys.stderr while a program runs in the `with` block; its exit code shows whether stdout failed.

    A program that would end with 0 although stdout did not take all of its output ends with CLOSED_PIPE, or with LOST after
    `report` has been called with a sentence. Raises SystemExit, as the program did. A failed stream is redirected to the null
    device, so that Python does not try to flush it again at exit.
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

    Otherwise the next file that is opened, perhaps a checkpoint, gets the number 2, and a library would write its messages for
    stderr into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError as e:
            if e.errno != errno.EBADF:
                continue
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            if number == 0:
                sys.stdin = open(number, encoding="utf-8", closefd=False)  # noqa: SIM115
