"""Mirrors of a run in the tracker that a group uses; off by default, never fatal, and never the truth: the files are.

    begin(run, config) · log(step, values) · finish(state, summary) · close()

A tracker is asked for by `--track wandb,tensorboard` or `QUESTCTL_TRACK`, and by `questctl runs push --to …` afterwards, which
sends the same calls from the run's files. A run is named there as its folder is, so that a run that goes on, or is pushed
twice, continues the one that is there. What a tracker raises is one warning, and the run goes on without it.

Metrics keep their names with units; where a tracker's alphabet is smaller, what it refuses becomes a space.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..config import RunConfig, flat_items
from ..errors import MissingDependency, UsageError, unknown
from ..metrics import STEP, TIME
from ..store import Run, RunStore

PROJECT = "questctl"
VARIABLE = "QUESTCTL_TRACK"
NOT_VALUES = (STEP, TIME)  # of a line: its place, not a value


class Tracker(Protocol):
    """What a tracker has to do; each call may raise whatever its package raises."""

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """Create or continue the run of this name. `config` is flat: dotted key → value; `folder` holds the run folders."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one log step."""

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """The run has ended: `done`, `failed`, `diverged` or `preempted`, with its result if it is done."""

    def close(self) -> None:
        """Send what is left."""


class WandB:
    """Weights & Biases; WANDB_MODE, WANDB_PROJECT and so on as wandb reads them."""

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """Continue the wandb run whose id is the run's name."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run,
            id=run,
            resume="allow",
            config=dict(config),
            dir=str(folder),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One wandb step a log step."""
        self._run.log(dict(values), step=step)

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """The result as the run's summary."""
        self._run.summary.update({"state": state, **summary})
        self._state = state

    def close(self) -> None:
        """Exit code 0 where the run is done."""
        self._run.finish(exit_code=0 if getattr(self, "_state", "") == "done" else 1)


