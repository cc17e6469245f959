"""Estimate what a sweep takes on a given cluster: GPU-hours, time, money, disk, and what limits the time.

    questctl.simulate_sweep("paper", "8x8xH100", price=2.5, failures=0.01).plot("figures")

A cluster is written NODESxDEVICESxKIND, such as 8x8xH100. 64xH100 means eight nodes of eight GPUs, and 2xcpu is a machine with
two places for runs. The times of cells are those of the dry run, measured from finished runs or from a second of steps on this
CPU. For GPUs without finished runs they are operations divided by a share of the published peak (`SHARES`), and the result says
so.

simulation.py then simulates the sweep three times: with all cells at their low, likely and high times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import console
from ..config import RunConfig, human_bytes
from ..errors import UsageError, unknown
from .costs import TimeRange, disk_bytes_together, flops_per_token, sized, speedup, tokens_of_work
from .estimate import cell_costs, time_fields
from .manifest import Sweep, open_sweep
from .resources import in_words, settle
from .run import remaining_cells, states_to_retry
from .simulation import HOUR, START_S, Cluster, Job, Simulation, longest_chain, simulate
from .slots import GPU, Device, Need, first_fit, needs, require_memory
from .sweep_file import Cell
from .worker import in_turn

# Dense bf16 operations a second of the tensor cores, and bytes of memory, from the manufacturer's data sheets
GPUS = {
    "A100": (312e12, 80e9),
    "H100": (989e12, 80e9),
    "H200": (989e12, 141e9),
    "B200": (2250e12, 180e9),
    "L4": (121e12, 24e9),
    "L40S": (362e12, 48e9),
    "RTX4090": (165e12, 24e9),
}
CPU = "cpu"
PER_NODE = 8  # GPUs of a node, if the cluster's text does not say
SHARES = (0.10, 0.25, 0.45)  # of the peak that training reaches: low for narrow models, high for wide ones
CPU_START_S = 0.5  # from the claim of a run to its first step on a CPU: a fork, its data, the first steps
_CLUSTER = re.compile(r"(?:(\d+)x)?(\d+)x([A-Za-z]+\d*[A-Za-z]*)")


@dataclass(frozen=True)
class StatedCluster:
    """Nodes, devices on each, and their kind."""

    nodes: int
    devices: int
    kind: str

    @classmethod
    def parse(cls, text: str) -> StatedCluster:
        """Read 8x8xH100, 64xH100 or 2xcpu. Raises UsageError, which names --cluster, for anything else."""
        match = _CLUSTER.fullmatch(text.strip())
        kinds = {kind.lower(): kind for kind in (*GPUS, CPU)}
        if match is None:
            raise UsageError(f"--cluster: '{text}' is not of the form NODESxDEVICESxKIND, such as 8x8xH100, 64xH100 or 2xcpu.")
        nodes, devices, kind = match.groups()
        if kind.lower() not in kinds:
            raise UsageError(unknown("--cluster", kind, list(kinds.values()), what="kind of device"))
        n, kind = int(devices), kinds[kind.lower()]
        if not n or (nodes is not None and not int(nodes)):
            raise UsageError(f"--cluster: '{text}' has no devices; give at least 1x{kind}.")
        if nodes is None and kind != CPU and n > PER_NODE:
            if n % PER_NODE:
                raise UsageError(f"--cluster: {n} GPUs are no nodes of {PER_NODE}; write NODESxDEVICESx{kind}.")
            return cls(n // PER_NODE, PER_NODE, kind)
        return cls(int(nodes or 1), n, kind)

    @property
    def on_gpus(self) -> bool:
        """Whether its devices are GPUs."""
        return self.kind != CPU

    @property
    def gpu(self) -> GPU:
        """One of its GPUs."""
        return GPU("0", self.kind, int(GPUS[self.kind][1]))

    def node(self) -> tuple[Device, ...]:
        """The devices of one node, with their slots and memory."""
        if not self.on_gpus:
            return (Device(None, self.devices),)
        return tuple(Device(str(i), 1, self.gpu.memory) for i in range(self.devices))

    def __str__(self) -> str:
        return f"{self.nodes}x{self.devices}x{self.kind}"


SHOWN = ("name", "cluster", "cells", "flops", "price", "disk_bytes", "basis", "bound")


@dataclass(frozen=True)
class ClusterEstimate:
    """What the remaining cells of a sweep take on a cluster; times in seconds.

    Attributes:
        cells: Cells that are left to train.
        time: Until the last cell is done.
        device_hours: Of all attempts from start to end, including work that failures undid.
        price: Of a device-hour; `cost` is None without it.
        disk_bytes: Most disk that the cells take together.
        bound: What limits the likely time: "work", the devices being busy, or "chain".
        chain: The longest chain of cells that wait for one another, by name, with its seconds.
        course: The likely course.
    """

    name: str
    cluster: str
    cells: int
    flops: float
    time: TimeRange
    device_hours: TimeRange
    price: float | None
    disk_bytes: int
    chain: tuple[str, ...]
    chain_s: float
    course: Simulation = field(repr=False)
    basis: str
    resources: str

    @property
    def bound(self) -> str:
        """What limits the likely time: "work" or "chain"."""
        return "chain" if self.chain_s >= self.course.lower_bound * (1 - 1e-9) else "work"

    def bound_in_words(self) -> str:
        """What limits the likely time, in words, with a remedy if that is a single cell."""
        if self.bound == "work":
            return "work: the devices are busy"
        most = max((attempt.devices for attempt in self.course.attempts if attempt.run_id == self.chain[-1]), key=len)
        more = "; more processes for it ([resources]) shorten the sweep" if len(most) == 1 else ""
        return f"{' → '.join(self.chain)}, which takes {self.chain_s / HOUR:,.4g} hours{more}"

    @property
    def cost(self) -> TimeRange | None:
        """Device-hours times their price."""
        return None if self.price is None else self.device_hours.scaled(self.price)

    def to_json(self) -> dict[str, Any]:
        """One record; ranges have the ends `_low` and `_high`."""
        hours = {"device_hours": "likely", "device_hours_low": "low", "device_hours_high": "high"}
        course = self.course
        return {
            **{key: getattr(self, key) for key in SHOWN},
            **time_fields(self.time),
            **{key: getattr(self.device_hours, end) for key, end in hours.items()},
            "cost": self.cost.likely if self.cost else None,
            "chain": list(self.chain),
            "chain_seconds": self.chain_s,
            "lower_bound_seconds": course.lower_bound,
            "lost_device_hours": course.lost / HOUR,
            "attempts": len(course.attempts),
            "takeovers": course.takeovers,
            "operations_per_s": dict(course.operations),
            "resources": self.resources,
        }

    def rows(self) -> list[tuple[str, str]]:
        """The estimate as rows of a table: name and value."""
        t, hours, course = self.time, self.device_hours, self.course
        table = [
            ("cells", f"{self.cells}, {self.flops:.2g} FLOPs"),
            ("time", f"{console.duration(t.likely)}, {console.duration_range(t.low, t.high)} ({self.basis})"),
            ("device-hours", "{}, {} to {}".format(*map(console.rough, (hours.likely, hours.low, hours.high)))),
            ("disk", f"{human_bytes(self.disk_bytes)} at the most"),
            ("bound by", self.bound_in_words()),
            ("least possible", f"{console.duration(course.lower_bound)}; {course.ratio:.3f} times that are taken"),
        ]
        if self.cost:
            table.insert(3, ("cost", f"{self.cost.likely:,.0f}, {self.cost.low:,.0f} to {self.cost.high:,.0f}"))
        if self.resources:
            table.append(("processes", self.resources))
        if interrupted := len(course.attempts) - self.cells:
            table.append(("interrupted", f"{interrupted} attempts, {console.rough(course.lost / HOUR)} device-hours undone"))
        rate = sum(course.operations.values())
        table.append(("file system", f"{console.rough(rate)} operations on names and attributes a second"))
        return table

    def plot(self, folder: Path | str) -> list[Path]:
        """Draw the likely course as a Gantt picture, `gantt.svg` and `gantt.png`; returns the files."""
        from ..analysis.draw import save
        from ..analysis.gantt import Span, gantt

        lanes = {device: i for i, device in enumerate(sorted({d for a in self.course.attempts for d in a.devices}))}
        spans = [Span(lanes[d], a.start, a.stop, len(a.devices), a.end) for a in self.course.attempts for d in a.devices]
        Path(folder).mkdir(parents=True, exist_ok=True)
        return save(gantt(spans, f"{self.name} on {self.cluster}"), Path(folder) / "gantt")


def simulate_sweep(
    sweep: Sweep | str | Path,
    cluster: str,
    *,
    runs: str | Path | None = None,
    sets: Sequence[str] = (),
    retry: str | None = None,
    price: float | None = None,
    failures: float = 0.0,
    preemptions: float = 0.0,
    slow: float = 0.0,
    seed: int = 0,
    force: bool = False,
) -> ClusterEstimate:
    """What the unfinished cells of a sweep take on `cluster` ("8x8xH100"); nothing is written or prepared.

    Arguments:
        sweep: A sweep file, the name of a built-in one, the folder of a recorded sweep, or an open `Sweep`.
        cluster: Nodes, devices on each, and their kind.
        runs: The folder of runs.
        sets: `key=value` items that overrule every cell.
        retry: Which cells that ended without a result count as not done, as in `questctl.run_sweep`.
        price: Of a device-hour, in any currency.
        failures: How often a node fails, per hour.
        preemptions: How often a node is taken away and given back, per hour.
        slow: Share of the nodes that take half as long again.
        seed: Of failures, preemptions and slow nodes.
        force: Include cells that need more memory than a device has.

    Raises UsageError for a text that names no cluster, a rate below 0, and cells that fit on no node; and what `open_sweep`
    raises.
    """
    stated = StatedCluster.parse(cluster)
    _check(price=price, failures=failures, preemptions=preemptions, slow=slow)
    opened = open_sweep(sweep, runs=runs, sets=sets)
    devices = [stated.gpu] if stated.on_gpus else []
    opened = settle(opened, devices)
    cells = remaining_cells(opened, states_to_retry(retry, opened))
    if stated.on_gpus and not force:
        require_memory(cells, devices)
    needed = _needs(cells, stated, force)
    times, basis = _times(cells, opened, stated)
    start_s = START_S if stated.on_gpus else CPU_START_S
    on = Cluster(stated.nodes, stated.node(), start_s, failures=failures, preemptions=preemptions, slow=slow)
    courses = {
        end: simulate(_jobs(cells, needed, {name: getattr(time, end) for name, time in times.items()}), on, seed=seed)
        for end in ("low", "likely", "high")
    }
    configs = sized(cells)
    chain, chain_s = longest_chain(_jobs(cells, needed, {name: time.likely for name, time in times.items()}), on)
    return ClusterEstimate(
        name=opened.file.name,
        cluster=str(stated),
        cells=len(cells),
        flops=sum(c.new_tokens * flops_per_token(c) for c in configs),
        time=_range({end: course.makespan for end, course in courses.items()}),
        device_hours=_range({end: course.busy / HOUR for end, course in courses.items()}),
        price=price,
        disk_bytes=disk_bytes_together(configs, stated.nodes * stated.devices),
        chain=chain,
        chain_s=chain_s,
        course=courses["likely"],
        basis=basis,
        resources=in_words(cells),
    )


def _check(**rates: float | None) -> None:
    for name, rate in rates.items():
        if rate is not None and not 0 <= rate < math.inf:
            raise UsageError(f"--{name}: {rate:g} is not a number from 0 on.")
    if (rates["slow"] or 0) > 1:
        raise UsageError(f"--slow: {rates['slow']:g} is not a share of the nodes, from 0 to 1.")


def _needs(cells: Sequence[Cell], stated: StatedCluster, force: bool) -> dict[str, Need]:
    """Run id → its need on a node. Raises UsageError for the first cell that fits on no node of the cluster."""
    needed = needs(cells, memory=stated.on_gpus)
    if force and stated.on_gpus:
        most = stated.gpu.memory
        needed = {name: replace(need, memory=min(need.memory, most)) for name, need in needed.items()}
    for cell in cells:
        if cell.nodes > stated.nodes:
            raise UsageError(f"--cluster: {cell.run_id} takes {cell.nodes} nodes, and {stated} has {stated.nodes}.")
        if first_fit(stated.node(), needed[cell.run_id]) is None:
            raise UsageError(
                f"--cluster: {cell.run_id} takes {needed[cell.run_id].processes} processes on a node, and {stated} has "
                f"{stated.devices} devices there; set nproc or nodes in [resources]."
            )
    return needed


def _times(cells: Sequence[Cell], sweep: Sweep, stated: StatedCluster) -> tuple[dict[str, TimeRange], str]:
    """Run id → seconds on the cell's devices; and from what they are estimated."""
    rows, basis = cell_costs(cells, sweep.store, jobs=stated.devices, cpus=1, here=not stated.on_gpus, on_gpus=stated.on_gpus)
    known = {row.run_id: row.time for row in rows if row.time is not None}
    if len(known) < len(cells) and not stated.on_gpus:
        raise UsageError(f"--cluster: {stated}: the time of a step on this CPU is not known ({basis}).")
    if len(known) < len(cells):
        peak = GPUS[stated.kind][0]
        shares = f"{SHARES[0]:.0%} to {SHARES[-1]:.0%}".replace("%", " %")
        basis = f"not measured: {shares} of the {peak / 1e12:g} TFLOP/s of the {stated.kind}"
        known = {
            cell.run_id: _by_peak(config, peak).scaled(1 / speedup(cell.nproc))
            for cell, config in zip(cells, sized(cells), strict=True)
        }
    return {cell.run_id: known[cell.run_id] for cell in cells}, basis


def _by_peak(config: RunConfig, peak: float) -> TimeRange:
    """Seconds of training and validation at the shares of a peak, in operations a second."""
    work = tokens_of_work(config) * flops_per_token(config)
    low, likely, high = (work / (share * peak) for share in reversed(SHARES))
    return TimeRange(low, likely, high)


def _jobs(cells: Sequence[Cell], needed: Mapping[str, Need], seconds: Mapping[str, float]) -> list[Job]:
    """The cells as jobs of the simulation, in the order in which workers take them."""
    names = {cell.run_id: cell.config for cell in cells}
    jobs = []
    for cell in in_turn(cells):
        branch, trunk, leaves = cell.config.branch, "", 1.0
        if branch and branch.source in names:
            trunk, leaves = branch.source, branch.step / names[branch.source].train.steps
        t = cell.config.train
        kept = t.steps / t.steps_between_checkpoints
        jobs.append(Job(cell.run_id, seconds[cell.run_id], needed[cell.run_id], cell.nodes, trunk, leaves, kept))
    return jobs


def _range(ends: Mapping[str, float]) -> TimeRange:
    low, likely, high = ends["low"], ends["likely"], ends["high"]
    return TimeRange(min(low, likely), likely, max(high, likely))
