"""Study files: sweep files with a section [study], which says how schemes get their learning rates and what is claimed.

Keys of [study], beside the sections that sweep_file.py reads:

    reference    scheme → the schemes whose loss is compared with it, seed by seed
    control      the full-precision scheme
    names        scheme → what it is called in this study
    search       base (keys over those of every cell), lr (the grid, or law:FILE), extensions (how often it may grow);
                 cells that set optim.lr themselves keep it, and are extras beside the comparison
    claims       tables of analysis/claims.py, by their `kind`
    full         the same study at the paper's sizes: replace (text → text everywhere), and tables merged over base and search

A study trains every run that it compares; [stop] applies only to `questctl sweep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from ..analysis.claims import Claim, ClaimError, claim_of
from ..config import Layer, RunConfig, Section, broken, env_layer, flatten, read_toml, set_layer
from ..config.knob_laws import is_law, knob_by_law
from ..errors import UsageError, unknown
from .lr_search import FACTOR
from .sweep_file import BUILT_IN, Cell, SweepFile, expand_cells, parse_sweep_file

SCALES = ("laptop", "full")
LR = "optim.lr"


class SearchSpec(Section):
    """[study.search]."""

    base: dict[str, Any] = Field(description="keys over those of every cell: size, length and seed of the search")
    lr: list[float] | str = Field(description="the grid of learning rates, or law:FILE: three about that of a law of fit-knobs")
    extensions: int = Field(2, ge=0, description="how often the grid may grow beyond an edge")

    @field_validator("lr")
    @classmethod
    def _begins_somewhere(cls, lr: list[float] | str) -> list[float] | str:
        if not (is_law(lr) if isinstance(lr, str) else lr):
            raise ValueError("must be a list of learning rates, or law:FILE of questctl fit-knobs.")
        return lr

    def grid(self, config: RunConfig) -> list[float]:
        """The initial learning rates for this config; ascending if a law gives them."""
        if not isinstance(self.lr, str):
            return list(self.lr)
        N, D = float(config.model.params_non_embedding), float(config.tokens)
        middle = knob_by_law(("optim", "lr"), self.lr, N=N, D=D, scheme=config.scheme).value
        return [middle / FACTOR, middle, middle * FACTOR]


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
    """A study at one scale. `search` has the cell for the search of each scheme; it is empty if nothing is searched."""

    sweep_file: SweepFile
    spec: StudySpec
    claims: tuple[Claim, ...]
    search: Mapping[str, Cell]
    scale: str

    def name_of(self, config: RunConfig) -> str:
        """The name of a config's scheme in this study, with the share after which it is quantized: `quest-w2a2+s0.8`."""
        return self.spec.names.get(config.label, config.label)


def studies() -> dict[str, Path]:
    """The studies that come with questctl, by name."""
    files = {path.stem: path for path in BUILT_IN.glob("*.toml") if "study" in read_toml(path)}
    return files | {path.stem: path for path in sorted((BUILT_IN / "studies").glob("*.toml"))}


def find_study(name: str | Path) -> Path:
    """`name` as a path if it is a file, else the built-in study of that name. Raises UsageError if there is neither."""
    if str(name).endswith(".toml") and Path(name).exists():
        return Path(name)
    built_in = studies()
    if name not in built_in:
        raise UsageError(unknown("study", name, sorted(built_in), what="study"))
    return built_in[str(name)]


def load_study(path: Path, sets: Sequence[str] = (), scale: str = "laptop") -> Study:
    """Read a study; `sets` are `key=value` items that overrule it in every cell, those of the search included.

    Raises UsageError for what `load_sweep_file` refuses, a missing [study], an unknown key or claim, a scheme that the sweep
    file does not train, optim.lr in `sets` if it is searched, and a scale that the file does not describe.
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
    over = [env_layer(), set_layer(sets)]
    if spec.search is not None and any(("optim", "lr") in layer.values for layer in over):
        raise UsageError(f"optim.lr: {where} searches it; write other values under [study.search] in a copy of the sweep file.")
    try:
        claims = tuple(claim_of(table) for table in spec.claims)
    except ClaimError as e:
        raise UsageError(f"{where}: study.claims: {e}.") from e
    sweep_file = replace(parse_sweep_file(tree, path, sets), stop=None)  # [stop] would leave means over too few seeds
    study = Study(sweep_file, spec, claims, {}, scale)
    if spec.search is not None:
        base = flatten(spec.search.base, where=f"{where}: study.search.base")
        values = {".".join(key): value for key, value in base.items()}
        search: dict[str, Cell] = {}
        for cell in expand_cells(tree, where, [Layer("study.search.base", base), *over]):
            if LR not in cell.values:
                search.setdefault(study.name_of(cell.config), Cell(cell.config, {**cell.values, **values}))
        study = replace(study, search=search)
    _check_names(study, where)
    return study


def _spec(values: Any, where: str) -> StudySpec:
    try:
        return StudySpec.model_validate(values)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(("study", *(str(p) for p in first["loc"])))
        raise UsageError(f"{where}: {broken(key, first)}") from e


def _full(tree: Mapping[str, Any], full: FullSpec) -> dict[str, Any]:
    """The content of the sweep file at the paper's sizes."""

    def replaced(node: Any) -> Any:
        if isinstance(node, dict):
            return {replaced(k): replaced(v) for k, v in node.items()}
        if isinstance(node, list):
            return [replaced(v) for v in node]
        if isinstance(node, str):
            for old, new in full.replace.items():
                node = node.replace(old, new)
        return node

    study = {k: replaced(v) for k, v in tree["study"].items() if k != "full"}
    if "search" in study:
        study["search"] = _merged(study["search"], full.search)
    rest = {k: replaced(v) for k, v in tree.items() if k != "study"}
    return {**rest, "base": _merged(rest.get("base", {}), full.base), "study": study}


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` merged into `under`, table by table."""
    tables = {k: _merged(under[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(under.get(k), dict)}
    return {**under, **over, **tables}


def _check_names(study: Study, where: str) -> None:
    """Raises UsageError if the section names a scheme that the sweep file does not train, or gives two schemes one name."""
    labels = {cell.config.label for cell in study.sweep_file.cells}
    names = {study.name_of(cell.config) for cell in study.sweep_file.cells}
    if len(names) < len(labels):
        raise UsageError(f"{where}: study.names: two schemes have one name.")
    uses = [("names", name, labels) for name in study.spec.names]
    uses += [("reference", name, names) for ref, others in study.spec.reference.items() for name in (ref, *others)]
    uses += [("control", study.spec.control, names)] if study.spec.control else []
    uses += [("claims", name, names) for claim in study.claims for name in claim.schemes_named if "*" not in name]
    for key, name, choices in uses:
        if name not in choices:
            raise UsageError(unknown(f"{where}: study.{key}", name, sorted(choices), what="scheme"))
