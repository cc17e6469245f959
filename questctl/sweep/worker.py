"""A worker trains a sweep: it repeatedly takes the longest cell that is free, and trains it in a child process.

    remaining = the cells that are neither done, failed nor diverged       (only the run folders say so)
    choose the longest whose lease is free → fork a child → the child claims the lease, looks again, trains, releases

The child holds the lease, because it is the process that writes. Whichever process dies, the folders stay consistent:

    child     killed by a signal (SIGSEGV, the kernel out of memory): the worker marks the run failed and names the signal
    memory    a run that ran out of it beside others (or was killed by SIGKILL, as the kernel does) is tried once more, alone
    worker    its child notices, writes a checkpoint and ends as preempted; another worker goes on from there
    machine   the lease becomes stale, and another worker goes on from the last checkpoint
    [stop]    a verdict of the judge is in the run folder before the child ends; whoever claims the run next carries it out

Workers know nothing of each other and need no supervisor: any number of them, started in any way on any machine that sees the
folder, train one sweep together. A worker has one thread and has done no work with torch when it forks, so that a fork is safe;
a child starts in about 20 ms, where a new interpreter takes 2 s to import torch.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from ..config import RunConfig
from ..errors import DataError, Diverged, OutOfMemory, Preempted, QuestError, UsageError
from ..store import Run, RunStore
from ..store.lease import Lease, LeaseHeld, LeaseLost
from ..system import STOP_SIGNALS, watched_signals
from .costs import longest_first
from .outcomes import Outcome, OutcomeReader
from .slots import Slot, turn, useful_threads
from .stopping import GO_ON, JUDGE, STOP, Judge, Stopping, reopen
from .sweep_file import Cell

TRAINER = "questctl.training.loop:train"
ENDED = ("failed", "diverged", "stopped")  # states of a run without a result that no process takes up by itself
POLL_S = 0.5  # seconds between two looks at cells that other workers train


def drain(
    cells: Sequence[Cell],
    runs: Path,
    *,
    threads: int = 0,
    slot: Slot = Slot(),
    leave: bool = False,
    trainer: str = TRAINER,
    poll_s: float = POLL_S,
    stopping: Stopping | None = None,
) -> None:
    """Train the remaining `cells` in the folder `runs`; returns when each is settled, here or elsewhere.

    `threads`: CPU threads of a run that starts here (0: as many of the slot's CPUs as its model can use); `slot`: the device,
    and how many runs share it; `leave`: return as soon as no cell is free, without waiting for other workers; `trainer`:
    "module:function", called in the child as `function(config, runs=…, lease=…)`; `stopping`: when cells that cannot win end
    early. Must run in the main thread. Raises Preempted
    after one of STOP_SIGNALS or the end of the process that started it, once the current run has a checkpoint; StorageError if
    `runs` cannot be written.
    """
    _Worker(cells, runs, threads, slot, leave, trainer, poll_s, stopping).drain()


def load_trainer(trainer: str) -> Callable[..., Any]:
    """Import the function that "module:function" names."""
    module, _, name = trainer.partition(":")
    return getattr(importlib.import_module(module), name)


def trunk_is_ready(cell: Cell, outcomes: OutcomeReader) -> bool:
    """False for a branch whose trunk has still to reach the step at which it leaves.

    A branch whose trunk can no longer reach it counts as ready: it is taken up, and fails with the reason.
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
        slot: Slot,
        leave: bool,
        trainer: str,
        poll_s: float,
        stopping: Stopping | None,
    ) -> None:
        self.outcomes = OutcomeReader(longest_first(cells), RunStore(runs))
        self.threads, self.slot, self.leave, self.trainer, self.poll_s = threads, slot, leave, trainer, poll_s
        self.parent = multiprocessing.parent_process()
        self.child: BaseProcess | None = None
        self.rule, self.stopping = stopping, ""
        self._rest_until: dict[str, float] = {}  # cells that another worker had just claimed

    def drain(self) -> None:
        for name in (self.trainer, JUDGE) if self.rule else (self.trainer,):
            load_trainer(name)  # before the first fork, so that children find its imports done
        before = {s: signal.signal(s, self._on_signal) for s in watched_signals()}
        try:
            while not all(outcome.settled for outcome in self.outcomes()) or self._reopens():
                if self.stopping:
                    raise Preempted(f"stopped by {self.stopping}; every run was checkpointed; repeat the command to resume.")
                pairs = zip(self.outcomes.cells, self.outcomes.last, strict=True)
                free = [cell for cell, outcome in pairs if self._may_take(cell, outcome)]
                if free:
                    self._train(min(free, key=self._turn) if self.rule else free[0])
                elif self._reopens():
                    continue
                elif self.leave and not any(outcome.claimable for outcome in self.outcomes.last):
                    return
                else:
                    self._wait(timeout=self.poll_s)
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _reopens(self) -> bool:
        """Make stopped cells pending whose verdict no longer holds; whether there were any."""
        return self.rule is not None and bool(reopen(self.outcomes.cells, self.outcomes.last, self.outcomes.store))

    def _turn(self, cell: Cell) -> tuple[int, float]:
        """The order of free cells in a sweep that stops early: first those that were put off and wait no more, best first."""
        assert self.rule is not None
        verdict = self.outcomes.store.run(cell.run_id).last_verdict()
        if verdict.get("verdict") != GO_ON:
            return 1, 0.0
        return 2 if self.rule.waits(cell, self.outcomes.last) else 0, verdict["now"]

    def _may_take(self, cell: Cell, outcome: Outcome) -> bool:
        if not outcome.claimable or self._rest_until.get(cell.run_id, 0) > time.monotonic():
            return False
        return trunk_is_ready(cell, self.outcomes)

    def _train(self, cell: Cell) -> None:
        """Train one cell in a child. The child writes the outcome to the run folder; where it could not, the worker does."""
        run = self.outcomes.store.run(cell.run_id)
        judge = Judge(self.rule, cell, run, load_trainer(JUDGE)) if self.rule else None
        begun = judge is not None and judge.begun
        if judge and judge.again():
            _mark(run, cell.config, "stopped", run.last_verdict()["reason"])
            return
        context = multiprocessing.get_context("fork")
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a signal that arrives now would be lost between two handlers
        try:
            if self.stopping:
                return
            arguments = (cell.config, run, self.threads, self.slot, self.trainer, self.rule is not None)
            self.child = context.Process(target=_child, args=arguments, name=cell.run_id)
            self.child.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        told = gives_way = False
        while self.child.is_alive():
            self._wait(self.child.sentinel, timeout=self.poll_s if judge else 1.0)
            if judge is None or self.rule is None or told or not (verdict := judge.verdict()):
                continue
            gives_way = verdict == GO_ON and not begun and self.rule.waits(cell, self.outcomes())
            told, begun = verdict == STOP or gives_way, True
            if told:
                self.child.terminate()
        code, self.child = self.child.exitcode or 0, None
        if judge:
            judge.close()
            if run.last_verdict().get("verdict") == STOP:
                _mark(run, cell.config, "stopped", run.last_verdict()["reason"])
            elif gives_way and not self.stopping:
                _mark(run, cell.config, "preempted", "goes on when its alternatives have come as far.")
        if code == -signal.SIGKILL and self.slot.beside > 1 and _once_more_alone(run, cell.config):
            pass
        elif code < 0 and -code not in STOP_SIGNALS:
            _mark(run, cell.config, "failed", _killed_by(-code))
        elif code > 0:
            _mark(run, cell.config, "failed", f"the training process ended with exit code {code} ({run.log_path} may say why).")
        self._rest_until[cell.run_id] = time.monotonic() + self.poll_s

    def _wait(self, *sentinels: int, timeout: float) -> None:
        """Sleep until the child ends or the time is over. If the process that started this worker has ended, stop."""
        parent = [self.parent.sentinel] if self.parent is not None and not self.stopping else []
        if set(parent) & set(wait([*sentinels, *parent], timeout)):
            self._stop("the end of its supervisor")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, why: str) -> None:
        if not self.stopping:
            self.stopping = why
            if self.child is not None:
                self.child.terminate()


