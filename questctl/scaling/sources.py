"""From sources to points: folders of runs, external runs imported into them, tables and saved fits, all read by the same rules.

    load_sources(["runs", "published.csv"], where={"seed": "0"}).points

Every command that compares or fits losses reads them here, so that they agree on which runs count:

* the finished runs of a folder, the external runs that were imported into it, and all rows of a table or a `fit.json`;
* no damaged run, no unfinished run, and no row that `where` excludes; `Sources.left_out` names each with the reason;
* one text: losses on different data do not share a law, so mixed data are refused until `where` selects one.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MissingDependency, UsageError, unknown
from ..store import Run, RunStore, default_root, holds_runs, located, runs_in
from ..words import few

if TYPE_CHECKING:
    import pandas as pd

    from ..analysis.points import Points
    from ..analysis.tables import TableOptions

Paths = str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class LeftOut:
    """A run that does not count, and the reason."""

    run: str
    reason: str


@dataclass(frozen=True)
class Sources:
    """The runs and rows of several sources.

    `records` has one record a run, finished or not, each with a unique `run` and a `state`; `names` are their names in
    messages. `runs` are the run folders that can be read. `columns` maps our column names to those of the tables, `where` maps
    columns to the values kept.
    """

    paths: tuple[Path, ...]
    records: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    runs: tuple[Run, ...]
    damaged: tuple[LeftOut, ...]
    columns: Mapping[str, str]
    where: Mapping[str, str]
    options: TableOptions

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The records as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(list(self.records)) if self.records else pd.DataFrame(columns=["run", "state", "scheme"])

    @cached_property
    def finished(self) -> tuple[bool, ...]:
        """Whether each record has a final loss: finished runs (all with `keep_failed`), external runs, rows without a state."""
        from ..analysis.tables import TOTAL_ROW, is_finished

        keep = self.options.keep_failed
        return tuple(is_finished(r["state"]) or (keep and r["state"] != TOTAL_ROW) for r in self.records)

    @cached_property
    def selected(self) -> tuple[bool, ...]:
        """Whether each record matches `where`. Raises UsageError for a column that no source has."""
        from ..analysis.rows import selected
        from ..analysis.tables import SYNONYMS, column_named

        columns = dict.fromkeys(column for record in self.records for column in record)
        for name in self.where if columns else ():
            if column_named(name, columns, self.columns) is None and SYNONYMS.get(name, name) not in self.columns:
                raise UsageError(unknown("--where", name, columns, what="column"))
        with analysis_errors():
            return tuple(selected(self.records, self.names, self.where, self.columns))

    @cached_property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The runs that do not count, each with the reason: damaged, unfinished, not selected, no loss, or by `options`."""
        out = list(self.damaged)
        for record, finished, selected in zip(self.records, self.finished, self.selected, strict=True):
            if not finished:
                message = record.get("message")
                reason = f"{record['state']}: {message}" if message else str(record["state"])
            elif not selected:
                reason = f"not selected: {', '.join(f'{column} is {record.get(column)}' for column in self.where)}"
            elif not self._has_loss(record):
                reason = "without a loss"
            else:
                continue
            out.append(LeftOut(record["run"], reason))
        return (*out, *self._left_out_by_options())

    def _left_out_by_options(self) -> Iterator[LeftOut]:
        """The rows that `skip_bad`, `best_of` and `last` leave out; none if the others cannot be read either."""
        from ..analysis.rows import LEFT_OUT

        with suppress(DataError):
            for note in self.points.notes if self.options.given() else ():
                if note.kind in ("bad_rows", "repeated_rows", "not_best", "not_last"):
                    names = note.numbers["runs"]
                    reasons = note.numbers.get("reasons", [LEFT_OUT[note.kind]] * len(names))
                    yield from (LeftOut(n.removeprefix("run "), reason) for n, reason in zip(names, reasons, strict=True))

    @cached_property
    def points(self) -> Points:
        """The points that a law is fitted to.

        Raises DataError if no row counts, if a value is missing or contradicts another, and for mixed data.
        """
        from ..analysis.findings import Finding
        from ..analysis.points import points_from_records
        from ..analysis.tables import PointError

        for path in self.paths:
            if holds_runs(path) and not any(Path(r.get("path") or "").is_relative_to(path) for r in self.records):
                reason = f"; {self.damaged[0].run} is {self.damaged[0].reason}" if self.damaged else "."
                raise DataError(f"{path}: holds no runs{reason}")
        try:
            with analysis_errors():
                points = points_from_records(
                    self.records,
                    self.names,
                    columns=self.columns,
                    where=self.where,
                    options=self.options,
                    source=self.paths[0].name,
                )
        except DataError as e:
            if isinstance(e.__cause__, PointError) and e.__cause__.column == "data_hash":
                raise DataError(f"{str(e).removesuffix('.')}; select it with --where data_hash=HASH.") from e
            raise
        if not self.damaged:
            return points
        damaged = [each.run for each in self.damaged]
        note = Finding("damaged_runs", f"{len(damaged)} damaged runs are left out: {few(damaged)}.", {"runs": damaged})
        return dataclasses.replace(points, notes=(*points.notes, note))

    def only(self, runs: Iterable[str]) -> Sources:
        """These sources with only the given runs."""
        chosen = set(runs)
        kept = [(record, name) for record, name in zip(self.records, self.names, strict=True) if record["run"] in chosen]
        return dataclasses.replace(
            self,
            records=tuple(record for record, _ in kept),
            names=tuple(name for _, name in kept),
            runs=tuple(run for run in self.runs if run.name in chosen),
            damaged=tuple(each for each in self.damaged if each.run in chosen),
        )

    def _has_loss(self, record: Mapping[str, Any]) -> bool:
        from ..analysis.tables import ALIASES, LOSS_COLUMNS, column_named, has_value

        if "loss" in self.columns:
            column = column_named(self.columns["loss"], record)
            return column is None or has_value(record[column])  # a formula reports by itself what it lacks
        others = LOSS_COLUMNS.get(self.options.loss_unit.partition(":")[0], ())
        return any(has_value(record.get(column)) for column in (*ALIASES["loss"], *others))


