"""benchmarks/width.py recovers planted best rates, and its sweep file varies nothing but what it says."""

import importlib.util
import math
from pathlib import Path

import pytest

from questctl.sweep.sweep_file import find_sweep_file, load_sweep_file

spec = importlib.util.spec_from_file_location("width", Path(__file__).parents[1] / "benchmarks" / "width.py")
width = importlib.util.module_from_spec(spec)
spec.loader.exec_module(width)

RATES = [5e-4 * 2**i for i in range(7)]


def planted(best: float) -> dict[float, float]:
    return {rate: 1.7 + 0.04 * math.log(rate / best) ** 2 for rate in RATES}


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.0])
def test_the_slope_of_planted_best_rates_is_found(slope):
    best = {d: 1e-2 * (d / 32) ** slope for d in (32, 64, 128, 256)}
    found = [(d, width.best_rate(planted(rate))) for d, rate in best.items()]
    assert dict(found) == pytest.approx(best, rel=1e-9)
    got = width.slope_over_width(found)
    assert got == pytest.approx((slope, slope, slope), abs=1e-6)
    wide = width.slope_over_width([(d, rate * factor) for d, rate in found for factor in (1.2, 1 / 1.2)])
    assert wide.low < slope - 0.05 < slope + 0.05 < wide.high


def test_a_best_rate_at_an_end_of_the_rates_is_none():
    assert math.isnan(width.best_rate(planted(1e-4)))
    assert math.isnan(width.best_rate(planted(1.0)))
    diverged = planted(2e-2) | dict.fromkeys(RATES[-2:], math.nan)
    assert math.isnan(width.best_rate(diverged))
    assert math.isnan(width.best_rate({}))
    assert math.isnan(width.slope_over_width([(32, 1e-3), (64, math.nan), (128, math.nan)]).value)


def test_the_sweep_changes_width_alone_and_keeps_the_width_of_a_head():
    cells = load_sweep_file(find_sweep_file("width")).cells
    assert len(cells) == 4 * 2 * 3 * 7 * 2
    shapes = {(c.config.model.d_model, c.config.model.n_head, c.config.model.d_ff) for c in cells}
    assert shapes == {(d, d // 16, 3 * d) for d in (32, 64, 128, 256)}
    assert {c.config.model.base_width for c in cells} == {0, 32}
