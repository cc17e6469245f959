"""The only module that prints: results on stdout, everything else on stderr.

Results are tables for people and, with `--json`, one JSON document for programs. Progress is a live line on a terminal and a
plain line every few seconds elsewhere; `NO_COLOR` and narrow terminals are rich's to honour.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.progress import Progress, TaskID
    from rich.table import Table

PLAIN_INTERVAL_S = 10.0  # between progress lines where there is no terminal


def stdout(at_least: int = 200) -> Console:
    """Console of results; off a terminal it is as wide as its content needs, so that no cell is cut."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else max(200, at_least), soft_wrap=False, highlight=False)


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


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", left: int = 1, optional: Sequence[str] = ()
) -> None:
    """A table on stdout; the first `left` columns are aligned left, numbers right. None is shown as a dash.

    Off a terminal it is as wide as its content. On one, no number and no name is ever broken: columns move together, prose and
    headers wrap between words, `optional` columns are left out (the first of them first), and where that is not enough each row
    becomes a paragraph.
    """
    width = stdout().width if sys.stdout.isatty() else None
    table = _Table(columns, [[number(cell) for cell in row] for row in rows], left)
    layout = table.fitting(width, optional)
    if layout is None:
        assert width is not None, "without a limit anything fits"
        for line in (*([title] if title else []), *table.paragraphs(width)):
            say(line)
        return
    stdout(layout.width).print(table.drawn(layout, title))
    if left_out := [name for i, name in enumerate(columns) if i not in layout.widths]:
        note(f"left out at this width: {', '.join(dict.fromkeys(left_out))}; a wider terminal, a pipe or --json has them")


GAPS = (3, 2, 1)  # spaces between columns
PROSE_WIDTH = 12  # to which a column that may be broken between words shrinks
_WORDS = re.compile(r"[^\W\d_]{3,}.* |.* [^\W\d_]{3,}")  # may be broken at its spaces, unlike '1.2 [1.1, 1.3]'


@dataclass(frozen=True)
class _Layout:
    """Which columns are shown, how wide, how far apart."""

    widths: Mapping[int, int]
    gap: int

    @property
    def width(self) -> int:
        return sum(self.widths.values()) + self.gap * (len(self.widths) - 1)


