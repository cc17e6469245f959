"""Doubt: intervals against an independent profile, their coverage of planted truths, and the published numbers."""

import numpy as np
import pytest
from planted import DATA, needs, planted
from scipy.optimize import brentq

from questctl.analysis.fit import CHI2_95, fit_law
from questctl.analysis.points import read_points
from questctl.analysis.uncertainty import profile_intervals, threshold, with_intervals


def test_interval_ends_are_where_the_profile_crosses() -> None:
    """Each end, recomputed by fixing the parameter and refitting from scratch."""
    points, _ = planted("quest", noise=4e-3)
    fit = fit_law(points)
    ends = profile_intervals(fit, ["alpha", "E", "eff.w4a4"])
    for name, (low, high) in ends.items():
        now = fit.eff["w4a4"] if name.startswith("eff") else fit.params[name]

        def excess(value: float, name: str = name) -> float:
            return fit.n * np.log(fit_law(points, fix={name: value}).cost / fit.cost) - CHI2_95

        assert low < now < high
        assert low == pytest.approx(brentq(excess, low - 0.2 * (now - low), low + 0.2 * (now - low)), abs=0.01 * (high - low))
        assert high == pytest.approx(
            brentq(excess, high - 0.2 * (high - now), high + 0.2 * (high - now)), abs=0.01 * (high - low)
        )


def test_small_grids_get_students_threshold() -> None:
    points, _ = planted("quest", noise=4e-3, sizes=(5e4, 1e5, 2e5), ratios=(8, 20), schemes=("bf16", "w4a4", "w2a2", "w1a1"))
    small = fit_law(points)
    assert small.n == 24
    assert threshold(small) > CHI2_95
    assert threshold(fit_law(planted("quest", noise=4e-3)[0])) == CHI2_95


def test_a_bound_is_an_end() -> None:
    points, _ = planted("quest", noise=4e-3, seed=2)
    floor = points.with_loss(points.loss - 1.69 + 0.001)  # true E is all but zero
    fit = with_intervals(fit_law(floor))
    assert fit.intervals["E"][0] == 0
    assert fit.intervals["E"][1] > 0.001
    assert set(fit.intervals) == set(fit.names)


def test_a_flat_profile_is_open() -> None:
    """B is all but free where its term has vanished; where nothing is determined, there is no interval at all."""
    points, _ = planted("chinchilla", noise=2e-3)
    fit = fit_law(points.with_loss(points.loss - 410.7 / points.D**0.28))
    low, high = profile_intervals(fit, ["B"])["B"]
    assert high / max(low, 1e-300) > 1e3
    assert with_intervals(fit_law(planted("quest", noise=2e-3, ratios=(100,))[0])).intervals == {}


@needs("quest_runs.csv")
def test_published_profile_intervals() -> None:
    fit = with_intervals(fit_law(read_points(DATA / "quest_runs.csv")))
    expected = {
        "alpha": (0.0609, 0.0653),
        "beta": (0.200, 0.287),
        "E": (0, 0.097),
        "eff.w4a4": (0.647, 0.740),
        "eff.w8a8": (0.922, 1.120),
        "eff.w2a2": (0.138, 0.166),
    }
    for name, ends in expected.items():
        assert fit.intervals[name] == pytest.approx(ends, abs=5.1e-4), name
