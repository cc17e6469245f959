"""The benchmark: correctness gate, then interleaved timing, then one row per (op, implementation, shape).

A wrong result gets FAIL and no speed; what cannot run here is listed with the reason. Ratios are formed round by round against
the case's baseline, rooflines from the rates that this run measured. `BenchRow` is the schema of the JSON and CSV files.
"""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .devices import ROTATE_BYTES, Calibration, device_name
from .op import Case, Check, Implementation, KernelError
from .timing import CannotTime, Timing, measure, speed_up

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
MAX_ROTATIONS = 64
Verdict = Literal["PASS", "FAIL", "SKIP", "floor"]


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One implementation of one op at one shape on one device; times are None where nothing was timed."""

    op: str
    implementation: str
    shape: dict[str, int]
    verdict: Verdict  # floor: computes something else, as a bound; SKIP: cannot run here, see `reason`
    error: float | None = None  # as the op defines it
    tolerance: float | None = None
    wrong: int | None = None  # elements
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
    unit: str = ""  # the matmul unit that `tops` are operations of
    extra_bytes: int | None = None  # peak memory of a call beyond what was there before it; of cases that ask for it
    timer: str = ""
    device: str = ""
    threads: int = 0
    versions: str = ""
    reason: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same measurement."""
        return (self.op, self.implementation, tuple(sorted(self.shape.items())), self.device, self.threads)

    @property
    def label(self) -> str:
        """'hadamard torch (R=1024 C=2048 block=128)'."""
        return f"{self.op} {self.implementation} ({shape_text(self.shape)})"


def shape_text(shape: Mapping[str, int]) -> str:
    """'M=64 N=2048 K=2048'."""
    return " ".join(f"{k}={v}" for k, v in shape.items())


def run_case(
    case: Case,
    device: torch.device,
    calibration: Calibration | None = None,
    *,
    check_only: bool = False,
    seconds: float = 1.0,
    graph: bool = True,
) -> list[BenchRow]:
    """Check every implementation of a case, then time those that are right; rows in the order of the implementations.

    `graph` as in `timing.measure`.
    """
    import torch

    inputs = case.inputs(0)
    where = {"device": device_name(device), "threads": torch.get_num_threads(), "versions": versions()}
    common: dict[str, Any] = {"op": case.op, "shape": dict(case.shape), "baseline": case.baseline, **where}
    verdicts: dict[str, dict[str, Any]] = {i.name: _gate(i, case, inputs, device) for i in case.implementations}
    ready = [i for i in case.implementations if verdicts[i.name]["verdict"] in ("PASS", "floor")]
    times: dict[str, Timing] = {}
    if ready and not check_only:
        rotations = case.rotations or _rotations(inputs, device)
        sets = [inputs, *(case.inputs(seed) for seed in range(1, rotations))]
        calls = {i.name: _call(i, [i.prepare(*s) for s in sets]) for i in ready}
        if case.memory:
            from .memory import extra_bytes

            for name, call in calls.items():
                verdicts[name]["extra_bytes"] = extra_bytes(partial(call, 0), device)
        while calls and not times:
            try:
                times = measure(calls, device, seconds=seconds, rotations=rotations, graph=graph)
            except CannotTime as e:
                del calls[e.name]
                verdicts[e.name]["reason"] = f"not timed: {e.reason}"
    rows = [
        BenchRow(implementation=i.name, **common, **verdicts[i.name], **_speed(case, i, times)) for i in case.implementations
    ]
    return [rated(row, calibration) for row in rows] if calibration else rows


def _call(implementation: Implementation, sets: Sequence[tuple[Any, ...]]) -> Any:
    return lambda i: implementation.call(*sets[i])


