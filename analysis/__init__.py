"""Scaling laws from measured losses: points, laws, fits, their doubt, frontiers, plans and figures.

    points = read_points("runs.csv");  fit = fit_law(points, law="quest");  fit.eff, fit.status, fit.warnings

Knows nothing of torch or of the rest of questctl: a DataFrame or a file comes in.
"""

from .fit import Fit, fit_law
from .laws import LAWS, LawError, get_law
from .pareto import Frontier, frontier
from .points import PointError, Points, make_points, points_from_frame, read_points
from .summary import verdict
from .uncertainty import profile_intervals, with_intervals

__all__ = [
    "LAWS",
    "Fit",
    "Frontier",
    "LawError",
    "PointError",
    "Points",
    "fit_law",
    "frontier",
    "get_law",
    "make_points",
    "points_from_frame",
    "profile_intervals",
    "read_points",
    "verdict",
    "with_intervals",
]
