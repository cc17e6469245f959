"""Intervals against an independent profile, their coverage of planted truths, and the published intervals."""

import dataclasses

import numpy as np
import pytest
from planted import SIZES, planted
from scipy import stats
from shared_data import DATA, needs

from questctl.analysis.fit import fit_law, optimum
from questctl.analysis.identify import sensitivity
from questctl.analysis.laws import LawError
from questctl.analysis.objective import Objective
from questctl.analysis.points import make_points, read_points
from questctl.analysis.solver import CHI2_95
from questctl.analysis.uncertainty import (
    bent,
    bootstrap,
    clusters,
    extrapolation,
    lack_of_fit,
    leverage,
    noise_floor,
    prediction_interval,
    profile_intervals,
    residual_trends,
    threshold,
    with_intervals,
)


def test_interval_ends_are_where_the_profile_crosses() -> None:
    """A refit with the parameter held is excluded by Student's t just outside of each end, and not just inside."""
    points, _ = planted("quest", noise=4e-3)
    fit = fit_law(points)
    limit = stats.t.ppf(0.975, fit.residual_dof) ** 2
    for name, (low, high) in profile_intervals(fit, ["alpha", "E", "eff.w4a4"]).items():
        assert low < (fit.eff["w4a4"] if name.startswith("eff") else fit.params[name]) < high
        step = 0.01 * (high - low)
        for value, excluded in ((low - step, True), (low + step, False), (high - step, False), (high + step, True)):
            cost = optimum(points, "quest", fix={name: value}, n_starts=4)[0].cost
            assert (fit.residual_dof * (cost / fit.cost - 1) > limit) == excluded, (name, value)


@pytest.mark.parametrize("runs", [6, 7, 24, 144])
def test_the_threshold_is_students_at_every_size(runs: int) -> None:
    """F(1, n - p) of the likelihood ratio; it exceeds that of χ² and tends to it."""
    grid = planted("chinchilla", noise=4e-3, sizes=tuple(np.geomspace(3e7, 3e9, 12)), ratios=tuple(np.geomspace(10, 300, 12)))[
        0
    ]
    fit = fit_law(grid.subset(np.random.default_rng(0).permutation(144) < runs), n_starts=2)
    dof = runs - 5
    for objective, expected in (
        (Objective(), runs * np.log1p(stats.t.ppf(0.975, dof) ** 2 / dof)),
        (Objective(1e-3), stats.t.ppf(0.975, dof) ** 2),
    ):
        assert threshold(dataclasses.replace(fit, objective=objective)) == pytest.approx(expected)
        assert expected > CHI2_95


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
        "alpha": (0.0607, 0.0659),
        "beta": (0.195, 0.293),
        "E": (0, 0.120),
        "eff.w4a4": (0.641, 0.747),
        "eff.w8a8": (0.910, 1.134),
        "eff.w2a2": (0.136, 0.168),
    }
    for name, ends in expected.items():
        assert fit.intervals[name] == pytest.approx(ends, abs=5.1e-4), name


# ------------------------------------------------------------------------------------------ bootstrap and friends


def test_bootstrap_is_deterministic_and_exact_points_do_not_move() -> None:
    points, theta = planted("quest", noise=3e-3)
    fit = fit_law(points)
    a, b = bootstrap(fit, 40), bootstrap(fit, 40)
    assert np.array_equal(a.theta, b.theta)
    assert not np.array_equal(a.theta, bootstrap(fit, 40, seed=1).theta)
    assert len(a) == 40
    assert a.theta.mean(axis=0) == pytest.approx(fit.theta, abs=3 * a.theta.std(axis=0).max())
    exact = fit_law(points.with_loss(fit.law.predict(theta, fit.design)[0]))
    assert bootstrap(exact, 5).theta == pytest.approx(np.tile(theta, (5, 1)), rel=1e-6)
    with pytest.raises(LawError, match="choices: wild, cases"):
        bootstrap(fit, 5, kind="tame")


def test_a_replicate_is_a_plain_refit() -> None:
    """Replicate 0 of the wild bootstrap, built by hand and fitted from scratch."""
    points, _ = planted("quest", noise=3e-3)
    fit = fit_law(points)
    place = clusters(fit)
    assert place.max() + 1 == len(SIZES) * len(points.schemes)
    draw = np.random.default_rng(7).standard_normal((1, place.max() + 1))[0, place]
    J = sensitivity(fit)
    hat = J @ np.linalg.pinv(J)
    assert leverage(fit) == pytest.approx(np.diag(hat), abs=1e-8)
    errors = np.zeros(fit.n)  # (I - H_gg)⁻¹ r_g, cluster by cluster
    for g in range(place.max() + 1):
        rows = np.flatnonzero(place == g)
        errors[rows] = np.linalg.solve(np.eye(len(rows)) - hat[np.ix_(rows, rows)], fit.residuals[rows])
    errors *= stats.t.ppf(0.975, fit.residual_dof) / stats.norm.ppf(0.975)
    fitted = np.log(points.loss) + fit.residuals
    by_hand = fit_law(points.with_loss(np.exp(fitted - draw * errors)))
    assert bootstrap(fit, 1, seed=7).theta[0] == pytest.approx(by_hand.theta, rel=1e-4)


def test_case_resampling_keeps_schemes_that_were_not_drawn() -> None:
    points, _ = planted("quest", noise=3e-3, sizes=SIZES[:3], ratios=(20, 80), schemes=("bf16", "w4a4", "w2a2"))
    boot = bootstrap(fit_law(points), 60, kind="cases")
    assert np.isfinite(boot.theta).all()
    assert boot.eff().shape == (60, 3)
    assert set(boot.intervals()) == set(boot.fit.names)


