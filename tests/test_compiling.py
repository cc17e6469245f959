"""Which runs are compiled: a rule of the config alone, the same for all attempts of a run, and counted in estimates."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import tiny
import torch

from questctl.config import Layer, resolve
from questctl.config.presets import PRESETS
from questctl.errors import Preempted
from questctl.store import RunStore
from questctl.sweep import estimate
from questctl.sweep.costs import TimeRange
from questctl.training import compiling
from questctl.training.compiling import code_folder, compiles, cost_s, path_of, saving_s
from questctl.training.loop import train


def preset(name, **changes):
    keys = {("preset",): name} | {tuple(key.split("__")): value for key, value in changes.items()}
    return resolve([Layer("test", keys)]).config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_at_their_own_lengths_stay_eager_on_a_cpu(name):
    """So that their losses are what they were; on a GPU they are compiled."""
    for method, bits in (("bf16", None), ("quest", 4)):
        c = preset(name, quant__method=method, **({"quant__bits": bits} if bits else {}))
        assert not compiles(c, "cpu")
        assert compiles(c, "cuda")


def test_a_long_run_of_a_measured_model_is_compiled():
    long = preset("107K", quant__method="bf16", train__tokens=10**9)
    seconds = 0.8 * 10**9 * (1 / 46e3 - 1 / 61e3)  # a fifth less than was measured of this model
    assert saving_s(long) == pytest.approx(seconds, rel=1e-3)
    assert seconds > max(compiling.LEAST_SAVING_S, compiling.MARGIN * cost_s(long))
    assert compiles(long, "cpu")
    assert not compiles(preset("107K", quant__method="bf16", train__tokens=10**9, train__compile="off"), "cpu")
    assert compiles(preset("107K", train__compile="on"), "cpu")
    enough = 10**9 * compiling.LEAST_SAVING_S / seconds
    assert [compiles(preset("107K", quant__method="bf16", train__tokens=int(f * enough)), "cpu") for f in (0.99, 1.01)] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"quant__method": "quest", "quant__bits": 4},
        {"quant__gradients": "int8-absmax-ste"},
        {"train__precision": "bf16"},
        {"model__d_model": 192},
    ],
)
def test_models_whose_saving_was_not_measured_stay_eager(changes):
    c = preset("107K", **{"quant__method": "bf16", "train__tokens": 10**9} | changes)
    assert saving_s(c) == 0
    assert not compiles(c, "cpu")


def test_all_attempts_take_the_path_that_the_run_began_with():
    auto, on, off = (tiny.config(train__compile=mode) for mode in ("auto", "on", "off"))
    on_cpu, on_gpu = {"attempts": [{"gpu": None}]}, {"attempts": [{"gpu": "H200"}]}
    assert [path_of(c, {}, "cpu") for c in (auto, on, off)] == [False, True, False]
    assert path_of(on, {**on_cpu, "compiled": False}, "cpu") is False  # the compiler failed in the first attempt
    assert path_of(auto, {**on_cpu, "compiled": True}, "cpu") is True
    assert path_of(auto, {**on_gpu, "compiled": True}, "cpu") is False  # another device is another path
    long = preset("107K", quant__method="bf16", train__tokens=10**9)
    assert path_of(long, {}, "cpu") is True
    assert path_of(long, on_cpu, "cpu") is False  # it began before there was a rule
    assert [path_of(c, on_gpu, "cuda") for c in (auto, on, off)] == [True, True, False]


def test_the_path_is_recorded_and_a_failed_compiler_is_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def compiler(model):
        asked.append(1)

        def call(*inputs):
            raise NotImplementedError("no such operator")

        return call

    monkeypatch.setattr(torch, "compile", compiler)
    c, steps = tiny.config(train__compile="on"), iter(range(100))
    run = RunStore(tmp_path).run(c.run_id)
    with pytest.warns(UserWarning, match="torch.compile fails"), pytest.raises(Preempted):
        train(c, runs=tmp_path, stop=lambda: next(steps) >= 5)
    assert run.env()["compiled"] is False
    assert asked == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = train(c, runs=tmp_path)
    assert asked == [1]
    plain = train(tiny.config(), runs=tmp_path / "plain")
    assert resumed.loss == plain.loss
    assert RunStore(tmp_path / "plain").run(c.run_id).env()["compiled"] is False


def test_a_run_that_began_compiled_goes_on_compiled(tmp_path, monkeypatch):
    asked, steps = [], iter(range(100))
    monkeypatch.setattr(torch, "compile", lambda model: asked.append(1) or model.forward)
    c = tiny.config(train__compile="on")
    with pytest.raises(Preempted):
        train(c, runs=tmp_path, stop=lambda: next(steps) >= 5)
    assert RunStore(tmp_path).run(c.run_id).env()["compiled"] is True
    train(tiny.config(), runs=tmp_path)
    assert len(asked) == 2


def test_compiled_code_is_kept_with_the_other_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    train(tiny.config(train__compile="on", train__steps=1), runs=tmp_path / "runs")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(code_folder())
    assert code_folder().parent == tmp_path / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    compiling.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    before = code_folder()
    monkeypatch.setattr("questctl.kernels.native.processor", lambda: "another")
    assert code_folder() != before
    monkeypatch.setenv("QUESTCTL_CACHE", "/proc/none")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiling.keep_compiled_code()  # where nothing can be written, torch chooses
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_what_a_run_takes_counts_its_compilation(monkeypatch):
    plain = preset("107K", quant__method="bf16", train__tokens=10**9)
    cost = cost_s(plain)
    found = estimate.compiled_time(plain, TimeRange(1000, 2000, 3000))
    assert found == TimeRange(pytest.approx(880 + cost), pytest.approx(1760 + cost), 3000 + 2 * cost)
    quest = preset("107K", quant__method="quest", quant__bits=4, train__compile="on")
    assert estimate.compiled_time(quest, TimeRange(1000, 2000, 3000)).likely == 2000 + cost  # what it saves is unknown


def test_a_dry_run_says_that_a_run_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate.costs, "training_time", lambda *_, **__: TimeRange(1.0, 2.0, 3.0))
    monkeypatch.setattr(estimate, "trains_on_gpu", lambda _: False)
    eager, on = (estimate.estimate_run(tiny.config(train__compile=mode), tmp_path) for mode in ("auto", "on"))
    assert (eager.compiled, eager.seconds) == (False, 2.0)
    assert on.compiled
    assert on.seconds == pytest.approx(0.88 * 2.0 + 20 + 2 * 10)
    assert "compiled, which takes about 40 s of it" in on.basis
    assert on.to_json()["compiled"] is True


SECOND = """
import sys
import tiny
from torch._dynamo.utils import counters
from questctl.training.loop import train
train(tiny.config(train__compile="on", train__steps=1, train__seed=int(sys.argv[1])), runs=sys.argv[2])
aot, inductor = counters["aot_autograd"], counters["inductor"]
print(aot["autograd_cache_hit"] + inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_has_compiled(tmp_path):
    """As the cells of a sweep do, which differ in their seed."""
    environment = {**os.environ, "QUESTCTL_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-c", SECOND]
    (hits, misses), again = (
        map(int, subprocess.check_output([*command, seed, str(tmp_path / "runs")], env=environment, text=True).split()[-2:])
        for seed in ("0", "1")
    )
    assert (hits, misses > 0) == (0, True)
    more, none = again
    assert (more > 0, none) == (True, 0)
