"""A sweep's manifest: the record of what it began with, kept beside its runs, so that workers on any machine can join it.

    runs/.sweeps/<name>-<8 hex>/  sweep.json    cells (config, varied values), code version, data hashes
                                  job.sbatch, slurm-….out     of the SLURM launcher

The digits are a hash of the run ids, so an edited sweep file is another sweep; cells that it kept share their runs. The run
folders, not the manifest, say how far a cell is. A worker that joins with other code or other text is refused, because its runs
could not be compared with the others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig, RunConfig
from ..data.size_estimate import CorpusEstimate
from ..errors import DataError, UsageError
from ..store import RunStore, read_json, write_sealed
from ..system import package_folder, package_version
from ..words import few
from .resource_rules import Resources
from .stop_rule import parse_rule
from .sweep_file import Cell, SweepFile, find_sweep_file, load_sweep_file

SCHEMA_VERSION = 2  # 1 called the name "plan"
# The folders whose sources decide what a run computes.
COMPUTING = (".", "config", "data", "evaluate", "kernels", "models", "quant", "store", "training")
_REMEDY = "start the sweep again with questctl sweep FILE"

DataProgress = Callable[[str], Callable[[Any], None]]  # source of a text → the callback for the progress of its preparation


@dataclass(frozen=True)
class Sweep:
    """A sweep file and the store of its runs. `folder`, where the manifest is, need not exist yet."""

    file: SweepFile
    store: RunStore

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of the sweep file, in its order."""
        return self.file.cells

    @property
    def folder(self) -> Path:
        """The folder of the manifest and of what launchers write."""
        digits = hashlib.sha256(" ".join(sorted(cell.run_id for cell in self.cells)).encode()).hexdigest()[:8]
        return self.store.root / ".sweeps" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.file.name)}-{digits}"

    @property
    def manifest_path(self) -> Path:
        """The manifest itself."""
        return self.folder / "sweep.json"


def open_sweep(source: Sweep | str | Path, *, runs: Path | str | None = None, sets: Sequence[str] = ()) -> Sweep:
    """The sweep that `source` names: a sweep file (path or built-in name), the folder of a sweep, or runs with one sweep.

    `runs` (default `$QUESTCTL_RUNS` or `runs/`) and `sets` apply to a sweep file. A recorded sweep has its own, and an open one
    is returned as it is. Raises UsageError or DataError.
    """
    if isinstance(source, Sweep):
        return source
    path = Path(source)
    if path.name == "sweep.json":
        path = path.parent
    if (path / "config.json").is_file() or (not path.exists() and RunStore(runs).run(path.name).exists()):
        raise UsageError(f"{source}: is a run, not a sweep; questctl runs show {path.name} shows it.")
    if not path.is_dir():
        return Sweep(load_sweep_file(find_sweep_file(source), sets), RunStore(runs))
    for option, value in (("--runs", runs), ("--set", sets)):
        if value:
            raise UsageError(
                f"{option}: {source} is a recorded sweep, which has its own; leave it out, or name the sweep file."
            )
    if (path / "sweep.json").is_file():
        return Sweep(_sweep_file(path / "sweep.json"), RunStore(path.resolve().parent.parent))
    manifests = sorted(path.glob(".sweeps/*/sweep.json"))
    if len(manifests) == 1:
        return Sweep(_sweep_file(manifests[0]), RunStore(path))
    if manifests:
        raise UsageError(f"{source}: holds {len(manifests)} sweeps; name one: {few(p.parent for p in manifests)}.")
    raise UsageError(f"{source}: is neither a sweep file nor the folder of a sweep (questctl sweep FILE begins one).")


def join(sweep: Sweep, cells: Sequence[Cell], *, force: bool = False, data_progress: DataProgress | None = None) -> None:
    """Take part in a sweep, of which `cells` remain: write its manifest, or compare code and data with it.

    With `force`, the manifest is replaced by what is found here. Raises UsageError if they differ, DataError or StorageError.
    """
    path, code, data = sweep.manifest_path, code_version(), check_inputs(cells, sweep.store, data_progress)
    if path.exists() and not force:
        recorded = _read(path)
        _compare(sweep, recorded, code, data)
        same = recorded.get("stop") == _stop(sweep) and [cell.get("resources") for cell in recorded["cells"]] == _resources(
            sweep
        )
        if data.keys() <= recorded["data"].keys() and same:
            return
        data |= recorded["data"]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = sweep.file
    stored = [
        {"config": c.config.to_json(), "values": dict(c.values), **({"resources": taken} if taken else {})}
        for c, taken in zip(file.cells, _resources(sweep), strict=True)
    ]
    header = {"schema": SCHEMA_VERSION, "name": file.name, "description": file.description}
    stop = {"stop": rule} if (rule := _stop(sweep)) else {}  # left out where there is none, as earlier versions wrote it
    write_sealed(path, {**header, "launchers": file.launchers, **stop, "code": code, "data": data, "cells": stored})
    _compare(sweep, _read(path), code, data)  # if two begin it at once, the later manifest stays


