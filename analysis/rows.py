"""Rows of tables under our names: which runs count, the meaning of their columns, and columns computed from others.

table = read_table("runs.csv")
rows = read_rows(table.records, table.row_names(), columns={"D": "flops/(6*N)"}, where={"N": "<=1e8"})
rows.rows, rows.left_out
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import unknown
from ..words import choices, few
from . import formulas
from .cells import is_percentage, read_number
from .filters import says, written
from .formats import read_format
from .tables import (
    ALIASES,
    BATCH,
    LOSS_COLUMNS,
    NUMBERS,
    SKIP,
    SYNONYMS,
    TOTAL_ROW,
    PointError,
    TableOptions,
    column_named,
    has_value,
    is_finished,
    matches,
    named_run,
    scaled,
    state_of,
)


@dataclasses.dataclass(frozen=True)
class LeftOutRow:
    """A row that does not count: its name in the source, the kind of reason (a key of LEFT_OUT), and the reason."""

    name: str
    kind: str
    reason: str = ""


LEFT_OUT = {  # kind of reason → why such rows are left out
    "unfinished_runs": "unfinished",
    "no_loss": "without a loss",
    "total_row": "sums of other rows",
    "bad_rows": "unreadable",
    "repeated_rows": "exact repeats of others",
    "not_best": "beaten by another value of --best-of",
    "not_last": "earlier checkpoints of their runs",
}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Finished runs under our names (keys of ALIASES; None for missing values), and the rows that were left out.

    `names[i]` is the name of rows[i] in the source, `numbers[i]` its number in the source, from 1. `columns` maps our names to
    those of the table. `kept` names unfinished runs among the rows, with their states.
    """

    rows: list[dict[str, Any]]
    names: list[str]
    numbers: list[int]
    columns: dict[str, str]
    left_out: list[LeftOutRow]
    kept: list[str]

    @property
    def unfinished(self) -> list[str]:
        """Name (state) of the unfinished runs that are left out."""
        return [each.name for each in self.left_out if each.kind == "unfinished_runs"]

    @property
    def without_loss(self) -> list[str]:
        """Names of the runs without a loss."""
        return [each.name for each in self.left_out if each.kind == "no_loss"]

    def without(self, indices: Mapping[int, tuple[str, str]]) -> Rows:
        """The rows but those at `indices`, which maps each to its kind and reason."""
        rest = [i for i in range(len(self.rows)) if i not in indices]
        out = [LeftOutRow(self.names[i], *why) for i, why in indices.items()]
        return dataclasses.replace(
            self,
            rows=[self.rows[i] for i in rest],
            names=[self.names[i] for i in rest],
            numbers=[self.numbers[i] for i in rest],
            left_out=[*self.left_out, *out],
        )


def read_rows(
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, Any] | None = None,
    options: TableOptions | None = None,
    source: str = "table",
) -> Rows:
    """The finished runs among flat `records`; `names` are their names in messages.

    `columns` maps our names to the table's, or to a formula over them (see `formulas`); `a+b` joins two texts. `where` keeps
    the rows whose column meets a condition (see `filters`). Runs that are not finished, and runs without a loss, are left out
    and named. Raises PointError with row and column for a missing column, a value that is no number, exact repeats, and if
    nothing remains.
    """
    options = options or TableOptions()
    table = dict.fromkeys(key for record in records for key in record)
    wanted = {SYNONYMS.get(name, name): column for name, column in (columns or {}).items()}
    aliases = {ours: _with_numbers(choices, records) if ours in NUMBERS else choices for ours, choices in ALIASES.items()}
    if "coverage" in table:
        aliases["N"] = (*aliases["N"], "k")  # of law coverage: k samples
    to_nats, loss_names = _loss_unit(options.loss_unit)
    if not any(name in table for name in aliases["loss"]) or (loss_names and any(name in table for name in loss_names)):
        aliases["loss"] = (*loss_names, *aliases["loss"])
    reader = _Reader(table, wanted, aliases)
    kept = _selected(records, names, where or {}, reader, source)
    names_in_table = {name: next((c for c in choices if c in table), name) for name, choices in aliases.items()}
    for name in ("N", "loss"):
        if name not in wanted and names_in_table[name] not in table:
            raise PointError(_missing(name, table), column=name)
    out, originals = _finished(kept, reader, options, to_nats, names_in_table)
    _require_labels(options.bits_of, out)
    out = _without_repeats(out, originals, options)
    if options.best_of:
        out = _best(out, options.best_of, reader)
    if options.last:
        out = _last(out)
    if not out.rows:
        counts = Counter(each.kind for each in out.left_out)
        bad = f", {counts['bad_rows']} that cannot be read" if counts["bad_rows"] else ""
        left_out = f"{counts['unfinished_runs']} unfinished, {counts['no_loss']} without a loss{bad}"
        hint = "; --keep-failed keeps the unfinished" if counts["unfinished_runs"] else ""
        raise PointError(f"{source} holds no finished runs with a loss ({left_out}){hint}")
    return out


