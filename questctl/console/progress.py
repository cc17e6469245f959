"""Progress of a training run and of the preparation of text: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from .guard import is_terminal
from .numbers import duration
from .streams import note, stderr
from .tables import shortened

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

PLAIN_INTERVAL_S = 10.0  # between progress lines without a terminal


class TrainProgress:
    """Shows step, loss, tokens/s and the remaining time of one run inside a `with` block; `quiet` shows nothing."""

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self.label, self.quiet = label, quiet
        self._live: Live | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, *, step: int, steps: int, loss: float, tokens_per_s: float, eta_s: float) -> None:
        """Report one step; loss in nats/token, `eta_s` NaN if unknown."""
        if self.quiet:
            return
        parts = (f"step {step}/{steps}", f"loss {loss:.4f}", f"{tokens_per_s:,.0f} tok/s", f"ETA {duration(eta_s)}")
        if is_terminal(sys.stderr):
            if self._live is None:
                from rich.live import Live

                self._live = Live(console=stderr(), auto_refresh=False)
                self._live.start()
            self._live.update(_line(self.label, parts, step / steps, stderr().width), refresh=True)
        elif time.monotonic() - self._last >= PLAIN_INTERVAL_S or step == steps:
            self._last = time.monotonic()
            note("  ".join((self.label, *parts)))

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()


BAR = 20  # characters
LEAST_NAME = 12  # characters to which a name is shortened


def _line(name: str, parts: Sequence[str], share: float, width: int) -> Table:
    """One line of a terminal: the name, a bar, and as many parts as fit, of which the first and the last have priority.

    If room is short, the bar is dropped first, then parts from the middle, then the middle of the name.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    kept = [*parts]
    while len(kept) > 1 and min(len(name), LEAST_NAME) + sum(2 + len(part) for part in kept) > width - 1:
        del kept[-2 if len(kept) > 2 else -1]
    rest = "  ".join(kept)
    room = width - 1 - 2 - len(rest)
    line = Table.grid(padding=(0, 2, 0, 0))
    bar = [ProgressBar(completed=share, total=1.0, width=BAR)] if len(name) + 2 + BAR <= room else []
    line.add_row(Text(shortened(name, room), no_wrap=True), *bar, Text(rest, no_wrap=True))
    return line


class DataProgress:
    """Prints a line every few seconds while text is prepared; called with `questctl.data.writing.PreparationProgress`."""

    def __init__(self, label: str) -> None:
        self.label, self._stage = label, ""
        self._begin = self._last = time.monotonic()
        self._first = (0.0, 0)  # share and bytes of text at which this stage began

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
