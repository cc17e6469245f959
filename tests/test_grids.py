"""Levels, rounding and the Gaussian optimum of every grid, against brute force and scipy's integrals."""

import heapq
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from questctl.quant.grids import (
    FP4,
    FP8,
    PUBLISHED_ALPHA,
    EntropyCoded,
    Grid,
    Int,
    Lloyd,
    Olive,
    Power,
    SInt,
    Ternary,
    cell_entropy,
    gaussian_error,
    gaussian_exponent,
    gaussian_optimum,
    power_levels,
)
from questctl.quant.scales import Mse

ALL = [
    *(Int(b) for b in range(1, 9)),
    *(SInt(b) for b in (2, 3, 4, 8)),
    Ternary(),
    FP4(),
    FP8(),
    *(Lloyd(b) for b in range(1, 5)),
    *(Power(b) for b in (3, 4, 6)),
]
CODED = [EntropyCoded(r) for r in (1.5, 1.85, 2, 2.5, 3.25, 4, 6.1, 8)]
# α* (fp4: the unit a) and MSE on N(0,1) as published; None where none is printed (QuEST, arXiv 2502.05003)
PAPER = [
    (Int(1), 0.7978845587, 0.3633802276),
    (Ternary(), 1.2240089519, 0.1901740393),
    (Int(2), 1.4935346, 0.1188460504),
    (Int(3), 2.0510681, 0.0374396594),
    (Int(4), 2.5139306, 0.0115428845),
    (Int(5), 2.9160938, None),
    (Int(6), 3.2765973, None),
    (Int(7), 3.6010497, None),
    (Int(8), 3.922, 8.7686e-5),
    (FP4(), 0.4870795, 0.0126849041),
]


def ids(grids: list) -> list[str]:
    return [g.text for g in grids]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def equal_shares(n: int, seed: int = 1) -> torch.Tensor:
    """One normal value in each of n equal shares, in random order: the 8-bit error of a million free draws scatters by 2 %."""
    shares = (torch.arange(n, dtype=torch.float64) + torch.rand(n, dtype=torch.float64, generator=seeded(seed))) / n
    return torch.special.ndtri(shares)[torch.randperm(n, generator=seeded(seed + 1))]


def cells(levels: np.ndarray, scale: float) -> list[tuple[float, float, float]]:
    points = np.asarray(levels) * scale
    edges = np.concatenate([[-12.0], (points[1:] + points[:-1]) / 2, [12.0]])
    return [(p, max(lo, -12.0), min(hi, 12.0)) for p, lo, hi in zip(points, edges[:-1], edges[1:], strict=True)]


def integral(f, lo: float, hi: float) -> float:
    return quad(lambda x: f(x) * norm.pdf(x), lo, hi, epsabs=1e-14, epsrel=1e-12)[0] if lo < hi else 0.0


def error(levels: np.ndarray, scale: float) -> float:
    return sum(integral(lambda x, p=p: (x - p) ** 2, lo, hi) for p, lo, hi in cells(levels, scale))


def slope(levels: np.ndarray, scale: float) -> float:
    """d error / d scale, up to a factor: the cells' edges do not contribute."""
    return sum(integral(lambda x, p=p: p * (p - x), lo, hi) for p, lo, hi in cells(levels, scale))


@pytest.mark.parametrize(("grid", "alpha", "mse"), PAPER, ids=ids([row[0] for row in PAPER]))
def test_gaussian_constants_are_those_of_the_integral(grid: Grid, alpha: float, mse: float | None) -> None:
    levels = np.array(grid.levels)
    derived, least = gaussian_optimum(grid.levels)
    if len(levels) <= 32:  # more cells take scipy too long
        root = brentq(lambda s: slope(levels, s), derived * 0.95, derived * 1.05, xtol=1e-13)
        assert derived == pytest.approx(root, rel=1e-9)
        assert least == pytest.approx(error(levels, derived), rel=1e-10)
    if mse is not None:
        assert least == pytest.approx(mse, abs=1.1e-10 if mse > 1e-4 else 0.51e-9)
    outer = 1 if isinstance(grid, FP4) else grid.top
    # the published constants lie beside the optimum where the error is flat: the more bits, the farther (7 bits: 0.3 %)
    assert derived * outer == pytest.approx(alpha, rel={6: 5e-4, 7: 3e-3, 8: 1e-4}.get(getattr(grid, "b", 0), 3e-5))


