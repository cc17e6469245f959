"""`questctl runs ls|show|compare|watch|health|push|rm`: what was trained, how it differs, how far it is. No torch, no pandas.

A RUN is its name, or a beginning or an end of it that fits no other: the eight digits at the end will do.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console, metrics
from ..config import RunConfig, flat_items, human_count
from ..errors import DataError, UsageError, unknown
from ..store import STATES, Run, RunStore
from . import health
from . import options as opt
from .fit_scaling import Map, Where, pairs, user_errors

if TYPE_CHECKING:
    from ..sweep.manifest import Sweep

app = typer.Typer(help="List, show, compare, watch and remove runs.", no_args_is_help=True)
app.command("health")(health.command)

SORT_KEYS = ("run", "state", "scheme", "params_non_embedding", "tokens", "loss", "bits_per_byte", "seconds", "updated_at")
SHOWN = {
    "params_non_embedding": "parameters, non-embedding",
    "tokens": "tokens",
    "tokens_per_param": "tokens per parameter",
    "passes": "passes over the text",
    "loss": "validation loss (nats/token)",
    "bits_per_byte": "bits per byte",
    metrics.TRAIN_LOSS: "last training loss",
    metrics.GRAD_NORM: "last gradient norm",
    "model_bits": "bits that store the parameters",
    "flops": "training FLOPs",
    "tokens_per_s": "tokens/s",
    "seconds": "seconds",
    "peak_memory_bytes": "peak memory (bytes)",
    "device": "device",
    "updated_at": "last written",
}
HEADLINE = ("run", "state", "step", "steps", "attempts", "message", "path")
LOSSES = ("loss", "bits_per_byte", "train_loss")
COMPARED = (*LOSSES, "params_non_embedding", "tokens", "model_bits", "flops", "tokens_per_s", "seconds")
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60
CURVES = (metrics.TRAIN_LOSS, metrics.VAL_LOSS)
CURVE_HEIGHT = 14

A_RUN = typer.Argument(metavar="RUN", show_default=False, help="A run: its name, or an end of it that is unique.")
SOME_RUNS = typer.Argument(metavar="RUN…", show_default=False, help="Runs: their names, or ends of them that are unique.")
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
    store = RunStore(opt.runs_dir(runs))
    rows = [_summary(run) for run in _in_state(store, state)]
    rows.sort(key=lambda row: (row.get(sort) is None, row.get(sort)))
    if as_json:
        console.print_json(rows)
        return
    table = [(r["run"], r["state"], _step(r), r.get("loss"), r.get("bits_per_byte")) for r in rows]
    console.print_table(("run", "state", "step", "loss", "bits/byte"), table, left=2)
    for row in rows:
        if row["state"] == "damaged":
            console.warn(row["message"])
    for path in store.external() if state is None else []:
        console.note(f"{path}: runs that were trained elsewhere; questctl fit-scaling reads them too.")
    if not rows:
        console.note(f"no runs in {store.root}" + (f" are {state}." if state else "."))


@app.command("show")
def show(
    name: Annotated[str, A_RUN],
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Show one run: its state and result, how its loss fell, its config, its files."""
    run = RunStore(opt.runs_dir(runs)).find(name)
    config, lines, env = run.config(), run.metrics(), run.env()
    summary = {**_summary(run), "passes": run.passes(config.tokens)}
    files = {str(p.relative_to(run.path)): p.stat().st_size for p in sorted(run.path.rglob("*")) if p.is_file()}
    if as_json:
        console.print_json({**summary, "config": config.to_json(), "env": env, "last": run.last_metrics(), "files": files})
        return
    console.say(f"{run.name}: {summary['state']}, step {_step(summary)}, attempts {summary['attempts']}")
    if summary["message"]:
        console.say(summary["message"])
    facts = {**summary, **run.last_metrics()}
    rows = [(label, console.number(facts[key])) for key, label in SHOWN.items() if facts.get(key) is not None]
    console.print_table(("measured", "value"), rows, left=2)
    for key in CURVES:
        values = [m[key] for m in lines if isinstance(m.get(key), int | float)]
        if len(values) > 1:
            console.say(f"{key:<22} {values[0]:.3f} {sparkline(values)} {values[-1]:.3f}")
    console.print_table(("not as by default", "value"), [(k, str(v)) for k, v in _changed(config)], left=2)
    console.print_table((f"{run.path}/", "size"), [(f, f"{human_count(size)}B") for f, size in files.items()])


