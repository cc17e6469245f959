"""When intervals are given, of which kind, and how often they hold the truth."""

import dataclasses

import numpy as np
import pytest
from planted import planted
from shared_data import DATA, needs

from questctl.analysis.findings import of_kind
from questctl.analysis.fit import fit_law
from questctl.analysis.laws import LawError
from questctl.analysis.objective import Objective
from questctl.analysis.pareto import budgets
from questctl.analysis.points import make_points, read_points
from questctl.analysis.solver import minimise
from questctl.analysis.uncertainty import (
    allows_intervals,
    bootstrap,
    clustering,
    clusters,
    statistic,
    threshold,
    with_intervals,
)
from questctl.scaling.fit import bootstraps, fit_points
from questctl.scaling.plan import compute_multiplier, plan_budget

SMALL = {"sizes": tuple(np.geomspace(3e7, 1e9, 4)), "ratios": (20, 60, 180), "schemes": ("bf16", "w4a4")}


def assert_no_intervals(points):
    """Neither the fit nor a plan, a tie or a comparison made from it has an interval."""
    result = fit_points(points)
    assert result.fit.status == "not identifiable"
    assert not allows_intervals(result.fit)
    assert with_intervals(result.fit, "cluster").intervals == result.fit.intervals == {}
    assert bootstraps([result.fit], 50) == result.bootstraps == {}
    plan = plan_budget(result, flops=1e20, bootstrap=50)
    assert {option.interval for option in plan.options} == {option.tied for option in plan.options} == {None}
    assert compute_multiplier(result, result, flops=1e20, bootstrap=20).interval is None


@pytest.mark.parametrize("grid", [{"sizes": (3e7, 1e8)}, pytest.param({"ratios": (20,)}, marks=pytest.mark.slow)])
def test_a_fit_that_its_runs_do_not_determine_has_no_intervals(grid):
    assert_no_intervals(planted("quest", noise=2e-3, **grid)[0])


@pytest.mark.slow
@needs("cases/tables/t_20N.csv")
def test_a_table_of_one_ratio_has_no_intervals():
    assert_no_intervals(read_points(DATA / "cases/tables/t_20N.csv"))


@needs("cases/tables/n31_lt_4p.csv")
def test_one_more_run_hardly_narrows_an_interval():
    """31 and 32 runs of one grid: α's interval shrinks with the noise, not with a change of method."""
    widths = []
    for name in ("n31_lt_4p.csv", "n32_eq_4p.csv"):
        fit = with_intervals(fit_law(read_points(DATA / "cases/tables" / name)))
        widths.append(np.diff(fit.intervals["alpha"])[0] / fit.sigma)
    assert widths[1] / widths[0] == pytest.approx(1, abs=0.1)


def shared_errors(seed: int, share: float = 0.7):
    """A planted grid whose errors are shared, to this part of their variance, within a scheme and size."""
    points, theta = planted("quest", **SMALL)
    rng, place = np.random.default_rng(seed), clusters(fit_law(points, n_starts=2))
    noise = np.sqrt(share) * rng.standard_normal(place.max() + 1)[place] + np.sqrt(1 - share) * rng.standard_normal(len(points))
    return points.with_loss(points.loss * np.exp(5e-3 * noise)), theta


def test_shared_errors_are_found_and_others_are_not():
    p = np.array([[clustering(fit_law(shared_errors(seed, share)[0], n_starts=4)) for seed in range(20)] for share in (0, 0.9)])
    assert (p[0] < 0.01).sum() <= 1
    assert (p[1] < 0.01).mean() > 0.5
    assert np.isnan(
        clustering(
            fit_law(
                planted("chinchilla", noise=1e-3, sizes=tuple(np.geomspace(1e7, 1e9, 12)))[0].subset(
                    np.arange(48) % 4 == np.arange(48) // 4 % 4
                )
            )
        )
    )


def test_intervals_for_shared_errors_are_offered_and_recommended():
    points = next(p for p in (shared_errors(seed, 0.9)[0] for seed in range(9)) if clustering(fit_law(p, n_starts=4)) < 0.01)
    fit = fit_law(points)
    profile, cluster = with_intervals(fit), with_intervals(fit, "cluster")
    (finding,) = of_kind(profile.warnings, "clustered_residuals")
    assert "--intervals cluster" in finding.sentence
    assert not of_kind(cluster.warnings, "clustered_residuals")
    assert "shared within a scheme and size" in cluster.intervals_method
    assert set(cluster.intervals) == set(profile.intervals)
    assert np.diff(cluster.intervals["eff.w4a4"])[0] > 1.1 * np.diff(profile.intervals["eff.w4a4"])[0]
    with pytest.raises(LawError, match="choices: profile, cluster"):
        with_intervals(fit, "exact")


def coverage(objective: Objective, draw, simulations: int, wild: bool) -> float:
    """Share of the intervals of α, β, E and eff that hold the truth."""
    held = []
    for seed in range(simulations):
        points, theta = draw(seed)
        fit = fit_law(points, objective=objective, n_starts=4)
        names = ["alpha", "beta", "E", "eff.w4a4"]
        index = [fit.index(name) for name in names]
        if wild:
            low, high = np.quantile(bootstrap(fit, 150, seed=seed).theta[:, index], [0.025, 0.975], axis=0)
            held.append((low <= theta[index]) & (theta[index] <= high))
            continue
        start, free = np.tile(fit.theta, (4, 1)), np.tile(fit.free, (4, 1))
        start[range(4), index], free[range(4), index] = theta[index], False
        held.append(statistic(fit, minimise(fit.problem, start, free, tolerance=1e-9).cost) <= threshold(fit))
    return float(np.mean(held))


