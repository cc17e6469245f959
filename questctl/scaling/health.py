"""The health of the runs in a folder, one by one and as families, from their metric lines; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from ..store import Run, RunStore
from .sources import Paths

if TYPE_CHECKING:
    from ..analysis.collapse import Family
    from ..analysis.health import Health


def diagnose_health(runs: str | Path | None = None, names: Sequence[str] = ()) -> list[Health]:
    """The health of the named runs, or of all, in a folder of runs (default: `$QUESTCTL_RUNS`, else `runs`).

    `names` are names of runs or unique ends of names. A damaged run has the state "failed" and the damage as its finding.
    Raises DataError for a folder or a run that does not exist, UsageError for an end that is not unique.
    """
    store = RunStore(runs)
    store.require()
    return [_health(run) for run in ([store.find(name) for name in names] if names else store.runs())]


def check_collapse(
    sources: Paths = None, names: Sequence[str] = (), *, columns: Mapping[str, str] | None = None
) -> list[Family]:
    """Families of finished runs whose curves should coincide after division by the last loss, and the runs that deviate.

    Sources are those of `forecast`: folders of runs and files of curves. `names` are runs of the one folder `sources`, or
    unique ends of their names. Empty if no family has enough runs. Raises DataError for files that cannot be read.
    """
    from ..analysis.collapse import families
    from .curves import load_curves

    if names:
        assert sources is None or isinstance(sources, str | Path), "names are of the runs in one folder"
        store = RunStore(sources)
        sources = [store.find(name).path for name in names]
    return families(load_curves(sources, columns=columns).curves)


def _health(run: Run) -> Health:
    from ..analysis.health import diagnose

    try:
        return diagnose(run.name, run.state(), run.metrics(), run.status().message)
    except DataError as e:
        return diagnose(run.name, "failed", [], str(e))
