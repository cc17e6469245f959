"""The figure of a study: the loss of every run, scheme by scheme, one panel for each size, with the mean over seeds.

Schemes stand from the lowest mean to the highest, of the first size; the colour says the bits of the weights. A run that
diverged has no mark, so its scheme says how many did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compare import Comparison
from .figures import _OTHER, _PALETTE, axes_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def losses_by_seed(c: Comparison) -> Figure:
    """Validation loss of the main runs, a row for each scheme, a mark for each seed, a bar at the mean."""
    rows = [row for row in c.rows() if row.role == "main"]
    rank = {row.scheme: (row.params, row.loss if row.loss is not None else float("inf")) for row in reversed(rows)}
    schemes = sorted(rank, key=lambda name: rank[name])
    figure, panels = axes_grid(3.4 * len(c.cells) + 2.2, 1.2 + 0.26 * len(schemes), len(c.cells), shared=True)
    for axes, cell in zip(panels, c.cells, strict=True):
        for row in (r for r in rows if (r.params, r.tokens) == cell):
            y, bits = schemes.index(row.scheme), round(row.bits) if row.bits is not None else 0
            losses = list(c.seeds(row.scheme, cell).values())
            color = _PALETTE.get(bits, _OTHER)
            axes.plot(losses, [y] * len(losses), ls="none", marker="o", ms=4, mfc="none", color=color)
            if row.loss is not None:
                axes.plot([row.loss] * 2, [y - 0.35, y + 0.35], color=color, lw=2)
            if row.diverged:
                axes.annotate(
                    f"{row.diverged} diverged", (1, y), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="center"
                )
        axes.set_title(f"{c.name(cell)} parameters, {cell[1] / cell[0]:.3g} tokens per parameter", fontsize=9, loc="left")
        axes.set_xlabel("validation loss (nats/token)")
        axes.set_yticks(range(len(schemes)), schemes)
        axes.set_ylim(len(schemes) - 0.5, -0.5)
    return figure