def _child(config: RunConfig, run: Run, threads: int, slot: Slot, trainer: str, may_stop: bool = False) -> None:
    """In the child: claim the run, look again, train. However it ends, the trainer or this function writes the status."""
    for s in watched_signals():
        signal.signal(s, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_follow_parent, daemon=True).start()
    config = _with_threads(config, run, threads or useful_threads(config, slot.cpus))
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _write_to(run.log_path)
        with Lease(run.lease_path) as lease:
            status = run.status()
            if run.result_path.exists() or status.state in ENDED:
                return  # another worker settled it between the look and the claim
            if may_stop and status.state != "pending" and run.last_verdict().get("verdict") == STOP:
                _mark(run, config, "stopped", run.last_verdict()["reason"], lease)  # its worker died before it could
                return
            try:
                with turn(slot, run.path.parent, alone=status.alone):
                    load_trainer(trainer)(config, runs=run.path.parent, lease=lease)
            except (Preempted, KeyboardInterrupt, LeaseLost) as e:
                print(e)  # stdout is the log of the run
            except BaseException as e:
                traceback.print_exc()
                if isinstance(e, OutOfMemory) and slot.beside > 1 and _once_more_alone(run, config, lease):
                    return
                _mark(run, config, "diverged" if isinstance(e, Diverged) else "failed", _sentence(e), lease)
    except LeaseHeld:
        return
    except OSError:  # the folder cannot be written; the worker runs into the same error and reports it
        traceback.print_exc()
        sys.exit(1)


