"""Runs in JSON as programs write them: lists of records, columns, runs by name, groups of runs, pandas, W&B's API.

records = json_records(json_value(text))       one dict per run, as nested as it was
flat = flatten(records[0])                     {"model.n_params": 3e7, "val.loss": 3.4}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

NESTED = ("args", "config", "summary", "summary_metrics", "summaryMetrics")  # parts of a record that are lifted to its level
LISTS = ("runs", "points", "records", "results", "rows", "data")  # keys of an object that hold the list of its runs
PARTS = (*NESTED, "train", "val", "valid", "eval", "test", "model", "data", "metrics", "result", "hparams")  # of one run
MEASURED = re.compile(r"(.*[./_\s-])?(loss|ppl|perplexity|bpb|N|n_params|params|tokens|D)")
LOSS = re.compile(r"(.*[./_\s-])?(loss|ppl|perplexity|bpb)")
_SPACES = re.compile(r"\s*")
SCHEME = re.compile(r"(bf16|fp16|int|fp|nf|w)?-?\d+(\.\d+)?([-+/]?a?\d+)?|ternary|.*w\d+a\d+.*|bf16|fp16", re.IGNORECASE)


def json_value(text: str, *, lines: bool = False) -> Any:
    """The value of a JSON text; of several values one after another, or with `lines`, their list.

    Raises ValueError with the line of an unreadable value.
    """
    decoder, values, at = json.JSONDecoder(), list[Any](), _past_spaces(text, 0)
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values.append(value)
        at = _past_spaces(text, at)
    if not values:
        raise ValueError("it is empty")
    return values if len(values) > 1 or (lines and not isinstance(values[0], list)) else values[0]


def _past_spaces(text: str, at: int) -> int:
    space = _SPACES.match(text, at)
    return space.end() if space else at


def json_records(content: Any, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records in a JSON value; `names` are names of columns, by which an object of columns is recognised.

    Runs by name get a `run`. Runs in groups also get a `group`, and a `scheme` if the groups have names of schemes and the runs
    have none. Raises ValueError for a value without runs.
    """
    if isinstance(content, dict):
        content = _of_object(content, names)
    elif isinstance(content, list) and len(content) > 1 and all(isinstance(row, list) for row in content):
        header, *rows = content
        if header and all(isinstance(name, str) for name in header):
            content = [dict(zip(header, row, strict=True)) for row in rows]
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise ValueError("it must hold a list of runs, each an object")
    return [run for record in content for run in _below(record)]


def _below(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a record that holds a list of them, with what it says about all; else the record."""
    key = next((key for key in LISTS if _is_list_of_runs(record.get(key)) and all(map(_has_loss, record[key]))), None)
    shared = {name: value for name, value in record.items() if name != key}
    if key is None or _has_loss(shared):  # with a loss of its own it is a run, and the list one of its results
        return [record]
    return [{**shared, **run} for run in record[key]]


def _of_object(content: dict[str, Any], names: Sequence[str]) -> Any:
    if isinstance(content.get("log_history"), list):
        raise ValueError(
            "it is the log of one run (trainer_state.json of Hugging Face's Trainer); a table has one row per run, with its "
            "parameters, tokens and final loss"
        )
    if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):  # pandas, orient="split"
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    inner = next((content[key] for key in LISTS if _is_list_of_runs(content.get(key)) or _is_group(content.get(key))), None)
    if inner is not None:
        return inner if isinstance(inner, list) else json_records(inner, names)
    values = list(content.values())
    if values and all(_is_list_of_runs(value) for value in values):
        return list(_grouped(content, names))
    lists = [value for value in values if _is_list_of_runs(value)]
    if len(lists) == 1 and not any(_holds_runs(value) for value in values):
        return lists[0]
    if values and all(isinstance(value, list) for value in values):
        if len({len(value) for value in values}) > 1:
            raise ValueError("its columns have different lengths")
        return [dict(zip(content, row, strict=True)) for row in zip(*values, strict=True)]
    if any(name in content for name in names) and not any(isinstance(value, list | dict) for value in values):
        return [content]
    if not values or not all(isinstance(value, dict) for value in values):
        raise ValueError("it must hold a list of runs, each an object")
    if any(name in content for name in names):
        rows = list(dict.fromkeys(row for value in values for row in value))
        return [{column: value.get(row) for column, value in content.items()} for row in rows]
    if sum(_is_group(value) for value in values) * 2 > len(values):
        return list(_grouped(content, names))
    return [{"run": name, **record} for name, record in content.items()]


def _grouped(content: Mapping[str, Any], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The runs of each group, with the group's name."""
    schemes = all(SCHEME.fullmatch(name) for name in content)
    for group, inner in content.items():
        for record in json_records(inner, names):
            says_scheme = any(key in flatten(record) for key in ("scheme", "P", "bits", "w_bits", "w_grid_bits"))
            yield {"group": group, **({"scheme": group} if schemes and not says_scheme else {}), **record}


def _is_list_of_runs(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(record, dict) for record in value)


def _has_loss(record: Mapping[str, Any]) -> bool:
    return any(LOSS.fullmatch(key) for key in flatten(record))


def _holds_runs(value: Any) -> bool:
    """Whether an object of this value may hold runs, rather than facts about all of them."""
    return isinstance(value, dict) and any(isinstance(inner, list | dict) for inner in value.values())


def _is_group(value: Any) -> bool:
    """Whether an object holds runs by name rather than the parts of one run."""
    if not isinstance(value, dict) or not value or any(key in PARTS for key in value):
        return False
    return all(isinstance(inner, dict) and any(MEASURED.fullmatch(key) for key in flatten(inner)) for inner in value.values())


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without nesting: `{"model": {"n": 1}}` becomes `{"model.n": 1}`, to any depth.

    The parts in NESTED are lifted beside the run's own keys, which win. W&B keeps a value of the config under `value` and, in
    its own database, whole parts as JSON text.
    """
    flat: dict[str, Any] = {}
    for part in NESTED:
        inner = record.get(part)
        if isinstance(inner, str):
            try:
                inner = json.loads(inner)
            except ValueError:
                continue
        if isinstance(inner, dict):
            flat |= dict(_leaves(inner))
    return flat | dict(_leaves({str(k): v for k, v in record.items() if not (k in NESTED and isinstance(v, dict))}))


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        wrapped = isinstance(inner, dict) and "value" in inner and set(inner) <= {"value", "desc"}
        leaf = inner["value"] if wrapped else inner
        if isinstance(leaf, dict):
            yield from _leaves(leaf, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", leaf
