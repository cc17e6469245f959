"""Whole training curves: loss and learning rate over steps, read, checked, and made ready for the laws in `curve_laws`.

    curves = read_curves("curves.csv")          CSV, JSON or JSON lines: columns step, lr, loss; long with a column run; or the
                                                wide export of a chart of W&B, a column of losses for each run

Between two rows the rate is linear; before the first row it rises linearly from zero at step 0. The warm-up ends at the first
row whose rate is within SAME_RATE of the highest. Rows before it enter the sum of rates but are not fitted.

Smoothing: a curve of more than MOST_POINTS rows is fitted by the means of that many bins of equally many rows (`thinned`), and
its schedule by MOST_CHANGES rates at equal shares of its rise and fall (`Rates.thinned`). So a fit costs at most MOST_POINTS ·
MOST_CHANGES operations a curve, whatever the length of the run.

Units: steps, the learning rate as it is, losses in nats/token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import LR, STEP, TRAIN_LOSS
from .tables import ALIASES, PointError, chart_columns, column_named, has_value, matches, read_table

Array = np.ndarray
LEAST_POINTS = 20  # of a curve after its warm-up
MOST_POINTS = 128  # of a curve that enter a fit
TRAINING, VALIDATION = LOSSES = ("training", "validation")  # the text on which the loss of a curve is measured
MOST_CHANGES = 128  # of its rate
SAME_RATE = 1e-3  # relative difference of rates below which the warm-up has ended
STEPS = ("step", "_step", "iter", "iteration", "global_step", "trainer/global_step")
COLUMNS: dict[str, tuple[str, ...]] = {  # our name → names that curves use for it
    "step": (STEP, *STEPS),
    "lr": (*ALIASES["lr"], LR, "train/lr", "train/learning_rate", "eta"),
    "loss": (TRAIN_LOSS, "train_loss", "train/loss", "training_loss", *ALIASES["loss"]),
    "N": ALIASES["N"],
    "tokens": ALIASES["D"],
    "scheme": ALIASES["scheme"],
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """A schedule: the learning rate, a line between the knots (step (k,), lr (k,)), constant after the last."""

    step: Array
    lr: Array

    @cached_property
    def sums(self) -> Array:
        """(k,) sum of the rates up to each knot, S₁ in units of lr · step."""
        return np.concatenate([[0.0], np.cumsum(0.5 * (self.lr[1:] + self.lr[:-1]) * np.diff(self.step))])

    @property
    def peak(self) -> float:
        """The highest rate."""
        return float(self.lr.max())

    @property
    def warmup(self) -> int:
        """Index of the knot at which the warm-up ends."""
        return int(np.argmax(self.lr >= (1 - SAME_RATE) * self.peak))

    def sum_at(self, step: Array) -> Array:
        """S₁ at steps, exact between knots."""
        step = np.asarray(step, float)
        k = np.clip(np.searchsorted(self.step, step, side="right") - 1, 0, len(self.step) - 1)
        since = np.maximum(step - self.step[k], 0.0)
        return self.sums[k] + 0.5 * since * (self.lr[k] + self.rate_at(step))

    def rate_at(self, step: Array) -> Array:
        """The rate at steps."""
        return np.interp(step, self.step, self.lr)

    def cut(self, last: float) -> Rates:
        """The schedule up to step `last`, at which it has a knot."""
        keep = self.step < last
        return Rates(np.append(self.step[keep], last), np.append(self.lr[keep], self.rate_at(np.array([last]))))

    def scaled(self, step: float, lr: float) -> Rates:
        """The same schedule with steps and rates in other units."""
        return Rates(self.step * step, self.lr * lr)

    def thinned(self, most: int = MOST_CHANGES) -> Rates:
        """The schedule with about `most` changes of the rate at most: level knots are dropped, and others kept at equal shares
        of the rate's total movement."""
        slope = np.diff(self.lr) / np.diff(self.step)
        inner = np.abs(np.diff(slope)) > 1e-9 * max(float(np.abs(slope).max(initial=0.0)), 1e-300)
        level = (self.lr[1:-1] == self.lr[:-2]) & (self.lr[1:-1] == self.lr[2:])
        keep = np.concatenate([[True], inner | ~level, [True]])
        step, lr = self.step[keep], self.lr[keep]
        if len(step) <= most:
            return Rates(step, lr)
        moved = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(lr)))])
        share = np.floor(moved / moved[-1] * most).astype(int)
        turns = np.concatenate([[True], (np.diff(lr)[1:] == 0) != (np.diff(lr)[:-1] == 0), [True]])
        keep = turns | np.concatenate([[True], share[1:] != share[:-1]])
        return Rates(step[keep], lr[keep])


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run: loss and rate at its rows (n,), ascending in step.

    `rates` is its schedule, `first` the place of its first row after the warm-up. N and `tokens_per_step` are NaN if the source
    does not give them; `scheme` is the label of its quantization. `of` is the kind of its loss, one of LOSSES.
    """

    name: str
    step: Array
    lr: Array
    loss: Array
    rates: Rates
    first: int = 0
    N: float = math.nan
    tokens_per_step: float = math.nan
    scheme: str | None = None
    of: str = TRAINING

    def __len__(self) -> int:
        return len(self.step)

    @property
    def steps(self) -> float:
        """The last step."""
        return float(self.step[-1])

    def until(self, step: float) -> Curve:
        """The rows up to a step, with the whole schedule."""
        n = int(np.searchsorted(self.step, step, side="right"))
        return dataclasses.replace(self, step=self.step[:n], lr=self.lr[:n], loss=self.loss[:n])

    def thinned(self, most: int = MOST_POINTS) -> tuple[Array, Array]:
        """Step and loss of the rows after the warm-up: means of at most `most` bins of equally many rows."""
        step, loss = self.step[self.first :], self.loss[self.first :]
        if len(step) <= most:
            return step, loss
        ends = np.linspace(0, len(step), most + 1).round().astype(int)[:-1]
        counts = np.diff(np.append(ends, len(step)))
        return np.add.reduceat(step, ends) / counts, np.add.reduceat(loss, ends) / counts


def make_curve(
    name: str,
    step: Any,
    lr: Any,
    loss: Any,
    *,
    rows: Sequence[str] = (),
    rates: Rates | None = None,
    N: float = math.nan,
    tokens_per_step: float = math.nan,
    scheme: str | None = None,
    of: str = TRAINING,
    least: int = LEAST_POINTS,
) -> Curve:
    """A checked curve. `rows` are the names of its rows in messages; `rates`, if known, is the whole schedule of the run.

    Raises PointError, which names the row, for a value that is no number, a rate below zero, and a step that repeats or goes
    back (a restart); and for fewer than `least` rows after the warm-up.
    """
    rows = rows or [f"{name} row {i}" for i in range(1, len(step) + 1)]
    columns = {"step": step, "lr": lr, "loss": loss}
    values = {c: np.array([_number(v, c, row) for v, row in zip(column, rows, strict=True)]) for c, column in columns.items()}
    step, lr, loss = values["step"], values["lr"], values["loss"]
    for i in range(len(step)):
        if i and step[i] == step[i - 1]:
            raise PointError(f"step {step[i]:g} stands twice in {name}", row=rows[i], column="step")
        if i and step[i] < step[i - 1]:
            raise PointError(
                f"{name} goes back from step {step[i - 1]:g} to {step[i]:g}: cut what was trained before the restart",
                row=rows[i],
                column="step",
            )
        if step[i] < 0 or lr[i] < 0 or loss[i] <= 0:
            column = "step" if step[i] < 0 else "lr" if lr[i] < 0 else "loss"
            raise PointError(f"{values[column][i]:g} must be positive", row=rows[i], column=column)
    if len(step) and not lr.max() > 0:
        raise PointError(f"{name} has no learning rate above zero", row=rows[0], column="lr")
    if len(step) < 2:
        raise PointError(f"{name} has {len(step)} rows; a law of curves needs {max(least, 2)}", row=(rows or [name])[-1])
    if rates is None:
        rates = Rates(step, lr) if step[0] == 0 else Rates(np.append(0.0, step), np.append(0.0, lr))
    first = int(np.searchsorted(step, rates.step[rates.warmup]))
    if len(step) - first < least:
        raise PointError(f"{name} has {len(step) - first} rows after its warm-up; a law of curves needs {least}", row=rows[-1])
    return Curve(name, step, lr, loss, rates, first, N, tokens_per_step, scheme, of)


def _number(value: Any, column: str, row: str) -> float:
    """A cell as a finite number; PointError naming its row otherwise."""
    try:
        number = float(value) if has_value(value) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = "an empty cell" if value in (None, "") else repr(value)
        raise PointError(f"{shown} must be a finite number", row=row, column=column)
    return number


def read_curves(
    source: str | Path, columns: Mapping[str, str] | None = None, *, rates: Rates | None = None
) -> tuple[Curve, ...]:
    """The curves of a file, in the order of their names; without a column run, the curve has the name of the file.

    `columns` maps step, lr, loss, run, N, tokens and scheme to the file's names; `rates` is the schedule of curves without a
    column of rates. Raises PointError, OSError.
    """
    path = Path(source)
    table = read_table(path, charts=True)
    return curves_from_records(table.records, path.stem, table.name, columns, rates=rates)


def curves_from_records(
    records: Sequence[Mapping[str, Any]],
    name: str,
    file: str = "table",
    columns: Mapping[str, str] | None = None,
    *,
    rates: Rates | None = None,
) -> tuple[Curve, ...]:
    """`read_curves` of records; messages name their rows `FILE row 7`, counted from 1."""
    present = dict.fromkeys(key for record in records for key in record)
    if not present:
        raise PointError(f"{file} has no rows")
    if wide := chart_columns(present):
        records = list(_long(records, wide, _column("step", present, columns, file)))
        present = dict.fromkeys(("run", "step", *(key for record in records for key in record)))
    names = {ours: _column(ours, present, columns, file) for ours in ("step", "loss")}
    lr = _optional("lr", present, columns) if rates else _column("lr", present, columns, file)
    run = column_named((columns or {}).get("run", "run"), present)
    about = {ours: _optional(ours, present, columns) for ours in ("N", "tokens", "scheme")}
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        if record.get(names["loss"]) not in (None, ""):  # other rows log something else; NaN is the loss of a diverged run
            groups.setdefault(str(record[run]) if run and has_value(record.get(run)) else name, []).append(i)
    if not groups:
        raise PointError(f"{file} has no row with a loss", column=names["loss"])
    out = []
    for label in sorted(groups):
        mine = [records[i] for i in groups[label]]
        rows = [f"{file} row {record.get('row', i + 1)}" for record, i in zip(mine, groups[label], strict=True)]
        last = {ours: mine[-1].get(c) if c else None for ours, c in about.items()}
        size, tokens = (_number(last[k], k, rows[-1]) if has_value(last[k]) else math.nan for k in ("N", "tokens"))
        numbers = [_number(record.get(names["step"]), "step", row) for record, row in zip(mine, rows, strict=True)]
        out.append(
            make_curve(
                label,
                numbers,
                [record.get(lr) for record in mine] if lr else rates.rate_at(np.array(numbers)) if rates else (),
                [record.get(names["loss"]) for record in mine],
                rows=rows,
                rates=None if lr else rates,
                N=size,
                tokens_per_step=tokens / numbers[-1] if numbers[-1] > 0 else math.nan,
                scheme=str(last["scheme"]) if has_value(last["scheme"]) else None,
            )
        )
    return tuple(out)


def _column(ours: str, present: Iterable[str], columns: Mapping[str, str] | None, file: str) -> str:
    """The column of one of our names; PointError listing the file's columns."""
    column = _optional(ours, present, columns)
    if column is None:
        raise PointError(f"{file} has no column {ours}; it has {', '.join(present)}", column=ours)
    return column


def _optional(ours: str, present: Iterable[str], columns: Mapping[str, str] | None) -> str | None:
    if columns and ours in columns:
        return columns[ours] if columns[ours] in present else None
    exact = [c for c in COLUMNS[ours] if c in present]
    folded = exact or matches(ours, present, COLUMNS[ours])
    return folded[0] if folded else None


def _long(records: Sequence[Mapping[str, Any]], wide: Sequence[str], step: str) -> Iterable[dict[str, Any]]:
    """Records (run, metric of each chart, step, row) of W&B's wide export; see `tables.chart_columns`."""
    for i, record in enumerate(records, 1):
        by_run: dict[str, dict[str, Any]] = {}
        for column in wide:
            run, metric = column.removeprefix("Name: ").rsplit(" - ", 1)
            if has_value(record.get(column)):
                by_run.setdefault(run, {})[metric] = record[column]
        for run, values in by_run.items():
            yield {"run": run, "step": record.get(step), "row": i, **values}
