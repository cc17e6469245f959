"""Tidy tables of a report: one row a run, one a scheme and size for the cost, one a scheme for the health.

A row of `run_table` is a run; its columns keep the names of result.json, so that each number can be traced to its file:

    run state scheme params_non_embedding tokens tokens_per_param w_grid_bits a_grid_bits w_stored_bits model_bits memory
    flops loss predicted tokens_per_s seconds peak_memory_bytes seed lr steps device data_hash command …

Sizes, tokens, loss and bits are those of the points that the fit used, if there are any.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ...metrics import GRAD_NORM, LOSS_SPIKE, LR, OPERANDS, STEP, TOKENS, TRAIN_LOSS, VAL_LOSS, saturation
from ..charts import in_order
from ..choice import Choice
from ..collapse import Family
from ..document import FitDocument
from ..fit_result import Fit
from ..forecasts import RunForecast
from ..formats import FULL_BITS
from ..health import SATURATION, count_spikes
from ..planner import bits_in_memory
from ..points import Points
from ..schemes import Scheme, read_scheme
from ..tables import ALIASES
from ..uncertainty import Bootstrap

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
SIZES = {"params_non_embedding": "N", "tokens": "D", "loss": "loss"}  # columns, and their names in points

# eff of QuEST's own schemes, by the rest of their label: arXiv 2502.05003 (figure 3 and the fit of section 5)
PUBLISHED_EFF = {
    "w1a1": 0.02,
    "w2a2": 0.15,
    "w3a3": 0.43,
    "w4a4": 0.69,
    "w8a8": 1.02,
    "fp4": 0.63,
    "w-fp4-a-fp4": 0.63,
    "w4sparse-a4": 0.38,
    "w4a4-2of4pairs": 0.38,
}
PUBLISHED_SOURCE = "arXiv 2502.05003"


@dataclasses.dataclass(frozen=True)
class Material:
    """The material of a report.

    `runs` has one row a run with `run`, `state`, `scheme` and columns named as in result.json; `metrics` one row a line of
    metrics.jsonl with `run`; `bench` the rows of `questctl bench --json`; `left_out` run and reason. `document` is that of the
    fit; without a fit, `problem` says why. `forecasts` are of unfinished runs, `families` of runs whose curves should coincide.
    `about` are facts for the foot of the page, (what, value) pairs. `shown` are the runs whose lines `metrics` holds and whose
    rows the page shows, by name (None: all). If there are others, `shown_words` say which are shown and where the others are.
    """

    title: str
    runs: pd.DataFrame
    metrics: pd.DataFrame
    bench: pd.DataFrame
    left_out: pd.DataFrame
    points: Points | None = None
    fit: Fit | None = None
    boot: Bootstrap | None = None
    choice: Choice | None = None
    document: FitDocument | None = None
    problem: str = ""
    forecasts: tuple[RunForecast, ...] = ()
    families: tuple[Family, ...] = ()
    about: tuple[tuple[str, str], ...] = ()
    shown: frozenset[str] | None = None
    shown_words: str = ""


def published(fit: Fit) -> dict[str, float]:
    """Published eff of the schemes that are QuEST's own, relative to the reference scheme of the fit."""
    bare = {label: re.sub(r"^quest-", "", label.lower()) for label in fit.eff}
    unit = 1.0 if fit.reference.full else PUBLISHED_EFF.get(bare[fit.reference.label])
    return {label: PUBLISHED_EFF[name] / unit for label, name in bare.items() if name in PUBLISHED_EFF} if unit else {}


