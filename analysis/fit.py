"""Fit a law to points: the global optimum over a box, or a law evaluated at published parameters.

    fit = fit_law(points, "quest")                      a `Fit` with a status and warnings
    fit = evaluate(points, "quest", {"E": 1.69, …})     its cost at given parameters

The solver is in `solver`, the objective in `objective`, the record in `fit_result`, and the diagnosis in `identify`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from .findings import Finding
from .fit_result import Fit, box, place
from .identify import diagnose
from .laws import Design, Law, LawError, get_law
from .objective import Objective, objective_from
from .points import Points
from .solver import MANY_EXPONENTS, Problem, Solution, hop, lead_to, polish, solve, starts
from .tables import PointError


def fit_law(
    points: Points,
    law: str | Law = "quest",
    *,
    objective: str | float | Objective | None = None,
    fix: Mapping[str, float] | None = None,
    schemes: Sequence[str] = (),
    seed: int = 0,
    n_starts: int = 16,
) -> Fit:
    """The global optimum of a law on `points`, with a status and warnings that say how far to trust it.

    `fix` holds parameters (`{"E": 1.69, "eff.w4a4": .7}`) at natural values. `schemes` are labels to include in the result;
    those without runs get None. Raises PointError for fewer points than parameters or a law whose columns are missing, LawError
    for an unknown law or parameter.
    """
    fit, solutions = optimum(points, law, objective=objective, fix=fix, seed=seed, n_starts=n_starts)
    return diagnose(dataclasses.replace(fit, missing=_missing(points, schemes)), solutions)


def optimum(
    points: Points,
    law: str | Law,
    *,
    objective: str | float | Objective | None = None,
    fix: Mapping[str, float] | None = None,
    seed: int = 0,
    n_starts: int = 16,
) -> tuple[Fit, Solution]:
    """`fit_law` without the diagnosis: the best of all starts, and all of them."""
    law = get_law(law)
    law.check(points)
    objective = objective_from(objective)
    x = Design.of(points)
    coordinates = law.params(points.schemes, x.reference)
    fixed = {place(k, coordinates, points): float(v) for k, v in (fix or {}).items()}
    held = {i: coordinates[i].internal(v) for i, v in fixed.items()}
    for i, value in fixed.items():
        if not coordinates[i].lower <= held[i] <= coordinates[i].upper:
            raise LawError(
                f"{coordinates[i].name} = {value:g}: outside its bounds [{coordinates[i].lower:g}, {coordinates[i].upper:g}]"
            )
    loose = tuple(
        name for name in law.undetermined(points) if coordinates[place(name, coordinates, points)].name not in (fix or {})
    )
    neutral = {place(name, coordinates, points): 0.0 for name in loose}
    held |= neutral
    free = np.array([i not in held for i in range(len(coordinates))])
    if len(points) < free.sum():
        raise PointError(f"{len(points)} points cannot fit the {int(free.sum())} parameters of law {law.name}")
    problem = Problem(law, x, objective.scaled(points.loss), points.weight, *box(coordinates), objective)
    search = problem.sampled()
    begin, without = starts(search, held, count=n_starts, seed=seed), np.empty((0, len(coordinates)))
    many = len(law.searched) > MANY_EXPONENTS
    if fixed and free.any():
        without = starts(search, neutral, count=4 * n_starts if many else n_starts, seed=seed)
        to = {i: held[i] for i in fixed}
        able = np.array([i not in neutral for i in range(len(coordinates))])
        begin = np.concatenate([begin, lead_to(search, to, without, able)]) if len(without) else begin
    if not len(begin):
        raise PointError(f"law {law.name} cannot be evaluated on these points")
    solutions = solve(search, begin, free)
    if many and len(without):
        solutions = hop(search, solutions, without, free)
    if search is not problem:
        solutions = polish(problem, solutions, free)
    best = int(np.argmin(solutions.cost))
    theta, cost = solutions.theta[best], float(solutions.cost[best])
    names = {coordinates[i].name: v for i, v in fixed.items()}
    status = "converged" if solutions.converged[best] else "failed"
    return Fit(law, points, objective, theta, cost, status, (), names, undetermined=loose), solutions


def evaluate(
    points: Points, law: str | Law, values: Mapping[str, float], *, objective: str | float | Objective | None = None
) -> Fit:
    """A law at given parameters, e.g. published ones: its cost on these points. Status "evaluated".

    Per-scheme parameters that are not given are fitted and named in a warning; the rest are held. Raises LawError for a missing
    shared parameter.
    """
    law = get_law(law)
    absent = [p.name for p in law.shared if p.name not in values]
    if absent:
        raise LawError(f"law {law.name} needs a value for {', '.join(absent)}")
    held = {k: v for k, v in values.items() if not k.endswith(f".{points.labels[0]}")}
    fit = fit_law(points, law, objective=objective, fix=held)
    fitted = [name for name, free in zip(fit.names, fit.free, strict=True) if free]
    text = f"No value was given for {', '.join(fitted)}: fitted, with the rest held."
    note = (Finding("fitted_values", text, {"parameters": fitted}),) if fitted else ()
    return dataclasses.replace(fit, status="evaluated", warnings=(*points.notes, *note))


def _missing(points: Points, schemes: Sequence[str]) -> tuple[str, ...]:
    out = []
    for label in schemes:
        try:
            points.index(label)
        except PointError:
            out.append(str(label))
    return tuple(out)
