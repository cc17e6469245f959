"""Scaling laws from measured losses: points, laws, fits, uncertainty, frontiers, budget plans and figures.

    points = read_points("runs.csv");  fit = fit_law(points, law="quest");  fit.eff, fit.status, fit.warnings

The package takes a DataFrame or a file. It needs no torch, and from the rest of questctl only the specs of quantizers and the
names of metrics. The names below are imported when first used, so that a mistake in a command is reported before numpy is
loaded.
"""

from __future__ import annotations

from questctl.lazy import lazy_names

_WHERE = {
    "choice": ("Choice", "choose"),
    "curve_fit": ("CurveFit", "fit_curves"),
    "curve_laws": ("CURVE_LAWS",),
    "curves": ("Curve", "Rates", "read_curves"),
    "design": ("next_runs",),
    "document": ("FitDocument",),
    "findings": ("Finding",),
    "fit": ("evaluate", "fit_law"),
    "fit_result": ("Fit",),
    "health": ("Health", "diagnose"),
    "isoflop": ("IsoFlop", "isoflop_optima"),
    "laws": ("LAWS", "LawError", "get_law"),
    "pareto": ("Frontier", "frontier"),
    "planner": ("plan",),
    "points": ("Points", "make_points", "points_from_frame", "read_points"),
    "summary": ("verdict",),
    "tables": ("PointError",),
    "transitions": ("transition",),
    "uncertainty": ("bootstrap", "prediction_interval", "profile_intervals", "with_intervals"),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_MODULES)  # noqa: PLE0605


__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
