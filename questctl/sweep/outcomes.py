"""What has become of each cell, read from its run folder; workers, tables and exit codes all judge by this.

A cell is *settled* when it is done, failed, diverged or stopped early: no worker takes it up again unless `reset` makes it
pending, or `stopping.reopen` does because what beat a stopped one did not hold.
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

MOST_READ = 8  # run folders in one look of a worker: a thousand workers, with leases and lines, leave room for so many
SETTLED = ("done", "failed", "diverged", "stopped")


@dataclass(frozen=True)
class Outcome:
    """The state of one cell and how far it is.

    `loss` is in nats/token: on the validation text once the run is done, on the training text before. `message` is the reason
    why a run failed, diverged, was preempted or was stopped early; of a run that was stopped, `forecast` is the training loss
    that was forecast for its end, between `forecast_low` and `forecast_high`; of one in training, `runs watch` fills them in.
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
        """No worker takes the cell up again."""
        return self.state in SETTLED

    @property
    def claimable(self) -> bool:
        """A worker may take the cell up."""
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
        return read_outcome(cell, run)  # the run finished after its result was looked for
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

    A cell without a folder is pending, which one list of the store's folders tells. Of those that have one and are not settled,
    at most `most` are read at a time, in turn from a place by chance: a thousand workers that all read a thousand running cells
    would keep a shared file system busy. The others are taken as they were, and one that was never read as running.
    """

    def __init__(self, cells: Sequence[Cell], store: RunStore, *, most: int | None = None) -> None:
        self.cells, self.store, self.most = cells, store, most
        self.last: list[Outcome] = []
        self.begun = 0  # cells that have a folder and are not settled
        self._settled: dict[str, Outcome] = {}
        self._known: dict[str, Outcome] = {}  # of the cells that are not settled
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
        """How many times as long as for a few cells one should wait before the next look."""
        return max(1.0, self.begun / (self.most or math.inf))

    def forget(self, cell: Cell) -> None:
        """What was known of a cell holds no more: until it is read again it counts as running."""
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
    """Make the cells that ended in one of `states` pending, and return them. They go on from their last good checkpoint.

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
        except (UsageError, DataError):  # another worker just took it up (LeaseHeld), or it is damaged and stays failed
            continue
    return pending
