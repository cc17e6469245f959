"""`questctl fit-scaling SOURCE…`: a scaling law with its doubt, the frontier and the figures, from runs or tables of points."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import DataError, MissingDependency, StorageError, UsageError, unknown
from ..system import package_version
from . import options as opt

if TYPE_CHECKING:
    from ..analysis.choice import Choice
    from ..analysis.fit_result import Fit
    from ..analysis.pareto import Frontier
    from ..analysis.points import Points
    from ..analysis.uncertainty import Bootstrap

Sources = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[SOURCE]…", show_default=False, help="Folders of runs, or .csv .json .parquet (default: --runs)."),
]
Map = Annotated[
    list[str] | None, typer.Option("--map", help="Our column = yours: N=params (repeatable; a+b joins).", show_default=False)
]
Where = Annotated[list[str] | None, typer.Option(help="Only rows with COLUMN=VALUE (repeatable).", show_default=False)]
Fix = Annotated[list[str] | None, typer.Option(help="Hold a parameter: E=1.69, eff.w4a4=.7 (repeatable).", show_default=False)]
Objective = Annotated[str, typer.Option(help="lsq, or huber:DELTA on log residuals.")]


Law = Annotated[str, typer.Option(help="quest, chinchilla, quartet, qat, unified, …, or auto: the best on held-out runs.")]
Replicates = Annotated[int, typer.Option("--bootstrap", min=0, help="Wild bootstrap replicates, by scheme and size.")]
FEW_REPLICATES = 200  # enough for an interval of a transition, in a tenth of a second


def command(
    sources: Sources = None,
    law: Law = "quest",
    objective: Objective = "lsq",
    fix: Fix = None,
    map_: Map = None,
    where: Where = None,
    schemes: Annotated[
        str | None, typer.Option(help="Schemes an answer is wanted for: 1.585,w4a4.", show_default=False)
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="JSON file of parameters to evaluate instead of fitting.", show_default=False)
    ] = None,
    bootstrap: Replicates = FEW_REPLICATES,
    out: Annotated[Path | None, typer.Option(help="Folder for fit.json and the figures.", show_default=False)] = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Fit a scaling law: parameters and eff per scheme with 95 % intervals, what they cannot say, and the frontier."""
    check_law(law)
    if law == "auto" and (fix or evaluate):
        raise UsageError("--law auto compares free fits; name a law with --fix or --evaluate.")
    sources = sources or [opt.runs_dir(runs)]
    require_sources(sources)
    with user_errors():
        from ..analysis.choice import alternatives

        points = load_points(sources, map_, where)
        choice = chosen(points, objective) if law == "auto" else None
        name = choice.best.law.name if choice else law
        fit = fitted(points, name, objective, pairs("--fix", fix), schemes, evaluate)
        boots = bootstraps(choice.rivals if choice else (fit,), bootstrap)
        others = () if choice else alternatives(fit)
        found = study(fit, out=out, options=_options(locals()), choice=choice, boots=boots, others=others)
    if as_json:
        console.print_json(found.document)
        return
    show(found)
    if out is not None:
        console.note(f"wrote {out}/fit.json and figures")


@dataclass(frozen=True)
class Study:
    """A fit, the frontier among the runs of one token budget, and both as the JSON document of the command."""

    fit: Fit
    frontier: Frontier
    document: dict[str, Any]
    choice: Choice | None = None


def study(
    fit: Fit,
    *,
    out: Path | None = None,
    options: Mapping[str, Any] | None = None,
    choice: Choice | None = None,
    boots: Mapping[str, Bootstrap] | None = None,
    others: Sequence[Fit] = (),
) -> Study:
    """The frontier beside a fit, its doubts, and the document of all; `out` is given fit.json and the figures. Raises
    StorageError."""
    from ..analysis.pareto import commonest_budget, frontier
    from ..analysis.summary import details, doubts, findings

    front = frontier(fit.points, commonest_budget(fit.points))
    document = {
        **fit.to_dict(),
        **details(fit, choice, boots, others),
        "findings": findings(fit, front, fit.points),
        "doubts": doubts(fit, fit.points),
        "options": dict(options or {}),
        "versions": _versions(),
        "frontier": front.to_dict(),
        "points": fit.points.to_records(),
    }
    if out is not None:
        _write(out, fit, front, document, boots or {})
    return Study(fit, front, document, choice)


