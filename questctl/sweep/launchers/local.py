"""Workers on this machine: one for each slot, started from one process that has imported torch, restarted if they are killed.

This supervisor decides nothing about the cells. It starts workers, looks at the run folders to show how far they are, and
passes a stop on: after Ctrl-C or SIGTERM each worker lets its run checkpoint. Should the supervisor itself be killed, the
workers notice and stop in the same way. Either way the same command goes on where everything stood.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from ...console import error
from ...errors import Preempted, QuestError, RunFailed
from ...store import RunStore
from ...system import cpu_count, temporary_environment
from ..outcomes import Outcome, OutcomeReader
from ..slots import Slot, slots
from ..sweep_file import Cell
from ..worker import POLL_S, STOP_SIGNALS, TRAINER, drain

LOST = 255  # multiprocessing's exit code of a process whose forkserver is gone
IDLE_DEATHS = 20  # workers killed in a row without a cell being settled, before the supervisor gives up

Watch = Callable[[Sequence[Outcome]], None]


def launch(
    cells: Sequence[Cell],
    store: RunStore,
    *,
    jobs: int = 0,
    places: Sequence[Slot] | None = None,
    threads: int = 0,
    leave: bool = False,
    trainer: str = TRAINER,
    watch: Watch | None = None,
    poll_s: float = POLL_S,
) -> list[Outcome]:
    """Drain `cells` with a worker in each of `places` (default: `slots` with `jobs`); returns what became of each.

    `watch` is shown the outcomes every `poll_s` seconds. The cores are divided among the workers, unless `threads` says how
    many a run has. `leave`: return as soon as nothing is free, though others still train. Call it from the main thread,
    where signals arrive: SIGINT ends in KeyboardInterrupt, SIGTERM and SIGHUP in Preempted, both after every run has
    checkpointed; a second SIGINT does not wait for that. Raises RunFailed if the workers cannot go on; stderr then says why.
    """
    progress = OutcomeReader(cells, store)
    outcomes = progress()
    left = sum(not seen.settled for seen in outcomes)
    if not left:
        return _tidied(outcomes, store)
    places = _no_more_than(left, slots(cells, jobs) if places is None else places)
    threads = threads or max(1, cpu_count() // len(places))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([trainer.partition(":")[0]])

    def start(slot: Slot) -> BaseProcess:
        about = (cells, store.root, threads, slot, leave, trainer, poll_s)
        worker = context.Process(target=work, args=about, name="questctl worker")
        with without_main():
            worker.start()
        return worker

    deaths, settled, stopped = 0, 0, False
    workers: dict[BaseProcess, Slot] = {}
    with stop_signals() as stops:
        _start_forkserver(threads)
        try:
            workers |= {start(slot): slot for slot in places}
            while workers:
                wait([w.sentinel for w in workers], poll_s)
                outcomes = progress()
                if watch is not None:
                    watch(outcomes)
                if stops and not stopped:
                    stopped = True
                    _stop(workers)
                if stops.count(signal.SIGINT) > 1:
                    _kill(workers)
                before, settled = settled, sum(seen.settled for seen in outcomes)
                deaths = 0 if settled > before else deaths
                for worker in [w for w in workers if not w.is_alive()]:
                    slot = workers.pop(worker)
                    killed = (worker.exitcode or 0) < 0 or worker.exitcode == LOST
                    if killed and not stops and settled < len(cells) and deaths < IDLE_DEATHS:
                        deaths += 1
                        workers[start(slot)] = slot
        finally:
            if not stopped:
                _stop(workers)
            for worker in workers:
                worker.join()
    outcomes = progress()
    left = sum(not seen.settled for seen in outcomes)
    if signal.SIGINT in stops:
        raise KeyboardInterrupt
    if stops and left:
        raise Preempted(f"stopped by {stops[0].name}; every run was checkpointed, and the same command goes on.")
    if left and not leave:
        raise RunFailed(f"{left} cells are left, because the workers ended early; the same command goes on.")
    return _tidied(outcomes, store)


def _tidied(outcomes: list[Outcome], store: RunStore) -> list[Outcome]:
    """Give back what runs still occupy that were killed right after their end."""
    for seen in outcomes:
        if seen.state == "done":
            store.run(seen.run_id).tidy()
    return outcomes


def _no_more_than(n: int, places: Sequence[Slot]) -> list[Slot]:
    """The first `n` places, each with the number of those that are left on its device."""
    used = places[:n]
    on = Counter(slot.gpu for slot in used)
    return [replace(slot, beside=on[slot.gpu]) for slot in used]


def work(cells: Sequence[Cell], runs: Path, threads: int, slot: Slot, leave: bool, trainer: str, poll_s: float) -> None:
    """A worker process. A group of its own keeps Ctrl-C from its runs: they are stopped once, by their worker."""
    os.setpgid(0, 0)
    if slot.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu  # read when CUDA is first used: not by now
    try:
        drain(cells, runs, threads=threads, slot=slot, leave=leave, trainer=trainer, poll_s=poll_s)
    except Preempted as e:
        sys.exit(e.exit_code)
    except QuestError as e:
        error(str(e))
        sys.exit(e.exit_code)


def _stop(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        worker.terminate()


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Workers and their runs, without a checkpoint."""
    for worker in workers:
        if worker.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def _start_forkserver(threads: int) -> None:
    """Ctrl-C is not for this process nor for workers that have not begun; the thread pools of its libraries begin small."""
    names = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        with temporary_environment(names):
            forkserver.ensure_running()
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def without_main() -> Iterator[None]:
    """A worker needs nothing of the program that started the sweep; multiprocessing would run its file again in each."""
    main = sys.modules["__main__"].__dict__
    before: dict[str, Any] = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(before)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """The stop signals that arrive inside, in a list that grows."""
    stops: list[signal.Signals] = []

    def remember(number: int, frame: FrameType | None) -> None:
        stops.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    before = {s: signal.signal(s, remember) for s in STOP_SIGNALS}
    try:
        yield stops
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
