"""Figures: what is drawn is what was measured, one style per scheme, units on the axes, the same bytes for the same input."""

import math
from pathlib import Path

import numpy as np
import pytest
from planted import planted

from questctl.analysis import charts, draw, figures
from questctl.analysis.fit import fit_law
from questctl.analysis.pareto import commonest_budget, frontier
from questctl.analysis.points import make_points
from questctl.analysis.style import count, styles, with_interval
from questctl.analysis.tables import PointError
from questctl.analysis.transitions import transition
from questctl.analysis.uncertainty import bootstrap, threshold, with_intervals


@pytest.fixture(scope="module")
def fitted():
    points, _ = planted(
        "quest", noise=3e-3, sizes=(5e4, 1e5, 2e5, 6e5), ratios=(8, 20), schemes=("bf16", "w4a4", "ste-w2a2", "w2a2", "w1a1")
    )
    return with_intervals(fit_law(points, schemes=["1.585"]))


@pytest.mark.slow
def test_files_and_their_bytes(fitted, tmp_path: Path) -> None:
    files = figures.save_all(fitted, tmp_path / "a")
    assert {p.stem for p in files} == {"loss_vs_bits", "loss_vs_params", "eff", "predicted_vs_measured", "residuals"}
    for path in files:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    for again in draw.save(figures.loss_against_bits(fitted), tmp_path / "loss_vs_bits"):
        assert again.read_bytes() == (tmp_path / "a" / again.name).read_bytes()


def test_marks_are_the_points(fitted) -> None:
    points = fitted.points
    budget = commonest_budget(points)
    front = frontier(points, budget)
    axes = figures.loss_against_bits(fitted).axes[0]
    marks = {
        tuple(xy) for line in axes.lines if line.get_marker() not in (None, "None") for xy in zip(*line.get_data(), strict=True)
    }
    assert marks == set(zip(points.memory_bits[budget], points.loss[budget], strict=True))
    assert "(bits)" in axes.get_xlabel()
    assert "nats/token" in axes.get_ylabel()
    filled = [line for line in axes.lines if line.get_markerfacecolor() != "none" and line.get_marker() not in (None, "None")]
    assert sum(len(line.get_xdata()) for line in filled) == len(front.best)


def test_curves_are_predictions(fitted) -> None:
    figure = figures.loss_against_size(fitted)
    assert [a.get_title(loc="left") for a in figure.axes] == ["8 tokens per parameter", "20 tokens per parameter"]
    curve = next(line for line in figure.axes[1].lines if len(line.get_xdata()) > 10)
    N, loss = curve.get_data()
    assert loss == pytest.approx(fitted.predict(N, 20 * N, fitted.points.labels[0]), rel=1e-9)


def test_eff_names_the_scheme_without_runs(fitted) -> None:
    axes = figures.eff_per_scheme(fitted).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [*fitted.points.labels, "1.585 (no runs)"]
    assert len([line for line in axes.lines if line.get_marker() not in (None, "None")]) == len(fitted.points.labels)


def test_schemes_are_told_apart() -> None:
    points, _ = planted("quest", schemes=("bf16", "w8a8", "w4a4", "w4a16", "w4a4-norot", "fp4", "ste-w4a4", "w2a2", "1.585"))
    look = styles(points.schemes)
    assert len({(s.color, s.marker) for s in look.values()}) == len(points.schemes)
    assert look["w4a4"].color == look["w4a16"].color != look["w2a2"].color
    assert look["w4a4"].marker == look["w2a2"].marker == "o"  # the plain scheme of a width looks the same at every width


def test_counts() -> None:
    assert [count(n) for n in (53440, 30482560, 1.5e9, 999, 2e12, 213568)] == [
        "53K",
        "30M",
        "1.5B",
        "999",
        "2T",
        "214K",
    ]
    assert np.isfinite(len(count(1.0)))


