"""Progress of a training run and of the preparation of text: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .guard import is_terminal
from .numbers import duration
from .streams import note, stderr

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL_S = 10.0  # between progress lines where there is no terminal


class TrainProgress:
    """Shows step, loss, tokens/s and the remaining time of one run inside a `with` block; `quiet` shows nothing."""

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self.label, self.quiet = label, quiet
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, *, step: int, steps: int, loss: float, tokens_per_s: float, eta_s: float) -> None:
        """Report one step; loss in nats/token."""
        if self.quiet:
            return
        text = f"loss {loss:.4f}  {tokens_per_s:,.0f} tok/s  ETA {duration(eta_s)}"  # NaN: unknown
        if is_terminal(sys.stderr):
            if self._live is None:
                from rich.progress import BarColumn, Progress, TextColumn

                texts = ("{task.description}", "{task.completed}/{task.total}", "{task.fields[text]}")
                label, counter, rest = (TextColumn(text, markup=False) for text in texts)
                self._live = Progress(label, BarColumn(bar_width=20), counter, rest, console=stderr(), transient=False)
                self._live.start()
                self._task = self._live.add_task(self.label, total=steps, text=text)
            assert self._task is not None
            self._live.update(self._task, completed=step, text=text)
        elif time.monotonic() - self._last >= PLAIN_INTERVAL_S or step == steps:
            self._last = time.monotonic()
            note(f"{self.label}  step {step}/{steps}  {text}")

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()


class DataProgress:
    """Prints a line every few seconds while text is prepared; called with `questctl.data.writing.PreparationProgress`."""

    def __init__(self, label: str) -> None:
        self.label, self._stage = label, ""
        self._begin = self._last = time.monotonic()
        self._first = (0.0, 0)  # share and bytes of text where this stage began

    def __call__(self, now: Any) -> None:
        """Report one step."""
        clock = time.monotonic()
        if now.stage != self._stage:
            self._stage, self._begin, self._first = now.stage, clock, (now.share or 0.0, now.text_bytes)
        if clock - self._last < PLAIN_INTERVAL_S or clock == self._begin:
            return
        self._last, seconds = clock, clock - self._begin
        parts = [f"{100 * now.share:.1f} %"] if now.share is not None else []
        parts += [f"{now.text_bytes / 1e6:,.0f} MB", f"{(now.text_bytes - self._first[1]) / 1e6 / seconds:.1f} MB/s"]
        parts += [f"{now.tokens:,} tokens"] if now.tokens else []
        if now.share is not None and now.share > self._first[0]:
            parts.append(f"{duration(seconds * (1 - now.share) / (now.share - self._first[0]))} left")
        note(f"{self.label}: {now.stage}, {', '.join(parts)}")
