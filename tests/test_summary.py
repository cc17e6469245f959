"""The verdict on planted truths: it reports a misfit where there is one, and none elsewhere."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from planted import PUBLISHED, PUBLISHED_EFF, planted
from scipy import stats
from shared_data import DATA, needs

from questctl.analysis.choice import alternatives
from questctl.analysis.document import FitDocument
from questctl.analysis.findings import Finding, of_kind
from questctl.analysis.fit import evaluate, fit_law
from questctl.analysis.identify import sensitivity
from questctl.analysis.pareto import commonest_budget, frontier
from questctl.analysis.points import Points, make_points, read_points
from questctl.analysis.summary import ANSWERS, _digits, eff_per_bit, findings, make_document, per_bit_formula
from questctl.analysis.uncertainty import bent as trending
from questctl.analysis.uncertainty import bootstrap, departures, holm, residual_trends, with_intervals
from questctl.scaling.fit import FitResult
from questctl.scaling.plan import plan_budget

MISFITS = ("beaten_beyond_noise", "trends", "rises")


def said(points: Points, law: str = "quest") -> dict[str, Finding]:
    """The findings by kind; `rises` is there where eff rises with fewer bits."""
    fit = with_intervals(fit_law(points, law, n_starts=3))
    by_kind = {finding.kind: finding for finding in findings(fit, frontier(points))}
    order = by_kind.get("eff_order")
    return by_kind | ({"rises": order} if order is not None and order.numbers["rises"] else {})


def noisy(points: Points, loss: np.ndarray, seed: int, noise: float = 3e-3) -> Points:
    return points.with_loss(loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(points))))


def at(points: Points, *labels: str) -> np.ndarray:
    return np.isin(points.group, [points.index(label) for label in labels])


@pytest.fixture(scope="module")
def published():
    """The design of the published runs, and losses that the law gives there exactly (eff 8 at .97, of bits that only cost)."""
    points = read_points(DATA / "quest_runs.csv")
    fit = fit_law(points)
    theta = fit.theta.copy()
    values = {"A": np.log(406.4), "alpha": 0.34, "B": np.log(410.7), "beta": 0.28, "E": 1.6, "eff.w8a8": np.log(0.97)}
    for name, value in values.items():
        theta[fit.index(name)] = value
    return points, fit.law.predict(theta, fit.design)[0]


@pytest.mark.slow
@needs("quest_runs.csv")
def test_a_true_law_is_not_called_wrong(published):
    """Twenty sets of runs drawn from the law with .3 % of noise: no sentence of misfit in more than one."""
    verdicts = [said(noisy(*published, seed)) for seed in range(20)]
    assert {kind: n for kind in MISFITS if (n := sum(kind in v for v in verdicts)) > 1} == {}
    assert sum("beaten" in v for v in verdicts) > 7  # w8a8 is often below bf16, and this is all there is to say of it
    assert all("falls with the bits" in v["eff_order"].sentence for v in verdicts)


@needs("quest_runs.csv")
def test_cells_where_full_precision_failed_are_found(published):
    """At the smallest size the full-precision run ended 4 % too high, or all others at that cell 4 % too low."""
    points, loss = published
    small = points.sizes[0] == points.N
    cell = small & (np.abs(points.D / points.N - 98.4) < 5)
    for warped in (np.where(small & at(points, "bf16"), 1.04, 1), np.where(cell & ~at(points, "bf16"), 0.96, 1)):
        for seed in range(3):
            cells = said(noisy(points, loss * warped, seed))["beaten_beyond_noise"].numbers["rows"]
            assert (30_482_560, 2_999_975_936) in {(row["params_non_embedding"], row["tokens"]) for row in cells}


@needs("quest_runs.csv")
def test_a_scheme_with_an_exponent_of_its_own_is_a_trend(published):
    points, loss = published
    bent = loss * np.where(at(points, "w2a2"), (points.N / 1e8) ** 0.01, 1)
    for seed in range(3):
        assert said(noisy(points, bent, seed))["trends"].numbers["schemes"] == ["w2a2"]


@needs("quest_runs.csv")
def test_the_published_runs_keep_their_trend():
    verdict = said(read_points(DATA / "quest_runs.csv"))
    assert verdict["trends"].numbers["schemes"] == ["w1a1", "w1a1-norot"]
    assert verdict["eff_order"].sentence == "Where these runs can tell, the best eff at each width falls with the bits."
    assert verdict["eff_order_open"].sentence == "Whether eff falls from bf16 to w8a8, these runs cannot tell."


def test_eff_falls_or_rises_only_where_the_difference_says_so():
    points, _ = planted("quest", noise=3e-3)
    assert said(points)["eff_order"].sentence == "The best eff at each width falls with the bits."
    w3, w4 = points.index("w3a3"), points.index("w4a4")
    swapped = points.group.copy()
    swapped[points.group == w3], swapped[points.group == w4] = w4, w3
    names = np.array(points.labels)[swapped]
    risen = said(make_points(points.N, points.D, points.loss, names))["rises"]
    assert risen.numbers["rises"] == [["w4a4", "w3a3"]]
    assert risen.sentence == "The best eff at each width does not fall from w4a4 to w3a3, but rises."
    few = planted("quest", noise=5e-2, sizes=(5e4, 1e5, 2e5), ratios=(5, 10), schemes=("bf16", "w4a4", "w2a2"))[0]
    assert said(few)["eff_order_open"].numbers == {"falls": [], "rises": [], "open": [["bf16", "w4a4"], ["w4a4", "w2a2"]]}


def test_many_cells_are_rows_of_a_table():
    points, _ = planted("quest", noise=3e-2)
    beaten = said(points)["beaten"]
    assert beaten.sentence.startswith(f"At {beaten.numbers['cells']} of 120 cells a quantized run beats bf16, nowhere by more")
    assert len(beaten.numbers["rows"]) == beaten.numbers["cells"] > 5


def test_without_unquantized_runs_a_stored_bit_is_compared_with_that_of_the_reference():
    """The table has no 16 bits: its eff is relative to w8a8, which stores 8."""
    points, _ = planted("quest", noise=1e-3, schemes=("w8a8", "w4a4"))
    fit = fit_law(points, n_starts=3)
    assert eff_per_bit(fit) == pytest.approx({"w8a8": 1, "w4a4": 8 * (1 - np.exp(-4 / 3)) / 4}, rel=0.03)
    assert per_bit_formula(fit) == "8·eff/bits"
    sentence = said(points)["best_per_bit"].sentence
    assert sentence.startswith("Per stored bit, w4a4 makes the most of the memory (1.4")
    assert " times w8a8's 8 bits, 95 % interval 1.4" in sentence


@needs("cases/nobf16.csv")
def test_a_reference_that_leads_per_stored_bit_is_compared_with_the_next():
    best = said(read_points(DATA / "cases" / "nobf16.csv"))["best_per_bit"]
    assert best.sentence == (
        "Per stored bit, w4a4 makes the most of the memory (w2a2 has 0.42 times as much, 95 % interval 0.42 to 0.43)."
    )
    assert (best.numbers["scheme"], best.numbers["reference"], best.numbers["value"]) == ("w4a4", "w4a4", 1)


def test_given_parameters_fall_as_they_are_given():
    points, _ = planted("quest", schemes=("bf16", *PUBLISHED_EFF))
    fit = evaluate(points, "quest", PUBLISHED)
    (order,) = of_kind(findings(fit, frontier(points)), "eff_order")
    assert order.numbers["rises"] == [["bf16", "w8a8"]]


def test_exact_losses_have_no_trends_in_their_rounding():
    points, _ = planted("quest")
    assert not holm(np.array([t.p for t in residual_trends(fit_law(points))])).any()
    assert "trends" not in said(points)


def test_a_departure_is_the_coefficient_of_a_regression_that_has_the_term():
    points, _ = planted("quest", noise=3e-3)
    bent = points.with_loss(points.loss * np.where(at(points, "w2a2"), (points.N / 1e8) ** 0.01, 1))
    fit = fit_law(bent)
    columns = np.stack([at(bent, "w2a2") * np.log(bent.N), at(bent, "w4a4") * np.log(bent.D), at(bent, "bf16") * 1.0], axis=1)
    J = sensitivity(fit)
    for together in (False, True):
        slope, t, p = departures(fit, columns, together=together)
        for i in range(3):
            A = np.column_stack([J, columns[:, i]])
            noisy_part = np.column_stack([J, columns]) if together else A
            coefficient = np.linalg.lstsq(A, fit.residuals)[0][-1]
            rest = fit.residuals - noisy_part @ np.linalg.lstsq(noisy_part, fit.residuals)[0]
            dof = len(bent) - noisy_part.shape[1]
            error = np.sqrt(rest @ rest / dof * np.linalg.inv(A.T @ A)[-1, -1])
            assert slope[i] == pytest.approx(coefficient, rel=1e-4)
            assert t[i] == pytest.approx(coefficient / error, rel=1e-4)
            assert p[i] == pytest.approx(2 * stats.t.sf(abs(t[i]), dof), rel=1e-3)
    assert p[0] < 1e-6
    assert residual_trends(fit)[bent.index("w4a4")].p < 1e-4  # bent along by w2a2
    assert trending(fit) == ["w2a2"]
    assert np.isnan(departures(fit, J)[1]).all()  # the law has these already


def test_several_tests_share_one_level():
    assert holm(np.array([0.004, 0.2, np.nan, 0.0051])).tolist() == [False, False, False, False]
    assert holm(np.array([0.0033, 0.2, np.nan, 0.0049])).tolist() == [True, False, False, True]
    assert holm(np.array([0.02, np.nan]), 0.05).tolist() == [True, False]
    assert holm(np.zeros(0)).tolist() == []


# --- every verdict ----------------------------------------------------------------------------------------------------


LONG_NAMES = ("bf16", "w8a8", "w4a4", "w4a4-norot", "lsq-w4a4", "w3a3", "w2a2", "w2a2-norot", "w1a1", "w1a1-norot", "w4a16")


def tables() -> Iterator[Points]:
    """Planted points of several designs, noises and laws, and points without any truth."""
    few = {"sizes": (3e7, 1e8, 4e8), "ratios": (20, 100)}
    for law, noise in (("quest", 0.0), ("quest", 5e-2), ("quartet", 3e-3), ("chinchilla", 3e-3)):
        yield planted(law, noise=noise, **few, schemes=("bf16", "w8a8", "w4a4", "w2a2"))[0]
    yield planted("quest", noise=3e-3, **few, schemes=LONG_NAMES)[0]
    yield planted("quest", noise=3e-3, schemes=LONG_NAMES, sizes=(3e7,), ratios=(25, 100))[0]  # one size
    yield planted("quest", noise=3e-3, sizes=(3e7, 1e8, 4e8), ratios=(25,), schemes=LONG_NAMES[:4])[0]  # one ratio
    yield planted("quest", noise=3e-3, **few, schemes=("w4a4", "w2a2"))[0]  # no reference
    yield planted("quest", noise=3e-3, sizes=(3e7, 1e8), ratios=(25, 100), schemes=("bf16", "w4a4"))[0]
    points, _ = planted("quest", **few, schemes=LONG_NAMES[:3])
    yield points.with_loss(np.random.default_rng(0).uniform(2, 4, len(points)))


@pytest.mark.usefixtures("each_fit_once")
@pytest.mark.parametrize(
    "points",
    [pytest.param(points, marks=pytest.mark.slow if i in (2, 3, 4, 5, 7, 10) else []) for i, points in enumerate(tables())],
    ids=lambda points: f"{len(points.schemes)}x{len(points)}",
)
def test_a_verdict_answers_first_in_at_most_five_short_sentences(points: Points) -> None:
    fit = with_intervals(fit_law(points, "quest" if len(points.schemes) > 1 else "chinchilla", n_starts=3))
    boots = {fit.law.name: bootstrap(fit, 5)} if fit.residual_dof > 0 and fit.status != "failed" else {}
    document = make_document(fit, frontier(points, commonest_budget(points)), boots=boots, others=alternatives(fit))
    assert document.verdict[0].kind in ANSWERS
    assert len(document.verdict) <= 5
    assert [f.kind for f in document.findings[1:] if f.kind in ANSWERS] == []
    sentences = [finding.sentence for finding in document.findings]
    if len(points.schemes) > 1:
        sentences += [f.sentence for f in plan_budget(FitResult(fit), flops=1e22, memory_bytes=1e9, bootstrap=0).findings]
    for sentence in sentences:
        assert len(sentence.split()) <= 25, sentence
        assert sentence.endswith("."), sentence
        assert "nan" not in sentence.split(), sentence
    assert document.findings == (*document.verdict, *document.details)
    again = FitDocument.from_json(json.loads(json.dumps(document.to_json())))
    assert [f.sentence for f in again.findings] == [f.sentence for f in document.findings]


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(2.758, 2.809, "2.76 to 2.81"), (1.8, 4.0, "1.8 to 4"), (2.9996, 3.0004, "2.9996 to 3.0004")]
)
def test_the_ends_of_an_interval_are_told_apart(low: float, high: float, shown: str) -> None:
    digits = _digits(low, high)
    assert f"{low:.{digits}g} to {high:.{digits}g}" == shown
