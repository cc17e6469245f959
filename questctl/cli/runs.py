"""`questctl runs ls|show|compare|watch|health|push|import|archive|restore|sync|rm`: look at runs, and manage their folders.

A RUN is its name, or a beginning or an end of it that fits no other run: the eight digits at the end will do.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import console
from ..config import human_bytes, human_count
from ..errors import NotSent, UsageError, unknown
from ..store import STATES, Run, RunStore
from ..store.listing import list_runs, removable, remove_all, run_details, runs_in_state, state_of
from ..words import few
from . import fit_options as fo
from . import health
from . import options as opt

app = typer.Typer(help="List, show, compare, watch and remove runs.", no_args_is_help=True)
app.command("health")(health.command)

SORT_KEYS = ("run", "state", "scheme", "params_non_embedding", "tokens", "loss", "bits_per_byte", "seconds", "updated_at")
State = Annotated[str | None, typer.Option(help=f"Only runs in this state: {', '.join(STATES)}.", show_default=False)]


@app.command("ls")
def ls(
    state: State = None,
    sort: Annotated[str, typer.Option(help=f"Order: {', '.join(SORT_KEYS)}.")] = "run",
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """List the runs: state, step, loss of the validation text in nats/token, bits per byte."""
    if sort not in SORT_KEYS:
        raise UsageError(unknown("--sort", sort, SORT_KEYS, what="key"))
    rows = sorted(list_runs(runs, state=state), key=lambda row: (row.get(sort) is None, row.get(sort)))
    if as_json:
        console.print_json(rows)
        return
    table = [(r["run"], r["state"], _step(r), r.get("loss"), r.get("bits_per_byte")) for r in rows]
    console.print_table(("run", "state", "step", "loss", "bits/byte"), table, left=2)
    for row in rows:
        if row["state"] == "damaged":
            console.warn(row["message"])
    if stopped := [row["run"] for row in rows if row["state"] == "stopped"]:
        console.note(f"stopped early by their sweep, and in no fit: {few(stopped)}; runs show says why.")
    store = RunStore(runs)
    for path in store.external() if state is None else []:
        console.note(f"{path}: runs that were trained elsewhere; questctl fit-scaling reads them too.")
    if not rows:
        console.note(f"no runs in {store.root}" + (f" are {state}." if state else "."))


@app.command("show")
def show(name: opt.OneRun, runs: opt.RunsDir = None, as_json: opt.Json = False) -> None:
    """Show one run: its state and result, how its loss fell, its config, its files."""
    from ..console.runs import print_run
    from ..scaling.comparison import CURVES

    details = run_details(name, runs)
    if as_json:
        console.print_json(details.to_json())
        return
    curves = {key: details.curve(key) for key in CURVES}
    values = {**details.summary, **details.run.last_metrics(), "step": _step(details.summary)}
    sizes = {file: human_bytes(size) for file, size in details.files.items()}
    print_run(str(details.run.path), values, curves, details.changed, sizes)


@app.command("compare")
def compare(names: Annotated[list[str], opt.RUNS], runs: opt.RunsDir = None, as_json: opt.Json = False) -> None:
    """Put runs side by side: the config keys in which they differ, their results beside the first's, and their curves."""
    from ..console.runs import letters, print_comparison, print_curves
    from ..scaling.comparison import CURVES, LOSSES, compare_runs

    result = compare_runs(names, runs)
    for name in result.other_data:
        console.warn(f"{name} was trained on other data than {result.runs[0].name}: their losses do not compare")
    if as_json:
        console.print_json(result.to_json())
        return
    called = letters(len(result.runs))
    for letter, run in zip(called, result.runs, strict=True):
        console.say(f"{letter} = {run.name} ({run.state()})")
    print_comparison(called, result.config, result.result, {key: result.minus_first[key] for key in LOSSES})
    for key in CURVES:
        print_curves(called, key, result.curve(key), human_count)


