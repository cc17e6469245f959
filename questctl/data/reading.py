"""How far a corpus has been read: the state from which an interrupted preparation resumes, and the count of broken items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import DataError

HOPELESS = 1000  # if this many items from the beginning are all broken, skipping more is pointless


@dataclass
class Reading:
    """How far a corpus has been read. `place` is a JSON value: a new reading with it resumes after the last document."""

    place: Any = None
    skip_bad: bool = False  # count broken lines and files instead of raising
    done: int = 0  # bytes of the source's files, as they lie on the disk
    skipped: list[str] = field(default_factory=list)  # names of files that a lenient corpus passed over
    good: int = 0  # documents given
    bad: int = 0  # broken lines and files left out
    first_bad: str = ""  # what was wrong with the first of them
    locate: Callable[[], Any] | None = None  # computes `place` where that is expensive

    def state(self) -> dict[str, Any]:
        """JSON values from which `Reading(**state)` resumes."""
        place = self.locate() if self.locate else self.place
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "locate"}
        return {**kept, "place": place, "skipped": [*self.skipped]}

    def pass_over(self, why: DataError) -> None:
        """Count a broken line or file; raises the error `why` unless broken items are skipped.

        It is raised, too, where the first `HOPELESS` items are all broken: that is a mistaken field, not a damaged line.
        """
        self.bad += 1
        self.first_bad = self.first_bad or str(why)
        if not self.skip_bad or (self.bad == HOPELESS and not self.good):
            raise why
