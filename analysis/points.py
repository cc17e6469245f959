"""Points, the typed record of measurements: one loss for each (scheme, N, D).

    points = read_points("runs.csv")            CSV, JSON, JSON lines or Parquet
    points = points_from_frame(load_runs(...))  a DataFrame of finished runs

Everything on which a fit relies is checked here and in `tables`, and every error names the row and the column. Rows are kept in
a canonical order, so that no result depends on their order in the source.

N: parameters without embeddings and head; D: training tokens; loss: nats/token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..words import few
from .findings import Finding
from .plausible import doubts
from .rows import LEFT_OUT, Rows, missing_tokens, read_rows
from .schemes import Scheme, find_scheme, schemes_of
from .tables import ALL, SKIP, PointError, TableOptions, frame_records, read_table, row_names, with_known_names

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
SAME_SIZE = 1e-4  # relative difference of N below which two sizes are equal
SAME_RATIO = math.log(1.05)  # span of D/N, in logs, of one token budget
SAME_SHARE = 0.005  # difference below which two shares are equal
RECIPE = ("optimizer", "warmup_steps", "steps")  # columns that no law uses, kept to detect mixed recipes
UNKNOWN_DATA = "unknown"  # data hash of runs whose text is not known


@dataclasses.dataclass(frozen=True)
class Points:
    """n measured losses. Arrays have shape (n,); `group[i]` is the index of row i's scheme in `schemes`.

    `schemes` is in order of bits, most first. `where[i]` names the row as its source does. `unique[i]` is the number of
    distinct tokens among the D, NaN if unknown. `share[i]` is the part of the D that a quantized run read before quantization
    began, 0 for unquantized runs and if unknown. `notes` lists what was left out or reinterpreted. `cluster[i]` names the rows
    with which row i shares its error, if `TableOptions.cluster` is set. `recipe[i]` has the values of row i for the names of
    RECIPE.
    """

    N: Array
    D: Array
    loss: Array
    group: Array
    schemes: tuple[Scheme, ...]
    weight: Array
    where: tuple[str, ...]
    memory_bits: Array
    unique: Array
    share: Array
    data: tuple[str, ...] = ()
    notes: tuple[Finding, ...] = ()
    cluster: tuple[str, ...] = ()
    recipe: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the schemes, most bits first."""
        return tuple(s.label for s in self.schemes)

    @cached_property
    def sizes(self) -> Array:
        """The distinct N, ascending."""
        return np.unique(self.N)

    @cached_property
    def tokens_per_param(self) -> Array:
        """D/N of each point, shape (n,)."""
        return self.D / self.N

    @cached_property
    def repeats(self) -> Array:
        """How often each run read its tokens again after the first pass, D/unique - 1, shape (n,); 0 if unknown."""
        return np.fmax(self.D / self.unique - 1, 0.0)

    @cached_property
    def shares(self) -> Array:
        """The distinct shares of the quantized runs, ascending; neighbours within half a hundredth count as equal."""
        quantized = np.array([not s.full for s in self.schemes])[self.group]
        values = np.unique(self.share[quantized])
        return values[np.diff(values, prepend=-1.0) > SAME_SHARE]

    @cached_property
    def cell(self) -> Array:
        """(n,) the cell of each row: runs with equal scheme, N, D, unique tokens and share are repeats."""
        columns = np.stack([self.group, self.N, self.D, self.repeats, self.share], axis=1)
        return np.unique(columns, axis=0, return_inverse=True)[1].ravel()

    @cached_property
    def ratios(self) -> Array:
        """The distinct D/N, ascending, each the median of values that span at most 5 % (rounding to whole batches is ignored).
        Groups that span more are cut at their largest gap, so that a dense table does not become one ratio. Empty without D.
        """
        values = np.sort(self.tokens_per_param)
        if np.isnan(values).any():
            return np.zeros(0)
        return np.array([np.median(part) for part in narrow_groups(values, SAME_RATIO)])

    @cached_property
    def D_follows_N(self) -> bool:
        """Whether log D is linear in log N up to rounding: then D has no information beyond N."""
        if np.isnan(self.D).any():
            return False
        x, y = np.log(self.N), np.log(self.D)
        x, y = x - x.mean(), y - y.mean()
        slope = x @ y / (x @ x) if x @ x > 0 else 0.0
        return bool(np.std(y - slope * x) < SAME_RATIO / 2)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (16 hex digits) over the values of every row that a fit uses, in canonical order."""
        rows = [
            [self.schemes[g].label, n, d, y, w]
            for g, n, d, y, w in zip(self.group, self.N, self.D, self.loss, self.weight, strict=True)
        ]
        if self.repeats.any():
            rows = [[*row, repeats] for row, repeats in zip(rows, self.repeats, strict=True)]
        if self.share.any():
            rows = [[*row, "share", share] for row, share in zip(rows, self.share, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def index(self, scheme: str | float) -> int:
        """Index of a scheme named by its label or by its bits (`4` finds `w4a4`). Raises PointError naming the choices if it
        has no runs."""
        return find_scheme(self.schemes, scheme)

    def subset(self, keep: Array) -> Points:
        """The rows where `keep` (boolean, shape (n,)) holds; schemes without rows are dropped."""
        keep = np.asarray(keep, bool)
        groups = np.unique(self.group[keep])
        return dataclasses.replace(
            self,
            N=self.N[keep],
            D=self.D[keep],
            loss=self.loss[keep],
            group=np.searchsorted(groups, self.group[keep]),
            schemes=tuple(self.schemes[i] for i in groups),
            weight=self.weight[keep],
            where=tuple(w for w, k in zip(self.where, keep, strict=True) if k),
            memory_bits=self.memory_bits[keep],
            unique=self.unique[keep],
            share=self.share[keep],
            cluster=tuple(c for c, k in zip(self.cluster, keep, strict=True) if k) if self.cluster else (),
            recipe=tuple(r for r, k in zip(self.recipe, keep, strict=True) if k) if self.recipe else (),
        )

    def to_records(self) -> list[dict[str, Any]]:
        """One record per row, from which `points_from_frame` rebuilds the same points."""
        scheme = [self.schemes[g] for g in self.group]
        return [
            {
                "run": self.where[i].removeprefix("run "),
                "scheme": s.label,
                "N": float(self.N[i]),
                "D": float(self.D[i]),
                "loss": float(self.loss[i]),
                "w_grid_bits": s.w_grid_bits,
                "a_grid_bits": s.a_grid_bits,
                "w_stored_bits": s.w_stored_bits,
                "model_bits": float(self.memory_bits[i]),
                "weight": float(self.weight[i]),
                **(dict(zip(("weights", "activations"), s.specs[0], strict=True)) if len(s.specs) == 1 else {}),
                **({} if math.isnan(self.unique[i]) else {"unique_tokens": float(self.unique[i])}),
                **({"tokens_fp": float(self.share[i] * self.D[i])} if self.share[i] else {}),
                **({"cluster": self.cluster[i]} if self.cluster else {}),
                **(self.recipe[i] if self.recipe else {}),
            }
            for i, s in enumerate(scheme)
        ]

    def beside(self, rows: Array) -> Array:
        """(n,) the rows (boolean) and all rows that share a named cluster with one of them. A fold that tests `rows` may not be
        fitted to any of these."""
        if not self.cluster:
            return rows
        return np.isin(self.cluster, np.array(self.cluster)[rows])

    def with_loss(self, loss: Array) -> Points:
        """The same design with other losses, e.g. simulated ones."""
        return dataclasses.replace(self, loss=np.asarray(loss, float))


def narrow_groups(values: Array, most: float) -> list[Array]:
    """Sorted values in groups that span at most `most` (in logs), split first at gaps beyond it, then at the largest gaps."""
    logs, parts, out = np.log(values), [values], list[Array]()
    parts = np.split(values, np.flatnonzero(np.diff(logs) > most) + 1)
    while parts:
        part = parts.pop(0)
        if len(part) == 0:
            continue
        if math.log(part[-1] / part[0]) <= most:
            out.append(part)
        else:
            cut = int(np.argmax(np.diff(np.log(part)))) + 1
            parts[:0] = [part[:cut], part[cut:]]
    return out


def _same_sizes(N: Array, notes: list[Finding]) -> Array:
    """N, where sizes that differ by less than 0.01 % are replaced by the commonest of them: one size, counted differently."""
    values, counts = np.unique(N, return_counts=True)
    parts = np.split(np.arange(len(values)), np.flatnonzero(np.diff(np.log(values)) > SAME_SIZE) + 1)
    one = {float(values[i]): float(values[part[np.argmax(counts[part])]]) for part in parts for i in part}
    merged = [[float(values[i]) for i in part] for part in parts if len(part) > 1]
    if merged:
        count = sum(map(len, merged))
        text = f"{count} sizes differ from a neighbour by less than 0.01 % and count as {len(merged)}."
        notes.append(Finding("near_sizes", text, {"sizes": merged}))
    return np.array([one[float(n)] for n in N])


# ---------------------------------------------------------------------------------------------------- reading


def read_points(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    options: TableOptions | None = None,
) -> Points:
    """Points from a table, as `tables.read_table` reads it. Raises PointError, OSError, ImportError (no pyarrow)."""
    table = read_table(source)
    names = table.row_names()
    return points_from_records(table.records, names, columns=columns, where=where, options=options, source=table.name)


def read_frame(source: str | Path) -> pd.DataFrame:
    """The table in a file as a DataFrame, with its own columns."""
    import pandas as pd

    return pd.DataFrame(read_table(source).records)


def points_from_frame(
    frame: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    options: TableOptions | None = None,
    source: str = "table",
) -> Points:
    """Points from a DataFrame with one row per run; see `points_from_records`."""
    records = with_known_names(frame_records(frame))
    names = row_names(records, source, [i + 1 if isinstance(i, int) else i for i in frame.index])
    return points_from_records(records, names, columns=columns, where=where, options=options, source=source)


def points_from_records(
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    options: TableOptions | None = None,
    source: str = "table",
) -> Points:
    """Points from one record per run; `names` are their names in messages.

    `columns` maps our names (N, D, loss, scheme, weight, seed, run, data_hash, w_grid_bits, …) to the table's or to formulas;
    `a+b` joins two texts. `where` keeps only rows whose column meets a condition. Runs that are not finished or have no loss
    are left out, with a note in `notes`; `options` changes that. Raises PointError with row and column for a missing column, a
    value that is not a positive finite number, a scheme of unknown or contradictory bits, rows that repeat others, or mixed
    data.
    """
    options = options or TableOptions()
    table = read_rows(records, names, columns=columns, where=where, options=options, source=source)
    notes: list[Finding] = []
    table, schemes = with_schemes(table, options, notes, source)
    rows, names = table.rows, table.names
    N, loss = _same_sizes(_positive(rows, "N", names), notes), _positive(rows, "loss", names)
    without_D = all(row["D"] is None for row in rows)
    if without_D and "the table has" in (reason := missing_tokens(dict.fromkeys(key for record in records for key in record))):
        raise PointError(reason, column="D")
    D = np.full(len(rows), math.nan) if without_D else _positive(rows, "D", names)
    unique = np.minimum(_unique(rows, names), D)
    weight = _positive([{"weight": 1.0 if row["weight"] is None else row["weight"]} for row in rows], "weight", names)
    data = _data(rows, names, notes)
    notes = [*_left_out(table), *notes, *doubts(records, table, columns or {}, options, N, D, loss, weight)]

    order = sorted(schemes.values(), key=lambda s: s.order)
    place = {s.label: i for i, s in enumerate(order)}
    group = np.array([place[row["scheme"]] for row in rows])
    stored = np.array([s.w_stored_bits for s in order])[group]
    model_bits = np.array([math.nan if row["model_bits"] is None else float(row["model_bits"]) for row in rows])
    memory = np.where(np.isnan(model_bits), N * stored, model_bits)
    share = np.where(np.array([s.full for s in order])[group], 0.0, _share(rows, D, names))
    line_up = np.lexsort((loss, share, D, N, group))
    return Points(
        N[line_up],
        D[line_up],
        loss[line_up],
        group[line_up],
        tuple(order),
        weight[line_up],
        tuple(names[i] for i in line_up),
        memory[line_up],
        unique[line_up],
        share[line_up],
        data,
        tuple(notes),
        tuple(_cluster(rows[i]["cluster"], i) for i in line_up) if options.cluster is not None else (),
        tuple({name: rows[i][name] for name in RECIPE if rows[i][name] is not None} for i in line_up),
    )


def with_schemes(table: Rows, options: TableOptions, notes: list[Finding], source: str) -> tuple[Rows, dict[str, Scheme]]:
    """The rows with a scheme of known bits, and with tokens if any row has them; and the schemes by label.

    A table without schemes has the single scheme ALL. Raises PointError for any other row, or leaves it out with `skip_bad`.
    """
    table = dataclasses.replace(table, rows=[_without_start(row) for row in table.rows])
    if all(row["scheme"] is None for row in table.rows):
        table = dataclasses.replace(table, rows=[{**row, "scheme": ALL} for row in table.rows])
    if options.skip_bad:
        table = table.without(_without_scheme_or_tokens(table))
    for row, name in zip(table.rows, table.names, strict=True):
        if row["scheme"] is None:
            raise PointError(f"missing{SKIP}", row=name, column="scheme")
    bad: dict[int, tuple[str, str]] = {}
    schemes = schemes_of(table.rows, table.names, table.columns, notes, bad if options.skip_bad else None)
    table = table.without(bad)
    if not table.rows:
        raise PointError(f"{source} holds no rows that can be read; the first: {table.left_out[0].reason}")
    return table, schemes


_START = re.compile(r"\+s\d[\d.e-]*$")  # in the label of a run quantized late: the share, as in its column tokens_fp


def _without_start(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the scheme in which its run ends: runs that differ only in when they were quantized have one scheme."""
    label, known = row["scheme"], row["tokens_fp"] is not None
    return {**row, "scheme": _START.sub("", label)} if known and isinstance(label, str) else row


