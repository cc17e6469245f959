"""Laws of repeated tokens: their limits, published parameters, planted truths, and what plans and predictions say of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report_runs
from command_line import output
from planted import SHARED, planted

import questctl
from questctl.analysis.choice import alternatives, choose
from questctl.analysis.findings import of_kind
from questctl.analysis.fit import evaluate, fit_law
from questctl.analysis.laws import LAWS, Design
from questctl.analysis.points import Points, points_from_frame
from questctl.analysis.tables import PointError
from questctl.analysis.uncertainty import noise_floor, profile_intervals
from questctl.console import json_text
from questctl.errors import UsageError
from questctl.scaling.fit import fit_points, saved_fit
from questctl.scaling.sources import load_sources

SMALL = {"sizes": (3e7, 1e8, 3e8, 1e9), "ratios": (10, 30, 90, 270), "schemes": ("bf16", "w4a4")}


@pytest.fixture(scope="module")
def points() -> Points:
    return planted("repeated", noise=3e-3, **SMALL)[0]


def test_tokens_that_are_all_new_give_law_quest_exactly(points: Points) -> None:
    """Whatever R_D, and also where the text is larger than what a run reads."""
    x = Design.of(points)
    theta = fit_law(points, "repeated", n_starts=2).theta
    for unique in (np.inf, points.D, 3 * points.D):
        at = x.at(points.N, points.D, points.group, unique)
        assert np.array_equal(LAWS["repeated"].predict(theta, at)[0], LAWS["quest"].predict(np.delete(theta, 5), at)[0])


def test_repeated_tokens_are_worth_less_up_to_a_limit() -> None:
    fit = fit_law(planted("repeated", **SMALL)[0], "repeated")
    losses = [float(fit.predict(1e8, passes * 1e9, "bf16", unique=1e9)) for passes in (1, 2, 4, 16, 64, 1e4)]
    assert np.all(np.diff(losses) < 0)
    assert losses[2] == pytest.approx(float(fit.predict(1e8, 4e9, "bf16")), rel=6e-3)  # four passes cost little
    assert losses[-1] == pytest.approx(float(fit.predict(1e8, 16.4e9, "bf16")), rel=1e-9)  # U·(1 + R_D) new tokens


def test_parameters_beyond_the_best_size_follow_the_published_formula() -> None:
    """Muennighoff et al.'s fit to their 182 runs, as the code beside the paper evaluates it."""
    A, B, E, alpha, R_D, R_N = np.exp(6.255414), np.exp(7.3049974), np.exp(0.6254804), 0.3526596, 15.387756, 5.309743
    N, D, U = (v.ravel() for v in np.meshgrid([1e7, 1e8, 8.7e9], [1e9, 1e10, 9e10], [1e8, 4e9, 2.5e10]))
    rows = {"N": N, "D": D, "U": U, "loss": 2 + 1e-6 * np.arange(27), "scheme": "bf16"}
    points = points_from_frame(pd.DataFrame(rows))
    values = {"A": A, "alpha": alpha, "B": B, "beta": alpha, "E": E, "R_D": R_D, "R_N": R_N}
    fit = evaluate(points, "repeated-nd", values)
    for i, (n, d, u) in enumerate(zip(points.N, points.D, points.unique, strict=True)):
        G = (A / B) ** (1 / (2 * alpha))
        un = min(n, u * G * G)
        rn, rd = max(n / un - 1, 0), d / u - 1
        n_term = A / (un + un * R_N * (1 - np.exp(-rn / R_N))) ** alpha
        d_term = B / (u + u * R_D * (1 - np.exp(-rd / R_D))) ** alpha
        assert fit.predict(n, d, unique=u) == pytest.approx(E + n_term + d_term, rel=1e-12), i


def test_a_planted_law_is_recovered_with_intervals(points: Points) -> None:
    fit = fit_law(points, "repeated")
    assert fit.status == "converged"
    ends = profile_intervals(fit, ["R_D", "beta", "eff.w4a4"])
    for name, true in (("R_D", 15.4), ("beta", 0.28), ("eff.w4a4", 1 - np.exp(-4 / 3))):
        assert ends[name][0] < true < ends[name][1], name
    assert ends["R_D"][1] < 3 * ends["R_D"][0]
    assert fit_law(points, "quest").rms > 3 * fit.rms
    assert fit_law(points.with_loss(points.loss), "repeated").condition < 1e3


