"""The demo: train the sweep file experiments/laptop.toml on this machine, fit law `quest`, and answer which bits pay.

result = questctl.run_demo();  print(*(finding.sentence for finding in result.findings))

The law is fitted to runs in full precision and with QuEST. Runs with a plain straight-through estimator are controls: they are
compared with QuEST's runs of the same bits and are not used for the law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .scaling.fit import FitResult, fit_points
from .scaling.sources import load_sources
from .sweep.launchers.options import LauncherOptions
from .sweep.manifest import DataProgress, Sweep, open_sweep
from .sweep.outcomes import Outcome
from .sweep.run import SweepEstimate, Watch, estimate_sweep, run_sweep

if TYPE_CHECKING:
    from .analysis.findings import Finding

SWEEP = "laptop"
CONTROL = "ste"  # the method of controls
SHOWN = (  # kinds of findings, the answer first; the frontier if nothing casts doubt on the intervals
    "best_per_bit",
    "rivals_per_bit",
    "eff_order",
    "held_out",
    "trends",
    "clustered_residuals",
    "controls",
    "frontier",
)
MOST = 5


@dataclass(frozen=True)
class DemoResult:
    """The outcome of each run, the fit, and its answer in at most five findings."""

    outcomes: tuple[Outcome, ...]
    fit: FitResult
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """What `questctl demo --json` prints: the fit document, with the answer."""
        return {**self.fit.document.to_json(), "answer": [finding.to_dict() for finding in self.findings]}


def open_demo(runs: str | Path | None = None, sets: Sequence[str] = ()) -> Sweep:
    """The demo's sweep; `sets` are `key=value` items that overrule every cell, such as train.seed=1."""
    return open_sweep(SWEEP, runs=runs, sets=sets)


def estimate_demo(runs: str | Path | None = None, sets: Sequence[str] = (), jobs: int = 0) -> SweepEstimate:
    """What the demo would take. Nothing is written."""
    return estimate_sweep(open_demo(runs, sets), launcher=LauncherOptions(jobs=jobs), record=False)


def run_demo(
    runs: str | Path | None = None,
    sets: Sequence[str] = (),
    jobs: int = 0,
    *,
    watch: Callable[[Sweep], Watch] | None = None,
    data_progress: DataProgress | None = None,
) -> DemoResult:
    """Train the runs of the demo that `runs` does not hold yet, `jobs` at a time (0: one per CPU), and fit the law.

    Raises what `run_sweep` raises, and DataError if too few runs finished.
    """
    sweep = open_demo(runs, sets)
    outcomes = run_sweep(
        sweep,
        launcher=LauncherOptions(jobs=jobs),
        record=False,
        watch=watch(sweep) if watch else None,
        data_progress=data_progress,
    )
    return DemoResult(tuple(outcomes), *fit_demo(sweep))


def fit_demo(sweep: Sweep) -> tuple[FitResult, tuple[Finding, ...]]:
    """The law fitted to the demo's finished runs, with its answer. Raises DataError if they are too few."""
    from .analysis.summary import controls, held_out_sizes

    cells, sources = sweep.file.cells, load_sources(sweep.store.root)
    named = {cell.run_id: str(cell.values.get("quant.method")) for cell in cells}
    everything = sources.only(list(named)).points
    fit = fit_points(
        sources.only([run for run, method in named.items() if method != CONTROL]).points,
        bootstrap=0,
        alternatives=False,
        held_out=True,
    )
    findings = [*fit.document.findings, *held_out_sizes(fit.choice), *controls(everything, CONTROL)]
    ranked = sorted((f for f in findings if f.kind in SHOWN), key=lambda f: SHOWN.index(f.kind))
    return fit, tuple(ranked[:MOST] or findings[:MOST])
