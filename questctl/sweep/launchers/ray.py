"""Ray Core: one task per run, so that Ray shares GPUs among runs and starts a run elsewhere when its machine is lost.

    task = worker of one cell, in a process of its own          num_cpus = cores of a run, num_gpus = its share of a GPU

The task starts a process for the worker, because Ray's own process has threads and must not fork. If the task is killed, that
process notices, lets its run write a checkpoint and ends; Ray starts the task again, which waits until the lease is free. A run
that ran out of memory beside others becomes pending, and is sent out once more with a whole GPU. The run folders say what is
done, as with every launcher; results of Ray's tasks are not read.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import MissingDependency, Preempted, QuestError, RunFailed, UsageError
from ...system import cpu_count, wait_passively
from ..costs import longest_first
from ..manifest import Sweep, join, open_sweep
from ..outcomes import Outcome, OutcomeReader, Watch, read_outcomes
from ..slots import Slot
from ..stopping import reopen, stopping_of
from ..worker import POLL_S, TRAINER, trunk_is_ready
from .local import stop_signals, without_main, work
from .options import RayOptions

logger = logging.getLogger(__name__)
INSTALL = "ray: is not installed; pip install 'questctl[ray]'."
ANSWER_S = 10.0  # within which a cluster's port must accept a connection
WATCH_S = 1.0


def require(address: str) -> None:
    """Raises MissingDependency without Ray, UsageError if nothing answers at `address`."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise MissingDependency(INSTALL)
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("", "auto", "local"):
        return
    if not colon or not port.isdecimal():
        raise UsageError(f"--address: '{address}' is not of the form HOST:PORT or ray://HOST:PORT; auto looks on this machine.")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise UsageError(f"--address: nothing answers at {address} ({reason}); ray start --head starts a cluster there.") from e


def launch(
    sweep: Sweep,
    options: RayOptions,
    *,
    force: bool = False,
    watch: Watch | None = None,
    trainer: str = TRAINER,
    poll_s: float = POLL_S,
) -> list[Outcome]:
    """Train a sweep whose manifest exists on a Ray cluster, and return the outcome of each cell; `watch` sees them meanwhile.

    Raises Preempted or KeyboardInterrupt after a signal (every run has written a checkpoint), UsageError if no cluster answers
    or, without `force`, one of its machines has other code or text than the sweep, RunFailed if tasks are lost repeatedly.
    """
    read = OutcomeReader(sweep.cells, sweep.store)
    stopping = stopping_of(sweep)
    if all(outcome.settled for outcome in read()):
        return read.last
    with _connected(options) as ray, stop_signals() as stops:
        cluster = _Cluster(ray, options)
        arguments = (str(sweep.folder.resolve()), max(1, int(options.cpus)), force, trainer, poll_s)
        sent: dict[str, int] = {}
        pending: dict[Any, str] = {}
        cancelled = False
        while True:
            outcomes = {outcome.run_id: outcome for outcome in read()}
            if stopping and reopen(sweep.cells, read.last, sweep.store):
                outcomes = {outcome.run_id: outcome for outcome in read()}
            if watch is not None:
                watch(read.last)
            for cell in longest_first(sweep.cells) if not stops else ():
                name = cell.run_id
                if outcomes[name].claimable and name not in pending.values() and trunk_is_ready(cell, read):
                    alone = sweep.store.run(name).status().alone
                    sent[name] = sent.get(name, 0) + 1
                    if sent[name] <= 1 + options.retries + alone:
                        pending[cluster.send(name, *arguments, alone=alone)] = name
            if not pending:
                break
            if stops and not cancelled:
                cancelled = True
                for reference in pending:
                    ray.cancel(reference)  # interrupts the task, which lets its run checkpoint
            for reference in ray.wait(list(pending), num_returns=len(pending), timeout=WATCH_S)[0]:
                del pending[reference]
                _raise_quest_errors(ray, reference)
    if stops:
        if stops[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted(f"stopped by {stops[0].name}; every run was checkpointed; repeat the command to resume.")
    remaining = sum(not outcome.settled for outcome in read())
    if remaining:
        raise RunFailed(f"{remaining} cells remain, because their tasks were lost repeatedly; repeat the command to resume.")
    return read.last


class _Cluster:
    """Sends runs to a cluster, each with the share of it that the options ask for."""

    def __init__(self, ray: Any, options: RayOptions) -> None:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.cpus, self.most_cpus = options.cpus, max(r.get("CPU", 0.0) for r in resources)
        has_gpus, per = any(r.get("GPU") for r in resources), options.jobs_per_gpu
        self.gpus = options.gpus if options.gpus is not None else (1.0 / per if isinstance(per, int) else 1.0) * has_gpus
        self.task = ray.remote(max_retries=options.retries)(_task)
        if self.cpus > self.most_cpus:
            raise UsageError(f"--cpus: no machine of the cluster has {self.cpus:g} cores; the largest has {self.most_cpus:g}.")
        if self.gpus > max((r.get("GPU", 0.0) for r in resources), default=0.0):
            raise UsageError(f"--gpus: no machine of the cluster has {self.gpus:g} GPUs.")

    def send(self, name: str, *arguments: Any, alone: bool) -> Any:
        """Submit one run and return Ray's reference to it; `alone` gives it a whole GPU or, without GPUs, a whole machine."""
        shared = 0 < self.gpus < 1 or (not self.gpus and self.cpus < self.most_cpus)
        cpus = self.most_cpus if alone and not self.gpus else self.cpus
        gpus = max(1.0, self.gpus) if alone and self.gpus else self.gpus
        return self.task.options(num_cpus=cpus, num_gpus=gpus).remote(name, 2 if shared and not alone else 1, *arguments)


def _task(name: str, beside: int, folder: str, cpus: int, force: bool, trainer: str, poll_s: float) -> None:
    """In a Ray worker: train one run in a process of its own, on `cpus`; `beside` > 1 says that it shares its device."""
    wait_passively()
    sweep = open_sweep(folder)
    cells = [cell for cell in sweep.cells if cell.run_id == name]
    if not force:
        join(sweep, cells)
    arguments = (cells, sweep.store.root, 0, Slot(None, beside, cpus), False, trainer, poll_s, stopping_of(sweep))
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments, name=name)
    with without_main():
        process.start()
    try:
        while process.is_alive():
            process.join(0.2)  # in short waits, which a cancellation can interrupt
    except BaseException:
        process.terminate()
        process.join()
        raise


