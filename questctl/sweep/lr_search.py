"""The one rule by which every method of a study gets its learning rate.

    train each value of a grid → the one of least loss wins → where it lies at an edge, add the value a factor beyond → again

A run that diverged counts as infinitely bad, and of two equal losses the smaller value wins, so the rule is a function of the
losses alone. How often the grid may be extended is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Mapping

FACTOR = 2.0


def best(losses: Mapping[float, float]) -> float:
    """The value of least loss (value → loss, infinite where the run diverged); the smallest of several."""
    return min(losses, key=lambda value: (losses[value], value))


def extension(losses: Mapping[float, float], factor: float = FACTOR) -> float | None:
    """The value to try next, a factor beyond the edge that the best one lies at; None where it lies inside."""
    winner = best(losses)
    if winner == min(losses):
        return winner / factor
    return winner * factor if winner == max(losses) else None
