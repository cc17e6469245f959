"""Sweep files: one TOML file that describes many runs, as a grid of config values.

    [base]         keys that all cells share
    [matrix]       axes: one cell for each combination
    [[exclude]]    combinations of the matrix to leave out: those that match every key of the table
    [[include]]    further cells beside the matrix
    [study]        how a study compares the cells (study_file.py); a sweep ignores it
    [trunk]        cells share their first steps (training/branch.py): share = "lengths" (those that differ only in length,
                   until they cool down), "precision" (until quant.start, with the cell in full precision), or "both";
                   cooldown = 0.2 of each length, warmup = 100 steps or = 0.05 of the longest length
    [stop]         when a cell that cannot win ends early (stopping.py): after = 0.4 of its steps, margin, level, against
    [resources]    how many processes train a cell, on how many GPUs and nodes, by its size (resource_rules.py)
    [launcher.X]   options of the launcher X (local, slurm, ray); options on the command line take precedence

Keys are those of a config file, including the shorthands (`preset`, `quant.method`, `train.tokens_per_param`, …). A list in
place of a value gives one cell for each of its entries. An axis may also have a name of its own; its entries are then tables of
keys that belong together, and may contain lists themselves:

    scheme = [{ quant.method = "bf16" }, { quant.method = "quest", quant.bits = [4, 2, 1] }]

A sweep is identified by its run ids alone, so a sweep file can be edited between two calls, and two sweep files that share a
cell share its run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import Layer, OptimConfig, RunConfig, env_layer, flat_items, flatten, known_keys, read_toml, resolve, set_layer
from ..config.layers import ALL_KEYS
from ..errors import UsageError, unknown
from ..quant.layer_specs import check_layers
from ..system import package_folder
from ..training.branch import COOLDOWN, share_full_precision, share_trunks
from .resource_rules import ResourceRule, Resources, parse_resources
from .stop_rule import StopRule, parse_rule

Values = dict[tuple[str, ...], Any]
SEED = ("train", "seed")

SHARES = ("lengths", "precision", "both")  # values of `share` in [trunk]
_SECTIONS = ("name", "description", "base", "matrix", "include", "exclude", "trunk", "stop", "resources", "study", "launcher")
BUILT_IN = package_folder("experiments")
LAUNCHERS = ("local", "slurm", "ray")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep file: its config, and the values that the file varies (dotted key → value) for tables and messages.

    `resources` is None, which means one process, until they are settled for the devices at hand (resources.py).
    """

    config: RunConfig
    values: Mapping[str, Any]
    resources: Resources | None = None
    like: Cell | None = field(default=None, repr=False, compare=False)  # a cell that differs only in its seed

    @property
    def nproc(self) -> int:
        """The processes that train it."""
        return self.resources.nproc if self.resources else 1

    @property
    def nodes(self) -> int:
        """The nodes that they run on."""
        return self.resources.nodes if self.resources else 1

    @cached_property
    def run_id(self) -> str:
        """Name of the run's folder."""
        return self.first._run_id_by_seed(self.config.train.seed)

    @cached_property
    def _run_id_by_seed(self) -> Callable[[int], str]:
        return self.config.run_id_by_seed()

    @property
    def first(self) -> Cell:
        """The cell that represents all cells that differ only in their seeds: they cost the same."""
        return self.like or self

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.values.items()) or "the base alone"


@dataclass(frozen=True)
class SweepFile:
    """The content of a sweep file: its cells in order, all with different run ids, the options of launchers, and its rules."""

    name: str
    description: str
    cells: tuple[Cell, ...]
    launchers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stop: StopRule | None = None
    resources: tuple[ResourceRule, ...] = ()


def find_sweep_file(name: str | Path) -> Path:
    """The path of a sweep file, or of the built-in one of that name. Raises UsageError if there is neither."""
    if Path(name).exists():
        return Path(name)
    if (BUILT_IN / f"{name}.toml").exists():
        return BUILT_IN / f"{name}.toml"
    names = sorted(p.stem for p in BUILT_IN.glob("*.toml"))
    raise UsageError(
        f"{name}: there is no such sweep file" + (f"; built-in sweep files: {', '.join(names)}." if names else ".")
    )


def load_sweep_file(path: Path, sets: Sequence[str] = ()) -> SweepFile:
    """Read a sweep file; `sets` are `key=value` items that overrule it in every cell.

    Raises UsageError if the file is missing or not TOML, a key is unknown, a value is out of range, a spec misfits a layer,
    an axis is empty or not a list, an exclude matches nothing, there are no cells, or two cells are the same experiment.
    """
    return parse_sweep_file(read_toml(path), path, sets)


