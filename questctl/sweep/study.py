"""A study: a sweep file, how its schemes get their learning rates, and what is claimed of them.

    sweep file ──→ search: each scheme at a few learning rates, at one small size ──→ cells, each at its scheme's own rate
              ──→ records of all runs ──→ analysis/compare.py: table, differences paired by seed, claims

The sweep file's section [study], beside what sweep_file.py reads:

    reference    scheme → the schemes whose loss is compared with it, seed by seed
    control      the full-precision scheme
    names        scheme → what it is called in this study
    search       base (keys over those of every cell), lr (the grid), extensions (how often it may grow beyond an edge);
                 cells that say optim.lr themselves keep it, and are extras beside the comparison
    claims       tables of analysis/compare.py, by their `kind`
    full         the same study at the paper's sizes: replace (text → text everywhere), and tables merged over base and search

As in a sweep, runs are the only state: what is finished is not trained again, and the search, too, is read from its runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field, ValidationError

from ..analysis.compare import Claim, ClaimError, Comparison, Record, claim_of
from ..config import Layer, RunConfig, Section, broken, env_layer, flatten, read_toml, set_layer
from ..errors import SweepFailed, UsageError, unknown
from ..metrics import GRAD_NORM, STEP
from ..store import Run, RunStore
from .lr_search import best, extension
from .outcomes import Outcome
from .sweep_file import BUILT_IN, Cell, SweepFile, expand_cells, parse_sweep_file

SCALES = ("laptop", "full")
LR = "optim.lr"
Losses = dict[str, dict[float, float]]  # scheme → learning rate → loss, infinite where the run diverged


class SearchSpec(Section):
    """[study.search]."""

    base: dict[str, Any] = Field(description="keys over those of every cell: size, length and seed of the search")
    lr: list[float] = Field(min_length=1, description="the grid")
    extensions: int = Field(2, ge=0, description="how often the grid may grow beyond an edge")


class FullSpec(Section):
    """[study.full]."""

    replace: dict[str, str] = Field(default_factory=dict, description="text → text, everywhere in the sweep file")
    base: dict[str, Any] = Field(default_factory=dict, description="over [base]")
    search: dict[str, Any] = Field(default_factory=dict, description="over [study.search]")


class StudySpec(Section):
    """[study]."""

    reference: dict[str, list[str]] = Field(default_factory=dict, description="scheme → schemes that are compared with it")
    control: str = Field("", description="the full-precision scheme")
    names: dict[str, str] = Field(default_factory=dict, description="scheme → what it is called")
    search: SearchSpec | None = None
    claims: list[dict[str, Any]] = Field(default_factory=list)
    full: FullSpec | None = None


@dataclass(frozen=True)
class Study:
    """A study at one scale. `search` has the cell that each scheme is tried with, and is empty where nothing is searched."""

    sweep_file: SweepFile
    spec: StudySpec
    claims: tuple[Claim, ...]
    search: Mapping[str, Cell]
    scale: str

    def name_of(self, config: RunConfig) -> str:
        """What the scheme of a config is called here."""
        return self.spec.names.get(config.quant.label, config.quant.label)


def studies() -> dict[str, Path]:
    """The studies that come with questctl, by name."""
    files = {path.stem: path for path in BUILT_IN.glob("*.toml") if "study" in read_toml(path)}
    return files | {path.stem: path for path in sorted((BUILT_IN / "studies").glob("*.toml"))}


def find_study(name: str) -> Path:
    """A sweep file as it is, or the study of that name. Raises UsageError if there is neither."""
    if name.endswith(".toml") and Path(name).exists():
        return Path(name)
    known = studies()
    if name not in known:
        raise UsageError(unknown("study", name, sorted(known), what="study"))
    return known[name]


def load_study(path: Path, sets: Sequence[str] = (), scale: str = "laptop") -> Study:
    """Read a study; `sets` are `key=value` items that overrule it in every cell, of the search too.

    Raises UsageError for what `load_sweep_file` refuses, a missing [study], an unknown key or claim, a scheme that the sweep
    file does not train, optim.lr in `sets` where it is searched, and a scale that the file does not describe.
    """
    where, tree = path.name, read_toml(path)
    if "study" not in tree:
        raise UsageError(f"{where}: is a sweep file without a section [study]; questctl sweep trains it.")
    spec = _spec(tree["study"], where)
    if scale == "full":
        if spec.full is None:
            raise UsageError(f"{where}: --scale full: has no table [study.full].")
        tree = _full(tree, spec.full)
        spec = _spec(tree["study"], where)
    elif scale != "laptop":
        raise UsageError(unknown("--scale", scale, SCALES))
    searched = spec.search is not None
    over = [env_layer(), set_layer(sets)]
    if searched and any(("optim", "lr") in layer.values for layer in over):
        raise UsageError(f"optim.lr: {where} searches it; write other values under [study.search] in a copy of the sweep file.")
    try:
        claims = tuple(claim_of(table) for table in spec.claims)
    except ClaimError as e:
        raise UsageError(f"{where}: study.claims: {e}.") from e
    study = Study(parse_sweep_file(tree, path, sets), spec, claims, {}, scale)
    if spec.search is not None:
        base = flatten(spec.search.base, where=f"{where}: study.search.base")
        said = {".".join(key): value for key, value in base.items()}
        tried: dict[str, Cell] = {}
        for cell in expand_cells(tree, where, [Layer("study.search.base", base), *over]):
            if LR not in cell.values:
                tried.setdefault(study.name_of(cell.config), Cell(cell.config, {**cell.values, **said}))
        study = replace(study, search=tried)
    _check_names(study, where)
    return study


def find_rates(study: Study, run: Callable[[SweepFile], Sequence[Outcome]]) -> tuple[dict[str, float], Losses, list[Cell]]:
    """Each scheme's learning rate by the rule of search.py, all losses that it rests on, and the cells that were asked for.

    `run` trains the cells of a sweep file and says what became of each; it may also leave them pending (a dry run): a
    scheme with a pending run gets no rate. Raises SweepFailed if a run failed.
    """
    rates: dict[str, float] = {}
    losses: Losses = {name: {} for name in study.search}
    asked: list[Cell] = []
    if study.spec.search is None:
        return rates, losses, asked
    grid = {name: list(study.spec.search.lr) for name in study.search}
    for _ in range(1 + study.spec.search.extensions):
        trials = [(name, lr, at_rate(study.search[name], lr)) for name, values in grid.items() for lr in values]
        cells = tuple(cell for *_, cell in trials)
        asked += cells
        outcomes = run(replace(study.sweep_file, name=f"{study.sweep_file.name} search", cells=cells))
        unknown_yet = set()
        for (name, lr, _), seen in zip(trials, outcomes, strict=True):
            if seen.state == "failed":
                raise SweepFailed(f"{seen.run_id}: failed: {seen.message} --retry failed tries again.")
            if seen.state in ("diverged", "done"):
                losses[name][lr] = math.inf if seen.loss is None else seen.loss
            else:
                unknown_yet.add(name)
        rates |= {name: best(losses[name]) for name in grid if name not in unknown_yet}
        for name in unknown_yet:
            rates.pop(name, None)
        grid = {name: [more] for name in grid if name in rates and (more := extension(losses[name])) is not None}
        if not grid:
            break
    return rates, losses, asked


def at_rate(cell: Cell, lr: float) -> Cell:
    """The cell at another learning rate."""
    optim = cell.config.optim.model_copy(update={"lr": lr})
    return Cell(cell.config.model_copy(update={"optim": optim}), {**cell.values, LR: lr})


def cells_at(study: Study, rates: Mapping[str, float]) -> tuple[Cell, ...]:
    """The sweep file's cells, those without a learning rate of their own at their scheme's; each experiment once.

    Where the rate is not known yet (a dry run) the middle of the grid stands for it.
    """
    cells: dict[str, Cell] = {}
    for cell in study.sweep_file.cells:
        there = cell
        if study.spec.search is not None and LR not in cell.values:
            grid = study.spec.search.lr
            there = at_rate(cell, rates.get(study.name_of(cell.config), grid[len(grid) // 2]))
        cells.setdefault(there.run_id, there)
    return tuple(cells.values())


def comparison(study: Study, store: RunStore, rates: Mapping[str, float], losses: Losses) -> Comparison:
    """The records of the study's runs, of the search too, ready to be tabulated. Raises DataError if a run is damaged."""
    trials = [at_rate(study.search[name], lr) for name, tried in losses.items() for lr in tried]
    records = [_record(study, cell, store.run(cell.run_id), "search") for cell in trials]
    extra = {cell.run_id for cell in study.sweep_file.cells if study.spec.search is not None and LR in cell.values}
    for cell in cells_at(study, rates):
        role = "fixed" if cell.run_id in extra else "main"
        records.append(_record(study, cell, store.run(cell.run_id), role))
    return Comparison(tuple(records), study.spec.reference, study.spec.control)


