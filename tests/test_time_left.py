"""The time that a running sweep still takes: silent at first, then a range that holds the truth and narrows."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from test_cli_sweep import config

from questctl.sweep.costs import FINISHED_SPREAD, tokens_of_work
from questctl.sweep.outcomes import Outcome
from questctl.sweep.resource_rules import Resources
from questctl.sweep.sweep_file import Cell
from questctl.sweep.time_left import SETTLED_S, TimeLeft

STEPS = 1000
TOKENS = 8 * 32  # of a step


def cell(seed: int, **more: object) -> Cell:
    train = {"steps": STEPS, "batch_size": 8, "eval_tokens": 32, "seed": seed}
    c = config(preset="53K", data={"seq_len": 32, "source": "synthetic:markov"}, model={"vocab_size": 64}, train=train, **more)
    return Cell(c, {})


class Sweep:
    """Cells that train one after the other at a planted number of seconds a step, watched every half second."""

    def __init__(
        self, cells: list[Cell], seconds_a_step: float, *, start_s: float = 0.0, first_s: float = 0.0, noise: float = 0.0
    ):
        self.cells, self.pace, self.noise = cells, seconds_a_step, noise
        self.now, self.step, self.wait = 0.0, 0, start_s + first_s
        self.rate = math.exp(noise**2 / 2) / seconds_a_step  # the mean of the planted rates, steps a second
        self.done: list[str] = []
        self.dice = random.Random(0)
        self.left = TimeLeft(cells, clock=lambda: self.now)

    def watch(self, seconds: float):
        """The estimate after so many seconds more; a report comes every ten steps."""
        end, estimate = self.now + seconds, None
        while self.now < end - 1e-9:
            self.now += 0.5
            if self.wait > 0:
                self.wait -= 0.5
            else:
                self.step += 0.5 / self.pace * self.dice.lognormvariate(0, self.noise)
            if self.step >= STEPS:
                self.done.append(self.cells[len(self.done)].run_id)
                self.step = 0
            estimate = self.left(self.outcomes())
        return estimate

    def outcomes(self) -> list[Outcome]:
        rows = []
        for i, one in enumerate(self.cells):
            state = "done" if i < len(self.done) else "running" if i == len(self.done) else "pending"
            step = {"done": STEPS, "running": int(self.step) // 10 * 10, "pending": 0}[state]
            speed = TOKENS * self.rate if state == "done" else 1.0  # the speed in the files of a running cell is not used
            rows.append(Outcome(one.run_id, state, step, STEPS, 1, tokens_per_s=speed))
        return rows

    @property
    def truth(self) -> float:
        return (STEPS * (len(self.cells) - len(self.done)) - self.step) / self.rate + max(0.0, self.wait)


def test_nothing_is_said_before_a_cell_has_trained_for_a_while_beyond_its_start():
    sweep = Sweep([cell(1), cell(2)], 0.1, start_s=20, first_s=40)
    assert sweep.watch(60) is None  # importing, compiling
    assert sweep.watch(1 + SETTLED_S - 0.5) is None
    estimate = sweep.watch(4)
    assert estimate.low <= sweep.truth <= estimate.high
    assert estimate.high / estimate.low < 1.2  # although the first report came after a minute


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.8])
def test_the_range_holds_the_truth_and_narrows(noise):
    sweep = Sweep([cell(i) for i in range(4)], 0.1, start_s=3, noise=noise)
    ratios = []
    for seconds in (12, 30, 40):
        estimate = sweep.watch(seconds)
        assert estimate.low / 1.05 <= sweep.truth <= estimate.high * 1.05
        ratios.append(estimate.high / estimate.low)
    assert ratios[-1] <= ratios[0]
    assert ratios[-1] < 1.5


def test_cells_that_are_done_stand_for_those_like_them():
    sweep = Sweep([cell(i) for i in range(3)], 0.1)
    estimate = sweep.watch(100)
    assert len(sweep.done) == 1
    assert estimate.likely == pytest.approx(2 * 0.1 * tokens_of_work(cell(0).config) / TOKENS, rel=0.1)
    assert estimate.high / estimate.low == pytest.approx(FINISHED_SPREAD**2)


def test_several_at_a_time_share_what_remains():
    cells = [cell(i) for i in range(4)]
    now = [0.0]
    left = TimeLeft(cells, clock=lambda: now[0])
    for _ in range(40):
        now[0] += 0.5
        step = int(now[0] * 10)
        states = [("running", step), ("running", step), ("pending", 0), ("pending", 0)]
        outcomes = [Outcome(c.run_id, s, k, STEPS, 1) for c, (s, k) in zip(cells, states, strict=True)]
        estimate = left(outcomes)
    assert estimate.likely == pytest.approx(2 * 100 - 20, rel=0.02)
    assert left.of(outcomes[0]).likely == pytest.approx(80, rel=0.02)
    assert left.of(outcomes[2]) is None
    now[0] += 0.5
    gap = [Outcome(cells[0].run_id, "pending", step, STEPS, 1), *outcomes[1:]]  # one is between two processes
    assert left(gap).likely == pytest.approx(180, rel=0.1)


def test_a_new_attempt_is_measured_anew():
    one = cell(1)
    now = [0.0]
    left = TimeLeft([one], clock=lambda: now[0])

    def watch(attempt: int, first: int, pace: float, seconds: float):
        begin = now[0]
        while now[0] < begin + seconds:
            now[0] += 0.5
            estimate = left([Outcome(one.run_id, "running", first + int((now[0] - begin) / pace), STEPS, attempt)])
        return estimate

    assert watch(1, 0, 0.1, 20).likely == pytest.approx(80, rel=0.02)
    assert watch(2, 150, 0.5, 4) is None
    assert watch(2, 158, 0.5, 20).likely == pytest.approx(0.5 * (STEPS - 198), rel=0.05)


def test_cells_of_two_processes_take_two_places_and_are_no_measure_of_one_for_others():
    """Two of two processes and two of one, on two places: what one process does in a second is the same in all."""
    wide = [replace(cell(i), resources=Resources(nproc=2)) for i in range(2)]
    narrow = [cell(i) for i in (2, 3)]
    now = [0.0]
    left = TimeLeft([*wide, *narrow], clock=lambda: now[0])
    for _ in range(40):
        now[0] += 0.5
        rows = [(wide[0], "running", int(now[0] * 18)), (wide[1], "pending", 0), *((c, "pending", 0) for c in narrow)]
        estimate = left([Outcome(c.run_id, state, step, STEPS, 1) for c, state, step in rows])
    rest = 2 * STEPS / 18 - now[0]  # the two wide ones, one after the other
    assert estimate.likely == pytest.approx(rest + STEPS / 10, rel=0.02)  # then the narrow ones beside each other
