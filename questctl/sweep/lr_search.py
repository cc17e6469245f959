"""The search for learning rates in studies: one rule that depends on the losses alone, the same for every scheme.

    train each value of a grid → take the one of least loss → if it lies at an edge, add the value a factor beyond → repeat

A run that diverged has an infinite loss, and of two equal losses the smaller learning rate wins. The caller decides how often
the grid may be extended.
"""

from __future__ import annotations

from collections.abc import Mapping

FACTOR = 2.0


def best(losses: Mapping[float, float]) -> float:
    """The learning rate of least loss (learning rate → loss, infinite where the run diverged); the smallest of several."""
    return min(losses, key=lambda value: (losses[value], value))


def extension(losses: Mapping[float, float], factor: float = FACTOR) -> float | None:
    """The learning rate to try next, a factor beyond the edge at which the best one lies; None if the best lies inside."""
    winner = best(losses)
    if winner == min(losses):
        return winner / factor
    return winner * factor if winner == max(losses) else None
