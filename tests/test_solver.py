"""The solver on many points: rows that repeat each other are merged and a search sees a sample, and the optimum is the same."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from planted import planted
from shared_data import DATA, needs

from questctl.analysis import solver
from questctl.analysis.fit import fit_law
from questctl.analysis.fit_result import Fit
from questctl.analysis.points import Points, read_points
from questctl.analysis.uncertainty import bootstrap, profile_intervals


def repeated(law: str, times: int, noise: float = 3e-3) -> Points:
    """Points of a planted law, each design so many times, with other errors and weights."""
    points, _ = planted(law, sizes=(30e6, 100e6, 430e6), ratios=(25, 50, 100, 200))
    rows = np.tile(np.arange(len(points)), times)
    fields = ("N", "D", "loss", "group", "weight", "memory_bits", "unique", "share")
    columns = {name: getattr(points, name)[rows] for name in fields}
    rng = np.random.default_rng(1)
    columns["loss"] = columns["loss"] * np.exp(noise * rng.standard_normal(len(rows)))
    columns["weight"] = rng.uniform(0.5, 2.0, len(rows))
    return dataclasses.replace(points, **columns, where=tuple(f"run {i}" for i in range(len(rows))))


def both(points: Points, law: str, monkeypatch, large: int, objective: str = "lsq") -> tuple[Fit, Fit]:
    """The fit of all rows as they are, and that where more than `large` are many."""
    whole = fit_law(points, law, objective=objective)
    monkeypatch.setattr(solver, "LARGE", large)
    return whole, fit_law(points, law, objective=objective)


def assert_same(whole: Fit, fast: Fit) -> None:
    assert fast.cost == pytest.approx(whole.cost, rel=1e-9)
    assert fast.theta == pytest.approx(whole.theta, rel=1e-6)
    assert (fast.status, fast.optima) == (whole.status, whole.optima)


@pytest.mark.parametrize("law", ["quest", "chinchilla"])
def test_merged_rows_have_the_optimum_of_all(monkeypatch, law):
    whole, fast = both(repeated(law, 6), law, monkeypatch, large=60)
    assert len(fast.problem.merged()[0].x) * 6 == fast.n
    assert_same(whole, fast)


@pytest.mark.parametrize("objective", ["lsq", "huber:1e-3"])
def test_a_search_on_a_sample_leads_to_the_optimum_of_all(monkeypatch, objective):
    points = planted("quest", noise=3e-3)[0]  # no two rows of one design
    whole, fast = both(points, "quest", monkeypatch, large=80, objective=objective)
    sample = fast.problem.sampled()
    assert len(sample.x) < len(points)
    assert set(sample.x.group) == set(points.group)
    assert_same(whole, fast)


@needs("quest_runs.csv")
def test_the_published_runs_have_the_same_optimum(monkeypatch):
    assert_same(*both(read_points(DATA / "quest_runs.csv"), "quest", monkeypatch, large=30))


def test_a_merged_problem_differs_by_a_constant(monkeypatch):
    monkeypatch.setattr(solver, "LARGE", 100)
    fit = fit_law(repeated("quest", 3), "quest")
    rng = np.random.default_rng(0)
    theta = fit.theta + 0.05 * rng.standard_normal((5, len(fit.theta))) * fit.free
    m = 5
    for w in (fit.problem.w, fit.problem.w * rng.integers(0, 2, (m, fit.n))):
        target = fit.problem.target + 0.01 * rng.standard_normal((m, fit.n))
        problem = dataclasses.replace(fit.problem, target=target, w=w)
        few, lacking = problem.merged()
        assert len(few.x) * 3 == fit.n
        assert few.cost(theta) + lacking == pytest.approx(problem.cost(theta), rel=1e-12)
    robust = dataclasses.replace(fit.problem, objective=dataclasses.replace(fit.objective, delta=1e-3))
    assert robust.merged()[0] is robust


def test_intervals_and_replicates_are_those_of_all_rows(monkeypatch):
    points = repeated("quest", 4)
    whole, fast = both(points, "quest", monkeypatch, large=60)
    monkeypatch.setattr(solver, "LARGE", 10**9)
    names = ["alpha", "eff.w4a4"]
    expected, replicates = profile_intervals(whole, names), bootstrap(whole, 20).theta
    monkeypatch.setattr(solver, "LARGE", 60)
    for name, ends in profile_intervals(fast, names).items():
        assert ends == pytest.approx(expected[name], rel=1e-4)
    assert bootstrap(fast, 20).theta == pytest.approx(replicates, rel=1e-4)
    assert not math.isinf(expected["alpha"][1])