def load_sources(
    sources: Paths = None,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    options: TableOptions | None = None,
) -> Sources:
    """Read folders of runs, run folders, tables and `fit.json` files; default: `$QUESTCTL_RUNS`, else `runs`.

    `columns` maps our column names to the tables', such as {"N": "params"}, or to formulas; `where` keeps the rows whose column
    meets a condition; `options` say which rows count, and in what unit. Raises DataError for a source that does not exist or
    cannot be read, and for a run that two sources hold; MissingDependency for a Parquet file without pyarrow.
    """
    paths = as_paths(sources)
    require_sources(paths)
    records: list[dict[str, Any]] = []
    names: list[str] = []
    runs: list[Run] = []
    damaged: list[LeftOut] = []
    for path in paths:
        if holds_runs(path):
            rows, readable, unreadable = _read_folder(path)
            records += rows
            names += [f"run {row['run']}" for row in rows]
            runs += readable
            damaged += unreadable
        else:
            rows, called = _read_table(path, {record["run"] for record in records})
            records += rows
            names += called
    repeated = [run for run, n in Counter(record["run"] for record in records).items() if n > 1]
    if repeated:
        raise DataError(f"two sources hold the run {repeated[0]}; name one of them.")
    from ..analysis.tables import TableOptions

    read = (paths, tuple(records), tuple(names), tuple(runs), tuple(damaged))
    return Sources(*read, dict(columns or {}), dict(where or {}), options or TableOptions())


def as_paths(sources: Paths) -> tuple[Path, ...]:
    """Sources as a tuple of paths; the default folder of runs if none is named."""
    if sources is None or (not isinstance(sources, str | Path) and not sources):
        return (default_root(),)
    return tuple(located(source) for source in ([sources] if isinstance(sources, str | Path) else sources))


