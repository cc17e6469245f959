"""What a sweep was begun as: its cells, its code and its data, kept beside its runs, so that any machine can join it.

    runs/.sweeps/<name>-<8 hex>/  sweep.json    cells (config, varied values), code, data hashes
                                  job.sbatch, slurm-….out     of the SLURM launcher

The digits are a hash of the run ids, so an edited sweep file is another sweep, which shares the runs of the cells that it kept.
Nothing here says how far a cell is; the run folders do. A worker that joins with other code or other text is refused, because
its runs could not be compared with the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig, RunConfig
from ..console import DataProgress
from ..data.size_estimate import CorpusEstimate
from ..errors import DataError, UsageError
from ..store import RunStore, read_json, write_sealed
from .sweep_file import Cell, SweepFile, find_sweep_file, load_sweep_file

SCHEMA_VERSION = 2  # 1 called the name "plan"
PACKAGE = Path(__file__).resolve().parent.parent
# The folders whose sources decide what a run computes.
COMPUTING = (
    ".",
    "config",
    "data",
    "evaluate",
    "kernels",
    "models",
    "quant",
    "store",
    "training",
)
_REMEDY = "start the sweep again with questctl sweep FILE"


@dataclass(frozen=True)
class Sweep:
    """A sweep file, and the folder of its runs. `folder` need not exist yet."""

    file: SweepFile
    store: RunStore

    @property
    def folder(self) -> Path:
        """Where the record stands, and what launchers write."""
        digits = hashlib.sha256(" ".join(sorted(cell.run_id for cell in self.file.cells)).encode()).hexdigest()[:8]
        return self.store.root / ".sweeps" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.file.name)}-{digits}"


def code_version() -> dict[str, str]:
    """The release, and a hash of the sources that decide what a run computes."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    for part in COMPUTING:
        for path in sorted((PACKAGE / part).glob("*.py")):
            digest.update(f"{part}/{path.name}\0".encode() + path.read_bytes())
    return {"questctl": version("questctl"), "sources": digest.hexdigest()[:16]}


def check_inputs(cells: Sequence[Cell], store: RunStore) -> dict[str, str]:
    """Look whether the folder can be written, and prepare each corpus of `cells` once: its description → its hash.

    Raises StorageError, DataError or UsageError before anything is written.
    """
    store.run(cells[0].run_id).check_writable()
    return data_hashes(cells)


def join_dry(sweep: Sweep, cells: Sequence[Cell], *, force: bool = False) -> dict[DataConfig, CorpusEstimate]:
    """What is known of each text of `cells`, of which there is at least one. Raises what `join` would, as far as that is known
    without preparing anything."""
    from ..training.preflight import estimate_run_data

    sweep.store.run(cells[0].run_id).check_writable()
    if (path := sweep.folder / "sweep.json").exists() and not force:
        _compare(sweep, _read(path), code_version(), {})
    configs = {(c.config.data, c.config.model.vocab_size): c.config for c in cells}.values()
    return {c.data: estimate_run_data(c) for c in configs}


def data_hashes(cells: Sequence[Cell]) -> dict[str, str]:
    """Prepare each corpus of `cells` once; its description → its hash. Raises DataError or UsageError if one cannot be used."""
    from ..training.preflight import load_data

    configs = {(c.config.data, c.config.model.vocab_size): c.config for c in cells}.values()
    return {_text(c): load_data(c, progress=DataProgress(c.data.source)).data_hash for c in configs}


def _text(config: RunConfig) -> str:
    d = config.data
    return f"{d.source} {d.tokenizer} {d.val_fraction:g}"


def join(sweep: Sweep, cells: Sequence[Cell], *, force: bool = False) -> None:
    """Take part in a sweep with `cells`, which are left of it: record it, or compare code and data with the record.

    `force` records what is here instead. Raises UsageError where they differ, DataError or StorageError.
    """
    path, mine, data = sweep.folder / "sweep.json", code_version(), check_inputs(cells, sweep.store)
    if path.exists() and not force:
        begun = _read(path)
        _compare(sweep, begun, mine, data)
        if data.keys() <= begun["data"].keys():
            return
        data |= begun["data"]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = sweep.file
    stored = [{"config": c.config.to_json(), "values": dict(c.values)} for c in file.cells]
    about = {"schema": SCHEMA_VERSION, "name": file.name, "description": file.description}
    write_sealed(path, {**about, "launchers": file.launchers, "code": mine, "data": data, "cells": stored})
    _compare(sweep, _read(path), mine, data)  # of two that begin it at once, the later one has written


def _compare(sweep: Sweep, begun: Mapping[str, Any], mine: Mapping[str, str], data: Mapping[str, str]) -> None:
    where = f"{sweep.folder}: the sweep was begun with"
    if begun["code"] != mine:
        was, now = (f"questctl {v['questctl']} (sources {v['sources']})" for v in (begun["code"], mine))
        raise UsageError(f"{where} {was}, and this is {now}; use that version, or mix both with --force.")
    for text, digest in data.items():
        if (was := begun["data"].get(text, digest)) != digest:
            raise UsageError(
                f"{where} other text under data.source {text.split()[0]} (hash {was[:8]}, here {digest[:8]}); "
                "restore it, or mix both with --force."
            )


def find_sweep(word: str, *, runs: Path | None = None, sets: Sequence[str] = (), default_runs: Path) -> Sweep:
    """The sweep that `word` names: a sweep file (path or built-in name), the folder of a sweep, or runs with one sweep.

    `runs` and `sets` belong to a sweep file; a recorded sweep has its own. Raises UsageError or DataError.
    """
    path = Path(word)
    if path.name == "sweep.json":
        path = path.parent
    if not path.is_dir():
        return Sweep(load_sweep_file(find_sweep_file(word), sets), RunStore(runs or default_runs))
    for name, given in (("--runs", runs), ("--set", sets)):
        if given:
            raise UsageError(f"{name}: {word} is a recorded sweep, which has its own; leave it out, or name the sweep file.")
    if (path / "sweep.json").is_file():
        return Sweep(_read_file(path / "sweep.json"), RunStore(path.resolve().parent.parent))
    found = sorted(path.glob(".sweeps/*/sweep.json"))
    if len(found) == 1:
        return Sweep(_read_file(found[0]), RunStore(path))
    if found:
        raise UsageError(f"{word}: holds {len(found)} sweeps; name one: {', '.join(str(p.parent) for p in found)}.")
    raise UsageError(f"{word}: is neither a sweep file nor the folder of a sweep (questctl sweep FILE begins one).")


def _read_file(path: Path) -> SweepFile:
    values = _read(path)
    return SweepFile(values["name"], values["description"], tuple(_cells(values["cells"], path)), values["launchers"])


def _cells(stored: Sequence[Mapping[str, Any]], path: Path) -> Iterator[Cell]:
    for i, cell in enumerate(stored, 1):
        yield Cell(RunConfig.from_json(cell["config"], where=f"{path}: cell {i}"), cell["values"])


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path, _REMEDY)
    if values.get("schema") == 1 and "plan" in values:
        values = {**values, "schema": SCHEMA_VERSION, "name": values["plan"]}
    shape = {"schema": int, "name": str, "description": str, "launchers": dict, "code": dict, "data": dict, "cells": list}
    for key, kind in shape.items():
        if not isinstance(values.get(key), kind):
            raise DataError(f"{path}: is damaged ({key}); {_REMEDY}.")
    if values["schema"] != SCHEMA_VERSION:
        found = values["schema"]
        raise DataError(f"{path}: schema {found} is not the schema {SCHEMA_VERSION} that this version reads; {_REMEDY}.")
    return values
