"""Styles of schemes, the same in every figure, and the format of counts on axes.

The hue shows the bits of the weights, in Okabe and Ito's palette, which is safe for colour-blind readers; shade, marker and
dash distinguish schemes of the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .schemes import Scheme

# Okabe & Ito 2008, "Color Universal Design"; by bits of the weights, from full precision down.
PALETTE = {16: "#000000", 8: "#0072B2", 4: "#009E73", 3: "#E69F00", 2: "#D55E00", 1: "#CC79A7"}
OTHER = "#56B4E9"
MARKERS = "osD^vP*X<>hd"
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


@dataclasses.dataclass(frozen=True)
class Style:
    """How a scheme is drawn."""

    color: str
    marker: str
    dash: Any


def styles(schemes: Sequence[Scheme]) -> dict[str, Style]:
    """Label → style; schemes of the same bits share the hue and differ in marker and dash, other methods than the first also in
    shade.
    """
    out: dict[str, Style] = {}
    uses: dict[str, int] = {}
    shades: dict[str, dict[str, str]] = {}
    for s in sorted(schemes, key=lambda s: (s.w_grid_bits != s.a_grid_bits, not s.rotated, s.w_mse, len(s.label), s.label)):
        color = PALETTE.get(round(s.w_grid_bits) if abs(s.w_grid_bits - round(s.w_grid_bits)) < 1e-9 else -1, OTHER)
        k = uses.get(color, 0)
        uses[color] = k + 1
        method = s.label.partition("-w")[0] if "-w" in s.label or not s.label.startswith("w") else ""
        known = shades.setdefault(color, {"": color, "quest": color})
        shade = known.setdefault(method, _shade(color, _SHADES[(len(known) - 2) % len(_SHADES)]))
        out[s.label] = Style(shade, MARKERS[k % len(MARKERS)], DASHES[k % len(DASHES)])
    return {s.label: out[s.label] for s in schemes}


_SHADES = (-0.4, 0.35, -0.65, 0.18, -0.2)


def _shade(color: str, share: float) -> str:
    """The colour mixed with white (share > 0) or with black."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p + abs(share) * ((255 if share > 0 else 0) - p)):02x}" for p in parts)


def with_interval(loss: float, ends: tuple[float, float] | None) -> str:
    """A loss with its interval, in as many decimals, four to seven, as its ends need to differ."""
    if ends is None:
        return f"{loss:.4f}"
    digits = next((d for d in range(4, 7) if f"{ends[0]:.{d}f}" != f"{ends[1]:.{d}f}"), 7)
    return f"{loss:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def count(n: float) -> str:
    """30482560 → `30M`, 53440 → `53K`."""
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= unit:
            return f"{n / unit:.3g}{word}" if n < 10 * unit else f"{n / unit:.0f}{word}"
    return f"{n:g}"