@app.command("watch")
def watch(
    sweep: Annotated[
        str | None,
        typer.Argument(metavar="SWEEP", show_default=False, help="A sweep file, or the folder of a sweep (default: all runs)."),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Watch a sweep from anywhere that sees its folder: a live table until all is done. Ctrl-C ends the watching, nothing else.

    A forecast is of the training loss at the end of a run. With --json: how far each run is now, without waiting.
    """
    from ..scaling.live import LiveForecasts
    from ..sweep.manifest import open_sweep, runs_as_sweep
    from ..sweep.outcomes import OutcomeReader
    from .sweep_view import SweepView, show_outcomes

    store = RunStore(runs)
    watched = runs_as_sweep(store) if sweep is None else open_sweep(sweep, runs=runs)
    read = OutcomeReader(watched.cells, watched.store)
    outcomes, forecasts = read(), LiveForecasts(watched.store)
    if as_json:
        console.print_json([asdict(outcome) for outcome in forecasts(outcomes)])
        return
    view = SweepView(watched.file, forecasts=True)
    with suppress(KeyboardInterrupt):
        while any(outcome.state in ("running", "pending") for outcome in outcomes):
            view(forecasts(outcomes))
            time.sleep(interval)
            if sweep is None and len(cells := runs_as_sweep(store).cells) != len(read.cells):
                read.cells = cells
                view.file = replace(watched.file, cells=cells)
            outcomes = read()
    view.close()
    show_outcomes(view.file.name, outcomes)


@app.command("push")
def push(
    names: Annotated[list[str], opt.RUNS],
    to: Annotated[str, typer.Option(help="wandb, trackio, tensorboard, mlflow; several with commas.", show_default=False)],
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Send runs to a tracker from their files; a run that the tracker holds already is continued, not repeated."""
    from ..training.trackers import chosen, push_runs

    trackers = chosen(to, key="--to")
    failures: tuple[str, ...] = ()
    try:
        sent = push_runs(names, trackers, runs)
    except NotSent as e:
        sent, failures = e.sent, e.failures
    if as_json:
        console.print_json([{"run": name, "to": list(trackers), "log_steps": count} for name, count in sent.items()])
    elif sent:
        console.print_table(("run", "log steps", "to"), [(n, c, ", ".join(trackers)) for n, c in sent.items()], left=1)
    for failure in failures:
        console.error(failure)
    if failures:
        raise typer.Exit(NotSent.exit_code)


@app.command("import")
@fo.with_table_flags
def import_(
    table: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help=".csv, .json, .jsonl or .parquet of runs.")],
    name: Annotated[str | None, typer.Option(help="Name of the import (default: the file's).", show_default=False)] = None,
    data_hash: Annotated[
        str | None, typer.Option(help="Hash of the data, for runs without one (questctl data info).", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what was imported under this name.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
    *,
    rows: fo.Rows,
) -> None:
    """Add runs that were trained elsewhere, for fit-scaling: a W&B export, QuEST's published runs, or any table.

    They are kept in one file beside the runs, with the state `imported`; deleting the file removes them.
    """
    from ..scaling.imports import import_runs

    result = import_runs(
        table, runs, name=name, data_hash=data_hash, force=force, columns=rows.columns, where=rows.where, options=rows.options
    )
    if as_json:
        console.print_json(result.to_json())
        return
    schemes = [
        (s.scheme, s.runs, *map(human_count, (*s.params_non_embedding, *s.tokens)), s.lowest_loss) for s in result.schemes
    ]
    console.print_table(("scheme", "runs", "least N", "most N", "least D", "most D", "lowest loss"), schemes)
    fo.note_points(result)
    if result.unknown_data:
        console.warn(f"{result.unknown_data} runs do not say on which data they were trained; --data-hash says it for them.")
    console.note(f"{result.runs} runs → {result.path}; questctl fit-scaling {result.path.parent} reads them")


@app.command("archive")
def archive(
    names: opt.SomeRuns = None,
    to: Annotated[Path | None, typer.Option(help="Another file for the archive, ending in .zip.", show_default=False)] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folders: the file of --to is a copy.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Pack finished runs, all or the named ones, with their weights into one file, in which all commands find them."""
    from ..store.packing import archive_runs

    done = archive_runs(names or (), runs, to=to, keep=keep)
    if as_json:
        console.print_json(done.to_json())
        return
    for name, reason in done.left.items():
        console.note(f"left as a folder: {name} {reason}")
    console.note(f"packed {len(done.runs)} runs into {done.path}" if done.runs else "nothing to pack")


@app.command("restore")
def restore(names: opt.SomeRuns = None, runs: opt.RunsDir = None, as_json: opt.Json = False) -> None:
    """Unpack archived runs into folders again, all or the named ones."""
    from ..store.packing import restore_runs

    done = restore_runs(names or (), runs)
    if as_json:
        console.print_json({"restored": done})
    else:
        console.note(f"restored {len(done)} runs")


@app.command("sync")
def sync(
    place: Annotated[str, typer.Argument(metavar="PLACE", show_default=False, help="A folder of runs, or HOST:PATH.")],
    pull: Annotated[bool, typer.Option("--pull", help="Only copy from there.")] = False,
    push: Annotated[bool, typer.Option("--push", help="Only copy to there.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Copy finished runs to and from another folder, here or on another machine, by rsync; results are never overwritten."""
    from ..store.sync import sync_runs

    done = sync_runs(place, runs, pull=pull or not push, push=push or not pull)
    if as_json:
        console.print_json(asdict(done))
    for words, side in (("from", done.pulled), ("to", done.pushed)) if not as_json else ():
        if side:
            console.note(f"copied {len(side.runs)} runs {words} {place}; {side.equal} are on both sides")
            for name, reason in side.left.items():
                console.note(f"not copied {words} there: {name} {reason}")
    for name, reason in done.conflicts.items():
        console.error(f"{name} {reason}.")
    if done.conflicts:
        raise typer.Exit(1)


@app.command("rm")
def rm(
    names: opt.SomeRuns = None,
    state: State = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Remove runs with all their files; a run that is being trained is refused."""
    store = RunStore(runs)
    if bool(names) == (state is not None):
        raise UsageError("rm: name the runs, or give --state for all runs in a state; one of the two.")
    doomed = removable([store.find(name) for name in names] if names else runs_in_state(store, state))
    if doomed and not yes:
        _ask(doomed, possible=not as_json and sys.stdin.isatty())
    removed = remove_all(doomed, store)
    if as_json:
        console.print_json({"removed": removed})
    else:
        console.note(f"removed {_count(doomed)}")


def _ask(doomed: list[Run], *, possible: bool) -> None:
    if not possible:
        raise UsageError(f"rm: would remove {_count(doomed)} ({few(run.name for run in doomed)}); give --yes.")
    for run in doomed:
        console.note(f"{run.name} ({state_of(run)})")
    typer.confirm(f"remove {_count(doomed)}?", abort=True, err=True)


def _count(runs: list[Run]) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def _step(row: dict[str, Any]) -> str | None:
    return None if row["step"] is None else f"{row['step']}/{row['steps'] or '?'}"
