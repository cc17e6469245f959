"""Lists of the runs in a folder with their states, all facts of one run, and the removal of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig, flat_items
from ..errors import DataError, UsageError, unknown
from ..metrics import STEP
from .packing import drop_runs
from .runs import STATES, Run, RunStore

DAMAGED = "damaged"  # shown as the state of a run whose files cannot be read
_HEADLINE = ("run", "state", "step", "steps", "attempts", "message", "path")


@dataclass(frozen=True)
class RunDetails:
    """All facts of one run: its summary, config, machine and attempts, metric lines, and its files with their bytes."""

    run: Run
    summary: dict[str, Any]
    config: RunConfig
    env: dict[str, Any]
    lines: list[dict[str, Any]]
    files: dict[str, int]

    @property
    def changed(self) -> list[tuple[str, Any]]:
        """The config keys whose value is not the default."""
        defaults = dict(flat_items(RunConfig()))
        return [(k, v) for k, v in flat_items(self.config) if k not in defaults or defaults[k] != v]

    def curve(self, key: str) -> list[float]:
        """The values of a metric at the log steps that have it."""
        return [line[key] for line in self.lines if isinstance(line.get(key), int | float)]

    def to_json(self) -> dict[str, Any]:
        """One record, with only the last of the metric lines."""
        rest = {"env": self.env, "last": self.run.last_metrics(), "files": self.files}
        return {**self.summary, "config": self.config.to_json(), **rest}


def list_runs(runs: Path | str | None = None, *, state: str | None = None) -> list[dict[str, Any]]:
    """One record per run of a folder, by name: result or config, state, step, attempts, message, path.

    A run whose files are damaged has the state `damaged` and a message. `runs` is by default `$QUESTCTL_RUNS` or `runs/`.
    Raises DataError if the folder does not exist, UsageError for an unknown state.
    """
    return [run_summary(run) for run in runs_in_state(RunStore(runs), state)]


def run_details(name: str, runs: Path | str | None = None) -> RunDetails:
    """All facts of one run; `name` is its name, or a beginning or end of it that fits no other run.

    Raises DataError for a run that does not exist or is damaged, UsageError for a name that fits several runs.
    """
    run = RunStore(runs).find(name)
    config = run.config()
    summary = {**run_summary(run), "passes": run.passes(config.tokens)}
    files = {str(p.relative_to(run.path)): p.stat().st_size for p in sorted(run.path.rglob("*")) if p.is_file()}
    return RunDetails(run, summary, config, run.env(), run.metrics(), files)


def remove_runs(names: Sequence[str], runs: Path | str | None = None) -> list[str]:
    """Remove runs with all their files; their full names. Raises UsageError, before any is removed, if one is being trained."""
    store = RunStore(runs)
    return remove_all(removable([store.find(name) for name in names]), store)


def remove_all(chosen: Sequence[Run], store: RunStore) -> list[str]:
    """Remove runs of a store, from their folders and from the archive; their names."""
    names = [run.name for run in chosen]
    for run in chosen:
        if not run.is_archived:
            run.remove()
    drop_runs(names, store)
    return names


def removable(runs: Sequence[Run]) -> list[Run]:
    """The runs, each once. Raises UsageError if one of them is being trained."""
    chosen = list({run.name: run for run in runs}.values())
    for run in chosen:
        if state_of(run) == "running":
            raise UsageError(f"rm: {run.name} is being trained; stop it first.")
    return chosen


def runs_in_state(store: RunStore, state: str | None) -> list[Run]:
    """The runs of a folder, or those in one state. Raises DataError if there is no folder, UsageError for an unknown state."""
    if state is not None and state not in STATES:
        raise UsageError(unknown("--state", state, STATES, what="state"))
    store.require()
    return [run for run in store.with_facts() if state is None or state_of(run) == state]


def state_of(run: Run) -> str:
    """The state of a run; `damaged` if its files cannot be read."""
    try:
        return "done" if run.facts else run.state()
    except DataError:
        return DAMAGED


def run_summary(run: Run) -> dict[str, Any]:
    """One record of `list_runs`."""
    try:
        known = run.facts
        status, result, state = (known.status, known.result, "done") if known else (run.status(), run.result(), run.state())
        if result:
            about = {**vars(result), "artifact_bytes": known.artifact_bytes if known else run.artifact_bytes()}
        else:
            about = {k: v for k, v in run.row().items() if v is not None}
    except DataError as e:
        return {**dict.fromkeys(_HEADLINE), "run": run.name, "state": DAMAGED, "message": str(e), "path": str(run.path)}
    return {
        **about,
        "run": run.name,
        "state": state,
        "step": run.last_metrics().get(STEP, status.step) if state == "running" else status.step,
        "steps": status.steps,
        "attempts": status.attempts,
        "message": status.message,
        **({key: run.last_verdict().get(key) for key in ("forecast", "gap", "by")} if state == "stopped" else {}),
        "updated_at": status.updated_at,
        "path": str(run.path),
    }
