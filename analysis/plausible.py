"""Plausibility checks of a readable table: numbers that may have another unit, and runs that one law may not describe together.

Nothing is refused here; each doubt is a finding that names the column, the numbers and the remedy.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..words import few
from .cells import read_number
from .findings import Finding
from .rows import Rows, run_key
from .tables import ALIASES, ALL, TableOptions, column_named, has_value

LEAST_SIZE = 1000  # parameters: where the largest model has fewer, they are counted in thousands or millions
RATIOS = (0.1, 1e6)  # range of tokens per parameter in published runs
LOSSES = (0.3, 12.0)  # nats a token: no text has less; more is worse than guessing one of 160,000 tokens
EPOCHS = 4.0  # up to here, repeated tokens are worth about as much as new ones (Muennighoff et al., arXiv 2305.16264)
SAME_WARMUP = 0.05  # relative difference up to which two warm-ups are equal
DATA_COLUMNS = ("dataset", "data", "corpus", "data_source", "data.source")
SCHEME_COLUMNS = ("precision", "format", "dtype", "quantizer", "method", "recipe")
PARTS = ("bits", "scheme", "quant", "quantization", "w_bits", "weight_bits")  # last parts of names that may be the scheme's
EPOCH_COLUMNS = ("epochs", "num_epochs", "n_epochs", "epoch")


def doubts(
    records: Sequence[Mapping[str, Any]],
    table: Rows,
    columns: Mapping[str, str],
    options: TableOptions,
    N: np.ndarray,
    D: np.ndarray,
    loss: np.ndarray,
    weight: np.ndarray,
) -> list[Finding]:
    """The doubts about the rows of `table`, whose N, D, loss and weight have shape (n,)."""
    used = [records[number - 1] for number in table.numbers]
    out = [*_numbers(table, columns, N, D, loss), *_weights(table, columns, weight)]
    sizes = [c for c in ALIASES["N"] if any(has_value(record.get(c)) for record in used)]
    mapped, better = columns.get("N"), next((c for c in sizes if "non_embed" in c or c == "N_noembed"), None)
    if better is not None and mapped is not None and mapped != better:
        text = f"N is {mapped}, though the table has {better}: laws count parameters without embeddings."
        out.append(Finding("with_embeddings", text, {"column": mapped, "instead": better}))
    for name in DATA_COLUMNS:
        values = sorted({str(record[name]) for record in used if has_value(record.get(name))})
        if len(values) > 1 and not any(row["data_hash"] for row in table.rows):
            text = (
                f"Column {name} has {len(values)} values ({few(values)}); losses on "
                f"different texts do not share a law: choose one by --where {name}={values[0]}."
            )
            out.append(Finding("several_data", text, {"column": name, "values": values}))
            break
    out += [*_unnamed_schemes(used, table), *_rates(table, options), *_optimizers(table), *_warmups(table, D)]
    return [*out, *_epochs(used, table), *([] if options.cluster or options.last else _checkpoints(used, table))]


def _numbers(table: Rows, columns: Mapping[str, str], N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> list[Finding]:
    """Tokens per parameter and losses that are out of the range of published runs."""
    out = []
    shares = "coverage" in table.columns.get("loss", "")
    ratio = D / N
    if N.max() < LEAST_SIZE and not shares and not (ratio > RATIOS[1]).any():
        text = f"The largest model has {N.max():g} parameters; {_rescale(columns, False)}."
        out.append(Finding("implausible_size", text, {"largest": float(N.max())}))
    for beyond, side, limit in ((ratio < RATIOS[0], "fewer than", RATIOS[0]), (ratio > RATIOS[1], "more than", RATIOS[1])):
        if beyond.any():
            i = int(np.argmin(ratio) if limit == RATIOS[0] else np.argmax(ratio))
            text = (
                f"{int(beyond.sum())} of {len(N)} runs have {side} {limit:g} tokens per parameter ({table.names[i]}: "
                f"N = {N[i]:g}, D = {D[i]:g}); {_rescale(columns, limit == RATIOS[0])}."
            )
            out.append(
                Finding("implausible_ratio", text, {"runs": int(beyond.sum()), "of": len(N), "tokens_per_param": ratio[i]})
            )
    strange = (loss < LOSSES[0]) | (loss > LOSSES[1])
    if strange.any() and not shares:
        i = int(np.argmax(strange))
        text = (
            f"{int(strange.sum())} of {len(N)} losses are below {LOSSES[0]:g} or above {LOSSES[1]:g} ({table.names[i]}: "
            f"{loss[i]:g}); if they are no nats per token, name their unit by --loss-unit bits, ppl or bpb:BYTES_PER_TOKEN."
        )
        out.append(Finding("implausible_loss", text, {"runs": int(strange.sum()), "of": len(N), "loss": float(loss[i])}))
    return out


def _rescale(columns: Mapping[str, str], few: bool) -> str:
    """How to tell questctl that a column counts millions or billions."""
    ours = "D" if few else "N"
    column = columns.get(ours, ours)
    return f"if {ours} counts {'billions' if few else 'millions'}, give --map '{ours}={column}*{'1e9' if few else '1e6'}'"


def _weights(table: Rows, columns: Mapping[str, str], weight: np.ndarray) -> list[Finding]:
    """A note if rows are weighted, because a column `weight` is used without being asked for."""
    if all(row["weight"] is None for row in table.rows) or np.ptp(weight) == 0:
        return []
    column = columns.get("weight", table.columns["weight"])
    ends = float(weight.min()), float(weight.max())
    text = f"Runs are weighted by column {column}, from {ends[0]:g} to {ends[1]:g}; --weights none weighs them alike."
    return [Finding("weighted", text, {"column": column, "lowest": ends[0], "highest": ends[1]})]


def _unnamed_schemes(used: Sequence[Mapping[str, Any]], table: Rows) -> list[Finding]:
    """A doubt if no column names schemes, but one may: all runs then count as one scheme."""
    if any(row["scheme"] not in (None, ALL) for row in table.rows):
        return []
    columns = dict.fromkeys(key for record in used for key in record)
    parts = [c for c in columns if re.split(r"[./]", c)[-1].lower() in (*SCHEME_COLUMNS, *PARTS)]
    for column in dict.fromkeys([*(column_named(name, columns) for name in SCHEME_COLUMNS), *parts]):
        values = sorted({str(record[column]) for record in used if has_value(record.get(column))}) if column else []
        if len(values) > 1:
            text = f"No column names schemes; {column} has {len(values)} values ({few(values)}): give --map 'scheme={column}'."
            return [Finding("unnamed_schemes", text, {"column": column, "values": values})]
    return []


def _rates(table: Rows, options: TableOptions) -> list[Finding]:
    """A doubt if cells have runs at several learning rates, most of which are not the best."""
    cells: dict[tuple[Any, ...], set[Any]] = {}
    for row in table.rows:
        cell = tuple(row[c] for c in ("scheme", "N", "D", "unique_tokens", "tokens_fp", "seed", "data_hash"))
        cells.setdefault(cell, set()).add(row["lr"])
    grids = [rates for rates in cells.values() if len(rates - {None}) > 1]
    if not grids or options.best_of:
        return []
    column = table.columns["lr"]
    text = (
        f"{len(grids)} of {len(cells)} cells of scheme, N and D have runs at several learning rates (up to "
        f"{max(map(len, grids))}): keep the best of each by --best-of {column}."
    )
    return [Finding("several_rates", text, {"cells": len(grids), "of": len(cells)})]


def _optimizers(table: Rows) -> list[Finding]:
    """A doubt if runs have different optimizers."""
    counts = Counter(str(row["optimizer"]).lower() for row in table.rows if row["optimizer"] is not None)
    if len(counts) < 2:
        return []
    column, (commonest, _), *_ = table.columns["optimizer"], *counts.most_common()
    listed = few(f"{name} {count}" for name, count in counts.most_common())
    text = f"Runs have {len(counts)} optimizers ({listed}), which changes losses: choose one by --where {column}={commonest}."
    return [Finding("several_optimizers", text, {"runs": dict(counts)})]


def _warmups(table: Rows, D: np.ndarray) -> list[Finding]:
    """A doubt if warm-ups are neither one number of steps nor one share of the runs, up to rounding to whole steps."""
    long = [row["steps"] for row in table.rows]
    lengths = D if None in long else np.array(long, float)  # tokens stand for steps if a row does not have them
    warmups = np.array([math.nan if row["warmup_steps"] is None else row["warmup_steps"] for row in table.rows], float)
    use = np.isfinite(warmups) & np.isfinite(lengths)
    warmups, lengths = warmups[use], lengths[use]
    if len(warmups) < 2:
        return []
    shares = warmups / lengths
    rules = np.full(len(warmups), np.median(warmups)), np.median(shares) * lengths
    if any((np.abs(warmups - rule) <= np.maximum(1.0, SAME_WARMUP * warmups)).all() for rule in rules):
        return []
    low, high = float(warmups.min()), float(warmups.max())
    percent = f", {100 * shares.min():.2g} to {100 * shares.max():.2g} %" if None not in long else ""
    text = (
        f"Warm-ups are neither one length nor one share of the runs ({low:g} to {high:g} steps{percent}); short ones raise "
        "losses: fit runs of one rule."
    )
    return [Finding("several_warmups", text, {"lowest": low, "highest": high})]


def _checkpoints(used: Sequence[Mapping[str, Any]], table: Rows) -> list[Finding]:
    """A doubt if the table may have several rows of a run: one scheme and size at several D."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for record, row, name in zip(used, table.rows, table.names, strict=True):
        if (key := run_key(record, name)) is not None:
            rows.setdefault(key, []).append(row)
    several = {
        key: len(of)
        for key, of in rows.items()
        if len({row["D"] for row in of}) > 1 and len({(row["scheme"], row["N"]) for row in of}) == 1
    }
    if not several:
        return []
    first = next(iter(several))
    text = (
        f"{len(several)} runs have several rows each ({first}: {several[first]}), which share an error: count that in by "
        "--cluster run, or keep each last row by --last."
    )
    return [Finding("several_rows_per_run", text, {"runs": len(several), "rows": sum(several.values())})]