def test_a_planted_excess_of_parameters_is_recovered() -> None:
    points, _ = planted("repeated-nd", noise=2e-3)
    fit = fit_law(points, "repeated-nd")
    assert fit.status == "converged"
    for name, (low, high) in profile_intervals(fit, ["R_D", "R_N"]).items():
        assert low < SHARED["repeated-nd"][name] < high < 2 * low, name


@pytest.mark.slow
def test_laws_are_compared_with_it_only_where_tokens_are_repeated_often(points: Points) -> None:
    once = dataclasses.replace(points, unique=points.D)
    few = dataclasses.replace(points, unique=points.D / 2)
    for other in (once, few):
        assert not LAWS["repeated"].suits(other)
        assert not {"repeated", "repeated-nd"} & {fit.law.name for fit in alternatives(fit_law(other, "offset"))}
    assert LAWS["repeated"].suits(points)
    choice = choose(points, ["quest", "offset", "repeated"])
    assert choice.best.law.name == "repeated"
    assert [s.law for s in choice.scores if not s.clearly_worse] == ["repeated"]
    assert {fit.law.name for fit in alternatives(fit_law(points, "repeated"))} == {"repeated", "repeated-nd"}


def test_without_repeats_the_law_is_quest_and_says_so(points: Points) -> None:
    new = dataclasses.replace(planted("quest", noise=3e-3, **SMALL)[0], unique=points.D)
    fit, plain = fit_law(new, "repeated"), fit_law(new, "quest")
    params = dict(fit.params)
    assert params.pop("R_D") is None
    assert params == pytest.approx(plain.params, rel=1e-6)
    assert fit.eff == pytest.approx(plain.eff, rel=1e-6)
    assert "R_D gets no number, because no run read a token twice." in [w.sentence for w in fit.warnings]
    with pytest.raises(UsageError, match="no run read a token twice"):
        questctl.predict(fit_points(new, "repeated", bootstrap=0), N=1e8, D=1e10, unique_tokens=1e9)


def test_a_table_without_distinct_tokens_is_refused_and_partial_ones_are_named(points: Points) -> None:
    with pytest.raises(PointError, match=r"column 'unique_tokens': law repeated needs .* --map unique_tokens=COLUMN"):
        fit_law(dataclasses.replace(points, unique=np.full(len(points), np.nan)), "repeated")
    some = dataclasses.replace(points, unique=np.where(points.repeats > 0, points.unique, np.nan))
    (note,) = of_kind(fit_law(some, "repeated").warnings, "unknown_repeats")
    assert note.numbers == {"runs": int(np.sum(points.repeats == 0)), "of": 32}


@pytest.mark.parametrize("name", ["U", "unique_tokens", "D_unique", "Unique Tokens"])
def test_a_column_of_distinct_tokens_is_read(points: Points, name: str) -> None:
    frame = pd.DataFrame(points.to_records())
    read = points_from_frame(frame.rename(columns={"unique_tokens": name}))
    assert np.array_equal(read.repeats, points.repeats)
    assert read.hash == points.hash != dataclasses.replace(points, unique=points.D).hash
    larger = points_from_frame(frame.assign(unique_tokens=1e15))
    assert not larger.repeats.any()  # the size of a text of which runs read a part
    with pytest.raises(PointError, match=r"row 1, column 'unique_tokens': -3 must be a positive"):
        points_from_frame(frame.drop(columns="run").assign(unique_tokens=-3))


def test_epochs_give_the_distinct_tokens(points: Points) -> None:
    frame = pd.DataFrame(points.to_records()).drop(columns="unique_tokens").assign(epochs=points.repeats + 1)
    plain = points_from_frame(frame)
    (note,) = of_kind(plain.notes, "many_epochs")
    assert "--law repeated knows with --map 'unique_tokens=D/epochs'" in note.sentence
    assert points_from_frame(frame, columns={"U": "D/epochs"}).repeats == pytest.approx(points.repeats)