@pytest.mark.slow
@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("delta", [np.inf, 1e-3])
def test_intervals_of_independent_errors_hold_the_truth(delta, wild):
    """benchmarks/coverage.py has the tables by parameter; 120 simulations have a standard error of .012."""

    def draw(seed: int):
        return planted("quest", noise=5e-3, seed=seed, **SMALL)

    assert coverage(Objective(delta), draw, 120, wild) == pytest.approx(0.95, abs=0.04)


@pytest.mark.slow
def test_intervals_of_shared_errors_hold_the_truth():
    assert coverage(Objective(), shared_errors, 150, True) == pytest.approx(0.95, abs=0.04)


def by_size(seed: int, share: float = 0.8):
    """A planted grid whose errors are shared by all runs of a size, of whatever scheme; the table says so."""
    points, theta = planted("quest", sizes=tuple(np.geomspace(3e7, 3e9, 12)), ratios=(20, 100), schemes=("bf16", "w4a4"))
    rng, place = np.random.default_rng(seed), np.searchsorted(points.sizes, points.N)
    noise = np.sqrt(share) * rng.standard_normal(12)[place] + np.sqrt(1 - share) * rng.standard_normal(len(points))
    points = points.with_loss(points.loss * np.exp(5e-3 * noise))
    return dataclasses.replace(points, cluster=tuple(f"size {i}" for i in place)), theta


def test_named_clusters_replace_those_of_scheme_and_size():
    points, _ = by_size(0)
    fit = fit_law(points)
    assert len(set(clusters(fit))) == 12
    assert all(len(set(points.N[clusters(fit) == g])) == 1 for g in range(12))
    named = with_intervals(fit)
    assert "shared within a named cluster" in named.intervals_method
    assert "profile" in with_intervals(fit, "profile").intervals_method
    (finding,) = of_kind(with_intervals(fit, "profile").warnings, "clustered_residuals")
    assert "within a named cluster" in finding.sentence
    plain = with_intervals(fit_law(dataclasses.replace(points, cluster=())), "cluster")
    # what a size has in common moves A, B, α, β and E, and cancels in eff
    width = {name: np.diff(np.log(named.intervals[name])) / np.diff(np.log(plain.intervals[name])) for name in named.names}
    assert width["alpha"] > 1.1
    assert width["eff.w4a4"] < 0.8


def test_fewer_clusters_than_parameters_have_no_intervals():
    """Of 100 simulations with 3 clusters and 5 parameters, bootstrap intervals of E would hold the truth in 20."""
    points, _ = planted("chinchilla", noise=4e-3, sizes=(1e7, 1e8, 1e9), ratios=(20, 40, 80, 160))
    fit = with_intervals(fit_law(dataclasses.replace(points, cluster=tuple(f"{n:g}" for n in points.N))))
    assert not allows_intervals(fit)
    assert fit.intervals == bootstraps([fit], 20) == {}
    assert "3 clusters cannot test 5 parameters" in of_kind(fit.warnings, "few_clusters")[0].sentence


@pytest.mark.slow
def test_intervals_of_errors_shared_within_named_clusters_hold_the_truth():
    """Taken as shared within a scheme and size, the errors of a size give intervals that hold the truth less often."""

    def unnamed(seed: int):
        points, theta = by_size(seed)
        return dataclasses.replace(points, cluster=()), theta

    named = coverage(Objective(), by_size, 150, True)
    assert named == pytest.approx(0.95, abs=0.04)
    assert coverage(Objective(), unnamed, 150, True) < named


@pytest.mark.slow
def test_huber_and_least_squares_agree_on_clean_noise():
    """On normal errors Huber's intervals are wider, as its efficiency is .64 for a small δ, and not narrower."""
    ratios = []
    for seed in range(6):
        points = planted("quest", noise=5e-3, seed=seed, **SMALL)[0]
        fits = [with_intervals(fit_law(points, objective=Objective(delta))) for delta in (np.inf, 1e-3)]
        widths = [np.diff(np.log(fit.intervals["alpha"]))[0] for fit in fits]
        ratios.append(widths[1] / widths[0])
    assert 1.0 < np.median(ratios) < 1.8


def test_a_weighted_run_counts_as_its_repeats():
    """The wild bootstrap of weights 2 has the spread of one whose noise is weighed alike."""
    points = planted("quest", noise=5e-3, seed=1, **SMALL)[0]
    doubled = dataclasses.replace(points, weight=np.full(len(points), 4.0))
    one, two = (bootstrap(fit_law(p), 100).theta.std(axis=0) for p in (points, doubled))
    assert two == pytest.approx(one, rel=1e-3)


def test_runs_of_a_dense_range_of_ratios_have_intervals():
    rng = np.random.default_rng(0)
    ratios = 20 * 1.045 ** np.arange(12)
    N, ratio = (v.ravel() for v in np.meshgrid(np.geomspace(3e7, 1e9, 4), ratios))
    loss = (406.4 / N**0.34 + 410.7 / (N * ratio) ** 0.28 + 1.69) * np.exp(1e-3 * rng.standard_normal(len(N)))
    points = make_points(N, N * ratio, loss, ["bf16"] * len(N))
    fit = with_intervals(fit_law(points))
    assert not of_kind(fit.warnings, "one_ratio")
    assert fit.status == "converged"
    assert fit.intervals["beta"][0] < 0.28 < fit.intervals["beta"][1]
    assert len(points.ratios) > 5
    groups = [points.tokens_per_param[rows] for rows in budgets(points).rows.values()]
    assert all(np.ptp(np.log(group)) < 0.05 for group in groups)
