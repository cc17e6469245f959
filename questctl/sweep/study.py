"""Studies: search the learning rate of every scheme, train all cells, compare the schemes seed by seed, and judge the claims.

    study file ──→ search: each scheme at a few learning rates, at one small size ──→ cells, each at its scheme's own rate
               ──→ records of all runs ──→ analysis/compare.py: table, paired differences ──→ analysis/claims.py: verdicts

`run_study` does all of it, and `estimate_study` says what it would cost. As in a sweep, runs are the only state: a finished run
is not trained again, and the results of the search are read from its runs, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from ..analysis.claims import Judgement
from ..analysis.compare import Comparison, Row, StudyRun
from ..errors import SweepFailed
from ..metrics import GRAD_NORM, STEP, TIME
from ..store import Run, RunStore
from .launchers.options import LauncherOptions
from .lr_search import best, extension
from .manifest import DataProgress, Sweep
from .outcomes import Outcome, Watch, read_outcomes
from .run import SweepEstimate, estimate_sweep, run_sweep
from .study_file import LR, Study, find_study, load_study
from .sweep_file import Cell, SweepFile

Losses = dict[str, dict[float, float]]  # scheme → learning rate → loss, infinite where the run diverged
SOFTWARE = ("questctl", "torch", "python", "platform", "cpu", "cores", "gpu", "commit")  # keys of a run's attempts


def run_study(
    study: Study | str | Path,
    *,
    runs: str | Path | None = None,
    sets: Sequence[str] = (),
    scale: str = "laptop",
    jobs: int = 0,
    retry: str | None = None,
    watch: Callable[[Sweep], Watch] | None = None,
    data_progress: DataProgress | None = None,
) -> StudyResult:
    """Train what a study compares and is not trained yet, on this machine, and judge its claims.

    `study` is a sweep file with a section [study], the name of a built-in study, or a loaded `Study`. `runs`, `sets`, `retry`
    and `data_progress` are those of `run_sweep`; `scale` is "laptop" or "full" (the paper's sizes); `jobs` is the number of
    runs at a time (0: as many as suit the machine). A study trains several sweeps. `watch` is called at the beginning of each
    and returns a function, which is called with the outcomes of that sweep's cells.

    A cell that fails does not end the study: see `StudyResult.failed`. Raises SweepFailed if a run of the search failed, and
    what `load_study` and `run_sweep` raise.
    """
    study, store = _loaded(study, sets, scale), RunStore(runs)

    def train(file: SweepFile) -> list[Outcome]:
        sweep = Sweep(file, store)
        return run_sweep(
            sweep,
            launcher=LauncherOptions(jobs=jobs),
            retry=retry,
            record=False,
            watch=watch(sweep) if watch else None,
            data_progress=data_progress,
        )

    rates, losses, _ = find_rates(study, train)
    outcomes = train(replace(study.sweep_file, cells=cells_at(study, rates)))
    return StudyResult(study, store, rates, losses, tuple(outcomes))


@dataclass(frozen=True)
class StudyResult:
    """What a study found: learning rates, the compared runs, and the judgement of each claim.

    Attributes:
        rates: Scheme → the learning rate that its runs were trained with.
        losses: Scheme → learning rate → loss of the search, infinite where the run diverged.
        outcomes: The outcome of each cell that is compared.
    """

    study: Study
    store: RunStore
    rates: Mapping[str, float]
    losses: Losses
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> list[Outcome]:
        """The cells that failed."""
        return [outcome for outcome in self.outcomes if outcome.state == "failed"]

    @cached_property
    def comparison(self) -> Comparison:
        """The runs of the study and of its search. Raises DataError if a run is damaged."""
        return comparison(self.study, self.store, self.rates, self.losses)

    @cached_property
    def rows(self) -> list[Row]:
        """The table: a row for each scheme, size and learning rate."""
        return self.comparison.rows()

    @cached_property
    def judgements(self) -> list[Judgement]:
        """What the runs say about each claim."""
        return [claim.judge(self.comparison) for claim in self.study.claims]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """When, with which versions and on which machines the runs were trained, and how long it took."""
        return provenance([self.store.run(r.run) for r in self.comparison.runs])

    def to_dict(self) -> dict[str, Any]:
        """The document that study.json holds."""
        return {
            "study": self.study.sweep_file.name,
            "description": self.study.sweep_file.description,
            "scale": self.study.scale,
            "about": self.provenance,
            "rows": [row.to_dict() for row in self.rows],
            "findings": [judgement.to_dict() for judgement in self.judgements],
            "search": [
                {"scheme": name, "lr": self.rates.get(name), "losses": [{"lr": lr, "loss": x} for lr, x in losses.items()]}
                for name, losses in self.losses.items()
            ],
            "runs": [vars(r) for r in self.comparison.runs],
        }

    def write(self, folder: str | Path) -> None:
        """Write table.csv, study.json, README.md and the figure to `folder`. Raises StorageError."""
        from .study_folder import write_study

        write_study(Path(folder), self.to_dict(), self.comparison, self.judgements)


@dataclass(frozen=True)
class StudyEstimate:
    """What a study would take: an estimate of its search and cells, and the schemes whose learning rate is not known yet."""

    sweep: SweepEstimate
    unsearched: tuple[str, ...]
    extensions: int  # runs that the search may add for each of these schemes


def estimate_study(
    study: Study | str | Path,
    *,
    runs: str | Path | None = None,
    sets: Sequence[str] = (),
    scale: str = "laptop",
    jobs: int = 0,
    retry: str | None = None,
) -> StudyEstimate:
    """What `run_study` with these arguments would take; nothing is written or trained.

    Learning rates are read from the runs of the search as far as these are done. The cells of the other schemes are costed at
    the middle of the grid.
    """
    study, store = _loaded(study, sets, scale), RunStore(runs)
    rates, _, trials = find_rates(study, lambda file: read_outcomes(file.cells, store))
    cells = {cell.run_id: cell for cell in (*trials, *cells_at(study, rates))}
    sweep = Sweep(replace(study.sweep_file, cells=tuple(cells.values())), store)
    estimate = estimate_sweep(sweep, launcher=LauncherOptions(jobs=jobs), retry=retry, record=False)
    extensions = study.spec.search.extensions if study.spec.search is not None else 0
    return StudyEstimate(estimate, tuple(name for name in study.search if name not in rates), extensions)


def _loaded(study: Study | str | Path, sets: Sequence[str], scale: str) -> Study:
    return study if isinstance(study, Study) else load_study(find_study(study), sets, scale)


def find_rates(study: Study, train: Callable[[SweepFile], Sequence[Outcome]]) -> tuple[dict[str, float], Losses, list[Cell]]:
    """Each scheme's learning rate by the rule of lr_search.py, the losses that it rests on, and the cells of the search.

    `train` trains the cells of a sweep file and returns their outcomes. It may leave cells pending (a dry run): a scheme with
    a pending run gets no rate. Raises SweepFailed if a run failed.
    """
    rates: dict[str, float] = {}
    losses: Losses = {name: {} for name in study.search}
    all_trials: list[Cell] = []
    if study.spec.search is None:
        return rates, losses, all_trials
    grid = {name: study.spec.search.grid(cell.config) for name, cell in study.search.items()}
    for _ in range(1 + study.spec.search.extensions):
        trials = [(name, lr, at_rate(study.search[name], lr)) for name, values in grid.items() for lr in values]
        cells = tuple(cell for *_, cell in trials)
        all_trials += cells
        outcomes = train(replace(study.sweep_file, name=f"{study.sweep_file.name} search", cells=cells))
        pending = set()
        for (name, lr, _), outcome in zip(trials, outcomes, strict=True):
            if outcome.state == "failed":
                raise SweepFailed(f"{outcome.run_id}: failed: {outcome.message} --retry failed tries again.")
            if outcome.state in ("diverged", "done"):
                losses[name][lr] = math.inf if outcome.loss is None else outcome.loss
            else:
                pending.add(name)
        rates |= {name: best(losses[name]) for name in grid if name not in pending}
        for name in pending:
            rates.pop(name, None)
        grid = {name: [more] for name in grid if name in rates and (more := extension(losses[name])) is not None}
        if not grid:
            break
    return rates, losses, all_trials


def at_rate(cell: Cell, lr: float) -> Cell:
    """The cell at another learning rate."""
    optim = cell.config.optim.model_copy(update={"lr": lr})
    return Cell(cell.config.model_copy(update={"optim": optim}), {**cell.values, LR: lr})


def cells_at(study: Study, rates: Mapping[str, float]) -> tuple[Cell, ...]:
    """The cells of the sweep file, at their scheme's learning rate unless they set their own; duplicates are dropped.

    A rate that is not known yet (in a dry run) is replaced by the middle of the grid.
    """
    cells: dict[str, Cell] = {}
    for cell in study.sweep_file.cells:
        placed = cell
        if study.spec.search is not None and LR not in cell.values:
            grid = study.spec.search.grid(cell.config)
            placed = at_rate(cell, rates.get(study.name_of(cell.config), grid[len(grid) // 2]))
        cells.setdefault(placed.run_id, placed)
    return tuple(cells.values())


def comparison(study: Study, store: RunStore, rates: Mapping[str, float], losses: Losses) -> Comparison:
    """The runs of the study and of its search, ready to be tabulated. Raises DataError if a run is damaged."""
    trials = [at_rate(study.search[name], lr) for name, tried in losses.items() for lr in tried]
    runs = [_study_run(study, cell, store.run(cell.run_id), "search") for cell in trials]
    fixed = {cell.run_id for cell in study.sweep_file.cells if study.spec.search is not None and LR in cell.values}
    for cell in cells_at(study, rates):
        role = "fixed" if cell.run_id in fixed else "main"
        runs.append(_study_run(study, cell, store.run(cell.run_id), role))
    return Comparison(tuple(runs), study.spec.reference, study.spec.control)


def provenance(runs: Sequence[Run]) -> dict[str, Any]:
    """When, with which versions and on which machines runs were trained, and how long it took."""
    existing = [run for run in {run.name: run for run in runs}.values() if run.exists()]
    attempts = [(run, attempt) for run in existing for attempt in run.env().get("attempts", [])]
    wall, summed = training_time(existing)
    dates = sorted(attempt["started_at"][:10] for _, attempt in attempts if "started_at" in attempt)
    return {
        "runs": len(existing),
        "states": dict(Counter(run.state() for run in existing)),
        "first": dates[0] if dates else None,
        "last": dates[-1] if dates else None,
        "wall_seconds": wall,
        "run_seconds": summed,
        "threads": sorted({run.env().get("threads") or 0 for run, _ in attempts}),
        "data_hash": sorted({run.env()["data_hash"] for run, _ in attempts}),
        **{key: [v for v, _ in Counter(a.get(key) for _, a in attempts).most_common() if v is not None] for key in SOFTWARE},
    }


def training_time(runs: Sequence[Run]) -> tuple[float, float]:
    """(wall-clock seconds in which at least one run was trained, sum of the runs' own seconds), from timing.jsonl.

    The interval of a line reaches back to the line before it, or to the start of its attempt; steps that a kill undid are not
    included. Neither number is processor time, because concurrent runs and other programs share the processors.
    """
    spans = []
    for run in runs:
        marks = [_seconds(attempt["started_at"]) for attempt in run.env().get("attempts", [])]
        for line in run.timing():
            end = _seconds(line[TIME])
            start = max((m for m in marks if m < end), default=end)
            marks.append(end)
            spans.append((start, end))
    covered, last = 0.0, -math.inf
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered, sum(end - start for start, end in spans)


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def _study_run(study: Study, cell: Cell, run: Run, role: str) -> StudyRun:
    config, result = cell.config, run.result()
    m = config.model
    weights = m.linear_weights
    rest = m.params_non_embedding - weights  # stored in 16 bits, as models.llama.model_bits counts
    steady = (line for line in run.metrics() if line[STEP] > config.warmup_steps)
    norms = [line[GRAD_NORM] for line in steady if line.get(GRAD_NORM) is not None]
    return StudyRun(
        run=config.run_id,
        scheme=study.name_of(config),
        params_non_embedding=m.params_non_embedding,
        tokens=config.tokens,
        seed=config.train.seed,
        lr=config.optim.lr,
        role=role,
        state=run.state() if run.exists() else "pending",
        loss=result.loss if result else None,
        grad_norm=median(norms) if norms else None,
        w_stored_bits=(result.model_bits - 16 * rest) / weights if result else None,
        a_stored_bits=result.a_stored_bits if result else None,
        weights=str(config.quant.weights),
        activations=str(config.quant.activations),
    )
