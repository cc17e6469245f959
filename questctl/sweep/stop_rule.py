"""[stop] of a sweep file: from which share of its steps on, and how far behind, a cell ends early (stopping.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ..config import Section, broken
from ..errors import UsageError

Kind = Literal["knobs", "frontier"]
KNOBS: Kind = "knobs"
FRONTIER: Kind = "frontier"


class StopRule(Section):
    """[stop]: which cells of a sweep may end early. Losses are training losses in nats/token."""

    after: Annotated[float, Field(gt=0, lt=1, description="share of its steps before which no cell is stopped")] = 0.4
    every: Annotated[float, Field(gt=0, le=1, description="share of the steps between two looks at a cell")] = 0.1
    margin: Annotated[float, Field(ge=0, description="how far a forecast must lie above what beats it, in nats/token")] = 0.01
    level: Annotated[float, Field(ge=0.5, lt=1, description="level of the intervals that are compared")] = 0.9
    against: tuple[Kind, ...] = Field(
        (KNOBS, FRONTIER),
        min_length=1,
        description="what a cell is compared with: knobs: cells that differ in the optimizer's settings and the batch alone; "
        "frontier: cells of one budget whose models take no more bits",
    )

    def marks(self, steps: int) -> list[int]:
        """The steps of a run of `steps` after which it is judged."""
        shares = (self.after + i * self.every for i in range(math.ceil((1 - self.after) / self.every)))
        return sorted({mark for share in shares if (mark := round(share * steps)) < steps})


def parse_rule(values: Mapping[str, Any] | None, where: str) -> StopRule | None:
    """The rule of a table [stop]; None for none. Raises UsageError naming the key."""
    if values is None:
        return None
    try:
        return StopRule.model_validate({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise UsageError(f"{where}: {broken('.'.join(('stop', *map(str, first['loc']))), first)}") from e
