"""The identity of an experiment: the fields that count, their canonical JSON, and the hash that names a run.

    run id = <parameters>-<scheme>-<tokens per parameter>x-s<seed>-<8 hex digits>

The digits are the start of a SHA-256 over the canonical JSON of every field that changes the result. Fields that only say how a
run is executed (device, threads, logging, checkpoint interval) are marked `Execution` and are left out. Two runs have the same
id if and only if they are the same experiment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

SCHEMA_VERSION = 1


class _ExecutionMark:
    """Marks a field that changes how a run is executed but not its result: it is left out of the run id."""


class _AttemptMark:
    """Marks an `Execution` field that each attempt of a run may choose anew; the others keep their first value."""


class _PlaceMark:
    """Marks the path or name of something whose hash is another field: it is left out of the run id."""


class _LaterMark:
    """Marks a field that was added when runs already had ids: it is left out of the run id while it has its default."""


class _UnwrittenMark:
    """Marks a `Later` field that is left out of config.json, too, while it has its default: older configs stay as they are."""


@dataclass(frozen=True)
class OfLearnedScales:
    """Marks a field of how learned scales are trained, added with another default than what runs did before: `before`.

    The run id leaves it out while its value is `before`, and for runs that learn no scale. If a stored config lacks it and the
    run learns scales, it is read as `before`.
    """

    before: Any


Execution, Attempt, Place, Later, Unwritten = _ExecutionMark(), _AttemptMark(), _PlaceMark(), _LaterMark(), _UnwrittenMark()


def identity_of(config: BaseModel, *, learns_scales: bool) -> dict[str, Any]:
    """The fields of a tree of sections that change the result, as plain JSON values, with the version of the schema."""

    def changes_result(info: FieldInfo, value: Any) -> bool:
        if Execution in info.metadata or Place in info.metadata:
            return False
        return not (Later in info.metadata and value == info.default)

    return _fields(config, changes_result, learns_scales)


def stored_of(config: BaseModel, *, learns_scales: bool, execution: bool = True) -> dict[str, Any]:
    """All fields as plain JSON values, with the version of the schema: what a run folder stores.

    Fields marked `OfLearnedScales` are left out if the run id leaves them out, so that configs without learned scales stay as
    they were. Without `execution`, the fields that only say how the run is executed are left out, too.
    """
    return _fields(config, lambda info, _: execution or Execution not in info.metadata, learns_scales)


def _fields(config: BaseModel, wanted: Callable[[FieldInfo, Any], bool], learns_scales: bool) -> dict[str, Any]:
    def kept(info: FieldInfo, value: Any) -> bool:
        mark = _of_learned_scales(info)
        return wanted(info, value) and (mark is None or (learns_scales and value != mark.before))

    tree: dict[str, Any] = {"schema": SCHEMA_VERSION}
    for name, values in config.model_dump(mode="json").items():
        fields = type(getattr(config, name)).model_fields
        tree[name] = {key: value for key, value in values.items() if kept(fields[key], value)}
    return tree


def values_before(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Of the fields marked `OfLearnedScales`: section → key → the value with which runs trained before the key was added."""
    marks = {
        name: {key: mark.before for key, info in section.model_fields.items() if (mark := _of_learned_scales(info))}
        for name, section in _sections(model).items()
    }
    return {name: values for name, values in marks.items() if values}


def _of_learned_scales(info: FieldInfo) -> OfLearnedScales | None:
    return next((mark for mark in info.metadata if isinstance(mark, OfLearnedScales)), None)


def identity_digits(identity: dict[str, Any]) -> str:
    """The first 8 hex digits of the SHA-256 of `identity` as canonical JSON: sorted keys, no spaces."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def named(prefix: str, identity: dict[str, Any], seed: int) -> str:
    """The run id of the experiment `identity` with this seed; it begins with `prefix`."""
    digits = identity_digits({**identity, "train": {**identity["train"], "seed": seed}})
    return f"{prefix}-s{seed}-{digits}"


def marked_keys(model: type[BaseModel], mark: object) -> set[str]:
    """Dotted keys (`train.device`) of the fields of a tree of sections that carry `mark`."""
    fields = (
        (f"{name}.{key}", info) for name, section in _sections(model).items() for key, info in section.model_fields.items()
    )
    return {key for key, info in fields if mark in info.metadata}


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of a tree by name; optional ones (`PTQConfig | None`) are left out."""
    annotations = {name: section.annotation for name, section in model.model_fields.items()}
    return {name: a for name, a in annotations.items() if isinstance(a, type) and issubclass(a, BaseModel)}
