"""Workers on this machine, forked from a process that has imported torch, and restarted if they are killed.

There is a worker for each slot. The workers share the slots as a pool: a cell of several processes takes several slots, and
workers without a free slot wait.

The supervisor decides nothing about the cells. It starts workers, reads the run folders to report progress, and passes a stop
on: after Ctrl-C or SIGTERM each worker lets its run write a checkpoint. If the supervisor itself is killed, the workers notice
and stop in the same way. In both cases the same command resumes the runs.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from ...errors import Preempted, QuestError, RunFailed
from ...store import RunStore
from ...system import PASSIVE_WAITING, temporary_environment, watched_signals
from ..attempt import TOGETHER
from ..outcomes import Outcome, OutcomeReader, Watch
from ..slots import Pool, Slot, divided, slots
from ..stopping import Stopping
from ..sweep_file import Cell
from ..worker import POLL_S, TRAINER, drain

logger = logging.getLogger(__name__)
LOST = 255  # multiprocessing's exit code of a process whose forkserver is gone
IDLE_DEATHS = 20  # workers killed in a row without a cell being settled, before the supervisor gives up
SUPERVISOR = "supervisor"  # a file in the folder of a pool, locked by its supervisor
FORKSERVER_RETRIES = 5  # how often a dying forkserver may refuse to start a worker


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
    stopping: Stopping | None = None,
    job: Path | None = None,
) -> list[Outcome]:
    """Train `cells` in the slots `places` (default: `slots` with `jobs`); returns the outcome of each.

    `watch` is called with the outcomes every `poll_s` seconds. The CPUs are divided among the slots, and a tiny model trains
    with one thread, unless `threads` sets the number for each process. With `leave`, return as soon as no cell is free, even
    while others still train. `stopping` says when cells end early. `job` is the folder of the sweep if there is a single worker
    that trains cells of several nodes with srun. Call it from the main thread, where signals arrive: SIGINT ends in
    KeyboardInterrupt, SIGTERM and SIGHUP in Preempted, both after every run has written a checkpoint; a second SIGINT does not
    wait for that. Raises RunFailed if the workers cannot go on; stderr says why.
    """
    read = OutcomeReader(cells, store)
    outcomes = read()
    left = [cell for cell, outcome in zip(cells, outcomes, strict=True) if not outcome.settled]
    if not left:
        return _tidied(outcomes, store)
    places = divided(_no_more_than(sum(cell.nproc for cell in left), slots(cells, jobs) if places is None else places))
    context = multiprocessing.get_context("forkserver")
    together = TOGETHER if trainer == TRAINER and any(cell.nproc > 1 for cell in left) else ()
    context.set_forkserver_preload([trainer.partition(":")[0], *together])

    deaths, settled, stopped = 0, 0, False
    workers: list[BaseProcess] = []
    with stop_signals() as stops, _shared(places) as pool:

        def start() -> BaseProcess:
            arguments = (cells, store.root, threads, pool, leave, trainer, poll_s, stopping, job)
            return _started(lambda: context.Process(target=work, args=arguments, name="questctl worker"))

        _start_forkserver(threads or places[0].cpus)
        try:
            workers.extend(start() for _ in range(min(len(left), len(places))))
            while workers:
                wait([w.sentinel for w in workers], poll_s)
                outcomes = read()
                if watch is not None:
                    watch(outcomes)
                if stops and not stopped:
                    stopped = True
                    _stop(workers)
                if stops.count(signal.SIGINT) > 1:
                    _kill(workers)
                before, settled = settled, sum(outcome.settled for outcome in outcomes)
                deaths = 0 if settled > before else deaths
                for worker in [w for w in workers if not w.is_alive()]:
                    workers.remove(worker)
                    killed = (worker.exitcode or 0) < 0 or worker.exitcode == LOST
                    if killed and not stops and settled < len(cells) and deaths < IDLE_DEATHS:
                        deaths += 1
                        workers.append(start())
        finally:
            if not stopped:
                _stop(workers)
            for worker in workers:
                worker.join()
    outcomes = read()
    remaining = sum(not outcome.settled for outcome in outcomes)
    if signal.SIGINT in stops:
        raise KeyboardInterrupt
    if stops and remaining:
        raise Preempted(f"stopped by {stops[0].name}; every run was checkpointed; repeat the command to resume.")
    if remaining and not leave:
        raise RunFailed(f"{remaining} cells remain, because the workers ended early; repeat the command to resume.")
    return _tidied(outcomes, store)


def _tidied(outcomes: list[Outcome], store: RunStore) -> list[Outcome]:
    """Free the disk space of leftovers of runs that were killed right after they finished."""
    for outcome in outcomes:
        if outcome.state == "done":
            store.run(outcome.run_id).tidy()
    return outcomes


@contextmanager
def _shared(places: Sequence[Slot]) -> Iterator[Pool]:
    """The pool of these slots, in a folder for a `with` block; a lock there shows that this process is alive."""
    folder = Path(tempfile.mkdtemp(prefix="questctl-slots-"))
    try:
        with (folder / SUPERVISOR).open("w", encoding="utf-8") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            yield Pool.of(places, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove the folder of a pool whose supervisor was killed."""
    with suppress(OSError), (folder / SUPERVISOR).open() as alive:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def _no_more_than(n: int, places: Sequence[Slot]) -> list[Slot]:
    """The first `n` places, each with the number of them that share its device."""
    used = places[:n]
    on = Counter(slot.gpu for slot in used)
    return [replace(slot, beside=on[slot.gpu]) for slot in used]


