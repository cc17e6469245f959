"""How far a sweep is, shown on stderr: a live table on a terminal, elsewhere a line for each settled cell and a summary."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import console
from ..sweep.manifest import Sweep
from ..sweep.outcomes import Outcome, read_outcomes
from ..sweep.sweep_file import SweepFile
from ..sweep.time_left import TimeLeft

URGENCY = {"running": 0, "failed": 1, "diverged": 1, "preempted": 2, "pending": 2}  # what a small screen shows first; else 3


@contextmanager
def watching(*, quiet: bool = False) -> Iterator[Callable[[Sweep], SweepView]]:
    """Gives, for a `with` block, a function that begins the view of a sweep. After Ctrl-C it says how many cells are done."""
    views: list[tuple[Sweep, SweepView]] = []

    def begin(sweep: Sweep) -> SweepView:
        for _, view in views:
            view.close()
        views.append((sweep, SweepView(sweep.file, quiet=quiet)))
        return views[-1][1]

    try:
        yield begin
    except KeyboardInterrupt:
        for sweep, view in views[-1:]:
            view.close()
            done = sum(outcome.state == "done" for outcome in read_outcomes(sweep.cells, sweep.store))
            console.note(f"{done} of {len(sweep.cells)} cells are done; repeat the command to resume.")
        raise
    finally:
        for _, view in views:
            view.close()


class SweepView:
    """Call it with the outcomes of the cells of a sweep file, again and again; `quiet` shows nothing.

    With `forecasts`, where a run will end has a column.
    """

    def __init__(self, file: SweepFile, *, quiet: bool = False, forecasts: bool = False) -> None:
        self.file, self.quiet, self._more = file, quiet, ("forecast",) if forecasts else ()
        columns = ("run", "state", "step", "loss", *self._more, "tok/s", "ETA")
        table = console.LiveTable(columns, left=2, optional=("tok/s", *self._more))
        self._live = table if console.is_terminal(sys.stderr) else None
        self._start = self._last = time.monotonic()
        self._announced: set[str] | None = None
        self._left = TimeLeft(file.cells)

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        """Show these outcomes, one for each cell of the sweep file, in its order."""
        if self.quiet:
            return
        left = self._left(outcomes)
        summary = self._summary(outcomes) + (f" so far, {console.duration_range(left.low, left.high)} left" if left else "")
        if self._live is not None:
            urgent = sorted(outcomes, key=lambda outcome: URGENCY.get(outcome.state, 3))[: self._live.room]
            rows = [self._row(outcome) for outcome in outcomes if outcome in urgent]
            self._live.update(rows, summary)
            return
        settled = {outcome.run_id: outcome for outcome in outcomes if outcome.settled}
        announced, self._announced = self._announced, set(settled)
        for run_id in settled.keys() - announced if announced is not None else ():
            outcome = settled[run_id]
            result = f"loss {outcome.loss:.4f}" if outcome.loss is not None else outcome.message
            console.note(f"{run_id}  {outcome.state}  {result}")
        if time.monotonic() - self._last >= console.progress.PLAIN_INTERVAL_S:
            self._last = time.monotonic()
            console.note(summary)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.close()

    def _summary(self, outcomes: Sequence[Outcome]) -> str:
        n = Counter(outcome.state for outcome in outcomes)
        shown = ("running", "failed", "diverged", "stopped")
        text = f"{n['done']}/{len(outcomes)} done" + "".join(f", {n[s]} {s}" for s in shown if n[s])
        return f"{self.file.name}: {text}, {console.duration(time.monotonic() - self._start)}"

    def _row(self, outcome: Outcome) -> tuple[Any, ...]:
        *cells, speed = outcome_row(outcome)
        low, high, left = outcome.forecast_low, outcome.forecast_high, self._left.of(outcome)
        forecast = None if outcome.forecast is None else f"{outcome.forecast:.3f} [{low:.3f}, {high:.3f}]"
        more = (forecast,) * len(self._more)
        return *cells, *more, speed, f"~{console.duration(left.likely)}" if left else None


def show_outcomes(name: str, outcomes: Sequence[Outcome]) -> None:
    """Print the outcome of each cell, and for those that did not finish, the reason."""
    columns = ("run", "state", "step", "loss", "tok/s")
    console.print_table(columns, [outcome_row(outcome) for outcome in outcomes], title=name, left=2)
    for outcome in outcomes:
        if outcome.state != "done":
            console.say(f"{outcome.run_id} {outcome.state}: {outcome.message}")


def outcome_row(outcome: Outcome) -> tuple[Any, ...]:
    """Run, state, steps, loss and speed of a cell, for a table."""
    speed = outcome.tokens_per_s and round(outcome.tokens_per_s)
    return outcome.run_id, outcome.state, f"{outcome.step}/{outcome.steps}", outcome.loss, speed