def _raise_quest_errors(ray: Any, reference: Any) -> None:
    """Raise the QuestError with which a task ended, if it did; any other end shows in the run folders and is logged."""
    try:
        ray.get(reference)
    except ray.exceptions.RayError as e:
        cause = getattr(e, "cause", None) or e  # only a task that raised has a cause
        if isinstance(cause, QuestError):
            raise cause from None
        if not isinstance(cause, ray.exceptions.TaskCancelledError):  # cancelled by `launch`
            lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
            failed = isinstance(e, ray.exceptions.RayTaskError)  # its text ends with the error, Ray's own begins with it
            logger.info(f"a task failed: {lines[-1]}" if failed else f"a task was lost: {lines[0]}")


@contextmanager
def _connected(options: RayOptions) -> Iterator[Any]:
    """Connect to Ray for a `with` block, and stop what was started. Raises UsageError if no cluster answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"num_cpus": cpu_count(), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **settings)
    except ConnectionError as e:
        raise UsageError(f"--address: no Ray cluster answers at {address}; ray start --head starts one there.") from e
    except Exception as e:  # Ray has no exception class for a node that does not start in time
        ray.shutdown()
        raise RunFailed(f"ray: could not be started: {str(e).splitlines()[0]}") from e
    try:
        yield ray
    finally:
        ray.shutdown()


def described(sweep: Sweep, options: RayOptions) -> Iterator[str]:
    """What would be sent to Ray: one line for each task."""
    per = options.jobs_per_gpu if isinstance(options.jobs_per_gpu, int) else 1
    share = options.gpus if options.gpus is not None else f"{1 / per:g} (where there are GPUs)"
    yield f"# to {options.address or 'a local Ray'}: num_cpus={options.cpus:g} num_gpus={share} max_retries={options.retries}"
    cells = longest_first(sweep.cells)
    for cell, outcome in zip(cells, read_outcomes(cells, sweep.store), strict=True):
        if not outcome.settled:
            yield f"{cell.run_id}  {cell}"