def read_cells(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], columns: Mapping[str, str] | None = None
) -> list[tuple[str, float, float, str | None]]:
    """Name, N, D and scheme (None if it has none) of each record, as the records of runs are read; rows of totals are left out.

    `columns` as in `read_rows`; those that the table lacks are not needed. Raises PointError with row and column for a value
    that is missing or no positive number.
    """
    table = dict.fromkeys(key for record in records for key in record)
    wanted = {SYNONYMS.get(ours, ours): text for ours, text in (columns or {}).items()}
    aliases = {ours: _with_numbers(names, records) if ours in NUMBERS else names for ours, names in ALIASES.items()}
    reader = _Reader(
        table, {k: v for k, v in wanted.items() if column_named(v, table) or _computable(v, table, wanted)}, aliases
    )
    out = []
    for record, name in zip(records, names, strict=True):
        if state_of(record) == TOTAL_ROW:
            continue
        row = reader.row(record, name)
        for ours in ("N", "D"):
            if row[ours] is None:
                why = _missing("N", table) if ours == "N" else missing_tokens(table)
                raise PointError(why if all(r.get(ours) is None for r in records) else "an empty cell", row=name, column=ours)
            if not (math.isfinite(row[ours]) and row[ours] > 0):
                raise PointError(f"{row[ours]!r} must be a positive finite number", row=name, column=ours)
        out.append((name, float(row["N"]), float(row["D"]), row["scheme"]))
    return out


