"""Simulation of a sweep in virtual time: how long a cluster takes, what failures cost, and how busy its file system is.

    makespan ≥ max( Σ seconds·devices / devices of the cluster,  longest cell, with the trunk before it )

Cells are taken as workers take them, in the order of `in_turn`: each node takes the first cell that fits on what is left of it
(`slots.first_fit`), and a branch can be taken once its trunk has reached it. A cell of several nodes waits until enough nodes
are free. Nodes fail and are preempted at random, at constant rates; some are slow. A failed node loses the work of its cells
since their last checkpoint, and these can be taken again when their leases are stale. A preempted node writes checkpoints and
loses nothing.

Every worker renews its lease and writes lines at intervals, and looks for the next cell after each cell. A shared file system
is limited by these operations on names and attributes. Their rates are those of many cells at a time (`store.lease.MANY`).
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..config.sections import CHECKPOINTS
from ..errors import UsageError
from ..store.lease import STALE_AFTER_S
from ..store.runs import LINES_TOGETHER_S
from .outcomes import MOST_READ
from .slots import Device, Need, first_fit

# Operations on names and attributes of files (open, close, stat, list, rename, link, unlink, make a folder, set a time), as
# strace counts them: of an attempt, of one checkpoint, of writing lines, of reading one run. A list gives 500 names at a time.
ATTEMPT_OPS, CHECKPOINT_OPS, LINES_OPS, READ_OPS, NAMES_A_LIST = 116, 62, 8, 7, 500
HEARTBEATS = 3  # heartbeats in the time after which a lease is stale
HOUR = 3600.0
MOST_ATTEMPTS = 100  # per cell, on average; with more, the sweep would never end
START_S = 20.0  # from the claim of a run to its first step on a GPU: a process, its data, compiling


@dataclass(frozen=True)
class Job:
    """A cell in the simulation: its seconds on the devices that it needs on each of `nodes`.

    A branch takes only its own steps, and can start when its `trunk` has done the share `leaves` of the trunk's steps.
    `checkpoints` is their number, at equal distances.
    """

    run_id: str
    seconds: float
    need: Need = field(default_factory=Need)
    nodes: int = 1
    trunk: str = ""
    leaves: float = 1.0
    checkpoints: float = CHECKPOINTS

    @property
    def devices(self) -> int:
        """The devices that it takes."""
        return self.need.processes * self.nodes


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices, and how often they fail. Rates are per node and hour."""

    nodes: int = 1
    node: tuple[Device, ...] = (Device("0", 1),)
    start_s: float = START_S
    failures: float = 0.0
    repair_s: float = 600.0
    preemptions: float = 0.0
    away_s: float = 600.0
    slow: float = 0.0  # share of the nodes
    slowdown: float = 1.5  # factor by which these are slower

    @property
    def devices(self) -> int:
        """All devices that can take a process."""
        return self.nodes * sum(device.slots for device in self.node)


@dataclass(frozen=True)
class Attempt:
    """One attempt of a cell, in seconds from the start of the sweep; `end` says how it ended: done, failed or preempted."""

    run_id: str
    devices: tuple[tuple[int, int], ...]  # node, device of it
    start: float
    stop: float
    end: str


@dataclass(frozen=True)
class Simulation:
    """The course of a sweep, in seconds of virtual time."""

    makespan: float
    lower_bound: float
    busy: float  # device-seconds in attempts, starts included
    lost: float  # device-seconds that failures undid
    attempts: tuple[Attempt, ...] = field(repr=False)
    takeovers: int  # how many leases of failed nodes were taken over
    operations: Mapping[str, float]  # on the file system, mean per second by purpose

    @property
    def ratio(self) -> float:
        """The makespan over its lower bound."""
        return self.makespan / self.lower_bound if self.lower_bound else 1.0


def longest_chain(jobs: Sequence[Job], cluster: Cluster) -> tuple[tuple[str, ...], float]:
    """The longest chain of cells that wait for one another, and its seconds: a run, or a trunk and its branch."""
    by_name = {job.run_id: job for job in jobs}

    def chain(job: Job) -> tuple[float, tuple[str, ...]]:
        """When the job ends at the earliest, and the cells up to it."""
        alone = cluster.start_s + job.seconds
        if (trunk := by_name.get(job.trunk)) is None:
            return alone, (job.run_id,)
        end, before = chain(trunk)
        return end - (1 - job.leaves) * trunk.seconds + alone, (*before, job.run_id)

    seconds, names = max(map(chain, jobs), default=(0.0, ()))
    return names, seconds


def lower_bound(jobs: Sequence[Job], cluster: Cluster) -> float:
    """The least makespan without failures, whatever the order: the larger of work over devices and longest chain."""
    work = sum(job.devices * (job.seconds + cluster.start_s) for job in jobs)
    return max(work / cluster.devices, longest_chain(jobs, cluster)[1])