def test_bootstrap_adds_bands_clouds_and_profiles(fitted, tmp_path: Path) -> None:
    boot = bootstrap(fitted, 30)
    memory = figures.loss_against_memory(boot).axes[0]
    assert [t.get_text() for t in memory.get_legend().get_texts()] == ["bf16", "w4a4", "w2a2", "w1a1"]
    clouds = figures.bootstrap_clouds(boot)
    assert [len(line.get_xdata()) for line in clouds.axes[0].lines] == [30, 1]
    panels = figures.profiles(fitted).axes
    assert [a.get_xlabel() for a in panels if a.axison] == ["A", "alpha", "B", "beta", "E (nats/token)"]
    x, y = panels[1].lines[0].get_data()
    assert min(y) == pytest.approx(0, abs=0.05)
    assert np.interp(fitted.intervals["alpha"][1], x, y) == pytest.approx(threshold(fitted), rel=0.1)


def test_iso_memory_draws_the_transition() -> None:
    points, _ = planted("quest", noise=3e-3)
    boot = bootstrap(fit_law(points), 20)
    axes = figures.iso_memory({"quest": boot}).axes[0]
    sizes, ratio = axes.lines[0].get_data()
    assert ratio[6] == pytest.approx(transition(boot.fit, sizes[6]).ratio, rel=1e-6)
    assert "above a line 4 bits beat 8" in axes.get_title(loc="left")
    with pytest.raises(PointError, match="no runs of scheme '8'"):
        figures.iso_memory({"quest": bootstrap(fit_law(points.subset(points.group != points.index("w8a8"))), 5)})


def test_residuals_are_drawn_per_scheme(fitted) -> None:
    axes = figures.residuals_per_scheme(fitted).axes[0]
    drawn = np.concatenate([line.get_ydata() for line in axes.lines if line.get_linestyle() == "None"])
    assert np.sort(drawn) == pytest.approx(np.sort(100 * np.expm1(fitted.residuals)))


def test_figures_of_one_scheme_are_drawn_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    points, _ = planted("chinchilla", noise=1e-3)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # laid out, but not written
    figures.save_all(fit_law(points, "chinchilla"), tmp_path)
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == []


def test_what_eff_saves_is_drawn_at_equal_tokens_and_loss() -> None:
    """The shift between the lines of two schemes is 16·eff/bits, and lines are predictions at the budget."""
    grid = [(n, d, s) for n in (1e6, 4e6, 1.6e7) for d in (2e8, 6e8, 1.8e9) for s in ("bf16", "w4a4")]
    N, D, scheme = zip(*grid, strict=True)
    eff = np.array([1.0 if s == "bf16" else 0.7 for s in scheme])
    loss = (406.4 / (np.array(N) * eff) ** 0.34 + 410.7 / np.array(D) ** 0.28 + 1.69) * np.exp(
        1e-3 * np.random.default_rng(0).standard_normal(len(N))
    )
    fit = with_intervals(fit_law(make_points(N, D, loss, scheme)))
    chart = charts.frontier(fit.points, {charts.MODEL_BITS: fit.points.memory_bits}, np.arange(fit.n), fit)
    assert chart.questions == {"Tokens": ["1.8B", "600M", "200M", "all"]}
    shift = next(s for s in chart.views[0].series if s.kind == "span")
    assert (shift.high / shift.low)[0] == pytest.approx(4 * fit.eff["w4a4"], rel=1e-6)
    assert shift.name == "w4a4: 2.8 times fewer bits at equal loss"
    lines = {s.name: s for s in chart.views[0].series if s.kind == "line"}
    for name, bits in (("bf16", 16), ("w4a4", 4)):
        at = np.interp(np.log(shift.y[0]), np.log(lines[name].y[::-1]), np.log(lines[name].x[::-1]))
        assert math.exp(at) == pytest.approx({16: shift.high, 4: shift.low}[bits][0], rel=2e-3)
        np.testing.assert_allclose(lines[name].y, fit.predict(lines[name].x / bits, np.full(40, 1.8e9), name), rtol=1e-9)
    assert not [s for s in chart.views[-1].series if s.kind in ("line", "span")]  # of several budgets at once
    assert [s.name for s in chart.views[0].series if s.kind == "points" and s.listed].count("w4a4") == 1


def test_the_ends_of_an_interval_differ_in_what_is_printed():
    assert with_interval(2.61234, (2.6, 2.625)) == "2.6123 [2.6000, 2.6250]"
    assert with_interval(2.60482, (2.60481, 2.60484)) == "2.60482 [2.60481, 2.60484]"
    assert with_interval(2.5, None) == "2.5000"