def run_table(m: Material) -> pd.DataFrame:
    """One row a run, in the order of `m.runs`; unknown columns are nan (or empty texts)."""
    import pandas as pd

    t = m.runs.reset_index(drop=True).copy()
    for ours, alias in SIZES.items():
        theirs = next((c for c in ALIASES[alias] if c in t), None)
        t[ours] = t[theirs] if theirs is not None else math.nan
    numbers = (
        *SIZES,
        "w_stored_bits",
        "tokens_per_param",
        "model_bits",
        "artifact_bytes",
        "flops",
        "tokens_per_s",
        "seconds",
        "peak_memory_bytes",
        "params_total",
        "seed",
        "lr",
        "steps",
        "train_loss",
        "bits_per_byte",
        "attempts",
    )
    for column in numbers:
        t[column] = pd.to_numeric(t[column], errors="coerce").astype(float) if column in t else math.nan
    for column in ("device", "data_hash", "command", "message", "weights", "activations", "commit"):
        t[column] = t[column].fillna("").astype(str) if column in t else ""
    t["scheme"] = t["scheme"].astype(str) if "scheme" in t else "all"
    row = {name: i for i, name in enumerate(t["run"])}
    t["predicted"] = math.nan
    grids = [_scheme(*r) for r in zip(t["scheme"], t["weights"], t["activations"], strict=True)]
    for name in ("w_grid_bits", "a_grid_bits"):
        t[name] = [math.nan if scheme is None else getattr(scheme, name) for scheme in grids]
    t["used"] = False
    if m.points is not None:
        p = m.points
        at = [row[name] for name in point_names(p)]
        t.loc[at, [*SIZES]] = np.stack([p.N, p.D, p.loss], axis=1)
        t.loc[at, "scheme"] = [p.labels[g] for g in p.group]
        for name in ("w_grid_bits", "a_grid_bits", "w_stored_bits"):
            t.loc[at, name] = [getattr(p.schemes[g], name) for g in p.group]
        t.loc[at, "tokens_per_param"] = p.tokens_per_param
        t.loc[at, "model_bits"] = p.memory_bits
        t.loc[at, "used"] = True
        if m.fit is not None:
            t.loc[at, "predicted"] = p.loss * np.exp(m.fit.errors)
    t["estimated_flops"] = t["flops"].isna()
    t["flops"] = t["flops"].fillna(6 * t["params_non_embedding"] * t["tokens"])
    rest = (t["params_total"] - t["params_non_embedding"]).where(t["params_total"].notna(), 0.0)  # embedding and head
    of_rest = {label: _bits_of_rest(label) for label in t["scheme"].unique()}
    counted = (t["model_bits"] + t["scheme"].map(of_rest).astype(float) * rest) / 8
    t["memory"] = t["artifact_bytes"].fillna(counted)  # of runs; of tables without that column what they are known to take
    return t


def _bits_of_rest(label: str) -> float:
    """Mean bits of an entry of embedding and head in runs of a scheme."""
    scheme = read_scheme(label)
    return FULL_BITS if scheme is None else sum(bits.value for bits in bits_in_memory(scheme)[1:]) / 2


@cache
def _scheme(label: str, weights: str, activations: str) -> Scheme | None:
    """The scheme of a run, from its specs or its label, for runs that are not among the points."""
    return read_scheme(label, weights or None, activations or None)


def point_names(points: Points) -> list[str]:
    """Names of the points' runs, as the table of runs has them."""
    return [w.removeprefix("run ") for w in points.where]


