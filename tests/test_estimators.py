"""Masks of the estimators: declared bounds, local steps, and what the published threshold means."""

import math

import pytest
import torch

from questctl.quant.estimators import STE, Clip, Erf, Estimator, Pact, Smooth, Tanh, Trust
from questctl.quant.grids import FP4, Grid, Int, Lloyd, SInt, Ternary

GRIDS = [Int(1), Int(2), Int(4), Int(8), SInt(3), Ternary(), FP4(), Lloyd(2), Lloyd(4)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.text)
@pytest.mark.parametrize("estimator", [STE(), Clip(1.3), Clip(0.5), Trust(), Trust(1.7), Pact()], ids=lambda e: e.text)
def test_mask_is_the_interval_that_the_bound_declares(grid: Grid, estimator: Estimator) -> None:
    u = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * grid.top
    bound = estimator.bound(grid)
    assert bound is not None
    assert torch.equal(estimator.mask(u, grid.quantize(u), grid), u.abs() <= bound)


def test_bounds() -> None:
    assert STE().bound(Int(4)) == math.inf
    assert Clip(1.3).bound(Int(1)) == pytest.approx(0.65, rel=2e-6)
    assert Clip(2).bound(FP4()) == pytest.approx(12, rel=2e-6)
    assert Trust().bound(Int(4)) == 8  # 7.5 and half a step
    assert Trust(3).bound(Ternary()) == 2.5
    assert Trust().bound(FP4()) == 7  # half of the gap between 4 and 6 beyond 6
    assert Trust(0.5).bound(Int(4)) is None


def test_published_threshold() -> None:
    """T = α*/(2^b − 1) in units of σ is half a step."""
    for b in range(1, 9):
        grid = Int(b)
        alpha = grid.unit * grid.top
        assert grid.half_step * grid.unit == pytest.approx(alpha / (2**b - 1))


@pytest.mark.parametrize("grid", [Int(3), Ternary()], ids=lambda g: g.text)
def test_a_factor_below_one_distrusts_entries_between_the_levels(grid: Grid) -> None:
    u = torch.linspace(-2 * grid.top, 2 * grid.top, 4001, dtype=torch.float64)
    distance = (u[:, None] - torch.tensor(grid.levels, dtype=torch.float64)).abs().min(1).values
    assert torch.equal(Trust(0.6).mask(u, grid.quantize(u), grid), distance <= 0.3)


def test_a_factor_below_one_uses_the_local_step() -> None:
    u = torch.tensor([0.1, 0.2, 2.2, 2.4, 4.4, 4.6, 5.6, 6.4, 6.6], dtype=torch.float64)
    trusted = Trust(0.5).mask(u, FP4().quantize(u), FP4())  # within a quarter of the gaps ½, 1 and 2
    assert trusted.tolist() == [True, False, True, False, True, False, True, True, False]


@pytest.mark.parametrize("grid", [Int(1), Int(3), SInt(3), FP4(), Lloyd(2)], ids=lambda g: g.text)
@pytest.mark.parametrize("estimator", [Tanh(), Tanh(0.3), Erf(), Erf(0.7)], ids=lambda e: e.text)
def test_smooth_mask_is_the_slope_of_the_smoothed_staircase(grid: Grid, estimator: Smooth) -> None:
    """Central differences of the sum of smooth steps, written with math's own functions."""
    w = estimator.width * grid.half_step

    def step(x: float) -> float:
        return (1 + math.tanh(x)) / 2 if isinstance(estimator, Tanh) else (1 + math.erf(x / math.sqrt(2))) / 2

    def staircase(u: float) -> float:
        pairs = zip(grid.levels[:-1], grid.levels[1:], strict=True)
        return grid.levels[0] + sum((b - a) * step((u - (a + b) / 2) / w) for a, b in pairs)

    u = torch.linspace(-1.5 * grid.top, 1.5 * grid.top, 31, dtype=torch.float64)
    slopes = [(staircase(x + 1e-6) - staircase(x - 1e-6)) / 2e-6 for x in u.tolist()]
    assert estimator.mask(u, grid.quantize(u), grid).tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)
    assert estimator.bound(grid) is None
    assert staircase(1e9) == pytest.approx(grid.top)


def test_erf_mask_is_the_slope_of_the_mean_under_noise() -> None:
    """E[grid(u + e)] for normal noise of standard deviation w, from equal shares of the normal distribution."""
    n, grid, w = 200001, Int(2), 0.4
    noise = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n) * w
    for u in (-2.0, 0.3, 1.0):
        mean = [grid.quantize(u + h + noise).mean().item() for h in (-0.01, 0.01)]
        m = Erf(w / grid.half_step).mask(torch.tensor([u], dtype=torch.float64), torch.zeros(1), grid).item()
        assert m == pytest.approx((mean[1] - mean[0]) / 0.02, rel=2e-3)


def test_pact_lets_a_learned_scale_see_clipped_inputs_alone() -> None:
    u = torch.tensor([0.2, -1.4, 1.6, -9.0])
    q = Int(2).quantize(u)
    m = Pact().mask(u, q, Int(2))
    assert m.tolist() == [True, True, False, False]
    assert Pact().residual(u, q, m).tolist() == [0, 0, 1.5, -1.5]
    assert STE().residual(u, q, torch.ones(4)).tolist() == (q - u).tolist()
