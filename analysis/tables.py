"""Read tables of runs: one reader of files, one list of column names and one reading of rows, for fits and for imports alike.

    table = read_table("runs.csv")                      a file → records, one dict per run
    rows = read_rows(table.records, table.row_names())  records → the values a fit or an import needs, under our names

Files: CSV, JSON (a list of records, columns, or runs by name), JSON lines, Parquet. Nested records are flattened, among them
W&B's JSON (`config` and `summary` of each run, as its API gives them) and the published runs of QuEST (arXiv 2502.05003,
`for_plots/runs_for_scaling.json`), whose scheme follows from the names of its quantizers.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..metrics import VAL_LOSS

# Our name → the names that tables use for it. Of several that a row has, the first with a value is taken.
ALIASES: dict[str, tuple[str, ...]] = {
    "N": ("N", "params_non_embedding", "non_embedding_parameters", "N_noembed", "n_params", "params"),
    "D": ("D", "tokens", "train_tokens", "total_tokens", "tokens_seen"),
    "loss": ("loss", "final-val/loss", "val_loss", "val/loss", "eval/loss", VAL_LOSS, "coverage", "L"),
    "scheme": ("scheme", "P", "bits"),
    "weights": ("weights",),
    "activations": ("activations",),
    "w_grid_bits": ("w_grid_bits", "w_bits"),
    "a_grid_bits": ("a_grid_bits", "a_bits"),
    "w_stored_bits": ("w_stored_bits", "stored_bits"),
    "a_stored_bits": ("a_stored_bits",),
    "model_bits": ("model_bits",),
    "weight": ("weight",),
    "run": ("run", "Name", "name", "id"),
    "state": ("state", "State"),
    "data_hash": ("data_hash",),
    "lr": ("lr", "optim.lr", "learning_rate"),
    "seed": ("seed", "train.seed"),
    "n_layer": ("n_layer", "model.n_layer", "n_layers"),
    "d_model": ("d_model", "model.d_model", "n_embd", "hidden_size"),
}
SYNONYMS = {"params_non_embedding": "N", "tokens": "D", "w_bits": "w_grid_bits", "a_bits": "a_grid_bits"}  # of our names
NUMBERS = (
    *("N", "D", "loss", "w_grid_bits", "a_grid_bits", "w_stored_bits", "a_stored_bits", "model_bits", "weight"),
    *("lr", "seed", "n_layer", "d_model"),
)
BATCH = ("iterations", "batch_size", "sequence_length", "acc_steps", "world_size")  # whose product is D in QuEST's code
ALL = "all"  # label of the one scheme of a table that names none: its runs count as not quantized
FINISHED = ("finished", "done", "imported")  # states, in lower case, of runs whose loss counts
NESTED = ("args", "config", "summary", "summary_metrics", "summaryMetrics")  # parts of a record that are lifted to its level
TEXT_COLUMNS = ("run", "Name", "name", "id", "data_hash", "commit")  # never read as numbers: a hash may have digits alone
MISSING = ("", "nan", "na", "n/a", "null", "<na>", "#n/a")  # cells of a CSV that hold no value, in lower case


class PointError(ValueError):
    """A table that cannot be fitted, with the row (as the source counts it) and the column where that shows."""

    def __init__(self, message: str, *, row: str | None = None, column: str | None = None) -> None:
        self.row, self.column = row, column
        where = ", ".join(part for part in (row, f"column '{column}'" if column else None) if part)
        super().__init__(f"{where}: {message}" if where else message)


# ---------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class Table:
    """The records of a file, in its order, without nesting; a value that a row does not have is absent or None."""

    name: str
    sha256: str
    records: list[dict[str, Any]]

    def row_names(self) -> list[str]:
        """What messages call the rows: `run NAME` where the table names runs, else by number from 1."""
        if any("run" in record for record in self.records):
            return [f"run {record.get('run')}" for record in self.records]
        return [f"{self.name} row {i}" for i in range(1, len(self.records) + 1)]


def read_table(source: str | Path) -> Table:
    """Read a .csv, .json, .jsonl or .parquet file. Raises PointError, OSError, ImportError (no pyarrow)."""
    path = Path(source)
    kind = path.suffix.lower()
    if kind not in (".csv", ".json", ".jsonl", ".parquet", ".pq"):
        raise PointError(f"{path.name}: unknown kind of table '{kind}'; choices: .csv, .json, .jsonl, .parquet")
    content = path.read_bytes()
    try:
        if kind == ".csv":
            records = _csv_records(content.decode("utf-8-sig"))
        elif kind == ".json":
            records = _json_records(json.loads(content.decode("utf-8-sig")))
        elif kind == ".jsonl":
            records = _json_records([json.loads(line) for line in content.decode("utf-8-sig").splitlines() if line.strip()])
        else:
            import pandas as pd

            records = frame_records(pd.read_parquet(io.BytesIO(content)))
    except (ValueError, TypeError, csv.Error) as error:  # every parser's complaint is one of these
        raise PointError(f"{path.name} is not a readable {kind[1:]} table: {error}") from error
    return Table(path.name, hashlib.sha256(content).hexdigest(), [flatten(record) for record in records])


def _csv_records(text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    records = []
    for record in reader:
        if None in record:
            raise ValueError(f"line {reader.line_num} has more cells than the header")
        records.append(dict(record))
    for column in reader.fieldnames or ():
        if column not in TEXT_COLUMNS and (values := _as_numbers([record[column] for record in records])) is not None:
            for record, value in zip(records, values, strict=True):
                record[column] = value
    return records


def _as_numbers(cells: Sequence[str | None]) -> list[float | int | None] | None:
    """A column of text as numbers, exactly rounded; None where one of its cells is none, or all are empty."""
    out: list[float | int | None] = []
    for cell in cells:
        text = (cell or "").strip()
        if text.lower() in MISSING:
            out.append(None)
        elif re.fullmatch(r"[+-]?\d{1,18}", text):
            out.append(int(text))
        elif re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", text, re.IGNORECASE):
            out.append(float(text))
        else:
            return None
    return out if any(value is not None for value in out) else None


def _json_records(content: Any) -> list[dict[str, Any]]:
    """The records in a JSON value: a list of them, under `runs` or `points`, by run, or as columns."""
    if isinstance(content, dict):
        inner = next((content[key] for key in ("runs", "points") if isinstance(content.get(key), list)), None)
        content = _records_of_object(content) if inner is None else inner
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise ValueError("it must hold a list of runs, each an object")
    return content


def _records_of_object(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of an object that maps columns to lists of values, columns to values by row, or names of runs to records."""
    values = list(content.values())
    if values and all(isinstance(value, list) for value in values):
        if len({len(value) for value in values}) > 1:
            raise ValueError("its columns have different lengths")
        return [dict(zip(content, row, strict=True)) for row in zip(*values, strict=True)]
    if not all(isinstance(value, dict) for value in values):
        raise ValueError("it must hold a list of runs, each an object")
    if any(name in content for name in (*ALIASES["N"], *ALIASES["loss"])):
        rows = list(dict.fromkeys(row for value in values for row in value))
        return [{column: value.get(row) for column, value in content.items()} for row in rows]
    return [{"run": name, **record} for name, record in content.items()]


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without nesting: what lies in NESTED beside the run's own keys, which win.

    W&B keeps a value of the config under `value`, and in its own database whole parts as JSON text.
    """
    flat: dict[str, Any] = {}
    for part in NESTED:
        inner = record.get(part)
        if isinstance(inner, str):
            try:
                inner = json.loads(inner)
            except ValueError:
                continue
        if isinstance(inner, dict):
            values = {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in inner.items()}
            flat |= {f"{k}.{kk}": vv for k, v in values.items() if isinstance(v, dict) for kk, vv in v.items()} | values
    return flat | {str(k): v for k, v in record.items() if not isinstance(v, dict)}


def row_names(frame: Any, source: str = "table") -> list[str]:
    """`Table.row_names` of a DataFrame; rows without names of runs are counted by its index."""
    if "run" in frame.columns:
        return [f"run {name}" for name in frame["run"]]
    return [f"{source} row {i + 1 if isinstance(i, int) else i}" for i in frame.index]


def frame_records(frame: Any) -> list[dict[str, Any]]:
    """The rows of a DataFrame as records."""
    names = [str(column) for column in frame.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*(frame[c].tolist() for c in frame.columns), strict=True)]


# ---------------------------------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Finished runs under our names (keys of ALIASES, values None where a row does not say), and which were left out.

    `names[i]` is what the source calls rows[i], `numbers[i]` its place in the source, from 1. `columns` maps our names to those
    of the table.
    """

    rows: list[dict[str, Any]]
    names: list[str]
    numbers: list[int]
    columns: dict[str, str]
    unfinished: list[str]  # name (state)
    without_loss: list[str]


