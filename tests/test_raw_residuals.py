"""Residuals of raw losses as an objective: the optimum, intervals, replicates and saved fits, each against its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import output
from planted import planted
from scipy import optimize, stats

from questctl.analysis.fit import fit_law, optimum
from questctl.analysis.identify import sensitivity
from questctl.analysis.laws import LawError
from questctl.analysis.objective import Objective, objective_from
from questctl.analysis.points import Points, points_from_frame
from questctl.analysis.uncertainty import bootstrap, clusters, lack_of_fit, noise, prediction_interval, profile_intervals
from questctl.console import json_text
from questctl.errors import UsageError
from questctl.scaling.fit import fit_points, saved_fit
from questctl.scaling.plan import plan_budget

RAW = Objective(residuals="raw")
SMALL = {"sizes": (3e7, 1e8, 3e8, 1e9), "ratios": (20, 60, 180), "schemes": ("bf16", "w4a4")}


def drawn(seed: int = 0, noise: float = 0.02) -> tuple[Points, np.ndarray]:
    """Runs whose losses have errors of one size in nats."""
    points, theta = planted("quest", **SMALL)
    return points.with_loss(points.loss + noise * np.random.default_rng(seed).standard_normal(len(points))), theta


@pytest.mark.parametrize("objective", [RAW, Objective(0.01, "raw")])
@pytest.mark.parametrize("law", ["quest", "qat"])
def test_the_optimum_is_that_of_losses_in_nats(objective: Objective, law: str) -> None:
    """An independent solver, started from the fit on log residuals, comes to the same cost and no lower."""
    points, _ = drawn()
    fit = fit_law(points, law, objective=objective)
    start = fit_law(points, law).theta

    def residuals(theta: np.ndarray) -> np.ndarray:
        return fit.law.predict(theta, fit.design)[0] - points.loss

    loss = {"loss": "linear"} if math.isinf(objective.delta) else {"loss": "huber", "f_scale": objective.delta}
    with np.errstate(all="ignore"):
        other = optimize.least_squares(
            residuals, start, x_scale="jac", bounds=(fit.problem.lower, fit.problem.upper), xtol=1e-14, ftol=1e-14, **loss
        )
    assert fit.cost == pytest.approx(float(objective.cost(residuals(fit.theta), points.weight)))
    assert fit.cost <= other.cost * (1 + 1e-9)
    assert fit.cost == pytest.approx(other.cost, rel=1e-4)
    assert fit.residuals == pytest.approx(residuals(fit.theta))
    assert fit.rms == pytest.approx(np.sqrt(np.mean(np.log1p(fit.residuals / points.loss) ** 2)))
    assert np.any(np.abs(fit.theta - start) > 1e-3)


def test_exact_points_give_back_the_truth() -> None:
    points, theta = planted("quest")
    assert fit_law(points, objective=RAW).theta == pytest.approx(theta, rel=1e-6)


@pytest.mark.parametrize("law", ["eff-nd", "repeated"])
def test_parameters_may_be_held(law: str) -> None:
    points, _ = planted(law, 0.01, **SMALL)
    free, _ = optimum(points, law, objective=RAW)
    fit, _ = optimum(points, law, objective=RAW, fix={"beta": free.params["beta"] * 1.2})
    others = [optimum(points, law, objective=RAW, fix=fit.fixed, seed=seed, n_starts=30)[0].cost for seed in (1, 2)]
    assert fit.cost <= min(others) * (1 + 1e-6)


def test_the_noise_of_raw_residuals_is_in_nats() -> None:
    fits = [fit_law(drawn(seed)[0], objective=RAW, n_starts=4) for seed in range(6)]
    assert np.mean([noise(fit) for fit in fits]) == pytest.approx(0.02, rel=0.15)
    assert RAW.shown(0.0204) == "0.02 nats/token"
    assert Objective().shown(0.0204) == "2 %"


@pytest.mark.slow
def test_interval_ends_are_where_the_profile_crosses() -> None:
    points, _ = drawn()
    fit = fit_law(points, objective=RAW)
    limit = stats.t.ppf(0.975, fit.residual_dof) ** 2
    for name, (low, high) in profile_intervals(fit, ["alpha", "E", "eff.w4a4"]).items():
        step = 0.01 * (high - low)
        for value, excluded in ((low - step, True), (low + step, False), (high - step, False), (high + step, True)):
            cost = optimum(points, "quest", objective=RAW, fix={name: value}, n_starts=4)[0].cost
            assert (fit.residual_dof * (cost / fit.cost - 1) > limit) == excluded, (name, value)


def test_a_replicate_is_a_plain_refit() -> None:
    points, _ = drawn()
    fit = fit_law(points, objective=RAW)
    place = clusters(fit)
    draw = np.random.default_rng(7).standard_normal((1, place.max() + 1))[0, place]
    J = sensitivity(fit)
    assert np.abs(fit.residuals @ J).max() < 1e-6  # the optimum is stationary in these coordinates
    hat = J @ np.linalg.pinv(J)
    errors = np.zeros(fit.n)
    for g in range(place.max() + 1):
        rows = np.flatnonzero(place == g)
        errors[rows] = np.linalg.solve(np.eye(len(rows)) - hat[np.ix_(rows, rows)], fit.residuals[rows])
    errors *= stats.t.ppf(0.975, fit.residual_dof) / stats.norm.ppf(0.975)
    by_hand = fit_law(points.with_loss(points.loss + fit.residuals - draw * errors), objective=RAW)
    assert bootstrap(fit, 1, seed=7).theta[0] == pytest.approx(by_hand.theta, rel=1e-4)


def test_a_prediction_is_as_far_from_both_ends_in_nats() -> None:
    fit = fit_law(drawn()[0], objective=RAW)
    boot = bootstrap(fit, 100)
    for N in (3e7, 1e11):
        low, high = prediction_interval(boot, N, 50 * N, "w4a4")
        assert (low + high) / 2 == pytest.approx(float(fit.predict(N, 50 * N, "w4a4")))
        assert high - low > 4 * 0.015


def test_lack_of_fit_is_measured_in_nats() -> None:
    """Repeats whose errors are equal in nats: the fit on raw residuals has no lack of fit."""
    points, _ = planted("quest", **SMALL)
    frame = pd.DataFrame(points.to_records()).drop(columns="run")
    twice = pd.concat([frame.assign(seed=seed) for seed in range(3)], ignore_index=True)
    twice["loss"] += 0.02 * np.random.default_rng(1).standard_normal(len(twice))
    fit = fit_law(points_from_frame(twice), objective=RAW)
    F, p = lack_of_fit(fit)
    pure = sum(((v - v.mean()) ** 2).sum() for _, v in twice.groupby(["scheme", "N", "D"])["loss"])
    by_hand = ((fit.residuals**2).sum() - pure) / (fit.residual_dof - 48) / (pure / 48)
    assert (F, p > 0.01) == (pytest.approx(by_hand), True)


def test_a_saved_fit_keeps_its_residuals(tmp_path: Path) -> None:
    points, _ = drawn()
    made = fit_points(points, objective="huber:0.01", residuals="raw", bootstrap=0, alternatives=False)
    document = made.document.to_json()
    assert document["objective"] == "sum of huber(0.01) on raw residuals"
    path = tmp_path / "fit.json"
    path.write_text(json_text(document))
    again = saved_fit(path)
    assert again.fit.objective == made.fit.objective == Objective(0.01, "raw")
    assert again.fit.params == pytest.approx(made.fit.params)
    best, same = (plan_budget(source, flops=1e20, bootstrap=0).options[0] for source in (made, path))
    assert same.loss == pytest.approx(best.loss, rel=1e-9)
    assert saved_fit(path, residuals="raw").fit.objective == made.fit.objective
    with pytest.raises(
        UsageError, match=r"--residuals log: .*fit\.json is a saved fit and used as it was made, with raw residuals"
    ):
        saved_fit(path, residuals="log")
    del document["residuals"]  # as versions before wrote it
    path.write_text(json_text(document))
    assert saved_fit(path).fit.objective == Objective(0.01)


def test_the_option_of_the_commands(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    pd.DataFrame(drawn()[0].to_records()).drop(columns="run").to_csv(table, index=False)
    assert "sum of least squares on raw residuals" in output("fit-scaling", table, "--residuals", "raw", "--bootstrap", 0)
    fit = json.loads(output("fit-scaling", table, "--residuals", "raw", "--bootstrap", 0, "--json"))
    assert (fit["residuals"], fit["options"]["residuals"]) == ("raw", "raw")
    losses = {}
    for kind in ("log", "raw"):
        asked = (
            "predict",
            table,
            "--N",
            "1e9",
            "--D",
            "2e10",
            "--scheme",
            "4",
            "--residuals",
            kind,
            "--bootstrap",
            0,
            "--json",
        )
        losses[kind] = json.loads(output(*asked))["cells"][0]["loss"]
    assert losses["log"] != pytest.approx(losses["raw"], rel=1e-6)
    assert "unknown residuals 'ln'; choices: log, raw" in output("fit-scaling", table, "--residuals", "ln", code=2)


def test_objectives_are_read_with_their_residuals() -> None:
    assert objective_from("huber:1e-3", "raw") == Objective(1e-3, "raw")
    assert objective_from("lsq", "raw") == RAW
    assert objective_from(RAW) is RAW
    with pytest.raises(LawError, match="unknown residuals 'x'"):
        objective_from("lsq", "x")
