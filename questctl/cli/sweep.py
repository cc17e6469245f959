"""`questctl sweep SWEEP`: the runs of a sweep file, here or on a cluster; what is done is not done again."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .. import console
from ..config import DataConfig, RunConfig, human_count, parse_value
from ..data.size_estimate import BYTES, CorpusEstimate, estimate_corpus
from ..errors import RunFailed, SweepFailed, UsageError, unknown
from ..store import RunStore
from ..sweep.costs import Speed, costs, disk_bytes_together, flops_per_token, seconds, sized, wall_seconds
from ..sweep.launchers import slurm
from ..sweep.launchers.local import launch
from ..sweep.launchers.options import LauncherOptions, RayOptions, SlurmOptions
from ..sweep.launchers.options import options as launcher_options
from ..sweep.manifest import Sweep, check_inputs, join, join_dry
from ..sweep.outcomes import SETTLED, Outcome, OutcomeReader, reset
from ..sweep.slots import GPU, require_memory, slots
from ..sweep.slots import gpus as gpus_here
from ..sweep.sweep_file import Cell, SweepFile, find_sweep_file, load_sweep_file
from ..system import cpu_count
from . import options as opt

RETRY = {"failed": ("failed",), "diverged": ("diverged",), "all": ("failed", "diverged")}
QUEUE_POLL_S = 5.0

JobsPerGPU = Annotated[str | None, typer.Option(help="Runs that share a GPU; auto: as many as fit.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Mix code versions or texts; train what seems too large.")]
OF_SLURM, OF_RAY, OF_CLUSTERS = "SLURM", "Ray", "SLURM and Ray"


def command(
    file: Annotated[
        str, typer.Argument(metavar="SWEEP", show_default=False, help="TOML file, or the name of a built-in sweep file.")
    ],
    runs: opt.RunsDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells and what they cost; write nothing.")] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one a GPU, or one a core.", show_default=False)
    ] = None,
    jobs_per_gpu: JobsPerGPU = None,
    retry: Annotated[str | None, typer.Option(help="Train these anew: failed, diverged, all.", show_default=False)] = None,
    set_: opt.Set = None,
    track: opt.Track = None,
    as_json: opt.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    force: Force = False,
    launcher: Annotated[str, typer.Option("--launcher", "-l", help="Where workers start: local, slurm, ray.")] = "local",
    emit: Annotated[bool, typer.Option("--emit", help="Print what would be submitted or started; start nothing.")] = False,
    gpus: Annotated[
        str | None,
        typer.Option(help="Of a SLURM task (2, a100:2), of a Ray run (0.25).", show_default=False, rich_help_panel=OF_CLUSTERS),
    ] = None,
    cpus: Annotated[
        str | None, typer.Option(help="Cores of a task or run.", show_default=False, rich_help_panel=OF_CLUSTERS)
    ] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch.", show_default=False, rich_help_panel=OF_SLURM)] = None,
    partition: Annotated[str | None, typer.Option(help="As sbatch.", show_default=False, rich_help_panel=OF_SLURM)] = None,
    time_: Annotated[
        str | None, typer.Option("--time", help="As sbatch, of one task.", show_default=False, rich_help_panel=OF_SLURM)
    ] = None,
    constraint: Annotated[str | None, typer.Option(help="As sbatch.", show_default=False, rich_help_panel=OF_SLURM)] = None,
    modules: Annotated[
        list[str] | None, typer.Option(help="LoadedRun first (repeatable).", show_default=False, rich_help_panel=OF_SLURM)
    ] = None,
    container: Annotated[
        str | None, typer.Option(help="Image for apptainer exec.", show_default=False, rich_help_panel=OF_SLURM)
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Watch the job until the sweep is finished.", rich_help_panel=OF_SLURM)
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a cluster, or auto.", show_default=False, rich_help_panel=OF_RAY)
    ] = None,
) -> None:
    """Train every cell of a sweep file that is not finished yet. Interrupt it at will: the same command goes on.

    Exit code 0: all cells are done; 3: finished, but some failed or diverged (the table says why; --retry trains them again).
    """
    if retry is not None and retry not in RETRY:
        raise UsageError(unknown("--retry", retry, RETRY))
    sweep = Sweep(load_sweep_file(find_sweep_file(file), set_ or []), RunStore(opt.runs_dir(runs)))
    flags = {
        "jobs": jobs,
        "jobs_per_gpu": _parsed(jobs_per_gpu),
        "gpus": gpus if launcher == "slurm" else _parsed(gpus),
        "cpus": _parsed(cpus),
        "account": account,
        "partition": partition,
        "time": time_,
        "constraint": constraint,
        "modules": modules or None,
        "container": container,
        "address": address,
    }
    options = launcher_options(launcher, sweep.file.launchers.get(launcher, {}), flags)
    if wait and not isinstance(options, SlurmOptions):
        raise UsageError(f"--wait: is an option of --launcher slurm; {launcher} always waits.")
    opt.track(track)
    if dry_run:
        show_costs(sweep, options, retry=retry, as_json=as_json, force=force)
        return
    if emit:
        console.say(emitted(sweep, options, force=force))
        return
    outcomes = run_sweep(sweep, options, retry=retry, quiet=quiet, force=force, wait=wait)
    if outcomes is None:
        return
    report(sweep, outcomes, as_json=as_json)


def _parsed(word: str | None) -> Any:
    return None if word is None else parse_value(word)


def report(sweep: Sweep, outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """What became of the cells; raises SweepFailed if some failed or diverged."""
    file = sweep.file
    if as_json:
        cells = [{**asdict(seen), "values": cell.values} for cell, seen in zip(file.cells, outcomes, strict=True)]
        console.print_json({"sweep": file.name, "runs": str(sweep.store.root), "cells": cells})
    else:
        show_outcomes(file, outcomes)
    n = Counter(seen.state for seen in outcomes)
    bad = [state for state in RETRY["all"] if n[state]]
    if bad:
        what = " and ".join(f"{n[state]} {state}" for state in bad)
        raise SweepFailed(f"{what} of {len(outcomes)} cells; --retry {bad[0] if len(bad) == 1 else 'all'} tries again.")


def unsettled(sweep: Sweep, again: Collection[str] = ()) -> list[Cell]:
    """The cells that are still to be trained, those in a state of `again` among them."""
    outcomes = OutcomeReader(sweep.file.cells, sweep.store)()
    return [c for c, seen in zip(sweep.file.cells, outcomes, strict=True) if not seen.settled or seen.state in again]


def run_here(
    file: SweepFile, store: RunStore, *, jobs: int = 0, retry: str | None = None, quiet: bool = False
) -> list[Outcome]:
    """Drain a sweep file on this machine, for a command of which it is a part; nothing is recorded for workers elsewhere."""
    options = LauncherOptions(jobs=jobs)
    outcomes = run_sweep(Sweep(file, store), options, retry=retry, quiet=quiet, recorded=False)
    assert outcomes is not None, "the local launcher waits"
    return outcomes


def run_sweep(
    sweep: Sweep,
    options: LauncherOptions,
    *,
    retry: str | None = None,
    threads: int = 0,
    leave: bool = False,
    quiet: bool = False,
    force: bool = False,
    wait: bool = False,
    recorded: bool = True,
) -> list[Outcome] | None:
    """Drain a sweep file and return what became of each cell; None if a job was submitted that nobody waits for.

    `retry` is a word of RETRY, `threads` and `leave` those of `launch`. Raises UsageError, DataError or StorageError if the
    code, a corpus, the folder or a cell's size cannot be used, before anything is written; see the launchers for the rest.
    """
    file, store = sweep.file, sweep.store
    again = RETRY[retry] if retry else ()
    left = unsettled(sweep, again)
    if left and not force:
        require_memory(left, _devices(options))
    launcher = _launcher(options)
    if left and recorded:
        join(sweep, left, force=force)
    elif left:
        check_inputs(left, store)
    _warn_of_repeats(left, {data: estimate_corpus(data) for data in {cell.config.data for cell in left}})
    if again:
        console.note(f"{len(reset(left, store, again))} cells are tried again")
    places = slots(file.cells, options.jobs, options.jobs_per_gpu) if launcher == "local" else []
    view = View(file, options.jobs or len(places) or len(left), quiet=quiet)
    try:
        if isinstance(options, SlurmOptions):
            return _on_slurm(sweep, options, view, left=len(left), wait=wait)
        if isinstance(options, RayOptions):
            from ..sweep.launchers import ray

            return ray.launch(sweep, options, force=force, watch=view)
        return launch(file.cells, store, places=places, threads=threads, leave=leave, watch=view)
    except KeyboardInterrupt:
        view.close()
        done = sum(seen.state == "done" for seen in OutcomeReader(file.cells, store)())
        console.note(f"{done} of {len(file.cells)} cells are done; the same command goes on where this one stopped.")
        raise
    finally:
        view.close()


def _launcher(options: LauncherOptions) -> str:
    """The name of the options' launcher. Raises MissingDependency if that is not installed, UsageError if nobody answers."""
    if isinstance(options, SlurmOptions):
        slurm.require()
        return "slurm"
    if isinstance(options, RayOptions):
        from ..sweep.launchers import ray

        ray.require(options.address)
        return "ray"
    return "local"


