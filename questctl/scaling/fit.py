"""Fit a scaling law to runs or tables: from sources to a fit with intervals, its document and its figures.

result = questctl.fit_sources("runs");  result.document.eff, result.verdict;  result.save("results")
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, StorageError, UsageError, unknown
from .sources import Paths, analysis_errors, as_paths, load_sources, require_sources

if TYPE_CHECKING:
    from ..analysis.choice import Choice
    from ..analysis.document import FitDocument
    from ..analysis.findings import Finding
    from ..analysis.fit_result import Fit
    from ..analysis.isoflop import IsoFlop
    from ..analysis.pareto import Frontier
    from ..analysis.points import Points
    from ..analysis.tables import TableOptions
    from ..analysis.uncertainty import Bootstrap

FEW_REPLICATES = 200  # enough for an interval of a transition, in a tenth of a second


@dataclass(frozen=True)
class FitResult:
    """A fitted law with the results computed from it.

    `choice` ranks all laws on held-out runs, if that was asked for; `bootstraps` maps laws to their replicates; `others` are
    fits of laws that describe the points about as well; `options` are those of the call, for the document.
    """

    fit: Fit
    choice: Choice | None = None
    bootstraps: Mapping[str, Bootstrap] = field(default_factory=dict)
    others: tuple[Fit, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def points(self) -> Points:
        """The points that the law was fitted to."""
        return self.fit.points

    @cached_property
    def frontier(self) -> Frontier:
        """The runs that no other run beats in both bits and loss, among those of the commonest token budget."""
        from ..analysis.pareto import commonest_budget, frontier

        return frontier(self.points, commonest_budget(self.points))

    @cached_property
    def isoflop(self) -> tuple[IsoFlop, ...]:
        """By scheme, the sizes of least loss at equal FLOP, from parabolas instead of the law, and how they grow."""
        from ..analysis.isoflop import isoflop_optima

        return isoflop_optima(self.points)

    @cached_property
    def document(self) -> FitDocument:
        """All results of the fit, as the record that `fit.json` holds."""
        from ..analysis.summary import make_document

        return make_document(
            self.fit,
            self.frontier,
            choice=self.choice,
            boots=self.bootstraps,
            others=self.others,
            options=self.options,
        )

    @property
    def verdict(self) -> tuple[Finding, ...]:
        """The answer and its weightiest caveats."""
        return self.document.verdict

    def save(self, folder: str | Path) -> list[Path]:
        """Write `fit.json` and the figures into a folder, which is created; returns the paths. Raises StorageError."""
        from ..analysis.figures import save_all
        from ..console import json_text

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "fit.json"
            path.write_text(json_text(self.document.to_json()), encoding="utf-8")
            return [path, *save_all(self.fit, folder, self.bootstraps)]
        except OSError as e:
            raise StorageError(f"{e.filename or folder}: cannot be written: {e.strerror}.") from e


def fit_sources(
    sources: Paths = None,
    law: str = "quest",
    *,
    objective: str = "lsq",
    residuals: str = "log",
    fix: Mapping[str, float] | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    table: TableOptions | None = None,
    schemes: Sequence[str] = (),
    evaluate: str | Path | Mapping[str, float] | None = None,
    intervals: str | None = None,
    bootstrap: int = FEW_REPLICATES,
) -> FitResult:
    """Fit a law to the finished runs of folders, to the rows of tables, or to both together.

    `sources` are folders of runs, .csv, .json or .parquet files, or `fit.json` files (default: `$QUESTCTL_RUNS`, else `runs`);
    `columns` maps our column names to theirs, `where` selects rows, and `table` says which rows of tables count and the unit of
    their losses. `law` is the name of a law, or "auto" for the one that predicts left-out runs best. `objective` is "lsq" or
    "huber:DELTA", of `residuals` in "log" or "raw" losses; `fix` holds parameters at given values; `schemes` are schemes to
    include even without runs; `evaluate` gives parameters (or a JSON file of them) instead of fitting. `intervals` is
    "profile", or "cluster" for errors that are shared by the runs of a scheme and size or of a named cluster (the default if
    `table` names clusters). `bootstrap` is the number of replicates behind the intervals of transitions.

    Raises UsageError for an unknown law, objective or parameter, and DataError for points that cannot be read or fitted.
    """
    check_law(law)
    if law == "auto" and (fix or evaluate):
        raise UsageError("law: 'auto' compares free fits; name a law to hold or evaluate parameters.")
    require_sources(as_paths(sources))
    from ..analysis.filters import written

    options = {
        "sources": [str(path) for path in as_paths(sources)],
        "law": law,
        "objective": objective,
        "residuals": "" if residuals == "log" else residuals,
        "fix": [f"{name}={value}" for name, value in (fix or {}).items()],
        "map": [f"{ours}={theirs}" for ours, theirs in (columns or {}).items()],
        "where": [written(column, value) for column, value in (where or {}).items()],
        "table": {} if table is None else table.given(),
        "schemes": ",".join(schemes),
        "evaluate": "" if evaluate is None else str(evaluate),
        "intervals": intervals or "",
        "bootstrap": str(bootstrap),
    }
    points = load_sources(sources, columns=columns, where=where, options=table).points
    return fit_points(
        points,
        law,
        objective=objective,
        residuals=residuals,
        fix=fix,
        schemes=schemes,
        evaluate=evaluate,
        intervals=intervals,
        bootstrap=bootstrap,
        options={name: value for name, value in options.items() if value},
    )


def fit_points(
    points: Points,
    law: str = "quest",
    *,
    objective: str = "lsq",
    residuals: str = "log",
    fix: Mapping[str, float] | None = None,
    schemes: Sequence[str] = (),
    evaluate: str | Path | Mapping[str, float] | None = None,
    intervals: str | None = None,
    bootstrap: int = FEW_REPLICATES,
    alternatives: bool = True,
    held_out: bool = False,
    options: Mapping[str, Any] | None = None,
) -> FitResult:
    """Fit a law to points; arguments and errors as for `fit_sources`.

    `alternatives` also fits the other laws, quickly, to compare their transitions; `held_out` also measures the errors of a
    named law on held-out runs, if the points allow it.
    """
    from ..analysis import choice as choices
    from ..analysis import evaluate as evaluate_law
    from ..analysis import fit_law, with_intervals
    from ..analysis.objective import objective_from
    from ..analysis.tables import PointError

    with analysis_errors():
        choice, goal = None, objective_from(objective, residuals)
        if law == "auto" or held_out:
            try:
                laws = () if law == "auto" else (law,)
                choice = choices.choose(points, laws, objective=goal)
            except PointError:
                if not held_out:
                    raise
        name = choice.best.law.name if choice else "quest" if law == "auto" else law
        if evaluate is not None:
            fit = evaluate_law(points, name, _parameters(evaluate), objective=goal)
        else:
            fit = fit_law(points, name, objective=goal, fix=dict(fix or {}), schemes=schemes)
            if law == "auto" and choice and len(choice.scores) > 1:
                fit = dataclasses.replace(fit, warnings=(*fit.warnings, choice.finding))
            fit = with_intervals(fit, intervals)
        boots = bootstraps(choice.rivals if law == "auto" and choice else (fit,), bootstrap)
        others = choices.alternatives(fit) if alternatives and choice is None else ()
        return FitResult(fit, choice, boots, others, dict(options or {}))


def saved_fit(
    sources: Paths,
    law: str | None = None,
    *,
    objective: str | None = None,
    residuals: str | None = None,
    fix: Mapping[str, float] | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    table: TableOptions | None = None,
    bootstrap: int = 0,
) -> FitResult | None:
    """The fit of a `fit.json`, repeated with its law, its objective, its fixed or evaluated parameters, and its runs.

    None if the sources hold no saved fit. Raises UsageError if an argument contradicts the fit, or if a saved fit stands beside
    other sources.
    """
    from ..analysis.document import FitDocument, holds_fit
    from ..analysis.filters import written
    from ..analysis.tables import TableOptions

    paths = as_paths(sources)
    require_sources(paths)
    saved = [path for path in paths if path.suffix == ".json" and path.is_file() and holds_fit(_json_object(path))]
    if not saved:
        return None
    if len(paths) > 1:
        others = ", ".join(str(path) for path in paths if path != saved[0])
        raise UsageError(
            f"{saved[0]} is a saved fit and used as it was made, without {others}; "
            "give the fit alone, or all runs to fit-scaling --out FOLDER first."
        )
    with analysis_errors():
        document = FitDocument.read(saved[0])
    made = "lsq" if document.delta is None else f"huber:{document.delta:g}"
    evaluated = document.status == "evaluated"
    fixed = {} if evaluated else dict(document.fixed)
    requests = {
        "--law": (law, document.law, law in (None, document.law)),
        "--objective": (objective, made, objective is None or _same_objective(objective, made)),
        "--residuals": (residuals, f"{document.residuals} residuals", residuals in (None, document.residuals)),
        "--fix": (_shown(fix), _shown(fixed) or "no fixed parameter", not fix or dict(fix) == fixed),
        "--map": (_shown(columns), "its own columns", not columns),
        "--where": (",".join(written(column, value) for column, value in (where or {}).items()), "all of its runs", not where),
        **{
            f"--{name.replace('_', '-')}": (value, "its own rows", False)
            for name, value in (table.given() if table else {}).items()
        },
    }
    for option, (asked, has, agrees) in requests.items():
        if not agrees:
            again = fit_again(saved[0], document, {option: asked} if option in REFIT else {})
            raise UsageError(
                f"{option} {asked}: {saved[0]} is a saved fit and used as it was made, with {has}; "
                f"leave {option} out, or fit its runs again: {again}"
            )
    values = {**document.params, **{f"eff.{scheme}": e for scheme, e in document.eff.items()}} if evaluated else None
    parameters = None if values is None else {name: value for name, value in values.items() if value is not None}
    clusters = TableOptions(cluster="cluster") if any("cluster" in row for row in document.points) else None
    points = load_sources(paths, options=clusters).points
    return fit_points(
        points,
        document.law,
        objective=made,
        residuals=document.residuals,
        fix=fixed,
        evaluate=parameters,
        intervals=document.options.get("intervals"),
        bootstrap=bootstrap,
        alternatives=False,
    )


REFIT = ("--law", "--objective", "--residuals", "--fix", "--where")  # options that may differ in a fit to the same rows


def fit_again(path: Path, document: FitDocument, other: Mapping[str, Any] | None = None) -> str:
    """The command that repeats a saved fit on its points, with the same intervals, except for the `other` options."""
    options = {
        "--law": document.law,
        "--objective": "" if document.delta is None else f"huber:{document.delta:g}",
        "--residuals": "" if document.residuals == "log" else document.residuals,
        "--fix": "" if document.status == "evaluated" else _shown(document.fixed),
        "--cluster": "cluster" if any("cluster" in row for row in document.points) else "",
        "--intervals": document.options.get("intervals", ""),
        "--bootstrap": document.options.get("bootstrap", ""),
    }
    if other and "--law" in other:
        options["--fix"] = ""  # most parameters of one law do not exist in another
    chosen = {name: str(value) for name, value in {**options, **(other or {})}.items() if value}
    return shlex.join(["questctl", "fit-scaling", str(path), *(word for pair in chosen.items() for word in pair)])


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:  # no JSON, or no text: the reader of tables will report it
        return {}
    return content if isinstance(content, dict) else {}


def _same_objective(asked: str, made: str) -> bool:
    from ..analysis.objective import objective_from

    with analysis_errors():
        return objective_from(asked) == objective_from(made)


def _shown(pairs: Mapping[str, Any] | None) -> str:
    return ",".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in (pairs or {}).items()
    )


def check_law(law: str) -> None:
    """Raises UsageError for a law that does not exist."""
    from ..analysis.laws import LAWS

    if law not in (*LAWS, "auto"):
        raise UsageError(unknown("--law", law, [*LAWS, "auto"], what="law"))


def bootstraps(fits: Sequence[Fit], replicates: int) -> dict[str, Bootstrap]:
    """Law → its wild bootstrap, for the fits that allow intervals; empty for no replicates."""
    from ..analysis.uncertainty import allows_intervals, bootstrap

    drawn = [f for f in fits if replicates and allows_intervals(f)]
    return {f.law.name: bootstrap(f, replicates) for f in drawn}


def _parameters(source: str | Path | Mapping[str, float]) -> dict[str, float]:
    """Parameters of a law from a mapping or a JSON file: flat, or as in a `fit.json`, with eff by scheme. Raises DataError."""
    content: Any = source
    if isinstance(source, str | Path):
        try:
            content = json.loads(Path(source).read_bytes())
        except json.JSONDecodeError as e:
            raise DataError(f"{source}: is not JSON: {e}.") from e
        if not isinstance(content, dict):
            example = '{"A": 8.1, …, "eff": {"w4a4": 0.69}}'
            raise DataError(f"{source}: holds no object of parameters, such as {example}.")
    eff = {f"eff.{scheme}": value for scheme, value in content.get("eff", {}).items()}
    values = {**content.get("params", content), **eff}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