def read_rows(
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, Any] | None = None,
    source: str = "table",
) -> Rows:
    """The finished runs among flat `records`, which messages call by `names`.

    `columns` maps our names to the table's, `a+b` joining two; `where` keeps the rows whose column `says` a value. Runs that
    are not finished, and runs without a loss, are left out and named. Raises PointError with row and column for a column that
    is missing, a number that is none, and where nothing remains.
    """
    table = dict.fromkeys(key for record in records for key in record)
    wanted = {SYNONYMS.get(name, name): column for name, column in (columns or {}).items()}
    _check_columns(table, wanted, where or {})
    kept = list(zip(records, names, range(1, len(records) + 1), strict=True))
    for key, value in (where or {}).items():
        remaining = [each for each in kept if says(each[0].get(key), value)]
        if kept and not remaining:
            raise PointError(f"{source} holds no rows with {key}={value}{_commonest(record.get(key) for record, _, _ in kept)}")
        kept = remaining
    if not kept:
        raise PointError(f"{source} holds no rows")
    aliases = dict(ALIASES)
    if "coverage" in table:
        aliases["N"] = (*aliases["N"], "k")  # of law coverage: k samples
    names_in_table = {name: next((c for c in choices if c in table), name) for name, choices in aliases.items()}
    out = Rows([], [], [], names_in_table, [], [])
    for name in ("N", "loss"):
        if name not in wanted and out.columns[name] not in table:
            has = _some(table) or "no columns"
            raise PointError(f"missing; the table has: {has}; name the column by --map {name}=COLUMN", column=name)
    for record, name, number in kept:
        state = _value(record, aliases["state"])
        if state is not None and str(state).lower() not in FINISHED:
            out.unfinished.append(f"{name} ({state})")
            continue
        row = _row(record, wanted, aliases, name)
        if row["loss"] is None:
            out.without_loss.append(name)
            continue
        out.rows.append(row)
        out.names.append(name)
        out.numbers.append(number)
    if not out.rows:
        left_out = f"{len(out.unfinished)} unfinished, {len(out.without_loss)} without a loss"
        raise PointError(f"{source} holds no finished runs with a loss ({left_out})")
    return out


