"""IsoFLOP optima: planted exponents come back, edges and noise are named, and other designs are not taken for such tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import output
from planted import planted
from shared_data import DATA, needs

from questctl.analysis import figures, isoflop_optima
from questctl.analysis.document import FitDocument
from questctl.analysis.findings import of_kind
from questctl.analysis.fit import fit_law
from questctl.analysis.isoflop import law_exponent
from questctl.analysis.points import Points, make_points, read_points
from questctl.console import json_text
from questctl.scaling.fit import fit_points

FLOPS = np.geomspace(1e18, 1e21, 5)
A, B, E = 406.4, 410.7, 1.69


def best_size(flops: float, alpha: float, beta: float, eff: float = 1.0) -> float:
    """N of least A/(N·eff)^α + B/(C/6N)^β."""
    return float((alpha * A / (beta * B * eff**alpha)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta)))


def curves(
    alpha: float = 0.34,
    beta: float = 0.28,
    *,
    noise: float = 0.0,
    seed: int = 0,
    sizes: int = 7,
    span: float = 16.0,
    shift: float = 1.0,
    effs: dict[str, float] | None = None,
    flops: np.ndarray = FLOPS,
    jitter: float = 0.0,
) -> Points:
    """Runs at each compute whose sizes lie around the best one, times `shift`, over a factor `span`."""
    rng = np.random.default_rng(seed)
    rows = []
    for scheme, eff in (effs or {"bf16": 1.0}).items():
        for C in flops:
            for N in best_size(C, alpha, beta) * shift * np.geomspace(span**-0.5, span**0.5, sizes):
                D = C / 6 / N * np.exp(jitter * rng.uniform(-1, 1))
                loss = (A / (N * eff) ** alpha + B / D**beta + E) * np.exp(noise * rng.standard_normal())
                rows.append((N, D, loss, scheme))
    return make_points(*zip(*rows, strict=True))


@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.5, 0.25), (0.3, 0.4)])
def test_planted_exponents_come_back(alpha: float, beta: float) -> None:
    (one,) = isoflop_optima(curves(alpha, beta))
    assert (one.scheme, one.runs, len(one.budgets), one.clear) == ("bf16", 35, 5, True)
    assert (one.a, one.b) == pytest.approx((beta / (alpha + beta), alpha / (alpha + beta)), abs=1e-9)
    for budget, flops in zip(one.budgets, FLOPS, strict=True):
        assert (budget.flops, budget.edge, budget.sizes) == (pytest.approx(flops), "", 7)
        assert pytest.approx(best_size(flops, alpha, beta), rel=0.25) == budget.N
        assert pytest.approx(flops) == budget.D * budget.N * 6
        assert one.factor * flops**one.a == pytest.approx(budget.N)


def test_the_parabola_is_that_of_polyfit() -> None:
    points = curves(noise=3e-3)
    (one,) = isoflop_optima(points)
    for budget in one.budgets:
        x, y = np.log(points.N[budget.rows]), points.loss[budget.rows]
        c = np.polyfit(x, y, 2)
        assert np.exp(-c[1] / 2 / c[0]) == pytest.approx(budget.N)
        assert budget.at(points.N[budget.rows]) == pytest.approx(np.polyval(c, x))
        assert budget.loss == pytest.approx(np.polyval(c, np.log(budget.N)))


@pytest.mark.parametrize(("sizes", "noise"), [(5, 2e-3), (9, 5e-3)])
def test_intervals_hold_the_truth(sizes: int, noise: float) -> None:
    """95 % of them in the long run; of 60, fewer than 52 with probability .01."""
    held = []
    for seed in range(60):
        (one,) = isoflop_optima(curves(noise=noise, seed=seed, sizes=sizes, span=10), replicates=200, seed=seed)
        held.append(one.a_interval[0] < 0.28 / 0.62 < one.a_interval[1])
        assert one.b_interval == pytest.approx((1 - one.a_interval[1], 1 - one.a_interval[0]))
    assert sum(held) >= 52


def test_a_minimum_outside_the_sizes_is_an_edge_and_counts_for_nothing() -> None:
    inside, low, high = curves(flops=FLOPS[:3]), curves(flops=FLOPS[3:4], shift=8), curves(flops=FLOPS[4:], shift=1 / 8)
    points = make_points(
        *(np.concatenate([getattr(p, x) for p in (inside, low, high)]) for x in ("N", "D", "loss")), ["bf16"] * 35
    )
    (one,) = isoflop_optima(points)
    assert [budget.edge for budget in one.budgets] == ["", "", "", "below", "above"]
    assert one.a == pytest.approx(isoflop_optima(inside)[0].a)
    finding = of_kind(fit_points(points, "chinchilla", bootstrap=0, alternatives=False).document.findings, "isoflop_edges")[0]
    assert finding.sentence == (
        "At 2 of 5 budgets of bf16 the least loss is not among the sizes (1.8e+20 FLOP: below the smallest size)."
    )
    upside_down = points.with_loss(6 - points.loss)
    assert {b.edge for b in isoflop_optima(upside_down)[0].budgets} == {"none"}


def test_runs_share_a_budget_within_the_tolerance() -> None:
    whole_steps = curves(jitter=0.03)
    assert [budget.sizes for budget in isoflop_optima(whole_steps)[0].budgets] == [7] * 5
    assert isoflop_optima(whole_steps, tolerance=1e-3) == ()
    doubled = isoflop_optima(curves(flops=np.array([1e19, 2e19, 4e19])))[0]
    assert [budget.flops for budget in doubled.budgets] == pytest.approx([1e19, 2e19, 4e19])
    assert isoflop_optima(curves(sizes=2)) == ()
    assert isoflop_optima(planted("coverage")[0]) == ()


def test_each_scheme_has_its_own_optima() -> None:
    full, low = isoflop_optima(curves(effs={"bf16": 1.0, "w4a4": 0.5}, span=30))
    assert (full.scheme, low.scheme) == ("bf16", "w4a4")
    assert low.a == pytest.approx(full.a, abs=0.01)
    both = fit_points(curves(effs={"bf16": 1.0, "w4a4": 0.5}, span=30, noise=1e-3), bootstrap=0, alternatives=False).document
    assert [f.numbers["scheme"] for f in of_kind(both.findings, "isoflop", "isoflop_others")] == ["bf16", "w4a4"]
    ratio = [b.N / a.N for a, b in zip(full.budgets, low.budgets, strict=True)]
    assert ratio == pytest.approx([0.5 ** (-0.34 / 0.62)] * 5, rel=0.1)  # fewer parameters count, so more of them are best


def test_groups_that_cannot_tell_say_so() -> None:
    def found(points: Points, kind: str) -> list:
        return of_kind(fit_points(points, "chinchilla", bootstrap=0, alternatives=False).document.findings, kind)

    three = curves(sizes=3, noise=1e-3)
    assert isoflop_optima(three)[0].a_interval is None
    assert "leave nothing to measure the noise by" in found(three, "isoflop_open")[0].sentence
    beyond = curves(shift=10)
    assert "only 0 of 5 have their least loss among the sizes" in found(beyond, "isoflop_open")[0].sentence
    assert np.isnan(isoflop_optima(beyond)[0].a)
    noisy = curves(noise=4e-3, span=3, sizes=9)
    assert "noise can move the least loss over an end of the sizes" in found(noisy, "isoflop_open")[0].sentence


def test_the_law_stands_beside_the_parabolas() -> None:
    points = curves(noise=1e-3)
    fit = fit_law(points, "chinchilla")
    by_law = law_exponent(fit, isoflop_optima(points)[0])
    assert by_law == pytest.approx(fit.params["beta"] / (fit.params["alpha"] + fit.params["beta"]), abs=1e-6)
    (finding,) = of_kind(fit_points(points, "chinchilla", bootstrap=0).document.verdict, "isoflop")
    assert f"by law chinchilla C^{by_law:.3f}" in finding.sentence
    assert finding.numbers["a_interval"][0] < 0.28 / 0.62 < finding.numbers["a_interval"][1]


def test_a_grid_of_tokens_per_parameter_is_no_such_table() -> None:
    document = fit_points(planted("quest", noise=2e-3)[0], bootstrap=0, alternatives=False).document
    assert not any(record["clear"] for record in document.isoflop)
    assert document.shown_tables == ()
    assert not {"isoflop", "isoflop_open", "isoflop_edges"} & {finding.kind for finding in document.findings}


def test_the_command_shows_it_and_the_document_keeps_it(tmp_path: Path) -> None:
    points = curves(noise=1e-3, sizes=5)
    table = tmp_path / "t.csv"
    pd.DataFrame(points.to_records()).drop(columns="run").to_csv(table, index=False)
    shown = output("fit-scaling", table, "--law", "chinchilla", "--bootstrap", 0)
    assert "by parabolas: N ∝ C^a and D ∝ C^b" in shown
    (one,) = isoflop_optima(points)
    assert any(line.split()[:3] == ["bf16", "5", f"{one.a:.4f}"] and f"{one.b:.4f}" in line for line in shown.splitlines())
    made = fit_points(points, "chinchilla", bootstrap=0, alternatives=False)
    assert made.isoflop[0].a == one.a
    again = FitDocument.from_json(json.loads(json_text(made.document.to_json())))
    assert again.isoflop[0]["a_interval"] == pytest.approx(one.a_interval)
    assert [b["N"] for b in again.isoflop[0]["budgets"]] == pytest.approx([b.N for b in one.budgets])


def test_the_figure_has_the_runs_and_the_minima() -> None:
    points = curves(noise=1e-3, effs={"bf16": 1.0, "w4a4": 0.5})
    optima = isoflop_optima(points)
    left, right = figures.isoflop(points, optima).axes
    marks = [line for line in left.lines if line.get_marker() not in (None, "None")]
    assert sum(len(line.get_xdata()) for line in marks) == 35 + 5
    assert right.lines[-1].get_ydata() == pytest.approx([budget.N for budget in optima[0].inside])
    assert "nats/token" in left.get_ylabel()
    assert "FLOP" in right.get_xlabel()


def test_minima_that_noise_has_selected_give_no_exponent() -> None:
    """A dense grid of sizes and ratios: of its many budgets of three sizes those with a minimum are chosen by noise."""
    rng = np.random.default_rng(1)
    N, ratio = (v.ravel() for v in np.meshgrid([3e7, 6e7, 1.2e8, 2.4e8], 10 * 1.12 ** np.arange(38)))
    loss = (400 / N**0.34 + 410 / (N * ratio) ** 0.28 + 1.7) * np.exp(2e-3 * rng.standard_normal(len(N)))
    (one,) = isoflop_optima(make_points(N, N * ratio, loss, ["bf16"] * len(N)))
    assert len(one.budgets) > 20
    assert any(budget.edge for budget in one.budgets)
    assert "noise can move" in one.open
    assert (np.isnan(one.a), one.a_interval) == (True, None)


@needs("quartet_runs.csv")
def test_a_public_grid_agrees_with_the_better_law_where_it_has_a_budget() -> None:
    """Quartet's BF16 runs: sizes double and tokens per parameter do, so two computes hold three sizes by chance.

    The minimum is that of law quartet (157M), which fits them three times as well as chinchilla, whose minimum is 674M.
    """
    points = read_points(DATA / "quartet_runs.csv", where={"fwd": "BF16", "bwd": "BF16"})
    (one,) = isoflop_optima(points)
    assert [(budget.sizes, budget.edge) for budget in one.budgets] == [(3, ""), (3, "above")]
    assert not one.clear
    assert pytest.approx(1.47e8, rel=0.01) == one.inside[0].N
    fit = fit_law(points, "quartet")
    sizes = np.geomspace(2e7, 1e9, 400)
    by_law = sizes[np.argmin(fit.predict(sizes, one.inside[0].flops / 6 / sizes))]
    assert pytest.approx(by_law, rel=0.1) == one.inside[0].N


@needs("quest_runs.csv")
def test_the_published_runs_have_no_budget_of_three_sizes() -> None:
    assert isoflop_optima(read_points(DATA / "quest_runs.csv")) == ()
