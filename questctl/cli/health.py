"""`questctl runs health [RUN…]`: spikes, growing gradients, dead masks and clamped operands, from the metric lines alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from .. import console, metrics
from ..errors import DataError
from ..store import Run, RunStore
from . import options as opt

# From where on a number is called a finding; a judgement, no law. Normal values at the optimal scale: see the comments.
SPIKE = 0.5  # nats/token above the level of the windows before
GROWTH = 4.0  # gradient norm of a window to the level before it, or at the end to its smallest
TRUST = 0.5  # int1-…-trust lets 89 % of normal values through, int4 99 %
SATURATION = 0.35  # ternary-absmean clamps 23 % of normal values, int1-rms 11 %, int4-rms 1 %


@dataclass(frozen=True)
class Extreme:
    """A number and where it was: the step of its line, and for a mask the operand."""

    value: float
    step: int
    where: str = ""


@dataclass(frozen=True)
class Health:
    """The worst that the metric lines of one run say; None where they do not say it."""

    run: str
    state: str
    step: int
    spikes: int  # lines with a spike of SPIKE or more
    spike: Extreme | None  # nats/token
    growth: Extreme | None  # ratio, sudden: a window to the level before
    drift: Extreme | None  # ratio, slow: the last window to the smallest
    trust: Extreme | None  # least share of an operand that receives gradient, at the newest look
    saturation: Extreme | None  # largest clamped share, at the newest look
    layers: dict[str, dict[str, float]]  # {metrics.trust("weight"): {"blocks.0.q": …}, …} of the newest look
    findings: tuple[str, ...]


def diagnose(run: str, state: str, lines: Sequence[dict[str, Any]], message: str = "") -> Health:
    """Health of a run from its metric lines, oldest first; `message` is what the run said when it ended badly."""

    def largest(key: str) -> Extreme | None:
        return max((Extreme(m[key], m[metrics.STEP]) for m in lines if key in m), key=lambda e: e.value, default=None)

    spike, growth = largest(metrics.LOSS_SPIKE), largest(metrics.GRAD_NORM_GROWTH)
    norms = [m[metrics.GRAD_NORM] for m in lines if m.get(metrics.GRAD_NORM)]
    drift = Extreme(norms[-1] / min(norms), lines[-1][metrics.STEP]) if norms else None
    look = next((m for m in reversed(lines) if any(isinstance(v, dict) for v in m.values())), {metrics.STEP: 0})
    layers = {key: value for key, value in look.items() if isinstance(value, dict)}

    def shares(key_of: Callable[[str], str]) -> list[Extreme]:
        measured = [(operand, layers.get(key_of(operand), {})) for operand in metrics.OPERANDS]
        return [
            Extreme(x, look[metrics.STEP], f"{name} {operand}s")
            for operand, by_layer in measured
            for name, x in by_layer.items()
        ]

    operands = {"trust": shares(metrics.trust), "saturation": shares(metrics.saturation)}
    trust = min(operands["trust"], key=lambda e: e.value, default=None)
    saturation = max(operands["saturation"], key=lambda e: e.value, default=None)
    spikes = sum(m.get(metrics.LOSS_SPIKE, 0.0) >= SPIKE for m in lines)
    findings = [message] if message and state in ("diverged", "failed") else []
    if spike and spikes:
        findings.append(f"loss spiked {spikes}×, worst by {spike.value:.2f} nats/token before step {spike.step}")
    if growth and growth.value >= GROWTH:
        findings.append(f"gradient norm jumped {growth.value:.1f}× before step {growth.step}")
    if drift and drift.value >= GROWTH:
        findings.append(f"gradient norm grew to {drift.value:.1f}× its smallest by step {drift.step}")
    dead = [e for e in operands["trust"] if e.value < TRUST]
    clamped = [e for e in operands["saturation"] if e.value > SATURATION]
    for found, word, worst in ((dead, "receive gradient in", trust), (clamped, "are clamped in", saturation)):
        if found and worst:
            others = f" (and in {len(found) - 1} more operands)" if len(found) > 1 else ""
            findings.append(f"{worst.value:.0%} of the entries {word} {worst.where}{others}")
    step = lines[-1][metrics.STEP] if lines else 0
    return Health(run, state, step, spikes, spike, growth, drift, trust, saturation, layers, tuple(findings))


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]…", show_default=False, help="Runs: their names, or unique ends of them; left out: all."),
    ] = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Show how runs fared: loss spikes, gradient growth, the operand whose mask lets least through, the one clamped most."""
    store = RunStore(runs)
    if not store.root.is_dir():
        raise DataError(f"{store.root}: there is no such folder of runs.")
    found = [store.find(name) for name in names] if names else store.runs()
    seen = [_of(run) for run in found]
    if as_json:
        console.print_json([asdict(health) for health in seen])
        return
    table = [
        (h.run, h.state, h.step, *(e and console.rough(e.value) for e in (h.spike, h.growth, h.drift, h.trust, h.saturation)))
        for h in seen
    ]
    console.print_table(("run", "state", "step", "spike", "jump", "drift", "trust", "clamped"), table, left=2)
    for health in seen:
        for finding in health.findings:
            console.say(f"{health.run}: {finding}")
    if not seen:
        console.note(f"no runs in {store.root}")
    elif not any(health.findings for health in seen):
        console.note("nothing to report")


def _of(run: Run) -> Health:
    try:
        return diagnose(run.name, run.state(), run.metrics(), run.status().message)
    except DataError as e:
        return diagnose(run.name, "failed", [], str(e))
