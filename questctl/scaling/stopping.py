"""The judge of sweeps that stop early: how far a cell is behind another one, and how far it may be behind at the end.

Forecasts of single curves are poor for comparing two cells: on a grid of learning rates their errors at 40 % of the steps were
1 to 22 %, while the gaps between cells were known to .4 % and moved slowly (docs/decisions.md). Errors that two curves of one
sweep share (from the law, the data, often the same batches) cancel in their difference. The difference is therefore forecast:

    d      mean over the last WINDOW of the steps of log L(cell) - log L(other), at the same share s of both runs
    v      d minus its value around half that share
    gap    d + k·v - e/2 ± z·√((ρ·d)² + (k·v)² + α² + (e/2z)² + σ²),   (ρ, k, α) = (SHRINK, TREND, DRIFT)·(1-s)^⅓

σ is the standard error of d. e = GAIN·(remaining drop of this cell's rate minus that of the other's, in units of the higher
peak) is the most that this cell can gain on the other by the decay of its rate, because a high constant rate looks worse than
it ends. The trend v protects low rates, which begin slowly and do not slow down: on a grid one such cell was .25 behind and
ended level.

A cell is stopped if the low end of its gap to some other cell lies above the margin. The other cell can be of two kinds:

    knobs      same model, data, scheme and tokens; other optimizer settings, schedule or batch. Seeds alone are no alternatives
    frontier   same data and budget (analysis/pareto.py), and a model of no more bits: the cell cannot reach the frontier

No cell is compared with runs that have failed, diverged or been stopped. The recorded forecast is the other cell's final loss,
measured or by the multi-power law, times e^gap.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ..analysis.curve_fit import fit_curves
from ..analysis.pareto import budgets
from ..analysis.points import Points
from ..analysis.schemes import Scheme
from ..config import RunConfig
from ..config.rates import learning_rate
from ..errors import DataError
from ..metrics import STEP, TRAIN_LOSS
from ..store import Run
from ..sweep.stop_rule import FRONTIER, KNOBS
from ..sweep.stopping import GO_ON, STOP, Stopping, model_bits, replicas
from ..sweep.sweep_file import Cell
from .curves import run_curve
from .sources import analysis_errors

# Set on 27 runs of Muon and 15 of AdamW, 300 steps each, at nine and five learning rates (benchmarks/early_stop.py).
SHRINK = 0.5  # standard deviation of the relative change of a gap, for the whole of a run
TREND = 0.6  # change for each unit of the trend, and its standard deviation
DRIFT = 0.015  # standard deviation of the absolute change in log loss
GAIN = 0.04  # log loss that a fall of the rate from the peak to zero gains at most
WINDOW = 0.1  # share of the steps over which losses are averaged
LEAST_LINES = 3  # least metric lines in a window
NEIGHBOURS = 1.5  # factor on standard errors, because neighbours on a curve are not independent
TAIL = 0.1  # share of a finished run over which its final loss is read


@dataclass(frozen=True)
class Windows:
    """Place (share of the steps, rounded) → log training loss, for the metric lines before a share and around half of it."""

    now: dict[float, float]
    before: dict[float, float]


@dataclass(frozen=True)
class Gap:
    """How far a run is behind another in log loss: `now` at a share of both runs, and its interval at their ends."""

    now: float
    middle: float
    low: float
    high: float


def judge(stopping: Stopping, cell: Cell, run: Run, mark: int) -> None:
    """Judge a cell after `mark` of its steps and append the verdict to its run (`decide`). Raises StorageError."""
    begin = time.process_time()
    try:
        verdict = decide(stopping, cell, run, mark)
    except DataError as e:  # too few lines, or a damaged file: no reason to stop a run
        verdict = {"verdict": GO_ON, "reason": str(e), "now": 0.0}
    run.add_verdict({STEP: mark, **verdict, "seconds": round(time.process_time() - begin, 3)})


def decide(stopping: Stopping, cell: Cell, run: Run, mark: int) -> dict[str, Any]:
    """The verdict on a cell after `mark` of its steps: a record with verdict, reason, the cell ahead, gap and forecast.

    It depends only on the metric lines up to the same share of each cell's steps and on which cells have come that far, not on
    a clock. Raises DataError for a run whose files are damaged or whose lines are too few.
    """
    rule, share = stopping.rule, mark / cell.config.train.steps
    mine = windows(run, cell.config, share)
    if mine is None:
        raise DataError(f"fewer than {LEAST_LINES} metric lines in {WINDOW:.0%} of the steps; set train.log_every lower.")
    rivals: list[tuple[str, Gap, Cell, Run]] = []
    for kind, other in _rivals(stopping, cell):
        theirs = run.sibling(other.run_id)
        counts = theirs.exists() and theirs.state() not in ("failed", "diverged", "stopped")
        if counts and (curve := windows(theirs, other.config, share)) is not None:
            rivals.append((kind, gap(mine, curve, cell.config, other.config, share, rule.level), other, theirs))
    if not rivals:
        return {"verdict": GO_ON, "reason": "no cell to compare it with has come as far", "now": 0.0}
    kind, ahead, other, theirs = max(rivals, key=lambda row: (row[1].low, row[1].now, row[2].run_id))
    present = math.exp(math.fsum(mine.now.values()) / len(mine.now) - ahead.now)
    likely = ahead.low * present > rule.margin  # if not, the other cell's end, which needs a fit, cannot change the verdict
    end = _end(theirs, other.config) if likely else present
    low, middle, high = (end * math.expm1(each) for each in (ahead.low, ahead.middle, ahead.high))
    stops = low > rule.margin
    off = "It cannot touch the frontier: at" if stops and kind == FRONTIER else "At"
    reason = (
        f"{off} step {mark}/{cell.config.train.steps} it was {present * math.expm1(ahead.now):+.3f} nats/token from "
        f"{theirs.name}, and is forecast to end {middle:+.3f} [{low:+.3f}, {high:+.3f}] from it."
    )
    about = {"by": other.run_id, "against": kind, "of": len(rivals), "now": ahead.now, "gap": [low, middle, high]}
    forecast = {"forecast": end + middle, "low": end + low, "high": end + high} if stops else {}
    rules = {"level": rule.level, "margin": rule.margin}
    return {"verdict": STOP if stops else GO_ON, "reason": reason, **about, **forecast, **rules}


def gap(mine: Windows, theirs: Windows, a: RunConfig, b: RunConfig, share: float, level: float) -> Gap:
    """The gap of run `a` to run `b`, from their windows at a share of their steps, by the formula of this module."""
    d, error = _difference(mine.now, theirs.now)
    trend = d - _difference(mine.before, theirs.before)[0]
    z, to_come = NormalDist().inv_cdf(0.5 + level / 2), (1 - share) ** (1 / 3)
    peak = max(a.optim.lr, b.optim.lr)
    extra = GAIN * max(0.0, (_drop(a, share) - _drop(b, share)) / peak)
    spread = math.hypot(SHRINK * d, TREND * trend, DRIFT) * to_come
    half = z * math.hypot(spread, extra / 2 / z, NEIGHBOURS * error)
    middle = d + TREND * trend * to_come - extra / 2
    return Gap(d, middle, middle - half, middle + half)


def _difference(mine: dict[float, float], theirs: dict[float, float]) -> tuple[float, float]:
    """The mean difference of two windows and its standard error; at the same places, noise of shared batches cancels."""
    shared = sorted(mine.keys() & theirs.keys())
    if len(shared) >= LEAST_LINES:
        return _mean([mine[x] - theirs[x] for x in shared])
    (one, e1), (two, e2) = _mean(list(mine.values())), _mean(list(theirs.values()))
    return one - two, math.hypot(e1, e2)


def windows(run: Run, config: RunConfig, share: float) -> Windows | None:
    """The windows of a run at a share of its steps: the WINDOW that ends there, and the one around half that share.

    None if the run has not come that far, or has too few lines there.
    """
    steps = config.train.steps
    lines = [line for line in run.metrics() if line.get(TRAIN_LOSS) is not None]
    if not lines or lines[-1][STEP] < share * steps - config.train.log_every:
        return None
    now, before = (
        {
            round(line[STEP] / steps, 9): math.log(line[TRAIN_LOSS])
            for line in lines
            if (end - WINDOW) * steps < line[STEP] <= end * steps
        }
        for end in (share, (share + WINDOW) / 2)
    )
    return Windows(now, before) if min(len(now), len(before)) >= LEAST_LINES else None


def _rivals(stopping: Stopping, cell: Cell) -> list[tuple[str, Cell]]:
    """The other cells with which a cell is compared, each with the kind of comparison."""
    mine, key = stopping.groups[cell.run_id], _data_key(cell.config)
    bits = model_bits(cell.config)
    budget = _budgets(stopping.cells) if FRONTIER in stopping.rule.against else {}
    out: list[tuple[str, Cell]] = []
    for other in stopping.cells:
        if other.run_id == cell.run_id or replicas(cell.config, other.config):
            continue
        if KNOBS in stopping.rule.against and stopping.groups[other.run_id] == mine:
            out.append((KNOBS, other))
        elif budget and _data_key(other.config) == key and budget[other.run_id] == budget[cell.run_id]:
            out += [(FRONTIER, other)] if model_bits(other.config) <= bits else []
    return out


def _data_key(config: RunConfig) -> str:
    """Equal for runs whose losses can be compared: text, tokenizer and context length."""
    return json.dumps(config.identity["data"], sort_keys=True)


def _budgets(cells: tuple[Cell, ...]) -> dict[str, float]:
    """Run id → the training budget of a frontier (`analysis.pareto.budgets`)."""
    configs = [cell.config for cell in cells]
    labels = sorted({config.scheme for config in configs})
    names = tuple(cell.run_id for cell in cells)
    points = Points(
        N=np.array([config.model.params_non_embedding for config in configs], float),
        D=np.array([config.tokens for config in configs], float),
        loss=np.ones(len(configs)),
        group=np.array([labels.index(config.scheme) for config in configs]),
        schemes=tuple(Scheme(label, *(math.nan,) * 5) for label in labels),
        weight=np.ones(len(configs)),
        where=names,
        memory_bits=np.array([model_bits(config) for config in configs]),
        unique=np.full(len(configs), math.nan),
        share=np.zeros(len(configs)),
    )
    return {name: value for value, rows in budgets(points).rows.items() for name, on in zip(names, rows, strict=True) if on}


def _drop(config: RunConfig, share: float) -> float:
    """By how much the learning rate still falls after a share of the steps."""
    steps = config.train.steps
    at = learning_rate(min(steps - 1, round(share * steps)), steps, config.optim)
    return at - learning_rate(steps - 1, steps, config.optim)


def _end(run: Run, config: RunConfig) -> float:
    """The training loss at the end of a run: measured if it is done, else by the multi-power law; else its present loss."""
    lines = [line for line in run.metrics() if line.get(TRAIN_LOSS) is not None]
    if run.result_path.exists():
        return tail(lines)
    try:
        with analysis_errors():
            curve = run_curve(run)
            return float(fit_curves([curve]).predict(curve.rates, [float(config.train.steps)])[0])
    except DataError:
        return tail(lines)


def tail(lines: list[dict[str, Any]]) -> float:
    """The training loss at the last metric line, from a straight line through the last TAIL of the steps."""
    n = max(5, sum(line[STEP] > (1 - TAIL) * lines[-1][STEP] for line in lines))
    step, loss = (np.array([float(line[key]) for line in lines[-n:]]) for key in (STEP, TRAIN_LOSS))
    if len(step) < 3:
        return float(loss.mean())
    return float(np.polyfit(step - step[-1], loss, 1)[1])


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    mean = math.fsum(values) / len(values)
    square = math.fsum((v - mean) ** 2 for v in values)
    return mean, math.sqrt(square / (len(values) - 1) / len(values)) if len(values) > 1 else math.inf
