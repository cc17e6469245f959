"""`questctl report SOURCE…`: one page, or a folder of figures, with all that runs or points say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..errors import UsageError
from ..scaling.fit import FEW_REPLICATES, check_law
from ..scaling.report import PAGE, write_report
from ..scaling.sources import require_sources
from ..store import default_root
from . import fit_options as fo
from . import options as opt

Out = Annotated[Path | None, typer.Option(help=f"The page (default: {PAGE}; none with --figures alone).", show_default=False)]
Figures = Annotated[Path | None, typer.Option(help="Folder for the figures as PDF, SVG and PNG.", show_default=False)]
Bench = Annotated[list[Path] | None, typer.Option(help="File of `questctl bench --json` (repeatable).", show_default=False)]
Most = Annotated[int | None, typer.Option(min=1, help="Runs shown one by one; a CSV file has all.", show_default="400")]
Replicates = Annotated[int, typer.Option("--bootstrap", min=0, help="Replicates behind the bands of the law; 0: no bands.")]


@fo.with_table_flags
def command(
    sources: fo.Sources = None,
    out: Out = None,
    figures: Figures = None,
    bench: Bench = None,
    law: fo.Law = "quest",
    bootstrap: Replicates = FEW_REPLICATES,
    most_runs: Most = None,
    title: Annotated[str | None, typer.Option(help="Headline of the page.", show_default=False)] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
    *,
    rows: fo.Rows,
) -> None:
    """Make one page of runs or points: verdict, frontier, law, learning curves, health, cost and every run. Opens from disk."""
    check_law(law)
    sources = sources or [runs or default_root()]
    require_sources(sources)
    page = out or (None if figures else PAGE)
    if page is None and open_:
        raise UsageError("--open: there is no page to open with --figures alone; give --out FILE.html.")
    written = write_report(
        sources,
        page=page,
        figures=figures,
        bench=bench or (),
        law=law,
        columns=rows.columns,
        where=rows.where,
        table=rows.options,
        bootstrap=bootstrap,
        title=title,
        most_runs=most_runs,
    )
    if as_json:
        console.print_json(written.to_json())
    else:
        if page is not None:
            rest = f"{page.stat().st_size / 1e6:.1f} MB" + (f"; all runs in {written.table}" if written.table else "")
            console.say(f"{page}: {written.runs} runs, {len(written.left_out)} left out, {rest}")
        if figures:
            console.say(f"{figures}: {len(written.figures)} files")
        if written.problem:
            console.note(f"{' + '.join(map(str, sources))}: {written.problem}")
    if open_ and page is not None:
        import webbrowser

        webbrowser.open(page.absolute().as_uri())
