"""Import runs that were trained elsewhere into a folder of runs, after checking that a law could be fitted to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..store import RunStore, external

if TYPE_CHECKING:
    from ..analysis.findings import Finding
    from ..analysis.points import Points
    from ..analysis.tables import TableOptions
from .sources import load_sources


@dataclass(frozen=True)
class SchemeRange:
    """The imported runs of one scheme: how many, and the ranges of their non-embedding parameters, tokens and losses."""

    scheme: str
    runs: int
    params_non_embedding: tuple[float, float]
    tokens: tuple[float, float]
    lowest_loss: float


@dataclass(frozen=True)
class ImportedRuns(external.LeftOutRows):
    """The runs that an import wrote to `path`, and the rows of the table that it left out."""

    path: Path
    runs: int
    schemes: tuple[SchemeRange, ...]
    unknown_data: int  # runs whose training data are not known
    left_out: Mapping[str, int]
    notes: tuple[Finding, ...]  # rows that were left out or read otherwise than they stand, and doubts, as of a fit

    def to_json(self) -> dict[str, Any]:
        """One record, with the number of runs of each scheme."""
        counts = {scheme.scheme: scheme.runs for scheme in self.schemes}
        about = {"path": str(self.path), "runs": self.runs, "schemes": counts, "unknown_data": self.unknown_data}
        rows = {"left_out": dict(self.left_out), "notes": [note.to_dict() for note in self.notes]}
        return {**about, "unfinished": self.unfinished, "without_loss": self.without_loss, **rows}


def import_runs(
    table: Path | str,
    runs: Path | str | None = None,
    *,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    options: TableOptions | None = None,
    data_hash: str | None = None,
    force: bool = False,
) -> ImportedRuns:
    """Add the runs of a table (any that `fit-scaling` reads; W&B's exports, QuEST's published runs) to a folder of runs.

    Args:
        table: The file. `questctl.analysis.tables` lists the columns that are understood.
        runs: The folder of runs. Default: `$QUESTCTL_RUNS` or `runs/`.
        name: What the group of runs is called. Default: the name of the file.
        columns: Our column names → those of the table, such as {"N": "params"}, or formulas over them.
        where: Column → the condition for rows to be kept.
        options: Which rows count, and the unit of their losses.
        data_hash: Hash of the data, for runs without one.
        force: Replace runs that were imported under this name.

    Raises UsageError if the name is taken or is not a plain file name, DataError for a table that a fit would refuse.
    """
    table, store = Path(table), RunStore(runs)
    path = store.external_path(name or table.stem)
    if path.exists() and not force:
        raise UsageError(f"--name: {path} exists; give --force to replace it, or another --name.")
    read = external.read(table, columns=columns, where=where, data_hash=data_hash, options=options)
    points = load_sources(table, columns=columns, where=where, options=options).points
    store.write_external(path, table, read.sha256, read.rows)
    unknown_data = sum(row["data_hash"] == external.UNKNOWN for row in read.rows)
    return ImportedRuns(path, len(read.rows), _ranges(points), unknown_data, read.left_out, points.notes)


def _ranges(points: Points) -> tuple[SchemeRange, ...]:
    out = []
    for i, scheme in enumerate(points.schemes):
        of = points.group == i
        n, d = points.N[of], points.D[of]
        sizes, tokens = (float(n.min()), float(n.max())), (float(d.min()), float(d.max()))
        out.append(SchemeRange(scheme.label, int(of.sum()), sizes, tokens, float(points.loss[of].min())))
    return tuple(out)