def _computable(text: str, table: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Whether a table has what a formula needs."""
    try:
        names = formulas.parse(text).names
    except ValueError:
        return False
    return bool(names) and all(column_named(name, table) or name in wanted for name in names)


def _finished(
    kept: Sequence[tuple[Mapping[str, Any], str, int]],
    reader: _Reader,
    options: TableOptions,
    to_nats: Callable[[float], float] | None,
    columns: dict[str, str],
) -> tuple[Rows, list[Mapping[str, Any]]]:
    """The rows of finished runs with a loss, and their records."""
    out = Rows([], [], [], columns, [], [])
    originals = []
    for record, name, number in kept:
        state = state_of(record)
        unfinished = not is_finished(state)
        if state == TOTAL_ROW:
            out.left_out.append(LeftOutRow(name, "total_row"))
            continue
        if unfinished and not options.keep_failed:
            out.left_out.append(LeftOutRow(f"{name} ({state})", "unfinished_runs"))
            continue
        try:
            row = reader.row(record, name)
            if row["loss"] is None:
                out.left_out.append(LeftOutRow(name, "no_loss"))
                continue
            row["loss"] = _converted(to_nats, row["loss"], name)
            _apply_bits(row, options.bits_of)
            if options.skip_bad:
                _check_row(row, name)
        except PointError as error:
            if not options.skip_bad:
                if error.row:
                    error.args = (f"{error}{SKIP}",)
                raise
            out.left_out.append(LeftOutRow(name, "bad_rows", str(error)))
            continue
        if unfinished:
            out.kept.append(f"{name} ({state})")
        row["key"] = str(row["run"]) if "run" in reader.wanted and row["run"] is not None else run_key(record, name)
        row["cluster"] = None if options.cluster is None else reader.cluster(record, row, options.cluster)
        out.rows.append(row)
        out.names.append(name)
        out.numbers.append(number)
        originals.append(record)
    if options.cluster == "run" and out.rows and not any(row["cluster"] for row in out.rows):
        raise PointError(f"--cluster run needs a column that names the run of each row: {RUN_COLUMNS}", column="run")
    return out, originals


def _with_numbers(choices: Sequence[str], records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The names among `choices` of columns that hold a number: `loss` may name the function, and `val/loss` hold its value."""
    numeric = tuple(c for c in choices if any(_is_number(record.get(c)) for record in records))
    return numeric or tuple(choices)


def _is_number(value: Any) -> bool:
    return read_number(value) is not None if isinstance(value, str) else isinstance(value, int | float)


def _require_labels(bits_of: Mapping[str, str], rows: Rows) -> None:
    """Raise PointError for a label of `--bits-of` that no row has."""
    labels = dict.fromkeys(str(row["scheme"]) for row in rows.rows if row["scheme"] is not None)
    for label in bits_of:
        if rows.rows and label not in labels:
            raise PointError(
                f"--bits-of {label}: no row has this label; the labels are {choices(labels, label)}", column="scheme"
            )


def selected(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], where: Mapping[str, Any], columns: Mapping[str, str]
) -> list[bool]:
    """Whether each record meets `where`; `columns` as in `read_rows`. Raises PointError for a column that no record has."""
    table = dict.fromkeys(key for record in records for key in record)
    if not where or not table:
        return [True] * len(records)
    reader = _Reader(table, {SYNONYMS.get(name, name): column for name, column in columns.items()}, ALIASES)
    return [
        all(says(reader.cell(key, record, name), value) for key, value in where.items())
        for record, name in zip(records, names, strict=True)
    ]


def _selected(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], where: Mapping[str, Any], reader: _Reader, source: str
) -> list[tuple[Mapping[str, Any], str, int]]:
    """The records that meet `where`, with their names and places from 1."""
    kept = list(zip(records, names, range(1, len(records) + 1), strict=True))
    for key, value in where.items():
        cells = [reader.cell(key, record, name) for record, name, _ in kept]
        remaining = [each for each, cell in zip(kept, cells, strict=True) if says(cell, value)]
        if kept and not remaining:
            raise PointError(f"{source} holds no rows with {written(key, value)}{_commonest(cells)}")
        kept = remaining
    if not kept:
        raise PointError(f"{source} holds no rows")
    return kept


def listed(table: Mapping[str, Any], *wanted: str) -> str:
    """The columns of a table as a message names them, without those that every source gets."""
    own = [column for column in table if column not in ("run", "state")] or list(table)
    return choices(own, *(name for word in wanted for name in (word, *ALIASES.get(word, ())))) or "no columns"


