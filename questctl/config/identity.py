"""What makes two runs the same experiment: which fields count, their canonical JSON, and the hash that names a run.

    run id = <parameters>-<scheme>-<tokens per parameter>x-s<seed>-<8 hex digits>

The digits are the start of a SHA-256 over the canonical JSON of every field that changes the result. Fields that only say how a
run is executed (device, threads, logging, checkpoint interval) are marked `Execution` and are left out. Two runs have the same
id if and only if they are the same experiment.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

SCHEMA_VERSION = 1


class _ExecutionMark:
    """Marks a field that changes how a run is computed but not what: it is left out of the run id."""


class _AttemptMark:
    """Marks an `Execution` field that each attempt of a run may choose anew; the others keep their first value."""


class _LaterMark:
    """Marks a field that was added when runs already had ids: it is left out of the run id while it has its default."""


class _UnwrittenMark:
    """Marks a `Later` field that is left out of config.json, too, while it has its default: older configs stay as they are."""


Execution, Attempt, Later, Unwritten = _ExecutionMark(), _AttemptMark(), _LaterMark(), _UnwrittenMark()


def identity_of(config: BaseModel) -> dict[str, Any]:
    """The fields of a tree of sections that change the result, as plain JSON values, with the version of the schema."""
    counted: dict[str, Any] = {"schema": SCHEMA_VERSION}
    for name, values in config.model_dump(mode="json").items():
        fields = type(getattr(config, name)).model_fields
        counted[name] = {key: value for key, value in values.items() if _changes_result(fields[key], value)}
    return counted


def _changes_result(info: FieldInfo, value: Any) -> bool:
    """Whether a field with this value is part of the run id."""
    return Execution not in info.metadata and not (Later in info.metadata and value == info.default)


def identity_digits(identity: dict[str, Any]) -> str:
    """The first 8 hex digits of the SHA-256 of `identity` as canonical JSON: sorted keys, no spaces."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def marked_keys(model: type[BaseModel], mark: object) -> set[str]:
    """Dotted keys (`train.device`) of the fields of a tree of sections that carry `mark`."""
    return {
        f"{name}.{key}"
        for name, section in model.model_fields.items()
        if isinstance(section.annotation, type) and issubclass(section.annotation, BaseModel)
        for key, info in section.annotation.model_fields.items()
        if mark in info.metadata
    }
