"""Fit a scaling law to runs or tables: from sources to a fit with intervals, its document and its figures.

result = questctl.fit_sources("runs");  result.document.eff, result.verdict;  result.save("results")
"""

from __future__ import annotations

import json
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
    from ..analysis.pareto import Frontier
    from ..analysis.points import Points
    from ..analysis.uncertainty import Bootstrap

FEW_REPLICATES = 200  # enough for an interval of a transition, in a tenth of a second


@dataclass(frozen=True)
class FitResult:
    """A fitted law with what is computed beside it.

    `choice` ranks all laws on runs left out, where that was asked for; `bootstraps` maps laws to their replicates; `others`
    are fits of laws that describe the points about as well; `options` are those of the call, for the document.
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
    def document(self) -> FitDocument:
        """All that the fit says, as the record that `fit.json` holds."""
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
        """The answer, and what weighs most beside it."""
        return self.document.verdict

    def save(self, folder: str | Path) -> list[Path]:
        """Write `fit.json` and the figures into a folder, which is created; returns the paths. Raises StorageError."""
        from ..analysis.figures import save_all
        from ..console import json_text

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "fit.json"
            path.write_text(json_text(self.document.to_json()))
            return [path, *save_all(self.fit, folder, self.bootstraps)]
        except OSError as e:
            raise StorageError(f"{e.filename or folder}: cannot be written: {e.strerror}.") from e


def fit_sources(
    sources: Paths = None,
    law: str = "quest",
    *,
    objective: str = "lsq",
    fix: Mapping[str, float] | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    schemes: Sequence[str] = (),
    evaluate: str | Path | Mapping[str, float] | None = None,
    bootstrap: int = FEW_REPLICATES,
) -> FitResult:
    """Fit a law to the finished runs of folders, to the rows of tables, or to both together.

    `sources` are folders of runs, .csv, .json or .parquet files, or `fit.json` files (default: `$QUESTCTL_RUNS`, else `runs`);
    `columns` maps our column names to theirs, `where` selects rows. `law` is the name of a law, or "auto" for the one that
    predicts left-out runs best. `objective` is "lsq" or "huber:DELTA", `fix` holds parameters, `schemes` are schemes an answer
    is wanted for even without runs, `evaluate` gives parameters (or a JSON file of them) instead of fitting, and `bootstrap` is
    the number of replicates behind the intervals of transitions.

    Raises UsageError for an unknown law, objective or parameter, and DataError for points that cannot be read or fitted.
    """
    check_law(law)
    if law == "auto" and (fix or evaluate):
        raise UsageError("law: 'auto' compares free fits; name a law to hold or evaluate parameters.")
    require_sources(as_paths(sources))
    given = {
        "sources": [str(path) for path in as_paths(sources)],
        "law": law,
        "objective": objective,
        "fix": [f"{name}={value}" for name, value in (fix or {}).items()],
        "map": [f"{ours}={theirs}" for ours, theirs in (columns or {}).items()],
        "where": [f"{column}={value}" for column, value in (where or {}).items()],
        "schemes": ",".join(schemes),
        "evaluate": "" if evaluate is None else str(evaluate),
        "bootstrap": str(bootstrap),
    }
    points = load_sources(sources, columns=columns, where=where).points
    return fit_points(
        points,
        law,
        objective=objective,
        fix=fix,
        schemes=schemes,
        evaluate=evaluate,
        bootstrap=bootstrap,
        options={name: value for name, value in given.items() if value},
    )


def fit_points(
    points: Points,
    law: str = "quest",
    *,
    objective: str = "lsq",
    fix: Mapping[str, float] | None = None,
    schemes: Sequence[str] = (),
    evaluate: str | Path | Mapping[str, float] | None = None,
    bootstrap: int = FEW_REPLICATES,
    alternatives: bool = True,
    held_out: bool = False,
    options: Mapping[str, Any] | None = None,
) -> FitResult:
    """Fit a law to points; arguments and errors as for `fit_sources`.

    `alternatives` also fits the other laws, quickly, for what they say of transitions; `held_out` also measures the errors of
    a named law on runs left out, where the points allow it.
    """
    from ..analysis import choice as choices
    from ..analysis import evaluate as evaluate_law
    from ..analysis import fit_law, with_intervals
    from ..analysis.objective import objective_from
    from ..analysis.tables import PointError

    with analysis_errors():
        choice = None
        if law == "auto" or held_out:
            try:
                laws = () if law == "auto" else (law,)
                choice = choices.choose(points, laws, objective=objective_from(objective))
            except PointError:
                if not held_out:
                    raise
        name = choice.best.law.name if choice else "quest" if law == "auto" else law
        if evaluate is not None:
            fit = evaluate_law(points, name, _parameters(evaluate), objective=objective)
        else:
            fit = with_intervals(fit_law(points, name, objective=objective, fix=dict(fix or {}), schemes=schemes))
        boots = bootstraps(choice.rivals if law == "auto" and choice else (fit,), bootstrap)
        others = choices.alternatives(fit) if alternatives and choice is None else ()
        return FitResult(fit, choice, boots, others, dict(options or {}))


def check_law(law: str) -> None:
    """Raises UsageError for a law that does not exist."""
    from ..analysis.laws import LAWS

    if law not in (*LAWS, "auto"):
        raise UsageError(unknown("--law", law, [*LAWS, "auto"], what="law"))


def bootstraps(fits: Sequence[Fit], replicates: int) -> dict[str, Bootstrap]:
    """Law → its wild bootstrap, for the fits that leave residuals to draw from; empty for no replicates."""
    from ..analysis.uncertainty import bootstrap

    drawn = [f for f in fits if replicates and f.residual_dof > 0 and f.status not in ("failed", "evaluated")]
    return {f.law.name: bootstrap(f, replicates) for f in drawn}


def _parameters(source: str | Path | Mapping[str, float]) -> dict[str, float]:
    """Parameters of a law from a mapping or a JSON file: flat, or as in a `fit.json`, with eff by scheme. Raises DataError."""
    content: Any = source
    if isinstance(source, str | Path):
        try:
            content = json.loads(Path(source).read_text())
        except json.JSONDecodeError as e:
            raise DataError(f"{source}: is not JSON: {e}.") from e
        if not isinstance(content, dict):
            example = '{"A": 8.1, …, "eff": {"w4a4": 0.69}}'
            raise DataError(f"{source}: holds no object of parameters, such as {example}.")
    eff = {f"eff.{scheme}": value for scheme, value in content.get("eff", {}).items()}
    values = {**content.get("params", content), **eff}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
