"""External runs: runs that were trained elsewhere, read from a table and kept beside one's own.

Tables are read by `questctl.analysis.tables`, as fits read them, so that an imported table gives the same points as the table
itself. The rows are stored beside the run folders, in a file of their own. Their state is `imported`, so they are not mistaken
for runs that were trained here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    from ..analysis.tables import TableOptions

UNKNOWN = "unknown"  # data hash of a row without one: the text of its loss is not known
STATE = "imported"
KEPT = (
    *("scheme", "loss", "unique_tokens", "tokens_fp", "lr", "optimizer", "warmup_steps", "seed", "n_layer", "d_model"),
    *("weights", "activations", "weight", "model_bits"),
)
BITS = ("w_grid_bits", "a_grid_bits", "w_stored_bits", "a_stored_bits")


class LeftOutRows:
    """The numbers of rows that an import left out, by kind of reason (`analysis.rows.LEFT_OUT`)."""

    left_out: Mapping[str, int]

    @property
    def unfinished(self) -> int:
        """Rows of runs that did not finish."""
        return self.left_out.get("unfinished_runs", 0)

    @property
    def without_loss(self) -> int:
        """Rows of finished runs without a loss."""
        return self.left_out.get("no_loss", 0)


@dataclass(frozen=True)
class ExternalRuns(LeftOutRows):
    """Rows of a table as `load_runs` has them, the file's hash, and how many rows were left out."""

    rows: list[dict[str, Any]]
    sha256: str
    left_out: Mapping[str, int]


def read(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    data_hash: str | None = None,
    options: TableOptions | None = None,
) -> ExternalRuns:
    """The runs in a table (.csv, .tsv, .json, .jsonl, .parquet).

    `columns` maps our names (N, D, loss, scheme, run, …) to the table's or to formulas; `where` keeps rows whose column meets a
    condition; `options` are those of fits; rows without a data hash get `data_hash`. Raises DataError naming row and column if
    a value cannot be read, is missing or is not a number.
    """
    from ..analysis.points import with_schemes
    from ..analysis.rows import missing_tokens, read_rows
    from ..analysis.tables import PointError, TableOptions, read_table

    try:
        table = read_table(path)
        options = options or TableOptions()
        names = table.row_names()
        kept = read_rows(table.records, names, columns=columns, where=where, options=options, source=path.name)
        kept, _ = with_schemes(kept, options, [], path.name)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}.") from e
    except PointError as e:
        raise DataError(f"{e}.") from e
    rows = []
    for row, number, name in zip(kept.rows, kept.numbers, kept.names, strict=True):
        if row["D"] is None:
            header = dict.fromkeys(key for record in table.records for key in record)
            raise DataError(f"{name}, column 'D': {missing_tokens(header)}.")
        values = {key: row[key] for key in (*KEPT, *BITS)} | ({"cluster": row["cluster"]} if options.cluster else {})
        rows.append(
            {
                "run": f"{path.stem}/{row['run'] or number}",
                "state": STATE,
                "params_non_embedding": row["N"],
                "tokens": row["D"],
                "tokens_per_param": row["D"] / row["N"] if row["N"] else None,
                "data_hash": row["data_hash"] or data_hash or UNKNOWN,
                **values,
            }
        )
    names = [row["run"] for row in rows]
    for number, row in enumerate(rows, 1):
        if names.count(row["run"]) > 1:
            row["run"] += f"-{number}"
    return ExternalRuns(rows, table.sha256, Counter(each.kind for each in kept.left_out))
