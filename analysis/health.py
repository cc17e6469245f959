"""The health of a run from its metric lines: loss spikes, growing gradients, dead masks, clamped operands.

Each is defined only here; `runs health` shows them run by run, the report scheme by scheme.

    spike        LOSS_SPIKE of a metric line is at least SPIKE: the largest loss of a window over the level of those before
    jump         GRAD_NORM_GROWTH of a line is at least GROWTH: the gradient norm of a window to the level before
    drift        the gradient norm of the last line is at least GROWTH times the smallest of all lines
    dead mask    less than TRUST of an operand's entries receive gradient
    clamped      more than SATURATION of an operand's entries are clamped to the outermost level

The thresholds are judgements; the comment at each says on what it is based.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics import GRAD_NORM, GRAD_NORM_GROWTH, LOSS_SPIKE, OPERANDS, STEP, saturation, trust

# nats/token, a factor of 1.65 in perplexity. Losses scatter most with small batches: windows of sound runs of the laptop sizes
# (2,048 tokens a batch) reach 0.46 on a hard batch. A batch of the published recipe has a hundred times as many tokens.
SPIKE = 0.5
GROWTH = 4.0  # ratio; sound runs of the laptop sizes stay below 1.8
TRUST = 0.5  # fraction; int1-…-trust passes 89 % of normal values, int4 99 %
# fraction; ternary-absmean clamps 23 % of normal values, int1-rms 11 %, int4-rms 1 %. Learned scales of sound 2-bit runs clamp
# up to 48 % of an input; scales that are too small for a grown input clamp 70 to 90 %.
SATURATION = 0.5

LEGEND = (
    f"spike: largest rise of the loss above its level, in nats/token (reported from {SPIKE:g}); jump: largest gradient norm "
    f"over its level (from {GROWTH:g}); drift: last gradient norm over the smallest (from {GROWTH:g}); trust: least share of "
    f"an operand's entries that receive gradient (below {TRUST:g}); clamped: largest share of them at the outermost level "
    f"(above {SATURATION:g})"
)


@dataclass(frozen=True)
class Extreme:
    """A number, the step of its metric line, and for a mask the operand that it belongs to."""

    value: float
    step: int
    where: str = ""


@dataclass(frozen=True)
class Health:
    """The worst values in the metric lines of one run; None for values that were not logged."""

    run: str
    state: str
    step: int
    spikes: int  # lines with a spike
    spike: Extreme | None  # nats/token
    growth: Extreme | None  # ratio, sudden: a window to the level before
    drift: Extreme | None  # ratio, slow: the last window to the smallest
    trust: Extreme | None  # smallest share of an operand that receives gradient, in the newest line that has masks
    saturation: Extreme | None  # largest clamped share, in the same line
    layers: dict[str, dict[str, float]]  # metric key (trust or saturation of an operand) → layer → share, of that line
    findings: tuple[str, ...]


def count_spikes(values: Iterable[float | None]) -> int:
    """How many of these values of LOSS_SPIKE (nats/token; None and NaN: not measured) are spikes."""
    return sum(value is not None and value >= SPIKE for value in values)


def diagnose(run: str, state: str, lines: Sequence[Mapping[str, Any]], message: str = "") -> Health:
    """The health of a run from its metric lines, oldest first; `message` is its last message if it diverged or failed."""

    def largest(key: str) -> Extreme | None:
        return max((Extreme(m[key], m[STEP]) for m in lines if key in m), key=lambda e: e.value, default=None)

    spike, growth = largest(LOSS_SPIKE), largest(GRAD_NORM_GROWTH)
    norms = [m[GRAD_NORM] for m in lines if m.get(GRAD_NORM)]
    drift = Extreme(norms[-1] / min(norms), lines[-1][STEP]) if norms else None
    newest = next((m for m in reversed(lines) if any(isinstance(v, Mapping) for v in m.values())), {STEP: 0})
    layers = {key: dict(value) for key, value in newest.items() if isinstance(value, Mapping)}

    trusted, clamped = _shares(newest, trust), _shares(newest, saturation)
    least = min(trusted, key=lambda e: e.value, default=None)
    most = max(clamped, key=lambda e: e.value, default=None)
    spikes = count_spikes(m.get(LOSS_SPIKE) for m in lines)
    findings = [message] if message and state in ("diverged", "failed") else []
    if spike and spikes:
        findings.append(f"loss spiked {spikes}×, worst by {spike.value:.2f} nats/token before step {spike.step}")
    if growth and growth.value >= GROWTH:
        findings.append(f"gradient norm jumped {growth.value:.1f}× before step {growth.step}")
    if drift and drift.value >= GROWTH:
        findings.append(f"gradient norm grew to {drift.value:.1f}× its smallest by step {drift.step}")
    findings += _operands(least, "receive gradient in", sum(e.value < TRUST for e in trusted))
    findings += clamped_operands(newest)
    step = lines[-1][STEP] if lines else 0
    return Health(run, state, step, spikes, spike, growth, drift, least, most, layers, tuple(findings))


def clamped_operands(line: Mapping[str, Any], operands: Sequence[str] = OPERANDS) -> list[str]:
    """A sentence on the operand with the most clamped entries in a metric line, if that is more than SATURATION."""
    clamped = _shares(line, saturation, operands)
    worst = max(clamped, key=lambda e: e.value, default=None)
    return _operands(worst, "are clamped in", sum(e.value > SATURATION for e in clamped))


def _shares(line: Mapping[str, Any], key_of: Callable[[str], str], operands: Sequence[str] = OPERANDS) -> list[Extreme]:
    """Each operand's share under the metric that `key_of` names, in one metric line."""
    return [
        Extreme(share, line[STEP], f"{layer} {operand}s")
        for operand in operands
        for layer, share in line.get(key_of(operand), {}).items()
    ]


def _operands(worst: Extreme | None, what: str, affected: int) -> list[str]:
    """A sentence on the worst of the operands beyond a threshold, if there is one."""
    if worst is None or not affected:
        return []
    others = f" (and in {affected - 1} more operands)" if affected > 1 else ""
    return [f"{worst.value:.0%} of the entries {what} {worst.where}{others}"]
