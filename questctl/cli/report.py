"""`questctl report SOURCE…`: one page, or a folder of figures, with all that a sweep found; nothing is trained or changed.

The page is a self-contained file (extra `report`); `--figures` draws the same tables with matplotlib and needs no extra.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..config.commands import train_command
from ..errors import DataError, MissingDependency, StorageError, UsageError
from ..metrics import STEP
from ..store import Run, runs_in
from ..system import package_version
from . import fit_scaling
from . import options as opt

if TYPE_CHECKING:
    import pandas as pd

    from ..analysis.report.charts import Chart
    from ..analysis.report.tables import Material

PAGE = Path("report.html")
Out = Annotated[Path | None, typer.Option(help=f"The page (default: {PAGE}; none with --figures alone).", show_default=False)]
Figures = Annotated[Path | None, typer.Option(help="Folder for the figures as PDF, SVG and PNG.", show_default=False)]
Bench = Annotated[list[Path] | None, typer.Option(help="File of `questctl bench --json` (repeatable).", show_default=False)]
Replicates = Annotated[int, typer.Option("--bootstrap", min=0, help="Replicates behind the bands of the law; 0: no bands.")]


def command(
    sources: fit_scaling.Sources = None,
    out: Out = None,
    figures: Figures = None,
    bench: Bench = None,
    law: fit_scaling.Law = "quest",
    map_: fit_scaling.Map = None,
    where: fit_scaling.Where = None,
    bootstrap: Replicates = 200,
    title: Annotated[str | None, typer.Option(help="Headline of the page.", show_default=False)] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Make one page of runs or points: verdict, frontier, law, learning curves, health, cost and every run. Opens from disk."""
    fit_scaling.check_law(law)
    sources = sources or [opt.runs_dir(runs)]
    fit_scaling.require_sources(sources)
    page = out or (None if figures else PAGE)
    if page is None and open_:
        raise UsageError("--open: there is no page to open with --figures alone; give --out FILE.html.")
    if page is not None:
        _require_extra()
        if not page.parent.is_dir():
            raise UsageError(f"--out {page}: its folder {page.parent} does not exist.")
    material = gather(sources, law=law, map_=map_, where=where, bench=bench or (), replicates=bootstrap, title=title)
    from ..analysis.report.build import build

    report = build(material)
    written = _draw(report.charts, report.looks, figures) if figures else []
    if page is not None:
        from ..analysis.report.page import render

        try:
            page.write_text(render(report), encoding="utf-8")
        except OSError as e:
            raise StorageError(f"{page}: cannot be written: {e.strerror}.") from e
    if as_json:
        left = material.left_out.to_dict("records")
        sections = [s.key for s in report.sections]
        console.print_json(
            {
                "page": page and str(page),
                "bytes": page and page.stat().st_size,
                "runs": len(material.runs),
                "left_out": left,
                "sections": sections,
                "problem": material.problem,
                "figures": [str(p) for p in written],
                "fit": material.document or None,
            }
        )
    else:
        if page is not None:
            size = page.stat().st_size / 1e6
            console.say(f"{page}: {len(material.runs)} runs, {len(material.left_out)} left out, {size:.1f} MB")
        if figures:
            console.say(f"{figures}: {len(written)} files")
        if material.problem:
            console.note(f"{' + '.join(map(str, sources))}: {material.problem}")
    if open_ and page is not None:
        import webbrowser

        webbrowser.open(page.absolute().as_uri())


def _require_extra() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("jinja2", "plotly") if find_spec(name) is None]:
        raise MissingDependency(f"a report needs {' and '.join(missing)}: pip install 'questctl[report]'.")


def _draw(charts: Sequence[Chart], looks: Mapping[str, Any], folder: Path) -> list[Path]:
    from ..analysis.report.draw import save

    try:
        return save(charts, folder, looks)
    except OSError as e:
        raise StorageError(f"{e.filename or folder}: cannot be written: {e.strerror}.") from e