def _gate(implementation: Implementation, case: Case, inputs: tuple[Any, ...], device: torch.device) -> dict[str, Any]:
    """Verdict of one implementation on one set of inputs: the fields of a row that say whether it is right."""
    import torch

    if (reason := implementation.why_not(device)) is not None:
        return {"verdict": "SKIP", "reason": reason}
    try:
        output = implementation.call(*implementation.prepare(*inputs))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, KernelError, NotImplementedError, ImportError) as e:
        ours = implementation is case.implementations[0]  # a peer that cannot is no fault of ours
        return {"verdict": "FAIL" if ours else "SKIP", "reason": f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"}
    if not implementation.checked:
        return {"verdict": "floor"}
    check: Check = case.check(inputs, output)
    numbers = {"error": check.error, "tolerance": check.tolerance, "wrong": check.wrong, "exact": check.exact}
    if check.passed:
        return {"verdict": "PASS", **numbers}
    reason = f"{check.wrong} wrong {check.parts}, error {check.error:.3g} where {check.tolerance:.3g} is allowed"
    return {"verdict": "FAIL", "reason": reason, **numbers}


def _rotations(inputs: tuple[Any, ...], device: torch.device) -> int:
    """How many sets of inputs exceed the cache."""
    import torch

    size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, torch.Tensor))
    return max(2, min(MAX_ROTATIONS, -(-ROTATE_BYTES[device.type] // max(size, 1))))


def _speed(case: Case, i: Implementation, times: Mapping[str, Timing]) -> dict[str, Any]:
    """The fields of a row that say how fast."""
    if i.name not in times:
        return {}
    t = times[i.name]
    found: dict[str, Any] = {"p20_us": t.p20_us, "p50_us": t.p50_us, "p80_us": t.p80_us, "timer": t.timer}
    if case.baseline in times:
        found |= dict(zip(("speed_up_p20", "speed_up_p50", "speed_up_p80"), speed_up(t, times[case.baseline]), strict=True))
    cost = case.cost
    if cost is None or not i.checked:  # a rate of work that was not done is no rate
        return found
    found["gb_per_s"] = cost.bytes / t.p50_us / 1e3
    found["tops"] = cost.operations / t.p50_us / 1e6 if cost.operations else None
    found["unit"] = cost.unit if cost.operations else ""
    return found


def rated(row: BenchRow, calibration: Calibration) -> BenchRow:
    """`row` with its roofline by the rates of `calibration`; as it is where it has no rate, or its unit none."""
    if row.gb_per_s is None or row.p50_us is None or (row.tops and row.unit not in calibration.tops):
        return row
    memory = row.gb_per_s / calibration.copy_gbs
    matmul = row.tops / calibration.tops[row.unit] if row.tops else 0.0  # type: ignore[index]
    share = max(memory, matmul)
    bound: Literal["memory", "matmul"] = "matmul" if matmul > memory else "memory"
    return replace(row, roofline_us=share * row.p50_us, roofline_share=share, bound=bound)


def versions() -> str:
    """'python 3.11.9, torch 2.13.0+cpu, triton 3.9.0'."""
    import torch

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "absent"
    return f"python {platform.python_version()}, torch {torch.__version__}, triton {triton}"


# --- files ------------------------------------------------------------------------------------------------------------


def document(rows: Sequence[BenchRow], calibration: Calibration | None) -> dict[str, Any]:
    """What a JSON file holds: schema, calibration, rows."""
    head = {"schema": SCHEMA_VERSION, "calibration": calibration.to_json() if calibration else None}
    return {**head, "rows": [asdict(r) for r in rows]}


def write_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """One line per row, the columns of BenchRow; the shape as 'M=64 N=2048'."""
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, [x.name for x in fields(BenchRow)])
        writer.writeheader()
        writer.writerows({**asdict(r), "shape": shape_text(r.shape)} for r in rows)


def read_rows(path: Path) -> list[BenchRow]:
    """Rows of a file that `--json` wrote. Raises KernelError naming the file if it is no such file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if loaded["schema"] != SCHEMA_VERSION:
            raise KernelError(f"{path}: schema {loaded['schema']!r}, where this version reads schema {SCHEMA_VERSION}.")
        return [BenchRow(**row) for row in loaded["rows"]]
    except OSError as e:
        raise KernelError(f"{path}: cannot be read: {e.strerror}.") from e
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise KernelError(f"{path}: is not a file that `questctl bench --json FILE` wrote ({type(e).__name__}: {e}).") from e


@dataclass(frozen=True)
class Comparison:
    """One measurement in two files: `ratio` is new time / old; `regressed`: even its fast rounds exceed the old slow ones."""

    label: str
    old_us: float | None
    new_us: float | None
    regressed: bool

    @property
    def ratio(self) -> float | None:
        """New median over old median."""
        return self.new_us / self.old_us if self.old_us and self.new_us else None


def compare(old: Sequence[BenchRow], new: Sequence[BenchRow]) -> list[Comparison]:
    """Rows in both, in the order of `new`. A row that passed and now fails has regressed whatever its time."""
    before = {row.key: row for row in old}
    found = []
    for row in new:
        if (was := before.get(row.key)) is None:
            continue
        slower = was.p80_us is not None and row.p20_us is not None and row.p20_us > was.p80_us
        found.append(Comparison(row.label, was.p50_us, row.p50_us, slower or (was.verdict == "PASS" and row.verdict == "FAIL")))
    return found
