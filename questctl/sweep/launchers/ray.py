"""Ray Core: one task per run, so that Ray shares GPUs among runs and starts a run elsewhere when its machine is lost.

    task = worker of one cell, in a process of its own          num_cpus = cores of a run, num_gpus = its share of a GPU

A cell of several processes has a placement group, with a bundle for each of its nodes and a task in each (sweep/node.py). The
first task that fails ends the others, and the cell is submitted again.

The task starts a process for the worker, because Ray's own process has threads and must not fork. If the task is killed, that
process notices, lets its run write a checkpoint and ends; Ray starts the task again, which waits until the lease is free. A run
that ran out of memory beside others becomes pending, and is submitted once more with a whole GPU. As with every launcher, the
run folders say what is done; results of Ray's tasks are not read.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ...errors import MissingDependency, Preempted, QuestError, RunFailed, UsageError
from ...system import cpu_count, wait_passively
from ...training.group import free_port
from ..manifest import Sweep, join, open_sweep
from ..node import train_part
from ..outcomes import Outcome, OutcomeReader, Watch, read_outcomes
from ..slots import Device, Pool
from ..stopping import reopen, stopping_of
from ..sweep_file import Cell
from ..worker import POLL_S, TRAINER, in_turn, trunk_is_ready
from .local import stop_signals, without_main, work
from .options import RayOptions

logger = logging.getLogger(__name__)
INSTALL = "ray: is not installed; pip install 'questctl[ray]'."
ANSWER_S = 10.0  # time in which a cluster's port must accept a connection
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
    """Train a sweep, whose manifest exists, on a Ray cluster; returns the outcome of each cell. `watch` gets them meanwhile.

    Raises Preempted or KeyboardInterrupt after a signal (every run has written a checkpoint), UsageError if no cluster answers
    or, without `force`, one of its machines has other code or text than the sweep, RunFailed if tasks are lost repeatedly.
    """
    read = OutcomeReader(sweep.cells, sweep.store)
    stopping = stopping_of(sweep)
    if all(outcome.settled for outcome in read()):
        return read.last
    with _connected(options) as ray, stop_signals() as stops:
        cluster = _Cluster(ray, options)
        cluster.require(sweep.cells)
        arguments = (str(sweep.folder.resolve()), max(1, int(options.cpus)), force, trainer, poll_s)
        sent: dict[str, int] = {}
        pending: dict[Any, str] = {}
        groups: dict[str, Any] = {}  # run id → placement group
        cancelled = False
        while True:
            outcomes = {outcome.run_id: outcome for outcome in read()}
            if stopping and reopen(sweep.cells, read.last, sweep.store):
                outcomes = {outcome.run_id: outcome for outcome in read()}
            if watch is not None:
                watch(read.last)
            for cell in in_turn(sweep.cells) if not stops else ():
                name = cell.run_id
                if outcomes[name].claimable and name not in pending.values() and trunk_is_ready(cell, read):
                    alone = sweep.store.run(name).status().alone
                    sent[name] = sent.get(name, 0) + 1
                    if sent[name] > 1 + options.retries + alone:
                        continue
                    if cell.nproc > 1:
                        groups[name], references = cluster.send_group(cell, *arguments[:-1])
                        pending |= dict.fromkeys(references, name)
                    else:
                        pending[cluster.send(name, *arguments, alone=alone)] = name
            if not pending:
                break
            if stops and not cancelled:
                cancelled = True
                for reference in pending:
                    ray.cancel(reference)  # interrupts the task, which lets its run checkpoint
            for reference in ray.wait(list(pending), num_returns=len(pending), timeout=WATCH_S)[0]:
                name = pending.pop(reference)
                failed = _failed(ray, reference)
                rest = [other for other, of in pending.items() if of == name]
                for other in rest if failed else ():
                    ray.cancel(other)
                if not rest and name in groups:
                    ray.util.remove_placement_group(groups.pop(name))
    if stops:
        if stops[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted(f"stopped by {stops[0].name}; every run was checkpointed; repeat the command to resume.")
    remaining = sum(not outcome.settled for outcome in read())
    if remaining:
        raise RunFailed(f"{remaining} cells remain, because their tasks were lost repeatedly; repeat the command to resume.")
    return read.last


class _Cluster:
    """Submits runs to a cluster, each with the resources that the options ask for."""

    def __init__(self, ray: Any, options: RayOptions) -> None:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.cpus, self.most_cpus = options.cpus, max(r.get("CPU", 0.0) for r in resources)
        has_gpus, per = any(r.get("GPU") for r in resources), options.jobs_per_gpu
        self.gpus = options.gpus if options.gpus is not None else (1.0 / per if isinstance(per, int) else 1.0) * has_gpus
        self.ray, self.resources = ray, resources
        self.task = ray.remote(max_retries=options.retries)(_task)
        self.part, self.meeting = ray.remote(max_retries=0)(_part), ray.remote(num_cpus=0)(_meeting)
        if self.cpus > self.most_cpus:
            raise UsageError(f"--cpus: no machine of the cluster has {self.cpus:g} cores; the largest has {self.most_cpus:g}.")
        if self.gpus > max((r.get("GPU", 0.0) for r in resources), default=0.0):
            raise UsageError(f"--gpus: no machine of the cluster has {self.gpus:g} GPUs.")

    def bundle(self, cell: Cell) -> dict[str, float]:
        """The resources that a cell of several processes takes on one node."""
        each = cell.nproc // cell.nodes
        gpus = {"GPU": float(each)} if self.gpus and cell.config.train.device != "cpu" else {}
        return {"CPU": self.cpus * each, **gpus}

    def require(self, cells: Sequence[Cell]) -> None:
        """Raises UsageError for the first cell of several processes for which the cluster has too few nodes."""
        for cell in cells:
            wanted = self.bundle(cell)
            have = sum(all(node.get(what, 0.0) >= n for what, n in wanted.items()) for node in self.resources)
            if cell.nproc > 1 and have < cell.nodes:
                each = " and ".join(f"{n:g} {what}s" for what, n in wanted.items())
                raise UsageError(
                    f"resources: {cell.run_id} takes {each} on each of {cell.nodes} nodes, and the cluster has {have} such "
                    "nodes; set a smaller nproc or more nodes."
                )

    def send_group(self, cell: Cell, folder: str, cpus: int, force: bool, trainer: str) -> tuple[Any, list[Any]]:
        """Submit a cell of several processes: its placement group, and a reference for each of its nodes."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self.bundle(cell)
        strategy = "STRICT_SPREAD" if cell.nodes > 1 else "STRICT_PACK"
        group = self.ray.util.placement_group([bundle] * cell.nodes, strategy=strategy)
        on = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(cell.nodes)]
        meeting = self.meeting.options(scheduling_strategy=on[0]).remote()
        each = cpus * (cell.nproc // cell.nodes)
        return group, [
            self.part.options(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), scheduling_strategy=place).remote(
                meeting, i, folder, cell.run_id, each, force, trainer
            )
            for i, place in enumerate(on)
        ]

    def send(self, name: str, *arguments: Any, alone: bool) -> Any:
        """Submit one run and return Ray's reference to it; `alone` gives it a whole GPU or, without GPUs, a whole machine."""
        shared = 0 < self.gpus < 1 or (not self.gpus and self.cpus < self.most_cpus)
        cpus = self.most_cpus if alone and not self.gpus else self.cpus
        gpus = max(1.0, self.gpus) if alone and self.gpus else self.gpus
        return self.task.options(num_cpus=cpus, num_gpus=gpus).remote(name, 2 if shared and not alone else 1, *arguments)


