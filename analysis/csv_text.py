"""CSV as programs and people write it: delimiters `, ; tab |` or spaces, comments, byte order marks, index columns, total rows.

records = csv_records(content)      bytes → one dict per row, numbers as numbers (see `cells`)
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..words import few
from .cells import column_numbers, read_number

DELIMITERS = ",;\t|"
TEXT_COLUMNS = (
    "run",
    "name",
    "run_name",
    "display_name",
    "run_id",
    "id",
    "data_hash",
    "commit",
)  # a hash may consist of digits
INDEX = re.compile(r"|Unnamed: \d+", re.IGNORECASE)  # header of a column of row numbers, as pandas and R write it
TOTALS = (
    *("total", "totals", "grand total", "sum", "mean", "average", "avg", "median", "count", "overall"),
    *("gesamt", "summe", "mittelwert"),
)
STATISTICS = (*TOTALS, "std", "std dev", "stdev", "std. dev.", "min", "max", "25%", "50%", "75%")  # that stand beside a total
RULE = re.compile(r":?-+:?")  # a cell of the line below the header in Markdown
FILES = {  # first bytes → what such a file is, and how a table comes out of it
    b"PK\x03\x04": "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"\x1f\x8b": "compressed by gzip; unpack it by gunzip",
    b"BZh91AY&SY": "compressed by bzip2; unpack it by bunzip2",
    b"\xfd7zXZ": "compressed by xz; unpack it by unxz",
    b"(\xb5/\xfd": "compressed by zstd; unpack it by unzstd",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save the sheet as CSV",
    b"%PDF": "a PDF; save the table as CSV",
    b"PAR1": "in the Parquet format; let its name end in .parquet",
}
Numbered = tuple[list[str], int]  # the cells of a row, and its line


def decode(content: bytes) -> str:
    """Text of UTF-8, or of UTF-16 and UTF-32 with a byte order mark or without. Raises ValueError, which names the likely
    encoding of other files, or what a file is that is no text."""
    if kind := next((kind for start, kind in FILES.items() if content.startswith(start)), None):
        raise ValueError(f"it is {kind}")
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if content.startswith(mark):
            return content.decode(encoding)
    if b"\0" in content[:64]:
        try:
            return content.decode("utf-16-be" if content[:1] == b"\0" else "utf-16-le")
        except UnicodeDecodeError:
            raise ValueError("it is no text; save the table as CSV") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} has the byte 0x{content[error.start]:02x}, which is not UTF-8; if the file is Latin-1 or "
            "Windows-1252, convert it by: iconv -f WINDOWS-1252 -t UTF-8 FILE"
        ) from None


def csv_records(content: bytes) -> list[dict[str, Any]]:
    """The rows under the names in the header. Raises ValueError with the number of an unreadable line, or csv.Error."""
    lines = list(io.StringIO(decode(content), newline=""))
    body = [(i, line) for i, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    if body and (named := re.fullmatch(r"sep=([,;\t|])", body[0][1].strip(" \r\n"))):  # Excel's name of the delimiter
        body = body[1:]
    delimiter = named[1] if body and named else _delimiter([line for _, line in body])
    if delimiter == " ":
        body = [(i, re.sub(r"[ \t]+", " ", line.strip())) for i, line in body]
    rows = _cells(body, delimiter)
    if not rows:
        return []
    comments = [line for line in lines[: body[0][0] - 1] if line.strip()]
    if (header := _header_in_comment(comments, rows[0][0], delimiter)) is None:
        header = rows.pop(0)[0]
    if rows and all(read_number(cell) is not None for cell in header if cell):
        raise ValueError(f"its first line holds numbers ({', '.join(header[:4])}), not the names of columns; add a header")
    if header[-1] and all(len(row) == len(header) + 1 for row, _ in rows) and _are_row_names([row[0] for row, _ in rows]):
        header = ["", *header]  # R's write.table does not name the column of row names
    blank = {i + 1 for i, line in enumerate(lines, 1) if not line.strip()}
    return _records(header, _below_one_header(header, [row for row in rows if any(row[0])], blank), delimiter)


def _cells(body: Sequence[tuple[int, str]], delimiter: str) -> list[Numbered]:
    """The cells of each line, without Markdown's rule. Raises ValueError for a quotation mark that is not closed."""
    reader = csv.reader((line for _, line in body), delimiter=delimiter, strict=True, skipinitialspace=True)
    rows, first = list[Numbered](), 1
    try:
        for row in reader:
            first = body[min(reader.line_num, len(body) - 1)][0]  # of the next row
            cells = [cell.strip() for cell in row]
            if not all(RULE.fullmatch(cell) for cell in cells if cell) or not any(len(cell) > 2 for cell in cells):
                rows.append((cells, body[reader.line_num - 1][0]))
    except csv.Error as error:
        raise ValueError(f"line {first}: {error}; a quotation mark may not be closed") from None
    return rows


