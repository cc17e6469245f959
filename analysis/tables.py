"""Readers of tables of runs: files, column names and rows are read in the same way for fits and for imports.

    table = read_table("runs.csv")                      a file → records, one dict per run
    rows = read_rows(table.records, table.row_names())  records → the values a fit or an import needs: see `rows`

Files: CSV (see `csv_text`), JSON (see `json_runs`), JSON lines, Parquet. Nested records are flattened, among them W&B's JSON
(`config` and `summary` of each run, as its API gives them) and the published runs of QuEST (arXiv 2502.05003,
`for_plots/runs_for_scaling.json`), whose scheme follows from the names of its quantizers.

A column is found by its name in ALIASES, or else by a name that differs only in case, spaces and the prefixes `config/` and
`summary/`. N, D, loss and scheme are else found by the last part of a dotted name (`model.n_params`), if only one column has
it.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ..metrics import VAL_LOSS
from . import csv_text
from .cells import SUFFIXES as SCALES
from .cells import read_number
from .json_runs import NESTED, flatten, json_records, json_value

# Our name → the names that tables use for it. Of several that a row has, the first with a value is taken.
ALIASES: dict[str, tuple[str, ...]] = {
    "N": (
        *("N", "params_non_embedding", "non_embedding_parameters", "non_embedding_params", "N_noembed"),
        *("n_params", "params", "parameters", "num_params"),
    ),
    "D": ("D", "tokens", "train_tokens", "training_tokens", "total_tokens", "tokens_seen", "num_tokens", "n_tokens"),
    "loss": (
        *("loss", "final-val/loss", "val_loss", "val/loss", "eval/loss", VAL_LOSS, "coverage", "L"),
        *("validation_loss", "valid_loss", "eval_loss", "final_loss", "test_loss"),
    ),
    "tokens_fp": ("tokens_fp", "D_fp"),
    "unique_tokens": ("unique_tokens", "D_unique", "U"),
    "scheme": ("scheme", "P", "bits", "quant", "quantization"),
    "weights": ("weights",),
    "activations": ("activations",),
    "w_grid_bits": ("w_grid_bits", "w_bits"),
    "a_grid_bits": ("a_grid_bits", "a_bits"),
    "w_stored_bits": ("w_stored_bits", "stored_bits"),
    "a_stored_bits": ("a_stored_bits",),
    "model_bits": ("model_bits",),
    "weight": ("weight",),
    "run": ("run", "Name", "name", "run_name", "display_name", "run_id", "id"),
    "state": ("state", "State", "status", "Status"),
    "data_hash": ("data_hash",),
    "lr": ("lr", "optim.lr", "learning_rate"),
    "optimizer": ("optimizer", "optim.name"),
    "warmup_steps": ("warmup_steps",),
    "steps": ("steps", "train.steps"),
    "seed": ("seed", "train.seed"),
    "n_layer": ("n_layer", "model.n_layer", "n_layers"),
    "d_model": ("d_model", "model.d_model", "n_embd", "hidden_size"),
}
SYNONYMS = {  # of our names
    **{"params_non_embedding": "N", "tokens": "D", "U": "unique_tokens"},
    **{"w_bits": "w_grid_bits", "a_bits": "a_grid_bits"},
}
NUMBERS = (
    *(
        "N",
        "D",
        "tokens_fp",
        "unique_tokens",
        "loss",
        "w_grid_bits",
        "a_grid_bits",
        "w_stored_bits",
        "a_stored_bits",
        "model_bits",
    ),
    *("weight", "lr", "warmup_steps", "steps", "seed", "n_layer", "d_model"),
)
BATCH = ("iterations", "batch_size", "sequence_length", "acc_steps", "world_size")  # their product is D in QuEST's code
ALL = "all"  # label of the one scheme of a table that names none: its runs count as not quantized
FINISHED = ("finished", "done", "completed", "complete", "success", "succeeded", "imported")  # states whose loss counts
BY_LAST_PART = ("N", "D", "loss", "scheme")  # of a dotted name
LOSS_COLUMNS = {  # other unit than nats a token → names that tables use for such losses
    "bpb": ("bpb", "val_bpb", "bits_per_byte", "val/bpb", "eval/bpb"),
    "bits": ("bits_per_token", "loss_bits"),
    "ppl": ("ppl", "perplexity", "val_ppl", "val_perplexity", "val/ppl", "val/perplexity", "eval/perplexity"),
}
TOTAL_ROW = "total row"  # state of last rows that are totals of those above
SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".pq")


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """Options for reading the rows of a table, apart from column names and the filter of rows.

    keep_failed: Keep runs that did not finish, if they have a loss.
    skip_bad: Leave out rows that cannot be read, and exact repeats, each named with its reason.
    best_of: For each (scheme, N, D, seed, data), keep the run with the least loss over these columns, such as the learning
    rate.
    last: For each run, keep the row with the most tokens, its last checkpoint.
    bits_of: Label of a scheme → its bits, "4", or those of weights and activations, "4/8".
    loss_unit: "nats" a token; "bits" a token; "bpb:BYTES", bits a byte, at that many bytes a token; "ppl", perplexity.
    cluster: Column that says which rows share an error, such as the run of several checkpoints.
    """

    keep_failed: bool = False
    skip_bad: bool = False
    best_of: tuple[str, ...] = ()
    last: bool = False
    bits_of: Mapping[str, str] = dataclasses.field(default_factory=dict)
    loss_unit: str = "nats"
    cluster: str | None = None

    def given(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        default = TableOptions()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != getattr(default, name)
        }


SKIP = "; --skip-bad leaves out such rows"  # ends a PointError of one row


class PointError(ValueError):
    """A table that cannot be fitted; the message names the row (as the source counts it) and the column at fault."""

    def __init__(self, message: str, *, row: str | None = None, column: str | None = None) -> None:
        self.row, self.column = row, column
        where = ", ".join(part for part in (row, f"column '{column}'" if column else None) if part)
        super().__init__(f"{where}: {message}" if where else message)


# ---------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class Table:
    """The records of a file, in its order, without nesting; missing values are absent or None."""

    name: str
    sha256: str
    records: list[dict[str, Any]]

    def row_names(self) -> list[str]:
        """The names of the rows in messages, each unique; see `row_names`."""
        return row_names(self.records, self.name)


def read_table(source: str | Path, *, charts: bool = False) -> Table:
    """Read a .csv, .tsv, .json, .jsonl or .parquet file. The export of a chart is accepted only with `charts`, for curves.

    Raises PointError, OSError, ImportError (no pyarrow).
    """
    path = Path(source)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        sheet, packed = kind in (".xlsx", ".xls", ".ods"), kind in (".gz", ".bz2", ".xz", ".zst", ".zip")
        hint = "; save the sheet as CSV" if sheet else "; unpack it" if packed else ""
        raise PointError(f"{path.name}: unknown kind of table '{kind}'; choices: .csv, .tsv, .json, .jsonl, .parquet{hint}")
    content = path.read_bytes()
    try:
        if kind in (".csv", ".tsv", ".txt"):
            records = csv_text.csv_records(content)
        elif kind in (".json", ".jsonl", ".ndjson"):
            records = json_records(
                json_value(csv_text.decode(content), lines=kind != ".json"), (*ALIASES["N"], *ALIASES["loss"])
            )
        else:
            import pandas as pd

            records = frame_records(pd.read_parquet(io.BytesIO(content)))
    except (ValueError, TypeError, csv.Error) as error:  # errors of all parsers are of these classes
        raise PointError(f"{path.name} is not a readable {kind[1:]} table: {error}") from error
    flat = [flatten(record) for record in records]
    if charts:  # rows of curves are not runs: they have no known column names and no totals
        return Table(path.name, hashlib.sha256(content).hexdigest(), flat)
    _refuse_curves(path.name, dict.fromkeys(key for record in flat for key in record))
    flat = with_known_names(flat)
    if count := csv_text.totals(flat):
        flat[-count:] = [{**record, "state": TOTAL_ROW} for record in flat[-count:]]
    return Table(path.name, hashlib.sha256(content).hexdigest(), flat)


def chart_columns(columns: Iterable[str]) -> list[str]:
    """The columns of losses in W&B's export of a chart, `RUN - METRIC` or `Name: RUN - METRIC`; empty for any other table.

    They stand beside their `…__MIN` and `…__MAX`, or have only the step and a time beside them.
    """
    given = list(columns)
    means = [c for c in given if not c.endswith(("__MIN", "__MAX"))]
    runs = [c for c in means if " - " in c]
    short = len(means) - len(runs) <= 2 and not matches("N", means)
    return [c for c in runs if f"{c}__MAX" in given] or (runs if short else [])


def _refuse_curves(name: str, columns: Iterable[str]) -> None:
    """Refuse the export of a chart of W&B: a column of losses for each run, a row for each step."""
    columns = list(columns)
    if runs := chart_columns(columns):
        several = len({run.rsplit(" - ", 1)[0] for run in runs})
        count = f"{several} run{'s' * (several > 1)}"
        raise PointError(
            f"{name} is the export of a chart, with the curves of {count} ({runs[0]}{', …' * (len(runs) > 1)}) over "
            f"{columns[0]}, which questctl forecast reads; fit-scaling, plan, report and runs import take one row per run: in "
            "W&B, export the table of runs"
        )


def with_known_names(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records; a column whose name matches ours up to case, spaces or nesting (see `matches`) is copied under our name."""
    columns = dict.fromkeys(key for record in records for key in record)
    added = {}
    for ours, names in ALIASES.items():
        meant = [] if any(name in columns for name in names) else matches(ours, columns)
        if len(meant) == 1 or (meant and ours == "run"):  # a run may have a name and an ID
            added[names[0]] = meant[0]
    return (
        [{**record, **{ours: scaled(record[c], c) for ours, c in added.items() if c in record}} for record in records]
        if added
        else records
    )


