"""`questctl study NAME`: trains what a study compares, and ends in one table and the sentences that it supports here."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..config import human_count
from ..errors import StorageError, SweepFailed, UsageError, unknown
from ..store import Run, RunStore
from ..sweep.launchers.options import LauncherOptions
from ..sweep.manifest import Sweep
from ..sweep.outcomes import Outcome, OutcomeReader
from ..sweep.study import SCALES, Losses, Study, cells_at, comparison, find_rates, find_study, load_study, training_time
from ..sweep.sweep_file import SweepFile
from . import options as opt
from .sweep import RETRY, run_here, show_costs

if TYPE_CHECKING:
    from ..analysis.compare import Comparison, Difference, Finding, Row

NAME = typer.Argument(
    metavar="NAME", show_default=False, help="ablation, formats, methods, mixed, seeds, sparse, weight-only, or a TOML file."
)
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for table, JSON, figure and README.md.", show_default=False)
]


def command(
    name: Annotated[str, NAME],
    scale: Annotated[str, typer.Option(help="laptop: an hour on two cores; full: the paper's sizes.")] = "laptop",
    runs: opt.RunsDir = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells and what they cost; write nothing.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: one a core at laptop sizes.")] = 0,
    retry: Annotated[str | None, typer.Option(help="Train these anew: failed, diverged, all.", show_default=False)] = None,
    set_: opt.Set = None,
    as_json: opt.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Compare methods under identical conditions: search their learning rates, train all seeds, say what holds here.

    Interrupt it at will: the same command goes on, and a study whose runs are all there only tabulates them.
    """
    if retry is not None and retry not in RETRY:
        raise UsageError(unknown("--retry", retry, RETRY))
    if scale not in SCALES:
        raise UsageError(unknown("--scale", scale, SCALES))
    study, store = load_study(find_study(name), set_ or [], scale), RunStore(opt.runs_dir(runs))
    if dry_run:
        show_study_costs(study, store, jobs, retry=retry, as_json=as_json)
        return
    rates, losses, _ = find_rates(study, lambda file: run_here(file, store, jobs=jobs, retry=retry, quiet=quiet))
    file = replace(study.sweep_file, cells=cells_at(study, rates))
    outcomes = run_here(file, store, jobs=jobs, retry=retry, quiet=quiet)
    report(study, store, rates, losses, out=out, as_json=as_json)
    failed = [seen for seen in outcomes if seen.state == "failed"]
    for seen in failed:
        console.warn(f"{seen.run_id}: {seen.message}")
    if failed:
        raise SweepFailed(f"{len(failed)} of {len(outcomes)} cells failed; --retry failed tries again.")


def show_study_costs(study: Study, store: RunStore, jobs: int, *, retry: str | None, as_json: bool) -> None:
    """The dry run: search and cells in one list, learning rates read from the search's runs as far as they are there."""

    def look(file: SweepFile) -> list[Outcome]:
        return OutcomeReader(file.cells, store)()

    rates, _, asked = find_rates(study, look)
    cells = {cell.run_id: cell for cell in (*asked, *cells_at(study, rates))}
    file = replace(study.sweep_file, cells=tuple(cells.values()))
    show_costs(Sweep(file, store), LauncherOptions(jobs=jobs), retry=retry, as_json=as_json, recorded=False)
    left = [name for name in study.search if name not in rates]
    if left and study.spec.search is not None:
        console.note(
            f"The learning rates of {len(left)} schemes are not found yet: their cells stand at the middle of the grid, and "
            f"the search may add up to {study.spec.search.extensions} runs for each."
        )