def parse_sweep_file(tree: Mapping[str, Any], path: Path, sets: Sequence[str] = ()) -> SweepFile:
    """As `load_sweep_file`, for the content `tree` of the file at `path`."""
    where = path.name
    for section in tree:
        if section not in _SECTIONS and section in {key[0] for key in known_keys()}:
            raise UsageError(f"{where}: is no sweep file but a config; questctl train --config {path} trains it.")
        if section not in _SECTIONS:
            raise UsageError(unknown(where, section, _SECTIONS, what="section"))
    name, description = tree.get("name", path.stem), tree.get("description", "")
    for key, text in (("name", name), ("description", description)):
        if not isinstance(text, str):
            raise UsageError(f"{where}: {key}: {text!r} is not a string.")
    cells = tuple(expand_cells(tree, where, [env_layer(), set_layer(sets)]))
    first: dict[str, tuple[int, Cell]] = {}
    for i, cell in enumerate(cells, 1):
        j, twin = first.setdefault(cell.run_id, (i, cell))
        if i != j:
            raise UsageError(f"{where}: cell {j} ({twin}) and cell {i} ({cell}) are one experiment, {cell.run_id}.")
    launchers = _table(tree.get("launcher", {}), f"{where}: launcher")
    for launcher, table in launchers.items():
        if launcher not in LAUNCHERS:
            raise UsageError(unknown(f"{where}: launcher", launcher, LAUNCHERS, what="launcher"))
        _table(table, f"{where}: launcher.{launcher}")
    stop = parse_rule(_table(tree["stop"], f"{where}: stop") if "stop" in tree else None, where)
    return SweepFile(name, description, cells, launchers, stop, parse_resources(tree.get("resources"), where))


def expand_cells(tree: Mapping[str, Any], where: str, over: Sequence[Layer]) -> list[Cell]:
    """Every cell of a sweep file's content, in order, with the layers `over` above its values; there may be duplicates."""
    base = _one(_table(tree.get("base", {}), f"{where}: base"), f"{where}: base")
    varied = _matrix(tree, where)
    for i, table in enumerate(_tables(tree, "exclude", where), 1):
        here = f"{where}: exclude {i}"
        rule = flatten(_unquoted(_table(table, here), here), where=here)
        kept = [v for v in varied if not _matches(base | v, rule)]
        if not rule or len(kept) == len(varied):
            raise UsageError(f"{here}: no cell of the matrix has {_in_words(rule) or 'no keys at all'}.")
        varied = kept
    for i, table in enumerate(_tables(tree, "include", where), 1):
        varied += _combinations(_table(table, f"{where}: include {i}"), f"{where}: include {i}")
    if not varied:
        raise UsageError(f"{where}: has no cells; give a [matrix] of lists, or [[include]].")
    cells: list[Cell] = []
    alike: dict[str, Cell] = {}  # by the values without the seed, on which no other value depends
    for values in varied:
        seed, key = values.get(SEED), repr({k: v for k, v in values.items() if k != SEED})
        plain = type(seed) is int and 0 <= seed < 2**32 and not any(SEED in layer.values for layer in over)
        like = alike.get(key) if plain else None
        cells.append(_with_seed(like, seed, values) if like else _cell(base, values, over, where))
        if SEED in values:
            alike.setdefault(key, cells[-1])
    return _with_trunks(cells, _table(tree["trunk"], f"{where}: trunk"), where) if "trunk" in tree else cells


def _with_seed(cell: Cell, seed: Any, values: Values) -> Cell:
    """A cell with another seed."""
    train = cell.config.train.model_copy(update={"seed": seed})
    return Cell(cell.config.model_copy(update={"train": train}), _dotted(values), like=cell)


def _dotted(values: Values) -> dict[str, Any]:
    return {".".join(k): v for k, v in values.items()}


def _cell(base: Values, values: Values, over: Sequence[Layer], where: str) -> Cell:
    try:
        config = resolve([Layer(f"base of {where}", base), Layer(where, values), *over]).config
        check_layers(config.model, config.quant)
    except UsageError as e:
        raise UsageError(f"{where}: cell {_in_words(values)}: {e}" if values else f"{where}: {e}") from e
    return Cell(config, _dotted(values))


def _with_trunks(cells: list[Cell], table: Mapping[str, Any], where: str) -> list[Cell]:
    """Turn cells that share their first steps into branches: `share_trunks`, `share_full_precision`."""
    for key in table:
        if key not in ("share", "cooldown", "warmup"):
            raise UsageError(unknown(f"{where}: trunk", key, ["share", "cooldown", "warmup"], what="key"))
    share = table.get("share", SHARES[0])
    if share not in SHARES:
        raise UsageError(unknown(f"{where}: trunk: share", share, SHARES))
    if share == "precision" and (unfit := [key for key in ("cooldown", "warmup") if key in table]):
        raise UsageError(f'{where}: trunk: {unfit[0]}: is of lengths; with share = "precision" all runs keep their schedules.')
    cooldown, warmup = table.get("cooldown", COOLDOWN), table.get("warmup", 0.0)
    if isinstance(cooldown, bool) or not isinstance(cooldown, int | float) or not 0 < cooldown < 1:
        raise UsageError(f"{where}: trunk: cooldown: {cooldown!r} is not a share between 0 and 1.")
    number = isinstance(warmup, int | float) and not isinstance(warmup, bool)
    if not number or ("warmup" in table and not (0 < warmup < 1 or (warmup >= 1 and warmup == int(warmup)))):
        raise UsageError(
            f"{where}: trunk: warmup: {warmup!r} is neither a whole number of steps nor a share of the longest length below 1."
        )
    for cell in cells if share != "precision" else ():
        if cell.config.optim.schedule != OptimConfig().schedule and cell.config.optim.schedule != "wsd":
            raise UsageError(f"{where}: trunk: has the schedule wsd, not {cell.config.optim.schedule}.")
    try:
        configs = [cell.config for cell in cells]
        if share == "lengths":
            configs = share_trunks(configs, cooldown, warmup)
        else:
            configs = share_full_precision(configs, cooldown if share == "both" else 0.0, warmup)
    except UsageError as e:
        raise UsageError(f"{where}: {e}") from e
    return [Cell(config, cell.values) for config, cell in zip(configs, cells, strict=True)]