def matches(ours: str, columns: Iterable[str], names: Sequence[str] = ()) -> list[str]:
    """The columns that match one of our names, or other `names`, without being equal to it.

    Case, spaces and prefixes such as `config/` are ignored. If no column matches, N, D, loss and scheme may be the last part of
    a dotted name.
    """
    columns = list(columns)
    folded = {_fold(name) for name in names or ALIASES.get(ours, (ours,)) if len(name) > 1 or name in ("N", "D")}
    matching = [c for c in columns if _fold(c) in folded]
    matching = matching or [c for c in columns if _fold(_PREFIX.sub("", c)) in folded]
    if not matching and ours in BY_LAST_PART:
        if ours == "scheme":  # the bits of a part are not those of a run
            folded = set() if {"w_quant", "w_bits", "w_grid_bits"} & set(columns) else folded - {"bits"}
        signs = "./" if ours in ("N", "D") else "."  # train/loss is not the loss
        matching = [c for c in columns if any(_fold(part) in folded for part in _last_parts(c, signs))]
    return matching


UNITS = {  # in brackets at the end of a column's name → factor
    **dict.fromkeys(("", "#", "nats", "nats/token", "nats per token", "params", "parameters", "tokens"), 1.0),
    **{name: factor for name, factor in SCALES.items() if name != "%"},
    **{f"{name}s": factor for name, factor in SCALES.items() if name.endswith("illion")},
}
_BRACKETS = re.compile(r"(?P<name>.*\S)\s*[(\[](?:in )?(?P<unit>[^()\[\]]*?)(?: (?:tokens|params|parameters))?[)\]]\s*")


