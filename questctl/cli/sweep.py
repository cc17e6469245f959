"""`questctl sweep PLAN`: the runs of a plan, as many at a time as there are cores; what is done is not done again."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .. import console
from ..config import human_count
from ..errors import SweepFailed, UsageError, unknown
from ..store import RunStore
from ..sweep.costs import Speed, costs, flops_per_token, seconds, wall_seconds
from ..sweep.launchers.local import default_jobs, launch
from ..sweep.plan import Cell, Plan, find_plan, load_plan
from ..sweep.progress import SETTLED, Outcome, Progress, reset
from . import options as opt

RETRY = {"failed": ("failed",), "diverged": ("diverged",), "all": ("failed", "diverged")}


def command(
    plan: Annotated[str, typer.Argument(metavar="PLAN", show_default=False, help="TOML file, or the name of a built-in plan.")],
    runs: opt.RunsDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells and what they cost; write nothing.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one a core at laptop sizes.")] = 0,
    retry: Annotated[str | None, typer.Option(help="Train these anew: failed, diverged, all.", show_default=False)] = None,
    set_: opt.Set = None,
    as_json: opt.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train every cell of a plan that is not finished yet. Interrupt it at will: the same command goes on.

    Exit code 0: all cells are done; 3: finished, but some failed or diverged (the table says why; --retry trains them again).
    """
    if retry is not None and retry not in RETRY:
        raise UsageError(unknown("--retry", retry, RETRY))
    loaded, store = load_plan(find_plan(plan), set_ or []), RunStore(opt.runs_dir(runs))
    if dry_run:
        show_costs(loaded, store, jobs, retry=retry, as_json=as_json)
        return
    outcomes = run_plan(loaded, store, jobs=jobs, retry=retry, quiet=quiet)
    if as_json:
        cells = [{**asdict(seen), "values": cell.values} for cell, seen in zip(loaded.cells, outcomes, strict=True)]
        console.print_json({"plan": loaded.name, "runs": str(store.root), "cells": cells})
    else:
        show_outcomes(loaded, outcomes)
    n = Counter(seen.state for seen in outcomes)
    bad = [state for state in RETRY["all"] if n[state]]
    if bad:
        what = " and ".join(f"{n[state]} {state}" for state in bad)
        raise SweepFailed(f"{what} of {len(outcomes)} cells; --retry {bad[0] if len(bad) == 1 else 'all'} tries again.")


def run_plan(plan: Plan, store: RunStore, *, jobs: int = 0, retry: str | None = None, quiet: bool = False) -> list[Outcome]:
    """Drain a plan on this machine and return what became of each cell.

    `retry` is a word of RETRY. Raises UsageError, DataError or StorageError if a corpus or the folder cannot be used, before
    anything is written; see `launch` for the rest.
    """
    again = RETRY[retry] if retry else ()
    outcomes = Progress(plan.cells, store)()
    left = [c for c, seen in zip(plan.cells, outcomes, strict=True) if not seen.settled or seen.state in again]
    check_inputs(left, store)
    if again:
        console.note(f"{len(reset(left, store, again))} cells are tried again")
    view = View(plan, jobs or default_jobs(plan.cells), quiet=quiet)
    try:
        return launch(plan.cells, store, jobs=jobs, watch=view)
    except KeyboardInterrupt:
        view.close()
        done = sum(seen.state == "done" for seen in Progress(plan.cells, store)())
        console.note(f"{done} of {len(plan.cells)} cells are done; the same command goes on where this one stopped.")
        raise
    finally:
        view.close()


def check_inputs(cells: Sequence[Cell], store: RunStore) -> None:
    """Prepare each corpus once, before workers ask for it, and look whether the folder can be written."""
    from ..training.inputs import load_data

    if cells:
        store.run(cells[0].run_id).check_writable()
    for config in {(c.config.data, c.config.model.vocab_size): c.config for c in cells}.values():
        load_data(config)


