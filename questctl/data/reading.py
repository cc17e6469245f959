"""The position in a corpus: how far it has been read, from which an interrupted preparation resumes, and what was skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import DataError

HOPELESS = 1000  # if this many items from the beginning are all broken, skipping more is pointless


@dataclass
class Reading:
    """How far a corpus has been read. A new reading with the same `place`, a JSON value, resumes after the last document."""

    place: Any = None
    skip_bad: bool = False  # count broken lines and files instead of raising
    done: int = 0  # bytes read of the source's files; of compressed files, compressed bytes
    skipped: list[str] = field(default_factory=list)  # names of files that a lenient corpus skipped
    good: int = 0  # documents yielded
    bad: int = 0  # broken lines and files skipped
    first_bad: str = ""  # the error of the first of them
    locate: Callable[[], Any] | None = None  # computes `place` on demand if that is too expensive for each document

    def state(self) -> dict[str, Any]:
        """The fields as JSON values; `Reading(**state)` resumes from them."""
        place = self.locate() if self.locate else self.place
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "locate"}
        return {**values, "place": place, "skipped": [*self.skipped]}

    def pass_over(self, why: DataError) -> None:
        """Count a broken line or file. Raises the error `why` unless `skip_bad` is set.

        It is also raised if the first `HOPELESS` items are all broken, because that suggests a wrong field rather than damage.
        """
        self.bad += 1
        self.first_bad = self.first_bad or str(why)
        of_all = not self.good and "has no text under" in str(why)  # a wrong field name, which no line has
        if not self.skip_bad and not of_all:
            hint = "questctl data prepare --skip-bad leaves out what cannot be read"
            raise DataError(f"{str(why).removesuffix('.')}; {hint}.") from why
        if not self.skip_bad or (self.bad == HOPELESS and not self.good):
            raise why