def training_time(runs: Sequence[Run]) -> tuple[float, float]:
    """(seconds by the clock in which at least one run was trained, sum of the runs' own seconds), from timing.jsonl.

    A line's interval reaches back to the line before it, or to the start of its attempt; what a kill undid is not in it. What
    the processors did for it is in neither: runs beside each other and other programs share them.
    """
    spans = []
    for run in runs:
        marks = [_seconds(attempt["started_at"]) for attempt in run.env().get("attempts", [])]
        for line in run.timing():
            end = _seconds(line["time"])
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


def _record(study: Study, cell: Cell, run: Run, role: str) -> Record:
    config, result = cell.config, run.result()
    m = config.model
    weights = m.linear_weights
    rest = m.params_non_embedding - weights  # stored in 16 bits, as models.llama.model_bits counts
    steady = (line for line in run.metrics() if line[STEP] > config.warmup_steps)
    norms = [line[GRAD_NORM] for line in steady if line.get(GRAD_NORM) is not None]
    return Record(
        config.run_id,
        study.name_of(config),
        m.params_non_embedding,
        config.tokens,
        config.train.seed,
        config.optim.lr,
        role,
        run.state() if run.exists() else "pending",
        result.loss if result else None,
        median(norms) if norms else None,
        (result.model_bits - 16 * rest) / weights if result else None,
        result.a_stored_bits if result else None,
        str(config.quant.weights),
        str(config.quant.activations),
    )


