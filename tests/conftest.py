"""What all tests share: the interpreter of Triton, a cache of tokens, and runs that several files look at."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# Triton reads it when it is first imported
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# `nohup make test` ignores it in all its processes, and with it the tests of what SIGHUP does to a run.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A shared machine may stop a process for longer than hypothesis allows an example; what an example takes is not the property.
settings.register_profile("questctl", deadline=None)
settings.load_profile("questctl")


@pytest.fixture(autouse=True, scope="session")
def tokens_of_this_session(tmp_path_factory):
    """Token files are cached for these tests alone, in the processes that they start too."""
    os.environ["QUESTCTL_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True)
def estimates_time_no_models(monkeypatch):
    """Estimates rest on finished runs alone, unless a test plants a measurement: each would load torch in another process."""
    from questctl.sweep.calibrate import Calibration

    monkeypatch.setattr("questctl.sweep.estimate.calibrate", lambda *_, **__: Calibration())


_OPTIMA: dict[tuple, tuple] = {}


@pytest.fixture(scope="module")
def each_fit_once():
    """A law is fitted to the same points once in all such tests of this process: for tests of what is done with fits."""
    from questctl.analysis import choice, fit

    real = fit.optimum

    def optimum(points, law, **settings):
        values = [getattr(points, field.name) for field in dataclasses.fields(points)]
        key = (repr(law), repr(settings), *(v.tobytes() if isinstance(v, np.ndarray) else repr(v) for v in values))
        if key not in _OPTIMA:
            _OPTIMA[key] = law, real(points, law, **settings)  # the law is kept, and with it what its repr says
        return _OPTIMA[key][1]

    with pytest.MonkeyPatch.context() as patch:
        for module in (choice, fit):
            patch.setattr(module, "optimum", optimum)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one run in full precision, trained for a second."""
    import tiny
    import torch

    from questctl.training.loop import train

    root = tmp_path_factory.mktemp("runs")
    train(tiny.config(train__steps=60), runs=root)
    torch.set_num_threads(1)
    return root


@pytest.fixture
def source(runs):
    """That run."""
    import tiny

    from questctl.store import RunStore

    return RunStore(runs).run(tiny.config(train__steps=60).run_id)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """changes → (loaded run, its weights as exports read them, tokens (n, T)); each is trained once, for a few steps."""
    import tiny
    import torch

    from questctl.data.sampler import validation_windows
    from questctl.export.weights import weights
    from questctl.store import RunStore
    from questctl.training.loading import load
    from questctl.training.loop import train

    root, known = tmp_path_factory.mktemp("runs"), {}

    def get(changes):
        c = tiny.config({"train.steps": 4, **changes})
        if c.run_id not in known:
            train(c, runs=root)
            loaded = load(RunStore(root).run(c.run_id))
            tokens = torch.from_numpy(validation_windows(loaded.data.val, 16, 512))[:, :-1]
            known[c.run_id] = loaded, weights(loaded.model, c), tokens
        return known[c.run_id]

    return get


def pytest_terminal_summary(terminalreporter) -> None:
    """The counts of the fault suite, and which tests were skipped because measured data is absent."""
    import shared_data
    import tally

    skips = [
        str(report.longrepr[-1]) for report in terminalreporter.stats.get("skipped", []) if isinstance(report.longrepr, tuple)
    ]
    for line in [*tally.summary(), *shared_data.summary(skips)]:
        terminalreporter.write_line(line)