@cache
def _without_unit(column: str) -> tuple[str, float]:
    """A column's name without a known unit in brackets at its end, and the factor: `Params (M)` is Params and 1e6."""
    match = _BRACKETS.fullmatch(column)
    factor = None if match is None else UNITS.get(match["unit"].strip().lower())
    return (column, 1.0) if match is None or factor is None else (match["name"], factor)


def scaled(value: Any, column: str) -> Any:
    """A cell of a column whose name has a unit, multiplied by the unit's factor; other values than numbers stay."""
    factor = _without_unit(column)[1]
    number = read_number(value) if isinstance(value, str) else value
    if factor == 1 or not isinstance(number, int | float) or isinstance(number, bool):
        return value
    return float(f"{number * factor:.15g}")


_PREFIX = re.compile(rf"(?:{'|'.join(NESTED)})[./]")


@cache
def _fold(name: str) -> str:
    """A name without case and with one kind of separator: `Val Loss`, `val/loss` and `val_loss` become equal."""
    return re.sub(r"[\s_./-]+", "_", _without_unit(name)[0].strip()).lower()


def _last_parts(column: str, signs: str) -> list[str]:
    """The last part and the last two parts of a name, split at these `signs` (dots, or slashes, too); empty without them."""
    parts = re.split(f"[{signs}]", column)
    return [".".join(parts[-n:]) for n in (1, 2) if n < len(parts)] if "/" in signs or "/" not in column else []


