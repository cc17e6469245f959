"""Laws of hyperparameters: the best learning rate and batch of each cell (scheme, N, D), and how they grow with N and D.

    fit = fit_knobs(read_trials(records))
    fit.predict(N=1e9, D=2e10)              → lr, batch (tokens)

In each cell the loss is fitted by a quadratic in x = log lr and y = log B,

    L = c₀ + c₁x + c₂y + c₃x² + c₄xy + c₅y²,

over the best share of its runs, for each of SHARES. The minimum is the mean over SHARES, because it depends on how many runs
the quadratic is fitted to. A cell with one batch (or one rate) gets a parabola in the other alone. Then, over the cells,

    lr* = c·N^a·D^b,    B* = k·D^β        (the form of the step law, Li et al., arXiv 2503.04715)

by least squares in logs. A cell's weight is 1/(s² + τ²): s² is the variance of its minimum (of the fit, and over SHARES), and
τ² the scatter of the cells beyond that. Intervals are Student's. An F test of a factor on lr* and B* for each scheme tells
whether schemes differ.

Regret of a cell: the loss of its quadratic at the setting by the law of the *other* cells, minus its best measured loss.

Units: N parameters without embeddings, D tokens, B tokens a step, losses nats/token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .points import narrow_groups
from .schemes import read_scheme
from .tables import ALIASES, ALL, PointError, has_value, matches

Array = np.ndarray
SHARES = (0.35, 0.4, 0.45)  # shares of a cell's runs, the best ones, to which its quadratic is fitted
LEAST_RUNS = {2: 9, 1: 4}  # of a cell, for a quadratic in two knobs and in one
KNOBS = ("lr", "batch")
SAME_TOKENS = 0.02  # relative span of D within one cell, since runs have whole batches
LAW_OF = {"lr": ("N", "D"), "batch": ("D",)}
COLUMNS = {
    "N": ALIASES["N"],
    "D": ALIASES["D"],
    "lr": (*ALIASES["lr"], "peak_lr"),
    "batch": ("batch_tokens", "tokens_per_step"),
    "batch_sequences": ("batch_sequences", "train.batch_size", "batch_size", "bs"),
    "seq_len": ("data.seq_len", "seq_len", "sequence_length"),
    "loss": ("smooth_loss", "smooth loss", *ALIASES["loss"]),
    "scheme": ALIASES["scheme"],
}
SEQ_LEN = 2048.0  # default for tables of sequences, as in the step law's


@dataclasses.dataclass(frozen=True)
class Trials:
    """n runs: N, D, lr, batch (tokens a step; NaN where unknown) and loss, shape (n,) each, and the label of each scheme."""

    N: Array
    D: Array
    lr: Array
    batch: Array
    loss: Array
    scheme: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.loss)


@dataclasses.dataclass(frozen=True)
class Cell:
    """The best knobs of one (scheme, N, D): `best` maps lr and batch to the minimum and `interval` to its 95 % ends.

    `edge` names the knobs whose minimum lies at or beyond the ends of the values tried: they are not used for laws.
    """

    scheme: str
    N: float
    D: float
    runs: int
    best: dict[str, float]
    interval: dict[str, tuple[float, float]]
    sd: dict[str, float]  # of log best
    edge: tuple[str, ...]
    loss: float  # best measured
    curve: tuple[float, ...]  # of the quadratic of the middle share, about `centre`
    centre: dict[str, float]
    regret: float = math.nan

    def at(self, setting: Mapping[str, float]) -> float:
        """The quadratic's loss at a setting of the knobs, nats/token."""
        x = np.array([math.log(setting[k] / self.centre[k]) for k in self.centre])
        return float((_columns(x[None]) @ np.array(self.curve))[0])

    def shown(self, knob: str) -> tuple[str, str, str]:
        """The minimum of a knob and its interval's ends as text; empty for a knob that was not varied, `edge` at an edge."""
        if knob not in self.best:
            return "", "", ""
        if knob in self.edge:
            return "edge", "", ""
        low, high = self.interval[knob]
        return f"{self.best[knob]:.3g}", f"{low:.3g}", f"{high:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("curve", "centre", "sd")}
        return {**values, "regret": None if math.isnan(self.regret) else self.regret}