def require_sources(paths: Iterable[Path]) -> None:
    """Check that each source exists, before anything heavy is imported. Raises DataError."""
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: there is no such folder of runs or table.")


def run_row(run: Run) -> dict[str, Any]:
    """A run as one row: its result, or the columns known from its config, with state, message, steps, attempts and path.

    Raises DataError for a damaged run.
    """
    result = {key: value for key, value in run.row().items() if value is not None}
    if known := run.facts:
        about = {"steps": known.status.steps or known.steps, "message": known.status.message, "attempts": known.status.attempts}
        return {**about, "data": known.source, "unique_tokens": known.unique_tokens, **result}
    config, status = run.config(), run.status()
    about = {
        "steps": status.steps or config.train.steps,
        "message": status.message,
        "attempts": status.attempts,
        "data": config.data.source,
        "unique_tokens": run.unique_tokens(config.tokens),
    }
    return {**about, **result}


def data_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Data hash → names of the runs trained on it. Losses of runs with different hashes cannot be compared.

    Runs of unknown data, and those without a hash yet, are left out.
    """
    from ..store.external import UNKNOWN

    out: dict[str, list[str]] = {}
    for row in rows:
        data = row.get("data_hash")
        if isinstance(data, str) and data != UNKNOWN:
            out.setdefault(data, []).append(str(row["run"]))
    return out


def _read_folder(folder: Path) -> tuple[list[dict[str, Any]], list[Run], list[LeftOut]]:
    """Rows of a folder's runs and of the external runs imported into it, its readable runs, and the damaged ones."""
    rows, runs, damaged = [], [], []
    for run in runs_in(folder, facts=True):
        try:
            if (
                run.facts.steps if run.facts else run.config().train.steps
            ):  # a checkpoint used without training has no training tokens
                rows.append(run_row(run))
                runs.append(run)
        except DataError as e:
            damaged.append(LeftOut(run.name, f"damaged: {e}"))
    return [*rows, *RunStore(folder).external_rows()], runs, damaged


def _read_table(path: Path, others: Collection[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a table or a saved fit, each with a unique `run` and a `state`, and what messages call them.

    Names that are also among `others`, as W&B's generated names may be in several exports, get the file's name added.
    """
    from ..analysis.document import FitDocument, holds_fit
    from ..analysis.tables import Table, naming_column, read_table, state_of

    with analysis_errors():
        content = _json_object(path) if path.suffix.lower() == ".json" else None
        if content is not None and holds_fit(content):
            table = Table(path.name, "", [dict(row) for row in FitDocument.from_json(content, where=str(path)).points])
        else:
            table = read_table(path)
    names = table.row_names()
    if naming_column(table.records) not in (None, "run"):
        names = [f"{name}, {path.name}" if name.removeprefix("run ") in others else name for name in names]
    rows = [
        {**record, "run": name.removeprefix("run "), "state": state_of(record) or "done"}
        for record, name in zip(table.records, names, strict=True)
    ]
    return rows, names


def _json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None for anything else, which its own reader will report."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def analysis_errors() -> Iterator[None]:
    """Turn errors of analysis into QuestErrors: DataError for tables and points, UsageError for laws and options."""
    from ..analysis.laws import LawError
    from ..analysis.tables import PointError

    try:
        yield
    except PointError as e:
        raise DataError(f"{e}.") from e
    except LawError as e:
        raise UsageError(f"{e}.") from e
    except (FileNotFoundError, IsADirectoryError) as e:
        raise DataError(f"{e.filename}: there is no such folder of runs or table.") from e
    except UnicodeDecodeError as e:
        raise DataError(f"not a text file: {e}.") from e
    except ImportError as e:
        if isinstance(e, MissingDependency):
            raise
        raise MissingDependency("reading Parquet needs pyarrow: pip install 'questctl[parquet]'.") from e