def _missing(name: str, table: Mapping[str, Any]) -> str:
    """Why a table without a column of ours is refused, and what the user can do."""
    if len(meant := matches(name, table)) > 1:
        return f"missing; several columns may be meant: {choices(meant, name)}; choose one by --map {name}={meant[0]}"
    has = listed(table, name)
    if name == "loss":
        for unit, names in LOSS_COLUMNS.items():
            if other := [c for c in table if c in names] or matches(name, table, names):
                how = f"--map loss={other[0]} --loss-unit {unit}{':BYTES_PER_TOKEN' if unit == 'bpb' else ''}"
                return f"missing; the table has: {has}; name the unit of {other[0]} by {how}"
        if schemes := [c for c in table if read_format(c) or re.fullmatch(r"w[\d.]+a[\d.]+", c, re.IGNORECASE)]:
            row = "write a row for each run, with its loss and scheme"
            return f"missing; columns are named like schemes ({few(schemes)}): {row}; or name the column by --map loss=COLUMN"
    parts = [c for c in table if any(matches(name, {part: None}) for part in re.split(r"[./]", c))]
    held_out = [c for c in parts if re.search(r"val|eval|test", c, re.IGNORECASE)]
    column = next(iter([*held_out, *parts]), "COLUMN")
    return f"missing; the table has: {has}; name the column by --map {name}={column}"


FLOPS = ("flops", "FLOPs", "train_flops", "training_flops", "compute", "C", "total_flops")


def missing_tokens(table: Mapping[str, Any]) -> str:
    """Why a table without tokens is refused, and what the user can do."""
    if flops := next((c for name in FLOPS if (c := column_named(name, table))), None):
        return f"missing; the table has {flops}: give --map 'D={flops}/(6*N)'"
    return "missing; name the column by --map D=COLUMN"


def _loss_unit(unit: str) -> tuple[Callable[[float], float] | None, tuple[str, ...]]:
    """The function from this unit to nats a token, and the names of columns that have this unit."""
    kind, _, size = unit.partition(":")
    if kind == "nats" and not size:
        return None, ()
    if kind == "bits" and not size:
        return (lambda bits: bits * math.log(2)), LOSS_COLUMNS["bits"]
    if kind == "ppl" and not size:
        return math.log, LOSS_COLUMNS["ppl"]
    bytes_per_token = read_number(size) if kind == "bpb" else None
    if bytes_per_token is not None and 0 < bytes_per_token < math.inf:
        return (lambda bits: bits * math.log(2) * bytes_per_token), LOSS_COLUMNS["bpb"]
    raise PointError(f"--loss-unit: '{unit}' is none of nats, bits, ppl and bpb:BYTES_PER_TOKEN, such as bpb:4.4")


def _converted(to_nats: Callable[[float], float] | None, loss: float, name: str) -> float:
    if to_nats is None:
        return loss
    try:
        return to_nats(float(loss))
    except (ValueError, OverflowError):
        raise PointError(f"{loss} is no perplexity", row=name, column="loss") from None


def _apply_bits(row: dict[str, Any], bits_of: Mapping[str, str]) -> None:
    """Set the bits of a row whose label `--bits-of` names: `4`, or `4/8` for weights and activations."""
    text = bits_of.get(row["scheme"] or "")
    if text is None:
        return
    bits = [read_number(part) for part in re.split(r"[/,]", text)]
    if len(bits) > 2 or any(b is None or not 0 < b <= 32 for b in bits):
        raise PointError(f"--bits-of {row['scheme']}: '{text}' is no number of bits, such as 4, or 4/8 for activations of 8")
    row["w_grid_bits"], row["a_grid_bits"] = bits[0], bits[-1]


def _check_row(row: Mapping[str, Any], name: str) -> None:
    """Raise PointError for a number that is not positive and finite but must be."""
    for column in ("N", "D", "unique_tokens", "loss", "weight"):
        value = row[column]
        if (value is None and column == "N") or (value is not None and not (math.isfinite(value) and value > 0)):
            shown = "an empty cell" if value is None else repr(value)
            raise PointError(f"{shown} must be a positive finite number", row=name, column=column)


