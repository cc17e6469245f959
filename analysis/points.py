"""The typed record of what was measured: one loss for each (scheme, N, D).

    points = read_points("runs.csv")            CSV, JSON or Parquet
    points = points_from_frame(load_runs(...))  a DataFrame of finished runs

This is the only place where pandas meets the numerics. Everything a fit may rely on is checked here, and every refusal
names the row and the column. Rows are kept in one canonical order, so that no number depends on the order they came in.

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

from .findings import Finding
from .formats import FULL_BITS, grid_mse, read_format

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray

# The first name that a table has is taken; `columns={"N": "params"}` overrides.
ALIASES: dict[str, tuple[str, ...]] = {
    "N": ("N", "params_non_embedding", "n_params", "params", "k"),
    "D": ("D", "tokens"),
    "loss": ("loss", "val_loss", "coverage"),
    "scheme": ("scheme", "P", "bits"),
    "w_grid_bits": ("w_grid_bits", "w_bits"),
    "a_grid_bits": ("a_grid_bits", "a_bits"),
    "w_stored_bits": ("w_stored_bits", "stored_bits"),
    "a_stored_bits": ("a_stored_bits",),
}
UNKNOWN_DATA = "unknown"  # data hash of runs whose table did not say on which text they were trained


class PointError(ValueError):
    """A table that cannot be fitted, with the row (as the source counts it) and the column where that shows."""

    def __init__(self, message: str, *, row: str | None = None, column: str | None = None) -> None:
        self.row, self.column = row, column
        where = ", ".join(part for part in (row, f"column '{column}'" if column else None) if part)
        super().__init__(f"{where}: {message}" if where else message)


# ---------------------------------------------------------------------------------------------------- schemes


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a run was quantized, as far as a law needs to know.

    `w_grid_bits`, `a_grid_bits` are the widths of the grids; `w_stored_bits` is what a stored weight costs (2.5 for 2:4-sparse
    INT4);
    `w_mse`, `a_mse` are the mean squared errors of the grids on a standard normal (nan where unknown);
    `rotated` says whether the low-bit grid sees Hadamard-rotated values. `words` are the quantizer words (weights,
    activations) of its runs where these are known: several pairs where runs of different kinds share the label, those that
    differ in nothing but the rotation's block taken as one.
    """

    label: str
    w_grid_bits: float
    a_grid_bits: float
    w_stored_bits: float
    w_mse: float
    a_mse: float
    rotated: bool = True
    words: tuple[tuple[str, str], ...] = ()

    @property
    def full(self) -> bool:
        """Neither weights nor activations are quantized."""
        return self.w_grid_bits >= FULL_BITS and self.a_grid_bits >= FULL_BITS

    @property
    def order(self) -> tuple[float, float, float, str]:
        """Sort key: most bits first."""
        return (-self.w_stored_bits, -self.w_grid_bits, -self.a_grid_bits, self.label)


_OPERANDS = re.compile(r"w-?(?P<w>fp4|\d+(?:\.\d+)?)(?P<sparse>sparse)?-?a-?(?P<a>fp4|\d+(?:\.\d+)?)")
_PLAIN = re.compile(r"norot|\b(?:ste|lsq|pact|adabin)\b")  # methods without a rotation
_BLOCK = re.compile(r"-h\d+")  # of a rotation, in a quantizer word
_SPARSE = re.compile(r"sparse|2:4|2of4")
_GRADIENTS = re.compile(r"\+g\..*")  # in the label of a run with quantized gradients
_MIXED = re.compile(r"\+(?!bf16$)[0-9a-f]{4}$")  # in the label of a run whose layers have words of their own


def scheme_from_words(label: str, weights: str | None = None, activations: str | None = None) -> Scheme | None:
    """Read a scheme from spec words (`int4-h128-rms-trust`) or, without them, from its label; None where neither says it.

    Labels: `w4a4`, `w4a16`, `w4sparse-a4`, `w-fp4-a-fp4`, `bf16`, `4`, `1.585`, `quest-w2a2`, `w4a4-norot`, `BF16+BF16`.
    """
    low = _GRADIENTS.sub("", label.lower())
    if weights and activations:
        w, a = read_format(weights), read_format(activations)
        if w is None or a is None:
            return None
        mse = math.nan if _SPARSE.search(weights) else w.mse
        return Scheme(label, w.bits, a.bits, w.stored, mse, a.mse, w.rotated or w.bits >= FULL_BITS)
    if match := _OPERANDS.search(low):
        w, a = read_format(match["w"]), read_format(match["a"])
    else:
        parts = [read_format(part) for part in re.split(r"[+/ ]", low.replace("2:4", "").strip())]
        w, a = parts[0], parts[-1]
        if any(part != w for part in parts):
            return None
    if w is None or a is None:
        return None
    sparse = bool(_SPARSE.search(low))
    bits, mse = (w.bits / 2 + 0.5, math.nan) if sparse else (w.bits, w.mse)
    return Scheme(label, w.bits, a.bits, bits, mse, a.mse, not _PLAIN.search(low))


