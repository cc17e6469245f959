"""The frontier of measured runs: the non-dominated set over the bits of a model and the loss it reaches.

A run is dominated when another is no larger and no worse, and strictly better in one of the two. The set is exact: it consists
of measured runs, and no law is involved.

Bits are what the weights take (`Points.memory_bits`: N·bits per weight unless the table has them).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .points import Points

Array = np.ndarray


def non_dominated(cost: Array, loss: Array) -> Array:
    """Mask of the points no other point beats in both coordinates, shape (n,) or (m, n) for m sets of losses at the same costs.

    Of exact ties all are kept. O(n log n) per set.
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


def by_budget(points: Points) -> dict[float, Array]:
    """Rows (boolean) by training budget in tokens per parameter: a frontier only compares runs with the same budget.

    Keys are the distinct D/N, ascending (`Points.ratios`): those of one budget span at most 5 %.
    """
    values, ratio = points.ratios, points.tokens_per_param
    nearest = np.argmin(np.abs(np.log(ratio[:, None] / values)), axis=1) if len(values) else np.zeros(len(points), int)
    return {float(v): nearest == i for i, v in enumerate(values)}


def commonest_budget(points: Points) -> Array:
    """Rows (boolean) of the token budget that most cells (scheme, size) share, of several the largest; all where the
    tokens are unknown.
    """
    budgets = [] if np.isnan(points.D).any() else list(by_budget(points).values())
    cells = [len({(int(g), float(n)) for g, n in zip(points.group[r], points.N[r], strict=True)}) for r in budgets]
    return budgets[max(range(len(cells)), key=lambda i: (cells[i], i))] if cells else np.ones(len(points), bool)
