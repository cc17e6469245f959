"""The figure of a study: the loss of every run by scheme, one panel for each size, with the mean over seeds.

Schemes are sorted by their mean at the first size, lowest on top; the colour shows the bits of the weights. A run that diverged
has no mark; the number of such runs is written beside its scheme.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compare import Comparison
from .draw import axes_grid
from .style import OTHER, PALETTE, count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def losses_by_seed(c: Comparison) -> Figure:
    """Validation loss of the main runs: a row for each scheme, a mark for each seed, a bar at the mean."""
    rows = [row for row in c.rows() if row.role == "main"]
    rank = {
        row.scheme: (row.params_non_embedding, row.loss if row.loss is not None else float("inf")) for row in reversed(rows)
    }
    schemes = sorted(rank, key=lambda name: rank[name])
    figure, panels = axes_grid(3.4 * len(c.sizes) + 2.2, 1.2 + 0.26 * len(schemes), len(c.sizes), shared=True)
    for axes, size in zip(panels, c.sizes, strict=True):
        for row in (r for r in rows if r.size == size):
            y, bits = schemes.index(row.scheme), round(row.w_stored_bits) if row.w_stored_bits is not None else 0
            losses = list(c.by_seed(row.scheme, size).values())
            color = PALETTE.get(bits, OTHER)
            axes.plot(losses, [y] * len(losses), ls="none", marker="o", ms=4, mfc="none", color=color)
            if row.loss is not None:
                axes.plot([row.loss] * 2, [y - 0.35, y + 0.35], color=color, lw=2)
            if row.diverged:
                axes.annotate(
                    f"{row.diverged} diverged", (1, y), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="center"
                )
        n, tokens = map(count, size)
        axes.set_title(f"{n} parameters, {tokens} tokens ({size[1] / size[0]:.3g} a parameter)", fontsize=9, loc="left")
        axes.set_xlabel("validation loss (nats/token)")
        axes.set_yticks(range(len(schemes)), schemes)
        axes.set_ylim(len(schemes) - 0.5, -0.5)
    return figure
