"""Signals that ask a run to stop: noted, and obeyed after the step at hand, when a checkpoint has been written."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

WATCHED = ("SIGTERM", "SIGUSR1", "SIGINT")  # a scheduler's, SLURM's early warning, Ctrl-C


class StopSignals:
    """While open, WATCHED signals set `received` instead of ending the process; a second Ctrl-C ends it at once.

    Python delivers signals to the main thread alone; elsewhere this does nothing, and the caller passes a `stop` of its own.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in WATCHED if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
