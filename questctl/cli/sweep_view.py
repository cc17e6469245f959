"""How far a sweep is, shown on stderr: a live table on a terminal, elsewhere a line for each settled cell and a summary."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import console
from ..config import RunConfig
from ..sweep.costs import Speed, flops_per_token, seconds, sized, wall_seconds
from ..sweep.manifest import Sweep
from ..sweep.outcomes import Outcome, read_outcomes
from ..sweep.sweep_file import SweepFile

URGENCY = {"running": 0, "failed": 1, "diverged": 1, "preempted": 2, "pending": 2, "done": 3}  # what a small screen shows first


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
            console.note(f"{done} of {len(sweep.cells)} cells are done; the same command goes on where this one stopped.")
        raise
    finally:
        for _, view in views:
            view.close()


class SweepView:
    """Call it with the outcomes of the cells of a sweep file, again and again; `quiet` shows nothing."""

    def __init__(self, file: SweepFile, *, quiet: bool = False) -> None:
        self.file, self.quiet = file, quiet
        columns = ("run", "state", "step", "loss", "tok/s", "ETA")
        self._live = console.LiveTable(columns, left=2, optional=("tok/s",)) if sys.stderr.isatty() else None
        self._start = self._last = time.monotonic()
        self._announced: set[str] | None = None
        self._configs: dict[str, RunConfig] = {}  # by run id, with the vocabulary of their text

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        """Show these outcomes, one for each cell of the sweep file, in its order."""
        if self.quiet:
            return
        if self._live is not None:
            urgent = sorted(outcomes, key=lambda outcome: URGENCY[outcome.state])[: self._live.room]
            rows = [(*outcome_row(outcome), _eta(outcome)) for outcome in outcomes if outcome in urgent]
            self._live.update(rows, self._summary(outcomes))
            return
        settled = {outcome.run_id: outcome for outcome in outcomes if outcome.settled}
        announced, self._announced = self._announced, set(settled)
        for run_id in settled.keys() - announced if announced is not None else ():
            outcome = settled[run_id]
            result = f"loss {outcome.loss:.4f}" if outcome.loss is not None else outcome.message
            console.note(f"{run_id}  {outcome.state}  {result}")
        if time.monotonic() - self._last >= console.progress.PLAIN_INTERVAL_S:
            self._last = time.monotonic()
            console.note(self._summary(outcomes))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.close()

    def _summary(self, outcomes: Sequence[Outcome]) -> str:
        n = Counter(outcome.state for outcome in outcomes)
        text = f"{n['done']}/{len(outcomes)} done" + "".join(f", {n[s]} {s}" for s in ("running", "failed", "diverged") if n[s])
        return f"{self.file.name}: {text}, {console.duration(time.monotonic() - self._start)}{self._time_left(outcomes)}"

    def _time_left(self, outcomes: Sequence[Outcome]) -> str:
        """Time until the last cell is done, estimated from the speeds of this sweep."""
        new = [cell for cell in self.file.cells if cell.run_id not in self._configs]
        self._configs |= {cell.run_id: config for cell, config in zip(new, sized(new), strict=True)}
        pairs = [(self._configs[cell.run_id], outcome) for cell, outcome in zip(self.file.cells, outcomes, strict=True)]
        speeds = [Speed(c.quant.label, flops_per_token(c), o.tokens_per_s) for c, o in pairs if o.tokens_per_s]
        if not speeds:
            return ""
        times = [(1 - outcome.step / outcome.steps) * seconds(c, speeds) for c, outcome in pairs if not outcome.settled]
        at_a_time = max(1, sum(outcome.state == "running" for outcome in outcomes))
        return f" so far, about {console.duration(wall_seconds(times, at_a_time))} left"


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


def _eta(outcome: Outcome) -> str | None:
    return console.duration(outcome.eta_s) if outcome.state == "running" and outcome.eta_s is not None else None