def make_points(N: Iterable[float], D: Iterable[float], loss: Iterable[float], scheme: Iterable[str | float]) -> Points:
    """Points from plain sequences of equal length: parameters, tokens, nats/token, scheme label or bits."""
    import pandas as pd

    return points_from_frame(
        pd.DataFrame({"N": list(N), "D": list(D), "loss": list(loss), "scheme": list(scheme)}), source="points"
    )


def _left_out(table: Rows) -> list[Finding]:
    """Notes on the rows that do not count, by kind, and on unfinished runs that do."""
    notes = []
    for kind, text in LEFT_OUT.items():
        rows = [each for each in table.left_out if each.kind == kind]
        if rows:
            names = list(dict.fromkeys(each.name for each in rows))
            reason = next((f" ({each.reason})" for each in rows if each.reason and kind == "bad_rows"), "")
            numbers: dict[str, Any] = {"runs": names}
            if kind == "bad_rows":
                numbers["reasons"] = [each.reason for each in rows]
            notes.append(Finding(kind, f"Rows left out ({len(names)}, {text}): {few(names)}{reason}.", numbers))
    if table.kept:
        text = f"{len(table.kept)} runs that did not finish are kept: {few(table.kept)}."
        notes.append(Finding("kept_unfinished", text, {"runs": table.kept}))
    return notes