def check_join(sweep: Sweep, cells: Sequence[Cell], *, force: bool = False) -> dict[DataConfig, CorpusEstimate]:
    """Check that `join` would succeed, as far as that is known without preparing a text; returns what is known of each text.

    `cells` holds at least one cell. Raises what `join` would raise.
    """
    from ..training.run_data import estimate_run_data

    sweep.store.run(cells[0].run_id).check_writable()
    if sweep.manifest_path.exists() and not force:
        _compare(sweep, _read(sweep.manifest_path), code_version(), {})
    return {c.data: estimate_run_data(c) for c in _one_config_per_text(cells)}


def check_inputs(cells: Sequence[Cell], store: RunStore, data_progress: DataProgress | None = None) -> dict[str, str]:
    """Check that the folder of runs can be written, and prepare each text of `cells` once; returns their hashes.

    Raises StorageError, DataError or UsageError before any run is written.
    """
    store.run(cells[0].run_id).check_writable()
    return data_hashes(cells, data_progress)


def data_hashes(cells: Sequence[Cell], data_progress: DataProgress | None = None) -> dict[str, str]:
    """Prepare each text of `cells` once; "source tokenizer validation-share [dedup]" → hash of its tokens.

    Raises DataError or UsageError if a text cannot be used.
    """
    from ..training.run_data import load_data

    hashes = {}
    for config in _one_config_per_text(cells):
        d = config.data
        progress = data_progress(d.source) if data_progress else None
        rule = "" if d.dedup == "auto" else f" {d.dedup}"
        hashes[f"{d.source} {d.tokenizer} {d.val_fraction:g}{rule}"] = load_data(config, progress=progress).data_hash
    return hashes


def _one_config_per_text(cells: Sequence[Cell]) -> list[RunConfig]:
    return list({(c.config.data, c.config.model.vocab_size): c.config for c in cells}.values())


def code_version() -> dict[str, str]:
    """The release, and a hash of the source files that decide what a run computes."""
    digest = hashlib.sha256()
    for folder in COMPUTING:
        for path in sorted(package_folder(folder).glob("*.py")):
            digest.update(f"{folder}/{path.name}\0".encode() + path.read_bytes())
    return {"questctl": package_version(), "sources": digest.hexdigest()[:16]}


def _compare(sweep: Sweep, recorded: Mapping[str, Any], code: Mapping[str, str], data: Mapping[str, str]) -> None:
    """Raises UsageError if `code` or a hash of `data` differs from the manifest."""
    where = f"{sweep.folder}: the sweep was begun with"
    if recorded["code"] != code:
        was, now = (f"questctl {v['questctl']} (sources {v['sources']})" for v in (recorded["code"], code))
        raise UsageError(f"{where} {was}, and this is {now}; use that version, or mix both with --force.")
    for text, digest in data.items():
        if (was := recorded["data"].get(text, digest)) != digest:
            raise UsageError(
                f"{where} other text under data.source {text.split()[0]} (hash {was[:8]}, here {digest[:8]}); "
                "restore it, or mix both with --force."
            )


def runs_as_sweep(store: RunStore) -> Sweep:
    """All readable runs of a folder as the cells of one sweep. Raises DataError if the folder does not exist."""
    store.require()
    cells = []
    for run in store.runs():
        with suppress(DataError):  # `questctl runs ls` names a damaged one
            cells.append(Cell(run.config(), {}))
    return Sweep(SweepFile(str(store.root), "", tuple(cells)), store)


def _sweep_file(path: Path) -> SweepFile:
    """The content of the sweep file at the time when the manifest at `path` was written."""
    values = _read(path)
    cells, stop = tuple(_cells(values["cells"], path)), parse_rule(values.get("stop"), str(path))
    return SweepFile(values["name"], values["description"], cells, values["launchers"], stop)


def _stop(sweep: Sweep) -> dict[str, Any] | None:
    return sweep.file.stop.model_dump(mode="json") if sweep.file.stop else None


def _resources(sweep: Sweep) -> list[dict[str, int] | None]:
    """The resources of each cell; left out if the sweep has no [resources], as in manifests of earlier versions."""
    return [cell.resources.to_json() if cell.resources else None for cell in sweep.cells]


def _cells(stored: Sequence[Mapping[str, Any]], path: Path) -> Iterator[Cell]:
    for i, cell in enumerate(stored, 1):
        taken = Resources(**cell["resources"]) if "resources" in cell else None
        yield Cell(RunConfig.from_json(cell["config"], where=f"{path}: cell {i}"), cell["values"], taken)


def _read(path: Path) -> dict[str, Any]:
    """The manifest at `path`, of this schema or the one before. Raises DataError."""
    values = read_json(path, _REMEDY)
    if values.get("schema") == 1 and "plan" in values:
        values = {**values, "schema": SCHEMA_VERSION, "name": values["plan"]}
    shape = {"schema": int, "name": str, "description": str, "launchers": dict, "code": dict, "data": dict, "cells": list}
    for key, kind in shape.items():
        if not isinstance(values.get(key), kind):
            raise DataError(f"{path}: is damaged ({key}); {_REMEDY}.")
    if (schema := values["schema"]) != SCHEMA_VERSION:
        raise DataError(f"{path}: schema {schema} is not the schema {SCHEMA_VERSION} that this version reads; {_REMEDY}.")
    return values