@app.command("compare")
def compare(names: Annotated[list[str], SOME_RUNS], runs: opt.RunsDir = None, as_json: opt.Json = False) -> None:
    """Put runs side by side: the config keys in which they differ, their results beside the first's, and their curves."""
    if len(names) < 2:
        raise UsageError("compare: needs two runs or more.")
    store = RunStore(opt.runs_dir(runs))
    found = [store.find(name) for name in names]
    if len({run.name for run in found}) < len(found):
        raise UsageError("compare: one run is named twice.")
    configs = [dict(flat_items(run.config())) for run in found]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    differing = {k: [config.get(k) for config in configs] for k in keys if len({repr(config.get(k)) for config in configs}) > 1}
    results = [run.result() for run in found]
    measured = {k: [getattr(r, k) if r else None for r in results] for k in COMPARED}
    lines = [run.metrics() for run in found]
    if as_json:
        names_ = [run.name for run in found]
        minus_first = {k: [None if x is None or v[0] is None else x - v[0] for x in v] for k, v in measured.items()}
        console.print_json(
            {
                "runs": names_,
                "config": differing,
                "result": measured,
                "minus_first": minus_first,
                "curves": {run.name: _curves(some) for run, some in zip(found, lines, strict=True)},
            }
        )
        return
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(found))]
    for letter, run in zip(letters, found, strict=True):
        console.say(f"{letter} = {run.name} ({run.state()})")
    rows: list[tuple[Any, ...]] = [(k, *map(_plain, v)) for k, v in differing.items()]
    for key, (first, *others) in measured.items():
        if any(x is not None for x in (first, *others)):
            rows.append((key, console.number(first), *(_measured(key, x, first) for x in others)))
    console.print_table(("", *letters), rows)
    for key in CURVES:
        curves = {letter: _curve(some, key) for letter, some in zip(letters, lines, strict=True)}
        curves = {letter: curve for letter, curve in curves.items() if len(curve) > 1}
        if curves:
            console.say()
            console.say(f"{key} against tokens")
            for line in drawing(curves):
                console.say(line)