def _epochs(used: Sequence[Mapping[str, Any]], table: Rows) -> list[Finding]:
    """A doubt if runs read their text more often than EPOCHS, by a column of the table."""
    columns = dict.fromkeys(key for record in used for key in record)
    repeated = next((c for name in EPOCH_COLUMNS if (c := column_named(name, columns))), None)
    known = any(row["unique_tokens"] for row in table.rows)
    if known:
        epochs = [row["D"] / row["unique_tokens"] for row in table.rows if row["D"] and row["unique_tokens"]]
    else:
        epochs = [count for record in used if repeated and (count := _float(record.get(repeated)))]
    many = [e for e in epochs if e > EPOCHS]
    if not many:
        return []
    how = "" if known else f" with --map 'unique_tokens=D/{repeated}'"
    text = (
        f"{len(many)} runs saw their text more than {EPOCHS:g} times (up to {max(many):.3g}, column "
        f"{table.columns['unique_tokens'] if known else repeated}); repeated tokens teach less than new ones, which only --law "
        f"repeated knows{how}."
    )
    return [Finding("many_epochs", text, {"runs": len(many), "most": max(many)})]


def _float(value: Any) -> float | None:
    if not has_value(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        number = read_number(value) if isinstance(value, str) else None
        return None if number is None else float(number)
