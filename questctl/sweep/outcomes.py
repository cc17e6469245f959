"""The outcome of each cell, read from its run folder; workers, tables and exit codes all use it.

A cell is *settled* when it is done, failed, diverged or stopped early. No worker takes it again unless `reset` makes it
pending, or `stopping.reopen` does because the verdict that stopped it no longer holds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ..errors import DataError, UsageError
from ..metrics import STEP, TOKENS_PER_S, TRAIN_LOSS
from ..store import Run, RunStore
from ..store.lease import is_live
from .sweep_file import Cell

MOST_READ = 8  # run folders read in one look of a worker: what a file system bears from a thousand workers
SETTLED = ("done", "failed", "diverged", "stopped")


@dataclass(frozen=True)
class Outcome:
    """The state of one cell and how far it is.

    `loss` is in nats/token: on the validation text once the run is done, on the training text before. `message` is the reason
    why a run failed, diverged, was preempted or was stopped early. For a stopped run, `forecast` is the training loss that was
    forecast for its end, between `forecast_low` and `forecast_high`; for a run in training, `runs watch` fills these in.
    """

    run_id: str
    state: str  # pending, running, preempted, done, failed, diverged or stopped
    step: int = 0
    steps: int = 0
    attempts: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    message: str = ""
    forecast: float | None = None
    forecast_low: float | None = None
    forecast_high: float | None = None

    @property
    def settled(self) -> bool:
        """Whether no worker takes the cell again."""
        return self.state in SETTLED

    @property
    def claimable(self) -> bool:
        """Whether a worker may take the cell."""
        return self.state in ("pending", "preempted")


Watch = Callable[[Sequence[Outcome]], None]  # called with the outcomes of all cells of a sweep, again and again


def read_outcome(cell: Cell, run: Run) -> Outcome:
    """Read one run folder. A folder that is damaged or holds another experiment counts as failed, with the reason."""
    steps = cell.config.train.steps
    try:
        if (result := run.result()) is not None:
            return Outcome(run.name, "done", steps, steps, result.attempts, result.loss, result.tokens_per_s, 0.0)
        if not run.exists():
            return Outcome(run.name, "pending", 0, steps)
        if run.config().identity != cell.config.identity:
            raise DataError(f"{run.config_path}: describes another experiment; remove the run (questctl runs rm).")
        status, state = run.status(), run.state()
    except DataError as e:
        return Outcome(run.name, "failed", 0, steps, message=str(e))
    if state == "done":
        return read_outcome(cell, run)  # the run finished after the look for its result
    if state in ("failed", "diverged") and is_live(run.lease_path):
        state = "running"  # not final: its process may still make it pending, to be tried alone
    outcome = Outcome(run.name, state, status.step, steps, status.attempts, message=status.message)
    if state == "stopped":
        middle, low, high = (run.last_verdict().get(key) for key in ("forecast", "low", "high"))
        return replace(outcome, forecast=middle, forecast_low=low, forecast_high=high)
    if state != "running":
        return outcome
    last, speed = run.last_metrics(), run.last_timing().get(TOKENS_PER_S)
    step = max(status.step, last.get(STEP, 0))
    eta = (steps - step) * cell.config.tokens / steps / speed if speed else None
    return replace(outcome, step=step, loss=last.get(TRAIN_LOSS), tokens_per_s=speed, eta_s=eta)


class OutcomeReader:
    """Reads the outcomes of the same cells again and again; a settled cell is read only once, unless it may be reopened.

    One listing of the store's folders shows which cells have no folder: these are pending. Of the unsettled cells with a
    folder, at most `most` are read at a time, in turn from a random start, because a thousand workers that all read a thousand
    running cells would keep a shared file system busy. The others keep their last outcome; a cell that was never read counts as
    running.
    """

    def __init__(self, cells: Sequence[Cell], store: RunStore, *, most: int | None = None) -> None:
        self.cells, self.store, self.most = cells, store, most
        self.last: list[Outcome] = []
        self.begun = 0  # number of cells with a folder that are not settled
        self._settled: dict[str, Outcome] = {}
        self._known: dict[str, Outcome] = {}  # last outcomes of unsettled cells
        self._next = random.randrange(2**30)

    def __call__(self) -> list[Outcome]:
        """One outcome for each cell, in their order. Raises UsageError for a run folder that is a link out of the store."""
        names = self.store.names()
        begun = [cell for cell in self.cells if cell.run_id in names and cell.run_id not in self._settled]
        self.begun = len(begun)
        if self.most is not None and len(begun) > self.most:
            at = self._next % len(begun)
            begun, self._next = [*begun[at:], *begun[:at]][: self.most], at + self.most
        for cell in begun:
            self._read(cell)
        self.last = [self._one(cell, cell.run_id in names) for cell in self.cells]
        return self.last

    def _one(self, cell: Cell, begun: bool) -> Outcome:
        if (settled := self._settled.get(cell.run_id)) is not None:
            return settled
        unread = Outcome(cell.run_id, "running" if begun else "pending", 0, cell.config.train.steps)
        return self._known.get(cell.run_id, unread) if begun else unread

    @property
    def pace(self) -> float:
        """The factor by which to wait longer before the next look than with few cells."""
        return max(1.0, self.begun / (self.most or math.inf))

    def forget(self, cell: Cell) -> None:
        """Forget the last outcome of a cell: until it is read again it counts as running."""
        self._known.pop(cell.run_id, None)

    def _read(self, cell: Cell) -> None:
        outcome = read_outcome(cell, self.store.run(cell.run_id))
        if outcome.settled and outcome.state != "stopped":
            self._settled[cell.run_id] = outcome
        else:
            self._known[cell.run_id] = outcome


def read_outcomes(cells: Sequence[Cell], store: RunStore) -> list[Outcome]:
    """One outcome for each cell, in their order. Raises UsageError for a run folder that is a link out of the store."""
    return OutcomeReader(cells, store)()


def reset(cells: Sequence[Cell], store: RunStore, states: Collection[str]) -> list[Cell]:
    """Make the cells that ended in one of `states` pending; returns them. They resume from their last good checkpoint.

    Raises StorageError if a status cannot be written.
    """
    pending = []
    for cell in cells:
        run = store.run(cell.run_id)
        if read_outcome(cell, run).state not in states or run.result_path.exists():
            continue
        try:
            with run.open_for_training(cell.config) as writer:
                writer.release()
                writer.set_state("pending", writer.status.step)
            pending.append(cell)
        except (UsageError, DataError):  # another worker just took it (LeaseHeld), or it is damaged and stays failed
            continue
    return pending