def _without_repeats(rows: Rows, originals: Sequence[Mapping[str, Any]], options: TableOptions) -> Rows:
    """Refuse rows that repeat an earlier one in every column, all at once; with `skip_bad`, leave them out.

    Rows that differ anywhere, in the learning rate or the name of the run, are different measurements.
    """
    first: dict[tuple[Any, ...], int] = {}
    repeats: dict[int, int] = {}
    measured = [(repr(row["N"]), repr(row["loss"])) for row in rows.rows]  # equal where all columns are
    counts = Counter(measured)
    for i, (record, name) in enumerate(zip(originals, rows.names, strict=True)):
        if counts[measured[i]] == 1:
            continue
        # a `run` made from the row's number, or from a name of several rows, does not identify the run
        own = {k: v for k, v in record.items() if k != "run" and has_value(v)} | {"run": run_key(record, name)}
        key = tuple(sorted((k, repr(_written(v))) for k, v in own.items()))
        if key in first:
            repeats[i] = first[key]
        else:
            first[key] = i
    if repeats and not options.skip_bad:
        shown = [f"{rows.names[i]} = {rows.names[j]}" for i, j in repeats.items()]
        first_repeat, original = next(iter(repeats.items()))
        others = f"; so do {len(shown) - 1} other rows: {few(shown[1:])}" if len(shown) > 1 else ""
        raise PointError(
            f"repeats {rows.names[original]} in every column, and would count double{others}; remove the repeats, or "
            "leave them out with --skip-bad",
            row=rows.names[first_repeat],
            column="loss",
        )
    return rows.without({i: ("repeated_rows", f"repeats {rows.names[j]}") for i, j in repeats.items()})


def _written(value: Any) -> Any:
    """A cell, as a number if it is one, however it is written: 30M is 3e7."""
    number = read_number(value) if isinstance(value, str) else value
    return float(number) if isinstance(number, int | float) and not isinstance(number, bool) else value


def run_key(record: Mapping[str, Any], name: str) -> str | None:
    """The run of a row, as its table names it; None if it names none."""
    if (run := named_run(name)) is not None:
        return run
    named = _value(record, [c for c in ALIASES["run"] if c != "run" or record.get("run") != name])
    return None if named is None else str(named)


def _best(rows: Rows, best_of: Sequence[str], reader: _Reader) -> Rows:
    """The run with the least loss of each cell; `best_of` are the columns in which the runs of a cell may differ."""
    chosen = [reader.known(name, "--best-of") for name in best_of]
    keys = [c for c in ("scheme", "N", "D", "unique_tokens", "tokens_fp", "seed", "data_hash") if rows.columns[c] not in chosen]
    best: dict[tuple[Any, ...], int] = {}
    for i, row in enumerate(rows.rows):
        key = tuple(row[c] for c in keys)
        if key not in best or row["loss"] < rows.rows[best[key]]["loss"]:
            best[key] = i
    kept = set(best.values())
    return rows.without({i: ("not_best", ", ".join(best_of)) for i in range(len(rows.rows)) if i not in kept})


RUN_COLUMNS = "run, Name, name or id, or another by --map run=COLUMN"


def _last(rows: Rows) -> Rows:
    """The row with the most tokens of each run. Raises PointError if a name is that of runs of several sizes or schemes."""
    last: dict[str, int] = {}
    for i, row in enumerate(rows.rows):
        key = row["key"]
        if key is None:
            raise PointError(f"--last needs a column that names the run of each checkpoint: {RUN_COLUMNS}", column="run")
        other = rows.rows[last.setdefault(key, i)]
        if (row["N"], row["scheme"]) != (other["N"], other["scheme"]):
            raise PointError(
                f"run {key} has rows of several sizes or schemes, so the column does not name single runs, whose last rows "
                "--last keeps; name another by --map run=COLUMN",
                row=rows.names[i],
                column="run",
            )
        if (row["D"] or 0) >= (other["D"] or 0):
            last[key] = i
    kept = set(last.values())
    return rows.without({i: ("not_last", "") for i in range(len(rows.rows)) if i not in kept})


