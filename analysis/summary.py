"""What a grid of runs says, in sentences, and what it cannot say. Every sentence is computed from the points, the fit and
the frontier.

The house unit for "pays": 16·eff/bits, the effective parameters per stored bit relative to 16-bit weights (QuEST, arXiv
2502.05003,
section 5: the precision that maximises eff(P)/P is Pareto-optimal at large enough data).
"""

from __future__ import annotations

import numpy as np

from .figures import count
from .fit import Fit
from .pareto import Frontier
from .points import Points

Array = np.ndarray


def eff_per_bit(fit: Fit) -> dict[str, float]:
    """Scheme → 16·eff/bits, for schemes with runs; the reference at 16 bits has 1."""
    bits = {s.label: s.bits for s in fit.points.schemes}
    return {label: 16 * e / bits[label] for label, e in fit.eff.items() if e is not None}


def verdict(fit: Fit, frontier: Frontier, points: Points | None = None) -> list[str]:
    """Sentences, most important first: the frontier, eff, same-bits comparisons, token budgets, and what stays unknown.

    `points` defaults to the frontier's, the runs that were compared.
    """
    points = frontier.points if points is None else points
    said = [_frontier(frontier), *_eff(fit), *_rivals(points), *_budgets(points), *_doubt(fit, points)]
    return [sentence for sentence in said if sentence]


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _frontier(front: Frontier) -> str:
    p = front.points

    def runs(rows: Array, g: int) -> int:
        return int(np.sum(p.group[rows] == g))

    on = [
        f"{label} ({runs(front.best, g)} of {runs(front.rows, g)})" for g, label in enumerate(p.labels) if runs(front.best, g)
    ]
    off = [label for g, label in enumerate(p.labels) if runs(front.rows, g) and not runs(front.best, g)]
    budget = "" if len(front.rows) == len(p) else f" at {np.median(p.D[front.rows] / p.N[front.rows]):.3g} tokens per parameter"
    text = f"On the frontier over bits × parameters{budget} ({len(front.best)} of {len(front.rows)} runs): {_list(on)}"
    return text + (f"; {_list(off)} never." if off else ".")


def _eff(fit: Fit) -> list[str]:
    known = {k: v for k, v in fit.eff.items() if v is not None}
    if len(known) < 2:
        return []
    if fit.status in ("failed", "not identifiable"):
        return [f"The fit is {fit.status}: its eff are not to be used."]

    def span(label: str) -> str:
        ends = fit.intervals.get(f"eff.{label}")
        return f" [{ends[0]:.2g}, {ends[1]:.2g}]" if ends else ""

    reference = fit.points.labels[fit.design.reference]
    values = ", ".join(f"{k} {v:.2g}{span(k)}" for k, v in known.items() if k != reference)
    square = sorted(
        (s for s in fit.points.schemes if s.w_bits == s.a_bits and s.rotated and s.label in known), key=lambda s: -s.bits
    )
    best: dict[float, float] = {}
    for s in square:
        best[s.bits] = max(best.get(s.bits, 0.0), known[s.label])
    falling = all(a >= b for a, b in zip(list(best.values()), list(best.values())[1:], strict=False))
    per_bit = eff_per_bit(fit)
    winner = max(per_bit, key=lambda k: per_bit[k])
    return [
        f"A parameter counts as this share of a {reference} one (eff, 95 % interval): {values}; "
        f"the best eff at each width {'falls' if falling else 'does not fall steadily'} with the bits.",
        f"Per stored bit, {winner} makes the most of the memory ({per_bit[winner]:.2g} times {reference}'s 16 bits).",
    ]


