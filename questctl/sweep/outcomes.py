"""What has become of each cell, read from its run folder; workers, tables and exit codes all judge by this.

A cell is *settled* when it is done, failed, diverged or stopped early: no worker takes it up again unless `reset` makes it
pending, or `stopping.reopen` does because what beat a stopped one did not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ..errors import DataError, UsageError
from ..metrics import STEP, TOKENS_PER_S, TRAIN_LOSS
from ..store import Run, RunStore
from ..store.lease import is_live
from .sweep_file import Cell

SETTLED = ("done", "failed", "diverged", "stopped")


@dataclass(frozen=True)
class Outcome:
    """The state of one cell and how far it is.

    `loss` is in nats/token: on the validation text once the run is done, on the training text before. `message` is the reason
    why a run failed, diverged, was preempted or was stopped early; of such a run, `forecast` is the training loss that was
    forecast for its end, between `forecast_low` and `forecast_high`.
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
    """Reads the outcomes of the same cells again and again; a settled cell is read only once, unless it may be reopened."""

    def __init__(self, cells: Sequence[Cell], store: RunStore) -> None:
        self.cells, self.store = cells, store
        self.last: list[Outcome] = []
        self._settled: dict[str, Outcome] = {}

    def __call__(self) -> list[Outcome]:
        """One outcome for each cell, in their order. Raises UsageError for a run folder that is a link out of the store."""
        self.last = [self._one(cell) for cell in self.cells]
        return self.last

    def _one(self, cell: Cell) -> Outcome:
        if (settled := self._settled.get(cell.run_id)) is not None:
            return settled
        outcome = read_outcome(cell, self.store.run(cell.run_id))
        if outcome.settled and outcome.state != "stopped":
            self._settled[cell.run_id] = outcome
        return outcome


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