# ---------------------------------------------------------------------------------------------------- points


@dataclasses.dataclass(frozen=True)
class Points:
    """n measured losses. Arrays have shape (n,); `group[i]` is the place of row i's scheme in `schemes`.

    `schemes` runs from most to fewest bits. `where[i]` names the row as its source does. `notes` holds what was left out or
    reinterpreted on the way in.
    """

    N: Array
    D: Array
    loss: Array
    group: Array
    schemes: tuple[Scheme, ...]
    weight: Array
    where: tuple[str, ...]
    memory_bits: Array
    data: tuple[str, ...] = ()
    notes: tuple[Finding, ...] = ()

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
    def ratios(self) -> Array:
        """The distinct D/N, ascending: values within 5 % of their neighbour are one (rounding to whole batches is no
        variation), represented by their median. Empty without D.
        """
        values = np.sort(self.tokens_per_param)
        if np.isnan(values).any():
            return np.zeros(0)
        cuts = np.flatnonzero(np.diff(np.log(values)) > math.log(1.05)) + 1
        return np.array([np.median(part) for part in np.split(values, cuts)])

    @cached_property
    def hash(self) -> str:
        """SHA-256 over what a fit uses of every row, in canonical order (16 hex digits)."""
        rows = [
            [self.schemes[g].label, n, d, y, w]
            for g, n, d, y, w in zip(self.group, self.N, self.D, self.loss, self.weight, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def index(self, scheme: str | float) -> int:
        """Place of a scheme named by its label or by its bits (`4` finds `w4a4`); PointError naming the choices if it has
        no runs."""
        return find_scheme(self.schemes, scheme)

    def subset(self, keep: Array) -> Points:
        """The rows where `keep` (boolean, shape (n,)) holds; schemes without rows are dropped."""
        keep = np.asarray(keep, bool)
        left = np.unique(self.group[keep])
        return dataclasses.replace(
            self,
            N=self.N[keep],
            D=self.D[keep],
            loss=self.loss[keep],
            group=np.searchsorted(left, self.group[keep]),
            schemes=tuple(self.schemes[i] for i in left),
            weight=self.weight[keep],
            where=tuple(w for w, k in zip(self.where, keep, strict=True) if k),
            memory_bits=self.memory_bits[keep],
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
                **(dict(zip(("weights", "activations"), s.words[0], strict=True)) if len(s.words) == 1 else {}),
            }
            for i, s in enumerate(scheme)
        ]

    def with_loss(self, loss: Array) -> Points:
        """The same design with other losses, e.g. simulated ones."""
        return dataclasses.replace(self, loss=np.asarray(loss, float))


def find_scheme(schemes: Sequence[Scheme], word: str | float) -> int:
    """Index of the scheme meant by a label or by a number of bits.

    By bits, a scheme with both operands at that width and no departure from the default (rotated, dense) is meant.
    """
    text = str(word).strip()
    for i, s in enumerate(schemes):
        if s.label == text or s.label.lower() == text.lower():
            return i
    meant = scheme_from_words(text)
    if meant is not None:
        same = [
            i
            for i, s in enumerate(schemes)
            if (s.w_grid_bits, s.a_grid_bits, s.w_stored_bits) == (meant.w_grid_bits, meant.a_grid_bits, meant.w_stored_bits)
            and (s.full or (s.rotated and s.w_mse == meant.w_mse))
        ]
        if same:
            return min(same, key=lambda i: (len(schemes[i].label), schemes[i].label))
    labels = ", ".join(s.label for s in schemes)
    raise PointError(f"no runs of scheme '{word}'; schemes with runs: {labels}; by bits: {_widths(schemes)}")


def _widths(schemes: Sequence[Scheme]) -> str:
    """The numbers of bits that `find_scheme` takes for one of these, most first."""
    square = [s for s in schemes if s.w_grid_bits == s.a_grid_bits == s.w_stored_bits]
    plain = [s for s in square if s.full or (s.rotated and s.w_mse == grid_mse(s.w_grid_bits))]
    return ", ".join(dict.fromkeys(f"{s.w_stored_bits:.4g}" for s in plain)) or "none"


# ---------------------------------------------------------------------------------------------------- reading


def read_points(
    source: str | Path, *, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None
) -> Points:
    """Points from a .csv, .json (a list of records, or columns) or .parquet file. Raises PointError, OSError, ImportError
    (no pyarrow)."""
    return points_from_frame(read_frame(source), columns=columns, where=where, source=Path(source).name)


def read_frame(source: str | Path) -> pd.DataFrame:
    """The table in a .csv, .json or .parquet file."""
    import pandas as pd

    path = Path(source)
    kind = path.suffix.lower()
    try:
        if kind == ".csv":
            return pd.read_csv(path)
        if kind == ".json":
            content = json.loads(path.read_text())
            content = content.get("points", content) if isinstance(content, dict) else content
            return pd.DataFrame(content)
        if kind in {".parquet", ".pq"}:
            return pd.read_parquet(path)
    except (ValueError, TypeError) as error:  # every parser's complaint is a ValueError
        raise PointError(f"{path.name} is not a readable {kind[1:]} table: {error}") from error
    raise PointError(f"{path.name}: unknown kind of table '{kind}'; choices: .csv, .json, .parquet")


def points_from_frame(
    frame: pd.DataFrame,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    source: str = "table",
) -> Points:
    """Points from one row per run.

    `columns` maps our names (N, D, loss, scheme, weight, seed, run, data_hash, w_grid_bits, …) to the table's; `a+b` joins two.
    `where` keeps only rows whose column `says` a value. Raises PointError with row and column for a missing column,
    a value that is not a positive finite number, a scheme of unknown or contradictory bits, a duplicate, or mixed data.
    """
    if where:
        for key, value in where.items():
            if key not in frame.columns:
                raise PointError(f"no such column; the table has: {', '.join(map(str, frame.columns))}", column=key)
            kept = frame[[says(cell, value) for cell in frame[key]]]
            if len(frame) and not len(kept):
                raise PointError(f"{source} holds no rows with {key}={value}{_instead(frame[key])}")
            frame = kept
    if not len(frame):
        raise PointError(f"{source} holds no rows")
    table = {str(c): frame[c].tolist() for c in frame.columns}
    rows = row_names(frame, source)
    table = _rename(table, columns or {})
    notes: list[Finding] = []
    if "state" in table:
        done = [not _given(state) or state in ("done", "imported") for state in table["state"]]
        if not all(done):
            omitted = sorted({f"{row} ({state})" for row, state, ok in zip(rows, table["state"], done, strict=True) if not ok})
            names = ", ".join(omitted[:6]) + (" …" if len(omitted) > 6 else "")
            notes.append(
                Finding("unfinished_runs", f"{len(omitted)} unfinished runs are left out: {names}.", {"runs": omitted})
            )
        table = {c: [v for v, ok in zip(values, done, strict=True) if ok] for c, values in table.items()}
        rows = [row for row, ok in zip(rows, done, strict=True) if ok]
    if not rows:
        raise PointError(f"{source} holds no finished runs: {notes[0]}")

    N = _positive(table, "N", rows)
    loss = _positive(table, "loss", rows)
    D = _positive(table, "D", rows) if "D" in table else np.full(len(rows), math.nan)
    weight = _positive(table, "weight", rows) if "weight" in table else np.ones(len(rows))
    labels = [_label(v) for v in table["scheme"]] if "scheme" in table else ["all"] * len(rows)
    schemes = _schemes(table, labels, rows, notes)
    hashes = [str(h) if _given(h) else None for h in table.get("data_hash", [])]
    if unknown := hashes.count(UNKNOWN_DATA):
        notes.append(
            Finding(
                "unknown_data",
                f"{unknown} of {len(rows)} runs are of unknown data; they share a law with others only if text, tokenizer and "
                "validation part are the same.",
                {"runs": unknown, "of": len(rows)},
            )
        )
    data = tuple(sorted({h for h in hashes if h not in (None, UNKNOWN_DATA)}))
    if len(data) > 1:
        first = next(i for i, h in enumerate(hashes) if h in data)
        second = next(row for row, h in zip(rows, hashes, strict=True) if h in data and h != hashes[first])
        raise PointError(
            f"losses on different data cannot share a law ({rows[first]} has {hashes[first]}); choose one: {', '.join(data)}",
            row=second,
            column="data_hash",
        )
    _refuse_duplicates(zip(labels, N, D, loss, table.get("seed", [None] * len(rows)), strict=True), rows)

    order = sorted(schemes.values(), key=lambda s: s.order)
    place = {s.label: i for i, s in enumerate(order)}
    group = np.array([place[label] for label in labels])
    bits = np.array([s.w_stored_bits for s in order])[group]
    memory = np.where(np.isnan(known := _numbers(table, "model_bits", rows)), N * bits, known)
    line_up = np.lexsort((loss, D, N, group))
    return Points(
        N[line_up],
        D[line_up],
        loss[line_up],
        group[line_up],
        tuple(order),
        weight[line_up],
        tuple(rows[i] for i in line_up),
        memory[line_up],
        data,
        tuple(notes),
    )


def says(cell: Any, value: str | float) -> bool:
    """Is a cell of a table what `value` names? Numbers are compared as numbers (3e7 is 30000000), all else as text."""
    if str(cell) == str(value):
        return True
    try:
        return not isinstance(cell, bool) and math.isclose(float(cell), float(value), rel_tol=1e-9)
    except (TypeError, ValueError):
        return False


def _instead(column: pd.Series, most: int = 6) -> str:
    """The commonest values of a column, for who asked for another."""
    values = [f"{v:.12g}" if isinstance(v, float) else str(v) for v in column.dropna().value_counts().index]
    return f"; it has {', '.join(values[:most])}{' …' if len(values) > most else ''}" if values else ""


def row_names(frame: pd.DataFrame, source: str = "table") -> list[str]:
    """How messages and `Points.where` call the rows of a table: `run NAME` where it has runs, else by number from 1."""
    if "run" in frame.columns:
        return [f"run {name}" for name in frame["run"]]
    return [f"{source} row {i + 1 if isinstance(i, int) else i}" for i in frame.index]


def make_points(N: Iterable[float], D: Iterable[float], loss: Iterable[float], scheme: Iterable[str | float]) -> Points:
    """Points from plain sequences of equal length: parameters, tokens, nats/token, scheme label or bits."""
    import pandas as pd

    return points_from_frame(
        pd.DataFrame({"N": list(N), "D": list(D), "loss": list(loss), "scheme": list(scheme)}), source="points"
    )


def _given(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value).strip()


def _rename(table: dict[str, list[Any]], columns: Mapping[str, str]) -> dict[str, list[Any]]:
    out = dict(table)
    for name, wanted in columns.items():
        for part in wanted.split("+"):
            if part not in table:
                raise PointError(f"no such column (mapped to {name}); the table has: {', '.join(table)}", column=part)
        parts = wanted.split("+")
        out[name] = (
            table[wanted]
            if len(parts) == 1
            else ["+".join(map(_label, cells)) for cells in zip(*(table[p] for p in parts), strict=True)]
        )
    for name, choices in ALIASES.items():
        found = next((c for c in choices if c in out), None)
        if found is not None:
            out[name] = out[found]
        elif name in {"N", "loss"}:
            raise PointError(
                f"missing; the table has: {', '.join(table) or 'no columns'}; map one with {name}=<column>", column=name
            )
    return out


def _numbers(table: dict[str, list[Any]], column: str, rows: Sequence[str]) -> Array:
    """The column as floats, nan where absent or empty."""
    out = np.full(len(rows), math.nan)
    for i, (value, row) in enumerate(zip(table.get(column, []), rows, strict=False)):
        if value is not None:
            out[i] = _number(value, row, column)
    return out


def _number(value: Any, row: str, column: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise PointError(f"{value!r} is not a number", row=row, column=column) from None


def _positive(table: dict[str, list[Any]], column: str, rows: Sequence[str]) -> Array:
    out = np.empty(len(rows))
    for i, (value, row) in enumerate(zip(table[column], rows, strict=True)):
        out[i] = _number(value, row, column)
        if not (math.isfinite(out[i]) and out[i] > 0):
            raise PointError(f"{value!r} must be a positive finite number", row=row, column=column)
    return out


def _schemes(
    table: dict[str, list[Any]], labels: Sequence[str], rows: Sequence[str], notes: list[Finding]
) -> dict[str, Scheme]:
    """One Scheme per label, from spec words, the label and the columns w_grid_bits and a_grid_bits, which have to agree.

    The columns hold the bits of the grids or, under their old names w_bits and a_bits, perhaps those stored. Where layers have
    specs of their own (a mark in the label says so), only the columns hold the mean.
    """
    columns = ("w_grid_bits", "a_grid_bits", "w_stored_bits", "a_stored_bits")
    # messages name a column as the table does
    name = {c: next((alias for alias in ALIASES[c] if alias in table and alias != c), c) for c in columns}
    width = {c: _numbers(table, name[c], rows) for c in columns}
    out: dict[str, Scheme] = {}
    spelled: dict[str, dict[tuple[str, ...], tuple[str, str]]] = {}  # label → words but for blocks → words
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        words = [str(table[c][i]) if c in table and isinstance(table[c][i], str) else None for c in ("weights", "activations")]
        scheme = scheme_from_words(label, *words)
        if scheme is None:
            scheme = scheme_from_words("", *words) if all(words) else None
        w, a = width["w_grid_bits"][i], width["a_grid_bits"][i]
        if scheme is None and not math.isnan(w):
            a = w if math.isnan(a) else a
            scheme = Scheme(label, w, a, w, grid_mse(w), grid_mse(a))
        if scheme is None and label == "all":
            scheme = Scheme(label, FULL_BITS, FULL_BITS, FULL_BITS, 0.0, 0.0)
        if scheme is None:
            raise PointError(
                f"the bits of '{label}' are unknown; name it like w4a4, bf16, fp4 or 4, or add columns w_grid_bits and"
                " a_grid_bits",
                row=row,
                column="scheme",
            )
        mixed = bool(_MIXED.search(label))
        if mixed and math.isnan(w + a):
            w, a = width["w_stored_bits"][i], width["a_stored_bits"][i]
        mixed &= not math.isnan(w + a)
        if mixed:
            scheme = Scheme(label, w, a, w, math.nan, math.nan, scheme.rotated)
        scheme = dataclasses.replace(scheme, label=label)
        inputs = read_format(words[1]) if words[1] else None
        a_stored = math.nan if inputs is None else inputs.stored
        for column, said, meant, stored in (
            (name["w_grid_bits"], w, scheme.w_grid_bits, scheme.w_stored_bits),
            (name["a_grid_bits"], a, scheme.a_grid_bits, a_stored),
        ):
            if abs(said - stored) <= 0.02:
                continue
            if not math.isnan(said) and abs(said - meant) > 0.02 and not (said >= FULL_BITS and meant >= FULL_BITS):
                if said < FULL_BITS or all(words):
                    raise PointError(f"{said:g} contradicts scheme '{label}' ({meant:g} bits)", row=row, column=column)
                note = Finding(
                    "bits_column",
                    f"Scheme {label} is read as {meant:g} bits, from its name; column {column} says {said:g}.",
                    {"scheme": label, "column": column, "bits": float(meant), "column_bits": float(said)},
                )
                if note not in notes:
                    notes.append(note)
        if not math.isnan(known := width["w_stored_bits"][i]):
            scheme = dataclasses.replace(scheme, w_stored_bits=known)
        if math.isnan(scheme.w_stored_bits):
            raise PointError("bits are missing", row=row, column=name["w_grid_bits"])
        if (
            label in out
            and not mixed
            and (out[label].w_grid_bits, out[label].a_grid_bits, out[label].w_stored_bits)
            != (
                scheme.w_grid_bits,
                scheme.a_grid_bits,
                scheme.w_stored_bits,
            )
        ):
            raise PointError(f"scheme '{label}' has other bits here than in earlier rows", row=row, column="scheme")
        out.setdefault(label, scheme)
        if words[0] and words[1]:
            pair = words[0], words[1]
            spelled.setdefault(label, {}).setdefault(tuple(_BLOCK.sub("-h", word) for word in pair), pair)
    return {label: dataclasses.replace(s, words=tuple(spelled.get(label, {}).values())) for label, s in out.items()}


def _refuse_duplicates(cells: Iterable[tuple[Any, ...]], rows: Sequence[str]) -> None:
    """Repeats of a cell are welcome (another seed, another loss); the same measurement twice would count double."""
    seen: dict[tuple[str, ...], str] = {}
    for cell, row in zip(cells, rows, strict=True):
        key = tuple(map(str, cell))
        if key in seen:
            raise PointError(f"repeats {seen[key]}: same scheme, N, D and loss", row=row, column="loss")
        seen[key] = row
