"""Fit laws of the learning rate and the batch to runs or tables.

questctl.fit_knobs("steplaw.csv").predict(N=1e9, D=2e10)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import DataError
from ..words import few
from .sources import Paths, analysis_errors, load_sources

if TYPE_CHECKING:
    from ..analysis.knobs import KnobFit


def fit_knobs(
    sources: Paths = None, *, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None
) -> KnobFit:
    """The best learning rate and batch of each (scheme, N, D), and how they grow: lr*(N, D), B*(D), with intervals.

    `sources` are folders of finished runs and tables with columns N, D, lr, loss, and batch_tokens or batch_sequences (of
    seq_len tokens, else 2048); `columns` maps our names to the tables', `where` keeps rows. B counts tokens a step. Raises
    DataError naming the row of a value that cannot be read, and if no cell has enough runs.
    """
    from ..analysis.knobs import fit_knobs as fit
    from ..analysis.knobs import read_trials

    loaded = load_sources(sources, columns=columns, where=where)
    batch = {}
    for run in loaded.runs:
        config = run.config()
        batch[run.name] = config.tokens / config.train.steps
    kept = [
        ({**record, **({"batch_tokens": batch[record["run"]]} if record["run"] in batch else {})}, name)
        for record, name, done, chosen in zip(loaded.records, loaded.names, loaded.finished, loaded.selected, strict=True)
        if done and chosen
    ]
    if not kept:
        raise DataError(f"{loaded.paths[0]}: no finished run is left to fit.")
    with analysis_errors():
        law = fit(read_trials([record for record, _ in kept], [name for _, name in kept], columns))
    if stopped := [record["run"] for record in loaded.records if record["state"] == "stopped"]:
        note = f"{len(stopped)} runs that a sweep stopped early, each behind another of its cell, are left out: {few(stopped)}."
        law = replace(law, notes=(*law.notes, note))
    return law
