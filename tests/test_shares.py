"""When to quantize: laws that know of it, their limits, what tables say of it, and plans and predictions at the best share."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import output
from planted import SHARED, planted
from scipy.optimize import minimize_scalar

import questctl
from questctl.analysis.choice import alternatives, choose
from questctl.analysis.design import next_runs, transition_gradient
from questctl.analysis.findings import of_kind
from questctl.analysis.fit import fit_law
from questctl.analysis.laws import LAWS, Design
from questctl.analysis.planner import plan
from questctl.analysis.points import Points, points_from_frame
from questctl.analysis.shares import MOST_SHARE, at_best_share
from questctl.analysis.tables import PointError
from questctl.analysis.transitions import transition
from questctl.analysis.uncertainty import bootstrap
from questctl.errors import UsageError
from questctl.scaling.fit import fit_points
from questctl.scaling.plan_files import config_file, sweep_file

SMALL = {"sizes": (3e7, 1e8, 3e8, 1e9), "ratios": (10, 30, 90, 270), "schemes": ("bf16", "w8a8", "w4a4", "w2a2")}
LATE = ["switch", "switch-eff"]

pytestmark = pytest.mark.usefixtures("each_fit_once")


@pytest.fixture(scope="module")
def points() -> Points:
    return planted("switch-eff", noise=1e-3, **SMALL)[0]


@pytest.fixture(scope="module")
def fits() -> dict:
    return {name: fit_law(planted(name, noise=1e-3, **SMALL)[0], name) for name in LATE}


def test_runs_quantized_from_their_first_step_follow_quest_exactly(points: Points) -> None:
    x = Design.of(dataclasses.replace(points, share=np.zeros(len(points))))
    theta = fit_law(points, "switch-eff", n_starts=2).theta
    plain = np.concatenate([theta[:5], theta[9:]])
    assert np.array_equal(LAWS["switch-eff"].predict(theta, x)[0], LAWS["quest"].predict(plain, x)[0])


def test_full_precision_pays_nothing(fits: dict) -> None:
    p = SHARED["switch"]
    exact = fit_law(planted("switch", **SMALL)[0], "switch")
    expected = p["A"] / 1e8 ** p["alpha"] + p["B"] / 1e10 ** p["beta"] + p["E"]
    assert float(exact.predict(1e8, 1e10, "bf16", share=0.5)) == pytest.approx(expected, rel=1e-9)
    for fit in fits.values():
        assert at_best_share(fit, fit.theta, fit.design.at(1e8, 1e10, np.array(0))).share.tolist() == [[0.0]]


@pytest.mark.parametrize("name", LATE)
def test_the_best_share_is_that_of_a_search(fits: dict, name: str) -> None:
    fit = fits[name]
    for N, ratio, scheme in ((3e7, 10, "w2a2"), (1e9, 270, "w4a4"), (1e8, 4000, "w8a8")):
        x = fit.design.at(N, N * ratio, np.array(fit.points.index(scheme)))
        found = at_best_share(fit, fit.theta, x)
        shares = np.append(np.linspace(0, MOST_SHARE, 20_000), found.share)
        losses = fit.predict(N, N * ratio, scheme, share=shares)
        assert losses[-1] <= losses.min() + 1e-12
        assert losses[-1] == pytest.approx(float(fit.predict(N, N * ratio, scheme)), abs=1e-12)
    many = fit.design.at(np.geomspace(1e7, 1e9, 5), 1e10, np.array(fit.points.index("w2a2")))
    thetas = fit.theta + 1e-3 * np.random.default_rng(0).standard_normal((3, len(fit.theta)))
    each = at_best_share(fit, thetas, many).share
    assert each.shape == (3, 5)
    assert each[1, 2] == pytest.approx(at_best_share(fit, thetas[1], many).share[0, 2], abs=1e-6)


@pytest.mark.parametrize("name", LATE)
def test_a_plan_is_the_least_loss_over_size_tokens_and_share(fits: dict, name: str) -> None:
    """Size, tokens and share against a brute-force search over sizes and shares."""
    fit, flops = fits[name], 1e20
    for label in ("w4a4", "w2a2"):
        (best,) = plan(fit, [label], flops)
        N, share = np.meshgrid(np.geomspace(best.N / 3, best.N * 3, 301), np.linspace(0, MOST_SHARE, 1001))
        losses = fit.predict(N, flops / 6 / N, label, share=share)
        at = np.unravel_index(np.argmin(losses), losses.shape)
        assert best.loss <= losses.min() + 1e-12
        assert best.loss == pytest.approx(losses.min(), abs=1e-5)
        assert best.share == pytest.approx(share[at], abs=0.01)
        assert pytest.approx(N[at], rel=0.02) == best.N
        one = minimize_scalar(
            lambda s, o=best: float(fit.predict(o.N, o.D, o.scheme, share=s)), bounds=(0, MOST_SHARE), method="bounded",
            options={"xatol": 1e-9},
        )  # fmt: skip
        assert best.share == pytest.approx(one.x, abs=1e-4)
    assert plan(fit, ["bf16"], flops)[0].share is None


def test_transitions_are_between_models_at_their_best_shares(fits: dict) -> None:
    fit = fits["switch-eff"]
    found = transition(fit, 1e9, 8, 4, bootstrap(fit, 30))
    assert found.interval[0] <= found.ratio <= found.interval[1]

    def best(N: float, D: float, label: str) -> float:
        return fit.predict(N, D, label, share=np.linspace(0, MOST_SHARE, 5000)).min()

    gap = lambda r: best(4e9, 1e9 * r / 4, "w4a4") - best(2e9, 1e9 * r / 2, "w8a8")  # noqa: E731
    assert gap(found.ratio) == pytest.approx(0, abs=1e-6)
    assert gap(found.ratio * 1.1) < 0 < gap(found.ratio / 1.1)
    # its gradient by refitting the transition to a moved θ
    many, few = fit.points.index(8), fit.points.index(4)
    gradient = transition_gradient(fit, 1e9, many, few)
    for i in (1, 5, 7, 9):
        step = np.zeros(len(fit.theta))
        step[i] = 1e-4
        up, down = (transition(dataclasses.replace(fit, theta=fit.theta + s * step), 1e9).ratio for s in (1, -1))
        assert gradient[i] == pytest.approx(np.log(up / down) / 2e-4, rel=2e-3), fit.names[i]


def test_laws_are_compared_with_these_only_where_shares_differ(points: Points) -> None:
    never = dataclasses.replace(points, share=np.zeros(len(points)))
    assert not any(LAWS[name].suits(never) for name in LATE)
    assert not set(LATE) & {fit.law.name for fit in alternatives(fit_law(never, "offset"))}
    assert all(LAWS[name].suits(points) for name in LATE)
    choice = choose(points, ["quest", "qat", "switch-eff"])
    assert (choice.best.law.name, choice.clear) == ("switch-eff", True)


def test_a_law_that_ignores_the_shares_says_so(points: Points) -> None:
    for law in ("quest", "chinchilla"):
        (note,) = of_kind(fit_law(points, law).warnings, "shares_ignored")
        assert note.sentence.startswith("Quantized runs began in full precision for 4 shares of their tokens (0 to 0.75)")
        assert note.numbers["shares"] == [0, 0.25, 0.5, 0.75]
    assert not of_kind(fit_law(points, "switch-eff").warnings, "shares_ignored")
    one = dataclasses.replace(points, share=np.where(points.share > 0, 0.5, 0.5))
    assert not of_kind(fit_law(one).warnings, "shares_ignored")


def test_what_shares_and_sizes_do_not_identify_is_said(points: Points) -> None:
    two = fit_law(points.subset(np.isin(points.share, [0, 0.5])), "switch-eff")
    assert of_kind(two.warnings, "few_shares")
    one_width = planted("switch-eff", noise=1e-3, schemes=("bf16", "w2a2"), ratios=(30, 35, 40, 45))[0]
    assert of_kind(fit_law(one_width, "switch-eff").warnings, "few_byte_ratios")
    assert not of_kind(fit_law(points, "switch-eff").warnings, "few_byte_ratios", "few_shares")
    never = dataclasses.replace(points, share=np.zeros(len(points)))
    fit = fit_law(never, "switch-eff")
    assert [fit.params[name] for name in ("tau", "c", "xi", "omega")] == [None] * 4
    assert fit.eff == pytest.approx(fit_law(never).eff, rel=1e-6)
    assert plan(fit, ["w4a4"], 1e20)[0].share is None
    with pytest.raises(UsageError, match="what a share is worth is not known"):
        questctl.predict(fit_points(never, "switch-eff", bootstrap=0), N=1e8, D=1e10, share=0.5)
    with pytest.raises(PointError, match="needs quantized runs of several shares"):
        fit_law(never, "switch")
    rounded = dataclasses.replace(points, share=np.where(points.group == points.index("w4a4"), 1.0, points.share))
    with pytest.raises(PointError, match="needs training after quantization"):
        fit_law(rounded, "switch-eff")
    both = planted("switch", schemes=("bf16", "w4a4", "w4a16", "w2a2"), sizes=SMALL["sizes"])[0]
    (merged,) = of_kind(fit_law(both, "switch").warnings, "widths_merged")
    assert merged.numbers == {"schemes": ["w4a16", "w4a4"]}


def test_a_column_of_tokens_in_full_precision_is_read(points: Points) -> None:
    frame = pd.DataFrame(points.to_records())
    assert "tokens_fp" in frame
    for name in ("tokens_fp", "D_fp"):
        read = points_from_frame(frame.rename(columns={"tokens_fp": name}))
        assert read.share == pytest.approx(points.share)
        assert read.hash != dataclasses.replace(points, share=np.zeros(len(points))).hash
    # run folders name the share in the scheme, too; the unquantized have all their tokens in full precision
    full = frame.assign(tokens_fp=np.where(frame.scheme == "bf16", frame.D, frame.tokens_fp.fillna(0)))
    full.loc[full.scheme == "w4a4", "scheme"] = [f"w4a4+s{s:.3g}" for s in points.share[points.group == points.index("w4a4")]]
    again = points_from_frame(full)
    assert again.labels == points.labels
    assert again.share == pytest.approx(points.share)
    for bad in (-1, 1e15):
        with pytest.raises(PointError, match=r"column 'tokens_fp': .* is not between 0 and the"):
            points_from_frame(frame.assign(tokens_fp=bad))


def test_the_commands_take_and_show_shares(points: Points, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    frame = pd.DataFrame(points.to_records()).drop(columns="run")
    frame.to_csv(table, index=False)
    asked = ("predict", table, "--law", "switch-eff", "--N", "1e8", "--D", "1e10", "--scheme", "4", "--bootstrap", 0)
    best = json.loads(output(*asked, "--json"))["cells"][0]
    half = json.loads(output(*asked, "--share", "0.5", "--json"))["cells"][0]
    assert best["loss"] < half["loss"]
    assert half["share"] == 0.5
    planned = json.loads(output("plan", table, "--law", "switch-eff", "--flops", "1e20", "--bootstrap", 0, "--json"))
    by_scheme = {option["scheme"]: option["share"] for option in planned["options"]}
    assert by_scheme["bf16"] is None
    assert 0 < by_scheme["w2a2"] < 1
    shown = output("plan", table, "--law", "switch-eff", "--flops", "1e20", "--bits", "2", "--bootstrap", 0)
    assert "% of them before quantization, predicted loss" in shown
    assert " share " in shown
    for words, message in (
        (("--share", "1"), "--share: 1 is not a part of the tokens"),
        (("--share", "0.5", "--law", "quest"), "law quest does not know when a run is quantized"),
    ):
        assert message in output(*asked, *words, code=2)


def test_files_of_plans_say_when_to_quantize(points: Points) -> None:
    made = fit_points(points, "switch-eff", bootstrap=0, alternatives=False)
    planned = questctl.plan_budget(made, flops=1e15, schemes=["w2a2"], bootstrap=0)
    assert f"quant.start = {round(planned.options[0].share, 2)}" in config_file(planned, {})
    more = questctl.plan_next_runs(made, 3, goal="eff:w2a2", bootstrap=0)
    assert all(run.share is not None for run in more.runs if run.scheme != "bf16")
    late = [run for run in more.runs if run.share]
    assert sweep_file(more, {}).count("quant.start") == len(late)
    ignorant = next_runs(fit_law(points), np.eye(5 + 3)[5], 2)
    assert [run.share for run in ignorant] == [None, None]


def test_the_laws_that_know_of_shares() -> None:
    assert [name for name, law in LAWS.items() if law.uses_share] == LATE


@pytest.mark.slow
@pytest.mark.parametrize("law", LATE)
def test_intervals_of_every_parameter_hold_the_truth(law: str) -> None:
    """Between .90 and .985 of 200 simulations; benchmarks/coverage.py --late has the table."""
    spec = importlib.util.spec_from_file_location("late_coverage", Path(__file__).parents[1] / "benchmarks" / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    coverage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coverage)
    points = coverage.late_grid(law)
    held = pd.DataFrame([coverage.measure_late(points, law, seed) for seed in range(200)]).mean()
    assert held.between(0.90, 0.985).all(), held.to_dict()
