"""Interleaved timing: the times of several calls, measured so that their ratios can be trusted.

All candidates take turns in one run, A B C / C B A / …, so that a drifting clock or other load affects all of them alike.
Ratios are formed within each round and summarised afterwards. Inputs are used in turn and together exceed the cache. On a GPU a
round is one replay of a CUDA graph of many calls, since the cost of launching from Python would hide times below 20 µs. On a
CPU a round is a sequence of calls of some milliseconds. The results are the median and the 20th and 80th percentile over
rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .op import failures

if TYPE_CHECKING:
    import torch

Timer = Literal["perf_counter", "cuda-graph", "cuda-events"]
GRAPH_CALLS = 20  # calls in one CUDA graph, at least
ROUND_S = 2e-3  # a round on a CPU repeats a short call for this long: 10⁴ clock ticks
MIN_ROUNDS, MAX_ROUNDS = 7, 201


class CannotTime(RuntimeError):
    """The call `name` runs, but cannot be timed: for example, a CUDA graph cannot capture it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: one sample per round, in the order of the rounds."""

    samples_us: tuple[float, ...]
    timer: Timer

    @property
    def best_us(self) -> float:
        """The fastest round."""
        return min(self.samples_us)

    @property
    def p20_us(self) -> float:
        """20th percentile."""
        return percentiles(self.samples_us)[0]

    @property
    def p50_us(self) -> float:
        """Median."""
        return percentiles(self.samples_us)[1]

    @property
    def p80_us(self) -> float:
        """80th percentile."""
        return percentiles(self.samples_us)[2]


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, with linear interpolation between samples."""
    if len(samples) == 1:
        return (samples[0],) * 3
    cut = statistics.quantiles(samples, n=10, method="inclusive")
    return cut[1], cut[4], cut[7]


def speed_up(timing: Timing, baseline: Timing) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile of baseline time / time within each round; both must come from one `measure`."""
    return percentiles([b / t for t, b in zip(timing.samples_us, baseline.samples_us, strict=True)])


def measure(
    calls: Mapping[str, Callable[[int], Any]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    rotations: int = 1,
    graph: bool = True,
) -> dict[str, Timing]:
    """Time each `call(i)`, with i cycling over `range(rotations)`, for about `seconds` per call after a warm-up, interleaved.

    `graph=False` times CUDA calls by events instead of a graph, for calls that are too large or too irregular to capture.
    Raises CannotTime for the first call that fails during its warm-up.
    """
    cuda = device.type == "cuda"
    timer: Timer = ("cuda-graph" if graph else "cuda-events") if cuda else "perf_counter"
    rounds: dict[str, Callable[[], float]] = {}
    for name, call in calls.items():
        try:
            rounds[name] = _cuda_round(call, device, rotations, graph) if cuda else _cpu_round(call, rotations)
        except failures() as e:
            raise CannotTime(name, str(e).partition("\n")[0]) from e
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(rounds)
    end = time.perf_counter() + seconds * len(order)
    done = 0
    while done < MIN_ROUNDS or (time.perf_counter() < end and done < MAX_ROUNDS):
        for name in order if done % 2 == 0 else reversed(order):
            samples[name].append(rounds[name]())
        done += 1
    return {name: Timing(tuple(values), timer) for name, values in samples.items()}


def _cpu_round(call: Callable[[int], Any], rotations: int) -> Callable[[], float]:
    """Warm up over all inputs and choose the length of a round; returns a function that runs one: µs per call."""
    for i in range(rotations):
        call(i)
    start = time.perf_counter()
    call(0)
    repeats = max(1, int(ROUND_S / max(time.perf_counter() - start, 1e-7)))
    position = 0

    def run() -> float:
        nonlocal position
        start = time.perf_counter_ns()
        for i in range(position, position + repeats):
            call(i % rotations)
        elapsed = time.perf_counter_ns() - start
        position = (position + repeats) % rotations
        return elapsed / repeats / 1e3

    return run


def _cuda_round(call: Callable[[int], Any], device: torch.device, rotations: int, graph: bool) -> Callable[[], float]:
    """Warm up and capture at least GRAPH_CALLS calls over all inputs; returns a function that replays them: µs per call."""
    import torch

    calls = max(GRAPH_CALLS, rotations) if graph else 1
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for i in range(max(3, rotations)):  # compiles, tunes and allocates before the capture
            call(i % rotations)
    torch.cuda.current_stream(device).wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    if graph:
        with torch.cuda.graph(captured):
            outputs = [call(i % rotations) for i in range(calls)]  # kept alive, so that none reuses cached memory
        del outputs
        captured.replay()

    def run() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        if graph:
            captured.replay()
        else:
            call(0)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls

    return run
