"""Runs that were trained elsewhere, read from a table: CSV, JSON (a list of records), JSON lines, or an export of W&B.

    a row → run, scheme, N (parameters without embeddings), D (training tokens), loss (nats/token), data hash, lr, …

Known as they are: W&B's CSV (columns `Name`, `State`, …), W&B's JSON (`config` and `summary` of each run, as its API gives
them), and the published runs of QuEST (arXiv 2502.05003, `for_plots/runs_for_scaling.json`), whose scheme follows from the
names of its quantizers. For other tables `--map N=params` says which column is meant. The rows are stored beside the run
folders, in a file of their own (store.py), with the state `imported`: nobody takes them for runs that were trained here.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..metrics import VAL_LOSS

UNKNOWN = "unknown"  # data hash of a row that does not say on which text its loss was measured
STATE = "imported"

# The first of these names that a table has is taken.
ALIASES: dict[str, tuple[str, ...]] = {
    "params_non_embedding": ("params_non_embedding", "non_embedding_parameters", "N_noembed", "N", "n_params", "params"),
    "tokens": ("tokens", "D", "train_tokens", "total_tokens", "tokens_seen"),
    "loss": ("loss", "final-val/loss", "val_loss", "val/loss", "eval/loss", VAL_LOSS, "L"),
    "scheme": ("scheme", "P", "bits"),
    "run": ("run", "Name", "name", "id"),
    "data_hash": ("data_hash",),
    "lr": ("lr", "optim.lr", "learning_rate"),
    "seed": ("seed", "train.seed"),
    "n_layer": ("n_layer", "model.n_layer", "n_layers"),
    "d_model": ("d_model", "model.d_model", "n_embd", "hidden_size"),
}
NUMBERS = ("params_non_embedding", "tokens", "loss", "lr", "seed", "n_layer", "d_model", "w_bits", "a_bits")
REQUIRED = {"params_non_embedding": "N", "tokens": "D", "loss": "loss", "scheme": "scheme"}
BATCH = ("iterations", "batch_size", "sequence_length", "acc_steps", "world_size")  # whose product is D in QuEST's code
FINISHED = ("finished", "done", "imported", "")


@dataclass(frozen=True)
class ExternalRuns:
    """What a table gave: rows as `load_runs` has them, and what was left out."""

    rows: list[dict[str, Any]]
    sha256: str
    unfinished: int  # not finished there
    without_loss: int


def read(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    data_hash: str | None = None,
) -> ExternalRuns:
    """The runs in a table. `columns` maps our names (N, D, loss, scheme, run, …) to the table's, `a+b` joining two; `where`
    keeps rows whose column, as text, equals a value; `data_hash` is said of rows that do not say it.

    Raises DataError naming file, row and column for what cannot be read, is missing or is no number.
    """
    content, records = _records(path)
    wanted = {{"N": "params_non_embedding", "D": "tokens"}.get(k, k): v for k, v in (columns or {}).items()}
    rows, unfinished, without_loss = [], 0, 0
    for number, record in enumerate(records, 1):
        flat = _flat(record)
        place = f"{path}, row {number}"
        for key in where or {}:
            if key not in flat:
                raise DataError(f"{place}: has no column '{key}'; it has: {_some(flat)}.")
        if any(str(flat[key]) != value for key, value in (where or {}).items()):
            continue
        if str(flat.get("State", flat.get("state")) or "").lower() not in FINISHED:
            unfinished += 1
            continue
        row = _row(flat, wanted, place)
        if row["loss"] is None:
            without_loss += 1
            continue
        row["run"] = f"{path.stem}/{row['run'] or number}"
        row["data_hash"] = row["data_hash"] or data_hash or UNKNOWN
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no finished runs with a loss ({unfinished} unfinished, {without_loss} without a loss).")
    names = [row["run"] for row in rows]
    for number, row in enumerate(rows, 1):
        if names.count(row["run"]) > 1:
            row["run"] += f"-{number}"
    return ExternalRuns(rows, hashlib.sha256(content).hexdigest(), unfinished, without_loss)


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


def _row(flat: dict[str, Any], wanted: Mapping[str, str], place: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in (*ALIASES, "w_bits", "a_bits", "weights", "activations"):
        if name in wanted:
            parts = wanted[name].split("+")
            for part in parts:
                if part not in flat:
                    raise DataError(f"{place}: has no column '{part}' (mapped to {name}); it has: {_some(flat)}.")
            row[name] = flat[parts[0]] if len(parts) == 1 else "+".join(str(flat[p]) for p in parts)
        else:
            row[name] = next((flat[c] for c in ALIASES.get(name, (name,)) if flat.get(c) not in (None, "")), None)
        if name in NUMBERS:
            row[name] = _number(row[name], place, name)
    if row["tokens"] is None and all(c in flat for c in BATCH):
        row["tokens"] = math.prod(_number(flat[c], place, c) or 0 for c in BATCH)
    if row["scheme"] is None and "w_quant" in flat and "a_quant" in flat:
        bits = {c: 16.0 if row[c] is None else row[c] for c in ("w_bits", "a_bits")}
        row["scheme"] = published_scheme(str(flat["w_quant"]), str(flat["a_quant"]), **bits)
        row["w_bits"] = row["a_bits"] = None  # its name says them, better than its columns
    if row["scheme"] is None and row["w_bits"] is not None:
        row["scheme"] = f"w{row['w_bits']:g}a{row['w_bits'] if row['a_bits'] is None else row['a_bits']:g}"
    for name, ours in REQUIRED.items():
        if row[name] is None and (name != "loss" or not any(c in flat for c in (*ALIASES["loss"], wanted.get("loss", "")))):
            raise DataError(f"{place}: has no {ours}; it has: {_some(flat)}; name the column by --map {ours}=COLUMN.")
    scheme = row["scheme"]
    row["scheme"] = f"{scheme:g}" if isinstance(scheme, int | float) else str(scheme).strip()
    row["tokens_per_param"] = row["tokens"] / row["params_non_embedding"] if row["params_non_embedding"] else None
    return {**row, "state": STATE}


def _number(value: Any, place: str, column: str) -> float | None:
    if value in (None, ""):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{place}, column '{column}': {value!r} is not a number.") from None
    if math.isnan(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**63 else number


def _records(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The file, and its rows in order."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}.") from e
    try:
        text = content.decode("utf-8-sig")
        if path.suffix == ".csv":
            return content, [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        if path.suffix == ".jsonl":
            values: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise DataError(f"{path}: unknown kind of table '{path.suffix}'; choices: .csv, .json, .jsonl.")
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as e:
        raise DataError(f"{path}: is not a readable {path.suffix[1:]} table: {e}.") from e
    if isinstance(values, dict):
        values = next((values[k] for k in ("runs", "points") if isinstance(values.get(k), list)), list(values.values()))
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise DataError(f"{path}: must hold a list of runs, each an object.")
    return content, values


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """One level of names. W&B: the config's and the summary's keys beside the run's own; a config's values may lie under
    `value`. Of the published runs: the keys of `args` where the run itself does not have them."""
    flat: dict[str, Any] = {}
    for part in ("args", "config", "summary", "summary_metrics", "summaryMetrics"):
        inner = record.get(part)
        if isinstance(inner, str):
            try:
                inner = json.loads(inner)  # as W&B's own database has them
            except ValueError:
                continue
        if isinstance(inner, dict):
            values = {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in inner.items()}
            flat |= {f"{k}.{kk}": vv for k, v in values.items() if isinstance(v, dict) for kk, vv in v.items()} | values
    return flat | {k: v for k, v in record.items() if k is not None and not isinstance(v, dict)}


def _some(flat: Mapping[str, Any]) -> str:
    names = [str(k) for k in flat]
    return ", ".join(names[:40]) + (" …" if len(names) > 40 else "")