def _cluster(name: str | None, i: int) -> str:
    """The name of row i's cluster; a row without a name is a cluster of its own."""
    return f"(row {i})" if name is None else name


def _without_scheme_or_tokens(table: Rows) -> dict[int, tuple[str, str]]:
    """Rows that lack a scheme or tokens which other rows have: index → kind and reason."""
    out = {}
    for column in ("scheme", "D"):
        if any(row[column] is not None for row in table.rows):
            for i, row in enumerate(table.rows):
                if row[column] is None:
                    out[i] = ("bad_rows", f"{table.names[i]}, column '{column}': missing")
    return out


def _data(rows: Sequence[Mapping[str, Any]], names: Sequence[str], notes: list[Finding]) -> tuple[str, ...]:
    """The data hash of the runs, if any has one. Raises PointError if they differ."""
    hashes = [None if row["data_hash"] is None else str(row["data_hash"]) for row in rows]
    if unknown := hashes.count(UNKNOWN_DATA):
        text = (
            f"{unknown} of {len(rows)} runs are of unknown data; they share a law with others only if text, tokenizer and "
            "validation part are the same."
        )
        notes.append(Finding("unknown_data", text, {"runs": unknown, "of": len(rows)}))
    data = tuple(sorted({h for h in hashes if h not in (None, UNKNOWN_DATA)}))
    if len(data) > 1:
        first = next(i for i, h in enumerate(hashes) if h in data)
        second = next(name for name, h in zip(names, hashes, strict=True) if h in data and h != hashes[first])
        raise PointError(
            f"losses on different data cannot share a law ({names[first]} has {hashes[first]}); choose one: {few(data)}",
            row=second,
            column="data_hash",
        )
    return data


