"""Trackers: they receive a run's lines and result, during the run or later, continue an earlier copy, and never stop a run."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from typing import ClassVar

import pytest
import tiny
from command_line import outcome

from questctl.errors import MissingDependency, NotSent, UsageError
from questctl.store import RunStore
from questctl.training import trackers


class Recorder:
    """A tracker that keeps what it is told, by run."""

    told: ClassVar[dict[str, list[tuple]]] = {}

    def begin(self, run, config, folder):
        self.calls = self.told.setdefault(run, [])
        self.calls.append(("begin", config["quant.weights"], folder))

    def log(self, step, values):
        self.calls.append(("log", step, dict(values)))

    def finish(self, state, summary):
        self.calls.append(("finish", state, dict(summary)))

    def close(self):
        self.calls.append(("close",))


class Broken(Recorder):
    closed: ClassVar[list[str]] = []

    def log(self, step, values):
        raise ConnectionError("the server is gone\nand more")

    def close(self):
        self.closed.append("broken")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "told", {})
    monkeypatch.setattr(Broken, "closed", [])
    monkeypatch.setitem(trackers.TRACKERS, "recorder", (Recorder, "json"))
    monkeypatch.setitem(trackers.TRACKERS, "broken", (Broken, "json"))
    return Recorder


def test_a_run_is_mirrored_line_by_line_and_pushed_again_from_its_files(recorder, tmp_path, monkeypatch):
    from questctl.training import train

    monkeypatch.setenv(trackers.VARIABLE, "recorder,broken")
    config = tiny.config(train__steps=6)
    with pytest.warns(UserWarning, match="broken failed and is left out: the server is gone$"):
        result = train(config, runs=tmp_path)
    run = RunStore(tmp_path).run(config.run_id)
    live = recorder.told.pop(run.name)
    shared, live = [c for c in live if c[0] == "begin"], [c for c in live if c[0] != "begin"]
    assert [c[1:] for c in shared] == [(str(config.quant.weights), tmp_path)] * 2  # one of each tracker
    lines = run.metrics()
    logged = [c for c in live if c[0] == "log"]
    assert [c[1] for c in logged] == [line["step"] for line in lines] == [2, 4, 6]
    for (_, _, values), line in zip(logged, lines, strict=True):
        assert values["train_loss(nats/token)"] == line["train_loss(nats/token)"]
        assert values["tokens/s"] > 0
        assert "step" not in values
    assert live[-2][:2] == ("finish", "done")
    assert live[-2][2]["loss"] == result.loss
    assert live[-1] == ("close",)
    assert Broken.closed == ["broken"]  # what it holds open is closed

    assert trackers.push(run, ["recorder"]) == 3
    assert [c for c in recorder.told[run.name] if c[0] != "begin"] == live


def test_a_run_that_stops_says_so(recorder, tmp_path, monkeypatch):
    from questctl.errors import Preempted
    from questctl.training import train

    monkeypatch.setenv(trackers.VARIABLE, "recorder")
    config = tiny.config(train__steps=6)
    asked = iter([False, False, False])
    with pytest.raises(Preempted):
        train(config, runs=tmp_path, stop=lambda: next(asked, True))
    assert recorder.told[config.run_id][-2][:2] == ("finish", "preempted")


def test_nothing_is_tracked_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(trackers.VARIABLE, raising=False)
    assert trackers.from_environment() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.Mirror(RunStore(tmp_path).run("a-run"), tiny.config(), ()).log({"step": 1}, {})


def test_words():
    with pytest.raises(UsageError, match=r"--track: unknown tracker 'wandbb'; did you mean 'wandb'"):
        trackers.chosen("wandbb")
    assert trackers.chosen("") == ()


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (trackers.WandB, "no_such_package"))
    with pytest.raises(MissingDependency, match=r"pip install 'questctl\[wandb\]'"):
        trackers.chosen("wandb")


@pytest.fixture
def finished(tmp_path):
    from questctl.training import train

    config = tiny.config(train__steps=4)
    train(config, runs=tmp_path)
    return RunStore(tmp_path).run(config.run_id)


def test_tensorboard_holds_the_curve_once_however_often_it_is_pushed(finished):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        trackers.push(finished, ["tensorboard"])
    events = EventAccumulator(str(finished.path.parent / ".tensorboard" / finished.name))
    events.Reload()
    curve = [(e.step, e.value) for e in events.Scalars("train_loss(nats/token)")]
    lines = [(line["step"], line["train_loss(nats/token)"]) for line in finished.metrics()]
    assert curve == [(step, pytest.approx(value, rel=1e-6)) for step, value in lines]
    assert [run.name for run in RunStore(finished.path.parent).runs()] == [finished.name]  # the events' folder is no run


@pytest.mark.parametrize(
    "store", ["file:{}/mlruns", "{}/a folder", pytest.param("sqlite:///{}/mlflow.db", marks=pytest.mark.slow)]
)
def test_mlflow_continues_the_run_of_this_name(finished, tmp_path, monkeypatch, store):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    for _ in range(2):
        assert trackers.push_runs([finished.name], ["mlflow"], tmp_path) == {finished.name: 2}
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for this client
    client = MlflowClient()
    home = client.get_experiment_by_name("questctl")
    runs = client.search_runs([home.experiment_id])
    assert [(r.info.run_name, r.info.status) for r in runs] == [(finished.name, "FINISHED")]
    assert runs[0].data.metrics["result.loss"] == pytest.approx(finished.result().loss)
    history = client.get_metric_history(runs[0].info.run_id, "train_loss nats per token")
    assert [(m.step, m.value) for m in history] == [
        (line["step"], line["train_loss(nats/token)"]) for line in finished.metrics()
    ]
    assert runs[0].data.params["quant.weights"] == str(finished.config().quant.weights)


def test_mlflow_takes_more_parameters_and_other_names_than_its_limits(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    tracker = trackers.MLflow()
    config = {f"quant.overrides.blocks.{i}.*.weights": "int4" for i in range(250)}
    tracker.begin("a-run", config, tmp_path)
    params = tracker._client.get_run(tracker._id).data.params
    assert len(params) == 250
    assert set(params.values()) == {"int4"}


def test_an_mlflow_server_that_does_not_answer_is_named_in_seconds(finished, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the port that discards
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    begun = time.monotonic()
    code, _, err = outcome("runs", "push", finished.name, "--to", "mlflow", "--runs", tmp_path)
    assert code == 1
    assert f"{finished.name}: mlflow failed" in " ".join(err.split())
    assert time.monotonic() - begun < 30
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


class FakeTrackio:
    """Prints and warns as trackio 0.43 does when its folder cannot be written."""

    @staticmethod
    def init(**_):
        print("* Trackio project initialized")

    @staticmethod
    def log(values, step=None):
        pass

    @staticmethod
    def finish():
        warnings.warn(
            "trackio failed to flush metric logs for run 'x': [Errno 20] Not a directory. User code will continue, but this "
            "batch could not be persisted.",
            stacklevel=1,
        )


def test_trackio_warns_of_what_it_loses_and_prints_on_stdout(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", FakeTrackio)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    code, out, err = outcome("runs", "push", finished.name, "--to", "trackio", "--runs", tmp_path, "--json")
    assert (code, json.loads(out)) == (1, [])
    failed = "trackio failed and is left out: trackio failed to flush metric logs for run 'x': [Errno 20] Not a directory."
    assert err == f"* Trackio project initialized\nerror: {finished.name}: {failed}\n"


class Unwritable:
    def __init__(self, folder, **_):
        raise PermissionError(13, "Permission denied", folder)


def test_push_names_each_run_that_a_tracker_did_not_take(finished, tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    other = RunStore(tmp_path).run(tiny.config(train__steps=4, train__seed=7).run_id)
    shutil.copytree(finished.path, other.path)
    monkeypatch.setattr(tensorboard, "SummaryWriter", Unwritable)
    code, out, err = outcome("runs", "push", finished.name, "--to", "tensorboard", "--runs", tmp_path)
    assert (code, out) == (1, "")
    reason = f"tensorboard failed and is left out: [Errno 13] Permission denied: '{tmp_path}/.tensorboard/{finished.name}'"
    assert err == f"error: {finished.name}: {reason}\n"


def test_push_goes_on_with_the_other_runs_and_trackers(recorder, finished, tmp_path):
    bad = tmp_path / finished.name.replace("s0", "s1")
    shutil.copytree(finished.path, bad)
    (bad / "config.json").write_text("{}")
    code, out, err = outcome("runs", "push", bad.name, finished.name, "--to", "recorder", "--runs", tmp_path, "--json")
    assert code == 1
    assert json.loads(out) == [{"run": finished.name, "to": ["recorder"], "log_steps": 2}]
    assert err.startswith(f"error: {bad}/config.json: ")
    assert err.count("\n") == 1
    code, out, err = outcome("runs", "push", finished.name, "--to", "recorder,broken", "--runs", tmp_path)
    assert (code, out) == (1, "")
    assert err == f"error: {finished.name}: broken failed and is left out: the server is gone\n"
    assert recorder.told[finished.name][-1] == ("close",)


def test_a_folder_that_cannot_be_written_is_a_failure(finished, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / ".tensorboard").write_text("a file where the folder would be")
    with pytest.raises(NotSent, match=f"{finished.name}: tensorboard failed and is left out: ") as e:
        trackers.push_runs([finished.name], ["tensorboard"], tmp_path)
    assert e.value.sent == {}


@pytest.mark.slow
def test_wandb_offline_writes_a_run(finished, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out.*")
        trackers.push(finished, ["wandb"])
    assert [p.name for p in (tmp_path / "wandb").glob("offline-run-*")] != []
    assert json.loads((finished.path / "result.json").read_text())["loss"] == finished.result().loss
