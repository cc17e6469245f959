"""A worker trains a sweep: it repeatedly takes the longest cell that is free, and trains it in a child process.

    remaining = the cells that are neither done, failed nor diverged       (only the run folders say so)
    choose the longest that is free and fits on what is left of this machine → take its slots → fork a child
    the child (attempt.py) claims the lease, looks again, trains, alone or as the head of a group of processes, releases

With [resources], cells of the most processes come first. Whichever process dies, the folders stay consistent:

    child     killed by a signal (SIGSEGV, the kernel out of memory): the worker marks the run failed and names the signal
    rank      one of the processes of a group is lost: the child ends the others, and the cell goes on from its last checkpoint;
              after LOST_ATTEMPTS in a row without a new checkpoint it has failed
    node      a cell of several nodes is one srun of node.py over the nodes of this worker's SLURM job, and ends in the same way
    memory    a run that ran out of it beside others (or was killed by SIGKILL, as the kernel does) is tried once more, alone
    worker    its child notices, writes a checkpoint and ends as preempted; another worker goes on from there
    machine   the lease becomes stale, and another worker goes on from the last checkpoint
    [stop]    a verdict of the judge is in the run folder before the child ends; the run's next claimant carries it out

Workers know nothing of each other and need no supervisor: any number of them, started in any way on any machine that sees the
folder, train one sweep together. A worker has one thread and has not computed with torch when it forks, so that a fork is safe.
A child starts in about 20 ms, whereas a new interpreter takes 2 s to import torch.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from ..errors import Preempted
from ..store import Run, RunStore
from ..system import STOP_SIGNALS, watched_signals
from .attempt import HELD, LOST, TRAINER, begin, load_for_ranks, load_trainer, mark, once_more_alone
from .costs import longest_first
from .node import Step, nodes_of_job
from .outcomes import MOST_READ, Outcome, OutcomeReader
from .slots import Claim, Pool, Slot, needs
from .stopping import GO_ON, JUDGE, STOP, Judge, Stopping, reopen
from .sweep_file import Cell

POLL_S = 0.5  # seconds between two looks at cells that other workers train
LOST_ATTEMPTS = 3  # a cell that loses a rank so often in a row without a new checkpoint has failed


def drain(
    cells: Sequence[Cell],
    runs: Path,
    *,
    threads: int = 0,
    pool: Pool = Pool(),
    leave: bool = False,
    trainer: str = TRAINER,
    poll_s: float = POLL_S,
    stopping: Stopping | None = None,
    job: Path | None = None,
) -> None:
    """Train the remaining `cells` in the folder `runs`; returns when each is settled, here or elsewhere.

    `threads`: CPU threads of a process that starts here (0: as many of the slot's CPUs as its model can use).
    `pool`: the slots of this machine, which other workers may share; cells that are too large for it are left to others.
    `leave`: return as soon as no cell is free, without waiting for other workers.
    `trainer`: "module:function", called in the child as `function(config, runs=…, lease=…)`.
    `stopping`: when cells that cannot win end early.
    `job`: the folder of the sweep, if this worker has a SLURM job of several nodes and trains cells of as many nodes.

    Must run in the main thread. Raises Preempted after one of STOP_SIGNALS or the end of the process that started it, once the
    current run has a checkpoint; StorageError if `runs` cannot be written.
    """
    _Worker(cells, runs, threads, pool, leave, trainer, poll_s, stopping, job).drain()


def in_turn(cells: Sequence[Cell]) -> list[Cell]:
    """The order in which cells are taken: most processes first, and of equal ones the longest first."""
    return sorted(longest_first(cells), key=lambda cell: -cell.nproc)


def trunk_is_ready(cell: Cell, outcomes: OutcomeReader) -> bool:
    """False for a branch whose trunk has not reached the step at which the branch leaves.

    A branch whose trunk can no longer reach that step counts as ready: it is taken, and fails with the reason.
    """
    branch, run = cell.config.branch, outcomes.store.run(cell.run_id)
    if branch is None or run.checkpoints_path.exists() or run.sibling(branch.source).checkpoint_path(branch.step):
        return True
    trunk = next((outcome for outcome in outcomes.last if outcome.run_id == branch.source), None)
    return trunk is None or trunk.settled


class _Worker:
    def __init__(
        self,
        cells: Sequence[Cell],
        runs: Path,
        threads: int,
        pool: Pool,
        leave: bool,
        trainer: str,
        poll_s: float,
        stopping: Stopping | None,
        job: Path | None,
    ) -> None:
        self.needs = needs(cells, memory=pool.by_memory)
        self.outcomes = OutcomeReader(in_turn(cells), RunStore(runs), most=MOST_READ)
        self.threads, self.pool, self.leave, self.trainer, self.poll_s = threads, pool, leave, trainer, poll_s
        self.parent = multiprocessing.parent_process()
        self.child: BaseProcess | Step | None = None
        self.job, self.nodes = job, nodes_of_job() if job else 1
        self.rule, self.stopping = stopping, ""
        self._rest_until: dict[str, float] = {}  # cells that another worker has just claimed → time of the next try
        self._lost: dict[str, tuple[int, int]] = {}  # run id → (newest checkpoint, attempts that lost a rank since then)

    def drain(self) -> None:
        for name in (self.trainer, JUDGE) if self.rule else (self.trainer,):
            load_trainer(name)  # before the first fork, so that children have its imports
        if self.job is None and any(cell.nproc > 1 and self._fits(cell) for cell in self.outcomes.cells):
            load_for_ranks(self.trainer)
        before = {s: signal.signal(s, self._on_signal) for s in watched_signals()}
        try:
            while not all(outcome.settled for outcome in self.outcomes()) or self._reopens():
                if self.stopping:
                    raise Preempted(f"stopped by {self.stopping}; every run was checkpointed; repeat the command to resume.")
                pairs = zip(self.outcomes.cells, self.outcomes.last, strict=True)
                free = [cell for cell, outcome in pairs if self._may_take(cell, outcome)]
                if self.rule:
                    free.sort(key=self._turn)
                if self._train_first(free):
                    continue
                if not free and self._reopens():
                    continue
                if self.leave and not any(o.claimable and self._fits(c) for c, o in zip(*self._looked(), strict=True)):
                    return
                self._wait(timeout=self.poll_s * self.outcomes.pace)
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _reopens(self) -> bool:
        """Make stopped cells whose verdict no longer holds pending; returns whether there were any."""
        return self.rule is not None and bool(reopen(self.outcomes.cells, self.outcomes.last, self.outcomes.store))

    def _turn(self, cell: Cell) -> tuple[int, float]:
        """The order of free cells in a sweep with [stop]: first those that gave way and need not wait any more, best first."""
        assert self.rule is not None
        verdict = self.outcomes.store.run(cell.run_id).last_verdict()
        if verdict.get("verdict") != GO_ON:
            return 1, 0.0
        return 2 if self.rule.waits(cell, self.outcomes.last) else 0, verdict["now"]

    def _may_take(self, cell: Cell, outcome: Outcome) -> bool:
        if not outcome.claimable or self._rest_until.get(cell.run_id, 0) > time.monotonic() or not self._fits(cell):
            return False
        return trunk_is_ready(cell, self.outcomes)

    def _looked(self) -> tuple[Sequence[Cell], Sequence[Outcome]]:
        return self.outcomes.cells, self.outcomes.last

    def _fits(self, cell: Cell) -> bool:
        """Whether this machine is large enough for a cell."""
        return cell.nodes == self.nodes and (self.nodes > 1 or self.pool.fits(self.needs[cell.run_id]))

    def _train_first(self, free: Sequence[Cell]) -> bool:
        """Train the first of these cells for which there is room now; returns whether there was one."""
        for cell in free:
            claim = Claim(Slot()) if self.nodes > 1 else self.pool.take(self.needs[cell.run_id])
            if claim is not None:
                try:
                    self._train(cell, claim)
                finally:
                    claim.close()
                return True
        return False

    def _train(self, cell: Cell, claim: Claim) -> None:
        """Train one cell in a child. The child writes the outcome to the run folder; if it could not, the worker does."""
        run = self.outcomes.store.run(cell.run_id)
        judge = Judge(self.rule, cell, run, load_trainer(JUDGE)) if self.rule else None
        begun = judge is not None and judge.begun
        if judge and judge.again():
            mark(run, cell.config, "stopped", run.last_verdict()["reason"])
            return
        context = multiprocessing.get_context("fork")
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a signal that arrives now would be lost between two handlers
        try:
            if self.stopping:
                return
            how = {"may_stop": self.rule is not None, "nproc": cell.nproc, "beside": self.outcomes.begun}
            arguments = (cell.config, run, self.threads, claim.slot, self.trainer)
            if self.job is not None:
                self.child = Step(self.job, cell)
            else:
                self.child = context.Process(target=begin, args=arguments, kwargs=how, name=cell.run_id)
                self.child.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        terminated = gives_way = False
        while self.child.is_alive():
            self._wait(self.child.sentinel, timeout=self.poll_s if judge else 1.0)
            if judge is None or self.rule is None or terminated or not (verdict := judge.verdict()):
                continue
            gives_way = verdict == GO_ON and not begun and self.rule.waits(cell, self.outcomes())
            terminated, begun = verdict == STOP or gives_way, True
            if terminated:
                self.child.terminate()
        code, self.child = self.child.exitcode or 0, None
        if judge:
            judge.close()
            if run.last_verdict().get("verdict") == STOP:
                mark(run, cell.config, "stopped", run.last_verdict()["reason"])
            elif gives_way and not self.stopping:
                mark(run, cell.config, "preempted", "goes on when its alternatives have come as far.")
        if code == HELD or (self.nodes > 1 and self._is_stopping()):
            pass
        elif code == LOST or (code == -signal.SIGKILL and cell.nproc > 1) or (code and self.nodes > 1):
            self._goes_on(cell, run)
        elif code == -signal.SIGKILL and claim.slot.beside > 1 and once_more_alone(run, cell.config):
            pass
        elif code < 0 and -code not in STOP_SIGNALS:
            mark(run, cell.config, "failed", _killed_by(-code))
        elif code > 0:
            mark(run, cell.config, "failed", f"the training process ended with exit code {code} ({run.log_path} may say why).")
        self._rest_until[cell.run_id] = time.monotonic() + self.poll_s
        self.outcomes.forget(cell)

    def _goes_on(self, cell: Cell, run: Run) -> None:
        """Let a cell that has lost a process go on, or fail if that happens repeatedly at the same checkpoint."""
        newest = max(run.checkpoint_steps(), default=0)
        before, times = self._lost.get(cell.run_id, (newest, 0))
        times = times + 1 if newest == before else 1
        self._lost[cell.run_id] = newest, times
        if times >= LOST_ATTEMPTS:
            del self._lost[cell.run_id]
            why = f"a process was lost {times} times in a row without a new checkpoint ({run.log_path} may say why)."
            mark(run, cell.config, "failed", why)

    def _wait(self, *sentinels: int, timeout: float) -> None:
        """Sleep until the child ends or the time is over. If the process that started this worker has ended, stop."""
        parent = [self.parent.sentinel] if self.parent is not None and not self.stopping else []
        if set(parent) & set(wait([*sentinels, *parent], timeout)):
            self._stop("the end of its supervisor")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop(signal.Signals(number).name)

    def _is_stopping(self) -> bool:
        return bool(self.stopping)

    def _stop(self, why: str) -> None:
        if not self.stopping:
            self.stopping = why
            if self.child is not None:
                self.child.terminate()


def _killed_by(number: int) -> str:
    cause = " (out of memory?)" if number == signal.SIGKILL else ""
    return f"the training process was killed by {signal.Signals(number).name}{cause}."
