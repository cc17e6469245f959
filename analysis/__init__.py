"""Scaling laws from measured losses: points, laws, fits, their doubt, frontiers, plans and figures.

    points = read_points("runs.csv");  fit = fit_law(points, law="quest");  fit.eff, fit.status, fit.warnings

Knows nothing of torch or of the rest of questctl: a DataFrame or a file comes in.
"""

from .choice import Choice, choose
from .fit import Fit, evaluate, fit_law
from .laws import LAWS, LawError, get_law
from .pareto import Frontier, frontier
from .planner import next_runs, plan, transition
from .points import PointError, Points, make_points, points_from_frame, read_points
from .summary import verdict
from .uncertainty import bootstrap, prediction_interval, profile_intervals, with_intervals

__all__ = [
    "LAWS",
    "Choice",
    "Fit",
    "Frontier",
    "LawError",
    "PointError",
    "Points",
    "bootstrap",
    "choose",
    "evaluate",
    "fit_law",
    "frontier",
    "get_law",
    "make_points",
    "next_runs",
    "plan",
    "points_from_frame",
    "prediction_interval",
    "profile_intervals",
    "read_points",
    "transition",
    "verdict",
    "with_intervals",
]
