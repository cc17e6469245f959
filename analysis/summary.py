"""What a grid of runs says, and what it cannot say, in sentences computed from points, fit and frontier.

The house unit for "pays": 16·eff/bits, the effective parameters per stored bit relative to 16-bit weights (QuEST, arXiv
2502.05003, section 5: the precision that maximises eff(P)/P is Pareto-optimal at large enough data).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .choice import Choice
from .figures import count
from .fit_result import UNTRUSTED, Fit
from .identify import at_bound, influence
from .pareto import Frontier
from .points import Points
from .tables import PointError
from .transitions import best_per_bit, transition
from .uncertainty import (
    Bootstrap,
    bent,
    contrasts,
    departures,
    eff_differences,
    holm,
    lack_of_fit,
    noise,
    noise_floor,
    residual_trends,
)

Array = np.ndarray
MOST = 4  # cells that a sentence names
LOOSE = 30.0  # an interval whose ends differ by more than this factor pins nothing down


def eff_per_bit(fit: Fit) -> dict[str, float]:
    """Scheme → 16·eff/bits, for schemes with runs; the reference at 16 bits has 1."""
    bits = {s.label: s.w_stored_bits for s in fit.points.schemes}
    return {label: 16 * e / bits[label] for label, e in fit.eff.items() if e is not None}


def per_bit_spans(fit: Fit) -> dict[str, tuple[float, float, float]]:
    """Scheme → 16·eff/bits and the ends of its interval, NaN where eff has none."""
    bits, none = {s.label: s.w_stored_bits for s in fit.points.schemes}, (math.nan, math.nan)
    ends = {label: fit.intervals.get(f"eff.{label}", none) for label in bits}
    return {k: (v, 16 * ends[k][0] / bits[k], 16 * ends[k][1] / bits[k]) for k, v in eff_per_bit(fit).items()}


class Leader(NamedTuple):
    """The scheme with the most effective parameters per stored bit, and those whose intervals reach above its value."""

    label: str
    rivals: tuple[str, ...]
    loose: bool  # its own interval or a rival's pins nothing down, so that nobody leads


def leader(per_bit: Mapping[str, Sequence[float]]) -> Leader:
    """Of scheme → (value, low, high), ends NaN where there is no interval."""
    best = max(per_bit, key=lambda label: per_bit[label][0])
    rivals = tuple(label for label, (_, _, high) in per_bit.items() if label != best and high > per_bit[best][0])
    return Leader(best, rivals, any(is_loose(per_bit[label][1:]) for label in (best, *rivals)))


def is_loose(ends: Sequence[float]) -> bool:
    """Does an interval of a positive number span so much that it pins nothing down?"""
    low, high = ends
    return not math.isnan(high) and not high < LOOSE * low


def verdict(fit: Fit, frontier: Frontier, points: Points | None = None) -> list[str]:
    """Sentences, most important first: `findings`, then `doubts`.

    `points` defaults to the frontier's, the runs that were compared.
    """
    points = frontier.points if points is None else points
    return [*findings(fit, frontier, points), *doubts(fit, points)]


def findings(fit: Fit, frontier: Frontier, points: Points) -> list[str]:
    """What the runs say: the frontier, eff, same-bits comparisons, inversions."""
    return [s for s in (_frontier(frontier), *_eff(fit), *_rivals(points), *_inversions(fit)) if s]


def doubts(fit: Fit, points: Points) -> list[str]:
    """What they cannot say: token budgets, loose parameters, extrapolation, noise, trends."""
    return [s for s in (*_budgets(points), *_doubt(fit, points)) if s]


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
    if fit.status in UNTRUSTED:
        return [f"The fit is {fit.status}: its eff are not to be used."]

    def span(label: str) -> str:
        ends = fit.intervals.get(f"eff.{label}")
        if ends is None:
            return ""
        return " [not pinned down]" if is_loose(ends) else f" [{ends[0]:.2g}, {ends[1]:.2g}]"

    reference = fit.points.labels[fit.design.reference]
    values = ", ".join(f"{k} {v:.2g}{span(k)}" for k, v in known.items() if k != reference)
    square = sorted(
        (s for s in fit.points.schemes if s.w_grid_bits == s.a_grid_bits and s.rotated and s.label in known),
        key=lambda s: -s.w_stored_bits,
    )
    best: dict[float, str] = {}
    for s in square:
        best[s.w_stored_bits] = max(best.get(s.w_stored_bits, s.label), s.label, key=lambda label: known[label])
    shares = f"A parameter counts as this share of a {reference} one (eff, 95 % interval): {values}"
    return [f"{shares}{_falls(fit, list(best.values()))}.", _per_bit(fit, reference)]


def _falls(fit: Fit, widths: Sequence[str]) -> str:
    """Does eff fall from each of these schemes to the next? Only as far as the intervals of the differences say so."""
    steps = list(pairwise(widths))
    if not steps:
        return ""
    gain, p = eff_differences(fit, steps)
    loose = {
        w
        for w in widths
        for i in (f"eff.{w}",)
        if i in fit.names and i not in fit.fixed and is_loose(fit.intervals.get(i, (0.0, math.inf)))
    }
    sure = holm(np.where([bool(loose & {*pair}) for pair in steps], 1.0, p))

    def named(which: Array) -> str:
        return _list([f"from {a} to {b}" for (a, b), here in zip(steps, which, strict=True) if here])

    if not sure.any():
        return "; whether the best eff at each width falls with the bits, these runs cannot tell"
    rises = sure & (gain > 0)
    said = [f"does not fall {named(rises)}, but rises" if rises.any() else "falls with the bits"]
    said += [f"{named(~sure)} these runs cannot tell"] if not sure.all() else []
    return f"; the best eff at each width {'; '.join(said)}"


def _per_bit(fit: Fit, reference: str) -> str:
    """Which precision makes the most of the memory, or that these runs cannot tell."""
    spans = per_bit_spans(fit)
    best, rivals, loose = leader(spans)
    value, low, high = spans[best]
    if loose:
        who = _list([label for label in (best, *rivals) if is_loose(spans[label][1:])])
        return f"Per stored bit, these runs cannot tell which precision pays: eff of {who} is not pinned down."
    times = f"{value:.2g} times {reference}'s 16 bits"
    if not math.isnan(high):
        times += f", 95 % interval {low:.2g} to {high:.2g}"
    reach = "interval of {} reaches" if len(rivals) == 1 else "intervals of {} reach"
    also = f"; the {reach.format(_list(list(rivals)))} above it" if rivals else ""
    return f"Per stored bit, {best} makes the most of the memory ({times}{also})."


def _rivals(points: Points) -> list[str]:
    """Schemes of the same bits, at cells (N, D) where both were trained."""
    out, mean = [], _cell_means(points)
    for i, first in enumerate(points.schemes):
        for j, second in enumerate(points.schemes[i + 1 :], start=i + 1):
            if (first.w_grid_bits, first.a_grid_bits, first.w_stored_bits) != (
                second.w_grid_bits,
                second.a_grid_bits,
                second.w_stored_bits,
            ) or first.full:
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


def _cell_means(points: Points) -> dict[tuple[int, float, float], float]:
    """Mean loss of each cell (scheme, N, D) over its seeds."""
    cells = sorted({(int(g), float(n), float(d)) for g, n, d in zip(points.group, points.N, points.D, strict=True)})
    rows = {(g, n, d): (points.group == g) & (n == points.N) & (d == points.D) for g, n, d in cells}
    return {cell: float(points.loss[r].mean()) for cell, r in rows.items()}


def _inversions(fit: Fit) -> list[str]:
    """Cells where fewer bits beat full precision: by more than the noise of the fit, or as noise lets them."""
    points = fit.points
    full = next((g for g, s in enumerate(points.schemes) if s.full), None)
    if full is None:
        return []
    mean = _cell_means(points)
    pairs = [(g, n, d) for g, n, d in mean if g != full and (full, n, d) in mean]
    better = np.array([mean[g, n, d] < mean[full, n, d] for g, n, d in pairs], bool)
    if not better.any():
        return []

    def cells(which: Array) -> str:
        where = sorted({(n, d) for (_, n, d), here in zip(pairs, which, strict=True) if here})
        more = [f"{len(where) - MOST} more"] if len(where) > MOST else []
        return _list([f"{count(n)} parameters on {count(d)} tokens" for n, d in where[:MOST]] + more)

    said = (
        f"At {better.sum()} of {len(pairs)} cells a quantized run is below the {points.labels[full]} run of the same size and "
        f"tokens ({cells(better)})"
    )
    if not fit.law.uses_scheme or fit.status in ("failed", "not identifiable"):
        return [f"{said}."]
    of = {(g, n, d): (points.group == g) & (n == points.N) & (d == points.D) for g, n, d in mean}
    gaps = [of[g, n, d] / of[g, n, d].sum() - of[full, n, d] / of[full, n, d].sum() for g, n, d in pairs]
    columns = np.stack(gaps, axis=1)
    lower, _, p = departures(fit, columns)  # > 0: the law, whose residuals these are, has the quantized run too high
    beyond = better & (lower > 0) & (holm(p, 0.005) | holm(contrasts(fit, columns), 0.005))  # one run, or many at once
    if not beyond.any():
        return [f"{said}, nowhere by more than runs scatter about the law ({100 * noise(fit):.2g} %)."]
    those = "" if (beyond == better).all() else f"at {beyond.sum()} of them ({cells(beyond)}) "
    return [
        f"{said}, {those}by more than runs scatter about the law: there the law, in which bits only cost, does not "
        "describe the runs, and eff is blurred."
    ]


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
    if trends := bent(fit):
        out.append(
            f"Residuals are trends in N, not noise, for {_list(trends)}: "
            "intervals take the law as true and overstate certainty."
        )
    known = set(points.notes)
    out += [w.sentence for w in fit.warnings if w not in known]
    return out


def details(
    fit: Fit, choice: Choice | None = None, boots: Mapping[str, Bootstrap] | None = None, others: Sequence[Fit] = ()
) -> dict[str, Any]:
    """What stands behind a fit, for JSON: residual trends, lack of fit, what drives parameters, bootstrap, laws, transitions.

    `boots` maps a law to its bootstrap, `others` are fits of laws that do as well (`choice.alternatives`); `answers` are the
    sentences that follow from them.
    """
    floor, lack = noise_floor(fit.points), lack_of_fit(fit)
    watched = dict.fromkeys(["E", *at_bound(fit)]) if "E" in fit.names else dict.fromkeys(at_bound(fit))
    driven = {
        name: [{"without": list(labels), "value": value} for labels, value in influence(fit, name)]
        for name in watched
        if name not in fit.fixed
    }
    out: dict[str, Any] = {
        "trends": [vars(t) for t in residual_trends(fit)],
        "noise_floor": None if floor is None else {"sd": floor[0], "degrees_of_freedom": floor[1]},
        "lack_of_fit": None if lack is None else {"F": lack[0], "p": lack[1]},
        "influence": driven,
        "choice": None if choice is None else choice.to_dict(),
        "bootstrap": {
            law: {"kind": b.kind, "replicates": len(b), "intervals": {k: list(v) for k, v in b.intervals().items()}}
            for law, b in (boots or {}).items()
        },
        "transitions": _transitions(choice.rivals if choice else (fit,), boots or {}),
        "transitions_of_other_laws": _transitions(tuple(f for f in others if f.law.name != fit.law.name), {}),
        "eff_per_bit": {label: list(ends) for label, ends in per_bit_spans(fit).items()},
        "best_per_bit": None,
    }
    square = [s.label for s in fit.points.schemes if s.w_grid_bits == s.a_grid_bits and s.rotated]
    if boots and fit.eff and fit.law.name in boots and len(square) > 1 and fit.status not in UNTRUSTED:
        out["best_per_bit"] = best_per_bit(boots[fit.law.name], square)
    return out | {"answers": _answers(out, "" if fit.status == "evaluated" else " (no interval: --bootstrap N gives one)")}


TRANSITION_SIZES = (0.8e9, 3.2e9, 7e9, 70e9)  # the sizes of which QuEST's question is usually asked


def _transitions(fits: tuple[Fit, ...], boots: Mapping[str, Bootstrap]) -> list[dict[str, Any]]:
    """From 8 to 4 bits at equal memory and FLOP, by law; empty where one of the two has no runs."""
    rows = []
    for fit in fits:
        if not fit.law.uses_scheme or fit.status in UNTRUSTED:
            continue
        for size in TRANSITION_SIZES:
            try:
                found = transition(fit, size, 8, 4, boots.get(fit.law.name))
            except PointError:
                return []
            ends = None if found.interval is None else [_number(v) for v in found.interval]
            rows.append(
                {
                    "law": fit.law.name,
                    "size": size,
                    "many": found.many,
                    "few": found.few,
                    "words": found.words,
                    "tokens_per_param": _number(found.ratio),
                    "interval": ends,
                }
            )
    return rows


def _number(ratio: float) -> float | str:
    return "never" if math.isinf(ratio) else ratio


def _answers(out: Mapping[str, Any], without: str) -> list[str]:
    """Sentences; `without` follows transitions that have no interval."""
    said = []
    at_7B = [row for row in out["transitions"] if row["size"] == 7e9]
    if at_7B:
        each = "; ".join(f"{row['law']} {row['words']}" for row in at_7B)
        few, many = at_7B[0]["few"], at_7B[0]["many"]
        budget = (
            f"At the memory and FLOP of a 16-bit 7B model, {few} beats {many} from this many tokens per 16-bit parameter on"
        )
        bare = "" if all(row["interval"] for row in at_7B) else without
        said.append(f"{budget}: {each}{bare}.")
        others = [f"{row['law']} {row['words']}" for row in out["transitions_of_other_laws"] if row["size"] == 7e9]
        if others:
            said.append(
                f"By the other laws that fit about as well: {'; '.join(others)} (--law auto ranks them on runs left out)."
            )
    if out["best_per_bit"]:
        share = ", ".join(f"{k} {v:.3g}" for k, v in out["best_per_bit"].items() if v > 0)
        said.append(f"Share of bootstrap replicates in which a format has the highest eff/bits: {share}.")
    return said