def row_names(records: Sequence[Mapping[str, Any]], source: str, places: Iterable[Any] | None = None) -> list[str]:
    """Names of rows in messages: `run NAME` if a column names the run, `run NAME (row 3)` if several rows have that name, else
    `SOURCE row 3`. `places` are the numbers of the rows; default: from 1."""
    places = list(range(1, len(records) + 1) if places is None else places)
    column = naming_column(records)
    names = [record.get(column) if column else None for record in records]
    counts = Counter(map(str, names))
    return [
        (f"run {name}" + (f" (row {place})" if counts[str(name)] > 1 else "")) if has_value(name) else f"{source} row {place}"
        for name, place in zip(names, places, strict=True)
    ]


def naming_column(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The column that names the runs: the first of our names for it that holds a value."""
    return next((c for c in ALIASES["run"] if any(has_value(record.get(c)) for record in records)), None)


def named_run(name: str) -> str | None:
    """The run in a name from `row_names`; None if no column names it."""
    return _ROW.sub("", name.removeprefix("run ")) if name.startswith("run ") else None


_ROW = re.compile(r" \(row [^()]+\)$")


def frame_records(frame: Any) -> list[dict[str, Any]]:
    """The rows of a DataFrame as records."""
    names = [str(column) for column in frame.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*(frame[c].tolist() for c in frame.columns), strict=True)]


def column_named(name: str, table: Mapping[str, Any], wanted: Mapping[str, str] | None = None) -> str | None:
    """The column of a table that a user means by `name`: of this name up to case and spaces, or of ours; else None."""
    if name in table:
        return name
    bare = _PREFIX.sub("", name)
    if bare in table:
        return bare
    ours = SYNONYMS.get(name, name)
    if wanted and wanted.get(ours) in table:
        return wanted[ours]
    known = [c for c in ALIASES.get(ours, ()) if c in table]
    same = [c for c in table if _fold(_PREFIX.sub("", c)) == _fold(bare)]
    return known[0] if known else same[0] if len(same) == 1 else None


def state_of(record: Mapping[str, Any]) -> str | None:
    """The state in a record; None if it has none."""
    return next((str(record[c]).strip() for c in ALIASES["state"] if has_value(record.get(c))), None)


def is_finished(state: str | None) -> bool:
    """Whether the loss of a run in this state counts; it does for a run without a state."""
    return state is None or state.lower() in FINISHED


def has_value(value: Any) -> bool:
    """Whether a cell holds something: not None, not NaN, not an empty text."""
    return value is not None and value != "" and value == value  # noqa: PLR0124 - NaN
