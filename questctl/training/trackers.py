"""Copies of a run in experiment trackers: Weights & Biases, Trackio, TensorBoard, MLflow.

    begin(run, config) · log(step, values) · finish(state, summary) · close()

Trackers are off by default. `--track wandb,tensorboard` or `QUESTCTL_TRACK` sends a run while it trains, and
`questctl runs push --to …` makes the same calls later from its files. The files of the run remain its record. If a tracker
raises an error, the error becomes one warning, and the run continues without that tracker.

A run has the same name in a tracker as its folder, so that a run that is resumed or pushed twice continues its entry there.
Metrics keep their names with units; characters that a tracker does not allow become spaces.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..config import RunConfig, flat_items
from ..errors import MissingDependency, NotSent, QuestError, UsageError, unknown
from ..metrics import STEP, TIME, TRAIN_LOSS
from ..store import Run, RunStore
from ..system import temporary_environment

PROJECT = "questctl"
VARIABLE = "QUESTCTL_TRACK"
NOT_VALUES = (STEP, TIME)  # keys of a line that are no measurements


class Tracker(Protocol):
    """The calls that a tracker implements. Each may raise whatever the tracker's package raises."""

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """Create or continue the run of this name. `config` maps dotted keys to values; `folder` contains the run folders."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one log step."""

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """Record that the run has ended: as `done`, with its result, or as `failed`, `diverged` or `preempted`."""

    def close(self) -> None:
        """Send what is still buffered."""


class WandB:
    """Weights & Biases. WANDB_MODE, WANDB_PROJECT and so on have the meaning that wandb gives them."""

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
        """Send one wandb step per log step."""
        self._run.log(dict(values), step=step)

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """Send the result as the run's summary."""
        self._run.summary.update({"state": state, **summary})
        self._state = state

    def close(self) -> None:
        """End the wandb run, with exit code 0 if the run is done."""
        self._run.finish(exit_code=0 if getattr(self, "_state", "") == "done" else 1)


class Trackio:
    """Trackio, which keeps its data on this machine unless it is configured otherwise.

    When it cannot write, it raises nothing: it warns, mostly while it sends what it has buffered, and goes on.
    """

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """Continue the run of this name."""
        import trackio

        self._trackio = trackio
        resumed = trackio.init(project=PROJECT, name=run, config=dict(config), resume="allow", embed=False)
        self._next = getattr(resumed, "_next_step", 0)  # the first step that trackio does not have
        self._last: int | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one trackio step per log step, unless trackio has this step: it would keep a second copy."""
        if step >= self._next:
            self._trackio.log(dict(values), step=step)
            self._last = step

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """Send the numbers of the result with the last step, if that is new."""
        if self._last is not None:
            numbers = {f"result/{k}": v for k, v in summary.items() if isinstance(v, int | float)}
            self._trackio.log(numbers, step=self._last)

    def close(self) -> None:
        """Send what is still buffered."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._trackio.finish()
        lost = [str(warning.message) for warning in caught if "User code will continue" in str(warning.message)]
        if lost:
            raise OSError(lost[0].partition(" User code will continue")[0])