def _check_columns(table: Mapping[str, Any], wanted: Mapping[str, str], where: Mapping[str, Any]) -> None:
    for key in where:
        if key not in table:
            raise PointError(f"no such column; the table has: {_some(table)}", column=key)
    for name, column in wanted.items():
        for part in column.split("+"):
            if part not in table:
                raise PointError(f"no such column (mapped to {name}); the table has: {_some(table)}", column=part)


def _row(
    record: Mapping[str, Any], wanted: Mapping[str, str], aliases: Mapping[str, tuple[str, ...]], name: str
) -> dict[str, Any]:
    """One run under our names."""
    row: dict[str, Any] = {}
    for ours, choices in aliases.items():
        if ours in wanted:
            parts = [record.get(part) for part in wanted[ours].split("+")]
            row[ours] = parts[0] if len(parts) == 1 else "+".join(map(label_of, parts))
        else:
            row[ours] = _value(record, choices)
        if not has_value(row[ours]):
            row[ours] = None
        if ours in NUMBERS:
            column = next((c for c in choices if has_value(record.get(c))), ours)
            row[ours] = _number(row[ours], name, ours if ours in ("N", "D", "loss") else column)
    if row["D"] is None and all(c in record for c in BATCH):
        row["D"] = math.prod(_number(record[c], name, c) or 0 for c in BATCH)
    if row["scheme"] is None and has_value(record.get("w_quant")) and has_value(record.get("a_quant")):
        bits = [16.0 if row[c] is None else row[c] for c in ("w_grid_bits", "a_grid_bits")]
        row["scheme"] = published_scheme(str(record["w_quant"]), str(record["a_quant"]), *bits)
        row["w_grid_bits"] = row["a_grid_bits"] = None  # the name says them, better than the columns
    if row["scheme"] is None and row["w_grid_bits"] is not None:
        w, a = row["w_grid_bits"], row["a_grid_bits"]
        row["scheme"] = f"w{w:g}a{w if a is None else a:g}"
    if row["scheme"] is not None:
        row["scheme"] = label_of(row["scheme"])
    return row