def _devices(options: LauncherOptions) -> list[GPU]:
    """What the cells of a sweep file must fit on, as far as it is known here."""
    if isinstance(options, SlurmOptions | RayOptions):
        return [GPU("", "launcher.*.gpu_memory_gib", int(options.gpu_memory_gib * 2**30))]
    return gpus_here()


def _on_slurm(sweep: Sweep, options: SlurmOptions, view: View, *, left: int, wait: bool) -> list[Outcome] | None:
    """Submit the workers; with `wait`, watch the folder until all cells are settled."""
    progress = OutcomeReader(sweep.file.cells, sweep.store)
    if not left:
        return progress()
    job = slurm.submit(sweep, slurm.script(sweep, options, left=left))
    console.note(f"submitted job {job}: workers for {left} cells, output in {sweep.folder}")
    if not wait:
        console.note("questctl runs ls shows how far they are; the same command adds workers for what is left")
        return None
    while not all(seen.settled for seen in progress()):
        view(progress.last)
        if not slurm.workers_queued(job) and not all(seen.settled for seen in progress()):
            here = sweep.folder / f"slurm-{job}_*.out"
            raise RunFailed(f"job {job} ended before all cells were trained; see {here}; the same command goes on.")
        time.sleep(QUEUE_POLL_S)
    return progress.last