@dataclass
class _Read:
    """What was read: rows of runs, lines of metrics (with `run`), and runs that could not be taken with the reason."""

    rows: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    left_out: list[dict[str, str]]
    attempts: list[dict[str, Any]]


def gather(
    sources: Sequence[Path],
    *,
    law: str = "quest",
    map_: Sequence[str] | None = None,
    where: Sequence[str] | None = None,
    bench: Sequence[Path] = (),
    replicates: int = 200,
    title: str | None = None,
) -> Material:
    """Read the sources and fit what they allow. Damaged runs, unfinished ones and those on other data are left out by name.

    Raises DataError for tables that cannot be read and bench files that are none, UsageError for --map and --where.
    """
    import pandas as pd

    from ..analysis.points import points_from_frame, read_frame
    from ..analysis.report.tables import Material
    from ..analysis.tables import PointError, row_names

    read, frames, keep = _Read([], [], [], []), [], fit_scaling.pairs("--where", where)
    folders = [s for s in sources if s.is_dir()]
    for folder in folders:
        _read_folder(folder, read)
    if read.rows:
        frames.append(pd.DataFrame(read.rows))
    for source in (s for s in sources if not s.is_dir()):
        with fit_scaling.user_errors():
            table = read_frame(source)
        frames.append(table.assign(run=[n.removeprefix("run ") for n in row_names(table, source.name)]))
    frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["run", "state", "scheme"])
    if frame["run"].duplicated().any():
        raise DataError(f"two sources hold the run {frame.loc[frame['run'].duplicated(), 'run'].iloc[0]}.")
    frame["state"] = frame["state"].fillna("done") if "state" in frame else "done"
    usable = _usable(frame, read, keep)
    document: dict[str, Any] = {}
    found: dict[str, Any] = {}
    done = int((frame["state"] == "done").sum())
    problem = "" if len(usable) else "There are no finished runs yet."
    if keep and done and not len(usable):
        problem = f"--where {' '.join(f'{k}={v}' for k, v in keep.items())} keeps none of the {done} finished runs."
    if len(usable):
        try:
            columns = fit_scaling.pairs("--map", map_)
            found["points"] = points_from_frame(usable, columns=columns, source=sources[0].name)
            fitted = _fit(found["points"], law, replicates)
            document = fitted.pop("document")
            found.update(fitted)
        except (PointError, ValueError) as e:
            if "points" not in found and not folders:
                raise DataError(f"{e}.") from e
            problem = f"No law was fitted: {e}."
    about = _about(frame, read, sources)
    metrics = pd.DataFrame.from_records(read.lines) if read.lines else pd.DataFrame(columns=["run", STEP])
    left_out = pd.DataFrame(read.left_out, columns=["run", "reason"])
    return Material(
        title or _title(sources),
        frame,
        metrics,
        _bench(bench),
        left_out,
        document=document,
        problem=problem,
        about=about,
        **found,
    )


def _title(sources: Sequence[Path]) -> str:
    return " + ".join(source.absolute().name for source in sources)


def _read_folder(folder: Path, into: _Read) -> None:
    """The runs of a folder: a row each, their metric lines, and the attempts of env.json."""
    for run in runs_in(folder):
        try:
            row, lines = _row(run), run.metrics()
            attempts = run.env().get("attempts", [])
        except DataError as e:
            into.left_out.append({"run": run.name, "reason": f"damaged: {e}"})
            continue
        into.rows.append(row)
        into.lines += [{"run": run.name, **line} for line in lines]
        into.attempts += [{"run": run.name, **attempt} for attempt in attempts]


def _row(run: Run) -> dict[str, Any]:
    """A run as a row of the report: its result or what its config says, its state, and the command that trains it."""
    config, result, status = run.config(), run.result(), run.status()
    row = {**asdict(result), "state": "done"} if result else {k: v for k, v in run.row().items() if v is not None}
    extra = {
        "steps": status.steps or config.train.steps,
        "message": status.message,
        "attempts": status.attempts,
        "command": train_command(config),
        "data": config.data.source,
    }
    return {**extra, **row, "path": str(run.path)}


