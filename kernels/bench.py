"""The benchmark driver: check every implementation of a case, time those that are right, return one `BenchRow` for each.

A wrong result gives a FAIL row without a speed, and an implementation that cannot run here a SKIP row with the reason. Ratios
are formed round by round against the baseline of the case. Rooflines use the rates that the same run measured.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from .devices import ROTATE_BYTES, Calibration, calibrate, device_name
from .op import Case, Check, Implementation, Shape, failures, load
from .rows import BenchRow
from .timing import CannotTime, Timing, measure, speed_up

if TYPE_CHECKING:
    import torch

MAX_ROTATIONS = 64


@dataclass(frozen=True)
class Measured:
    """The state of a benchmark after one of its operations: every row so far, rated by the highest rates so far."""

    name: str  # of the operation measured last
    count: int  # rows of this operation; 0 if this machine cannot measure it
    rows: list[BenchRow]
    calibration: Calibration | None  # None if nothing is timed


def op_cases(
    name: str, device: torch.device, shapes: Callable[[Sequence[Shape]], Sequence[Shape]] = lambda shapes: shapes
) -> Iterator[tuple[Case, bool]]:
    """The cases of one kernel operation for `run_ops`, at its benchmark shapes or at those that `shapes` makes from them."""
    op = load(name)
    for shape in shapes(op.bench_shapes(device.type)):
        yield op.case(shape, device), True


def run_ops(
    cases: Mapping[str, Callable[[], Iterable[tuple[Case, bool]]]],
    device: torch.device,
    calibration: Calibration | None,
    *,
    seconds: float = 1.0,
    again_s: float = 0.1,
    on_rows: Callable[[list[BenchRow]], None] = lambda rows: None,
) -> Iterator[Measured]:
    """Measure operation after operation; yields after each case, so that an interrupted run leaves its results so far.

    `cases` maps the name of an operation to a function that gives its cases, each with whether a CUDA graph can time it. An
    operation whose cases cannot be made ends as a FAIL row, and the next one begins. Without a `calibration` the results are
    checked and nothing is timed. With one, the device is calibrated again for `again_s` seconds per rate after each operation,
    and all rows are rated by the highest rates: a busy neighbour can only lower a rate. `on_rows` receives the rows of every
    case as soon as they are measured.
    """
    rows: list[BenchRow] = []
    for name, make in cases.items():
        before = len(rows)
        try:
            for case, graph in make():
                new = run_case(case, device, calibration, check_only=calibration is None, seconds=seconds, graph=graph)
                on_rows(new)
                rows += new
                yield Measured(name, len(rows) - before, list(rows), calibration)
        except failures() as e:
            rows.append(_broken(name, e, device))
            on_rows(rows[-1:])
        if calibration:
            calibration = calibration.best(calibrate(device, seconds=again_s))
            rows = [rated(row, calibration) for row in rows]
        yield Measured(name, len(rows) - before, list(rows), calibration)


def run_case(
    case: Case,
    device: torch.device,
    calibration: Calibration | None = None,
    *,
    check_only: bool = False,
    seconds: float = 1.0,
    graph: bool = True,
) -> list[BenchRow]:
    """Check every implementation of a case, then time those that are right; one row each, in the order of the implementations.

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


def _broken(name: str, error: Exception, device: torch.device) -> BenchRow:
    """The row of an operation that failed outside its implementations, for example for lack of memory for its inputs."""
    import torch

    where: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads(), "versions": versions()}
    return BenchRow(op=name, implementation="its inputs", shape={}, baseline="", verdict="FAIL", reason=_reason(error), **where)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _call(implementation: Implementation, sets: Sequence[tuple[Any, ...]]) -> Any:
    return lambda i: implementation.call(*sets[i])


def _gate(implementation: Implementation, case: Case, inputs: tuple[Any, ...], device: torch.device) -> dict[str, Any]:
    """Check one implementation on one set of inputs; the fields of a row that say whether it is right."""
    import torch

    if (reason := implementation.why_not(device)) is not None:
        return {"verdict": "SKIP", "reason": reason}
    try:
        output = implementation.call(*implementation.prepare(*inputs))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except failures() as e:
        ours = implementation is case.implementations[0]  # a peer that cannot run is no failure of ours
        return {"verdict": "FAIL" if ours else "SKIP", "reason": _reason(e)}
    if not implementation.checked:
        return {"verdict": "floor"}
    check: Check = case.check(inputs, output)
    numbers = {"error": check.error, "tolerance": check.tolerance, "wrong": check.wrong, "exact": check.exact}
    if check.passed:
        return {"verdict": "PASS", **numbers}
    reason = f"{check.wrong} wrong {check.parts}, error {check.error:.3g} where {check.tolerance:.3g} is allowed"
    return {"verdict": "FAIL", "reason": reason, **numbers}


def _rotations(inputs: tuple[Any, ...], device: torch.device) -> int:
    """The number of input sets that together exceed the cache, so that every call reads from memory."""
    import torch

    size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, torch.Tensor))
    return max(2, min(MAX_ROTATIONS, -(-ROTATE_BYTES[device.type] // max(size, 1))))


def _speed(case: Case, i: Implementation, times: Mapping[str, Timing]) -> dict[str, Any]:
    """The fields of a row that say how fast it is: times, speed-up over the baseline, bytes and operations per second."""
    if i.name not in times:
        return {}
    t = times[i.name]
    speed: dict[str, Any] = {"p20_us": t.p20_us, "p50_us": t.p50_us, "p80_us": t.p80_us, "timer": t.timer}
    if case.baseline in times:
        speed |= dict(zip(("speed_up_p20", "speed_up_p50", "speed_up_p80"), speed_up(t, times[case.baseline]), strict=True))
    cost = case.cost
    if cost is None or not i.checked:  # a lower bound does other work, so it has no rate of this work
        return speed
    speed["gb_per_s"] = cost.bytes / t.p50_us / 1e3
    speed["tops"] = cost.operations / t.p50_us / 1e6 if cost.operations else None
    speed["unit"] = cost.unit if cost.operations else ""
    return speed


def rated(row: BenchRow, calibration: Calibration) -> BenchRow:
    """`row` with its roofline by the rates of `calibration`; unchanged if the row or its matmul unit has no rate."""
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