def show(found: Study) -> None:
    """The tables, then the verdict in sentences."""
    from ..analysis import verdict

    if found.choice is not None:
        show_choice(found.choice)
    show_fit(found.fit)
    console.say()
    for sentence in verdict(found.fit, found.frontier, found.fit.points):
        console.say(sentence)
    for sentence in found.document["answers"]:
        console.say(sentence)


def check_law(law: str) -> None:
    """UsageError for a law that does not exist."""
    from ..analysis.laws import LAWS

    if law not in (*LAWS, "auto"):
        raise UsageError(unknown("--law", law, [*LAWS, "auto"], what="law"))


def chosen(points: Points, objective: str) -> Choice:
    """All laws that the points allow, ranked."""
    from ..analysis.choice import choose
    from ..analysis.objective import objective_from

    return choose(points, objective=objective_from(objective))


def bootstraps(fits: Sequence[Fit], replicates: int) -> dict[str, Bootstrap]:
    """Law name → its wild bootstrap; none for no replicates, nor for what has no residual freedom or was not fitted."""
    from ..analysis.uncertainty import bootstrap

    return (
        {
            fit.law.name: bootstrap(fit, replicates)
            for fit in fits
            if fit.residual_dof > 0 and fit.status not in ("failed", "evaluated")
        }
        if replicates
        else {}
    )


def show_choice(choice: Choice) -> None:
    """The laws with their errors on runs that they have not seen."""
    rows = []
    for s in choice.scores:
        errors = (100 * s.in_sample, 100 * s.leave_one_size_out, 100 * s.forward)
        rows.append((s.law, *errors, s.aicc, s.fit.status, "clearly worse" if s.clearly_worse else ""))
    console.print_table(("law", "RMS %", "held-out size %", "forward %", "AICc", "status", ""), rows)
    for name, reason in choice.skipped.items():
        console.note(f"law {name} was not tried: {reason}")


def _versions() -> dict[str, str]:
    return {name: package_version(name) for name in ("questctl", "numpy", "scipy")}


def fitted(
    points: Points, law: str, objective: str, fix: Mapping[str, str], schemes: str | None = None, values: Path | None = None
) -> Fit:
    """The fit that the options ask for, with intervals."""
    from ..analysis import fit_law, with_intervals
    from ..analysis.fit import evaluate

    held = {name: as_number(f"--fix {name}", value) for name, value in fix.items()}
    if values is None:
        wanted = [s.strip() for s in schemes.split(",") if s.strip()] if schemes else []
        return with_intervals(fit_law(points, law, objective=objective, fix=held, schemes=wanted))
    import json

    try:
        content = json.loads(values.read_text())
    except json.JSONDecodeError as e:
        raise DataError(f"{values}: is not JSON: {e}.") from e
    if not isinstance(content, dict):
        raise DataError(f'{values}: holds no object of parameters, such as {{"A": 8.1, …, "eff": {{"w4a4": 0.69}}}}.')
    content = {**content.get("params", content), **{f"eff.{k}": v for k, v in content.get("eff", {}).items()}}
    return evaluate(points, law, {k: float(v) for k, v in content.items() if isinstance(v, int | float)}, objective=objective)


def require_sources(sources: Sequence[Path]) -> None:
    """Raises DataError for a source that does not exist."""
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: there is no such folder of runs or table.")


def load_points(sources: Sequence[Path], map_: Sequence[str] | None = None, where: Sequence[str] | None = None) -> Points:
    """The points of several folders and files together. Raises DataError, or analysis' PointError."""
    require_sources(sources)
    import pandas as pd

    from ..analysis.points import points_from_frame, read_frame
    from ..store import load_runs

    frames = []
    for source in sources:
        frame = load_runs(source) if source.is_dir() else read_frame(source)
        if source.is_dir() and not len(frame):
            raise DataError(f"{source}: holds no runs.")
        frames.append(frame)
    table = frames[0] if len(frames) == 1 else pd.concat(frames, keys=[s.name for s in sources])
    if len(frames) > 1:
        table.index = pd.Index([f"{i + 1} of {name}" for name, i in table.index])
    return points_from_frame(table, columns=pairs("--map", map_), where=pairs("--where", where), source=sources[0].name)