def published_scheme(w: str, a: str, w_bits: float, a_bits: float) -> str:
    """The scheme of QuEST's published runs: names of its quantizer classes and their bits → w4a4, w4a4-norot, w4sparse-a4, …

    FP4's classes are logged with 16 bits, as they take no argument of that name.
    """
    if w == a == "NoQuantizer":
        return "bf16"
    if "FP4" in w:
        return "w-fp4-a-fp4" if "FP4" in a else "w-fp4-a-16"
    sparse = "sparse-" if "FourEight" in w else ""
    activations = 16 if a == "NoQuantizer" else a_bits
    plain = "" if "Hadamard" in w or w == "NoQuantizer" else "-norot"
    return f"w{w_bits:g}{sparse}a{activations:g}{plain}"


def has_value(value: Any) -> bool:
    """Whether a cell holds something: not None, not NaN, not an empty text."""
    return value is not None and value != "" and value == value  # noqa: PLR0124 - NaN


def label_of(value: Any) -> str:
    """A cell as the label of a scheme: 4.0 and "4.0" are "4"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    text = str(value).strip()
    return f"{float(text):g}" if re.fullmatch(r"\d+\.\d+", text) else text


def says(cell: Any, value: str | float) -> bool:
    """Whether a cell of a table is what `value` names. Numbers are compared as numbers (3e7 is 30000000), all else as text."""
    if str(cell) == str(value):
        return True
    try:
        return not isinstance(cell, bool) and math.isclose(float(cell), float(value), rel_tol=1e-9)
    except (TypeError, ValueError):
        return False


def _value(record: Mapping[str, Any], choices: Iterable[str]) -> Any:
    return next((record[c] for c in choices if has_value(record.get(c))), None)


def _number(value: Any, row: str, column: str) -> float | int | None:
    if not has_value(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise PointError(f"{value!r} is not a number", row=row, column=column) from None
    if math.isnan(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _commonest(cells: Iterable[Any], most: int = 6) -> str:
    """The commonest values of a column, shown to a user who asked for another."""
    counts = Counter(f"{v:.12g}" if isinstance(v, float) else str(v) for v in cells if has_value(v))
    values = [value for value, _ in counts.most_common()]
    return f"; it has {', '.join(values[:most])}{' …' if len(values) > most else ''}" if values else ""


def _some(names: Iterable[str], most: int = 40) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")