def _usable(frame: pd.DataFrame, read: _Read, keep: Mapping[str, str]) -> pd.DataFrame:
    """The finished rows on the commonest data that --where keeps; the others are left out with the reason."""
    from ..analysis.tables import says

    for column in keep:
        if column not in frame:
            raise UsageError(f"--where {column}: there is no such column; choices: {', '.join(map(str, frame.columns))}.")
    counted = Counter(frame.loc[frame["state"] == "done", "data_hash"].dropna()) if "data_hash" in frame else Counter()
    common = counted.most_common(1)[0][0] if counted else None
    kept = []
    for row in frame.to_dict("records"):
        other = [f"{k} is {row[k]}" for k, v in keep.items() if not says(row[k], v)]
        data = row.get("data_hash")
        if row["state"] != "done":
            message = row.get("message")
            reason = f"{row['state']}: {message}" if isinstance(message, str) and message else row["state"]
        elif other:
            reason = f"not asked for: {', '.join(other)}"
        elif common is not None and isinstance(data, str) and data != common:
            reason = f"other data: {data[:12]} instead of {common[:12]}, the data of most runs"
        else:
            kept.append(True)
            continue
        kept.append(False)
        read.left_out.append({"run": row["run"], "reason": reason})
    return frame[kept]


def _fit(points: Any, law: str, replicates: int) -> dict[str, Any]:
    """Fit, intervals, bootstrap and held-out errors; LawError or PointError where the points do not allow them."""
    from ..analysis.choice import choose
    from ..analysis.fit import fit_law
    from ..analysis.tables import PointError
    from ..analysis.uncertainty import bootstrap, with_intervals

    try:
        choice = choose(points, () if law == "auto" else (law,))
    except PointError:  # too few sizes to hold one out; the law itself may still be fitted
        choice = None
    fit = with_intervals(fit_law(points, choice.best.law.name if choice else "quest" if law == "auto" else law))
    boot = bootstrap(fit, replicates) if replicates and fit.status != "failed" and fit.residual_dof > 0 else None
    boots = {fit.law.name: boot} if boot is not None else {}
    study = fit_scaling.study(fit, options={"law": law, "bootstrap": str(replicates)}, choice=choice, boots=boots)
    return {"fit": fit, "boot": boot, "choice": choice, "document": study.document}


def _bench(paths: Sequence[Path]) -> pd.DataFrame:
    import pandas as pd

    from ..kernels.op import KernelError
    from ..kernels.rows import read_rows, shape_text

    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += [{**asdict(r), "shape": shape_text(r.shape), "file": path.name} for r in read_rows(path)]
        except KernelError as e:
            raise DataError(str(e)) from e
    return pd.DataFrame(rows)


def _about(frame: pd.DataFrame, read: _Read, sources: Sequence[Path]) -> tuple[tuple[str, str], ...]:
    """Facts for the foot of the page: data, versions, machines and commits, each with its number of runs."""
    from datetime import UTC, datetime

    facts = [
        ("made", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by questctl {package_version()}"),
        ("from", ", ".join(map(str, sources))),
    ]
    if "data_hash" in frame:
        names = dict(zip(frame["data_hash"], frame.get("data", frame["data_hash"]), strict=True))
        for data, n in Counter(frame["data_hash"].dropna()).items():
            facts.append(("data (SHA-256)", f"{data} ({names[data]}; {n} runs)"))
    last = {attempt["run"]: attempt for attempt in read.attempts}.values()
    for key in ("questctl", "torch", "python", "cuda", "gpu", "cpu", "platform", "commit"):
        seen = Counter(str(a[key]) for a in last if a.get(key))
        if seen:
            facts.append((key, "; ".join(f"{value} ({n} runs)" for value, n in seen.most_common())))
    dirty = sum(1 for a in last if a.get("diff_sha256"))
    if dirty:
        facts.append(("uncommitted changes", f"beside the commit of {dirty} runs; their hash is in env.json"))
    return tuple(facts)