def work(
    cells: Sequence[Cell],
    runs: Path,
    threads: int,
    pool: Pool,
    leave: bool,
    trainer: str,
    poll_s: float,
    stopping: Stopping | None = None,
    job: Path | None = None,
) -> None:
    """A worker process. It logs to stderr. It has its own process group, so that Ctrl-C does not reach its runs directly."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    os.setpgid(0, 0)
    try:
        how = partial(drain, threads=threads, pool=pool, leave=leave, trainer=trainer, poll_s=poll_s)
        how(cells, runs, stopping=stopping, job=job)
    except Preempted as e:
        if pool.folder is not None:
            _tidy(pool.folder)
        sys.exit(e.exit_code)
    except QuestError as e:
        logger.error("error: %s", e)
        sys.exit(e.exit_code)


def _stop(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        worker.terminate()


def _kill(workers: Iterable[BaseProcess]) -> None:
    """Kill workers and their runs, which write no checkpoint."""
    for worker in workers:
        if worker.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)


def _started(new: Callable[[], BaseProcess]) -> BaseProcess:
    """A started process. A forkserver that is dying, but not yet known to be dead, may refuse a few times."""
    for attempt in range(FORKSERVER_RETRIES + 1):
        process = new()
        try:
            with without_main():
                process.start()
            break
        except (ConnectionError, EOFError):
            if attempt == FORKSERVER_RETRIES:
                raise
            time.sleep(0.1)
    return process


def _start_forkserver(threads: int) -> None:
    """Start the process that forks workers. Its thread pools are small and sleep.

    It and new workers ignore Ctrl-C and the end of the terminal: they stop when the supervisor tells them to.
    """
    names = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGHUP)} if in_main else {}
    try:
        with temporary_environment(names | {name: os.environ.get(name, value) for name, value in PASSIVE_WAITING.items()}):
            forkserver.ensure_running()
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


@contextmanager
def without_main() -> Iterator[None]:
    """Keep multiprocessing from running the file of the calling program again in each worker, which does not need it."""
    main = sys.modules["__main__"].__dict__
    before: dict[str, Any] = {name: main.pop(name) for name in ("__spec__", "__file__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(before)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collect the stop signals that arrive in a `with` block in a list."""
    stops: list[signal.Signals] = []

    def remember(number: int, frame: FrameType | None) -> None:
        stops.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield stops
        return
    before = {s: signal.signal(s, remember) for s in watched_signals()}
    try:
        yield stops
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