def _unique(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Array:
    """Distinct tokens of the text of each run, NaN if not given; PointError for a value that is no number of tokens."""
    known = [i for i, row in enumerate(rows) if row["unique_tokens"] is not None]
    out = np.full(len(rows), math.nan)
    out[known] = _positive([rows[i] for i in known], "unique_tokens", [names[i] for i in known])
    return out


def _share(rows: Sequence[Mapping[str, Any]], D: Array, names: Sequence[str]) -> Array:
    """tokens_fp/D of each run (n,), 0 if its row has none. Raises PointError for more tokens than the run has."""
    out = np.array([0.0 if row["tokens_fp"] is None else float(row["tokens_fp"]) for row in rows]) / D
    for i in (int(i) for i in np.flatnonzero(~((out >= 0) & (out <= 1 + 1e-9)) & ~np.isnan(D))):
        text = f"{rows[i]['tokens_fp']!r} is not between 0 and the {D[i]:g} tokens of its run"
        raise PointError(text, row=names[i], column="tokens_fp")
    return np.minimum(np.nan_to_num(out), 1.0)


def _positive(rows: Sequence[Mapping[str, Any]], column: str, names: Sequence[str]) -> Array:
    """A column as floats (n,). Raises PointError if a value is missing, not positive or not finite."""
    out = np.empty(len(rows))
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        out[i] = math.nan if row[column] is None else row[column]
        if not (math.isfinite(out[i]) and out[i] > 0):
            shown = "an empty cell" if row[column] is None else repr(row[column])
            raise PointError(f"{shown} must be a positive finite number{SKIP}", row=name, column=column)
    return out