def _mark(run: Run, config: RunConfig, state: str, message: str, lease: Lease | None = None) -> None:
    """Write the final state of a run whose trainer could not write it. Raises StorageError."""
    try:
        with run.open_for_training(config, lease=lease) as writer:
            if not run.result_path.exists() and writer.status.state not in ENDED:
                writer.set_state(state, writer.status.step, message)
    except (LeaseHeld, LeaseLost):
        return  # another worker has taken it up
    except (DataError, UsageError):
        return  # the folder is damaged, which its outcome says already


def _once_more_alone(run: Run, config: RunConfig, lease: Lease | None = None) -> bool:
    """Make a run that did not fit beside others pending, to be tried alone; returns False if it was alone already.

    Raises StorageError.
    """
    try:
        with run.open_for_training(config, lease=lease) as writer:
            if writer.status.alone or run.result_path.exists():
                return False
            writer.set_state("pending", writer.status.step, "out of memory beside other runs; goes on alone.", alone=True)
            return True
    except (LeaseHeld, LeaseLost, DataError, UsageError):
        return False


def _with_threads(config: RunConfig, run: Run, threads: int) -> RunConfig:
    """Give a run that begins its number of CPU threads, unless the sweep file sets `train.threads`."""
    if run.exists() or config.train.threads:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"threads": threads})})


def _sentence(e: BaseException) -> str:
    """The first line of an error's message, with the name of its class unless it is a QuestError."""
    text = str(e) if isinstance(e, QuestError) else f"{type(e).__name__}: {e}"
    return text.splitlines()[0]


def _killed_by(number: int) -> str:
    cause = " (out of memory?)" if number == signal.SIGKILL else ""
    return f"the training process was killed by {signal.Signals(number).name}{cause}."


def _write_to(log: Path) -> None:
    """Send standard output and error to the run's log, and the stack of a crash inside a library as well."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, full, or none
            stream.flush()
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    for stream in (1, 2):
        os.dup2(sys.stderr.fileno(), stream)
    faulthandler.enable(sys.stderr)


def _follow_parent() -> None:
    """Wait for the end of the worker, then end this process with a checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
