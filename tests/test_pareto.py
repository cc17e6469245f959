"""The frontier against its definition, and on the published runs."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import planted
from shared_data import DATA, needs

from questctl.analysis.pareto import budgets, commonest_budget, frontier, non_dominated
from questctl.analysis.points import make_points, read_points

numbers = st.integers(1, 6).map(float)


def by_definition(cost: np.ndarray, loss: np.ndarray) -> list[bool]:
    n = range(len(cost))
    return [
        not any(cost[j] <= cost[i] and loss[j] <= loss[i] and (cost[j] < cost[i] or loss[j] < loss[i]) for j in n) for i in n
    ]


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=25))
def test_non_dominated_is_the_definition(points: list[tuple[float, float, float]]) -> None:
    cost, loss, other = np.array(points).T
    assert non_dominated(cost, loss).tolist() == by_definition(cost, loss)
    both = non_dominated(cost, np.stack([loss, other]))
    assert both.tolist() == [by_definition(cost, loss), by_definition(cost, other)]
    assert non_dominated(np.exp(cost), 3 * loss).tolist() == by_definition(cost, loss)  # order is all that counts


def test_bits_times_parameters() -> None:
    points = make_points([1e6, 4e6, 2e6], [1e7, 4e7, 2e7], [3.0, 2.9, 2.95], ["bf16", "w4a4", "w4a4"])
    front = frontier(points)
    assert front.schemes == ("w4a4",)  # at 16 Mbit the 4-bit model is better than the 16-bit one
    assert [round(r["model_bits"] / 1e6) for r in front.to_dict()] == [8, 16]
    only = frontier(points, np.array([True, False, False]))
    assert (len(only.rows), only.schemes) == (1, ("bf16",))


def test_budgets() -> None:
    points, _ = planted("quest", ratios=(20, 20.5, 100))
    assert {round(r): int(rows.sum()) for r, rows in budgets(points).rows.items()} == {20: 72, 100: 36}


def test_a_grid_of_equal_tokens_has_budgets_in_tokens() -> None:
    grid = [(n, d, s) for n in (1e5, 2e5, 4e5) for d in (1e6, 2e6) for s in ("bf16", "w4a4")]
    N, D, scheme = zip(*grid, strict=True)
    points = make_points(N, D, np.linspace(3, 2, len(N)), scheme)
    split = budgets(points)
    assert split.tokens
    assert {split.of(value): int(rows.sum()) for value, rows in split.rows.items()} == {"1M tokens": 6, "2M tokens": 6}
    assert set(points.D[commonest_budget(points)]) == {2e6}
    assert budgets(points.subset(points.N == 1e5)).tokens is False  # of one size, both say the same


def test_the_commonest_budget_is_the_largest_of_those_that_are_as_common() -> None:
    points, _ = planted("quest", ratios=(20, 50, 100))
    assert set(points.D[commonest_budget(points)] / points.N[commonest_budget(points)]) == {100}
    fewer = points.subset((points.D / points.N < 100) | (np.isin(points.N, points.sizes[1:])))
    assert set(fewer.D[commonest_budget(fewer)] / fewer.N[commonest_budget(fewer)]) == {50}
    unknown = dataclasses.replace(points, D=np.full(len(points), np.nan))
    assert commonest_budget(unknown).all()


@needs("quest_runs.csv")
def test_published_frontier() -> None:
    """Rotated W=A, 2:4 as 2.5 bits, FP4 as 4, bf16, at D/N ≈ 100: 40 candidates, 21 of them non-dominated."""
    points = read_points(DATA / "quest_runs.csv")
    square = np.array([s.rotated and s.w_grid_bits == s.a_grid_bits for s in points.schemes])[points.group]
    front = frontier(points, square & (abs(points.D / points.N - 100) < 5))
    assert (len(front.rows), len(front.best)) == (40, 21)
    assert "w8a8" not in front.schemes


@pytest.mark.parametrize("n", [1, 2, 63])
def test_odd_sizes(n: int) -> None:
    rng = np.random.default_rng(n)
    cost, loss = rng.random(n), rng.random(n)
    assert non_dominated(cost, loss).tolist() == by_definition(cost, loss)
