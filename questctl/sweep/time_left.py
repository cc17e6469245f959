"""The time left of a running sweep, as a range, from the observed progress of its own cells.

There is no estimate before a cell has trained for a few seconds after its first report, because imports, compilation and first
steps say nothing about the rest. The speed of a cell is the steps that it has taken since then over the time on the clock,
validation and checkpoints included. Its standard error comes from splitting that time into parts, so the range narrows as cells
go on.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

from .costs import FINISHED_SPREAD, Speed, TimeRange, flops_per_token, sized, speedup, tokens_of_work, training_time, wall_time
from .outcomes import Outcome
from .sweep_file import Cell

SETTLED_S = 5.0  # a cell counts once it has trained for so long after its first report
PARTS = 8  # most parts into which the time of a cell is split
LEAST_SPREAD = 1.05
RECENT_S = 60.0  # as many cells as ran at a time within this period are assumed to run from now on
MOST_MARKS = 64  # most reports kept of each cell
# 97.5 % quantiles of Student's t with 1 to 7 degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)


class TimeLeft:
    """Call it repeatedly with the outcomes of `cells`; `clock` gives the seconds of a monotonic clock."""

    def __init__(self, cells: Sequence[Cell], clock: Callable[[], float] = time.monotonic) -> None:
        self._cells, self._clock = {cell.run_id: cell for cell in cells}, clock
        self._configs = dict(zip(self._cells, sized(cells), strict=True))
        self._marks: dict[str, list[tuple[float, int]]] = {}  # run id → (time, step) of each report that was seen
        self._attempts: dict[str, int] = {}
        self._running: deque[tuple[float, int]] = deque()  # (time, processes of running cells)

    def __call__(self, outcomes: Sequence[Outcome]) -> TimeRange | None:
        """Seconds until all cells are settled; None until a cell was measured."""
        now = self._clock()
        for outcome in outcomes:
            self._observe(outcome, now)
        self._running.append((now, sum(self._processes(o) for o in outcomes if o.state == "running")))
        while self._running[0][0] < now - RECENT_S:
            self._running.popleft()
        speeds = [speed for outcome in outcomes if (speed := self._speed(outcome)) is not None]
        left = [outcome for outcome in outcomes if not outcome.settled]
        times = [self._remaining(outcome, speeds) for outcome in left]
        estimates = [t for t in times if t is not None]
        if not estimates or len(estimates) < len(times):
            return None
        return wall_time(estimates, max(1, *(n for _, n in self._running), 1), [self._processes(o) for o in left])

    def of(self, outcome: Outcome) -> TimeRange | None:
        """Seconds until a running cell is done, from its own steps; None until it was measured."""
        speed = self._speed(outcome) if outcome.state == "running" else None
        return self._remaining(outcome, [speed]) if speed is not None else None

    def _processes(self, outcome: Outcome) -> int:
        return self._cells[outcome.run_id].nproc

    def _observe(self, outcome: Outcome, now: float) -> None:
        """Keep the time and step of a new report of a running cell; an attempt begins anew."""
        if outcome.state != "running" or self._attempts.get(outcome.run_id) != outcome.attempts:
            self._attempts[outcome.run_id] = outcome.attempts
            self._marks[outcome.run_id] = [(-math.inf, outcome.step)]  # the time of this report is not known
            return
        marks = self._marks[outcome.run_id]
        if outcome.step > marks[-1][1]:
            marks.append((now, outcome.step))
        if marks[0][0] == -math.inf and len(marks) > 1:
            del marks[0]
        if len(marks) > MOST_MARKS:
            del marks[1:-1:2]

    def _speed(self, outcome: Outcome) -> Speed | None:
        """The measured speed of a cell that is done, or that has run long enough."""
        config = self._configs[outcome.run_id]
        scheme, work, times = config.quant.label, flops_per_token(config), speedup(self._processes(outcome))
        if outcome.state == "done" and outcome.tokens_per_s:
            return Speed(scheme, work, outcome.tokens_per_s / times, FINISHED_SPREAD)
        marks = self._marks.get(outcome.run_id, [])
        n = min(PARTS, len(marks) - 1)
        if n < 2 or marks[-1][0] - marks[0][0] < SETTLED_S:
            return None
        (begin, first), (end, last) = marks[0], marks[-1]
        cuts = [min(marks, key=lambda mark: abs(mark[0] - begin - (end - begin) * i / n)) for i in range(n + 1)]
        ends = list(dict.fromkeys(cuts))
        rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(ends)]
        n, mean = len(rates), (last - first) / (end - begin)
        if n < 2:
            return None
        error = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / (n - 1) / n)
        spread = math.exp(STUDENT[n - 2] * error / mean)
        tokens = config.train.batch_size * config.data.seq_len
        return Speed(scheme, work, mean * tokens / times, max(LEAST_SPREAD, spread))

    def _remaining(self, outcome: Outcome, speeds: Sequence[Speed]) -> TimeRange | None:
        """Seconds that a cell still takes; a branch begins at the step where it leaves its trunk."""
        config = self._configs[outcome.run_id]
        whole = training_time(config, speeds)
        tokens = (outcome.steps - outcome.step) * config.train.batch_size * config.data.seq_len
        validation = tokens_of_work(config) - config.new_tokens
        share = (min(tokens, config.new_tokens) + validation * min(1.0, tokens / config.new_tokens)) / tokens_of_work(config)
        return whole and whole.scaled(share / speedup(self._processes(outcome)))
