"""Run sweeps from Python: train the cells that are not done yet, or estimate what they would cost.

    run_sweep         train a sweep file on this machine, with SLURM or with Ray
    estimate_sweep    operations, time, memory and disk, cell by cell, without writing anything
    launch_commands   the job script or the command lines that a launcher would start

Messages for the user while a sweep runs go to the logger `questctl.sweep` (what was submitted, texts that are read too often).
The progress of the cells is passed to the callback `watch`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import console
from ..config import DataConfig, human_bytes
from ..data.size_estimate import BYTES, CorpusEstimate, estimate_corpus
from ..errors import UsageError, unknown
from .costs import TimeRange, disk_bytes_together, flops_per_token, sized, wall_time
from .estimate import CellCost, cell_costs, time_fields
from .launchers import slurm
from .launchers.local import launch
from .launchers.options import LauncherOptions, RayOptions, SlurmOptions, launcher_options
from .manifest import DataProgress, Sweep, check_inputs, check_join, join, open_sweep
from .node import nodes_of_job
from .outcomes import SETTLED, Outcome, Watch, read_outcomes, reset
from .resources import in_words, settle
from .slots import GPU, Slot, divided, require_memory, require_places, slots, that_fit, useful_threads, visible_gpus
from .stopping import stopping_of
from .sweep_file import Cell

logger = logging.getLogger(__name__)
RETRY = {  # name → states to train again
    "failed": ("failed",),
    "diverged": ("diverged",),
    "all": ("failed", "diverged"),
    "stopped": ("stopped",),
}


def run_sweep(
    sweep: Sweep | str | Path,
    *,
    runs: str | Path | None = None,
    sets: Sequence[str] = (),
    launcher: LauncherOptions | str = "local",
    retry: str | None = None,
    force: bool = False,
    wait: bool = False,
    threads: int = 0,
    leave: bool = False,
    helping: bool = False,
    record: bool = True,
    watch: Watch | None = None,
    data_progress: DataProgress | None = None,
) -> list[Outcome]:
    """Train every cell of a sweep that is not finished yet; returns the outcome of each cell, in the order of the file.

    `sweep` is a sweep file, the name of a built-in one, the folder of a recorded sweep, or an open `Sweep`; `runs` is the
    folder of runs (default `$QUESTCTL_RUNS` or `runs/`), and `sets` are `key=value` items that overrule every cell.

    Arguments:
        launcher: Where workers start. A name (local, slurm, ray) takes the options in the sweep file's table [launcher.NAME];
            `LauncherOptions(jobs=2)`, `SlurmOptions(…)` and `RayOptions(…)` are used as they are.
        retry: Train cells again that ended as "failed", "diverged", "all" (both) or "stopped". They resume from their last
            good checkpoint. Cells that were stopped early also go on if the sweep has no [stop].
        force: Mix versions of the code or of a text, and train cells that seem too large for the device.
        wait: With SLURM, return when all cells are settled; otherwise the call returns once the job is submitted.
        threads: CPU threads of each run on this machine; 0 divides the CPUs among the runs, and gives tiny models one.
        leave: Return as soon as no cell is free, even while other workers still train some.
        helping: Leave cells that are too large for this machine, or need several nodes, to other workers.
        record: Write the sweep's manifest beside its runs, so that workers elsewhere can join it.
        watch: Called with the outcomes of all cells every half second or so.
        data_progress: Called with the source of each text that is prepared; returns the callback for that preparation.

    Call it from the main thread, where signals arrive. The same call continues after an interruption.

    Raises:
        UsageError, DataError, StorageError: A sweep file, a text, the folder or a cell's size cannot be used; nothing was
            written.
        MissingDependency: The launcher is not installed.
        RunFailed: The workers or the job ended before all cells were settled. (A cell that fails raises nothing.)
        Preempted, KeyboardInterrupt: A signal stopped the sweep; every run has written a checkpoint.
    """
    sweep = open_sweep(sweep, runs=runs, sets=sets)
    options = launcher_options(launcher, sweep.file.launchers)
    sweep = settle(sweep, _devices(options))
    retry_states = states_to_retry(retry, sweep)
    remaining = remaining_cells(sweep, retry_states)
    job = sweep.folder.resolve() if helping and nodes_of_job() > 1 else None
    places = _places(sweep, options, [] if helping else remaining)
    mine = that_fit(remaining, places, nodes_of_job()) if helping else remaining
    if remaining and not mine and not leave:
        raise UsageError(
            f"{sweep.file.name}: none of the {len(remaining)} cells that remain fits on this machine ([resources])."
        )
    if mine and not force:
        require_memory(mine, _devices(options))
    _require_launcher(options)
    if remaining and record:
        join(sweep, remaining, force=force, data_progress=data_progress)
    elif remaining:
        check_inputs(remaining, sweep.store, data_progress)
    _warn(remaining, {data: estimate_corpus(data) for data in {cell.config.data for cell in remaining}})
    if again := reset(remaining, sweep.store, retry_states):
        logger.info("%d cells are tried again", len(again))
    if isinstance(options, SlurmOptions):
        return slurm.launch(sweep, options, remaining=remaining, wait=wait, watch=watch)
    if isinstance(options, RayOptions):
        from .launchers import ray

        return ray.launch(sweep, options, force=force, watch=watch)
    start = partial(launch, places=[Slot()] if job else places, threads=threads, leave=leave, watch=watch)
    return start(sweep.cells, sweep.store, stopping=stopping_of(sweep), job=job)


@dataclass(frozen=True)
class SweepEstimate:
    """What a sweep would take. The totals count the cells that are still to train; times are estimates.

    Attributes:
        cells: One cost for each cell, in the order of the sweep file.
        values: The varied values of each cell (dotted key → value).
        remaining: Number of cells to train.
        flops: Operations of the remaining cells.
        least_flops: Operations if [stop] ends every cell that it may at its first look but one of each group of alternatives;
            `flops` without [stop].
        shared_flops: Operations that branches do not repeat, because they leave trunks.
        time: Time until the last of them is done, with `jobs` at a time; None if that of a cell is unknown.
        all_at_once: Whether `jobs` assumes that a cluster takes all cells at once, because no number was set.
        basis: What the times are estimated from.
        disk_bytes: Most disk that the remaining cells take together.
        vocabulary_unknown: Sources whose vocabulary is not known before they are prepared; it counts as 256 ids.
        resources: How many processes the remaining cells take, in words; empty if each takes one.
    """

    name: str
    description: str
    cells: tuple[CellCost, ...]
    values: tuple[Mapping[str, Any], ...]
    remaining: tuple[CellCost, ...]
    flops: float
    least_flops: float
    shared_flops: float
    time: TimeRange | None
    jobs: int
    all_at_once: bool
    basis: str
    disk_bytes: int
    vocabulary_unknown: tuple[str, ...]
    resources: str = ""

    @property
    def seconds(self) -> float | None:
        """The likely time."""
        return self.time.likely if self.time else None

    @property
    def memory_bytes(self) -> int:
        """The least memory that the largest remaining cell needs."""
        return max((cell.memory_bytes for cell in self.remaining), default=0)

    def sentences(self) -> Iterator[str]:
        """What the remaining cells take together, and what is not known, in words."""
        if not self.remaining:
            yield f"{len(self.cells)} cells, 0 to train."
            return
        together = f"if the cluster takes all {self.jobs} at once" if self.all_at_once else f"with {self.jobs} at a time"
        n, t = len(self.cells), self.time
        time = f"{console.duration_range(t.low, t.high)} {together} ({self.basis})" if t else f"time {self.basis}"
        yield (
            f"{n} cell{'s' * (n != 1)}, {len(self.remaining)} to train: {self.flops:.2g} FLOPs, {time}; the largest needs "
            f"{human_bytes(self.memory_bytes)} of memory, all together at most {human_bytes(self.disk_bytes)} of disk."
        )
        if self.least_flops < self.flops:
            yield f"[stop] may end cells early: at least {self.least_flops:.2g} FLOPs, if one of each group goes on."
        if self.resources:
            yield self.resources
        if self.shared_flops:
            yield f"Branches take over {self.shared_flops:.2g} FLOPs of their trunks, which are not counted."
        if self.vocabulary_unknown:
            sources = ", ".join(self.vocabulary_unknown)
            yield f"The vocabulary of {sources} is not known before it is prepared; it is counted as {BYTES} ids."

    def to_dict(self) -> dict[str, Any]:
        """The estimate for JSON."""
        total = {
            "cells": len(self.cells),
            "left": len(self.remaining),
            "flops": self.flops,
            "least_flops": self.least_flops,
            "shared_flops": self.shared_flops,
            **time_fields(self.time),
            **{k: getattr(self, k) for k in ("jobs", "basis", "disk_bytes")},
            "vocabulary_unknown": list(self.vocabulary_unknown),
        }
        cells = [{**cell.to_json(), "values": dict(values)} for cell, values in zip(self.cells, self.values, strict=True)]
        return {"sweep": self.name, "cells": cells, "total": total}


def estimate_sweep(
    sweep: Sweep | str | Path,
    *,
    runs: str | Path | None = None,
    sets: Sequence[str] = (),
    launcher: LauncherOptions | str = "local",
    retry: str | None = None,
    force: bool = False,
    record: bool = True,
) -> SweepEstimate:
    """What `run_sweep` with these arguments would take. Nothing is written or prepared.

    Models unlike all finished runs are timed for a second each in a separate process, if they train on this CPU.

    Raises UsageError, DataError or StorageError for anything that `run_sweep` would refuse, as far as known beforehand.
    """
    sweep = open_sweep(sweep, runs=runs, sets=sets)
    options = launcher_options(launcher, sweep.file.launchers)
    sweep = settle(sweep, _devices(options))
    retry_states = states_to_retry(retry, sweep)
    on_cluster = isinstance(options, SlurmOptions | RayOptions)
    places = _places(sweep, options, remaining_cells(sweep, retry_states))
    jobs = options.jobs or (len(sweep.cells) if on_cluster else len(places))
    cpus = divided(places)[0].cpus if places else 0
    rows, basis = cell_costs(sweep.cells, sweep.store, jobs=jobs, cpus=cpus, here=not on_cluster, retry=retry_states)
    to_train = [row.state not in SETTLED or row.state in retry_states for row in rows]
    remaining = tuple(row for row, trains in zip(rows, to_train, strict=True) if trains)
    cells = [cell for cell, trains in zip(sweep.cells, to_train, strict=True) if trains]
    texts = check_join(sweep, cells, force=force or not record) if cells else {}
    _warn(cells, texts)
    if not force:
        require_memory(cells, _devices(options))
    configs = sized(cells)
    times = [row.time for row in remaining if row.time is not None]
    places_each = [1 if on_cluster else row.nproc for row in remaining]  # on a cluster, a place is for a whole cell
    return SweepEstimate(
        name=sweep.file.name,
        description=sweep.file.description,
        cells=tuple(rows),
        values=tuple(cell.values for cell in sweep.cells),
        remaining=remaining,
        flops=sum(row.flops for row in remaining),
        least_flops=_least_flops(sweep, cells, [row.flops for row in remaining]),
        shared_flops=sum((c.tokens - c.new_tokens) * flops_per_token(c) for c in configs if c.branch),
        time=wall_time(times, jobs, places_each) if len(times) == len(remaining) else None,
        jobs=jobs,
        all_at_once=on_cluster and not options.jobs,
        basis=basis,
        disk_bytes=disk_bytes_together(configs, jobs),
        vocabulary_unknown=tuple(sorted({c.data.source for c in configs if not c.model.vocab_size})),
        resources=in_words(cells),
    )


def launch_commands(
    sweep: Sweep | str | Path, *, launcher: LauncherOptions | str = "local", force: bool = False, **source: Any
) -> str:
    """The batch script for SLURM, the tasks for Ray, or the command lines of workers on this machine.

    `source` holds the arguments `runs` and `sets` of `run_sweep`. The sweep's manifest is written, because workers read it;
    nothing is started. Raises what `run_sweep` raises before it starts anything.
    """
    sweep = open_sweep(sweep, **source)
    options = launcher_options(launcher, sweep.file.launchers)
    sweep = settle(sweep, _devices(options))
    remaining = remaining_cells(sweep, states_to_retry(None, sweep))
    places = _places(sweep, options, remaining)
    if remaining:
        if not force:
            require_memory(remaining, _devices(options))
        join(sweep, remaining, force=force)
    if isinstance(options, SlurmOptions):
        return slurm.scripts(sweep, options, remaining)
    if isinstance(options, RayOptions):
        from .launchers import ray

        return "\n".join(ray.described(sweep, options))
    if any(cell.nproc > 1 for cell in sweep.cells):
        return f"questctl worker {sweep.folder} --jobs {len(places)}"
    threads = max(useful_threads(cell.config, divided(places)[0].cpus) for cell in sweep.cells)
    pinned = [f"CUDA_VISIBLE_DEVICES={slot.gpu} " if slot.gpu is not None else "" for slot in places]
    return "\n".join(f"{gpu}questctl worker {sweep.folder} --jobs 1 --threads {threads} &" for gpu in pinned) + "\nwait"


def states_to_retry(retry: str | None, sweep: Sweep) -> tuple[str, ...]:
    """The states that a value of `retry` names, and `stopped` in a sweep without [stop]. Raises UsageError for another word."""
    if retry is not None and retry not in RETRY:
        raise UsageError(unknown("--retry", retry, RETRY))
    go_on = () if sweep.file.stop else ("stopped",)
    return tuple(dict.fromkeys((*(RETRY[retry] if retry else ()), *go_on)))


def remaining_cells(sweep: Sweep, retry_states: Collection[str] = ()) -> list[Cell]:
    """The cells that are still to be trained, those in one of `retry_states` included."""
    outcomes = read_outcomes(sweep.cells, sweep.store)
    return [c for c, outcome in zip(sweep.cells, outcomes, strict=True) if not outcome.settled or outcome.state in retry_states]


def _require_launcher(options: LauncherOptions) -> None:
    """Raises MissingDependency if the launcher is not installed, UsageError if its cluster does not answer."""
    if isinstance(options, SlurmOptions):
        slurm.require()
    if isinstance(options, RayOptions):
        from .launchers import ray

        ray.require(options.address)


def _places(sweep: Sweep, options: LauncherOptions, cells: Sequence[Cell]) -> list[Slot]:
    """The slots of this machine; none if a cluster trains. Raises UsageError if one of `cells` takes more than these."""
    if isinstance(options, SlurmOptions | RayOptions):
        return []
    places = slots(sweep.cells, options.jobs, options.jobs_per_gpu)
    require_places(cells, places)
    return places


def _devices(options: LauncherOptions) -> list[GPU]:
    """The devices, as far as known here; every cell must fit on one of them."""
    if isinstance(options, SlurmOptions | RayOptions):
        return [GPU("", "launcher.*.gpu_memory_gib", int(options.gpu_memory_gib * 2**30))]
    return visible_gpus()


def _least_flops(sweep: Sweep, cells: Sequence[Cell], flops: Sequence[float]) -> float:
    """Operations of `cells` if all that may be stopped end at their first look, except the longest of each group."""
    rule = stopping_of(sweep)
    if rule is None:
        return sum(flops)
    whole: dict[str, float] = {}
    total = 0.0
    for cell, work in zip(cells, flops, strict=True):
        if rule.exempt(cell, sweep.store.run(cell.run_id)):
            total += work
            continue
        steps, own = cell.config.train.steps, cell.config.new_tokens / cell.config.tokens
        saved = min(work, work / own * (1 - rule.rule.marks(steps)[0] / steps)) if own else 0.0
        group = rule.groups[cell.run_id]
        total += work - saved
        whole[group] = max(whole.get(group, 0.0), saved)
    return total + sum(whole.values())


def _warn(cells: Sequence[Cell], texts: Mapping[DataConfig, CorpusEstimate]) -> None:
    """Log each kind of warning of texts and warm-ups once, about the worst cell, and how many others it concerns."""

    def passes(cell: Cell) -> tuple[float, str]:
        text = texts[cell.config.data]
        return text.passes(cell.config) or 0.0, text.repetition_warning(cell.config)

    def evaluation(cell: Cell) -> tuple[float, str]:
        text = texts[cell.config.data]
        return -(text.val_tokens or 0), text.evaluation_warning(cell.config)

    def haste(cell: Cell) -> tuple[float, str]:
        return -cell.config.warmup_steps, cell.config.warmup_warning

    for doubt in (passes, evaluation, haste):
        first = {id(cell.first): cell for cell in reversed(cells)}  # one for all that differ only in their seeds
        known = {key: doubt(cell) for key, cell in first.items()}
        doubtful = [(*known[id(cell.first)], cell.run_id) for cell in cells if known[id(cell.first)][1]]
        if doubtful:
            _, warning, name = max(doubtful, key=lambda row: row[0])
            others = f" The same holds for {len(doubtful) - 1} of the other cells." if len(doubtful) > 1 else ""
            logger.warning("%s: %s%s", name, warning, others)
    for sentence in dict.fromkeys(sentence for text in texts.values() for sentence in text.doubts):
        logger.warning("%s", sentence)