def report(
    study: Study, store: RunStore, rates: Mapping[str, float], losses: Losses, *, out: Path | None, as_json: bool
) -> None:
    """The table and the findings of what is there, on stdout and, if `out` is given, in that folder."""
    found = comparison(study, store, rates, losses)
    rows, findings = found.rows(), [claim.judge(found) for claim in study.claims]
    about = provenance([store.run(r.run) for r in found.records])
    document = {
        "study": study.sweep_file.name,
        "description": study.sweep_file.description,
        "scale": study.scale,
        "about": about,
        "rows": [row.to_dict() for row in rows],
        "findings": [f.to_dict() for f in findings],
        "search": [
            {"scheme": name, "lr": rates.get(name), "losses": [{"lr": lr, "loss": x} for lr, x in tried.items()]}
            for name, tried in losses.items()
        ],
        "runs": [vars(r) for r in found.records],
    }
    if out is not None:
        write(out, document, found, rows, findings)
    if as_json:
        console.print_json(document)
        return
    show_rows(study.sweep_file.description, rows, found)
    for finding in findings:
        console.say(f"* {finding.sentence}")
    console.say(_cost(about))
    if out is not None:
        console.note(f"table.csv, study.json, losses.png, losses.svg and README.md are in {out}/")


def provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """When, with which versions, on which machines the runs were trained, and what they took."""
    there = [run for run in {run.name: run for run in runs}.values() if run.exists()]
    attempts = [(run, a) for run in there for a in run.env().get("attempts", [])]
    keys = ("questctl", "torch", "python", "platform", "cpu", "cores", "gpu", "commit")
    wall, summed = training_time(there)
    said = {key: [v for v, _ in Counter(a.get(key) for _, a in attempts).most_common() if v is not None] for key in keys}
    dates = sorted(a["started_at"][:10] for _, a in attempts if "started_at" in a)
    return {
        "runs": len(there),
        "states": dict(Counter(run.state() for run in there)),
        "first": dates[0] if dates else None,
        "last": dates[-1] if dates else None,
        "wall_seconds": wall,
        "run_seconds": summed,
        "threads": sorted({run.env().get("threads") or 0 for run, _ in attempts}),
        "data_hash": sorted({run.env()["data_hash"] for run, _ in attempts}),
        **said,
    }


COLUMNS = ("scheme", "lr", "n", "loss", "sd", "Δ", "95 %", "grad", "div.")


def show_rows(title: str, rows: Sequence[Row], found: Comparison) -> None:
    """One table for each cell; Δ is the loss less the reference's, paired by seed."""
    for cell in dict.fromkeys((row.params, row.tokens) for row in rows):
        mine = [row for row in rows if (row.params, row.tokens) == cell]
        about = f"{title}: {human_count(cell[0])} parameters, {human_count(cell[1])} tokens; loss in nats/token"
        console.say(about)
        console.print_table(COLUMNS, [_cells(row) for row in mine])
    for ref, others in found.reference.items():
        console.say(f"Δ to {ref}, paired by seed: {', '.join(others)}")


def _cells(row: Row) -> tuple[Any, ...]:
    mark = "*" if row.role == "fixed" else ""
    delta = row.difference
    return (
        row.scheme + mark,
        f"{row.lr:g}",
        row.n,
        _shown(row.loss),
        _shown(row.spread),
        _mean(delta),
        _interval(delta),
        row.grad_norm and f"{row.grad_norm:.3g}",
        row.diverged or None,
    )


def _shown(x: float | None) -> str | None:
    return None if x is None else f"{x:.3f}"


def _mean(d: Difference | None) -> str | None:
    return None if d is None else f"{d.mean:+.3f}"


def _interval(d: Difference | None) -> str | None:
    return f"{d.low:+.3f} {d.high:+.3f}" if d is not None and d.n > 1 else None


def _cost(about: Mapping[str, Any]) -> str:
    wall, summed = (console.duration(about[key]) for key in ("wall_seconds", "run_seconds"))
    return f"{about['runs']} runs, those of the search among them: {wall} wall time, {summed} summed run time."


