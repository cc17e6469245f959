"""[resources] of a sweep file: rules by the size of a cell on how many processes train it, and how (resources.py).

    [[resources]]                 a cell takes each key from the last rule that applies to its size
    parallel = "auto"
    [[resources]]
    min_params = "100M"
    nproc = 4

A single table [resources] applies to all cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from ..config import Section, broken
from ..config.amounts import parse_count
from ..errors import UsageError, unknown

AUTO: Literal["auto"] = "auto"
Count = Annotated[int, Field(ge=1)] | Literal["auto"]
Size = Annotated[int, BeforeValidator(lambda value: parse_count(value, "") if isinstance(value, str) else value), Field(ge=0)]


class ResourceRule(Section):
    """One table of [resources]."""

    min_params: Size = Field(0, description="non-embedding parameters from which on the rule holds, such as 100M")
    max_params: Size = Field(0, description="non-embedding parameters below which it holds; 0: any number")
    nproc: Count | None = Field(None, description="processes of a cell, of all nodes; auto: the fewest that fit by memory")
    gpus: int | None = Field(None, ge=0, description="GPUs of a cell: one for each process (the default), or 0 for none")
    nodes: int | None = Field(None, ge=1, description="nodes among which the processes are divided evenly")
    parallel: Literal["ddp", "fsdp", "auto"] | None = Field(
        None, description="train.parallel of cells of several processes; auto: ddp where it fits by memory, else fsdp"
    )
    checkpoint_activations: bool | None = Field(None, description="train.checkpoint_activations")
    micro_batch: Count | None = Field(None, description="train.micro_batch of a process; auto: the largest that fits by memory")

    def holds(self, params: int) -> bool:
        """Whether the rule applies to a cell with `params` non-embedding parameters."""
        return self.min_params <= params and (not self.max_params or params < self.max_params)


@dataclass(frozen=True)
class Resources:
    """The resources of one cell: `nproc` processes, divided evenly among `nodes`."""

    nproc: int = 1
    nodes: int = 1

    @property
    def per_node(self) -> int:
        """The processes of one node."""
        return self.nproc // self.nodes

    def to_json(self) -> dict[str, int]:
        """The fields."""
        return asdict(self)


def parse_resources(content: Any, where: str) -> tuple[ResourceRule, ...]:
    """The rules of [resources] or [[resources]]; empty for None. Raises UsageError naming the key."""
    if content is None:
        return ()
    tables = content if isinstance(content, list) else [content]
    if not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{where}: resources: {content!r} is neither a table of keys nor [[resources]].")
    return tuple(
        _rule(table, f"{where}: resources" + (f" {i}" if len(tables) > 1 else "")) for i, table in enumerate(tables, 1)
    )


def _rule(table: Mapping[str, Any], where: str) -> ResourceRule:
    try:
        return ResourceRule.model_validate(table)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = str(first["loc"][0])
        if first["type"] == "value_error":
            raise UsageError(f"{where}: {key}: {str(first['ctx']['error']).removeprefix(': ')}") from e
        if first["type"] == "extra_forbidden":
            raise UsageError(unknown(where, key, ResourceRule.model_fields, what="key")) from e
        if key in ("nproc", "micro_batch"):
            raise UsageError(f"{where}: {key}: {first['input']!r} is neither a number of at least 1 nor auto.") from e
        raise UsageError(f"{where}: {broken(key, first)}") from e


def merged(rules: Sequence[ResourceRule], params: int) -> ResourceRule:
    """One rule with all keys for a cell with `params` non-embedding parameters."""
    keys: dict[str, Any] = {}
    for rule in rules:
        if rule.holds(params):
            keys |= rule.model_dump(exclude={"min_params", "max_params"}, exclude_none=True)
    return ResourceRule.model_validate(keys)
