"""Interleaved timing: order, rotation, percentiles and ratios, on calls whose cost is known."""

import numpy as np
import pytest
import torch

from questctl.kernels import timing
from questctl.kernels.timing import MIN_ROUNDS, Timing, measure, percentiles, speed_up

CPU = torch.device("cpu")


class Clock:
    """A clock that only calls move, so that a busy machine cannot fail the test."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        self.now += 10
        return self.now

    def perf_counter(self) -> float:
        return self.perf_counter_ns() / 1e9

    def busy(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_percentiles_are_numpys():
    samples = list(np.random.default_rng(0).exponential(size=37))
    np.testing.assert_allclose(percentiles(samples), np.percentile(samples, [20, 50, 80]))
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)


def test_a_known_cost_and_a_known_ratio(clock):
    times = measure({"slow": lambda i: clock.busy(4e-3), "fast": lambda i: clock.busy(1e-3)}, CPU, seconds=0.05)
    assert times["slow"].p50_us == pytest.approx(4000, rel=1e-3)
    assert times["fast"].p50_us == pytest.approx(1000, rel=1e-3)
    low, middle, high = speed_up(times["fast"], times["slow"])
    assert low <= middle <= high
    assert middle == pytest.approx(4.0, rel=1e-3)
    assert speed_up(times["slow"], times["slow"]) == (1.0, 1.0, 1.0)


def test_ratios_are_formed_within_rounds():
    drifting = [100.0, 200.0, 400.0, 800.0]  # a machine that slows down by 8 still shows a steady ratio
    quick, slow = (Timing(tuple(f * x for x in drifting), "perf_counter") for f in (1, 2))
    assert speed_up(quick, slow) == (2, 2, 2)


def test_candidates_take_turns_and_change_sides(clock):
    order = []

    def call(name):
        def run(i):
            order.append(name)
            clock.busy(2.5e-3)  # longer than a round, so that a round is one call

        return run

    measure({"a": call("a"), "b": call("b"), "c": call("c")}, CPU, seconds=0)
    rounds = "".join(order[-3 * MIN_ROUNDS :])
    assert [rounds[i : i + 3] for i in range(0, len(rounds), 3)] == [("abc", "cba")[i % 2] for i in range(MIN_ROUNDS)]


def test_short_calls_are_repeated_and_inputs_rotate(clock):
    seen = []

    def quick(i):
        seen.append(i)
        clock.busy(1e-5)

    times = measure({"quick": quick}, CPU, seconds=0.02, rotations=5)
    assert len(times["quick"].samples_us) >= MIN_ROUNDS
    assert len(seen) > 100 * MIN_ROUNDS
    assert seen[:5] == [0, 1, 2, 3, 4]  # the warm-up sees all
    assert set(np.bincount(seen)[1:]) <= {n := seen.count(1), n - 1, n + 1}
    assert times["quick"].p50_us == pytest.approx(10, rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("graph", [True, False])
def test_a_copy_on_the_gpu_takes_its_time(graph):
    device = torch.device("cuda")
    x = [torch.randn(1 << 24, device=device) for _ in range(4)]
    times = measure({"copy": lambda i: x[i].clone()}, device, seconds=0.1, rotations=4, graph=graph)
    assert 10 < times["copy"].p50_us < 1000
