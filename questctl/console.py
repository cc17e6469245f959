"""The only module that prints: results on stdout, everything else on stderr.

Results are tables for people and, with `--json`, one JSON document for programs. Progress is a live line on a terminal and a
plain line every few seconds elsewhere; `NO_COLOR` and narrow terminals are rich's to honour.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.progress import Progress, TaskID
    from rich.table import Table

PLAIN_INTERVAL_S = 10.0  # between progress lines where there is no terminal


def stdout() -> Console:
    """Console of results; off a terminal it is as wide as its content needs, so that no cell is cut."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, soft_wrap=False, highlight=False)


def stderr() -> Console:
    """Console of progress, notes, warnings and errors."""
    from rich.console import Console

    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 200, highlight=False)


def say(text: str = "") -> None:
    """A line of the result itself."""
    stdout().print(text, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """What is going on."""
    stderr().print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """A request that is not honoured as it was made, or a result to doubt."""
    _labelled("warning", "yellow", text)


def error(text: str) -> None:
    """Why the command ends."""
    _labelled("error", "red", text)


def _labelled(label: str, style: str, text: str) -> None:
    from rich.text import Text

    stderr().print(Text.assemble((f"{label}: ", f"bold {style}"), text), soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json_text(value))


def json_text(value: Any) -> str:
    """A JSON document; numbers that are not finite become null, as JSON has no word for them."""
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


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", left: int = 1) -> None:
    """A table on stdout; the first `left` columns are aligned left, numbers right. None is shown as a dash."""
    stdout().print(_table(columns, rows, title, left))


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str, left: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(number(cell)) for cell in row))
    return table


def number(cell: Any) -> str:
    """How a cell is shown: four significant digits for floats, thousands separated for whole numbers, a dash for nothing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.4f}" if 0.01 <= abs(cell) < 100 else f"{cell:.4g}"
    return str(cell)


def duration(seconds: float) -> str:
    """95 → '1m35s', 5400 → '1h30m'."""
    s = int(seconds + 0.5)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class TrainProgress:
    """Shows step, loss, tokens/s and the time left of one run; `quiet` shows nothing."""

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self.label, self.quiet = label, quiet
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0

    def __call__(self, *, step: int, steps: int, loss: float, tokens_per_s: float, eta_s: float) -> None:
        """Report one step; loss in nats/token."""
        if self.quiet:
            return
        text = f"loss {loss:.4f}  {tokens_per_s:,.0f} tok/s  ETA {duration(eta_s)}"
        if sys.stderr.isatty():
            if self._live is None:
                from rich.progress import BarColumn, Progress, TextColumn

                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=20),
                    TextColumn("{task.completed}/{task.total}"),
                )
                self._live = Progress(*columns, TextColumn("{task.fields[text]}"), console=stderr(), transient=False)
                self._live.start()
                self._task = self._live.add_task(self.label, total=steps, text=text)
            assert self._task is not None
            self._live.update(self._task, completed=step, text=text)
        elif time.monotonic() - self._last >= PLAIN_INTERVAL_S or step == steps:
            self._last = time.monotonic()
            note(f"{self.label}  step {step}/{steps}  {text}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()


class DataProgress:
    """Says how far a preparation of text is, every few seconds; called with `questctl.data.writing.Progress`."""

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


class LiveTable:
    """A table on stderr that is redrawn in place; only for a terminal. `room` is the number of rows that fit."""

    def __init__(self, columns: Sequence[str], *, left: int = 1) -> None:
        self.columns, self.left = columns, left
        self._live: Live | None = None

    @property
    def room(self) -> int:
        """Rows that fit on the screen below the header and above the title."""
        return max(3, stderr().size.height - 6)

    def update(self, rows: Iterable[Sequence[Any]], title: str) -> None:
        """Show these rows under this title instead of the last ones."""
        from rich.live import Live

        table = _table(self.columns, rows, title, self.left)
        if self._live is None:
            self._live = Live(table, console=stderr(), auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Take the table away and leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