def _matrix(tree: Mapping[str, Any], where: str) -> list[Values]:
    """The cells of [matrix]; without [matrix] and [[include]], the base is the only cell."""
    if "matrix" not in tree:
        return [] if "include" in tree or "base" not in tree else [{}]
    here = f"{where}: matrix"
    table = _unquoted(_table(tree["matrix"], here), here)
    if not table:
        raise UsageError(f"{here}: has no axes.")
    for key, value in flatten({k: v for k, v in table.items() if not _has_own_name(k, v)}, where=here).items():
        if not isinstance(value, list):
            raise UsageError(f"{here}: {'.'.join(key)}: {value!r} is not a list; a single value belongs in [base].")
    return _combinations(table, here)


def _combinations(table: Mapping[str, Any], where: str) -> list[Values]:
    """Every combination of a table's lists, the first key varying slowest."""
    axes: list[list[Values]] = []
    for name, entry in _unquoted(table, where).items():
        here = f"{where}: {name}"
        if _has_own_name(name, entry):
            if not entry:
                raise UsageError(f"{here}: the axis is empty.")
            axes.append([values for i, option in enumerate(entry, 1) for values in _combinations(option, f"{here}[{i}]")])
            continue
        for key, value in flatten({name: entry}, where=where).items():
            options = value if isinstance(value, list) else [value]
            if not options:
                raise UsageError(f"{where}: {'.'.join(key)}: the axis is empty.")
            axes.append([{key: _scalar(option, key, where)} for option in options])
    cells = []
    for choice in itertools.product(*axes):
        cell: Values = {}
        for values in choice:
            for key in values.keys() & cell.keys():
                raise UsageError(f"{where}: {'.'.join(key)} is set by two axes.")
            cell |= values
        cells.append(cell)
    return cells


def _has_own_name(name: str, entry: Any) -> bool:
    """Whether this is an axis with a name of its own, whose entries are tables."""
    sections = {k[0] for k in known_keys()}
    return name not in sections and isinstance(entry, list) and all(isinstance(option, dict) for option in entry)


def _one(table: Mapping[str, Any], where: str) -> Values:
    values = flatten(_unquoted(table, where), where=where)
    for key, value in values.items():
        if isinstance(value, list):
            raise UsageError(f"{where}: {'.'.join(key)}: a list of values belongs in [matrix].")
        _scalar(value, key, where)
    return values


def _scalar(value: Any, key: tuple[str, ...], where: str) -> Any:
    if not isinstance(value, str | int | float | bool):
        raise UsageError(f"{where}: {'.'.join(key)}: {value!r} is not a single string, number or boolean.")
    return value


def _unquoted(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table with quoted dotted keys as nested ones: `"train.seed" = …` means `train.seed = …`."""
    result: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in table.items() if "." not in k}
    for name, value in table.items():
        section, dot, key = name.partition(".")
        if not dot:
            continue
        if (section, key) not in known_keys():
            raise UsageError(
                unknown(where, name, {".".join(k): about for k, about in known_keys().items()}, what="key", all_by=ALL_KEYS)
            )
        node = result.setdefault(section, {})
        if not isinstance(node, dict) or key in node:
            raise UsageError(f"{where}: {name} is set twice.")
        node[key] = value
    return result


def _matches(values: Values, rule: Values) -> bool:
    """Whether a cell has every value of the rule. Values from presets and defaults are looked up in the config."""
    if any(key not in values for key in rule):
        config = resolve([Layer("sweep file", values)]).config
        values = {tuple(k.split(".", 1)): v for k, v in flat_items(config)} | values
    return all(values.get(k, ...) in (v if isinstance(v, list) else [v]) for k, v in rule.items())


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {value!r} is not a table of keys.")
    return value


def _tables(tree: Mapping[str, Any], part: str, where: str) -> list[Any]:
    tables = tree.get(part, [])
    if not isinstance(tables, list):
        raise UsageError(f"{where}: {part}: is written [[{part}]], once for each table.")
    return tables


def _in_words(values: Values) -> str:
    return ", ".join(f"{'.'.join(k)}={v}" for k, v in values.items())
