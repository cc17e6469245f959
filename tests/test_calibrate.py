"""Timing a second of steps: the estimate against the run itself, and what cannot be measured."""

from __future__ import annotations

import time

import pytest
import tiny

from questctl.store import RunStore
from questctl.sweep import calibrate as module
from questctl.sweep.calibrate import Calibration, calibrate, time_steps
from questctl.sweep.costs import flops_per_token, training_time
from questctl.sweep.estimate import estimate_run

CONFIG = tiny.config(train__eval_tokens=2000)


def test_models_are_timed_in_a_process_of_their_own():
    measured = calibrate([tiny.config(tiny.QUEST)], [1], at_a_time=2)
    (speed,) = measured.speeds
    assert (speed.scheme, speed.flops_per_token) == ("quest-w4a4", flops_per_token(CONFIG))
    assert speed.tokens_per_s > 0
    assert speed.spread >= module.LEAST_SPREAD
    assert measured.start_s > 0


def test_what_fits_into_no_memory_or_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "host_memory", lambda: 1000)
    assert calibrate([CONFIG], [1]) == Calibration()  # and no process is started
    monkeypatch.undo()
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    begin = time.monotonic()
    assert calibrate([CONFIG], [1]) == Calibration()
    assert time.monotonic() - begin < 2


def test_steps_are_timed_by_the_clock(monkeypatch):
    """Three quick steps and a slow one: the mean, and the block that is farthest from it."""
    from questctl.training.loop import Trainer

    now = [100.0]
    paces = iter([9.0] * module.WARM_UP + [0.2, 0.2, 0.2, 0.6])

    def step(self) -> None:
        now[0] += next(paces)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    tokens_per_s, spread, _ = time_steps(CONFIG, 1)
    assert tokens_per_s == pytest.approx(8 * 16 * 4 / 1.2)
    assert spread == pytest.approx(2)


@pytest.mark.slow
def test_the_estimate_of_a_tiny_run_is_within_a_factor_of_two_of_its_time(tmp_path):
    """The machine may be busier in one of the two than in the other, so the better of two tries counts."""
    from questctl.training import train

    ratios = []
    for seed in range(2):
        config = tiny.config(tiny.QUEST, train__steps=100, train__seed=seed, train__log_every=50, train__checkpoint_every=0)
        (speed,) = calibrate([config], [1]).speeds
        estimate = training_time(config, [speed])
        result = train(config, runs=tmp_path)
        ratios.append(result.seconds / estimate.likely)
    assert any(0.5 <= ratio <= 2 for ratio in ratios), ratios


def test_an_estimate_without_finished_runs_says_what_it_rests_on(tmp_path, monkeypatch):
    asked = []

    def planted(configs, threads, **options):
        asked.append(([c.quant.label for c in configs], threads, options))
        return Calibration((module.Speed("bf16", flops_per_token(CONFIG.with_vocabulary(16)), 100.0, 1.2),), 2.0)

    monkeypatch.setattr("questctl.sweep.estimate.calibrate", planted)
    estimate = estimate_run(CONFIG, tmp_path / "runs")
    tokens = CONFIG.tokens + 2000 / 3
    assert asked == [(["bf16"], [1], {"at_a_time": 1})]
    assert estimate.basis == "estimated from a second of steps of 1 model"
    assert estimate.seconds == pytest.approx(tokens / 100 + 2)
    assert (estimate.time.low, estimate.time.high) == pytest.approx((tokens / 120, tokens * 0.012 + 4))
    assert estimate.to_json()["seconds_high"] == estimate.time.high
    together = estimate_run(CONFIG, tmp_path / "runs", processes=2)  # cannot be timed by one process
    assert (together.time, together.seconds, together.to_json()["seconds"]) == (None, None, None)
    assert together.basis.startswith("unknown: ")
    assert not RunStore(tmp_path / "runs").runs()


def test_a_run_on_a_gpu_is_not_timed_on_the_cpu(tmp_path, monkeypatch):
    from questctl.sweep.slots import GPU

    monkeypatch.setattr(
        "questctl.sweep.estimate.calibrate", lambda configs, *_, **__: pytest.fail("timed") if configs else Calibration()
    )
    monkeypatch.setattr("questctl.sweep.estimate.visible_gpus", lambda: [GPU("0", "NVIDIA H200", 0)])
    assert estimate_run(CONFIG, tmp_path / "runs").time is None