def emitted(sweep: Sweep, options: LauncherOptions, *, force: bool) -> str:
    """What would be submitted or started, to be used as it is; records the sweep, which it refers to."""
    left = unsettled(sweep)
    if left and not force:
        require_memory(left, _devices(options))
    if left:
        join(sweep, left, force=force)
    worker = f"questctl worker {sweep.folder}"
    if isinstance(options, SlurmOptions):
        return slurm.script(sweep, options, left=max(1, len(left)))
    if isinstance(options, RayOptions):
        from ..sweep.launchers import ray

        return "\n".join(ray.described(sweep, options))
    places = slots(sweep.file.cells, options.jobs, options.jobs_per_gpu)
    threads = max(1, cpu_count() // len(places))
    pinned = [f"CUDA_VISIBLE_DEVICES={slot.gpu} " if slot.gpu is not None else "" for slot in places]
    return "\n".join(f"{gpu}{worker} --jobs 1 --threads {threads} &" for gpu in pinned) + "\nwait"


def show_costs(
    sweep: Sweep,
    options: LauncherOptions,
    *,
    retry: str | None = None,
    as_json: bool = False,
    force: bool = False,
    recorded: bool = True,
) -> None:
    """The dry run: a row for each cell, and the sum of what is to train.

    Raises UsageError for a cell that fits nowhere, and what the sweep would raise of its texts and its folder.
    """
    file, local = sweep.file, not isinstance(options, SlurmOptions | RayOptions)
    jobs = options.jobs or (len(slots(file.cells, 0, options.jobs_per_gpu)) if local else len(file.cells))
    rows, basis = costs(file.cells, sweep.store)
    left = [row for row in rows if row.state not in SETTLED or (retry and row.state in RETRY[retry])]
    names = {row.run_id for row in left}
    cells_left = [cell for cell in file.cells if cell.run_id in names]
    texts = join_dry(sweep, cells_left, force=force or not recorded) if cells_left else {}
    _warn_of_repeats(cells_left, texts)
    costed = sized(cells_left)
    if not force:
        require_memory(cells_left, _devices(options))
    disk = disk_bytes_together(costed, jobs)
    unsized = sorted({c.data.source for c in costed if not c.model.vocab_size})
    flops, wall = sum(row.flops for row in left), wall_seconds([row.seconds for row in left], jobs)
    if as_json:
        total = {
            "cells": len(rows),
            "left": len(left),
            "flops": flops,
            "seconds": wall,
            "jobs": jobs,
            "basis": basis,
            "disk_bytes": disk,
            "vocabulary_unknown": unsized,
        }
        cells = [{**asdict(row), "values": cell.values} for cell, row in zip(file.cells, rows, strict=True)]
        console.print_json({"sweep": file.name, "cells": cells, "total": total})
        return
    table = [
        (
            r.run_id,
            r.state,
            *map(human_count, (r.params_non_embedding, r.tokens)),
            f"{r.flops:.2g}",
            console.duration(r.seconds),
        )
        for r in rows
    ]
    console.print_table(("run", "state", "params", "tokens", "FLOPs", "time"), table, title=file.description, left=2)
    together = f"with {jobs} at a time" if local or options.jobs else f"if the cluster takes all {jobs} at once"
    about = f"{flops:.2g} FLOPs, about {console.duration(wall)} {together} ({basis})"
    memory = human_count(max((row.memory_bytes for row in left), default=0))
    needs = f"the largest needs {memory}B of memory, all together at most {disk / 2**20:,.1f} MiB of disk"
    console.say(f"{len(rows)} cells, {len(left)} to train" + (f": {about}; {needs}." if left else "."))
    if unsized:
        console.say(f"How many ids {', '.join(unsized)} has is not known before it is prepared; they count as {BYTES}.")


def _warn_of_repeats(cells: Sequence[Cell], texts: Mapping[DataConfig, CorpusEstimate]) -> None:
    """One warning for all cells that read their text too often, with the worst of them."""
    often = [cell for cell in cells if texts[cell.config.data].repeated(cell.config)]
    if often:
        worst = max(often, key=lambda cell: texts[cell.config.data].passes(cell.config) or 0.0)
        others = f" The same holds for {len(often) - 1} of the other cells." if len(often) > 1 else ""
        console.warn(f"{worst.run_id}: {texts[worst.config.data].repeated(worst.config)}{others}")


def show_outcomes(file: SweepFile, outcomes: Sequence[Outcome]) -> None:
    """What became of each cell, and for those that did not finish: why."""
    console.print_table(("run", "state", "step", "loss", "tok/s"), [_row(seen) for seen in outcomes], title=file.name, left=2)
    for seen in outcomes:
        if seen.state != "done":
            console.say(f"{seen.run_id} {seen.state}: {seen.message}")


def _row(seen: Outcome) -> tuple[Any, ...]:
    return seen.run_id, seen.state, f"{seen.step}/{seen.steps}", seen.loss, seen.tokens_per_s and round(seen.tokens_per_s)


class View:
    """How far a sweep is: a live table on a terminal; elsewhere a line when a cell is settled, and one now and then."""

    def __init__(self, file: SweepFile, jobs: int, *, quiet: bool = False) -> None:
        self.file, self.jobs, self.quiet = file, jobs, quiet
        columns = ("run", "state", "step", "loss", "tok/s", "ETA")
        self._live = console.LiveTable(columns, left=2, optional=("tok/s",)) if sys.stderr.isatty() else None
        self._start = self._last = time.monotonic()
        self._told: set[str] | None = None
        self._sized: dict[str, RunConfig] = {}  # by run id: the configs as they are costed

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        """Show these outcomes, one for each cell of the sweep file, in its order."""
        if self.quiet:
            return
        if self._live is not None:
            urgency = {"running": 0, "failed": 1, "diverged": 1, "preempted": 2, "pending": 2, "done": 3}
            first = sorted(outcomes, key=lambda seen: urgency[seen.state])[: self._live.room]
            shown = [seen for seen in outcomes if seen in first]
            self._live.update(((*_row(seen), _eta(seen)) for seen in shown), self._summary(outcomes))
            return
        settled = {seen.run_id: seen for seen in outcomes if seen.settled}
        told, self._told = self._told, set(settled)
        for run_id in settled.keys() - told if told is not None else ():
            seen = settled[run_id]
            console.note(f"{run_id}  {seen.state}  " + (f"loss {seen.loss:.4f}" if seen.loss is not None else seen.message))
        if time.monotonic() - self._last >= console.progress.PLAIN_INTERVAL_S:
            self._last = time.monotonic()
            console.note(self._summary(outcomes))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.close()

    def _summary(self, outcomes: Sequence[Outcome]) -> str:
        n = Counter(seen.state for seen in outcomes)
        text = f"{n['done']}/{len(outcomes)} done" + "".join(f", {n[s]} {s}" for s in ("running", "failed", "diverged") if n[s])
        return f"{self.file.name}: {text}, {console.duration(time.monotonic() - self._start)}{self._left(outcomes)}"

    def _left(self, outcomes: Sequence[Outcome]) -> str:
        """Time until the last cell is done, by the speeds seen in this sweep."""
        fresh = [cell for cell in self.file.cells if cell.run_id not in self._sized]
        self._sized |= {cell.run_id: config for cell, config in zip(fresh, sized(fresh), strict=True)}
        pairs = [(self._sized[cell.run_id], seen) for cell, seen in zip(self.file.cells, outcomes, strict=True)]
        speeds = [Speed(c.quant.label, flops_per_token(c), s.tokens_per_s) for c, s in pairs if s.tokens_per_s]
        if not speeds:
            return ""
        left = [(1 - seen.step / seen.steps) * seconds(c, speeds) for c, seen in pairs if not seen.settled]
        return f" so far, about {console.duration(wall_seconds(left, self.jobs))} left"


def _eta(seen: Outcome) -> str | None:
    return console.duration(seen.eta_s) if seen.state == "running" and seen.eta_s is not None else None