class TensorBoard:
    """Event files in <runs>/.tensorboard/<run>: `tensorboard --logdir runs/.tensorboard`."""

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """Prepare a new event file. Steps that it repeats replace those of earlier event files."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / ".tensorboard" / run
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None
        self._config = "\n".join(f"    {k} = {v}" for k, v in config.items())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values as scalars."""
        if self._writer is None:  # opened here, because `purge_step` drops what an earlier attempt wrote from this step on
            self._writer = self._make(str(self._folder), purge_step=step)
            self._writer.add_text("config", self._config, step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """Write the result as text."""
        if self._writer is not None:
            self._writer.add_text("result", "\n".join(f"    {k} = {v}" for k, v in {"state": state, **summary}.items()))

    def close(self) -> None:
        """Flush the event file."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """MLflow at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME (default: questctl).

    Without MLFLOW_TRACKING_URI, MLflow writes mlflow.db in the working directory. A URI that names a folder is used, although
    MLflow 3 refuses folders unless a variable allows them: whoever sets such a URI wants it. If a server does not answer the
    first call, one more try is made, so that nobody waits for minutes; MLFLOW_HTTP_REQUEST_MAX_RETRIES sets another number.
    """

    STATES: ClassVar[dict[str, str]] = {"done": "FINISHED", "preempted": "KILLED"}  # all others are FAILED
    LONGEST = 500  # characters of a parameter's value; MLflow refuses longer ones
    MOST = 100  # parameters in one call
    CONNECTING: ClassVar[dict[str, str]] = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}

    def begin(self, run: str, config: Mapping[str, Any], folder: Path) -> None:
        """Continue the run that is tagged with this name."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        chosen = {name: os.environ[name] for name in self.CONNECTING if name in os.environ}
        with temporary_environment(self.CONNECTING | chosen):
            self._client = MlflowClient()
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment_id], f"tags.questctl_run = '{run}'", max_results=1)
        self._sent = -1  # the last step that MLflow has
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            history = self._client.get_metric_history(self._id, self._name(TRAIN_LOSS))
            self._sent = max((metric.step for metric in history), default=-1)
            return
        self._id = self._client.create_run(experiment_id, run_name=run, tags={"questctl_run": run}).info.run_id
        params = [Param(self._name(k), str(v)[: self.LONGEST]) for k, v in config.items()]
        for i in range(0, len(params), self.MOST):
            self._client.log_batch(self._id, params=params[i : i + self.MOST])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one batch per log step, unless MLflow has this step: it would keep a second copy of each value."""
        if step <= self._sent:
            return
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(self._name(k), float(v), now, step) for k, v in values.items()])

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """Send the numbers of the result as metrics and the rest as tags, and then the state."""
        for key, value in summary.items():
            if isinstance(value, int | float):
                self._client.log_metric(self._id, self._name(f"result.{key}"), float(value))
            else:
                self._client.set_tag(self._id, f"result.{key}", str(value))
        self._client.set_terminated(self._id, self.STATES.get(state, "FAILED"))

    def close(self) -> None:
        """Do nothing, because every call was sent at once."""

    @staticmethod
    def _name(metric: str) -> str:
        """The metric's name without `/`, because MLflow's file store would need `tokens` to be both a file and a folder."""
        return re.sub(r"[^\w\-. ]+", " ", metric.replace("/", " per ")).strip()


TRACKERS: dict[str, tuple[type, str]] = {  # name → (class, the package that it needs)
    "wandb": (WandB, "wandb"),
    "trackio": (Trackio, "trackio"),
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
}


def chosen(text: str | None, *, key: str = "--track") -> tuple[str, ...]:
    """The trackers that a list such as `wandb,mlflow` names; `key` is the option or variable that holds the list.

    Raises UsageError for an unknown tracker, and MissingDependency, with the pip command, if its package is not installed.
    """
    names = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise UsageError(unknown(key, name, TRACKERS, what="tracker"))
        if find_spec(TRACKERS[name][1]) is None:
            raise MissingDependency(f"{key} {name}: the package is not installed; pip install 'questctl[{name}]'.")
    return names


def from_environment() -> tuple[str, ...]:
    """The trackers of `$QUESTCTL_TRACK`. `--track` sets this variable, so that the workers of a sweep use the same trackers."""
    return chosen(os.environ.get(VARIABLE), key=VARIABLE)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


class Mirror:
    """Sends one run to several trackers. A tracker that fails is reported in one sentence and not used any more."""

    def __init__(self, run: Run, config: RunConfig, names: Sequence[str], report: Callable[[str], None] = _warn) -> None:
        self._run, self._report = run, report
        self._open: dict[str, Tracker] = {}
        flat = dict(flat_items(config))
        for name in names:
            self._open[name] = TRACKERS[name][0]()
            with self._never_fatal(name):
                self._open[name].begin(run.name, flat, run.root)

    def log(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Send one line of metrics.jsonl together with its line of timing.jsonl."""
        values = {k: v for k, v in {**timing, **metrics}.items() if k not in NOT_VALUES and isinstance(v, int | float)}
        self._all(lambda tracker: tracker.log(int(metrics[STEP]), values))

    def finish(self, state: str, summary: Mapping[str, Any]) -> None:
        """Record the end of the run."""
        self._all(lambda tracker: tracker.finish(state, summary))

    def close(self) -> None:
        """Send what is still buffered."""
        self._all(lambda tracker: tracker.close())

    def _all(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._never_fatal(name):
                call(tracker)

    @contextmanager
    def _never_fatal(self, name: str) -> Iterator[None]:
        try:
            with redirect_stdout(sys.stderr):  # stdout is for results, but Trackio prints there
                yield
        except Exception as e:  # a failure of a tracker's package, network or server must not end the run
            tracker = self._open.pop(name)
            with suppress(Exception):
                tracker.close()
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            self._report(f"{self._run.name}: {name} failed and is left out: {reason}")


@contextmanager
def mirrored(run: Run, config: RunConfig, names: Sequence[str], report: Callable[[str], None] = _warn) -> Iterator[Mirror]:
    """A Mirror that at the end of the `with` block records the state in the run's files, and closes."""
    mirror = Mirror(run, config, names, report)
    try:
        yield mirror
    finally:
        if names:
            result = run.result()
            mirror.finish(run.state() if result is None else "done", {} if result is None else dict(run.row()))
        mirror.close()


def push_runs(names: Sequence[str], to: Sequence[str], runs: Path | str | None = None) -> dict[str, int]:
    """Send finished or unfinished runs from their files to trackers; returns the number of log steps sent by run name.

    `to` names the trackers (`TRACKERS`). A run that a tracker already has is continued there. Raises UsageError for an unknown
    tracker or run, MissingDependency for a tracker whose package is not installed, and, after all runs have been tried,
    NotSent, which has a sentence for each run that failed.
    """
    store, trackers = RunStore(runs), chosen(",".join(to), key="--to")
    if not trackers:
        raise UsageError(unknown("--to", ",".join(to), TRACKERS, what="tracker"))
    failures: list[str] = []
    sent: dict[str, int] = {}
    for run in [store.find(name) for name in names]:
        before = len(failures)
        try:
            steps = push(run, trackers, failures.append)
        except QuestError as e:  # its files are damaged
            failures.append(str(e))
        if len(failures) == before:
            sent[run.name] = steps
    if failures:
        raise NotSent(failures, sent)
    return sent


def push(run: Run, names: Sequence[str], report: Callable[[str], None] = _warn) -> int:
    """Send one run from its files to trackers; returns the number of log steps sent. `report` is called for each failure."""
    timing = {line[STEP]: line for line in run.timing()}
    lines = run.metrics()
    with mirrored(run, run.config(), names, report) as mirror:
        for line in lines:
            mirror.log(line, timing.get(line[STEP], {}))
    return len(lines)
