"""One attempt at a cell, in the process that holds its lease: it trains the run itself, or is the head of a group of ranks.

    one process      head = trainer                          several      head → rank 0, rank 1, …, each a trainer

The head forks the ranks before it has threads, claims the lease, lets the ranks begin, and watches them (training/group.py).
The head holds the lease. When it ends for any reason, the ranks are killed at once, since another worker may then take the run.
The loss of a rank ends the attempt: the run becomes `preempted`, and the next attempt goes on from the last checkpoint.

On several nodes, the process that srun or Ray starts on each node is the head of the ranks there. Only the head on the first
node has the lease.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import DataError, Diverged, OutOfMemory, Preempted, QuestError, RankLost, RunFailed, UsageError
from ..store import Run
from ..store.lease import Lease, LeaseHeld, LeaseLost
from ..system import STOP_SIGNALS, watched_signals
from ..training.group import Rendezvous, end, follow, forwarding, in_words, watch
from .slots import Slot, turn, useful_threads

TRAINER = "questctl.training.loop:train"
ENDED = ("failed", "diverged", "stopped")  # states of a run without a result that no worker takes by itself
LOST = 76  # exit code of a head that has lost a rank
HELD = 77  # of a head on one of several nodes, if another process has the lease
TOGETHER = (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo",
)  # modules that ranks load as well


def load_trainer(trainer: str) -> Callable[..., Any]:
    """Import the function that "module:function" names."""
    module, _, name = trainer.partition(":")
    return getattr(importlib.import_module(module), name)


def begin(
    config: RunConfig,
    run: Run,
    threads: int,
    slot: Slot,
    trainer: str,
    may_stop: bool = False,
    nproc: int = 1,
    rendezvous: Rendezvous | None = None,
    beside: int = 0,
) -> None:
    """In a child process of the worker, ending with it: claim the run, read it again, and train it in `nproc` processes here.

    The status is always written, by the trainer or by this function. `rendezvous` is the address where ranks of several nodes
    meet, and `beside` is the number of other cells in training.
    """
    for s in watched_signals():
        signal.signal(s, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if slot.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu  # in time, because CUDA reads it at its first use
    config = _with_threads(config, run, threads or useful_threads(config, slot.cpus))
    lease, ranks = Lease(run.lease_path, beside=beside), None
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _write_to(run.log_path)
        if nproc > 1 or rendezvous is not None:
            ranks = Ranks(config, run, lease, trainer, nproc, rendezvous or Rendezvous.here())
        follow_parent()
        with lease:
            status = run.status()
            if run.result_path.exists() or status.state in ENDED:
                return  # another worker settled it before the claim
            if may_stop and status.state != "pending" and run.last_verdict().get("verdict") == "stop":
                mark(run, config, "stopped", run.last_verdict()["reason"], lease)  # its worker died before it could write this
                return
            try:
                with turn(slot, run.path.parent, alone=status.alone):
                    if ranks is not None:
                        ranks.train()
                    else:
                        load_trainer(trainer)(config, runs=run.path.parent, lease=lease)
            except (Preempted, KeyboardInterrupt, LeaseLost) as e:
                print(e)  # stdout is the log of the run
            except RankLost as e:
                print(e)
                mark(run, config, "preempted", f"{e}; it goes on from its last checkpoint.", lease)
                sys.exit(LOST)
            except BaseException as e:
                traceback.print_exc()
                if isinstance(e, OutOfMemory) and slot.beside > 1 and once_more_alone(run, config, lease):
                    return
                mark(run, config, "diverged" if isinstance(e, Diverged) else "failed", _sentence(e), lease)
    except LeaseHeld:
        if rendezvous is not None:
            sys.exit(HELD)
        return
    except OSError:  # the folder cannot be written; the worker runs into the same error and reports it
        traceback.print_exc()
        sys.exit(1)
    finally:
        if ranks is not None:
            ranks.close()


# --- the ranks of a run ---------------------------------------------------------------------------------------------------


def load_for_ranks(trainer: str) -> None:
    """Import what the ranks of a group need, before they are forked."""
    load_trainer(trainer)
    for name in TOGETHER if trainer == TRAINER else ():
        importlib.import_module(name)


class Forked:
    """A forked process as a `group.Member`; `was_killed` is set if it did not end by itself."""

    def __init__(self, process: BaseProcess) -> None:
        self.process, self.was_killed = process, False

    def poll(self) -> int | None:
        """Its exit code."""
        return self.process.exitcode

    def send_signal(self, sig: int) -> None:
        """Send a signal, if it still runs."""
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, sig)

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        self.was_killed = self.was_killed or self.process.exitcode is None
        self.process.kill()

    def wait(self) -> None:
        """Wait for its end."""
        self.process.join()


class Ranks:
    """The ranks of one node, forked by the constructor. They start to train on `train`, and do not outlive this process."""

    def __init__(
        self, config: RunConfig, run: Run, lease: Lease | None, trainer: str, count: int, rendezvous: Rendezvous
    ) -> None:
        load_for_ranks(trainer)
        context = multiprocessing.get_context("fork")
        (go, self._go), (alive, self._alive) = os.pipe(), os.pipe()
        self.members, self.reports = list[Forked](), list[Connection]()
        for variables in rendezvous.environments(count):
            report, sender = context.Pipe(duplex=False)
            arguments = (config, run, lease, trainer, variables, go, alive, (self._go, self._alive), sender)
            process = context.Process(target=_rank, args=arguments, name=f"{run.name} rank {variables['RANK']}")
            process.start()
            sender.close()
            self.members.append(Forked(process))
            self.reports.append(report)
        os.close(go)
        os.close(alive)
        self.first, self.total = rendezvous.node * count, rendezvous.nodes * count

    def train(self) -> None:
        """Let the ranks begin, and watch them to their end. Raises the error of the first rank that failed, or RankLost."""
        stopping: list[bool] = []
        with forwarding(self.members, lambda: stopping.append(True)):
            os.write(self._go, b"g" * len(self.members))
            first = watch(self.members)
        if not self.members[first].poll():
            return
        if stopping:
            raise Preempted(f"stopped while {self.total} processes trained it.")
        errors = [_received(report) for report in self.reports]
        silent = [i for i, e in enumerate(errors) if e is None and self.members[i].poll() and not self.members[i].was_killed]
        own = [e for e in (errors[first], *errors) if e is not None and not isinstance(e, RankLost)]
        if own and not silent:
            raise own[0]
        lost = silent[0] if silent else first
        raise RankLost(f"rank {self.first + lost} of {self.total} {in_words(self.members[lost].poll() or 0)}")

    def close(self) -> None:
        """End the ranks that still run or wait."""
        for pipe in (self._go, self._alive):
            os.close(pipe)
        end(self.members)


def _received(report: Connection) -> QuestError | None:
    """The error that a rank has reported; None if it ended without one."""
    with suppress(EOFError):
        if report.poll():
            error: QuestError = report.recv()
            return error
    return None


def _rank(
    config: RunConfig,
    run: Run,
    lease: Lease | None,
    trainer: str,
    variables: Mapping[str, str],
    go: int,
    alive: int,
    of_head: tuple[int, ...],
    errors: Connection,
) -> None:
    """In a forked process: wait until the head lets it begin, and train. If it fails, its error is sent to the head."""
    for pipe in of_head:
        os.close(pipe)
    for s in watched_signals():
        signal.signal(s, signal.SIG_DFL)
    if not os.read(go, 1):
        return  # the head did not get the lease
    follow(alive, grace_s=0)
    os.environ.update(variables)
    try:
        load_trainer(trainer)(config, runs=run.path.parent, lease=lease if variables["RANK"] == "0" else None)
    except BaseException as e:
        traceback.print_exc()
        errors.send(e if isinstance(e, QuestError) else RunFailed(_sentence(e)))
        sys.exit(getattr(e, "exit_code", 1))


def mark(run: Run, config: RunConfig, state: str, message: str, lease: Lease | None = None) -> None:
    """Write the final state of a run whose trainer could not write it. Raises StorageError."""
    try:
        with run.open_for_training(config, lease=lease) as writer:
            if not run.result_path.exists() and writer.status.state not in ENDED:
                writer.set_state(state, writer.status.step, message)
    except (LeaseHeld, LeaseLost):
        return  # another worker has taken it
    except (DataError, UsageError):
        return  # the folder is damaged: its outcome says so already


def once_more_alone(run: Run, config: RunConfig, lease: Lease | None = None) -> bool:
    """Make a run that ran out of memory beside others pending, to be tried alone; returns False if it was alone already.

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
    """Set the number of CPU threads of a run that begins, unless the sweep file sets `train.threads`."""
    if run.exists() or config.train.threads:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"threads": threads})})


def _sentence(e: BaseException) -> str:
    """The first line of an error's message, with the name of its class unless it is a QuestError."""
    text = str(e) if isinstance(e, QuestError) else f"{type(e).__name__}: {e}"
    return text.splitlines()[0]


def _write_to(log: Path) -> None:
    """Send standard output and error to the run's log, and the stack of a crash inside a library as well."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, full, or none
            stream.flush()
    sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    for stream in (1, 2):
        os.dup2(sys.stderr.fileno(), stream)
    faulthandler.enable(sys.stderr)


def follow_parent() -> None:
    """From now on, end this process, after a checkpoint, when the worker ends. A command follows its standard input instead."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    if parent is None:
        follow(0)
    else:
        threading.Thread(target=wait, daemon=True).start()
