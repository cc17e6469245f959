"""The frontier of measured runs: the non-dominated set over the bits of a model and the loss it reaches.

A run is dominated if another is no larger and no worse, and strictly better in one of the two. The frontier consists of
measured runs only; no law is involved.

Bits are what the weights take (`Points.memory_bits`: N·bits per weight unless the table has them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .points import SAME_RATIO, Points, narrow_groups
from .style import count

Array = np.ndarray


def non_dominated(cost: Array, loss: Array) -> Array:
    """Mask of the non-dominated points, shape (n,), or (m, n) for m sets of losses at the same costs.

    All of exact ties are kept. Takes O(n log n) per set.
    """
    cost, single = np.asarray(cost, float), np.ndim(loss) == 1
    loss = np.atleast_2d(np.asarray(loss, float))
    order = np.argsort(cost, kind="stable")
    _, start = np.unique(cost[order], return_index=True)
    least = np.minimum.reduceat(loss[:, order], start, axis=1)  # the best at each distinct cost
    before = np.concatenate([np.full((len(loss), 1), np.inf), np.minimum.accumulate(least, axis=1)[:, :-1]], axis=1)
    step = np.searchsorted(cost[order][start], cost)
    keep = (loss == least[:, step]) & (loss < before[:, step])
    return keep[0] if single else keep


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Candidates (rows of `points`, ascending in size) and which of them are on the frontier."""

    points: Points
    rows: Array
    on: Array

    @property
    def best(self) -> Array:
        """Rows of `points` on the frontier, smallest model first."""
        return self.rows[self.on]

    @property
    def schemes(self) -> tuple[str, ...]:
        """Labels of the schemes on the frontier, most bits first."""
        present = set(self.points.group[self.best].tolist())
        return tuple(label for i, label in enumerate(self.points.labels) if i in present)

    def to_dict(self) -> list[dict[str, float | str]]:
        """One record per run on the frontier."""
        p = self.points
        return [
            {
                "scheme": p.labels[p.group[i]],
                "w_stored_bits": p.schemes[p.group[i]].w_stored_bits,
                "N": float(p.N[i]),
                "D": float(p.D[i]),
                "model_bits": float(p.memory_bits[i]),
                "loss": float(p.loss[i]),
            }
            for i in self.best
        ]


def frontier(points: Points, candidates: Array | None = None) -> Frontier:
    """The frontier over model bits and loss among `candidates` (boolean, shape (n,); default: all rows)."""
    rows = np.arange(len(points)) if candidates is None else np.flatnonzero(candidates)
    rows = rows[np.lexsort((points.loss[rows], points.memory_bits[rows]))]
    return Frontier(points, rows, non_dominated(points.memory_bits[rows], points.loss[rows]))


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Runs that a frontier may compare: rows (boolean) of each training budget, ascending.

    A budget is a number of tokens per parameter. It is a number of `tokens` if more cells (scheme, size) share tokens than
    share tokens per parameter, as in a grid that trains every size on the same text.
    """

    rows: Mapping[float, Array]
    tokens: bool = False

    def label(self, value: float) -> str:
        """A budget as text: `25`, or `1M` of tokens."""
        return count(value) if self.tokens else f"{value:.3g}"

    @property
    def unit(self) -> str:
        """The unit of budgets."""
        return "tokens" if self.tokens else "tokens per parameter"

    def of(self, value: float) -> str:
        """A budget in words: `25 tokens per parameter`, `1M tokens`."""
        return f"{self.label(value)} {self.unit}"


def budgets(points: Points) -> Budgets:
    """The budgets of runs; empty if the tokens of some run are not known. The runs of one budget span at most 5 %."""
    if np.isnan(points.D).any() or not len(points):
        return Budgets({})
    by_ratio = _grouped(points.tokens_per_param, points.ratios)
    by_tokens = _grouped(points.D, np.array([np.median(part) for part in narrow_groups(np.sort(points.D), SAME_RATIO)]))
    shared = [max(len(_cells(points, rows)) for rows in groups.values()) for groups in (by_ratio, by_tokens)]
    return Budgets(by_tokens, tokens=True) if shared[1] > shared[0] else Budgets(by_ratio)


def _grouped(values: Array, centres: Array) -> dict[float, Array]:
    nearest = np.argmin(np.abs(np.log(values[:, None] / centres)), axis=1)
    return {float(centre): nearest == i for i, centre in enumerate(centres)}


def _cells(points: Points, rows: Array) -> set[tuple[int, float]]:
    return {(int(g), float(n)) for g, n in zip(points.group[rows], points.N[rows], strict=True)}


def commonest_budget(points: Points) -> Array:
    """Rows (boolean) of the training budget with the most cells (scheme, size), of several the largest; all rows if the tokens
    are unknown.
    """
    masks = list(budgets(points).rows.values())
    cells = [len(_cells(points, rows)) for rows in masks]
    return masks[max(range(len(cells)), key=lambda i: (cells[i], i))] if cells else np.ones(len(points), bool)
