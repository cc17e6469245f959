"""Compare runs: the config keys in which they differ, their results beside those of the first, and their curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import metrics
from ..config import flat_items
from ..errors import UsageError
from ..store import Run, RunStore
from .sources import data_of, run_row

LOSSES = ("loss", "bits_per_byte", "train_loss")
COMPARED = (*LOSSES, "params_non_embedding", "tokens", "model_bits", "artifact_bytes", "flops", "tokens_per_s", "seconds")
CURVES = (metrics.TRAIN_LOSS, metrics.VAL_LOSS)


@dataclass(frozen=True)
class RunComparison:
    """Several runs side by side; every list holds one value per run, None where a run has none."""

    runs: tuple[Run, ...]
    config: Mapping[str, list[Any]]  # the keys in which the runs differ
    result: Mapping[str, list[Any]]  # COMPARED
    lines: tuple[list[dict[str, Any]], ...]  # the metric lines of each run
    data: Mapping[str, list[str]]  # data hash → names of the runs trained on it

    @property
    def other_data(self) -> list[str]:
        """The runs whose losses cannot be compared with the first run's, because they were trained on other data."""
        return [name for names in list(self.data.values())[1:] for name in names]

    @property
    def minus_first(self) -> dict[str, list[Any]]:
        """Each result minus that of the first run."""
        return {k: [None if x is None or v[0] is None else x - v[0] for x in v] for k, v in self.result.items()}

    def curve(self, key: str) -> list[list[tuple[float, float]]]:
        """For each run the points (tokens, value) at which a metric is known and positive."""
        pairs = [[(line.get(metrics.TOKENS), line.get(key)) for line in lines] for lines in self.lines]
        return [
            [(x, y) for x, y in run if isinstance(x, int | float) and isinstance(y, int | float) and x > 0 and y > 0]
            for run in pairs
        ]

    def to_json(self) -> dict[str, Any]:
        """Names, differing config keys, results, differences to the first run, and the curves as columns."""
        names = [run.name for run in self.runs]
        columns = (metrics.STEP, metrics.TOKENS, *CURVES)
        curves = {
            name: {key: [line.get(key) for line in lines] for key in columns}
            for name, lines in zip(names, self.lines, strict=True)
        }
        return {
            "runs": names,
            "config": dict(self.config),
            "result": dict(self.result),
            "minus_first": self.minus_first,
            "curves": curves,
            "data": dict(self.data),
        }


def compare_runs(names: Sequence[str], runs: Path | str | None = None) -> RunComparison:
    """Compare two or more runs of a folder; a name may be shortened to a unique beginning or end.

    Raises UsageError for fewer than two runs or one that is named twice, DataError for a run that does not exist.
    """
    if len(names) < 2:
        raise UsageError("compare: needs two runs or more.")
    store = RunStore(runs)
    chosen = tuple(store.find(name) for name in names)
    if len({run.name for run in chosen}) < len(chosen):
        raise UsageError("compare: one run is named twice.")
    configs = [dict(flat_items(run.config())) for run in chosen]
    keys = dict.fromkeys(key for config in configs for key in config)
    by_key = {key: [config.get(key) for config in configs] for key in keys}
    differing = {key: values for key, values in by_key.items() if len(set(map(repr, values))) > 1}
    rows = [run_row(run) for run in chosen]
    measured = {key: [row.get(key) if row["state"] == "done" else None for row in rows] for key in COMPARED}
    return RunComparison(chosen, differing, measured, tuple(run.metrics() for run in chosen), data_of(rows))
