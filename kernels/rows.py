"""The rows of a benchmark: their record, their files as JSON and CSV, and the comparison of two measurements.

`BenchRow`, one per implementation, operation and shape, is the schema of the files. This module imports no torch, so that a
wrong file is reported at once.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .devices import Calibration
from .op import KernelError

SCHEMA_VERSION = 1
Verdict = Literal["PASS", "FAIL", "SKIP", "floor"]


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One implementation of one operation at one shape on one device; times are None if nothing was timed.

    p20, p50 and p80 are percentiles over rounds (timing.py). A speed-up is the baseline's time over this one, round by round.
    """

    op: str
    implementation: str
    shape: dict[str, int]
    verdict: Verdict  # floor: does other work, shown as a bound; SKIP: cannot run here, see `reason`
    error: float | None = None  # as the operation defines it
    tolerance: float | None = None
    wrong: int | None = None  # number of wrong elements
    exact: bool = False  # compared bit for bit
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    baseline: str = ""
    speed_up_p20: float | None = None  # baseline time / time
    speed_up_p50: float | None = None
    speed_up_p80: float | None = None
    gb_per_s: float | None = None  # bytes a perfect implementation moves / time
    tops: float | None = None  # 10¹² operations / s
    roofline_us: float | None = None
    roofline_share: float | None = None  # roofline time / time
    bound: Literal["memory", "matmul", ""] = ""
    unit: str = ""  # the matmul unit that does the operations of `tops`
    extra_bytes: int | None = None  # peak memory during a call beyond that before it; only of cases that ask for it
    timer: str = ""
    device: str = ""
    threads: int = 0
    versions: str = ""
    reason: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies a measurement: rows of two files with equal keys are compared."""
        return (self.op, self.implementation, tuple(sorted(self.shape.items())), self.device, self.threads)

    @property
    def label(self) -> str:
        """The row in words, such as 'hadamard torch (R=1024 C=2048 block=128)'."""
        return f"{self.op} {self.implementation} ({shape_text(self.shape)})"


def shape_text(shape: Mapping[str, int]) -> str:
    """A shape in words, such as 'M=64 N=2048 K=2048'."""
    return " ".join(f"{k}={v}" for k, v in shape.items())


# --- files ------------------------------------------------------------------------------------------------------------


def document(rows: Sequence[BenchRow], calibration: Calibration | None) -> dict[str, Any]:
    """The content of a JSON file: schema version, calibration, rows."""
    head = {"schema": SCHEMA_VERSION, "calibration": calibration.to_json() if calibration else None}
    return {**head, "rows": [asdict(r) for r in rows]}


def write_json(rows: Sequence[BenchRow], calibration: Calibration | None, path: Path) -> None:
    """Write the file that `read_rows` reads."""
    path.write_text(json.dumps(document(rows, calibration), indent=1) + "\n", encoding="utf-8")


def write_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """Write one line per row with the fields of `BenchRow` as columns; the shape is written as 'M=64 N=2048'."""
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [x.name for x in fields(BenchRow)])
        writer.writeheader()
        writer.writerows({**asdict(r), "shape": shape_text(r.shape)} for r in rows)


def read_rows(path: Path) -> list[BenchRow]:
    """The rows of a file written by `write_json`. Raises KernelError naming the file if it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA_VERSION:
            raise KernelError(f"{path}: has schema {values['schema']!r}, but this version reads schema {SCHEMA_VERSION}.")
        return [BenchRow(**row) for row in values["rows"]]
    except OSError as e:
        raise KernelError(f"{path}: cannot be read: {e.strerror}.") from e
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise KernelError(f"{path}: is not a file written by `questctl bench --json FILE` ({type(e).__name__}: {e}).") from e


# --- comparison -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One measurement in two files. `regressed`: its fastest 20 % of rounds are slower than the old slowest 20 %."""

    label: str
    old_us: float | None  # medians
    new_us: float | None
    regressed: bool

    @property
    def ratio(self) -> float | None:
        """New median over old median; None where one of them was not timed."""
        return self.new_us / self.old_us if self.old_us and self.new_us else None


def compare(old: Sequence[BenchRow], new: Sequence[BenchRow]) -> list[Comparison]:
    """The measurements that are in both, in the order of `new`. A row that passed and now fails has regressed in any case."""
    before = {row.key: row for row in old}
    comparisons = []
    for row in new:
        if (was := before.get(row.key)) is None:
            continue
        slower = was.p80_us is not None and row.p20_us is not None and row.p20_us > was.p80_us
        regressed = slower or (was.verdict == "PASS" and row.verdict == "FAIL")
        comparisons.append(Comparison(row.label, was.p50_us, row.p50_us, regressed))
    return comparisons