@app.command("watch")
def watch(
    sweep: Annotated[
        str | None,
        typer.Argument(
            metavar="[SWEEP]", show_default=False, help="A sweep file, or the folder of a sweep (default: all runs)."
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Watch a sweep from anywhere that sees its folder: a live table until all is done. Ctrl-C ends the watching, nothing else.

    With --json: how far each run is now, and no waiting.
    """
    from ..sweep.outcomes import OutcomeReader
    from .sweep_view import SweepView, show_outcomes

    watched = _watched(sweep, runs)
    read = OutcomeReader(watched.cells, watched.store)
    outcomes = read()
    if as_json:
        console.print_json([asdict(outcome) for outcome in outcomes])
        return
    view = SweepView(watched.file)
    with suppress(KeyboardInterrupt):
        while any(outcome.state in ("running", "pending") for outcome in outcomes):
            view(outcomes)
            time.sleep(interval)
            if sweep is None and len(cells := _watched(None, runs).cells) != len(read.cells):
                read.cells = cells
                view.file = replace(watched.file, cells=cells)
            outcomes = read()
    view.close()
    show_outcomes(view.file.name, outcomes)


def _watched(sweep: str | None, runs: Path | None) -> Sweep:
    """The named sweep, or the runs of a folder as one. Raises UsageError or DataError."""
    from ..sweep.manifest import Sweep, open_sweep
    from ..sweep.sweep_file import Cell, SweepFile

    if sweep is not None:
        return open_sweep(sweep, runs=runs)
    store = RunStore(opt.runs_dir(runs))
    if not store.root.is_dir():
        raise DataError(f"{store.root}: there is no such folder of runs.")
    cells = []
    for run in store.runs():
        with suppress(DataError):  # a damaged one cannot be watched; `ls` names it
            cells.append(Cell(run.config(), {}))
    return Sweep(SweepFile(str(store.root), "", tuple(cells)), store)


@app.command("push")
def push(
    names: Annotated[list[str], SOME_RUNS],
    to: Annotated[str, typer.Option(help="wandb, trackio, tensorboard, mlflow; several with commas.", show_default=False)],
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Send runs to a tracker from their files; a run that is there already is continued, not repeated."""
    from ..training import trackers

    store, chosen = RunStore(opt.runs_dir(runs)), trackers.chosen(to, key="--to")
    if not chosen:
        raise UsageError(unknown("--to", to, trackers.TRACKERS, what="tracker"))
    sent = {run.name: trackers.push(run, chosen) for run in map(store.find, names)}
    if as_json:
        console.print_json([{"run": name, "to": list(chosen), "log_steps": count} for name, count in sent.items()])
    else:
        console.print_table(("run", "log steps", "to"), [(n, c, ", ".join(chosen)) for n, c in sent.items()], left=1)


@app.command("import")
def import_(
    table: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help=".csv, .json, .jsonl or .parquet of runs.")],
    name: Annotated[str | None, typer.Option(help="What to call them; left out: the file's name.", show_default=False)] = None,
    map_: Map = None,
    where: Where = None,
    data_hash: Annotated[
        str | None, typer.Option(help="Hash of the data of runs that do not say it (questctl data info).", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what was imported under this name.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Add runs that were trained elsewhere, for fit-scaling: a W&B export, QuEST's published runs, or any table.

    They are kept in one file beside the runs, with the state `imported`; deleting the file removes them.
    """
    from ..store import external

    store = RunStore(opt.runs_dir(runs))
    path = store.external_path(name or table.stem)
    if path.exists() and not force:
        raise UsageError(f"--name: {path} is there already; give --force to replace it, or another --name.")
    found = external.read(table, columns=pairs("--map", map_), where=pairs("--where", where), data_hash=data_hash)
    unknown_data = sum(row["data_hash"] == external.UNKNOWN for row in found.rows)
    with user_errors():
        import pandas as pd

        from ..analysis.points import points_from_frame

        points = points_from_frame(pd.DataFrame(found.rows), source=table.name)  # what a fit would refuse is refused here
    store.write_external(path, table, found.sha256, found.rows)
    left_out = {"unfinished": found.unfinished, "without_loss": found.without_loss}
    members = [(s.label, points.group == i) for i, s in enumerate(points.schemes)]
    if as_json:
        counts = {label: int(rows.sum()) for label, rows in members}
        about = {"path": str(path), "runs": len(found.rows), "schemes": counts, "unknown_data": unknown_data}
        console.print_json({**about, **left_out})
        return
    shown = [
        (
            label,
            int(rows.sum()),
            *(human_count(f(v[rows])) for v in (points.N, points.D) for f in (min, max)),
            float(points.loss[rows].min()),
        )
        for label, rows in members
    ]
    console.print_table(("scheme", "runs", "least N", "most N", "least D", "most D", "lowest loss"), shown)
    if any(left_out.values()):
        console.note(f"left out: {found.unfinished} unfinished runs, {found.without_loss} without a loss")
    if unknown_data:
        console.warn(f"{unknown_data} runs do not say on which data they were trained; --data-hash says it for them.")
    console.note(f"{len(found.rows)} runs → {path}; questctl fit-scaling {store.root} reads them")


@app.command("rm")
def rm(
    names: Annotated[list[str] | None, SOME_RUNS] = None,
    state: State = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Remove runs with all their files; one that is being trained is refused."""
    store = RunStore(opt.runs_dir(runs))
    if bool(names) == (state is not None):
        raise UsageError("rm: name the runs, or give --state for all runs in a state; one of the two.")
    found = [store.find(name) for name in names] if names else _in_state(store, state)
    doomed = list({run.name: run for run in found}.values())
    running = [run.name for run in doomed if _state(run) == "running"]
    if running:
        raise UsageError(f"rm: {running[0]} is being trained; stop it first.")
    if doomed and not yes:
        if as_json or not sys.stdin.isatty():
            some = ", ".join([run.name for run in doomed[:3]] + ["…"] * (len(doomed) > 3))
            raise UsageError(f"rm: would remove {_count(doomed)} ({some}); give --yes.")
        for run in doomed:
            console.note(f"{run.name} ({_state(run)})")
        typer.confirm(f"remove {_count(doomed)}?", abort=True, err=True)
    for run in doomed:
        run.remove()
    if as_json:
        console.print_json({"removed": [run.name for run in doomed]})
    else:
        console.note(f"removed {_count(doomed)}")


def sparkline(values: list[float], width: int = CURVE_WIDTH) -> str:
    """At most `width` bars from the lowest value to the highest; each bar is the mean of its share of the values.

    >>> sparkline([8, 7, 6, 5, 4, 3, 2, 1])
    '█▇▆▅▄▃▂▁'
    """
    n = min(width, len(values))
    shares = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    means = [sum(share) / len(share) for share in shares]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(BARS[min(int((m - low) / span * len(BARS)), len(BARS) - 1)] for m in means)


def drawing(curves: Mapping[str, Sequence[tuple[float, float]]], width: int = 64, height: int = CURVE_HEIGHT) -> list[str]:
    """Curves (letter → positive (x, y), ascending in x) as lines of text: y logarithmic, the letter of the curve at each place.

    Where curves meet stands the first one's letter. y is cut at the highest of the values after the first tenth of each curve.
    """
    late = [y for curve in curves.values() for _, y in curve[len(curve) // 10 :]]
    low, high, end = math.log(min(late)), math.log(max(late)), max(curve[-1][0] for curve in curves.values())
    start = min(curve[0][0] for curve in curves.values())
    rows = [[" "] * width for _ in range(height)]
    for letter, curve in reversed(list(curves.items())):
        for column in range(width):
            x = start + (end - start) * column / (width - 1)
            if not curve[0][0] <= x <= curve[-1][0] * (1 + 1e-9):
                continue
            y = math.log(min(curve, key=lambda point: abs(point[0] - x))[1])
            if y <= high + 1e-12:
                rows[round((high - y) / (high - low or 1.0) * (height - 1))][column] = letter
    labels = {0: f"{math.exp(high):.3f}", height - 1: f"{math.exp(low):.3f}"}
    left, right = human_count(start), human_count(end)
    out = [f"{labels.get(i, ''):>8} │{''.join(row)}".rstrip() for i, row in enumerate(rows)]
    return [*out, f"{'':>8} └{'─' * width}", f"{'':>10}{left}{right:>{width - len(left)}}"]


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(tokens, value) of the metric lines that have this key."""
    known = [(m.get(metrics.TOKENS), m.get(key)) for m in lines]
    return [(x, y) for x, y in known if isinstance(x, int | float) and isinstance(y, int | float) and x > 0 and y > 0]


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The curves of a run as columns, for JSON."""
    return {key: [m.get(key) for m in lines] for key in (metrics.STEP, metrics.TOKENS, *CURVES)}


def _summary(run: Run) -> dict[str, Any]:
    """What `ls` knows of a run; a damaged one says so instead of hiding the others."""
    try:
        status, result, state = run.status(), run.result(), run.state()
        about = asdict(result) if result else {k: v for k, v in run.row().items() if v is not None}
    except DataError as e:
        return {**dict.fromkeys(HEADLINE), "run": run.name, "state": "damaged", "message": str(e), "path": str(run.path)}
    step = run.last_metrics().get("step", status.step) if state == "running" else status.step
    return {
        **about,
        "run": run.name,
        "state": state,
        "step": step,
        "steps": status.steps,
        "attempts": status.attempts,
        "message": status.message,
        "updated_at": status.updated_at,
        "path": str(run.path),
    }


def _in_state(store: RunStore, state: str | None) -> list[Run]:
    if state is not None and state not in STATES:
        raise UsageError(unknown("--state", state, STATES, what="state"))
    if not store.root.is_dir():
        raise DataError(f"{store.root}: there is no such folder of runs.")
    return [run for run in store.runs() if state is None or _state(run) == state]


def _state(run: Run) -> str:
    try:
        return run.state()
    except DataError:
        return "damaged"


def _changed(config: RunConfig) -> list[tuple[str, Any]]:
    defaults = dict(flat_items(RunConfig()))
    return [(k, v) for k, v in flat_items(config) if k not in defaults or defaults[k] != v]


def _count(runs: list[Run]) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def _step(row: dict[str, Any]) -> str | None:
    return None if row["step"] is None else f"{row['step']}/{row['steps'] or '?'}"


def _plain(value: Any) -> str:
    return "–" if value is None else str(value)


def _measured(key: str, value: Any, first: Any) -> str:
    """A value, and for a loss its difference to the first run's."""
    text = console.number(value)
    if key not in LOSSES or value is None or first is None:
        return text
    return f"{text} ({value - first:+.4f})"