def write(out: Path, document: Mapping[str, Any], found: Comparison, rows: Sequence[Row], findings: Sequence[Finding]) -> None:
    """table.csv, study.json, losses.png and .svg, README.md. Raises StorageError."""
    from ..analysis.compare_figure import losses_by_seed
    from ..analysis.figures import save

    table = io.StringIO()
    flat = [row.to_dict() for row in rows]
    writer = csv.DictWriter(table, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.csv").write_text(table.getvalue())
        (out / "study.json").write_text(console.json_text(document))
        (out / "README.md").write_text(_readme(document, found, rows, findings))
        save(losses_by_seed(found), out / "losses")
    except OSError as e:
        raise StorageError(f"{e.filename or out}: cannot be written: {e.strerror}.") from e


def _readme(document: Mapping[str, Any], found: Comparison, rows: Sequence[Row], findings: Sequence[Finding]) -> str:
    a = document["about"]
    when = a["first"] if a["first"] == a["last"] else f"{a['first']} to {a['last']}"
    machine = ", ".join((*a["cpu"], *(f"{n} cores" for n in a["cores"]), *a["gpu"]))
    scale = "" if document["scale"] == "laptop" else f" --scale {document['scale']}"
    lines = [
        f"# {document['study']}: {document['description']}",
        "",
        f"`questctl study {document['study']}{scale}`, trained on {when}: {machine}; questctl {', '.join(a['questctl'])}, "
        f"torch {', '.join(a['torch'])}, Python {', '.join(a['python'])}, {', '.join(a['platform'])}. {_cost(a)} "
        f"Threads a run: {', '.join(map(str, a['threads']))}. Data {', '.join(h[:12] for h in a['data_hash'])}.",
        "",
        "## What holds here",
        "",
        *(f"* {f.sentence}" for f in findings),
        "",
        "Intervals are 95 % t intervals of differences paired by seed, for one comparison each; three seeds make them wide. "
        "A claim whose interval contains zero is not settled, unless the interval leaves out the margin that it claims. "
        "The spread is the standard deviation over seeds, pooled over the schemes of a size; their own are in the table.",
        "",
        "## The runs",
        "",
        "Bits of weights, as stored, / of activations; validation loss in nats/token; sd over seeds; Δ to the reference, "
        "paired by seed; gradient norm: median over the logged steps after warm-up. * at a learning rate that the sweep file "
        "fixes, beside the comparison.",
        "",
    ]
    for cell in dict.fromkeys((row.params, row.tokens) for row in rows):
        lines += [f"**{human_count(cell[0])} parameters, {human_count(cell[1])} tokens**", ""]
        head = (
            "scheme",
            "bits",
            "learning rate",
            "n",
            "diverged",
            "loss",
            "sd",
            "reference",
            "Δ",
            "95 %",
            *[f"Δ to {found.control}"] * bool(found.control),
            "gradient norm",
        )
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for row in (r for r in rows if (r.params, r.tokens) == cell):
            _, lr, n, loss, sd, delta, interval, grad, _ = _cells(row)
            bits = None if row.bits is None or row.a_bits is None else f"{row.bits:.3g} / {row.a_bits:.3g}"
            values = (
                row.scheme + ("*" if row.role == "fixed" else ""),
                bits,
                lr,
                n,
                row.diverged,
                loss,
                sd,
                row.reference,
                delta,
                interval and interval.replace(" ", " to "),
                *[_mean(row.control)] * bool(found.control),
                grad,
            )
            lines.append(f"| {' | '.join('–' if v is None else str(v) for v in values)} |")
        lines.append("")
    lines += ["![Loss of every run by scheme](losses.png)", ""]
    searched = [entry for entry in document["search"] if entry["losses"]]
    if searched:
        grid = sorted({x["lr"] for entry in searched for x in entry["losses"]})
        lines += [
            "## Learning rates",
            "",
            "One rule for all (questctl/sweep/lr_search.py): the grid's best, the grid extended by a factor of two where the "
            "best lies at its edge. Loss of each trial:",
            "",
            f"| scheme | {' | '.join(f'{lr:g}' for lr in grid)} | chosen |",
            f"|---|{'---|' * (len(grid) + 1)}",
        ]
        for entry in searched:
            tried = {x["lr"]: x["loss"] for x in entry["losses"]}
            shown = ["" if lr not in tried else "diverged" if tried[lr] == float("inf") else f"{tried[lr]:.3f}" for lr in grid]
            lines.append(f"| {entry['scheme']} | {' | '.join(shown)} | {entry['lr']:g} |")
        lines.append("")
    return "\n".join(lines)
