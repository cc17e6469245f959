"""The report: one page, or a folder of figures, with all results of runs or points; nothing is trained or changed.

    questctl.write_report("runs", page="report.html", figures="figures")

The page is a self-contained file and needs the extra `report`; the figures are drawn with matplotlib and need no extra.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, MissingDependency, StorageError, UsageError
from ..system import package_version
from .curves import run_curve
from .fit import FEW_REPLICATES, FitResult, check_law, fit_points
from .sources import LeftOut, Paths, Sources, analysis_errors, as_paths, load_sources, require_sources

if TYPE_CHECKING:
    import pandas as pd

    from ..analysis.curves import Curve
    from ..analysis.document import FitDocument
    from ..analysis.report.build import Report
    from ..analysis.report.tables import Material
    from ..analysis.tables import TableOptions

PAGE = Path("report.html")
FORECASTS = 12  # most unfinished runs to forecast, as each kind of run takes about a second to fit
NO_END = ("diverged", "failed")  # states of runs without a loss to forecast
ENVIRONMENT = ("questctl", "torch", "python", "cuda", "gpu", "cpu", "platform", "commit")  # of an attempt, for the page's foot


@dataclass(frozen=True)
class ReportFiles:
    """The files of a report: the page, the figures, how many runs they are of, and why no law was fitted, if none was.

    `table` is a CSV file of all runs, which is written if the page shows only some of them one by one.
    """

    page: Path | None
    figures: tuple[Path, ...]
    runs: int
    left_out: tuple[LeftOut, ...]
    sections: tuple[str, ...]
    problem: str
    document: FitDocument | None
    table: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """What `report --json` prints."""
        return {
            "page": self.page and str(self.page),
            "bytes": self.page and self.page.stat().st_size,
            "runs": self.runs,
            "table": self.table and str(self.table),
            "left_out": [asdict(each) for each in self.left_out],
            "sections": list(self.sections),
            "problem": self.problem,
            "figures": [str(path) for path in self.figures],
            "fit": self.document and self.document.to_json(),
        }


def write_report(
    sources: Paths = None,
    *,
    page: str | Path | None = PAGE,
    figures: str | Path | None = None,
    bench: Sequence[str | Path] = (),
    law: str = "quest",
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    table: TableOptions | None = None,
    bootstrap: int = FEW_REPLICATES,
    title: str | None = None,
    most_runs: int | None = None,
) -> ReportFiles:
    """Write a page and, into a folder, figures as PDF, SVG and PNG; `page=None` for figures alone.

    Sources, `law`, `columns`, `where` and `table` are those of `fit_sources`. If no law can be fitted, as for mixed data, the
    page leaves the law out and gives the reason. `bench` are files of `questctl bench --json`, `bootstrap` the replicates
    behind the bands of the law. Of more than `most_runs` runs (default: MOST_RUNS of analysis/report/excerpt.py), the page
    shows the curves, signals and rows of only so many. It says which these are, and a CSV file beside it has all.

    Raises UsageError for an unknown law, a number of runs below 1 or a page in a folder that does not exist, DataError for
    sources that cannot be read, MissingDependency without the extra `report`, StorageError if a file cannot be written.
    """
    check_law(law)
    if most_runs is not None and most_runs < 1:
        raise UsageError(f"most_runs: {most_runs} is not a number of runs, at least 1.")
    require_sources(as_paths(sources))
    path = None if page is None else Path(page)
    if path is not None:
        _require_extra()
        if not path.parent.is_dir():
            raise UsageError(f"--out {path}: its folder {path.parent} does not exist.")
    material, read, fit = gather(
        sources,
        law=law,
        columns=columns,
        where=where,
        table=table,
        bench=bench,
        bootstrap=bootstrap,
        title=title,
        most_runs=most_runs,
        to=_table_path(path, figures),
    )
    from ..analysis.draw import save_views
    from ..analysis.report.build import build

    report = build(material)
    try:
        drawn = save_views(report.charts, figures, report.looks) if figures is not None else []
        if path is not None:
            from ..analysis.report.page import render

            path.write_text(render(report), encoding="utf-8")
        everything = _write_table(report, _table_path(path, figures))
    except OSError as e:
        raise StorageError(f"{e.filename or path or figures}: cannot be written: {e.strerror}.") from e
    return ReportFiles(
        path,
        tuple(drawn),
        len(read.records),
        read.left_out,
        tuple(section.key for section in report.sections),
        material.problem,
        fit.document if fit else None,
        everything,
    )


def _table_path(page: Path | None, figures: str | Path | None) -> Path:
    """The file of the table of all runs: beside the page, else among the figures."""
    return page.with_suffix(".csv") if page is not None else Path(figures or ".") / "runs.csv"


def _write_table(report: Report, path: Path) -> Path | None:
    """Write the table of all runs, if the report shows only some of them; returns its path. Raises OSError."""
    if report.everything is None:
        return None
    report.everything.to_csv(path, index=False)
    return path


def _require_extra() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("jinja2", "plotly") if find_spec(name) is None]:
        raise MissingDependency(f"a report needs {' and '.join(missing)}: pip install 'questctl[report]'.")


def gather(
    sources: Paths = None,
    *,
    law: str = "quest",
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    table: TableOptions | None = None,
    bench: Sequence[str | Path] = (),
    bootstrap: int = FEW_REPLICATES,
    title: str | None = None,
    most_runs: int | None = None,
    to: Path | None = None,
) -> tuple[Material, Sources, FitResult | None]:
    """Read the sources and fit what they allow; returns the material of a report, the sources read, and the fit, if any.

    Arguments as for `write_report`; `to` is the file that the page names as the table of all runs.
    """
    import pandas as pd

    from ..analysis.collapse import families
    from ..analysis.forecasts import forecast_unfinished
    from ..analysis.report.excerpt import MOST_RUNS, excerpt
    from ..analysis.report.tables import Material
    from ..config.commands import train_command

    read = load_sources(sources, columns=columns, where=where, options=table)
    some = excerpt(read.frame, read.finished, MOST_RUNS if most_runs is None else most_runs)
    lines: list[dict[str, Any]] = []
    curves: list[Curve] = []
    attempts: list[dict[str, Any]] = []
    commands: dict[str, str] = {}
    for run in (run for run in read.runs if run.name in some.runs):
        own = run.metrics()
        lines += [{"run": run.name, **line} for line in own]
        if run.state() not in NO_END:  # a run with too few lines has no curve either
            with suppress(DataError), analysis_errors():
                curves.append(run_curve(run, own))
        attempts += [{"run": run.name, **attempt} for attempt in run.env().get("attempts", [])]
        commands[run.name] = train_command(run.config())
    frame = read.frame.assign(command=read.frame["run"].map(commands)) if commands else read.frame
    points, fit, problem = None, None, _nothing_to_fit(read)
    if not problem:
        try:
            points = read.points
            options = {"law": law, "bootstrap": str(bootstrap)}
            fit = fit_points(points, law, bootstrap=bootstrap, alternatives=False, held_out=True, options=options)
        except (DataError, UsageError) as e:
            if points is None and not read.runs:
                raise  # a table with nothing to show
            problem = f"No law was fitted: {e}"
    made = Material(
        title or " + ".join(path.absolute().name for path in read.paths),
        frame,
        pd.DataFrame.from_records(lines) if lines else pd.DataFrame(columns=["run", "step"]),
        _bench(bench),
        pd.DataFrame([asdict(each) for each in read.left_out], columns=["run", "reason"]),
        points=points,
        fit=fit.fit if fit else None,
        boot=fit.bootstraps.get(fit.fit.law.name) if fit else None,
        choice=fit.choice if fit else None,
        document=fit.document if fit else None,
        problem=problem,
        forecasts=forecast_unfinished(curves, FORECASTS),
        families=tuple(families(curves)),
        about=_about(frame, attempts, read.paths, len(commands) if some.words else None),
        shown=some.runs,
        shown_words=some.words and f"{some.words}. {to or PAGE.with_suffix('.csv')} has all; --most-runs shows more.",
    )
    return made, read, fit


def _nothing_to_fit(read: Sources) -> str:
    """Why no row counts; empty if one does."""
    done = sum(read.finished)
    if not done:
        return "There are no finished runs yet."
    if not any(a and b for a, b in zip(read.finished, read.selected, strict=True)):
        return f"--where {' '.join(f'{k}={v}' for k, v in read.where.items())} keeps none of the {done} finished runs."
    return ""


def _bench(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Rows of benchmark files. Raises DataError."""
    import pandas as pd

    from ..kernels.op import KernelError
    from ..kernels.rows import read_rows, shape_text

    rows: list[dict[str, Any]] = []
    for path in map(Path, paths):
        try:
            rows += [{**asdict(r), "shape": shape_text(r.shape), "file": path.name} for r in read_rows(path)]
        except KernelError as e:
            raise DataError(str(e)) from e
    return pd.DataFrame(rows)