class _Reader:
    """Records of one table → rows under our names."""

    def __init__(self, table: Mapping[str, Any], wanted: Mapping[str, str], aliases: Mapping[str, tuple[str, ...]]) -> None:
        self.table, self.wanted, self.aliases = table, wanted, aliases
        self.formulas: dict[str, formulas.Formula] = {}
        self.joined: dict[str, list[str]] = {}  # our name → columns whose texts are joined by +
        needed = {name for text in wanted.values() for name in re.findall(r"\w+", text)}  # by other formulas
        for ours in wanted:
            if ours not in ALIASES and ours not in needed:
                raise PointError(unknown("--map", ours, ALIASES, what="name").removesuffix("."))
        for ours, text in wanted.items():
            if ours == "weight" and text == "none":
                self.joined[ours] = []
            else:
                self._read_mapping(ours, text)

    def _read_mapping(self, ours: str, text: str) -> None:
        if (column := column_named(text, self.table)) is not None:
            self.joined[ours] = [column]
        elif ours not in NUMBERS:
            self.joined[ours] = [self._column(part, ours) for part in text.split("+")]
        elif formulas.is_formula(text):
            try:
                self.formulas[ours] = formulas.parse(text)
            except ValueError as error:
                raise PointError(f"--map {ours}: {error}; the table has: {listed(self.table, ours)}", column=ours) from error
            for name in self.formulas[ours].names:
                if not (name in self.wanted and name != ours):
                    self._column(name, ours)
        else:
            self._column(text, ours)

    def _column(self, name: str, ours: str) -> str:
        column = column_named(name.strip(), self.table)
        if column is None:
            raise PointError(f"no such column (mapped to {ours}); the table has: {listed(self.table, name)}", column=name)
        return column

    def known(self, name: str, option: str) -> str:
        """The column that an option names, by our name or the table's."""
        column = column_named(name, self.table, self.wanted)
        if column is None:
            raise PointError(f"no such column (of {option}); the table has: {listed(self.table, name)}", column=name)
        return column

    def cell(self, key: str, record: Mapping[str, Any], name: str) -> Any:
        """The value of a record under a name of ours or the table's, also one that a formula gives."""
        ours = SYNONYMS.get(key, key)
        if ours in self.formulas and key not in self.table:
            return self._computed(ours, record, name, ())
        column = column_named(key, self.table, self.wanted)
        if column is None:
            raise PointError(f"no such column; the table has: {listed(self.table, key)}", column=key)
        return record.get(column)

    def row(self, record: Mapping[str, Any], name: str) -> dict[str, Any]:
        """One run under our names."""
        row: dict[str, Any] = {}
        for ours, names in self.aliases.items():
            if ours in self.formulas:
                row[ours] = self._computed(ours, record, name, ())
                continue
            row[ours], column = self._cell(ours, names, record)
            if ours in NUMBERS and row[ours] is not None:
                row[ours] = _number(scaled(row[ours], column), name, ours if ours in ("N", "D", "loss") else column)
        if row["D"] is None and all(c in record for c in BATCH):
            row["D"] = math.prod(_number(record[c], name, c) or 0 for c in BATCH)
        if row["D"] is None and row["N"] is not None and "D" not in self.wanted:
            ratio = _number(record.get("tokens_per_param"), name, "tokens_per_param")
            row["D"] = None if ratio is None else ratio * row["N"]
        if row["scheme"] is None and has_value(record.get("w_quant")) and has_value(record.get("a_quant")):
            bits = [16.0 if row[c] is None else row[c] for c in ("w_grid_bits", "a_grid_bits")]
            row["scheme"] = published_scheme(str(record["w_quant"]), str(record["a_quant"]), *bits)
            row["w_grid_bits"] = row["a_grid_bits"] = None  # the name gives them more reliably than the columns
        if row["scheme"] is None and row["w_grid_bits"] is not None:
            w, a = row["w_grid_bits"], row["a_grid_bits"]
            row["scheme"] = f"w{w:g}a{w if a is None else a:g}"
        if row["scheme"] is not None:
            row["scheme"] = label_of(row["scheme"])
        return row

    def cluster(self, record: Mapping[str, Any], row: Mapping[str, Any], column: str) -> str | None:
        """The cluster with which a row shares its error: the value of a column, or the name of its run."""
        if column == "run":
            return row["key"]
        value = record.get(self.known(column, "--cluster"))
        return str(value) if has_value(value) else None

    def _cell(self, ours: str, choices: Sequence[str], record: Mapping[str, Any]) -> tuple[Any, str]:
        """The value of a record under one of our names, None if it has none, and the column of the value."""
        if ours in self.wanted:
            columns = self.joined[ours]
            parts = [record.get(part) for part in columns] or [None]
            value = parts[0] if len(parts) == 1 else "+".join(map(label_of, parts))
            return (value if has_value(value) else None), columns[0] if columns else ours
        for column in choices:
            if column in self.table and has_value(value := record.get(column)):  # most names are in no table
                return value, column
        return (value if has_value(value := record.get(ours)) else None), ours

    def _computed(self, ours: str, record: Mapping[str, Any], name: str, within: tuple[str, ...]) -> float | int | None:
        """The value of a formula; None if a column that it needs has no value."""
        if ours in within:
            raise PointError(f"--map: {' needs '.join([*within, ours])}, which is a circle", column=ours)
        missing = []

        def value_of(column: str) -> float:
            if column in self.formulas and column != ours:
                value = self._computed(column, record, name, (*within, ours))
            elif column in self.wanted and column != ours:
                value = _number(self._cell(column, (), record)[0], name, column)
            else:
                value = _number(record.get(self._column(column, ours)), name, column)
            if value is None:
                missing.append(column)
            return math.nan if value is None else value

        try:
            value = self.formulas[ours].value(value_of)
        except (ArithmeticError, ValueError) as error:
            raise PointError(f"{self.formulas[ours].text}: {error}", row=name, column=ours) from error
        return None if missing else _number(value, name, ours)