class _Table:
    """Cells as text, and how they fit a width. A row that is shorter than the header ends in empty cells."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
        from rich.cells import cell_len

        self.columns, self.rows, self.left = columns, rows, left
        self.natural: list[int] = []
        self.least: list[int] = []
        for i, name in enumerate(columns):
            cells = [row[i] for row in rows if i < len(row)]
            full = whole = 0  # the widest cell; the widest piece that must not be broken
            for line in (line for cell in cells for line in cell.split("\n")):
                prose = (i < left and " " in line) or _WORDS.match(line)
                pieces = [cell_len(word) for word in line.split()] if prose else [cell_len(line)]
                full, whole = max(full, cell_len(line)), max(whole, *pieces, min(cell_len(line), PROSE_WIDTH))
            self.natural.append(max(full, cell_len(name)))
            self.least.append(max(whole, *(cell_len(word) for word in name.split() or [""])))

    def fitting(self, width: int | None, optional: Sequence[str] = ()) -> _Layout | None:
        """The roomiest layout within `width` (None: without a limit); None if there is none."""
        if width is None:
            return _Layout(dict(enumerate(self.natural)), GAPS[0])
        for gap in GAPS:
            if (layout := _Layout(dict(enumerate(self.natural)), gap)).width <= width:
                return layout
        for dropped in range(len(optional) + 1):
            kept = [i for i in range(len(self.columns)) if self.columns[i] not in optional[:dropped]]
            for gap in GAPS[1:]:
                excess = _Layout({i: self.natural[i] for i in kept}, gap).width - width
                widths = {i: self.natural[i] for i in kept}
                while excess > 0 and (wide := [i for i in kept if widths[i] > self.least[i]]):
                    widths[max(wide, key=lambda i: widths[i])] -= 1
                    excess -= 1
                if excess <= 0:
                    return _Layout(widths, gap)
        return None

    def drawn(self, layout: _Layout, title: str = "") -> Table:
        """As a table of rich."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        padding = {3: (0, 1, 0, 1), 2: (0, 1, 0, 0), 1: (0, 0, 0, 0)}[layout.gap]
        heading = Text(title) if title else None
        table = Table(
            title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=padding
        )
        for i, width in layout.widths.items():
            table.add_column(Text(self.columns[i]), justify="left" if i < self.left else "right", overflow="fold", width=width)
        for row in self.rows:
            table.add_row(*(Text(row[i]) for i in layout.widths if i < len(row)))
        return table

    def paragraphs(self, width: int) -> Iterator[str]:
        """Each row as lines: its names, then `header value` pairs, as many a line as fit. A line may be longer than `width`
        where one value is; the terminal wraps it, and it can be copied whole."""
        from rich.cells import cell_len

        names = self.left if self.left < len(self.columns) else 1
        if len(self.columns) == 2:
            yield from (f"{row[0]}  {row[1]}".rstrip() for row in (self.columns, *self.rows))
            return
        for row in self.rows:
            head = "  ".join(cell for cell in row[:names] if cell)
            if head:
                yield head if row[0] else f"  {head}"
            line = ""
            for name, cell in zip(self.columns[names:], row[names:], strict=False):
                pair = f"{name} {cell}".strip()
                if cell and line and cell_len(line) + 2 + cell_len(pair) > width - 4:
                    yield f"    {line}"
                    line = ""
                if cell:
                    line += f"  {pair}" if line else pair
            if line:
                yield f"    {line}"


def number(cell: Any) -> str:
    """How a cell is shown: floats with four significant digits, or four decimals below 10; whole numbers with their thousands
    separated; a dash for nothing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        size = abs(cell)
        return f"{cell:.4f}" if 0.01 <= size < 10 else f"{cell:.2f}" if 10 <= size < 100 else f"{cell:.4g}"
    return str(cell)


def rough(value: float | None) -> str | None:
    """Three significant digits, for what is not known better: 1234.5 → '1,234', 0.98765 → '0.988'."""
    return value if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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


def _cut(name: str, room: int) -> str:
    """A name in at most `room` characters, but never fewer than 12: its beginning, and the end that tells runs apart."""
    room = max(room, 12)
    return name if len(name) <= room else f"{name[: room - 9]}…{name[-8:]}"


class LiveTable:
    """A table on stderr that is redrawn in place; only for a terminal. `room` is the number of rows that fit."""

    def __init__(self, columns: Sequence[str], *, left: int = 1, optional: Sequence[str] = ()) -> None:
        self.columns, self.left, self.optional = columns, left, optional
        self._live: Live | None = None

    @property
    def room(self) -> int:
        """Rows that fit on the screen below the header and above the title."""
        return max(3, stderr().size.height - 6)

    def update(self, rows: Iterable[Sequence[Any]], title: str) -> None:
        """Show these rows under this title instead of the last ones."""
        from rich.live import Live

        texts = [[number(cell) for cell in row] for row in rows]
        cells, width = _Table(self.columns, texts, self.left), stderr().width
        layout = cells.fitting(width, self.optional)
        if layout is None:  # names are cut: what is redrawn is not there to be copied
            others = [least for least, name in zip(cells.least[1:], self.columns[1:], strict=True) if name not in self.optional]
            room = width - sum(others) - len(others)
            cells = _Table(self.columns, [[_cut(row[0], room), *row[1:]] for row in texts], self.left)
            layout = cells.fitting(width, self.optional) or _Layout(dict(enumerate(cells.natural)), GAPS[-1])
        table = cells.drawn(layout, title)
        if self._live is None:
            self._live = Live(table, console=stderr(), auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Take the table away and leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
