"""Comparisons on planted losses: paired differences and their intervals by hand, and every kind of claim both ways."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from questctl.analysis.claims import CLAIMS, FAILS, HOLDS, UNSETTLED, ClaimError, claim_of
from questctl.analysis.compare import Comparison, StudyRun, difference

SIZES = ((100_000, 800_000), (200_000, 1_600_000))


def record(scheme="a", seed=0, loss=2.0, cell=SIZES[0], state="done", role="main", lr=1e-3, **more) -> StudyRun:
    return StudyRun(f"{scheme}-{cell[0]}-{seed}-{lr}", scheme, *cell, seed, lr, role, state, loss, **more)


def runs(scheme: str, losses, cell=SIZES[0], **more) -> list[StudyRun]:
    return [record(scheme, seed, loss, cell, **more) for seed, loss in enumerate(losses)]


def judge(records, **claim):
    return claim_of(claim).judge(Comparison(tuple(records)))


# --- differences ------------------------------------------------------------------------------------------------------


def test_the_interval_is_student_s():
    delta = difference([1.0, 2.0, 3.0])
    assert (delta.n, delta.mean) == (3, 2.0)
    assert delta.high - delta.mean == pytest.approx(4.302652729911275 * 1.0 / math.sqrt(3))  # t(0.975, 2) of any table
    assert delta.mean - delta.low == pytest.approx(delta.high - delta.mean)
    assert delta.resolved is False
    assert difference([2.9, 3.0, 3.1]).resolved
    assert difference([]) is None
    one = difference([0.5])
    assert (one.n, one.mean, one.low, one.high, one.resolved) == (1, 0.5, -math.inf, math.inf, False)
    assert "[" not in str(one)


@given(st.lists(st.floats(1, 3), min_size=2, max_size=6), st.floats(-1, 1))
def test_what_seeds_share_drops_out_of_a_paired_difference(losses, shift):
    c = Comparison((*runs("a", losses), *runs("b", [x + shift for x in losses])))
    delta = c.difference("b", "a", SIZES[0])
    assert delta.mean == pytest.approx(shift, abs=1e-9)
    assert delta.high - delta.low == pytest.approx(0, abs=1e-6)


def test_only_shared_seeds_of_finished_main_runs_are_paired():
    c = Comparison(
        (
            record("a", 0, 2.0),
            record("a", 1, 2.5),
            record("a", 2, None, state="diverged"),
            record("a", 3, 9.0, role="fixed"),
            record("b", 1, 2.0),
            record("b", 2, 2.0),
            record("b", 3, 2.0),
            record("b", 0, 5.0, cell=SIZES[1]),
            record("b", 0, None, state="running", grad_norm=3.0),
        )
    )
    assert c.difference("a", "b", SIZES[0]).mean == 0.5
    assert c.difference("a", "b", SIZES[0]).n == 1
    assert c.difference("a", "b", SIZES[1]) is None
    assert c.by_seed("b", SIZES[0], "grad_norm") == {}


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_count_what_is_done_what_diverged_and_what_is_missing():
    a, b = [2.0, 2.2, 2.4], [2.1, 2.4, 2.5]
    records = [
        record("a", 0, 1.0, lr=9e-3, role="search"),
        *runs("a", a, grad_norm=1.0, w_stored_bits=2.0),
        *runs("b", b, grad_norm=4.0),
        record("b", 3, None, state="diverged"),
        record("b", 4, None, state="pending"),
        record("b", 5, None, state="failed"),
        record("a", 0, 3.0, lr=1e-2, role="fixed"),
    ]
    rows = Comparison(tuple(records), {"a": ["b"]}, control="a").rows()
    first, second, third = rows
    assert [(r.scheme, r.role, r.n, r.diverged, r.missing) for r in rows] == [
        ("a", "main", 3, 0, 0),
        ("b", "main", 3, 1, 2),
        ("a", "fixed", 1, 0, 0),
    ]
    assert (first.loss, first.spread, first.w_stored_bits, first.reference) == (fmean(a), stdev(a), 2.0, None)
    assert second.difference == difference([y - x for x, y in zip(a, b, strict=True)])
    assert second.control == second.difference
    assert (first.control, third.difference, third.control) == (None, None, None)
    assert (first.grad_norm, second.grad_norm) == (1.0, 4.0)
    flat = second.to_dict()
    assert (flat["difference"], flat["difference_n"]) == (second.difference.mean, 3)
    assert flat["to_control_low"] == second.control.low
    assert set(map(tuple, (r.to_dict() for r in rows))) == {tuple(flat)}


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "factor", "verdict"),
    [
        (0.5, 2, HOLDS),
        (0.20, 2, HOLDS),
        (0.15, 2, FAILS),
        (0.05, 2, UNSETTLED),
        (0.02, 2, FAILS),
        (0.15, 1, HOLDS),
        (0.10, 1, UNSETTLED),
        (-0.3, 0, FAILS),
        (-0.1, 0, UNSETTLED),
        (0.05, 0, UNSETTLED),
        (0.01, 1, UNSETTLED),
        (-0.1, 2, FAILS),
    ],
)
def test_below_asks_for_a_multiple_of_the_pooled_spread_at_every_size(gap, factor, verdict):
    """Spreads 0.1 (planted) and 0.05: pooled √((0.01 + 0.0025)/2) = 0.079, twice that 0.158; intervals are gap ± 0.124."""
    quiet, loud = [2.0, 2.05, 2.10], [2.0 + gap, 2.1 + gap, 2.2 + gap]
    small = [*runs("q", quiet), *runs("s", [x - 0.05 for x in loud])]
    claim = {"kind": "below", "scheme": "q", "against": "s", "factor": factor}
    judged = judge(small, **claim)
    assert (judged.verdict, judged.holds) == (verdict, {HOLDS: True, FAILS: False}.get(verdict))
    assert judged.numbers[0]["beyond"] is (gap > factor * judged.numbers[0]["spread"])
    assert judged.numbers[0]["spread"] == pytest.approx(math.sqrt((0.01 + 0.0025) / 2))
    assert judged.numbers[0]["spreads"] == {"q": pytest.approx(0.05), "s": pytest.approx(0.1)}
    assert judged.numbers[0]["mean"] == pytest.approx(-gap)
    assert judged.sentence.startswith(f"{verdict.capitalize()}: q is below s")
    assert "100K" in judged.details[0]
    settled = judged.numbers[0]["low"] * judged.numbers[0]["high"] > 0
    assert ("an interval that contains zero" in judged.details[0]) is not settled
    large = [*runs("q", quiet, SIZES[1]), *runs("s", [x - 1 for x in loud], SIZES[1])]  # the other way round
    assert judge([*small, *large], **claim).holds is False


def test_an_interval_that_contains_zero_settles_neither_what_the_means_claim_nor_its_contrary():
    calm = runs("calm", [2.0, 2.001, 2.002])
    wild = [*runs("q", [1.7, 1.7, 1.7]), *runs("s", [1.75, 1.75, 2.4])]  # Δ -0.267 [-1.20, +0.67]
    judged = judge(
        [*wild, *(r for i in range(9) for r in runs(f"calm{i}", [2.0, 2.001, 2.002])), *calm],
        kind="below",
        scheme="q",
        against="s",
        factor=2,
    )
    assert (judged.verdict, judged.numbers[0]["beyond"]) == (UNSETTLED, True)
    assert "an interval that contains zero, though more than 2 × spread" in judged.details[0]
    sure = [*runs("q", [1.0, 1.01, 1.02], SIZES[1]), *runs("s", [1.5, 1.51, 1.52], SIZES[1])]
    both = judge([*wild, *sure], kind="below", scheme="q", against="s")
    assert (both.verdict, both.holds) == (UNSETTLED, None)
    assert [detail.partition(":")[0] for detail in both.details] == ["100K not settled", "200K holds"]
    other = judge([*wild, *sure], kind="below", scheme="s", against="q")
    assert other.verdict == FAILS  # one size is enough to refute it


def test_a_scheme_that_went_astray_does_not_hide_that_it_is_worse():
    records = [*runs("q", [1.0, 1.01, 1.02]), *runs("s", [1.3, 1.31, 1.9]), *runs("t", [1.1, 1.13, 1.12])]
    records += runs("u", [1.2, 1.2])
    judged = judge(records, kind="below", scheme="q", against="s", factor=1)
    squares = 2 * stdev([1.0, 1.01, 1.02]) ** 2 + 2 * stdev([1.3, 1.31, 1.9]) ** 2 + 2 * stdev([1.1, 1.13, 1.12]) ** 2
    assert judged.numbers[0]["spread"] == pytest.approx(math.sqrt(squares / 7))
    assert judged.holds is None  # its own interval contains zero
    assert judged.numbers[0]["beyond"] is True
    calm = [r for i in range(20) for r in runs(f"calm{i}", [1.0, 1.01, 1.02])]
    judged = judge([*records, *calm], kind="below", scheme="q", against="s", factor=2)
    assert judged.details[0].endswith("the spread of s alone 0.344")


def test_below_is_not_judged_without_spread_or_without_a_size():
    claim = {"kind": "below", "scheme": "q", "against": "s", "factor": 2}
    assert judge([record("q", 0, 1.0), record("s", 0, 5.0)], **claim).holds is None
    assert judge([record("q", 0, 1.0), record("s", 0, 5.0)], **{**claim, "factor": 0}).verdict == UNSETTLED
    pairs = [*runs("q", [1.0, 1.1]), *runs("s", [5.0, 5.1])]
    assert judge(pairs, **claim).holds is True
    waiting = [record("q", 0, None, SIZES[1], "pending"), record("s", 0, None, SIZES[1], "pending")]
    assert judge([*pairs, *waiting], **claim).holds is None
    assert judge([*pairs, record("q", 0, 1.0, SIZES[1])], **claim).holds is True  # not planned for both there
    lost = [*pairs, record("s", 2, None, state="diverged")]
    assert "1 of s diverged" in judge(lost, **claim).details[0]
    assert judge([], **claim).holds is None


def test_compare_answers_only_what_the_interval_settles():
    records = [
        *runs("q", [1.0, 1.1, 1.2]),
        *runs("low", [0.8, 0.91, 0.99]),
        *runs("high", [1.2, 1.31, 1.39]),
        *runs("same", [1.1, 1.0, 1.2]),
    ]
    judged = judge(records, kind="compare", scheme="q", against=["low", "high", "same", "none"])
    assert judged.holds is None
    assert [n["verdict"] for n in judged.numbers] == ["higher", "lower", "not settled"]
    assert judged.sentence == "q is higher than low, lower than high, not told apart from same, not compared with none."
    assert judged.details[-1] == "none: trained at no size together"


def test_a_comparison_that_only_one_size_settles_names_that_size():
    records = [*runs("q", [1.0, 1.01, 1.02]), *runs("r", [2.0, 2.01, 2.02])]
    records += [*runs("q", [1.0, 2.0, 3.0], SIZES[1]), *runs("r", [2.0, 1.0, 3.5], SIZES[1])]
    assert judge(records, kind="compare", scheme="q", against=["r"]).sentence == "q is lower than r at 100K."


def test_stable_counts_searches_and_fixed_rates_but_not_higher_ones():
    claim = {"kind": "stable", "schemes": ["q-*"], "lr": 1e-2}
    calm = [
        record("q-1", 0),
        record("q-1", 0, lr=1e-2, role="fixed"),
        record("q-2", 0, lr=1e-2, role="fixed"),
        record("q-1", 0, None, state="diverged", lr=2e-2, role="search"),
        record("other", state="diverged"),
    ]
    judged = judge(calm, **claim)
    assert judged.holds is True
    assert judged.numbers[0]["runs"] == 3
    assert judged.details[-1].endswith("of the others 1 of 1, tried up to 0.001 (other)")
    steady = [
        *calm[:4],
        *runs("s", [2.0, 2.0]),
        record("s", lr=8e-3, role="search"),
        record("t", lr=2e-2),
        record("t", state="failed"),
    ]
    judged = judge(steady, **claim)
    assert judged.numbers[0]["others"] == {"runs": 4, "diverged": [], "highest_lr": {"s": 8e-3, "t": 2e-2}}
    assert (
        judged.details[-1] == "of the others 0 of 4, tried up to 0.008 (s), 0.02 (t), so that this tells no method from another"
    )
    assert judge([*calm, record("q-3", 0)], **claim).holds is None  # never tried at 1e-2
    assert "not tried at 0.01: q-3" in judge([*calm, record("q-3", 0)], **claim).details
    assert judge([*calm, record("q-2", 1, None, state="diverged", role="search")], **claim).holds is False
    assert judge([], **claim).holds is None


@pytest.mark.parametrize(("norm", "holds"), [(0.9, True), (1.1, False)])
def test_the_gradient_norm_is_a_mean_of_ratios_by_seed(norm, holds):
    records = [record("q", s, grad_norm=norm * k) for s, k in enumerate((1, 10))]
    records += [record("s", s, grad_norm=3.0 * k) for s, k in enumerate((1, 10, 7))]
    judged = judge(records, kind="grad-norm", scheme="q", against="s", below=1 / 3)
    assert judged.holds is holds
    assert judged.numbers[0]["ratio"] == pytest.approx(norm / 3)
    assert judged.numbers[0]["ratios"] == pytest.approx([norm / 3] * 2)
    assert judged.numbers[0]["n"] == 2
    assert len(judged.numbers) == 1
    trials = [record("q", 9, role="search", lr=lr, grad_norm=n) for lr, n in ((1.0, 2.0), (2.0, 1.0), (4.0, 9.0))]
    trials += [
        record("s", 9, role="search", lr=1.0, grad_norm=4.0),
        record("s", 9, role="search", lr=2.0, grad_norm=8.0),
        record("s", 9, None, role="search", lr=4.0, grad_norm=8.0, state="diverged"),
    ]
    judged = judge([*records, *trials], kind="grad-norm", scheme="q", against="s", below=1 / 3)
    assert judged.holds is holds
    assert judged.numbers[1] == {"search": {1.0: 0.5, 2.0: 0.125}}
    assert judged.details[-1] == "in the search, at equal rates: 0.5 at 1, 0.125 at 2"


def test_a_ratio_whose_interval_contains_the_limit_is_not_settled():
    """Ratios 0.1, 0.2, 0.3: 0.2 ± 4.303·0.1/√3 = [-0.048, 0.448] contains a third; a tenth of the scatter leaves it out."""
    for scatter, verdict in ((0.1, UNSETTLED), (0.01, HOLDS)):
        records = [record("q", s, grad_norm=0.2 + (s - 1) * scatter) for s in range(3)]
        records += [record("s", s, grad_norm=1.0) for s in range(3)]
        judged = judge(records, kind="grad-norm", scheme="q", against="s", below=1 / 3)
        assert judged.verdict == verdict
        assert judged.numbers[0]["high"] == pytest.approx(0.2 + 4.302652729911275 * scatter / math.sqrt(3))
        assert ("an interval that contains 0.333" in judged.details[0]) is (verdict == UNSETTLED)


@pytest.mark.parametrize(("loss", "holds"), [(1.74, True), (1.76, False)])
def test_between_interpolates_over_bits_by_seed(loss, holds):
    """2.25 bits between 2 (2.0) and 3 (1.0): the line is at 1.75."""
    noise = (0.0, 0.3, -0.2)  # shared by seed
    records = [
        *runs("two", [2.0 + e for e in noise], w_stored_bits=2.0),
        *runs("three", [1.0 + e for e in noise], w_stored_bits=3.0),
        *runs("mixed", [loss + e for e in noise], w_stored_bits=2.25),
    ]
    judged = judge(records, kind="between", scheme="mixed", neighbours=["two", "three"])
    assert judged.holds is holds
    assert judged.numbers[0]["mean"] == pytest.approx(loss - 1.75)
    assert judged.numbers[0]["bits"] == [2.25, 2.0, 3.0]
    noisy = [*records[:6], *runs("mixed", [loss + e for e in (0.4, -0.2, 0.1)], w_stored_bits=2.25)]
    assert judge(noisy, kind="between", scheme="mixed", neighbours=["two", "three"]).verdict == UNSETTLED
    outside = [*records[:6], *runs("mixed", [0.5] * 3, w_stored_bits=4.0)]
    assert judge(outside, kind="between", scheme="mixed", neighbours=["two", "three"]).holds is None


@pytest.mark.parametrize(
    "folder", sorted((Path(__file__).parents[1] / "experiments" / "results").glob("*/")), ids=lambda p: p.name
)
def test_what_is_published_is_what_the_published_runs_say(folder):
    published = json.loads((folder / "study.json").read_text())
    c = Comparison(tuple(StudyRun.from_dict(run) for run in published["runs"]))
    for finding in published["findings"]:
        judgement = claim_of(finding["claim"]).judge(c)
        assert json.loads(json.dumps(judgement.to_dict())) == finding
        assert f"* {judgement.sentence}\n" in (folder / "README.md").read_text()


def test_the_runs_of_an_earlier_version_are_read():
    old = {
        "run": "x",
        "scheme": "a",
        "params": 5,
        "tokens": 9,
        "seed": 0,
        "lr": 1.0,
        "role": "main",
        "state": "done",
        "loss": 2.0,
    }
    run = StudyRun.from_dict({**old, "grad_norm": 1.0, "bits": 2.5, "a_bits": 4.0, "weights": "w", "activations": "a"})
    assert (run.size, run.w_stored_bits, run.a_stored_bits) == ((5, 9), 2.5, 4.0)
    assert StudyRun.from_dict(vars(run)) == run


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "belw"}, ["belw", *CLAIMS]),
        ({}, ["None"]),
        ({"kind": "below", "scheme": "a"}, ["against", "missing"]),
        ({"kind": "below", "scheme": "a", "against": "b", "by": 2}, ["by", "factor"]),
        ({"kind": "below", "scheme": "a", "against": ["b"]}, ["against", "name of a scheme"]),
        ({"kind": "below", "scheme": "a", "against": "b", "factor": "2"}, ["factor", "number"]),
        ({"kind": "below", "scheme": "a", "against": "b", "factor": True}, ["factor", "number"]),
        ({"kind": "stable", "schemes": "a", "lr": 1}, ["schemes", "list"]),
        ({"kind": "stable", "schemes": [], "lr": 1}, ["schemes", "list"]),
        ({"kind": "between", "scheme": "a", "neighbours": ["b"]}, ["two"]),
    ],
)
def test_a_claim_that_cannot_be_read_says_why(table, words):
    with pytest.raises(ClaimError) as e:
        claim_of(table)
    assert [w for w in words if w not in str(e.value)] == []


# --- the best share ---------------------------------------------------------------------------------------------------


def shares_study(best=lambda n, d: 0.75, noise: float = 0.002, seeds: int = 4):
    """Runs of q at shares 0 to .9, whose loss is .4·(share − best)² above a level: at share 0 the gain is .4·best²."""
    draw = random.Random(0)
    runs = []
    for n, d in ((1e5, 1e6), (1e5, 4e6), (4e5, 4e6), (4e5, 1.6e7)):
        for seed in range(seeds):
            level = 2 + draw.gauss(0, 0.05)  # common to the runs of a seed
            for share in (0, 0.25, 0.5, 0.75, 0.9):
                loss = level + 0.4 * (share - best(n, d)) ** 2 + draw.gauss(0, noise)
                name = f"q+s{share:g}" if share else "q"
                runs.append(StudyRun(f"{name}{n}{d}{seed}", name, int(n), int(d), seed, 1e-3, "main", "done", loss))
    return Comparison(tuple(runs))


def test_the_gain_of_the_best_share_is_paired_and_judged_by_other_seeds() -> None:
    judged = claim_of({"kind": "best-share", "scheme": "q"}).judge(shares_study())
    assert judged.verdict is None
    numbers = judged.numbers[-1]
    assert numbers["gain"]["low"] < 0.4 * 0.75**2 < numbers["gain"]["high"]
    assert numbers["gain"]["high"] - numbers["gain"]["low"] < 0.01
    assert judged.sentence.startswith("the best share of q (0.75 of the tokens) gains 0.22")
    assert "whether it moves with tokens per parameter-byte is not settled" in judged.sentence
    assert len(judged.sentence.split()) <= 30
    # without any effect the best of five means is not counted as a gain
    luck = claim_of({"kind": "best-share", "scheme": "q"}).judge(shares_study(lambda n, d: 0.45, noise=0.0, seeds=2))
    assert luck.numbers[-1]["gain"]["mean"] == pytest.approx(0.4 * (0.45**2 - 0.05**2))
    gains = []
    for trial in range(40):  # without any effect, the best of five means would gain .012 by luck
        draw = random.Random(trial)
        flat = [dataclasses.replace(r, loss=2.0 + draw.gauss(0, 0.01)) for r in shares_study().runs]
        gains.append(claim_of({"kind": "best-share", "scheme": "q"}).judge(Comparison(tuple(flat))).numbers[-1]["gain"]["mean"])
    assert abs(fmean(gains)) < 0.002


def test_whether_the_best_share_grows_is_a_slope_with_an_interval() -> None:
    grows = claim_of({"kind": "best-share", "scheme": "q"}).judge(shares_study(lambda n, d: 0.9 if d / n > 20 else 0.25))
    assert "it grows with tokens per parameter-byte" in grows.sentence
    falls = claim_of({"kind": "best-share", "scheme": "q"}).judge(shares_study(lambda n, d: 0.25 if d / n > 20 else 0.9))
    assert "it falls with tokens per parameter-byte" in falls.sentence
    one = claim_of({"kind": "best-share", "scheme": "q"}).judge(shares_study(seeds=1))
    assert one.verdict == "cannot be judged"