@dataclasses.dataclass(frozen=True)
class KnobLaw:
    """`knob` = factor · Π of powers of N and D, with `exponents` and their 95 % intervals; `scatter` of cells about it in logs.

    `offsets` maps a scheme to the factor on the knob, with interval, against the first scheme; `p_value` is that of the test
    that no scheme has such a factor. Both are empty for a single scheme.
    """

    knob: str
    factor: float
    factor_interval: tuple[float, float]
    exponents: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    scatter: float
    cells: int
    offsets: dict[str, tuple[float, float, float]]
    p_value: float | None

    def at(self, N: float, D: float) -> float:
        """The knob at N and D."""
        known = {"N": N, "D": D}
        return self.factor * math.prod(known[k] ** e for k, e in self.exponents.items())

    def __str__(self) -> str:
        powers = " · ".join(f"{name}^{value:.3f}" for name, value in self.exponents.items())
        return f"{self.knob} = {self.factor:.4g}" + (f" · {powers}" if powers else "")


@dataclasses.dataclass(frozen=True)
class KnobFit:
    """The cells, largest scheme first, and the laws by knob."""

    cells: tuple[Cell, ...]
    laws: dict[str, KnobLaw]
    notes: tuple[str, ...]

    def predict(self, N: float, D: float) -> dict[str, float]:
        """The best lr and batch (tokens a step) at N and D."""
        return {knob: law.at(N, D) for knob, law in self.laws.items()}

    @property
    def regret(self) -> float:
        """Mean regret on held-out cells, nats/token; NaN if no cell could be held out."""
        known = [cell.regret for cell in self.cells if not math.isnan(cell.regret)]
        return float(np.mean(known)) if known else math.nan

    @property
    def sentences(self) -> list[str]:
        """The laws, their regret, whether schemes differ, and what was left out."""
        out = []
        for law in self.laws.values():
            ends = ", ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in law.intervals.items())
            out.append(
                f"{law}" + (f" (95 % intervals of the exponents: {ends})" if ends else "") + f", from {law.cells} cells."
            )
            for scheme, (factor, low, high) in law.offsets.items():
                out.append(f"{scheme}: {law.knob} times {factor:.3g} [{low:.3g}, {high:.3g}] of {self.cells[0].scheme}'s.")
            if law.p_value is not None:
                moved = "do" if law.p_value < 0.05 else "do not clearly"
                out.append(f"Schemes {moved} shift the best {law.knob} (p = {law.p_value:.2g}).")
        if not math.isnan(self.regret):
            share = 100 * self.relative_regret
            out.append(f"Regret on cells left out: {self.regret:.4f} nats/token, {share:.2f} % of the loss.")
        return [*out, *self.notes]

    @property
    def relative_regret(self) -> float:
        """Mean regret as a share of the best loss."""
        known = [cell.regret / cell.loss for cell in self.cells if not math.isnan(cell.regret)]
        return float(np.mean(known)) if known else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        return {
            "kind": "knobs",
            "laws": {knob: dataclasses.asdict(law) for knob, law in self.laws.items()},
            "regret": None if math.isnan(self.regret) else self.regret,
            "relative_regret": None if math.isnan(self.relative_regret) else self.relative_regret,
            "cells": [cell.to_dict() for cell in self.cells],
            "notes": list(self.notes),
        }