def _task(name: str, beside: int, folder: str, cpus: int, force: bool, trainer: str, poll_s: float) -> None:
    """In a Ray worker: train one run in a process of its own, on `cpus` CPUs; with `beside` > 1 it shares its device."""
    wait_passively()
    sweep = open_sweep(folder)
    cells = [cell for cell in sweep.cells if cell.run_id == name]
    if not force:
        join(sweep, cells)
    pool = Pool((Device(None, 1),), cpus, shared=beside > 1)
    arguments = (cells, sweep.store.root, 0, pool, False, trainer, poll_s, stopping_of(sweep))
    _in_process(work, arguments, name)


def _meeting() -> dict[str, str]:
    """In a Ray worker on the first node of a cell: the address where its ranks meet."""
    import ray

    return {"MASTER_ADDR": ray.util.get_node_ip_address(), "MASTER_PORT": str(free_port())}


def _part(meeting: dict[str, str], node: int, folder: str, name: str, cpus: int, force: bool, trainer: str) -> int:
    """In a Ray worker: train one node's part of a cell in a process of its own; returns its exit code."""
    wait_passively()
    sweep = open_sweep(folder)
    if not force:
        join(sweep, [cell for cell in sweep.cells if cell.run_id == name])
    return _in_process(train_part, (folder, name, {**meeting, "NODE_RANK": str(node)}, trainer, cpus), name)


def _in_process(target: Callable[..., None], arguments: tuple[Any, ...], name: str) -> int:
    """Run a function in a process of its own, which is stopped if the task is cancelled; returns its exit code."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, name=name)
    with without_main():
        process.start()
    try:
        while process.is_alive():
            process.join(0.2)  # in short waits, which a cancellation can interrupt
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode or 0


def _failed(ray: Any, reference: Any) -> bool:
    """Whether a task has failed; raises the QuestError with which it ended, if any. Its outcome is in the run folder."""
    try:
        return bool(ray.get(reference))
    except ray.exceptions.RayError as e:
        cause = getattr(e, "cause", None) or e  # only a task that raised has a cause
        if isinstance(cause, QuestError):
            raise cause from None
        if not isinstance(cause, ray.exceptions.TaskCancelledError):  # cancelled by `launch`
            lines = [line for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
            failed = isinstance(e, ray.exceptions.RayTaskError)  # its text ends with the error, Ray's own texts begin so
            logger.info(f"a task failed: {lines[-1]}" if failed else f"a task was lost: {lines[0]}")
        return True


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
    """What would be submitted to Ray, a line for each task."""
    per = options.jobs_per_gpu if isinstance(options.jobs_per_gpu, int) else 1
    share = options.gpus if options.gpus is not None else f"{1 / per:g} (where there are GPUs)"
    yield f"# to {options.address or 'a local Ray'}: num_cpus={options.cpus:g} num_gpus={share} max_retries={options.retries}"
    cells = in_turn(sweep.cells)
    for cell, outcome in zip(cells, read_outcomes(cells, sweep.store), strict=True):
        if not outcome.settled:
            group = f"  (a placement group: {cell.nodes} × {cell.nproc // cell.nodes} processes)" * (cell.nproc > 1)
            yield f"{cell.run_id}  {cell}{group}"