def simulate(jobs: Sequence[Job], cluster: Cluster, *, seed: int = 0) -> Simulation:
    """Train `jobs`, given in the order in which workers take them, on the cluster; the same seed gives the same course.

    Raises UsageError if failures are so frequent that a cell never reaches its next checkpoint.
    """
    return _Course(jobs, cluster, seed).run()


class _Course:
    """The state at one moment of virtual time. Events are (time, number, method, its argument)."""

    def __init__(self, jobs: Sequence[Job], cluster: Cluster, seed: int) -> None:
        self.cluster, self.dice, self.now = cluster, random.Random(seed), 0.0
        self.jobs = {job.run_id: job for job in jobs}
        self.rank = {job.run_id: i for i, job in enumerate(jobs)}
        self.done = dict.fromkeys(self.jobs, 0.0)  # seconds of training saved in a checkpoint; at the end, all of the cell's
        self.free: dict[tuple[Need, int], list[tuple[int, str]]] = {}  # cells that may start, by what they take, in order
        self.branches: dict[str, list[Job]] = {}  # branches that wait for their trunk
        self.nodes = [list(cluster.node) for _ in range(cluster.nodes)]  # free devices of each
        self.cells_on = [0] * cluster.nodes
        self.idle = set(range(cluster.nodes))  # nodes on which something may have become free
        self.down: set[int] = set()
        slow = round(cluster.slow * cluster.nodes)
        self.pace = [cluster.slowdown] * slow + [1.0] * (cluster.nodes - slow)
        self.dice.shuffle(self.pace)
        self.running: dict[str, _Running] = {}
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.attempts: list[Attempt] = []
        self.lost, self.takeovers, self.number, self.unfinished = 0.0, 0, 0, len(jobs)
        for job in jobs:
            if job.trunk in self.jobs:
                self.branches.setdefault(job.trunk, []).append(job)
            else:
                self.release(job)
        for node in range(cluster.nodes):
            self.plan_trouble(node)

    def run(self) -> Simulation:
        """All events in turn, until every cell is done."""
        self.start_what_fits()
        while self.unfinished:
            assert self.events, "a cell fits on no node of the cluster"
            self.now = self.events[0][0]
            while self.events and self.events[0][0] == self.now:
                _, _, happen, arguments = heapq.heappop(self.events)
                happen(*arguments)
            self.start_what_fits()
        busy = sum((a.stop - a.start) * len(a.devices) for a in self.attempts)
        bound = lower_bound(list(self.jobs.values()), self.cluster)
        return Simulation(self.now, bound, busy, self.lost, tuple(self.attempts), self.takeovers, self.operations())

    def operations(self) -> dict[str, float]:
        """Operations a second of heartbeats, lines, checkpoints, attempts, and of looking for the next cell."""
        running = sum(a.stop - a.start for a in self.attempts)
        checkpoints = sum(job.checkpoints for job in self.jobs.values())
        look = len(self.jobs) / NAMES_A_LIST + MOST_READ * READ_OPS
        counts = {
            "heartbeats": running * HEARTBEATS / STALE_AFTER_S,
            "lines": running / LINES_TOGETHER_S * LINES_OPS,
            "checkpoints": checkpoints * CHECKPOINT_OPS,
            "attempts": len(self.attempts) * ATTEMPT_OPS,
            "looks": len(self.attempts) * look,
        }
        return {reason: count / self.now if self.now else 0.0 for reason, count in counts.items()}

    def after(self, seconds: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Plan an event."""
        self.number += 1
        heapq.heappush(self.events, (self.now + seconds, self.number, happen, arguments))

    # cells

    def release(self, job: Job) -> None:
        """A cell may be taken from now on."""
        heapq.heappush(self.free.setdefault((job.need, job.nodes), []), (self.rank[job.run_id], job.run_id))

    def start_what_fits(self) -> None:
        """Each node with room takes the first cells that fit; cells of several nodes take whole ones."""
        for kind in sorted((k for k, cells in self.free.items() if cells and k[1] > 1), key=lambda k: self.free[k][0]):
            whole = [n for n in range(self.cluster.nodes) if not self.cells_on[n] and n not in self.down]
            while self.free[kind] and len(whole) >= kind[1]:
                self.start(kind, whole[: kind[1]])
                del whole[: kind[1]]
        for node in sorted(self.idle - self.down):
            while (first := self.first_for(node)) is not None:
                self.start(first, [node])
        self.idle.clear()

    def first_for(self, node: int) -> tuple[Need, int] | None:
        """The need of the first cell that fits on a node."""
        heads = sorted((cells[0], kind) for kind, cells in self.free.items() if cells and kind[1] == 1)
        return next((kind for _, kind in heads if first_fit(self.nodes[node], kind[0]) is not None), None)

    def start(self, kind: tuple[Need, int], nodes: Sequence[int]) -> None:
        """Begin an attempt of the first cell of this kind."""
        job = self.jobs[heapq.heappop(self.free[kind])[1]]
        if len(self.attempts) > MOST_ATTEMPTS * len(self.jobs):
            raise UsageError(f"failures: {job.run_id} does not come to its next checkpoint at this rate; give a lower one.")
        devices = [(node, device) for node in nodes for device in first_fit(self.nodes[node], job.need) or ()]
        for node, device in devices:
            left = self.nodes[node][device]
            self.nodes[node][device] = replace(left, slots=left.slots - 1, memory=left.memory - job.need.memory)
        for node in nodes:
            self.cells_on[node] += 1
        pace = max(self.pace[node] for node in nodes)  # the processes of a cell wait for the slowest
        self.running[job.run_id] = this = _Running(job, tuple(devices), self.now, pace, self.done[job.run_id])
        for branch in self.branches.get(job.run_id, ()):
            at = max(0.0, branch.leaves * job.seconds - this.before)
            self.after(self.cluster.start_s + pace * at, self.pass_branch, this, branch)
        self.after(self.cluster.start_s + pace * (job.seconds - this.before), self.finish, this)

    def pass_branch(self, this: _Running, branch: Job) -> None:
        """The trunk has reached the step at which a branch leaves it."""
        if self.running.get(this.job.run_id) is this and branch in self.branches[this.job.run_id]:
            self.branches[this.job.run_id].remove(branch)
            self.release(branch)
            self.idle |= set(range(self.cluster.nodes))

    def finish(self, this: _Running) -> None:
        """An attempt comes to the end of its cell, if nothing has ended it before."""
        if self.running.get(this.job.run_id) is this:
            self.done[this.job.run_id] = this.job.seconds
            self.unfinished -= 1
            self.stop(this, "done")

    def stop(self, this: _Running, end: str) -> None:
        """The devices of an attempt become free."""
        del self.running[this.job.run_id]
        for node, device in this.devices:
            left = self.nodes[node][device]
            self.nodes[node][device] = replace(left, slots=left.slots + 1, memory=left.memory + this.job.need.memory)
        for node in {node for node, _ in this.devices}:
            self.idle.add(node)
            self.cells_on[node] -= 1
            if not self.cells_on[node]:
                self.nodes[node] = list(self.cluster.node)  # resets rounding errors in sums of memory
        self.attempts.append(Attempt(this.job.run_id, this.devices, this.start, self.now, end))

    # trouble

    def plan_trouble(self, node: int) -> None:
        """The next failure and preemption of a node that is up, whichever is first."""
        both = ((self.fail, self.cluster.failures), (self.preempt, self.cluster.preemptions))
        times = [(self.dice.expovariate(rate / HOUR), happen) for happen, rate in both if rate / HOUR]
        if times:
            self.after(*min(times, key=lambda pair: pair[0]), node)

    def fail(self, node: int) -> None:
        """A node fails. Its cells go on from their last checkpoint when their leases are stale."""
        for this in self.of_node(node):
            trained = this.trained(self.now, self.cluster.start_s)
            piece = this.job.seconds / this.job.checkpoints
            kept = max(this.before, piece * math.floor(trained / piece + 1e-9)) if piece else 0.0
            self.lost += this.pace * (trained - kept) * this.job.devices
            self.done[this.job.run_id] = kept
            self.stop(this, "failed")
            self.takeovers += 1
            self.after(STALE_AFTER_S, self.come_back, this.job)
        self.leave(node, self.cluster.repair_s)

    def preempt(self, node: int) -> None:
        """A node is taken away, with a warning: its cells have checkpoints, and are free at once."""
        for this in self.of_node(node):
            self.done[this.job.run_id] = this.trained(self.now, self.cluster.start_s)
            self.stop(this, "preempted")
            self.after(0.0, self.come_back, this.job)
        self.leave(node, self.cluster.away_s)

    def of_node(self, node: int) -> list[_Running]:
        return [this for this in self.running.values() if any(n == node for n, _ in this.devices)]

    def leave(self, node: int, seconds: float) -> None:
        self.down.add(node)
        self.after(seconds, self.return_, node)

    def return_(self, node: int) -> None:
        """A node comes back."""
        self.down.discard(node)
        self.idle.add(node)
        self.plan_trouble(node)

    def come_back(self, job: Job) -> None:
        """A cell whose attempt ended is free again, for every node with room."""
        self.release(job)
        self.idle |= set(range(self.cluster.nodes))


@dataclass(frozen=True, eq=False)
class _Running:
    """An attempt in progress; `before` is the training, in seconds, that it began with."""

    job: Job
    devices: tuple[tuple[int, int], ...]
    start: float
    pace: float
    before: float

    def trained(self, now: float, start_s: float) -> float:
        """Seconds of training, at the pace of a good node, that are done now."""
        return min(self.job.seconds, self.before + max(0.0, now - self.start - start_s) / self.pace)