def _rivals(points: Points) -> list[str]:
    """Schemes of the same bits, at cells (N, D) where both were trained."""
    out = []
    mean: dict[tuple[int, float, float], float] = {}
    for g, n, d in sorted({(int(g), float(n), float(d)) for g, n, d in zip(points.group, points.N, points.D, strict=True)}):
        mean[g, n, d] = float(points.loss[(points.group == g) & (n == points.N) & (d == points.D)].mean())
    for i, first in enumerate(points.schemes):
        for j, second in enumerate(points.schemes[i + 1 :], start=i + 1):
            if (first.w_bits, first.a_bits, first.bits) != (second.w_bits, second.a_bits, second.bits) or first.full:
                continue
            gaps = [mean[i, n, d] - mean[j, n, d] for g, n, d in mean if g == i and (j, n, d) in mean]
            if gaps:
                low, high = (first, second) if np.mean(gaps) < 0 else (second, first)
                wins = sum((gap < 0) == (low is first) for gap in gaps)
                out.append(
                    f"At the same bits, {low.label} is below {high.label} at {wins} of {len(gaps)} cells, "
                    f"by {abs(float(np.mean(gaps))):.3f} nats/token on average."
                )
    return out


def _budgets(points: Points) -> list[str]:
    if np.isnan(points.D).any():
        return []
    mixes = points.ratios
    out = [f"Token budgets: {_list([f'{r:.3g}' for r in mixes])} tokens per parameter."]
    for r in mixes:
        rows = np.abs(np.log(points.D / points.N / r)) < 0.05
        if len(np.unique(points.N[rows])) > 1:
            most, least = count(points.D[rows].max()), count(points.D[rows].min())
            out[0] += (
                f" At {r:.3g}, the largest model saw {most} tokens and the smallest {least}: "
                "equal tokens per parameter give a larger model more tokens, so part of its lead is data."
            )
            break
    controls: dict[str, tuple[float, str]] = {}  # per scheme, the widest range of sizes at equal tokens
    for g, label in enumerate(points.labels):
        for d in np.unique(points.D[points.group == g]):
            rows = (points.group == g) & (np.abs(np.log(points.D / d)) < 0.02)
            sizes = np.unique(points.N[rows])
            if len(sizes) > 1 and sizes[-1] / sizes[0] > controls.get(label, (1.0, ""))[0]:
                low, high = (float(points.loss[rows & np.isclose(points.N, n)].mean()) for n in (sizes[0], sizes[-1]))
                said = "the larger model wins on size alone" if high < low else "size alone does not help"
                text = f"{label}, {count(d)} tokens: {count(sizes[0])} → {count(sizes[-1])} parameters {low:.3f} → {high:.3f}"
                controls[label] = (sizes[-1] / sizes[0], f"{text} nats/token ({said})")
    if controls:
        out.append("Equal-token control: " + "; ".join(text for _, text in controls.values()) + ".")
    elif len(points.sizes) > 1:
        out.append("There is no equal-token control: no two sizes of one scheme saw the same number of tokens.")
    return out


def _doubt(fit: Fit, points: Points) -> list[str]:
    out = []
    loose = []
    for name in ("alpha", "beta", "E"):
        if name not in fit.intervals:
            continue
        low, high = fit.intervals[name]
        if not np.isfinite(high) or high > 2 * max(low, 1e-9):
            loose.append(f"{name} ({'0' if low < 1e-3 else f'{low:.2g}'} to {high:.2g})")
    if loose:
        out.append(f"This grid does not pin down {_list(loose)}: losses far outside it cannot be predicted.")
    out.append(
        f"Sizes span a factor of {points.sizes[-1] / points.sizes[0]:.3g}, the tokens {points.D.max() / points.D.min():.3g}; "
        "beyond that every number is an extrapolation."
    )
    cells = {(int(g), float(n), float(d)) for g, n, d in zip(points.group, points.N, points.D, strict=True)}
    if len(cells) == len(points):
        out.append("No cell was repeated with another seed, so the noise of a single run is not measured.")
    known = set(points.notes)
    out += [w[0].upper() + w[1:] + "." for w in fit.warnings if w not in known]
    return out