def show_costs(plan: Plan, store: RunStore, jobs: int = 0, *, retry: str | None = None, as_json: bool = False) -> None:
    """The dry run: a row for each cell, and the sum of what would be trained with `jobs` at a time (0: `default_jobs`)."""
    jobs = jobs or default_jobs(plan.cells)
    rows, basis = costs(plan.cells, store)
    left = [row for row in rows if row.state not in SETTLED or (retry and row.state in RETRY[retry])]
    flops, wall = sum(row.flops for row in left), wall_seconds([row.seconds for row in left], jobs)
    if as_json:
        total = {"cells": len(rows), "left": len(left), "flops": flops, "seconds": wall, "jobs": jobs, "basis": basis}
        cells = [{**asdict(row), "values": cell.values} for cell, row in zip(plan.cells, rows, strict=True)]
        console.print_json({"plan": plan.name, "cells": cells, "total": total})
        return
    table = [
        (r.run_id, r.state, human_count(r.parameters), human_count(r.tokens), f"{r.flops:.2g}", console.duration(r.seconds))
        for r in rows
    ]
    console.print_table(("run", "state", "params", "tokens", "FLOPs", "time"), table, title=plan.description, left=2)
    about = f"{flops:.2g} FLOPs, about {console.duration(wall)} with {jobs} at a time ({basis})"
    console.say(f"{len(rows)} cells, {len(left)} to train" + (f": {about}." if left else "."))


def show_outcomes(plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """What became of each cell, and for those that did not finish: why."""
    console.print_table(("run", "state", "step", "loss", "tok/s"), [_row(seen) for seen in outcomes], title=plan.name, left=2)
    for seen in outcomes:
        if seen.state != "done":
            console.say(f"{seen.run_id} {seen.state}: {seen.message}")


def _row(seen: Outcome) -> tuple[Any, ...]:
    return seen.run_id, seen.state, f"{seen.step}/{seen.steps}", seen.loss, seen.tokens_per_s and round(seen.tokens_per_s)


class View:
    """How far a sweep is: a live table on a terminal; elsewhere a line when a cell is settled, and one now and then."""

    def __init__(self, plan: Plan, jobs: int, *, quiet: bool = False) -> None:
        self.plan, self.jobs, self.quiet = plan, jobs, quiet
        columns = ("run", "state", "step", "loss", "tok/s", "ETA")
        self._live = console.LiveTable(columns, left=2) if sys.stderr.isatty() else None
        self._start = self._last = time.monotonic()
        self._told: set[str] | None = None

    def __call__(self, outcomes: Sequence[Outcome]) -> None:
        """Show these outcomes, one for each cell of the plan, in its order."""
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
        if time.monotonic() - self._last >= console.PLAIN_INTERVAL_S:
            self._last = time.monotonic()
            console.note(self._summary(outcomes))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.close()

    def _summary(self, outcomes: Sequence[Outcome]) -> str:
        n = Counter(seen.state for seen in outcomes)
        text = f"{n['done']}/{len(outcomes)} done" + "".join(f", {n[s]} {s}" for s in ("running", "failed", "diverged") if n[s])
        return f"{self.plan.name}: {text}, {console.duration(time.monotonic() - self._start)}{self._left(outcomes)}"

    def _left(self, outcomes: Sequence[Outcome]) -> str:
        """Time until the last cell is done, by the speeds seen in this sweep."""
        pairs = list(zip(self.plan.cells, outcomes, strict=True))
        speeds = [Speed(c.config.quant.label, flops_per_token(c.config), s.tokens_per_s) for c, s in pairs if s.tokens_per_s]
        if not speeds:
            return ""
        left = [(1 - seen.step / seen.steps) * seconds(c.config, speeds) for c, seen in pairs if not seen.settled]
        return f" so far, about {console.duration(wall_seconds(left, self.jobs))} left"


def _eta(seen: Outcome) -> str | None:
    return console.duration(seen.eta_s) if seen.state == "running" and seen.eta_s is not None else None
