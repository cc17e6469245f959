"""From what was measured to tidy tables: one row a run, one a scheme and size, one a run's health. No number is made up here.

A row of `run_table` is a run; its columns keep the names of result.json, so that each number can be found again:

    run state scheme N D ratio w_grid_bits a_grid_bits bits model_bits memory flops loss predicted tokens_per_s seconds
    peak_memory_bytes seed lr steps device data_hash command …

N, D, loss, bits and model_bits are those of the points that the fit used, where there are any.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...metrics import GRAD_NORM, LR, STEP, TOKENS, TRAIN_LOSS, VAL_LOSS
from ..choice import Choice
from ..fit_result import Fit
from ..points import Points
from ..tables import ALIASES
from ..uncertainty import Bootstrap
from .charts import in_order

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
SPIKE_SIGMAS, SPIKE_SHARE, SPIKE_WINDOW = 6.0, 0.02, 5

# eff of QuEST's own scheme, by what is left of its label: arXiv 2502.05003 (figure 3 and the fit of section 5)
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
    """All that a report is made of.

    `runs`: one row a run with `run`, `state`, `scheme` and what is known of it (result.json's names); `metrics`: one row a line
    of metrics.jsonl with `run`; `bench`: rows of `questctl bench --json`; `left_out`: run, reason. `document`: the fit's JSON.
    Without a fit `problem` says why. `about` are facts for the foot of the page: (what, value) pairs.
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
    document: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""
    about: tuple[tuple[str, str], ...] = ()


def published(fit: Fit) -> dict[str, float]:
    """Published eff of the schemes that are QuEST's own."""
    bare = {label: re.sub(r"^quest-", "", label.lower()) for label in fit.eff}
    return {label: PUBLISHED_EFF[name] for label, name in bare.items() if name in PUBLISHED_EFF}


def run_table(m: Material) -> pd.DataFrame:
    """One row a run, in the order of `m.runs`; columns that nothing is known of are nan (or empty words)."""
    import pandas as pd

    t = m.runs.reset_index(drop=True).copy()
    for ours in ("N", "D", "loss", "w_grid_bits", "a_grid_bits"):
        theirs = next((c for c in ALIASES[ours] if c in t), None)
        t[ours] = t[theirs] if theirs is not None else math.nan
    numbers = (
        "N",
        "D",
        "loss",
        "w_grid_bits",
        "a_grid_bits",
        "model_bits",
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
        "bits",
        "attempts",
    )
    for column in numbers:
        t[column] = pd.to_numeric(t[column], errors="coerce").astype(float) if column in t else math.nan
    for column in ("device", "data_hash", "command", "message", "weights", "activations", "commit"):
        t[column] = t[column].fillna("").astype(str) if column in t else ""
    t["scheme"] = t["scheme"].astype(str) if "scheme" in t else "all"
    row = {name: i for i, name in enumerate(t["run"])}
    t["predicted"] = math.nan
    t["used"] = False
    if m.points is not None:
        p = m.points
        at = [row[name] for name in point_names(p)]
        t.loc[at, "N"], t.loc[at, "D"], t.loc[at, "loss"] = p.N, p.D, p.loss
        t.loc[at, "scheme"] = [p.labels[g] for g in p.group]
        t.loc[at, "bits"] = [p.schemes[g].w_stored_bits for g in p.group]
        t.loc[at, "w_grid_bits"] = [p.schemes[g].w_grid_bits for g in p.group]
        t.loc[at, "a_grid_bits"] = [p.schemes[g].a_grid_bits for g in p.group]
        t.loc[at, "model_bits"] = p.memory_bits
        t.loc[at, "used"] = True
        if m.fit is not None:
            t.loc[at, "predicted"] = p.loss * np.exp(m.fit.residuals)
    t["ratio"] = t["D"] / t["N"]
    t["estimated_flops"] = t["flops"].isna()
    t["flops"] = t["flops"].fillna(6 * t["N"] * t["D"])
    rest = (t["params_total"] - t["N"]).where(t["params_total"].notna(), 0.0)  # embedding and head, kept at 16 bits
    t["memory"] = (t["model_bits"] + 16 * rest) / 8
    return t


def point_names(points: Points) -> list[str]:
    """Names of the points' runs, as the table of runs has them."""
    return [w.removeprefix("run ") for w in points.where]


def cost(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a (device, scheme, size) of the runs whose speed is known: medians, and the time beside full precision's.

    `overhead` is the unquantized runs' tokens/s over these on the same device and size, minus 1; nan where there are none.
    """
    import pandas as pd

    known = runs[runs["tokens_per_s"].notna() & runs["N"].notna()]
    out = []
    full = known[(known["w_grid_bits"] >= 16) & (known["a_grid_bits"] >= 16)].groupby(["device", "N"])["tokens_per_s"].median()
    keys = ["device", "scheme", "N"]
    for (device, scheme, n), some in known.groupby(keys, sort=False):
        speed = float(some["tokens_per_s"].median())
        base = float(full.get((device, n), math.nan))
        out.append(
            {
                "device": device,
                "scheme": scheme,
                "N": n,
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
    return table.sort_values(["device", "N", "w_grid_bits"], ascending=[True, True, False], kind="stable") if out else table


def spikes(loss: Array) -> int:
    """Logged training losses that stand out above what came before: by six robust sigmas of such steps, and by 2 %.

    The base of a loss is the median of the five lines before it; sigma is 1.4826 times the median size of all differences.
    """
    loss = np.asarray(loss, float)
    if len(loss) < 3 * SPIKE_WINDOW:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(loss, SPIKE_WINDOW)[:-1]
    base = np.median(windows, axis=1)
    gap = loss[SPIKE_WINDOW:] - base
    sigma = 1.4826 * float(np.median(np.abs(gap)))
    return int(np.sum((gap > SPIKE_SIGMAS * sigma) & (gap > SPIKE_SHARE * base)))


KNOWN_METRICS = {"run", "row", STEP, TOKENS, LR, TRAIN_LOSS, VAL_LOSS}


def over_layers(metrics: pd.DataFrame) -> pd.DataFrame:
    """The metric lines with what was logged layer by layer (a mapping in a cell) as its mean and its lowest over the layers."""
    out = metrics.copy()
    for name in [c for c in out.columns if c != "run" and out[c].map(lambda cell: isinstance(cell, Mapping)).any()]:
        cells = [list(cell.values()) if isinstance(cell, Mapping) and cell else [math.nan] for cell in out.pop(name)]
        out[f"{name}, mean of layers"] = [float(np.mean(values)) for values in cells]
        out[f"{name}, lowest layer"] = [float(np.min(values)) for values in cells]
    return out


def signals(metrics: pd.DataFrame) -> list[str]:
    """Names of the logged quantities beside losses, learning rate and counters: gradient norm, trust fraction, …"""
    import pandas as pd

    return [
        str(c)
        for c in metrics.columns
        if c not in KNOWN_METRICS and pd.api.types.is_numeric_dtype(metrics[c]) and metrics[c].notna().any()
    ]


def health(metrics: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """One row a scheme: runs, diverged and failed ones, spikes, largest gradient norm, median last value of each signal."""
    import pandas as pd

    named = signals(metrics)
    last = metrics.groupby("row")[named].last() if len(metrics) and named else pd.DataFrame()
    largest = metrics.groupby("row")[GRAD_NORM].max() if GRAD_NORM in metrics else pd.Series(dtype=float)
    jumps = (
        metrics.groupby("row")[TRAIN_LOSS].agg(lambda s: spikes(s.dropna().to_numpy()))
        if TRAIN_LOSS in metrics
        else pd.Series(dtype=float)
    )
    out = []
    for scheme in in_order(runs):
        mine = runs[runs["scheme"] == scheme]
        rows = [r for r in mine.index if r in jumps.index]
        states = mine["state"].value_counts()
        out.append(
            {
                "scheme": scheme,
                "runs": len(mine),
                "diverged": int(states.get("diverged", 0)),
                "failed": int(states.get("failed", 0)),
                "spikes": int(jumps.loc[rows].sum()) if rows else None,
                "spiky": [mine.at[r, "run"] for r in rows if jumps.at[r]],
                "grad_norm": float(largest.loc[rows].max()) if rows and len(largest) else math.nan,
                **{f"last {name}": float(last.loc[rows, name].median()) if rows else math.nan for name in named},
                "names": list(mine["run"]),
            }
        )
    return pd.DataFrame(out)


def repeats(runs: pd.DataFrame) -> int:
    """Cells (scheme, N, D, seed) of the fit whose runs differ in the learning rate: a search that the fit takes as repeats."""
    used = runs[runs["used"] & runs["lr"].notna()]
    return int((used.groupby(["scheme", "N", "D", "seed"], dropna=False)["lr"].nunique() > 1).sum()) if len(used) else 0