class Trackio:
    """Trackio, which keeps its data on this machine unless told otherwise."""

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """Continue the run of this name."""
        import trackio

        self._trackio = trackio
        trackio.init(project=PROJECT, name=run, config=dict(config), resume="allow", embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One trackio step a log step."""
        self._trackio.log(dict(values), step=step)

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """The numbers of the result as last values."""
        self._trackio.log({f"result/{k}": v for k, v in summary.items() if isinstance(v, int | float)})

    def close(self) -> None:
        """Send what is left."""
        self._trackio.finish()


class TensorBoard:
    """Event files in <runs>/.tensorboard/<run>: `tensorboard --logdir runs/.tensorboard`."""

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """A new event file; steps that it repeats replace those of earlier ones."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / ".tensorboard" / run
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None
        self._config = "\n".join(f"    {k} = {v}" for k, v in config.items())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars."""
        if self._writer is None:  # the first step is known only now: later ones of an earlier attempt are dropped
            self._writer = self._make(str(self._folder), purge_step=step)
            self._writer.add_text("config", self._config, step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """The result as text."""
        if self._writer is not None:
            self._writer.add_text("result", "\n".join(f"    {k} = {v}" for k, v in {"state": state, **summary}.items()))

    def close(self) -> None:
        """Flush the event file."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI; the experiment is MLFLOW_EXPERIMENT_NAME or questctl."""

    STATES: ClassVar[dict[str, str]] = {"done": "FINISHED", "preempted": "KILLED"}  # all others: FAILED
    LONGEST = 500  # characters of a parameter's value; MLflow refuses more

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """Continue the run that is tagged with this name."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        home = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([home], f"tags.questctl_run = '{run}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(home, run_name=run, tags={"questctl_run": run}).info.run_id
        self._client.log_batch(self._id, params=[Param(k, str(v)[: self.LONGEST]) for k, v in config.items()])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One batch a log step."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(self._name(k), float(v), now, step) for k, v in values.items()])

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """Numbers of the result as metrics, the rest as tags; then the state."""
        for key, value in summary.items():
            if isinstance(value, int | float):
                self._client.log_metric(self._id, self._name(f"result.{key}"), float(value))
            else:
                self._client.set_tag(self._id, f"result.{key}", str(value))
        self._client.set_terminated(self._id, self.STATES.get(state, "FAILED"))

    def close(self) -> None:
        """Nothing is left: every call was sent."""

    @staticmethod
    def _name(metric: str) -> str:
        """`tokens/s` would be a file in a folder that the metric `tokens` is."""
        return re.sub(r"[^\w\-. ]+", " ", metric.replace("/", " per ")).strip()


TRACKERS: dict[str, tuple[type, str]] = {  # word → class, and the package that it needs
    "wandb": (WandB, "wandb"),
    "trackio": (Trackio, "trackio"),
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
}


def chosen(words: str | None, *, key: str = "--track") -> tuple[str, ...]:
    """`wandb,mlflow` → its words. Raises UsageError for an unknown one, MissingDependency with the pip line."""
    names = tuple(dict.fromkeys(w.strip() for w in (words or "").split(",") if w.strip()))
    for name in names:
        if name not in TRACKERS:
            raise UsageError(unknown(key, name, TRACKERS, what="tracker"))
        if find_spec(TRACKERS[name][1]) is None:
            raise MissingDependency(f"{key} {name}: the package is not installed; pip install 'questctl[{name}]'.")
    return names


def from_environment() -> tuple[str, ...]:
    """The trackers of `$QUESTCTL_TRACK`, which `--track` sets, so that a sweep's workers know them too."""
    return chosen(os.environ.get(VARIABLE), key=VARIABLE)


class Mirror:
    """Sends one run to several trackers; one that fails is named once and left out from then on."""

    def __init__(self, run: Run, config: RunConfig, names: Sequence[str]) -> None:
        self._run = run
        self._open: dict[str, Tracker] = {}
        flat = dict(flat_items(config))
        for name in names:
            tracker = TRACKERS[name][0]()
            with self._never_fatal(name):
                tracker.begin(run.name, flat, run.path.parent)
                self._open[name] = tracker

    def log(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl and its line of timing.jsonl."""
        values = {k: v for k, v in {**timing, **metrics}.items() if k not in NOT_VALUES and isinstance(v, int | float)}
        self._all(lambda tracker: tracker.log(int(metrics[STEP]), values))

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """The run's end."""
        self._all(lambda tracker: tracker.finish(state, summary))

    def close(self) -> None:
        """Send what is left."""
        self._all(lambda tracker: tracker.close())

    def _all(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._never_fatal(name):
                call(tracker)

    @contextmanager
    def _never_fatal(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # whatever a tracker's package, network or server does, the run goes on
            self._open.pop(name, None)
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            warnings.warn(f"{self._run.name}: {name} failed and is left out: {reason}", stacklevel=2)


@contextmanager
def mirrored(run: Run, config: RunConfig, names: Sequence[str]) -> Iterator[Mirror]:
    """A Mirror that is closed at the end, with the state that the run's files then have."""
    mirror = Mirror(run, config, names)
    try:
        yield mirror
    finally:
        if names:
            result = run.result()
            mirror.finish(run.state() if result is None else "done", {} if result is None else dict(run.row()))
        mirror.close()


def push_runs(names: Sequence[str], to: Sequence[str], runs: Path | str | None = None) -> dict[str, int]:
    """Send runs from their files to trackers (`TRACKERS`); the number of log steps sent, by run.

    A run that a tracker holds already is continued there, not repeated. Raises UsageError for an unknown tracker or run,
    MissingDependency for a tracker whose package is not installed.
    """
    store, trackers = RunStore(runs), chosen(",".join(to), key="--to")
    if not trackers:
        raise UsageError(unknown("--to", ",".join(to), TRACKERS, what="tracker"))
    return {run.name: push(run, trackers) for run in [store.find(name) for name in names]}


def push(run: Run, names: Sequence[str]) -> int:
    """Send a run's files to trackers; the number of log steps sent."""
    timing = {line[STEP]: line for line in run.timing()}
    lines = run.metrics()
    with mirrored(run, run.config(), names) as mirror:
        for line in lines:
            mirror.log(line, timing.get(line[STEP], {}))
    return len(lines)