def test_runs_on_other_texts_do_not_repeat_each_other(points: Points) -> None:
    """Two runs of one cell, one of which has read a smaller text twice, do not measure the noise of a run."""
    n = len(points)
    twice = points_from_frame(pd.DataFrame(2 * points.to_records()).assign(run=range(2 * n), seed=[0] * n + [1] * n))
    assert noise_floor(twice)[1] == n
    unlike = dataclasses.replace(twice, unique=np.where(np.arange(2 * n) % 2, twice.unique, twice.unique / 2))
    assert noise_floor(unlike) is None


def test_plans_and_predictions_take_the_distinct_tokens(points: Points, tmp_path: Path) -> None:
    made = fit_points(points, "repeated", bootstrap=0, alternatives=False)
    (tmp_path / "fit.json").write_text(json_text(made.document.to_json()))
    saved = saved_fit(tmp_path / "fit.json")
    assert saved.fit.law.name == "repeated"
    assert saved.fit.params == pytest.approx(made.fit.params)
    new = questctl.plan_budget(saved, flops=1e20, bootstrap=0)
    few = questctl.plan_budget(saved, flops=1e20, bootstrap=0, unique_tokens=2e8)
    assert few.options[0].loss > new.options[0].loss
    assert few.options[0].D < new.options[0].D  # a larger model instead of a twentieth pass
    best = few.options[0]
    N = best.N * np.array([0.97, 1.03])
    around = saved.fit.predict(N, 1e20 / 6 / N, best.scheme, unique=2e8)
    assert np.all(around > best.loss)
    assert "All tokens are taken as new" in " ".join(f.sentence for f in new.findings)
    most = max(option.D for option in few.options) / 2e8
    assert f"are read up to {most:.3g} times." in " ".join(f.sentence for f in few.findings)
    assert set(best.laws) == {"repeated", "repeated-nd"}  # laws that take tokens as new cannot answer


def test_the_commands_say_what_they_take_for_granted(points: Points, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    pd.DataFrame(points.to_records()).drop(columns="run").to_csv(table, index=False)
    asked = ("predict", table, "--law", "repeated", "--N", "1e8", "--D", "1e11", "--scheme", "4", "--bootstrap", 0)
    assert "All tokens are taken as new" in output(*asked)
    assert "The 2B distinct tokens are read up to 50 times, where runs read theirs up to 40 times." in output(
        *asked, "--unique-tokens", "2B"
    )
    few = json.loads(output(*asked, "--unique-tokens", "2B", "--json"))
    assert (few["unique_tokens"], few["cells"][0]["loss"] > json.loads(output(*asked, "--json"))["cells"][0]["loss"]) == (
        2e9,
        True,
    )
    for words, message in (
        (("predict", table, "--N", "1e8", "--D", "1e11", "--unique-tokens", "2B"), "law quest takes every token as new"),
        (("plan", table, "--flops", "1e20", "--unique-tokens", "2B", "--next-runs", 2), "is part of a budget"),
        (("predict", table, "--N", "1e8", "--D", "1e11", "--law", "repeated", "--unique-tokens", "0"), "--unique-tokens"),
    ):
        assert message in output(*words, code=2)


def test_run_folders_know_how_many_of_their_tokens_are_distinct(tmp_path: Path) -> None:
    """All of the training text where a run reads it more than once, else what it reads; unknown in runs of early versions."""
    report_runs.write_all(tmp_path, report_runs.configs(methods=("bf16",)))
    assert np.isnan(load_sources(tmp_path).points.unique).all()
    for env in tmp_path.glob("*/env.json"):
        env.write_text(json.dumps({**json.loads(env.read_text()), "train_tokens": 1_000_000}))
    points = load_sources(tmp_path).points
    assert points.unique == pytest.approx(np.minimum(points.D, 1e6))
    assert points.repeats.max() > 2
    assert fit_points(points, "repeated", bootstrap=0, alternatives=False).fit.params["R_D"] is not None


def test_the_laws_that_know_of_repeats() -> None:
    assert [name for name, law in LAWS.items() if law.uses_repeats] == ["repeated", "repeated-nd"]
