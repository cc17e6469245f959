"""What the points of a fit can and cannot determine: the status of a fit, and its warnings as findings.

The design of the runs is judged first (a scheme without runs or with one, one size, D proportional to N), then the numbers
(bounds hit, condition of the Jacobian, other optima as good), then the cause: which schemes drive a parameter to its bound.

The condition number is that of the Jacobian of the residuals with columns of unit length. 1 is ideal; a relative error ε of the
losses can grow to cond·ε in some combination of parameters.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np

from ..words import few
from .findings import Finding
from .fit_result import Fit
from .points import Points
from .solver import CHI2_95, Solution, minimise

Array = np.ndarray
CONDITION_LIMIT = 3e4


def sensitivity(fit: Fit) -> Array:
    """(n, p) weighted Jacobian of the residuals at the optimum; columns of fixed parameters are zero."""
    curve = fit.objective.derivatives(fit.residuals, fit.points.weight)[1]
    return fit.slopes(fit.design) * np.sqrt(curve)[:, None]


def at_bound(fit: Fit) -> list[str]:
    """Names of free parameters that sit on a finite bound."""
    on = []
    for p, t, free in zip(fit.coordinates, fit.theta, fit.free, strict=True):
        if free and any(np.isfinite(edge) and abs(t - edge) <= 1e-9 * (1 + abs(edge)) for edge in (p.lower, p.upper)):
            on.append(p.name)
    return on


def condition(fit: Fit) -> float:
    """Condition number of the column-scaled Jacobian over free parameters that are not on a bound; inf if rank is lost."""
    J = sensitivity(fit)
    bound = at_bound(fit)
    J = J[:, [free and name not in bound for name, free in zip(fit.names, fit.free, strict=True)]]
    length = np.linalg.norm(J, axis=0)
    if not length.size or (length == 0).any():
        return np.inf if length.size else 1.0
    values = np.linalg.svd(J / length, compute_uv=False)
    return float(values[0] / values[-1]) if values[-1] > 0 else np.inf


def structure(fit: Fit) -> tuple[list[Finding], bool]:
    """(warnings, whether the design of the runs alone leaves shared parameters undetermined)."""
    points, law = fit.points, fit.law
    out, fatal = list(points.notes), False
    free = {name for name, is_free in zip(fit.names, fit.free, strict=True) if is_free}
    sizes = len(points.sizes)
    if "alpha" in free:
        if sizes == 1:
            text = "With one size only, alpha, A and E cannot be told apart, and nothing follows for other sizes."
            out.append(Finding("few_sizes", text, {"sizes": 1}))
        elif sizes == 2:
            text = "With two sizes only, alpha and E can be told apart only if the law is right."
            out.append(Finding("few_sizes", text, {"sizes": 2}))
        fatal |= sizes <= 2 and "E" in free
    passes = law.uses_repeats and points.repeats.any()  # the worth of a token then varies independently of D
    if "beta" in free and "alpha" in free and not passes and points.D_follows_N and len(np.unique(points.D)) > 1:
        ratio = float(np.median(points.tokens_per_param))
        if len(points.ratios) == 1:
            rule, way_out = f"Every run has D/N = {ratio:.3g} (D ∝ N)", "add runs at another D/N"
        else:
            rule, way_out = "D is a power of N in these runs", "add runs of a size at other D"
        text = f"{rule}, so alpha, beta, E and eff cannot be told apart; {way_out}."
        out.append(Finding("one_ratio", text, {"tokens_per_param": ratio}))
        fatal = True
    if law.uses_D and len(np.unique(points.D)) == 1 and "beta" in free and not passes:
        text = "Every run has the same number of tokens, so B, beta and E cannot be told apart."
        out.append(Finding("one_D", text, {"tokens": float(points.D[0])}))
        fatal |= "E" in free
    if law.uses_scheme:
        if not points.schemes[0].full:
            text = f"No run is unquantized, so eff is relative to {points.labels[0]}."
            out.append(Finding("no_reference", text, {"reference": points.labels[0]}))
        out += [finding for g in range(len(points.labels)) for finding in _scheme_structure(points, g)]
    elif len(points.schemes) > 1 and fit.law.uses_D:
        text = f"Law {law.name} does not tell schemes apart: the runs of all {len(points.schemes)} are fitted as one."
        out.append(Finding("schemes_merged", text, {"schemes": len(points.schemes)}))
    out += _shares(fit)
    out += [
        Finding("no_runs", f"Scheme {label} has no runs, so it gets no number.", {"scheme": label}) for label in fit.missing
    ]
    reasons = law.undetermined(points)
    out += [
        Finding("no_number", f"{name} gets no number, because {reasons[name]}.", {"parameter": name})
        for name in fit.undetermined
    ]
    if law.uses_repeats and (unknown := int(np.isnan(points.unique).sum())):
        text = f"{unknown} of {fit.n} runs do not say their distinct tokens; they count as reading none twice."
        out.append(Finding("unknown_repeats", text, {"runs": unknown, "of": fit.n}))
    return out, fatal


def _shares(fit: Fit) -> list[Finding]:
    """Findings on runs that were quantized late: the law ignores their shares, or these do not determine it."""
    points, law = fit.points, fit.law
    shares = points.shares
    out, numbers = [], {"shares": [float(s) for s in shares]}
    if not law.uses_share:
        if len(shares) > 1:
            text = (
                f"Quantized runs began in full precision for {len(shares)} shares of their tokens ({shares[0]:.2g} to "
                f"{shares[-1]:.2g}), which law {law.name} ignores; --law switch-eff reads them."
            )
            out.append(Finding("shares_ignored", text, numbers))
        return out
    if len(shares) == 2:
        text = f"With two shares before quantization only ({shares[0]:.2g} and {shares[1]:.2g}), no best share follows."
        out.append(Finding("few_shares", text, numbers))
    quantized = np.array([not s.full for s in points.schemes])[points.group]
    spread = float(np.ptp(fit.design.log_S[quantized])) if quantized.any() else 0.0
    if len(shares) > 1 and spread < np.log(2):
        span = f"Tokens per parameter-byte span a factor of {np.exp(spread):.2g} only"
        text = f"{span}: how the best share moves with them is open."
        out.append(Finding("few_byte_ratios", text, {"factor": float(np.exp(spread))}))
    if law.one_per_width:
        widths = [(s.w_grid_bits, s.label) for s in points.schemes if not s.full]
        same = sorted({label for w, label in widths if sum(w == other for other, _ in widths) > 1})
        if same:
            text = f"Law {law.name} reads only the bits of weights, so {few(same, 3)} are one scheme or more to it."
            out.append(Finding("widths_merged", text, {"schemes": same}))
    return out


def _scheme_structure(points: Points, group: int) -> list[Finding]:
    """Findings on schemes with too few runs or sizes."""
    label, rows = points.labels[group], points.group == group
    runs = int(np.sum(rows))
    numbers = {"scheme": label, "runs": runs}
    if runs == 1:
        return [
            Finding(
                "one_run", f"{label} has one run only: its parameters are read off that run, and nothing tests them.", numbers
            )
        ]
    if len(np.unique(points.N[rows])) == 1 and len(points.sizes) > 1:
        return [Finding("one_size", f"{label} has runs of one size only ({runs} runs).", numbers)]
    return []


LARGE_RMS = 0.05  # of log residuals; above it, the law misses its points by more than runs scatter


def outliers(fit: Fit) -> Array:
    """Rows whose residual exceeds 6 robust standard deviations; none if a fit has a parameter for every two points."""
    r = fit.residuals - np.median(fit.residuals)
    if fit.n < 2 * fit.free.sum() + 4:
        return np.zeros(0, int)
    return np.flatnonzero(np.abs(r) > 6 * 1.4826 * np.median(np.abs(r)) + 1e-9)


def diagnose(fit: Fit, solutions: Solution) -> Fit:
    """The fit with its status and warnings; `solutions` are those from all starts."""
    warnings, fatal = structure(fit)
    status = fit.status
    n = fit.n
    near = solutions.cost <= fit.cost * (1 + 1e-6) + 1e-24
    ratio = np.maximum(solutions.cost, 1e-30) / max(fit.cost, 1e-30)
    rivals = solutions.converged & ~near & (n * np.log(ratio) < CHI2_95)
    apart = np.abs(solutions.theta - fit.theta) > 1e-2 * (1 + np.abs(fit.theta))
    optima = 1 + len(np.unique(np.round(np.log(solutions.cost[rivals & apart.any(axis=1)]), 4)))
    cond = condition(fit)
    bounds = at_bound(fit)
    if np.isfinite(fit.cost) and (fatal or cond > CONDITION_LIMIT):
        status = "not identifiable"  # whether or not the optimizer converged in the flat valley
    elif fit.status == "converged":
        if fit.residual_dof < 1:
            status = "exactly determined"
        elif optima > 1:
            status = "multiple optima"
        elif bounds:
            status = "at bound"
    else:
        warnings.append(Finding("not_converged", "The optimizer did not converge: do not use these numbers."))
    if fit.residual_dof < 1:
        parameters = int(fit.free.sum())
        text = (
            f"{fit.n} points for {parameters} parameters leave no residual degrees of freedom: nothing tests the law, and no "
            "number has an interval."
        )
        warnings.append(Finding("no_residual_dof", text, {"points": fit.n, "parameters": parameters}))
    if cond > CONDITION_LIMIT:
        text = f"These points leave some combination of parameters undetermined (condition number {cond:.2g})."
        warnings.append(Finding("ill_conditioned", text, {"condition": cond if np.isfinite(cond) else None}))
    if len(outlying := outliers(fit)):
        rows = [fit.points.where[i] for i in outlying]
        squares = np.isinf(fit.objective.delta)
        text = f"{len(rows)} of {fit.n} residuals lie beyond 6 robust standard deviations and " + (
            f"sway the fit ({few(rows, 3)}); use huber:1e-3." if squares else f"count less by {fit.objective} ({few(rows, 3)})."
        )
        warnings.append(Finding("outliers", text, {"rows": rows, "of": fit.n}))
    if fit.rms > LARGE_RMS:
        text = (
            f"Residuals have an RMS of {100 * fit.rms:.3g} %, runs of one recipe below 1 %: look for another recipe, unit or "
            "text, or try --law auto."
        )
        warnings.append(Finding("large_residuals", text, {"rms": fit.rms}))
    if optima > 1:
        text = f"{optima} optima are as good as the data can tell; the lowest is shown."
        warnings.append(Finding("several_optima", text, {"optima": optima}))
    warnings += [_bound_finding(fit, name, explain=status == "at bound") for name in bounds]
    return dataclasses.replace(
        fit, status=status, warnings=tuple(warnings), optima=optima, starts_at_best=float(np.mean(near)), condition=cond
    )


def _bound_finding(fit: Fit, name: str, *, explain: bool) -> Finding:
    """The finding that a parameter is on its bound and, if `explain`, which schemes drive it there."""
    value = float(fit.coordinates[fit.index(name)].natural(fit.theta[fit.index(name)]))
    text = f"{name} vanishes" if 0 < value < 1e-30 else f"{name} is at its bound {value:g}"
    numbers: dict[str, Any] = {"parameter": name, "value": value}
    cause = drivers(fit, name) if explain else None
    if cause:
        without = few(cause[0], 2, last=" and ")
        text += f"; without {without} it would be {cause[1]:.2f}: the law does not fit them and the rest at once"
        numbers |= {"without": list(cause[0]), "value_without": cause[1]}
    return Finding("at_bound", f"{text}.", numbers)


def classes(points: Points) -> dict[tuple[str, ...], Array]:
    """Classes of schemes with the same bits of weights and activations: labels → rows (boolean)."""
    members: dict[tuple[float, float], list[int]] = defaultdict(list)
    for g, s in enumerate(points.schemes):
        members[s.w_grid_bits, s.a_grid_bits].append(g)
    return {tuple(points.labels[g] for g in gs): np.isin(points.group, gs) for gs in members.values()}


def leave_out(fit: Fit, rows: list[Array]) -> Array:
    """θ (m, p) refitted with each set of rows (boolean, n) left out; parameters of schemes that vanish keep their value."""
    points = fit.points
    keep = ~np.array(rows)
    free = np.tile(fit.free, (len(rows), 1))
    for i, name in enumerate(fit.names):
        block, _, label = name.partition(".")
        if label and block in {p.name for p in fit.law.own}:
            free[:, i] &= keep[:, points.group == points.labels.index(label)].any(axis=1)
    without = dataclasses.replace(fit.problem, w=points.weight * keep)
    return minimise(without, np.tile(fit.theta, (len(rows), 1)), free).theta


def influence(fit: Fit, name: str) -> list[tuple[tuple[str, ...], float]]:
    """The value of a parameter (natural units) without each class of schemes, the largest change first."""
    i, sets = fit.index(name), classes(fit.points)
    sets = {labels: rows for labels, rows in sets.items() if fit.points.labels[0] not in labels and not rows.all()}
    if not sets:
        return []
    values = np.asarray(fit.coordinates[i].natural(leave_out(fit, list(sets.values()))[:, i]))
    now = float(fit.coordinates[i].natural(fit.theta[i]))
    return sorted(zip(sets, map(float, values), strict=True), key=lambda pair: -abs(pair[1] - now))


def drivers(fit: Fit, name: str) -> tuple[tuple[str, ...], float] | None:
    """The class of schemes without which the parameter moves most off its bound, and where it goes; None if none moves it."""
    ranked = influence(fit, name)
    if not ranked or abs(ranked[0][1] - float(fit.coordinates[fit.index(name)].natural(fit.theta[fit.index(name)]))) < 0.05:
        return None
    return ranked[0]
