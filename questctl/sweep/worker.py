"""A worker drains a sweep: again and again it takes the longest cell that is free and trains it in a child process.

    left = the cells that are neither done, failed nor diverged       (the run folders say so, nothing else does)
    choose the longest whose lease is free → fork a child → the child claims the lease, looks again, trains, releases

The child holds the lease, since it is the one that writes. Whoever dies, the folders stay right:

    child     killed by a signal (SIGSEGV, the kernel out of memory): the worker marks the run failed, naming the signal
    memory    a run that ran out of it beside others (or was killed by SIGKILL, as the kernel does) is tried once more, alone
    worker    its child notices, checkpoints and ends as preempted; another worker takes the run up from there
    machine   the lease goes stale, and another worker goes on from the last checkpoint

Workers know nothing of each other and need no supervisor: any number of them, started by anything, on any machine that sees
the folder, drain one sweep together. A worker has one thread and has done no work with torch when it forks, so a fork is safe,
and a child starts in some 20 ms where a new interpreter needs 2 s to import torch.
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
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from ..config import RunConfig
from ..console import note
from ..errors import DataError, Diverged, OutOfMemory, Preempted, QuestError, UsageError
from ..store import Run, RunStore
from ..store.lease import Lease, LeaseHeld, LeaseLost
from .costs import longest_first
from .outcomes import Outcome, OutcomeReader
from .slots import Slot, turn
from .sweep_file import Cell

TRAINER = "questctl.training.loop:train"
POLL_S = 0.5  # between two looks at cells that others are training
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def drain(
    cells: Sequence[Cell],
    runs: Path,
    *,
    threads: int = 0,
    slot: Slot = Slot(),
    leave: bool = False,
    trainer: str = TRAINER,
    poll_s: float = POLL_S,
) -> None:
    """Train what is left of `cells` in the folder `runs`; returns when each is done, failed or diverged, here or elsewhere.

    `threads`: CPU threads of a run that starts here (0: torch's choice); `slot`: the device, and how many share it; `leave`:
    return as soon as nothing is free, without waiting for what others train; `trainer`: "module:function", called in the
    child as `function(config, runs=…, lease=…)`. Must run in the main thread. Raises Preempted after one of STOP_SIGNALS or the
    end of the process that started it, once the present run has checkpointed; StorageError if `runs` cannot be written.
    """
    _Worker(cells, runs, threads, slot, leave, trainer, poll_s).drain()


def load_trainer(trainer: str) -> Callable[..., Any]:
    """ "module:function" → the function."""
    module, _, name = trainer.partition(":")
    return getattr(importlib.import_module(module), name)


def can_leave(cell: Cell, progress: OutcomeReader) -> bool:
    """False for a branch whose trunk has still to reach its step; one without hope is taken up, and fails saying why."""
    leaves, run = cell.config.branch, progress.store.run(cell.run_id)
    if leaves is None or run.checkpoints_path.exists() or run.sibling(leaves.source).checkpoint_path(leaves.step):
        return True
    trunk = next((seen for seen in progress.last if seen.run_id == leaves.source), None)
    return trunk is None or trunk.settled


class _Worker:
    def __init__(
        self, cells: Sequence[Cell], runs: Path, threads: int, slot: Slot, leave: bool, trainer: str, poll_s: float
    ) -> None:
        self.progress = OutcomeReader(longest_first(cells), RunStore(runs))
        self.threads, self.slot, self.leave, self.trainer, self.poll_s = threads, slot, leave, trainer, poll_s
        self.parent = multiprocessing.parent_process()
        self.child: BaseProcess | None = None
        self.stopping = ""
        self._rest_until: dict[str, float] = {}  # cells that were not to be had a moment ago

    def drain(self) -> None:
        load_trainer(self.trainer)  # before the first fork, so that children find its imports done
        before = {s: signal.signal(s, self._on_signal) for s in STOP_SIGNALS}
        try:
            while not all(seen.settled for seen in self.progress()):
                if self.stopping:
                    raise Preempted(f"stopped by {self.stopping}; every run was checkpointed, and the same command goes on.")
                free = [c for c, seen in zip(self.progress.cells, self.progress.last, strict=True) if self._may_take(c, seen)]
                if free:
                    self._train(free[0])
                elif self.leave and not any(seen.claimable for seen in self.progress.last):
                    return
                else:
                    self._wait(timeout=self.poll_s)
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _may_take(self, cell: Cell, seen: Outcome) -> bool:
        if not seen.claimable or self._rest_until.get(cell.run_id, 0) > time.monotonic():
            return False
        return can_leave(cell, self.progress)

    def _train(self, cell: Cell) -> None:
        """One cell in one child. What came of it stands in the run folder, except where the child could no longer write it."""
        run = self.progress.store.run(cell.run_id)
        context = multiprocessing.get_context("fork")
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a signal now would be lost between two handlers
        try:
            if self.stopping:
                return
            about = (cell.config, run, self.threads, self.slot, self.trainer)
            self.child = context.Process(target=_child, args=about, name=cell.run_id)
            self.child.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        while self.child.is_alive():
            self._wait(self.child.sentinel, timeout=1.0)
        code, self.child = self.child.exitcode or 0, None
        if code == -signal.SIGKILL and self.slot.beside > 1 and _once_more_alone(run, cell.config):
            pass
        elif code < 0 and -code not in STOP_SIGNALS:
            _mark(run, cell.config, "failed", _killed_by(-code))
        elif code > 0:
            _mark(run, cell.config, "failed", f"the training process ended with exit code {code} ({run.log_path} may say why).")
        self._rest_until[cell.run_id] = time.monotonic() + self.poll_s

    def _wait(self, *sentinels: int, timeout: float) -> None:
        """Sleep until the child ends or the time is over. The end of the process that started this worker stops it."""
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


def _child(config: RunConfig, run: Run, threads: int, slot: Slot, trainer: str) -> None:
    """In the child: claim, look again, train. Every way this can end is written to the run's status, here or by the trainer."""
    for s in STOP_SIGNALS:
        signal.signal(s, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_follow_parent, daemon=True).start()
    config = _as_begun(config, run, threads)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _write_to(run.log_path)
        with Lease(run.lease_path) as lease:
            status = run.status()
            if run.result_path.exists() or status.state in ("failed", "diverged"):
                return  # another worker settled it between our look and our claim
            try:
                with turn(slot, run.path.parent, alone=status.alone):
                    load_trainer(trainer)(config, runs=run.path.parent, lease=lease)
            except (Preempted, KeyboardInterrupt, LeaseLost) as e:
                note(str(e))
            except BaseException as e:
                traceback.print_exc()
                if isinstance(e, OutOfMemory) and slot.beside > 1 and _once_more_alone(run, config, lease):
                    return
                _mark(run, config, "diverged" if isinstance(e, Diverged) else "failed", _sentence(e), lease)
    except LeaseHeld:
        return
    except OSError:  # the folder cannot be written: the worker meets the same, and says so
        traceback.print_exc()
        sys.exit(1)


def _mark(run: Run, config: RunConfig, state: str, message: str, lease: Lease | None = None) -> None:
    """Settle a run whose trainer could not. Raises StorageError."""
    try:
        with run.open_for_training(config, lease=lease) as writer:
            if not run.result_path.exists() and writer.status.state not in ("failed", "diverged"):
                writer.set_state(state, writer.status.step, message)
    except (LeaseHeld, LeaseLost):
        return  # another worker has taken it up
    except (DataError, UsageError):
        return  # a damaged folder speaks for itself


def _once_more_alone(run: Run, config: RunConfig, lease: Lease | None = None) -> bool:
    """Make a run that did not fit beside others pending again, to be tried alone; False if it was alone already.

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


def _as_begun(config: RunConfig, run: Run, threads: int) -> RunConfig:
    """With this worker's share of the cores, unless the sweep file sets it. A run that has begun keeps what it began with."""
    if run.exists() or config.train.threads:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"threads": threads})})


def _sentence(e: BaseException) -> str:
    """The first line of what went wrong; our own errors need no class name before them."""
    text = str(e) if isinstance(e, QuestError) else f"{type(e).__name__}: {e}"
    return text.splitlines()[0]


def _killed_by(number: int) -> str:
    cause = " (out of memory?)" if number == signal.SIGKILL else ""
    return f"the training process was killed by {signal.Signals(number).name}{cause}."


def _write_to(log: Path) -> None:
    """Standard output and error go to the run's log; a crash inside a library leaves its stack there too."""
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    for stream in (1, 2):
        os.dup2(sys.stderr.fileno(), stream)
    faulthandler.enable(sys.stderr)


def _follow_parent() -> None:
    """End with a checkpoint once the worker is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