def _spec(values: Any, where: str) -> StudySpec:
    try:
        return StudySpec.model_validate(values)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(("study", *(str(p) for p in first["loc"])))
        raise UsageError(f"{where}: {broken(key, first)}") from e


def _full(tree: Mapping[str, Any], full: FullSpec) -> dict[str, Any]:
    """The sweep file at the paper's sizes."""

    def said(node: Any) -> Any:
        if isinstance(node, dict):
            return {_replaced(k): said(v) for k, v in node.items()}
        if isinstance(node, list):
            return [said(v) for v in node]
        return _replaced(node) if isinstance(node, str) else node

    def _replaced(text: str) -> str:
        for old, new in full.replace.items():
            text = text.replace(old, new)
        return text

    study = {k: said(v) for k, v in tree["study"].items() if k != "full"}
    if "search" in study:
        study["search"] = _merged(study["search"], full.search)
    rest = {k: said(v) for k, v in tree.items() if k != "study"}
    return {**rest, "base": _merged(rest.get("base", {}), full.base), "study": study}


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    tables = {k: _merged(under[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(under.get(k), dict)}
    return {**under, **over, **tables}


def _check_names(study: Study, where: str) -> None:
    """Every scheme that the section speaks of is one of the sweep file's."""
    labels = {cell.config.quant.label for cell in study.sweep_file.cells}
    names = {study.name_of(cell.config) for cell in study.sweep_file.cells}
    if len(names) < len(labels):
        raise UsageError(f"{where}: study.names: two schemes have one name.")
    said = [("names", name, labels) for name in study.spec.names]
    said += [("reference", name, names) for ref, others in study.spec.reference.items() for name in (ref, *others)]
    said += [("control", study.spec.control, names)] if study.spec.control else []
    said += [("claims", name, names) for claim in study.claims for name in claim.schemes_named if "*" not in name]
    for key, name, known in said:
        if name not in known:
            raise UsageError(unknown(f"{where}: study.{key}", name, sorted(known), what="scheme"))