def test_prediction_interval_holds_new_runs() -> None:
    points, theta = planted("quest", noise=4e-3, seed=3)
    boot = bootstrap(fit_law(points), 200)
    truth = float(boot.fit.law.predict(theta, boot.fit.design.at(np.array([1e9]), np.array([1e11]), np.array([2])))[0, 0])
    low, high = prediction_interval(boot, 1e9, 1e11, points.labels[2])
    new = truth * np.exp(4e-3 * np.random.default_rng(0).standard_normal(4000))
    assert np.mean((low < new) & (new < high)) > 0.9
    assert high / low < np.exp(4 * 1.96 * 4e-3)


def test_trends_show_a_wrong_law_and_only_that() -> None:
    points, _ = planted("quest", noise=2e-3)
    assert bent(fit_law(points)) == []
    bending = np.where(points.group == points.index("w2a2"), (points.N / 1e8) ** 0.02, 1.0)
    wrong = fit_law(points.with_loss(points.loss * bending))
    worst = min(residual_trends(wrong), key=lambda t: t.p)
    assert (worst.scheme, abs(worst.t) > 3) == ("w2a2", True)
    assert bent(wrong) == ["w2a2"]


def test_noise_floor_and_lack_of_fit() -> None:
    table = [(n, n * r, s) for s in ("bf16", "w4a4", "w2a2") for n in SIZES for r in (20, 80, 200) for _ in range(2)]
    N, D, scheme = zip(*table, strict=True)
    noise = 3e-3 * np.random.default_rng(0).standard_normal(len(table))
    eff = np.array([{"bf16": 1, "w4a4": 0.7, "w2a2": 0.2}[s] for s in scheme])
    loss = 406.4 / (np.array(N) * eff) ** 0.34 + 410.7 / np.array(D) ** 0.28 + 1.69
    points = make_points(N, D, loss * np.exp(noise), scheme)
    floor, dof = noise_floor(points)
    assert dof == len(table) // 2
    assert floor == pytest.approx(3e-3, rel=0.25)
    F, p = lack_of_fit(fit_law(points))
    assert p > 0.01
    F_bad, p_bad = lack_of_fit(fit_law(points, "offset"))
    assert F_bad > F
    assert p_bad < 1e-6
    assert noise_floor(planted("quest")[0]) is None
    assert lack_of_fit(fit_law(planted("quest", noise=1e-3)[0])) is None


def test_extrapolation_factors() -> None:
    points, _ = planted("quest")
    assert extrapolation(points, 1e8, 5e9) == {"N": 1, "D": 1, "D/N": 1}
    far = extrapolation(points, 8e9, 8e9 * 12.5)
    assert far == pytest.approx({"N": 10, "D": 1, "D/N": 2})
    assert extrapolation(points, 3e6, 3e6 * 25)["N"] == pytest.approx(10)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    """Of 200 simulated grids, 95 % profile intervals hold the true E, α, β and mean eff in 90 to 98.5 %."""
    hits = {"E": 0, "alpha": 0, "beta": 0, "eff": 0}
    points, theta = planted("quest")
    truth = dict(zip(fit_law(points).names, theta, strict=True))
    effs = [name for name in truth if name.startswith("eff.")]
    for seed in range(200):
        fit = fit_law(planted("quest", noise=3e-3, seed=seed)[0], n_starts=2)
        ends = profile_intervals(fit, ["E", "alpha", "beta", *effs])
        for name in ("E", "alpha", "beta"):
            hits[name] += ends[name][0] <= truth[name] <= ends[name][1]
        hits["eff"] += np.mean([ends[e][0] <= np.exp(truth[e]) <= ends[e][1] for e in effs])
    for name, count in hits.items():
        assert 0.90 <= count / 200 <= 0.985, (name, count)


@needs("quest_runs.csv")
def test_a_simulated_E_is_recovered_by_the_published_design() -> None:
    """E collapses on the published runs because of the law, not the design: on the same design a planted 1.6 comes back."""
    points = read_points(DATA / "quest_runs.csv")
    fit = fit_law(points)
    theta = fit.theta.copy()
    for name, value in {"A": np.log(406.4), "alpha": 0.34, "B": np.log(410.7), "beta": 0.28, "E": 1.6}.items():
        theta[fit.index(name)] = value
    truth = fit.law.predict(theta, fit.design)[0]
    found = []
    for seed in range(40):
        noise = fit.rms * np.random.default_rng(seed).standard_normal(len(points))
        found.append(fit_law(points.with_loss(truth * np.exp(noise)), n_starts=2).params["E"])
    assert np.mean(found) == pytest.approx(1.6, abs=0.02)
    assert np.std(found) < 0.05


def test_a_scheme_of_one_run_has_the_error_of_a_run() -> None:
    """Its eff fits the run exactly; over new draws of the data it scatters as the bootstrap says."""

    def one_run(seed: int):
        points, _ = planted("quest", noise=4e-3, seed=seed)
        gone = np.flatnonzero(points.group == points.index("w8a8"))[1:]
        return points.subset(~np.isin(np.arange(len(points)), gone))

    spread = np.std([np.log(fit_law(one_run(seed), n_starts=2).eff["w8a8"]) for seed in range(30)])
    said = np.std(np.log(bootstrap(fit_law(one_run(0)), 200).values("eff.w8a8")))
    assert said == pytest.approx(spread, rel=0.4)