def _about(
    frame: pd.DataFrame, attempts: Sequence[Mapping[str, Any]], paths: Sequence[Path], of: int | None
) -> tuple[tuple[str, str], ...]:
    """Facts for the foot of the page: data, versions, machines and commits, each with its number of runs.

    If `of` is a number, versions and machines are those of so many runs.
    """
    from datetime import UTC, datetime

    facts = [
        ("made", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by questctl {package_version()}"),
        ("from", ", ".join(map(str, paths))),
    ]
    if "data_hash" in frame:
        names = dict(zip(frame["data_hash"], frame.get("data", frame["data_hash"]), strict=True))
        for data, n in Counter(frame["data_hash"].dropna()).items():
            facts.append(("data (SHA-256)", f"{data} ({names[data]}; {n} runs)"))
    if of is not None:
        facts.append(("versions and machines", f"below, those of the {of:,} runs that are shown one by one"))
    last = {attempt["run"]: attempt for attempt in attempts}.values()
    for key in ENVIRONMENT:
        values = Counter(str(a[key]) for a in last if a.get(key))
        if values:
            facts.append((key, "; ".join(f"{value} ({n} runs)" for value, n in values.most_common())))
    if dirty := sum(1 for a in last if a.get("diff_sha256")):
        facts.append(("uncommitted changes", f"beside the commit of {dirty} runs; their hash is in env.json"))
    return tuple(facts)
