"""Build a tree of pydantic sections; a mistake becomes one sentence with the key, the value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import UsageError, unknown

M = TypeVar("M", bound=BaseModel)


@cache
def keys_of(model: type[BaseModel]) -> dict[tuple[str, ...], str]:
    """Every key of a tree of sections that a user can set, as a path, with its one-line description."""
    return {
        (name, key): info.description or ""
        for name, section in model.model_fields.items()
        if isinstance(section.annotation, type)  # an optional section (`PTQConfig | None`) is written by commands, not by users
        for key, info in section.annotation.model_fields.items()
    }


def validated(model: type[M], tree: Mapping[str, Any], where: str = "") -> M:
    """Build `model` from nested values. Raises UsageError for the first mistake: one sentence that begins with `where`."""
    try:
        return model.model_validate(tree)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UsageError(
                where + unknown("config", key, map(".".join, keys_of(model)), what="key", all_by="questctl config explain")
            ) from e
        if first["type"] == "value_error":
            raise UsageError(where + str(first["ctx"]["error"])) from e  # from our own validator: already a sentence
        description = keys_of(model).get(tuple(map(str, first["loc"])), "")
        raise UsageError(where + broken(key, first, description)) from e


_SENTENCES = {  # pydantic's type of an error → what to do about it; the texts of other types are clear
    "string_pattern_mismatch": "takes {description}",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "finite_number": "must be finite",
    "greater_than": "must be greater than {gt}",
    "less_than": "must be less than {lt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than_equal": "must be {le} or less",
    "multiple_of": "must be a multiple of {multiple_of}",
}


def broken(key: str, error: ErrorDetails, description: str = "") -> str:
    """One sentence for the value of `key` that pydantic refuses in `error`; `description` is that of the field."""
    kind = error["type"]
    context = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in error.get("ctx", {}).items()}
    if kind == "literal_error":
        return unknown(key, error["input"], re.findall(r"'([^']*)'", str(context["expected"])))
    if kind in ("missing", "extra_forbidden"):
        return f"{key}: {'is missing' if kind == 'missing' else 'is not a key that is known here'}."
    if kind in _SENTENCES:
        reason = _SENTENCES[kind].format(**context, description=description)
    else:
        reason = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {error['input']!r}: {reason}."
