"""The rule for learning rates: planted losses, edges, divergence, ties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from questctl.sweep.lr_search import best, extension

INF = math.inf


@pytest.mark.parametrize(
    ("losses", "winner", "more"),
    [
        ({1: 3.0, 2: 2.0, 4: 2.5}, 2, None),
        ({1: 2.0, 2: 2.1, 4: 2.5}, 1, 0.5),
        ({1: 3.0, 2: 2.0, 4: 1.5}, 4, 8),
        ({4: 1.5, 1: 3.0, 2: 2.0}, 4, 8),
        ({1: 2.0, 2: INF, 4: INF}, 1, 0.5),
        ({1: INF, 2: 2.0, 4: INF}, 2, None),
        ({1: INF, 2: INF, 4: INF}, 1, 0.5),  # all diverged: go down
        ({1: 2.5, 2: 2.0, 4: 2.0}, 2, None),  # of two equals the smaller
        ({1: 2.0, 2: 2.0, 4: 3.0}, 1, 0.5),
        ({1: 2.0}, 1, 0.5),
    ],
)
def test_the_best_and_what_to_try_next(losses, winner, more):
    assert best(losses) == winner
    assert extension(losses) == more


def search(truth, grid, extensions):
    losses = {lr: truth(lr) for lr in grid}
    for _ in range(extensions):
        if (more := extension(losses)) is None:
            break
        losses[more] = truth(more)
    return best(losses), losses


@given(st.integers(-2, 4))
def test_a_valley_within_reach_is_found_and_nothing_is_tried_twice(place):
    """Minimum at 2^place, grid 2^0 … 2^2, two extensions on either side."""
    found, losses = search(lambda lr: (math.log2(lr) - place) ** 2, (1.0, 2.0, 4.0), 2)
    assert found == 2.0**place
    assert len(losses) == {0: 4, 1: 3, 2: 4}.get(place, 5)


@given(st.dictionaries(st.sampled_from([2.0**k for k in range(-9, 9)]), st.sampled_from([1.0, 1.5, 2.0, INF]), min_size=1))
def test_it_depends_on_the_losses_alone(losses):
    backwards = dict(reversed(losses.items()))
    assert best(losses) == best(backwards)
    assert extension(losses) == extension(backwards)
    more = extension(losses)
    assert more is None or not min(losses) <= more <= max(losses)
    assert losses[best(losses)] == min(losses.values())