def read_trials(records: Sequence[Mapping[str, Any]], names: Sequence[str], columns: Mapping[str, str] | None = None) -> Trials:
    """The runs of a table: N, D, lr, loss, and the batch in tokens (`batch`), or in sequences with `seq_len` (else 2048).

    Raises PointError naming the row (`names`) and column of a value that is missing or no positive number.
    """
    present = dict.fromkeys(key for record in records for key in record)
    if not records:
        raise PointError("no runs to fit")
    column_of = {ours: _find(ours, present, columns or {}) for ours in COLUMNS}
    out: dict[str, list[float]] = {k: [] for k in ("N", "D", "lr", "batch", "loss")}
    for record, name in zip(records, names, strict=True):
        for ours in ("N", "D", "lr", "loss"):
            if column_of[ours] is None:
                raise PointError(f"the table has no column {ours}; it has {', '.join(present)}", column=ours)
            out[ours].append(_positive(record.get(column_of[ours] or ours), column_of[ours] or ours, name))
        if column_of["batch"]:
            out["batch"].append(_positive(record.get(column_of["batch"]), column_of["batch"], name))
        elif column_of["batch_sequences"]:
            length = SEQ_LEN if (column := column_of["seq_len"]) is None else record.get(column)
            sequences = _positive(record.get(column_of["batch_sequences"]), column_of["batch_sequences"], name)
            out["batch"].append(sequences * _positive(length, column_of["seq_len"] or "seq_len", name))
        else:
            out["batch"].append(math.nan)
    label = column_of["scheme"]
    scheme = tuple(str(r[label]) if label and has_value(r.get(label)) else ALL for r in records)
    return Trials(**{k: np.array(v) for k, v in out.items()}, scheme=scheme)