@pytest.mark.parametrize("b", sorted(PUBLISHED_ALPHA))
def test_published_constants_cost_nothing(b: int) -> None:
    grid = Int(b)
    assert grid.unit * grid.top == pytest.approx({g: a for g, a, _ in PAPER}[grid], rel=1e-12)
    assert error(np.array(grid.levels), grid.unit) == pytest.approx(grid.mse, rel=1e-8)


@pytest.mark.parametrize("grid", [*ALL, *CODED, Olive()], ids=ids([*ALL, *CODED, Olive()]))
def test_mse_on_a_million_normal_samples(grid: Grid) -> None:
    x = equal_shares(10**6)
    measured = (x - grid.quantize(x / grid.unit) * grid.unit).square().mean().item()
    assert measured == pytest.approx(grid.mse, rel=0.01)


@pytest.mark.parametrize("grid", ALL, ids=ids(ALL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantize_takes_the_nearest_level(grid: Grid, dtype: torch.dtype) -> None:
    levels = torch.tensor(grid.levels, dtype=dtype)
    u = torch.randn(4000, generator=seeded(0), dtype=dtype) * grid.top * 0.7
    u = torch.cat([u, torch.tensor([1e9, -1e9, 1e-30, -1e-30], dtype=dtype)])
    q = grid.quantize(u)
    assert torch.isin(q, levels).all()
    torch.testing.assert_close((u - q).abs(), (u[:, None] - levels).abs().min(1).values, rtol=0, atol=0)
    assert grid.quantize(torch.tensor([float("nan")], dtype=dtype)).isnan().all()
    torch.testing.assert_close(grid.quantize(levels), levels, rtol=0, atol=0)  # idempotent


@pytest.mark.parametrize("grid", [*ALL, *CODED], ids=ids([*ALL, *CODED]))
def test_grids_are_odd_on_and_beside_every_edge(grid: Grid) -> None:
    levels, edges = torch.tensor(grid.levels), torch.tensor(grid.edges)
    if not isinstance(grid, EntropyCoded):
        torch.testing.assert_close(edges, (levels[1:] + levels[:-1]) / 2, rtol=1e-6, atol=0)
    edges = edges[edges > 0]
    above, below = torch.nextafter(edges, torch.tensor(1e9)), torch.nextafter(edges, torch.tensor(0.0))
    u = torch.cat([edges, above, below, edges * 0.9, torch.zeros(1)])
    assert torch.equal(grid.quantize(-u), -grid.quantize(u))
    assert torch.isin(grid.quantize(u), levels).all()
    if isinstance(grid, Int):
        assert (grid.quantize(edges) > edges).all()  # ties go away from zero
    if not isinstance(grid, Lloyd | Power | EntropyCoded):  # whose edges or levels are rounded themselves
        assert (grid.quantize(above) > edges).all()
        assert (grid.quantize(below) < edges).all()


def test_fp4_ties_go_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert FP4().quantize(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


@given(st.sampled_from([*ALL, *CODED]), st.floats(-1e6, 1e6, width=32))
def test_rounding_is_idempotent_and_odd(grid: Grid, value: float) -> None:
    u = torch.tensor([value])
    q = grid.quantize(u)
    assert torch.equal(grid.quantize(q), q)
    assert torch.equal(grid.quantize(-u), -q)


@pytest.mark.parametrize(
    ("b", "levels", "mse"),  # J. Max, Quantizing for minimum distortion, IRE Trans. Inf. Theory 1960, table I
    [
        (1, [0.7980], 0.3634),
        (2, [0.4528, 1.510], 0.1175),
        (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    ],
)
def test_lloyd_max_grids_are_converged(b: int, levels: list[float], mse: float) -> None:
    grid = Lloyd(b)
    assert grid.levels[len(levels) :] == pytest.approx(levels, rel=6e-4)
    assert grid.mse == pytest.approx(mse, rel=1e-3)
    assert grid.unit == pytest.approx(1, abs=1e-12)
    for p, lo, hi in cells(np.array(grid.levels), 1.0):
        assert integral(lambda x: x, lo, hi) / integral(lambda x: 1.0, lo, hi) == pytest.approx(p, abs=1e-11)


@pytest.mark.parametrize(
    ("grid", "bits", "count"),
    [
        (Int(4), 4, 16),
        (Ternary(), 1.58496, 3),
        (FP4(), 4, 15),
        (Lloyd(3), 3, 8),
        (FP8(), 8, 253),
        (SInt(2), 2, 3),
        (SInt(8), 8, 255),
        (Power(4), 4, 15),
    ],
)
def test_bits_and_levels(grid: Grid, bits: float, count: int) -> None:
    assert grid.bits == pytest.approx(bits, rel=1e-5)
    assert len(grid.levels) == count
    assert list(grid.levels) == sorted(grid.levels)
    assert grid.levels == tuple(-x for x in reversed(grid.levels))
    assert grid.half_step == (grid.levels[-1] - grid.levels[-2]) / 2


def test_local_half_step_is_half_the_gap_around_the_input() -> None:
    u = torch.tensor([0.1, 0.6, 1.9, 2.1, 3.9, 4.1, 6.1, -5.0, 100.0])
    assert FP4().local_half_step(u).tolist() == [0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    grid = Lloyd(2)
    lo, hi = grid.levels[2:]
    steps = grid.local_half_step(torch.tensor([0.0, 1.0, -1.0, 9.0], dtype=torch.float64)).tolist()
    assert steps == pytest.approx([lo, (hi - lo) / 2, (hi - lo) / 2, (hi - lo) / 2])
    assert Int(3).local_half_step(u) == 0.5


def test_fp8_levels_are_the_codes_of_the_format() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert sorted(set(codes[codes.isfinite()].tolist())) == list(FP8().levels)


def test_fp8_scale_is_the_deepest_of_its_minima() -> None:
    best = min(gaussian_error(FP8().levels, 2 ** (k / 20) / 448) for k in range(160))  # 448 between 1 and 256 sigma
    assert best >= FP8().mse > 0.999 * best


def test_zero_centred_integers_round_to_whole_numbers_within_the_grid() -> None:
    u = torch.tensor([0.49, 0.51, -1.2, 2.5, 3.5, 6.9, 7.4, 7.6, -100.0])
    assert SInt(4).quantize(u).tolist() == [0, 1, -1, 2, 4, 7, 7, 7, -7]
    assert SInt(2).levels == Ternary().levels
    assert SInt(2).unit == Ternary().unit


@pytest.mark.slow
@pytest.mark.parametrize("b", [3, 4])
def test_power_exponent_is_the_best(b: int) -> None:
    """Against scipy's minimum of scipy's integral; one is the uniform grid."""
    n = 2 ** (b - 1) - 1
    k = np.arange(-n, n + 1)

    def least(a: float) -> float:
        levels = np.sign(k) * n * (np.abs(k) / n) ** (1 / a)
        return minimize_scalar(lambda s: error(levels, s), bounds=(1 / n, 5 / n), method="bounded", options={"xatol": 1e-9}).fun

    best = minimize_scalar(least, bounds=(0.5, 1.0), method="bounded", options={"xatol": 1e-4})
    assert gaussian_exponent(b) == pytest.approx(best.x, abs=5e-3)
    assert Power(b).mse == pytest.approx(best.fun, rel=1e-6)
    assert Power(b).mse < SInt(b).mse
    assert power_levels(n, 1.0) == SInt(b).levels


def test_power_grids_lose_less_than_whole_numbers_at_every_width() -> None:
    for b in (5, 6):
        assert Power(b).mse < 0.9 * SInt(b).mse
        assert Power(b).levels == pytest.approx(power_levels(2 ** (b - 1) - 1, gaussian_exponent(b)))


# --- entropy-coded ----------------------------------------------------------------------------------------------------


def huffman_length(masses: np.ndarray) -> float:
    """Mean length of the best prefix code, by merging the two smallest until one is left."""
    heap, total = list(masses), 0.0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@pytest.mark.parametrize("grid", CODED, ids=ids(CODED))
def test_entropy_coded_step_solves_the_rate_equation(grid: EntropyCoded) -> None:
    """Against scipy's normal distribution: masses of the cells, their entropy, a Huffman code for them, their centroids."""
    k = np.arange(-len(grid.levels) // 2, len(grid.levels) // 2 + 2)
    masses = np.diff(norm.cdf((k - 0.5) * grid.unit))
    masses = masses[masses > 0]
    entropy = -(masses * np.log2(masses)).sum()
    assert entropy == pytest.approx(grid.rate, abs=1e-9)
    assert grid.bits == grid.rate
    excess = {1.5: 0.163, 2: 0.106}.get(grid.rate, 0.13 if grid.rate < 2.25 else 0.07)
    assert 0 < huffman_length(masses) - entropy < excess
    half = [x for x in grid.levels if x >= 0]
    for number in (0, 1, 2, len(half) // 3):
        lo, hi = (number - 0.5) * grid.unit, (number + 0.5) * grid.unit
        mean = integral(lambda x: x, lo, hi) / integral(lambda x: 1.0, lo, hi)
        assert half[number] * grid.unit == pytest.approx(mean, abs=1e-9)
    assert grid.top * grid.unit > 7.3


@pytest.mark.parametrize("grid", CODED, ids=ids(CODED))
def test_entropy_coded_bits_are_those_of_the_sample(grid: EntropyCoded) -> None:
    x = equal_shares(10**6)
    _, counts = torch.unique(grid.quantize(x / grid.unit), return_counts=True)
    p = counts.double() / counts.sum()
    assert -(p * p.log2()).sum().item() == pytest.approx(grid.rate, abs=2e-3)


def test_entropy_coded_error_lies_between_theory_and_the_neighbours_at_equal_bits() -> None:
    """Rate-distortion bound of a normal 2^(-2R) < ec < lloyd < int; in between below the line that joins the neighbours."""
    for r in np.arange(1.5, 8.01, 0.125):
        assert 1.42 < EntropyCoded(float(r)).mse * 4**r < 1.4234  # pi e / 6 = 1.42329: Gish and Pierce 1968
    for b in (2, 3, 4):
        assert EntropyCoded(b).mse < 0.76 * Lloyd(b).mse < 0.76 * Int(b).mse
        assert Lloyd(b).mse < Int(b).mse
    assert EntropyCoded(Ternary().bits).mse < 0.85 * Ternary().mse
    for b in (2, 3):
        for t in (0.25, 0.5, 0.75):
            assert EntropyCoded(b + t).mse < 0.66 * ((1 - t) * Lloyd(b).mse + t * Lloyd(b + 1).mse)
    for b in range(5, 9):
        assert EntropyCoded(b).mse < 0.45 * Int(b).mse


def test_cell_entropy_falls_with_the_width() -> None:
    entropies = [cell_entropy(width) for width in np.geomspace(0.01, 4, 60)]
    assert entropies == sorted(entropies, reverse=True)
    assert cell_entropy(0.01) == pytest.approx(np.log2(np.sqrt(2 * np.pi * np.e) / 0.01), abs=1e-4)  # h(X) - log2 width


@pytest.mark.parametrize("grid", CODED, ids=ids(CODED))
def test_entropy_coded_reach_of_a_cell_is_its_largest_error(grid: EntropyCoded) -> None:
    u = torch.linspace(0, grid.edges[-1] - 1e-6, 4001, dtype=torch.float64)
    errors = (u - grid.quantize(u)).abs()
    reach = grid.local_half_step(u)
    assert isinstance(reach, torch.Tensor)
    assert (errors <= reach).all()
    assert (reach >= 0.5).all()
    assert (reach < 1).all()
    assert grid.local_half_step(torch.tensor([-1e9], dtype=torch.float64)).item() == grid.half_step


@pytest.mark.parametrize("grid", [*ALL, *CODED], ids=ids([*ALL, *CODED]))
def test_stochastic_rounding_takes_a_level_beside_the_input_and_is_unbiased(grid: Grid) -> None:
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    u = (torch.rand(7, generator=seeded(0), dtype=torch.float64) * 2 - 1) * grid.top * 0.9
    n = 100_000
    noise = torch.rand(n, len(u), generator=seeded(1), dtype=torch.float64)
    q = grid.round_at_random(u.expand(n, -1).contiguous(), noise)
    low, high = (levels[torch.searchsorted(levels, u) + k] for k in (-1, 0))
    assert ((q == low) | (q == high)).all()
    up = (u - low) / (high - low)
    error = (high - low) * (up * (1 - up) / n).sqrt()
    assert ((q.mean(0) - u).abs() < 4 * error + 1e-12).all()
    # on a level nothing is random, beyond the grid the outermost level is taken, NaN stays
    for value in (0.0, 0.5, 1 - 1e-9):
        fixed = torch.full_like(levels, value)
        assert torch.equal(grid.round_at_random(levels, fixed), levels)
        assert torch.equal(grid.round_at_random(levels * 0 + 2 * levels[-1], fixed), levels * 0 + levels[-1])
        assert torch.equal(grid.round_at_random(levels * 0 - 2 * levels[-1], fixed), levels * 0 - levels[-1])
    assert grid.round_at_random(torch.tensor([float("nan")]), torch.zeros(1)).isnan().all()


def test_olive_pairs_by_hand() -> None:
    """arXiv 2304.07493, algorithm 1, as a loop over pairs."""
    grid, values = Olive(), [*range(8), 12, 16, 24, 32, 48, 64, 96]
    edges = [[9.4, 3.0, 9.6, 3.0, -3.0, 20.0, 99.0, -200.0], [12.0, 12.0, -12.0, 12.0, 7.6, 0.0, 0.4, -0.6]]
    u = torch.cat([torch.randn(500, 8, generator=seeded(0)) * 6, torch.tensor(edges)])
    for row, found in zip(u.tolist(), grid.quantize(u).tolist(), strict=True):
        expected = []
        for a, b in zip(row[::2], row[1::2], strict=True):
            q = [float(np.sign(x) * min(values, key=lambda v, x=x: abs(v - abs(x)))) for x in (a, b)]
            if max(abs(a), abs(b)) > 9.5:
                q[1 if abs(a) >= abs(b) else 0] = 0.0
            expected += q
        assert found == expected


def test_olive_is_odd_idempotent_and_at_its_optimum() -> None:
    grid = Olive()
    u = torch.randn(200, 64, generator=seeded(0)) * 8
    q = grid.quantize(u)
    assert torch.equal(grid.quantize(-u), -q)
    assert torch.equal(grid.quantize(q), q)
    assert all(grid.pair_error(grid.unit * f) > grid.mse for f in (0.9, 0.999, 1.001, 1.1))
    assert grid.mse == pytest.approx(SInt(4).mse, rel=0.01)  # a normal row has hardly any outliers
    row = torch.randn(4, 256, generator=seeded(1))
    row[:, ::64] *= 20
    error = {g: (row - s * g.quantize(row / s)).square().mean() for g in (grid, SInt(4)) for s in (Mse().of(row, g),)}
    assert error[grid] < 0.3 * error[SInt(4)]
    assert (grid.bits, len(grid.levels)) == (4, 29)