def cost(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a (device, scheme, size) of the runs with known speed: medians, and the time relative to full precision.

    `overhead` is the unquantized runs' tokens/s over these on the same device and size, minus 1; nan without such runs.
    """
    import pandas as pd

    known = runs[runs["tokens_per_s"].notna() & runs["params_non_embedding"].notna()]
    out = []
    full = (
        known[(known["w_grid_bits"] >= 16) & (known["a_grid_bits"] >= 16)]
        .groupby(["device", "params_non_embedding"])["tokens_per_s"]
        .median()
    )
    keys = ["device", "scheme", "params_non_embedding"]
    for (device, scheme, n), some in known.groupby(keys, sort=False):
        speed = float(some["tokens_per_s"].median())
        base = float(full.get((device, n), math.nan))
        out.append(
            {
                "device": device,
                "scheme": scheme,
                "params_non_embedding": n,
                "w_grid_bits": some["w_grid_bits"].iloc[0],
                "runs": len(some),
                "tokens_per_s": speed,
                "seconds": float(some["seconds"].median()),
                "total_seconds": float(some["seconds"].sum()),
                "a_grid_bits": some["a_grid_bits"].iloc[0],
                "peak_memory_bytes": float(some["peak_memory_bytes"].median()),
                "memory": float(some["memory"].median()),
                "overhead": base / speed - 1,
                "names": list(some["run"]),
            }
        )
    table = pd.DataFrame(out, columns=[*(out[0] if out else [*keys, "tokens_per_s"])])
    return (
        table.sort_values(["device", "params_non_embedding", "w_grid_bits"], ascending=[True, True, False], kind="stable")
        if out
        else table
    )


# Columns of metric lines that the health section does not repeat: curves, counters, and what `health` counts as spikes.
SHOWN_ELSEWHERE = {"run", "row", STEP, TOKENS, LR, TRAIN_LOSS, VAL_LOSS, LOSS_SPIKE}


CLAMPED = tuple(map(saturation, OPERANDS))


def over_layers(metrics: pd.DataFrame) -> pd.DataFrame:
    """The metric lines, in which values logged by layer (a mapping in a cell) become their mean over layers and their worst.

    The worst is the highest value for shares of clamped entries, and the lowest for all else.
    """
    out = metrics.copy()
    for name in [c for c in out.columns if c != "run" and out[c].map(lambda cell: isinstance(cell, Mapping)).any()]:
        cells = [list(cell.values()) if isinstance(cell, Mapping) and cell else [math.nan] for cell in out.pop(name)]
        out[f"{name}, mean of layers"] = [float(np.mean(values)) for values in cells]
        out[_worst(name)] = [float(np.max(values) if name in CLAMPED else np.min(values)) for values in cells]
    return out


def _worst(name: str) -> str:
    return f"{name}, {'highest' if name in CLAMPED else 'lowest'} layer"


def signals(metrics: pd.DataFrame) -> list[str]:
    """Names of the logged quantities beside losses, learning rate and counters: gradient norm, trust fraction, …"""
    import pandas as pd

    return [
        str(c)
        for c in metrics.columns
        if c not in SHOWN_ELSEWHERE and pd.api.types.is_numeric_dtype(metrics[c]) and metrics[c].notna().any()
    ]


def health(metrics: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """One row a scheme: runs, diverged and failed ones, spikes, largest gradient norm, median last value of each signal.

    Spikes and clamped operands are defined in `analysis.health`; `spikes` is None if no run of the scheme logged it. `clamped`
    is the number of runs that end with such an operand.
    """
    import pandas as pd

    named, logged_rows = signals(metrics), set(metrics["row"]) if len(metrics) else set()
    by_run = metrics.groupby("row") if len(metrics) else None
    last = by_run[named].last() if by_run is not None and named else pd.DataFrame()
    worst = [name for name in map(_worst, CLAMPED) if name in named]
    largest = by_run[GRAD_NORM].max() if by_run is not None and GRAD_NORM in metrics else pd.Series(dtype=float)
    logged = metrics[metrics[LOSS_SPIKE].notna()] if LOSS_SPIKE in metrics else metrics[:0]
    spikes = logged.groupby("row")[LOSS_SPIKE].agg(count_spikes) if len(logged) else pd.Series(dtype=float)
    out = []
    for scheme in in_order(runs):
        mine = runs[runs["scheme"] == scheme]
        rows = [r for r in mine.index if r in logged_rows]
        measured = [r for r in rows if r in spikes.index]
        states = mine["state"].value_counts()
        out.append(
            {
                "scheme": scheme,
                "runs": len(mine),
                "diverged": int(states.get("diverged", 0)),
                "failed": int(states.get("failed", 0)),
                "spikes": int(spikes.loc[measured].sum()) if measured else None,
                "spiky": [mine.at[r, "run"] for r in measured if spikes.at[r]],
                "clamped": [mine.at[r, "run"] for r in rows if worst and (last.loc[r, worst] > SATURATION).any()],
                "grad_norm": float(largest.reindex(rows).max()) if rows and len(largest) else math.nan,
                **{f"last {name}": float(last.reindex(rows)[name].median()) if rows else math.nan for name in named},
                "names": list(mine["run"]),
            }
        )
    return pd.DataFrame(out)


def repeats(runs: pd.DataFrame) -> int:
    """Number of cells (scheme, N, D, seed) whose runs differ in the learning rate: a search that the fit treats as repeats."""
    used = runs[runs["used"] & runs["lr"].notna()]
    return (
        int((used.groupby(["scheme", "params_non_embedding", "tokens", "seed"], dropna=False)["lr"].nunique() > 1).sum())
        if len(used)
        else 0
    )
