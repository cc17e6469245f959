"""Tables that fit the width of the terminal, printed once or redrawn in place."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .guard import guarded, is_terminal
from .letters import legible
from .numbers import number
from .streams import note, say, stderr, stdout

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", left: int = 1, optional: Sequence[str] = ()
) -> None:
    """Print a table on stdout; the first `left` columns are aligned left, the others right. None is shown as a dash.

    Off a terminal the table is as wide as its content. On a terminal no number and no name is broken: columns move together,
    prose and headers wrap between words, then `optional` columns are dropped in the order in which they are named, and a table
    that still does not fit becomes one paragraph per row.
    """
    width = stdout().width if is_terminal(sys.stdout) else None
    encoding = guarded(sys.stdout).encoding  # missing characters are replaced before the cells are measured
    columns, optional = ([legible(name, encoding) for name in names] for names in (columns, optional))
    table = _Table(columns, [[legible(number(cell), encoding) for cell in row] for row in rows], left)
    layout = table.fitting(width, optional)
    if layout is None:
        assert width is not None, "every table fits an unlimited width"
        for line in (*([title] if title else []), *table.paragraphs(width)):
            say(line, as_is=True)
        return
    if width is None and (lines := table.lines(layout, title, encoding)):
        guarded(sys.stdout).write("".join(f"{line}\n" for line in lines))
    else:
        stdout(layout.width).print(table.drawn(layout, title, encoding))
    if left_out := [name for i, name in enumerate(columns) if i not in layout.widths]:
        note(f"left out at this width: {', '.join(dict.fromkeys(left_out))}; a wider terminal, a pipe or --json has them")


GAPS = (3, 2, 1)  # spaces between columns
PROSE_WIDTH = 12  # to which a column of wrappable text may shrink
_WORDS = re.compile(r"[^\W\d_]{3,}.* |.* [^\W\d_]{3,}")  # text that may be broken at spaces, unlike '1.2 [1.1, 1.3]'


@dataclass(frozen=True)
class _Layout:
    """The columns that are shown, the width of each, and the gap between them."""

    widths: Mapping[int, int]
    gap: int

    @property
    def width(self) -> int:
        return sum(self.widths.values()) + self.gap * (len(self.widths) - 1)


class _Table:
    """Cells as text, and how they fit a width. A row that is shorter than the header is filled with empty cells."""

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
        """The most spacious layout within `width` (None: unlimited), or None if the table does not fit."""
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

    def drawn(self, layout: _Layout, title: str, encoding: str) -> Table:
        """The table as a rich table, with lines that the encoding supports."""
        from rich.box import SIMPLE_HEAD, Box
        from rich.table import Table
        from rich.text import Text

        padding = {3: (0, 1, 0, 1), 2: (0, 1, 0, 0), 1: (0, 0, 0, 0)}[layout.gap]
        heading = Text(title) if title else None
        box = Box(legible(str(SIMPLE_HEAD), encoding), ascii=True)  # True: not to be replaced by one of + and |
        table = Table(title=heading, title_justify="left", box=box, pad_edge=False, show_edge=False, padding=padding)
        for i, width in layout.widths.items():
            table.add_column(Text(self.columns[i]), justify="left" if i < self.left else "right", overflow="fold", width=width)
        for row in self.rows:
            table.add_row(*(Text(row[i]) for i in layout.widths if i < len(row)))
        return table

    def lines(self, layout: _Layout, title: str, encoding: str) -> list[str]:
        """The same lines as rich would print for `drawn`, in a tenth of its time; empty if a cell has to be wrapped."""
        from rich.cells import cell_len, set_cell_size

        texts = [title, *self.columns, *(cell for row in self.rows for cell in row)]
        if cell_len(title) > layout.width or 0 in layout.widths.values() or any(c in text for text in texts for c in "\n\t\r"):
            return []

        def line(cells: Sequence[str]) -> str:
            padded = []
            for i, width in layout.widths.items():
                text = cells[i].rstrip() if i < len(cells) else ""
                space = " " * (width - cell_len(text))
                padded.append(text + space if i < self.left else space + text)
            return (" " * layout.gap).join(padded)

        rule = legible("─", encoding) * layout.width
        return [*([set_cell_size(title, layout.width)] if title else []), line(self.columns), rule, *map(line, self.rows)]

    def paragraphs(self, width: int) -> Iterator[str]:
        """Each row as lines: its names, then `header value` pairs, as many in a line as fit.

        A line is longer than `width` only if a single value is: the terminal wraps it, so that it can be copied whole.
        """
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


def shortened(name: str, room: int) -> str:
    """Shorten a name to `room` characters, at least 12: its beginning, and its end, which distinguishes runs."""
    room = max(room, 12)
    return name if len(name) <= room else f"{name[: room - 9]}…{name[-8:]}"


class LiveTable:
    """A table on stderr that is redrawn in place, for terminals only."""

    def __init__(self, columns: Sequence[str], *, left: int = 1, optional: Sequence[str] = ()) -> None:
        self.columns, self.left, self.optional = columns, left, optional
        self._live: Live | None = None

    @property
    def room(self) -> int:
        """The number of rows that fit on the screen."""
        return max(3, stderr().size.height - 6)

    def update(self, rows: Iterable[Sequence[Any]], title: str) -> None:
        """Replace rows and title."""
        from rich.live import Live

        encoding = guarded(sys.stderr).encoding
        texts = [[legible(number(cell), encoding) for cell in row] for row in rows]
        cells, width = _Table(self.columns, texts, self.left), stderr().width
        layout = cells.fitting(width, self.optional)
        if layout is None:  # shorten the names: nobody copies them from a live table
            others = [least for least, name in zip(cells.least[1:], self.columns[1:], strict=True) if name not in self.optional]
            room = width - sum(others) - len(others)
            cells = _Table(self.columns, [[shortened(row[0], room), *row[1:]] for row in texts], self.left)
            layout = cells.fitting(width, self.optional) or _Layout(dict(enumerate(cells.natural)), GAPS[-1])
        table = cells.drawn(layout, title, encoding)
        if self._live is None:
            self._live = Live(table, console=stderr(), auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Remove the table from the terminal."""
        if self._live is not None:
            self._live.stop()