def pairs(option: str, given: Sequence[str] | None) -> dict[str, str]:
    """`["N=params"]` → {"N": "params"}. Raises UsageError."""
    out = {}
    for item in _apart(given or []):
        key, sign, value = item.partition("=")
        if not sign or not key or not value:
            raise UsageError(f"{option}: '{item}' is not NAME=VALUE.")
        out[key.strip()] = value.strip()
    return out


def _apart(given: Sequence[str]) -> list[str]:
    """`N=params,D=tokens` is two pairs; a comma that no `name=` follows belongs to the value."""
    return [item for text in given for item in re.split(r",(?=\w+=)", text)]


def as_number(option: str, text: str) -> float:
    """A number of an option. Raises UsageError."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option}: '{text}' is not a number.") from None


@contextmanager
def user_errors() -> Iterator[None]:
    """What analysis refuses, as errors of the command line."""
    from ..analysis.laws import LawError
    from ..analysis.tables import PointError

    try:
        yield
    except PointError as e:
        raise DataError(f"{e}.") from e
    except LawError as e:
        raise UsageError(f"{e}.") from e
    except (FileNotFoundError, IsADirectoryError) as e:
        raise DataError(f"{e.filename}: there is no such folder of runs or table.") from e
    except UnicodeDecodeError as e:
        raise DataError(f"not a text file: {e}.") from e
    except ImportError as e:
        raise MissingDependency("reading Parquet needs pyarrow: pip install 'questctl[parquet]'.") from e


def show_fit(fit: Fit) -> None:
    """The parameters, eff and warnings of a fit."""
    n = f"{fit.n} points, sum of {fit.objective} on log residuals: {fit.cost:.9g}, RMS {100 * fit.rms:.3g} %"
    console.say(f"{fit.law.name}: {fit.law.equation}  ({fit.law.source})")
    console.say(f"{fit.status}; {n}; data {fit.points.hash}")
    rows: list[tuple[Any, ...]] = [
        (name, "no number" if value is None else value, *_ends(fit, name), _held(fit, name))
        for name, value in fit.params.items()
    ]
    console.print_table(("parameter", "value", "low", "high", ""), rows)
    if fit.eff:
        counts = {label: int((fit.points.group == g).sum()) for g, label in enumerate(fit.points.labels)}
        bits = {s.label: s.w_stored_bits for s in fit.points.schemes}
        console.print_table(
            ("scheme", "bits", "runs", "eff", "low", "high", "16·eff/bits"),
            [
                (
                    label,
                    bits.get(label),
                    counts.get(label, 0),
                    "no runs" if e is None else e,
                    *_ends(fit, f"eff.{label}"),
                    None if e is None else 16 * e / bits[label],
                )
                for label, e in fit.eff.items()
            ],
        )


def _ends(fit: Fit, name: str) -> tuple[float | None, float | None]:
    return fit.intervals.get(name, (None, None))


def _held(fit: Fit, name: str) -> str:
    return "fixed" if name in fit.fixed else ""


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    names = ("sources", "law", "objective", "fix", "map_", "where", "schemes", "evaluate", "bootstrap")
    kept = {name.rstrip("_"): given[name] for name in names if given[name]}
    return {k: [str(v) for v in value] if isinstance(value, list) else str(value) for k, value in kept.items()}


def _write(out: Path, fit: Fit, front: Frontier, document: Mapping[str, Any], boots: Mapping[str, Bootstrap]) -> None:
    from ..analysis.figures import save_all

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "fit.json").write_text(console.json_text(document))
        save_all(fit, front, out, boots)
    except OSError as e:
        raise StorageError(f"{e.filename or out}: cannot be written: {e.strerror}.") from e