def _below_one_header(header: Sequence[str], rows: Sequence[Numbered], blank: set[int]) -> list[Numbered]:
    """The rows under one header, also of several tables below each other: repeated headers, in any order, are dropped.

    `blank` are the lines after an empty one. Raises ValueError for a table of other columns.
    """
    names, places, out = sorted(header), list(range(len(header))), list[Numbered]()
    numeric = any(read_number(cell) is not None for row, _ in rows for cell in row)
    for row, number in rows:
        if sorted(row) == names:
            places = [row.index(name) for name in header]
        elif number in blank and numeric and out and not any(read_number(cell) is not None for cell in row):
            words = [cell for cell in row if cell]
            if len(words) == 1:
                raise ValueError(f"line {number} is no run ('{words[0]}'); remove it, or begin it with #")
            raise ValueError(
                f"line {number} looks like the header of another table ({few(words)}); give each table a file of its own"
            )
        elif len(row) >= len(header):
            out.append(([row[i] for i in places] + row[len(header) :], number))
        else:
            out.append((row, number))
    return out


def _records(header: Sequence[str], rows: Sequence[tuple[list[str], int]], delimiter: str) -> list[dict[str, Any]]:
    for row, number in rows:
        if any(row[len(header) :]):
            raise ValueError(_too_long(header, row, number, delimiter))
    kept = [i for i, name in enumerate(header) if not INDEX.fullmatch(name)]
    names = [header[i] for i in kept]
    if again := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"two columns of its header are named '{again}'; rename one")
    records: list[dict[str, Any]] = [{header[i]: row[i] if i < len(row) else None for i in kept} for row, _ in rows]
    count = len(records) - totals(records)
    records, total = records[:count], records[count:]  # words of totals would turn columns of numbers into text
    texts = {name: [record[name] or "" for record in records] for name in names if not _is_text(name)}
    for name, values in column_numbers(texts, delimiter).items():
        for record, value in zip(records, values, strict=True):
            record[name] = value
    return records + total


def _too_long(header: Sequence[str], row: Sequence[str], number: int, delimiter: str) -> str:
    """Why a line may have more cells than the header, and the way out."""
    about = f"line {number} has {len(row)} cells, more than the {len(header)} of the header ({few(header, 4)})"
    if len(header) == 1:
        return f"{about}; if a title stands above the header, remove it, or begin it with #"
    if delimiter == "," and len(row) < 2 * len(header) + 1:
        return f"{about}; numbers and texts with commas stand in quotes"
    return about


def _is_text(name: str) -> bool:
    """Whether a column of this name is never read as numbers."""
    return re.sub(r"[\s-]+", "_", name.lower()) in TEXT_COLUMNS


def totals(records: Sequence[Mapping[str, Any]]) -> int:
    """How many of several records, from the end, are totals, means or other statistics of those above.

    One column says so, which has such words in these rows alone: `mean` may also be the setting of a run.
    """
    most = 0
    for column in records[-1] if records else ():
        cells = [record.get(column) for record in records]
        words = [cell.strip().rstrip(":").lower() if isinstance(cell, str) else "" for cell in cells]
        runs = next((i for i, word in enumerate(words) if word in STATISTICS), len(words))
        if 0 < runs < len(words) and all(word in STATISTICS for word in words[runs:]) and set(words[runs:]) & set(TOTALS):
            most = max(most, len(words) - runs)
    return most


def _are_row_names(cells: Sequence[str]) -> bool:
    """Whether these cells, one of each of several rows, are names or numbers of the rows."""
    numbers = [read_number(cell) for cell in cells]
    counts = any(numbers == list(range(start, start + len(cells))) for start in (0, 1))
    return len(cells) > 1 and (counts or (len(set(cells)) == len(cells) and all(number is None for number in numbers)))


def _header_in_comment(comments: Sequence[str], first: Sequence[str], delimiter: str) -> list[str] | None:
    """The names of columns in a comment above a table of numbers, as numpy's savetxt writes them."""
    if not comments or len(first) < 2 or not any(read_number(cell) is not None for cell in first):
        return None
    names = [name.strip() for name in next(csv.reader([comments[-1].lstrip("# ")], delimiter=delimiter))]
    return names if len(names) == len(first) else None


def _delimiter(lines: Sequence[str], sample: int = 200) -> str:
    """The delimiter that gives all lines as many cells as the first, and the most; by default the first of `, ; tab |`.

    Spaces are one only where no other is found and all lines have equally many words.
    """
    text = "".join(lines[:sample])

    def fit(delimiter: str) -> tuple[float, int]:
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True))
        except csv.Error:
            return (0, 0)
        width = len(rows[0]) if rows else 0
        same = sum(len(row) == width for row in rows)
        return (same / len(rows) if width > 1 else 0, width)

    best = max(DELIMITERS, key=fit)
    words = {len(line.split()) for line in lines[:sample]}
    return " " if fit(best)[0] == 0 and len(words) == 1 and words.pop() > 1 and len(lines) > 1 else best