def _find(ours: str, present: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    if ours in columns:
        return columns[ours]
    exact = [c for c in COLUMNS[ours] if c in present]
    folded = exact or matches(ours, present, COLUMNS[ours])
    return folded[0] if folded else None


def _positive(value: Any, column: str, row: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        shown = repr(value) if has_value(value) else "an empty cell"
        raise PointError(f"{shown} must be a positive finite number", row=row, column=column)
    return number


def fit_knobs(trials: Trials) -> KnobFit:
    """The minimum of each cell, the laws through the minima, and the regret on held-out cells.

    Raises PointError if no cell has enough runs for a minimum in any knob.
    """
    cells, notes = [], []
    labels = sorted(set(trials.scheme), key=lambda s: (-getattr(read_scheme(s), "w_stored_bits", 0.0), s))
    keys = [rows for label in labels for rows in _same_budget(trials, np.flatnonzero(np.array(trials.scheme) == label))]
    few = 0
    for rows in keys:
        cell = _cell(trials, trials.scheme[rows[0]], rows)
        few += cell is None
        cells += [cell] if cell else []
    if not cells:
        raise PointError(
            f"no cell of one scheme, N and D has {LEAST_RUNS[1]} runs at three learning rates, "
            f"or {LEAST_RUNS[2]} over learning rate and batch"
        )
    if few:
        notes.append(f"{few} of {len(keys)} cells have too few runs for a minimum.")
    edges = sum(bool(cell.edge) for cell in cells)
    if edges:
        notes.append(f"{edges} of {len(cells)} cells have their minimum at the end of what was tried: not used for that knob.")
    laws = _laws(cells)
    if not laws:
        notes.append("No law: fewer than three cells have a minimum inside what was tried.")
    left_out = [_with_regret(cell, cells, i) for i, cell in enumerate(cells)]
    return KnobFit(tuple(left_out), laws, tuple(notes))


def _same_budget(trials: Trials, rows: Array) -> list[Array]:
    """The rows of each N and D; values of D that differ by less than a rounding to whole batches count as equal."""
    out = []
    for n in np.unique(trials.N[rows]):
        mine = rows[trials.N[rows] == n]
        mine = mine[np.argsort(trials.D[mine], kind="stable")]
        lengths = [len(part) for part in narrow_groups(trials.D[mine], math.log(1 + SAME_TOKENS))]
        out += np.split(mine, np.cumsum(lengths)[:-1])
    return out


def _columns(x: Array) -> Array:
    """(n, 6) columns of a quadratic in two knobs, or (n, 3) in one, for x (n, knobs)."""
    ones = np.ones(len(x))
    if x.shape[1] == 1:
        return np.stack([ones, x[:, 0], x[:, 0] ** 2], axis=1)
    return np.stack([ones, x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2], axis=1)


def _vertex(c: Array) -> tuple[Array, Array] | None:
    """The minimum (k,) of a quadratic and its derivatives by the coefficients (k, len(c)); None without a minimum."""
    if len(c) == 3:
        if c[2] <= 0:
            return None
        x = -c[1] / (2 * c[2])
        return np.array([x]), np.array([[0.0, -1 / (2 * c[2]), -x / c[2]]])
    H = np.array([[2 * c[3], c[4]], [c[4], 2 * c[5]]])
    if np.linalg.eigvalsh(H)[0] <= 0:
        return None
    x = -np.linalg.solve(H, c[1:3])
    by = np.array([[0, 1, 0, 2 * x[0], x[1], 0], [0, 0, 1, 0, x[0], 2 * x[1]]])  # ∂(gradient at x)/∂c
    return x, -np.linalg.solve(H, by)


def _cell(trials: Trials, scheme: str, rows: Array) -> Cell | None:
    """The cell of these rows; None if they are too few."""
    from scipy.special import stdtrit

    knobs = [k for k in KNOBS if len(np.unique(getattr(trials, k)[rows])) >= 3 and not np.isnan(getattr(trials, k)[rows]).any()]
    if not knobs or len(rows) < LEAST_RUNS[len(knobs)]:
        return None
    logs, loss = np.stack([np.log(getattr(trials, k)[rows]) for k in knobs], axis=1), trials.loss[rows]
    centre = logs.mean(axis=0)
    x, p = logs - centre, len(_columns(logs[:1])[0])
    found = []
    for share in SHARES:
        most = max(LEAST_RUNS[len(knobs)], p + 1, round(share * len(rows)))
        near = np.argsort(loss, kind="stable")[:most]
        A = _columns(x[near])
        c, _, rank, _ = np.linalg.lstsq(A, loss[near], rcond=None)
        vertex = _vertex(c) if rank == p else None
        dof = len(near) - p
        if vertex is not None and dof > 0:
            noise = float(np.sum((A @ c - loss[near]) ** 2)) / dof
            spread = vertex[1] @ (noise * np.linalg.inv(A.T @ A)) @ vertex[1].T
            found.append((vertex[0], np.diag(spread), dof, c))
    n, d = float(trials.N[rows[0]]), float(trials.D[rows[0]])
    low, high = logs.min(axis=0), logs.max(axis=0)
    if not found:  # a slope, or a saddle: no minimum inside
        names = {k: math.exp(m) for k, m in zip(knobs, logs[np.argmin(loss)], strict=True)}
        nothing = dict.fromkeys(knobs, (math.nan, math.nan))
        return Cell(
            scheme, n, d, len(rows), names, nothing, dict.fromkeys(knobs, math.nan), tuple(knobs), float(loss.min()), (), {}
        )
    places = np.array([place for place, *_ in found])
    best = places.mean(axis=0) + centre
    variance = np.mean([spread for _, spread, *_ in found], axis=0) + places.var(axis=0)
    quantile = float(stdtrit(min(dof for *_, dof, _ in found), 0.975))
    edge = tuple(k for k, b, lo, hi in zip(knobs, best, low, high, strict=True) if not lo < b < hi)
    sd = dict(zip(knobs, np.sqrt(variance).tolist(), strict=True))
    middle = found[len(found) // 2][3]
    named = {k: math.exp(b) for k, b in zip(knobs, best, strict=True)}
    ends = {k: (named[k] * math.exp(-quantile * sd[k]), named[k] * math.exp(quantile * sd[k])) for k in knobs}
    about = {k: math.exp(m) for k, m in zip(knobs, centre, strict=True)}
    return Cell(scheme, n, d, len(rows), named, ends, sd, edge, float(loss.min()), tuple(middle.tolist()), about)


def _laws(cells: Sequence[Cell]) -> dict[str, KnobLaw]:
    out = {knob: _law(knob, [c for c in cells if knob in c.best and knob not in c.edge]) for knob in KNOBS}
    return {knob: law for knob, law in out.items() if law is not None}


def _law(knob: str, cells: Sequence[Cell]) -> KnobLaw | None:
    """The law of a knob through cells; a factor that does not vary, or depends linearly on another, is left out."""
    from scipy.special import fdtrc, stdtrit

    if len(cells) < 3:
        return None
    y = np.array([math.log(c.best[knob]) for c in cells])
    s2 = np.array([c.sd[knob] ** 2 for c in cells])
    names, shared = [], [np.ones(len(cells))]
    for name in LAW_OF[knob]:
        column = np.log([getattr(c, name) for c in cells])
        if np.linalg.matrix_rank(np.stack([*shared, column - column.mean()], axis=1), tol=1e-3) > len(shared) < len(cells) - 1:
            names.append(name)
            shared.append(column)
    schemes = list(dict.fromkeys(c.scheme for c in cells))
    own = [np.array([float(c.scheme == s) for c in cells]) for s in schemes[1:]]
    A = np.stack(shared, axis=1)
    c, cov, scatter, dof, cost, tau2 = _weighted(A, y, s2)
    t = float(stdtrit(max(dof, 1), 0.975))
    half = t * np.sqrt(np.diag(cov))
    offsets, p_value = {}, None
    if own and len(cells) > A.shape[1] + len(own) + 1:
        wide = np.concatenate([A, np.stack(own, axis=1)], axis=1)
        weight = 1 / (s2 + tau2)
        full, root = _solve(wide, y, weight)
        rest = float(np.sum(weight * (y - wide @ full) ** 2))
        left = len(y) - wide.shape[1]
        noise = rest / left
        ratio = max(cost - rest, 0.0) / len(own) / max(noise, 1e-300)
        p_value = float(fdtrc(len(own), left, ratio))
        quantile = float(stdtrit(left, 0.975))
        for i, s in enumerate(schemes[1:], A.shape[1]):
            width = quantile * math.sqrt(noise * root[i, i])
            offsets[s] = (math.exp(full[i]), math.exp(full[i] - width), math.exp(full[i] + width))
    ends = {name: (float(c[i] - half[i]), float(c[i] + half[i])) for i, name in enumerate(names, 1)}
    factor = (math.exp(c[0] - half[0]), math.exp(min(c[0] + half[0], 700.0)))
    exponents = {name: float(v) for name, v in zip(names, c[1:], strict=True)}
    return KnobLaw(knob, math.exp(c[0]), factor, exponents, ends, scatter, len(cells), offsets, p_value)


def _solve(A: Array, y: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted least squares: coefficients, and (AᵀWA)⁻¹."""
    inverse = np.linalg.pinv((A * weight[:, None]).T @ A)
    return inverse @ (A * weight[:, None]).T @ y, inverse


def _weighted(A: Array, y: Array, s2: Array) -> tuple[Array, Array, float, int, float, float]:
    """Weighted least squares with weights 1/(s² + τ²), τ² such that the weighted residuals have mean square 1, or 0.

    Coefficients, their covariance, the scatter in logs, degrees of freedom, the weighted sum of squares and τ².
    """
    dof = len(y) - A.shape[1]

    def excess(tau2: float) -> float:
        weight = 1 / (s2 + tau2)
        c, _ = _solve(A, y, weight)
        return float(np.sum(weight * (y - A @ c) ** 2)) - dof

    floor = 1e-12 + 1e-6 * float(np.var(y))
    low, high = floor, floor
    if dof > 0 and excess(low) > 0:
        high = max(float(np.var(y)), 1e-9)
        while excess(high) > 0:
            high *= 4
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    weight = 1 / (s2 + high)
    c, inverse = _solve(A, y, weight)
    r = y - A @ c
    return c, inverse, float(np.sqrt(np.mean(r**2))), dof, float(np.sum(weight * r**2)), high


def _with_regret(cell: Cell, cells: Sequence[Cell], place: int) -> Cell:
    """The cell with its regret under the laws of the other cells."""
    laws = _laws([c for i, c in enumerate(cells) if i != place])
    if not cell.curve or any(k not in laws for k in cell.centre):
        return cell
    setting = {k: laws[k].at(cell.N, cell.D) for k in cell.centre}
    return dataclasses.replace(cell, regret=cell.at(setting) - cell.loss)