def published_scheme(w: str, a: str, w_bits: float, a_bits: float) -> str:
    """The scheme of QuEST's published runs: names of its quantizer classes and their bits → w4a4, w4a4-norot, w4sparse-a4, …

    FP4's classes are logged with 16 bits, because they take no argument for bits.
    """
    if w == a == "NoQuantizer":
        return "bf16"
    if "FP4" in w:
        return "w-fp4-a-fp4" if "FP4" in a else "w-fp4-a-16"
    sparse = "sparse-" if "FourEight" in w else ""
    activations = 16 if a == "NoQuantizer" else a_bits
    plain = "" if "Hadamard" in w or w == "NoQuantizer" else "-norot"
    return f"w{w_bits:g}{sparse}a{activations:g}{plain}"


def label_of(value: Any) -> str:
    """A cell as the label of a scheme: 4.0 and "4.0" are "4"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    text = str(value).strip()
    return f"{float(text):g}" if re.fullmatch(r"\d+\.\d+", text) else text


def _value(record: Mapping[str, Any], choices: Iterable[str]) -> Any:
    return next((record[c] for c in choices if has_value(record.get(c))), None)


def _number(value: Any, row: str, column: str) -> float | int | None:
    if not has_value(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        written = read_number(value) if isinstance(value, str) else None
        if written is None:
            raise PointError(f"{value!r} is not a number", row=row, column=column) from None
        if is_percentage(value) and column in ("N", "D", "loss"):
            raise PointError(f"{value!r} is a share, and {column} is none", row=row, column=column) from None
        number = float(written)
    if math.isnan(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _commonest(cells: Iterable[Any]) -> str:
    """The commonest values of a column, shown to a user who asked for another."""
    counts = Counter(f"{v:.12g}" if isinstance(v, float) else str(v) for v in cells if has_value(v))
    values = [value for value, _ in counts.most_common()]
    return f"; it has {few(values)}" if values else ""
