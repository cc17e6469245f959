"""The results of runs and their caveats, as findings in order of weight, computed from points, fit and frontier.

The first finding answers the question that the fit was made for: which precision makes the most of a stored bit, by the
effective parameters per stored bit relative to the reference scheme, 16·eff/bits where that has 16-bit weights (QuEST, arXiv
2502.05003, section 5: the precision that maximises eff(P)/P is Pareto-optimal at large enough data). If a fit cannot answer,
the finding says so instead.

Every sentence has at most 25 words; lists are cut to three names, and `numbers` has the full lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..system import package_version
from ..words import few
from .choice import Choice
from .document import FitDocument
from .findings import Finding
from .fit_result import UNTRUSTED, Fit
from .identify import at_bound, influence
from .isoflop import isoflop_optima, law_exponent
from .pareto import Frontier, budgets
from .points import Points
from .style import count
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
LOOSE = 30.0  # an interval whose ends differ by more than this factor is undetermined
MOST_NAMES = 3  # in a sentence

# The weight of a finding, by kind. The answer comes first, then its caveats, then other results.
ANSWERS = ("untrusted", "best_per_bit", "law")
WEIGHTS = {
    **dict.fromkeys(ANSWERS, 100),
    "beaten_beyond_noise": 90,
    "rivals_per_bit": 85,
    "no_best_law": 82,
    "transition": 80,
    "isoflop": 78,
    "isoflop_open": 77,
    "isoflop_edges": 58,
    "trends": 75,
    "other_laws": 70,
    "eff_order": 65,
    "clustered_residuals": 62,
    "loose_parameters": 60,
    "best_law": 56,
    "frontier": 50,
    "same_bits": 45,
    "extrapolation": 40,
    "no_repeats": 35,
    "eff_order_open": 33,
    "beaten": 30,
    "larger_saw_more": 28,
    "equal_tokens": 26,
    "no_equal_tokens": 26,
    "replicates_per_bit": 24,
    "off_frontier": 20,
    "isoflop_others": 22,
    "isoflop_chance": 12,
    "budgets": 10,
}
REASON = 95  # a reason why a fit must not be used
WARNING = 55  # any other warning of the fit
DOUBTS = frozenset(
    (
        "trends",
        "loose_parameters",
        "extrapolation",
        "no_repeats",
        "eff_order_open",
        "larger_saw_more",
        "no_equal_tokens",
        "other_laws",
        "no_best_law",
        "clustered_residuals",
        "isoflop_open",
        "isoflop_edges",
    )
)  # kinds of caveats, beside the warnings of the fit


def eff_per_bit(fit: Fit) -> dict[str, float]:
    """Scheme → effective parameters per stored bit relative to those of the reference scheme, which has 1.

    It is 16·eff/bits if the reference has 16 bits. Schemes without runs are left out.
    """
    bits = {s.label: s.w_stored_bits for s in fit.points.schemes}
    return {label: fit.reference.w_stored_bits * e / bits[label] for label, e in fit.eff.items() if e is not None}


def per_bit_formula(fit: Fit) -> str:
    """`eff_per_bit` as the heading of a column, such as 16·eff/bits."""
    return f"{fit.reference.w_stored_bits:g}·eff/bits"


def per_bit_spans(fit: Fit) -> dict[str, tuple[float, float, float]]:
    """Scheme → `eff_per_bit` and the ends of its interval, NaN if eff has none."""
    bits, none = {s.label: s.w_stored_bits for s in fit.points.schemes}, (math.nan, math.nan)
    ends = {label: fit.intervals.get(f"eff.{label}", none) for label in bits}
    unit = fit.reference.w_stored_bits
    return {k: (v, unit * ends[k][0] / bits[k], unit * ends[k][1] / bits[k]) for k, v in eff_per_bit(fit).items()}


class Leader(NamedTuple):
    """The scheme with the most effective parameters per stored bit, and those whose intervals reach above its value."""

    label: str
    rivals: tuple[str, ...]
    loose: bool  # its own interval or a rival's is undetermined, so that nobody leads


def leader(per_bit: Mapping[str, Sequence[float]]) -> Leader:
    """The leader among scheme → (value, low, high), at least two; ends are NaN without an interval."""
    best = max(per_bit, key=lambda label: per_bit[label][0])
    rivals = tuple(label for label, (_, _, high) in per_bit.items() if label != best and high > per_bit[best][0])
    return Leader(best, rivals, any(is_loose(per_bit[label][1:]) for label in (best, *rivals)))


def second(per_bit: Mapping[str, Sequence[float]]) -> str:
    """The scheme after the leader."""
    return sorted(per_bit, key=lambda label: -per_bit[label][0])[1]


def is_loose(ends: Sequence[float]) -> bool:
    """Whether an interval of a positive number is too wide to determine anything."""
    low, high = ends
    return not math.isnan(high) and not high < LOOSE * low


def make_document(
    fit: Fit,
    front: Frontier,
    *,
    choice: Choice | None = None,
    boots: Mapping[str, Bootstrap] | None = None,
    others: Sequence[Fit] = (),
    options: Mapping[str, Any] | None = None,
) -> FitDocument:
    """The fit document: the fit, its findings, and the numbers behind them.

    `front` is the frontier among the runs of one token budget, `choice` the errors of laws on held-out runs, `boots` maps a law
    to its bootstrap, and `others` are fits of laws that describe the points about as well (`choice.alternatives`).
    """
    numbers = details(fit, choice, boots, others)
    return FitDocument.from_json(
        {
            **fit.to_dict(),
            "schema": 2,
            **numbers,
            "findings": [f.to_dict() for f in findings(fit, front, numbers)],
            "frontier": front.to_dict(),
            "points": fit.points.to_records(),
            "options": dict(options or {}),
            "versions": {name: package_version(name) for name in ("questctl", "numpy", "scipy")},
        }
    )


def findings(fit: Fit, front: Frontier, numbers: Mapping[str, Any] | None = None) -> list[Finding]:
    """All findings, the heaviest first; those of one weight in the order in which they are computed here.

    `numbers` are the `details` of the fit; if left out, they are computed without bootstrap.
    """
    numbers = details(fit) if numbers is None else numbers
    points = fit.points
    out = [
        *_answer(fit),
        *_transition(fit, numbers),
        *_isoflop(numbers, fit.law.name),
        *_eff_order(fit),
        *_frontier(front),
        *_same_bits(points),
        *_beaten(fit),
        *_replicates(numbers),
        *_trends(fit),
        *_loose(fit),
        *_budgets(points),
        *_span(points),
    ]
    out += [warning for warning in fit.warnings if warning not in points.notes]
    return sorted(out, key=lambda finding: -_weight(finding, fit))


def verdict(fit: Fit, front: Frontier) -> list[Finding]:
    """The answer and what weighs most beside it: at most five findings."""
    return findings(fit, front)[:5]


def is_doubt(finding: Finding) -> bool:
    """Whether a finding is a caveat."""
    return finding.kind in DOUBTS or finding.kind not in WEIGHTS


def _weight(finding: Finding, fit: Fit) -> int:
    return WEIGHTS.get(finding.kind, REASON if fit.status in UNTRUSTED else WARNING)


def _join(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """`a, b and c`, or `a, b, c and 4 more`; a single further name is written out, since `1 more` is no shorter."""
    return few(names, most if len(names) > most + 1 else None, last=" and ")


# ---------------------------------------------------------------------------------------------------- the answer


def _answer(fit: Fit) -> Iterator[Finding]:
    """Which precision makes the most of the memory, or why the fit does not tell."""
    if fit.status in UNTRUSTED:
        text = f"The fit is {fit.status}: do not use its parameters or its eff."
        yield Finding("untrusted", text, {"status": fit.status})
        return
    spans = per_bit_spans(fit)
    if len(spans) < 2:
        text = f"Law {fit.law.name} describes the {fit.n} runs with an error of {100 * fit.rms:.2g} % (root mean square)."
        yield Finding("law", text, {"law": fit.law.name, "runs": fit.n, "rms": fit.rms})
        return
    best, rivals, loose = leader(spans)
    value, low, high = spans[best]
    numbers: dict[str, Any] = {
        "scheme": best,
        "reference": fit.reference.label,
        "value": value,
        "interval": None if math.isnan(high) else [low, high],
        "rivals": list(rivals),
    }
    if loose:
        who = [label for label in (best, *rivals) if is_loose(spans[label][1:])]
        text = f"Per stored bit, these runs cannot tell which precision pays: eff of {_join(who)} is not pinned down."
        yield Finding("best_per_bit", text, {**numbers, "loose": who})
        return
    if best == fit.reference.label:  # whose own value is 1 by definition
        times = f"{second(spans)} has {_with_ends(*spans[second(spans)], ' times as much')}"
    else:
        times = _with_ends(*spans[best], f" times {fit.reference.label}'s {fit.reference.w_stored_bits:g} bits")
    yield Finding("best_per_bit", f"Per stored bit, {best} makes the most of the memory ({times}).", {**numbers, "loose": []})
    if rivals:
        reach = "interval of {} reaches" if len(rivals) == 1 else "intervals of {} reach"
        text = f"The lead of {best} per stored bit is not certain: the {reach.format(_join(rivals))} above its value."
        yield Finding("rivals_per_bit", text, {"scheme": best, "rivals": list(rivals)})


def _with_ends(value: float, low: float, high: float, unit: str) -> str:
    """A number with its unit and its interval, if there is one."""
    digits = _digits(low, high)
    ends = "" if math.isnan(high) else f", 95 % interval {low:.{digits}g} to {high:.{digits}g}"
    return f"{value:.{digits}g}{unit}{ends}"


def _digits(low: float, high: float) -> int:
    """The significant digits, at least two, at which the ends of an interval differ; two for NaN."""
    return next((d for d in range(2, 7) if f"{low:.{d}g}" != f"{high:.{d}g}" or math.isnan(high)), 7)


# ---------------------------------------------------------------------------------------------------- transitions


def _transition(fit: Fit, numbers: Mapping[str, Any]) -> Iterator[Finding]:
    """From how many tokens fewer bits pay at the memory and FLOP of a 16-bit 7B model, and the answers of other laws."""
    at_7B = [row for row in (*numbers["transitions"], *numbers["transitions_of_other_laws"]) if row["size"] == 7e9]
    mine = [row for row in at_7B if row["law"] == fit.law.name]
    for row in mine:
        place = "At the memory and FLOP of a 16-bit 7B model,"
        yield Finding("transition", f"{place} {_pays(row, fit.status)}.", row)
    others = [f"{row['law']} {_ratio(row['tokens_per_param'])}" for row in at_7B if row["law"] != fit.law.name]
    if mine and others:
        text = f"By other laws that fit about as well, that number of tokens is {_join(others)}."
        yield Finding("other_laws", text, {"laws": [row["law"] for row in at_7B if row["law"] != fit.law.name]})


def _pays(row: Mapping[str, Any], status: str) -> str:
    """From which tokens per parameter fewer bits beat more, in ten to fifteen words."""
    few, many, ratio, ends = row["few"], row["many"], row["tokens_per_param"], row["interval"]
    span = f" [{_ratio(ends[0])}, {_ratio(ends[1])}]" if ends else ""
    bare = "" if ends or status == "evaluated" else " (no interval without bootstrap)"
    if ratio == "never":
        return f"{few} never beats {many}{span}{bare}"
    if ratio == 0:
        return f"{few} always beats {many}{span}{bare}"
    return f"{few} beats {many} from {_ratio(ratio)}{span} tokens per 16-bit parameter on{bare}"


def _ratio(value: float | str) -> str:
    return (
        value
        if isinstance(value, str)
        else "always"
        if value == 0
        else f"{float(f'{value:.3g}'):,.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


# ---------------------------------------------------------------------------------------------------- isoFLOP


def _isoflop_records(fit: Fit) -> list[dict[str, Any]]:
    """The minima at equal FLOP of each scheme, with the exponent that the law has for them."""
    trusted = fit.status not in UNTRUSTED
    return [
        {**optima.to_dict(), "a_of_law": law_exponent(fit, optima) if trusted else None}
        for optima in isoflop_optima(fit.points)
    ]


def _isoflop(numbers: Mapping[str, Any], law: str) -> Iterator[Finding]:
    """How the best size grows with the compute, by parabolas at equal FLOP and by the law; and what is not determined."""
    records = sorted(numbers.get("isoflop", ()), key=lambda record: -sum(not b["edge"] for b in record["budgets"]))
    for place, record in enumerate(records):
        budgets, scheme = record["budgets"], record["scheme"]
        inside = [budget for budget in budgets if not budget["edge"]]
        known = record["a_interval"] is not None
        if not record["clear"]:
            if known:
                text = f"{len(budgets)} budgets of {scheme} happen to have three sizes; by their parabolas {_exponent(record)}."
                yield Finding("isoflop_chance", text, record)
            continue
        if known:
            beside = "" if record["a_of_law"] is None else f"; by law {law} C^{record['a_of_law']:.3f}"
            text = f"By parabolas at {len(inside)} budgets of {scheme}, {_exponent(record)}{beside}."
            yield Finding("isoflop_others" if place else "isoflop", text, record)
        if record["open"]:
            text = f"The budgets of {scheme} cannot tell how the best size grows: {record['open']}."
            yield Finding("isoflop_open", text, record)
        if edges := [budget for budget in budgets if budget["edge"]]:
            first = f"{edges[0]['flops']:.2g} FLOP: {edges[0]['edge']}"
            text = f"At {len(edges)} of {len(budgets)} budgets of {scheme} the least loss is not among the sizes ({first})."
            yield Finding("isoflop_edges", text, {"scheme": scheme, "budgets": edges})


def _exponent(record: Mapping[str, Any]) -> str:
    low, high = record["a_interval"]
    return f"the best size grows as C^{record['a']:.3f} [{low:.3f}, {high:.3f}]"


# ---------------------------------------------------------------------------------------------------- schemes


def _eff_order(fit: Fit) -> Iterator[Finding]:
    """Whether eff falls from each width to the next, as far as the intervals of the differences exclude zero."""
    known = {label: e for label, e in fit.eff.items() if e is not None}
    if len(known) < 2 or fit.status in UNTRUSTED:
        return
    square = sorted(
        (s for s in fit.points.schemes if s.w_grid_bits == s.a_grid_bits and s.rotated and s.label in known),
        key=lambda s: -s.w_stored_bits,
    )
    best: dict[float, str] = {}
    for s in square:
        best[s.w_stored_bits] = max(best.get(s.w_stored_bits, s.label), s.label, key=lambda label: known[label])
    steps = list(pairwise(best.values()))
    if not steps:
        return
    gain, p = eff_differences(fit, steps)
    loose = {
        w
        for w in best.values()
        for i in (f"eff.{w}",)
        if i in fit.names and i not in fit.fixed and is_loose(fit.intervals.get(i, (0.0, math.inf)))
    }
    sure = holm(np.where([bool(loose & {*pair}) for pair in steps], 1.0, p))
    rises = sure & (gain > 0)

    def pairs(which: Array) -> list[list[str]]:
        return [list(pair) for pair, here in zip(steps, which, strict=True) if here]

    def named(which: Array) -> str:
        return _join([f"from {a} to {b}" for a, b in pairs(which)], most=2)

    numbers = {"falls": pairs(sure & ~rises), "rises": pairs(rises), "open": pairs(~sure)}
    if not sure.any():
        yield Finding(
            "eff_order_open", "Whether the best eff at each width falls with the bits, these runs cannot tell.", numbers
        )
        return
    if rises.any():
        yield Finding("eff_order", f"The best eff at each width does not fall {named(rises)}, but rises.", numbers)
    else:
        where = "" if sure.all() else "Where these runs can tell, "
        yield Finding("eff_order", f"{where}{'t' if where else 'T'}he best eff at each width falls with the bits.", numbers)
    if not sure.all():
        yield Finding("eff_order_open", f"Whether eff falls {named(~sure)}, these runs cannot tell.", numbers)


def _frontier(front: Frontier) -> Iterator[Finding]:
    """Which schemes are on the frontier of bits and loss, and which never."""
    p = front.points

    def runs(rows: Array, g: int) -> int:
        return int(np.sum(p.group[rows] == g))

    on = {label: runs(front.best, g) for g, label in enumerate(p.labels) if runs(front.best, g)}
    off = [label for g, label in enumerate(p.labels) if runs(front.rows, g) and not runs(front.best, g)]
    part = len(front.rows) < len(p)
    split = budgets(p)
    values = p.D if split.tokens else p.tokens_per_param
    budget = f" at {split.of(float(np.median(values[front.rows])))}" if part else ""
    where = f"On the frontier of bits and loss{budget} ({len(front.best)} of {len(front.rows)} runs)"
    shared = float(np.median(values[front.rows])) if part else None
    numbers = {
        "runs": on,
        "never": off,
        "tokens_per_param": None if split.tokens else shared,
        "tokens": shared if split.tokens else None,
    }
    yield Finding("frontier", f"{where}: {_join([f'{label} ({n})' for label, n in on.items()])}.", numbers)
    if off:
        yield Finding("off_frontier", f"Never on the frontier of bits and loss: {_join(off)}.", {"schemes": off})


def _same_bits(points: Points) -> Iterator[Finding]:
    """Schemes of the same bits, at the (N, D) where both were trained, the widest gap first."""
    out, mean = [], _cell_means(points)
    for i, first in enumerate(points.schemes):
        for j, second in enumerate(points.schemes[i + 1 :], start=i + 1):
            if (first.w_grid_bits, first.a_grid_bits, first.w_stored_bits) != (
                second.w_grid_bits,
                second.a_grid_bits,
                second.w_stored_bits,
            ) or first.full:
                continue
            gaps = [mean[i, at] - mean[j, at] for g, at in mean if g == i and (j, at) in mean]
            if gaps:
                low, high = (first, second) if np.mean(gaps) < 0 else (second, first)
                wins, gap = sum((gap < 0) == (low is first) for gap in gaps), abs(float(np.mean(gaps)))
                below = f"At the same bits, {low.label} is below {high.label} at {wins} of {len(gaps)} cells"
                numbers = {"below": low.label, "above": high.label, "cells": wins, "of": len(gaps), "gap": gap}
                out.append(Finding("same_bits", f"{below}, by {gap:.3f} nats/token on average.", numbers))
    yield from sorted(out, key=lambda finding: -finding.numbers["gap"])


def controls(points: Points, method: str) -> list[Finding]:
    """How much higher runs of `method` end than others of the same bits, size and tokens; none without such pairs."""
    gaps: list[tuple[int, int, float]] = []  # number of cells, number with the control above, mean gap
    for finding in _same_bits(points):
        below, above, wins, cells, gap = (finding.numbers[k] for k in ("below", "above", "cells", "of", "gap"))
        if above.startswith(f"{method}-") and not below.startswith(f"{method}-"):
            gaps.append((cells, wins, gap))
        elif below.startswith(f"{method}-") and not above.startswith(f"{method}-"):
            gaps.append((cells, cells - wins, -gap))
    if not gaps:
        return []
    cells, wins = sum(g[0] for g in gaps), sum(g[1] for g in gaps)
    gap = sum(g[0] * g[2] for g in gaps) / cells
    where = f"at {wins} of {cells} cells of equal bits"
    text = f"Controls: {method} ends above the other method {where}, by {gap:.3f} nats/token on average."
    return [Finding("controls", text, {"method": method, "cells": wins, "of": cells, "gap": gap})]


def held_out_sizes(choice: Choice | None) -> list[Finding]:
    """The error of the first law on sizes held out one at a time; none if it is not known."""
    if choice is None or math.isnan(choice.scores[0].leave_one_size_out):
        return []
    first = choice.scores[0]
    error = f"{100 * first.leave_one_size_out:.2g} % (root mean square)"
    text = f"Sizes held out one after the other are predicted with an error of {error}."
    return [Finding("held_out", text, {"law": first.law, "leave_one_size_out": first.leave_one_size_out})]


Place = tuple[float, float, float]  # N, D and how often the tokens were read again


def _cells(points: Points) -> dict[tuple[int, Place], Array]:
    """Rows (boolean) of each cell: scheme, and what else its runs have in common."""
    first = np.unique(points.cell, return_index=True)[1]
    places = {int(points.cell[i]): (float(points.N[i]), float(points.D[i]), float(points.repeats[i])) for i in first}
    return {(int(points.group[i]), places[int(points.cell[i])]): points.cell == points.cell[i] for i in first}


def _cell_means(points: Points) -> dict[tuple[int, Place], float]:
    """Mean loss of each cell over its seeds."""
    return {cell: float(points.loss[rows].mean()) for cell, rows in _cells(points).items()}


def _beaten(fit: Fit) -> Iterator[Finding]:
    """Cells in which fewer bits beat full precision: by more than the noise of the fit, or within it."""
    points = fit.points
    full = next((g for g, s in enumerate(points.schemes) if s.full), None)
    if full is None:
        return
    mean = _cell_means(points)
    pairs = [(g, at) for g, at in mean if g != full and (full, at) in mean]
    better = np.array([mean[g, at] < mean[full, at] for g, at in pairs], bool)
    if not better.any():
        return

    def rows(which: Array) -> list[dict[str, Any]]:
        return [
            {
                "scheme": points.labels[g],
                "params_non_embedding": at[0],
                "tokens": at[1],
                "loss": mean[g, at],
                f"loss of {points.labels[full]}": mean[full, at],
            }
            for (g, at), here in zip(pairs, which, strict=True)
            if here
        ]

    what = f"a quantized run beats {points.labels[full]}"
    here = f"At {better.sum()} of {len(pairs)} cells {what}"
    numbers: dict[str, Any] = {"cells": int(better.sum()), "of": len(pairs)}
    if not fit.law.uses_scheme or fit.status in ("failed", "not identifiable"):
        yield Finding("beaten", f"{here}.", {**numbers, "rows": rows(better)})
        return
    of = _cells(points)
    gaps = [of[g, at] / of[g, at].sum() - of[full, at] / of[full, at].sum() for g, at in pairs]
    columns = np.stack(gaps, axis=1)
    lower, _, p = departures(fit, columns)  # > 0: the law predicts too high a loss for the quantized run
    beyond = better & (lower > 0) & (holm(p, 0.005) | holm(contrasts(fit, columns), 0.005))  # one run, or many at once
    if not beyond.any():
        text = f"{here}, nowhere by more than runs scatter about the law ({fit.objective.shown(noise(fit))})."
        yield Finding("beaten", text, {**numbers, "noise": noise(fit), "rows": rows(better)})
        return
    text = f"At {beyond.sum()} of {len(pairs)} cells {what} by more than noise: there the law, in which bits only cost, fails."
    yield Finding("beaten_beyond_noise", text, {**numbers, "beyond_noise": int(beyond.sum()), "rows": rows(beyond)})


def _replicates(numbers: Mapping[str, Any]) -> Iterator[Finding]:
    among = "among schemes whose weights and activations have equal bits"
    if shares := numbers["best_per_bit"]:
        best = max(shares, key=lambda label: shares[label])
        text = f"In {100 * shares[best]:.3g} % of the bootstrap replicates {best} has the largest eff per bit {among}."
        yield Finding("replicates_per_bit", text, shares)


# ---------------------------------------------------------------------------------------------------- doubts


def _budgets(points: Points) -> Iterator[Finding]:
    """Token budgets, and whether they separate the effects of size and data."""
    if np.isnan(points.D).any():
        return
    split = budgets(points)
    names = [split.label(value) for value in split.rows]
    shown = _join(names) if len(names) <= MOST_NAMES + 1 else f"{names[0]} to {names[-1]} ({len(names)} budgets)"
    numbers = {"tokens" if split.tokens else "tokens_per_param": list(split.rows)}
    yield Finding("budgets", f"{split.unit.capitalize()} of the runs: {shown}.", numbers)
    for r, rows in split.rows.items():
        if not split.tokens and len(np.unique(points.N[rows])) > 1:
            most, least = float(points.D[rows].max()), float(points.D[rows].min())
            saw = f"the largest model saw {count(most)} tokens, the smallest {count(least)}"
            text = f"At {split.of(r)} {saw}: part of its lead is data."
            yield Finding("larger_saw_more", text, {"tokens_per_param": float(r), "most": most, "least": least})
            break
    control = _equal_tokens(points)
    if control:
        wins = sum(row["loss of the larger"] < row["loss of the smaller"] for row in control)
        text = f"At equal tokens the larger model has the lower loss for {wins} of {len(control)} schemes."
        yield Finding("equal_tokens", text, {"schemes": wins, "of": len(control), "rows": control})
    elif len(points.sizes) > 1:
        text = "No two sizes of one scheme saw the same number of tokens, so size and data are not told apart."
        yield Finding("no_equal_tokens", text)


def _equal_tokens(points: Points) -> list[dict[str, Any]]:
    """Per scheme, the widest range of sizes trained on equal tokens, with the mean losses at both ends."""
    widest: dict[str, dict[str, Any]] = {}
    for g, label in enumerate(points.labels):
        for d in np.unique(points.D[points.group == g]):
            rows = (points.group == g) & (np.abs(np.log(points.D / d)) < 0.02)
            sizes = np.unique(points.N[rows])
            if len(sizes) < 2 or (
                label in widest and sizes[-1] / sizes[0] <= widest[label]["larger"] / widest[label]["smaller"]
            ):
                continue
            low, high = (float(points.loss[rows & np.isclose(points.N, n)].mean()) for n in (sizes[0], sizes[-1]))
            widest[label] = {
                "scheme": label,
                "tokens": float(d),
                "smaller": float(sizes[0]),
                "larger": float(sizes[-1]),
                "loss of the smaller": low,
                "loss of the larger": high,
            }
    return list(widest.values())


def _loose(fit: Fit) -> Iterator[Finding]:
    """Exponents and floor whose intervals span a factor of two or more."""
    ends = {name: fit.intervals[name] for name in ("alpha", "beta", "E") if name in fit.intervals}
    loose: dict[str, Any] = {
        name: [low, high] for name, (low, high) in ends.items() if not np.isfinite(high) or high > 2 * max(low, 1e-9)
    }
    if loose:
        text = f"These runs do not pin down {_join(list(loose))}: losses far outside them cannot be predicted."
        yield Finding("loose_parameters", text, loose)


def _trends(fit: Fit) -> Iterator[Finding]:
    if trends := bent(fit):
        what = f"Residuals are trends in N, not noise, for {_join(trends)}"
        text = f"{what}: intervals take the law as true and overstate certainty."
        yield Finding("trends", text, {"schemes": trends})


def _span(points: Points) -> Iterator[Finding]:
    """How far the runs reach, and whether any was repeated."""
    sizes = float(points.sizes[-1] / points.sizes[0])
    tokens = None if np.isnan(points.D).any() else float(points.D.max() / points.D.min())
    also = "" if tokens is None else f", tokens {tokens:.3g}"
    text = f"Sizes span a factor of {sizes:.3g}{also}; beyond that every number is an extrapolation."
    yield Finding("extrapolation", text, {"params_non_embedding": sizes, "tokens": tokens})
    if len(np.unique(points.cell)) == len(points):
        text = "No cell was repeated with another seed, so the noise of a single run is not measured."
        yield Finding("no_repeats", text)


# ---------------------------------------------------------------------------------------------------- numbers


def details(
    fit: Fit, choice: Choice | None = None, boots: Mapping[str, Bootstrap] | None = None, others: Iterable[Fit] = ()
) -> dict[str, Any]:
    """The numbers behind a fit, for JSON: residual trends, lack of fit, drivers of parameters, bootstrap, laws, transitions.

    The arguments are those of `make_document`.
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
        "isoflop": _isoflop_records(fit),
        "eff_per_bit": {label: list(ends) for label, ends in per_bit_spans(fit).items()},
        "best_per_bit": None,
    }
    square = [s.label for s in fit.points.schemes if s.w_grid_bits == s.a_grid_bits and s.rotated]
    if boots and fit.eff and fit.law.name in boots and len(square) > 1 and fit.status not in UNTRUSTED:
        out["best_per_bit"] = best_per_bit(boots[fit.law.name], square)
    return out


TRANSITION_SIZES = (0.8e9, 3.2e9, 7e9, 70e9)  # the sizes for which QuEST's question is usually asked


def _transitions(fits: tuple[Fit, ...], boots: Mapping[str, Bootstrap]) -> list[dict[str, Any]]:
    """Transitions from 8 to 4 bits at equal memory and FLOP, by law; empty if one of the two has no runs."""
    rows = []
    for fit in fits:
        if not fit.law.uses_scheme or fit.status in UNTRUSTED:
            continue
        for size in TRANSITION_SIZES:
            try:
                answer = transition(fit, size, 8, 4, boots.get(fit.law.name))
            except PointError:
                return []
            ends = None if answer.interval is None else [_number(v) for v in answer.interval]
            rows.append(
                {
                    "law": fit.law.name,
                    "size": size,
                    "many": answer.many,
                    "few": answer.few,
                    "words": answer.words,
                    "tokens_per_param": _number(answer.ratio),
                    "interval": ends,
                }
            )
    return rows


def _number(ratio: float) -> float | str:
    return "never" if math.isinf(ratio) else ratio
