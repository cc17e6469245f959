"""Early stopping of sweeps: which cells are compared, which gaps stop a cell, and how a stopped cell is resumed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import sweep_trainers
import tiny
from sweep_trainers import result_of, traced

from questctl.analysis.tables import PointError
from questctl.config import Layer, resolve
from questctl.errors import UsageError
from questctl.metrics import STEP, TRAIN_LOSS
from questctl.scaling import load_sources
from questctl.scaling.stopping import Windows, decide, gap
from questctl.store import RunStore
from questctl.store.listing import list_runs
from questctl.sweep import LauncherOptions, worker
from questctl.sweep import stopping as module
from questctl.sweep.launchers.local import launch
from questctl.sweep.manifest import Sweep, join, open_sweep
from questctl.sweep.outcomes import OutcomeReader, read_outcome, read_outcomes, reset
from questctl.sweep.run import estimate_sweep, run_sweep
from questctl.sweep.stop_rule import StopRule
from questctl.sweep.stopping import GO_ON, RELEASED, STOP, WITHDRAWN, Stopping, group_key, model_bits, reopen, replicas
from questctl.sweep.sweep_file import Cell, SweepFile, parse_sweep_file

RACE = "sweep_trainers:race"
RATES = (1e-3, 2e-3, 8e-3, 5e-4)  # the first is the best: `sweep_trainers.planted`
BASE = {
    "model.d_model": 64,
    "model.n_head": 1,
    "train.steps": 100,
    "train.log_every": 1,
    "train.batch_size": 2,
    "data.seq_len": 8,
    "optim.schedule": "wsd",
    "optim.lr": 1e-3,
}


def cell(**values: object) -> Cell:
    keys = {key.replace("__", "."): value for key, value in values.items()}
    config = resolve([Layer("test", {tuple(k.split(".")): v for k, v in (BASE | keys).items()})]).config
    return Cell(config, keys)


def train(store: RunStore, one: Cell, loss, *, share: float = 1.0, state: str = "running"):
    """A run of `one` with the training loss `loss(t)` at the share t of its steps, up to `share`."""
    run, steps = store.run(one.run_id), one.config.train.steps
    with run.open_for_training(one.config) as writer:
        writer.begin(step=0, steps=steps, env={"data_hash": "0", "threads": 1, "attempt": {}})
        for step in range(1, round(share * steps) + 1):
            writer.log({STEP: step, TRAIN_LOSS: loss(step / steps)}, {STEP: step})
        if state == "done":
            writer.finish(result_of(one.config, loss=loss(1.0), train_loss=loss(1.0), model_bits=model_bits(one.config)))
        else:
            writer.set_state(state, round(share * steps))
    return run


def curve(level: float, late: float = 0.0, noise: float = 0.0):
    """2.5 · (1 + 0.1 · t^-.5), times 1 + `level`, which changes to 1 + level + late; `noise` is common to all curves."""
    return lambda t: (
        2.5 * (1 + 0.1 * t**-0.5) * (1 + level + late * max(0.0, t - 0.4) / 0.6) * math.exp(noise * math.sin(1e4 * t))
    )


def verdict(store: RunStore, cells, one: Cell, mark: int = 40, **rule: object) -> dict:
    return decide(Stopping(StopRule(**rule), tuple(cells)), one, store.run(one.run_id), mark)


# --- what stops a cell


@pytest.mark.parametrize(
    ("level", "late", "stops"),
    [(0.1, 0.0, True), (0.05, -0.02, True), (0.1, -0.05, True), (0.02, 0.0, False), (0.01, 0.3, False), (-0.05, 0, False)],
)
def test_a_cell_is_stopped_where_it_is_far_behind_and_its_planted_end_lies_in_the_interval(tmp_path, level, late, stops):
    store, best, other = RunStore(tmp_path), cell(optim__lr=2e-3), cell(optim__lr=1e-3)
    train(store, best, curve(0, noise=0.02), state="done")
    train(store, other, curve(level, late, noise=0.02), share=0.45)
    said = verdict(store, [best, other], other)
    assert (said["verdict"] == STOP, said["by"], said["against"]) == (stops, best.run_id, "knobs")
    if abs(late) < 0.1:  # what no curve shows before it happens is in no interval
        assert said["gap"][0] < curve(level + late)(1.0) - curve(0)(1.0) < said["gap"][2]
    if stops:
        assert said["low"] < curve(level + late)(1.0) < said["high"]
        now = float(said["reason"].removeprefix("At step 40/100 it was ").split()[0])
        assert now == pytest.approx(2.5 * level * (1 + 0.1 * 0.35**-0.5), rel=0.1)


def test_noise_that_two_cells_share_cancels_and_noise_of_its_own_keeps_a_cell(tmp_path):
    store, best, other = RunStore(tmp_path), cell(optim__lr=2e-3), cell(optim__lr=1e-3)
    train(store, best, curve(0, noise=0.3), state="done")
    train(store, other, curve(0.08, noise=0.3), share=0.4)
    assert verdict(store, [best, other], other)["verdict"] == STOP
    store = RunStore(tmp_path / "own")
    train(store, best, curve(0), state="done")
    train(store, other, curve(0.08, noise=0.3), share=0.4)
    assert verdict(store, [best, other], other)["verdict"] == GO_ON


def test_a_high_rate_that_still_falls_is_given_what_its_fall_may_gain():
    a, b = cell(optim__lr=8e-3).config, cell(optim__lr=1e-3).config
    places = [i / 100 for i in range(31, 41)]
    here, there = (Windows(dict.fromkeys(places, level), dict.fromkeys(places, level)) for level in (math.log(1.07), 0.0))
    lower, higher = gap(here, there, b, a, 0.4, 0.9), gap(here, there, a, b, 0.4, 0.9)
    assert lower.now == higher.now == pytest.approx(math.log(1.07))
    assert lower.low > 0 > higher.low
    flat = cell(optim__lr=8e-3, optim__schedule="constant").config
    assert gap(here, there, flat, b, 0.4, 0.9).low == pytest.approx(lower.low), "a constant rate does not fall"
    assert gap(here, there, a, b, 0.9, 0.9).low > 0, "little is left of the run"


def test_a_cell_that_catches_up_is_kept_and_one_that_falls_behind_is_not(tmp_path):
    def catching_up(t: float) -> float:
        return curve(0)(t) * math.exp(0.15 + 1.5 * (0.4 - t))

    store, best, other = RunStore(tmp_path), cell(optim__lr=2e-3), cell(optim__lr=1e-3)
    train(store, best, curve(0), state="done")
    train(store, other, catching_up, share=0.4)
    said = verdict(store, [best, other], other)
    assert said["verdict"] == GO_ON
    assert said["gap"][0] < 0 < said["gap"][1] < math.expm1(said["now"]) * curve(0)(0.35)
    train(store, other, lambda t: catching_up(0.7 - t) * curve(0)(t) / curve(0)(0.7 - t), share=0.4)
    assert verdict(store, [best, other], other)["verdict"] == STOP


def test_the_verdict_depends_on_the_lines_before_the_mark_and_not_on_the_order_of_cells(tmp_path):
    store, cells = RunStore(tmp_path), [cell(optim__lr=lr) for lr in RATES]
    for i, one in enumerate(cells):
        train(store, one, curve(0.05 * i), state="done" if i == 0 else "running", share=1 if i == 0 else 0.4)
    first = verdict(store, cells, cells[3])
    train(store, cells[3], curve(0.15, late=-0.9), share=0.9)  # whatever it does later
    assert verdict(store, cells[::-1], cells[3]) == first
    assert verdict(store, cells, cells[3], mark=90) != first


def test_alternatives_differ_in_knobs_alone_and_seeds_are_none():
    one = cell().config
    for knob in ({"optim__lr": 4e-3}, {"optim__schedule": "cosine"}, {"train__seed": 3}, {"optim__name": "muon"}):
        assert group_key(cell(**knob).config) == group_key(one)
    assert group_key(cell(train__batch_size=4, train__steps=50).config) == group_key(one)
    for other in (
        {"train__steps": 50},
        {"model__n_layer": 2},
        {"quant__method": "quest", "quant__bits": 4, "quant__block": 32},
        {"data__seq_len": 16},
    ):
        assert group_key(cell(**other).config) != group_key(one)
    assert replicas(one, cell(train__seed=3).config)
    assert not replicas(one, cell(train__seed=3, optim__lr=4e-3).config)


def test_no_seed_beats_another_and_a_worse_rate_is_beaten_by_every_seed(tmp_path):
    store = RunStore(tmp_path)
    lucky, unlucky, worse = cell(train__seed=1), cell(train__seed=2), cell(train__seed=2, optim__lr=5e-4)
    train(store, lucky, curve(0), state="done")
    train(store, unlucky, curve(0.2), share=0.4)
    train(store, worse, curve(0.5), share=0.4)
    cells = [lucky, unlucky, worse]
    assert verdict(store, cells, unlucky, against=("knobs",))["verdict"] == GO_ON
    assert verdict(store, cells, worse, against=("knobs",))["by"] == lucky.run_id


def test_a_cell_that_a_model_of_no_more_bits_beats_cannot_touch_the_frontier(tmp_path):
    store = RunStore(tmp_path)
    big, small = cell(quant__method="bf16"), cell(quant__method="quest", quant__bits=4, quant__block=32)
    longer = cell(quant__method="quest", quant__bits=2, quant__block=32, train__steps=400)
    train(store, small, curve(0), state="done")
    train(store, longer, curve(-0.5), state="done")
    train(store, big, curve(0.1), share=0.4)
    said = verdict(store, [big, small, longer], big)
    assert (said["verdict"], said["against"], said["by"], said["of"]) == (STOP, "frontier", small.run_id, 1)
    assert said["reason"].startswith("It cannot touch the frontier: at step 40/100")
    assert verdict(store, [big, small, longer], big, against=("knobs",))["verdict"] == GO_ON
    assert verdict(store, [big, small], small)["verdict"] == GO_ON
    train(RunStore(tmp_path / "b"), big, curve(0), state="done")
    train(RunStore(tmp_path / "b"), small, curve(0.5), share=0.4)
    assert verdict(RunStore(tmp_path / "b"), [big, small], small)["reason"].startswith("no cell to compare")


@pytest.mark.parametrize("state", ["failed", "diverged", "stopped", "pending"])
def test_runs_that_did_not_hold_are_nobody_s_measure(tmp_path, state):
    store, best, other = RunStore(tmp_path), cell(optim__lr=2e-3), cell()
    train(store, other, curve(0.5), share=0.4)
    if state == "pending":
        assert verdict(store, [best, other], other)["verdict"] == GO_ON
    train(store, best, curve(0), share=0.39 if state == "pending" else 0.8, state=state)
    assert verdict(store, [best, other], other)["verdict"] == (STOP if state == "pending" else GO_ON)


def test_too_few_lines_are_no_reason_to_stop_a_run(tmp_path):
    store, best, other = RunStore(tmp_path), cell(optim__lr=2e-3), cell()
    train(store, best, curve(0), state="done")
    run = train(store, other, curve(0.5), share=0.02)
    sweep = Stopping(StopRule(), (best, other))
    worker.load_trainer(module.JUDGE)(sweep, other, run, 40)
    assert run.last_verdict()["verdict"] == GO_ON
    assert "set train.log_every lower" in run.last_verdict()["reason"]


# --- when it is asked


def test_marks_and_the_last_one_that_a_run_has_passed(tmp_path):
    assert StopRule().marks(100) == [40, 50, 60, 70, 80, 90]
    assert StopRule(after=0.5, every=0.25).marks(7) == [4, 5]
    store, one = RunStore(tmp_path), cell()
    run, sweep = train(store, one, curve(0), share=0.65), Stopping(StopRule(), (one,))
    assert sweep.due(one, run) == 60
    run.add_verdict({STEP: 60, "verdict": GO_ON})
    assert (sweep.due(one, run), sweep.judged(run)) == (None, 60)


def test_what_others_need_and_what_is_quantized_late_is_never_stopped(tmp_path):
    tree = {
        "base": {"preset": "53K", "train": {"log_every": 1}},
        "matrix": {"train": {"steps": [50, 100]}, "scheme": [{"quant": {"method": "bf16"}}]},
        "trunk": {"warmup": 5},
        "stop": {},
    }
    cells = parse_sweep_file(tree, Path("f.toml")).cells
    sweep, store = Stopping(StopRule(), cells), RunStore(tmp_path)
    branch, trunk = cells
    assert sweep.exempt(trunk, store.run(trunk.run_id)) == "it is the trunk of others"
    assert sweep.exempt(branch, store.run(branch.run_id)) == ""
    assert "keeps" in Stopping(StopRule(), (trunk,)).exempt(trunk, store.run(trunk.run_id)), "its branches are of other sweeps"
    late = cell(quant__method="quest", quant__bits=4, quant__block=32, quant__start=0.5)
    assert "late" in Stopping(StopRule(), (late,)).exempt(late, store.run(late.run_id))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"after": 1.5}, ["stop.after", "1.5"]),
        ({"agianst": ["knobs"]}, ["stop.agianst"]),
        ({"against": ["loss"]}, ["stop.against", "loss"]),
        ({"against": []}, ["stop.against"]),
        ({"margin": "wide"}, ["stop.margin", "wide"]),
    ],
)
def test_a_wrong_key_of_stop_is_named(table, words):
    with pytest.raises(UsageError) as refused:
        parse_sweep_file({"base": {"preset": "53K"}, "stop": table}, Path("f.toml"))
    assert all(word in str(refused.value) for word in ("f.toml", *words)), refused.value


# --- the sweep


def no_law(*_: object) -> None:
    raise PointError("no law in this test")


def racers(rates, steps: int = 60) -> list[Cell]:
    return [cell(optim__lr=lr, train__steps=steps) for lr in rates]


@pytest.fixture
def trace(tmp_path, monkeypatch):
    monkeypatch.setenv("SWEEP_TRACE", str(tmp_path / "trace"))
    monkeypatch.setattr(sweep_trainers, "PACE", 0.02)
    monkeypatch.setattr("questctl.scaling.stopping.fit_curves", no_law)  # which takes as long as half of such a run
    return tmp_path / "trace"


def race(cells, runs, **rule):
    stopping = Stopping(StopRule(**{"against": ("knobs",), **rule}), tuple(cells))
    worker.drain(cells, runs, threads=1, trainer=RACE, poll_s=0.02, stopping=stopping)


def ends(cells, runs) -> dict[float, str]:
    return {c.config.optim.lr: o.state for c, o in zip(cells, OutcomeReader(cells, RunStore(runs))(), strict=True)}


@pytest.mark.parametrize("order", [-1, pytest.param(1, marks=pytest.mark.slow)])
def test_losers_stop_at_their_first_look_in_whatever_order_they_stand(tmp_path, trace, order):
    cells = racers(RATES)[::order]
    race(cells, tmp_path / "runs")
    assert ends(cells, tmp_path / "runs") == {1e-3: "done", 2e-3: "stopped", 8e-3: "stopped", 5e-4: "stopped"}
    for c in cells:
        outcome = read_outcome(c, RunStore(tmp_path / "runs").run(c.run_id))
        if outcome.state == "stopped":
            assert outcome.forecast_low < sweep_trainers.planted(c.config, 60) < outcome.forecast_high
            assert outcome.settled
            assert "is forecast to end" in outcome.message
            assert 24 <= outcome.step < 60
    before = traced(trace)
    race(cells, tmp_path / "runs")
    assert traced(trace) == before, "nothing is trained twice"


def test_stopped_cells_go_on_where_the_sweep_has_no_stop_and_are_not_stopped_again(tmp_path, trace):
    cells, runs = racers(RATES[:2]), tmp_path / "runs"
    race(cells, runs)
    loser = RunStore(runs).run(cells[1].run_id)
    at = loser.status().step
    assert reset(cells, RunStore(runs), ("stopped",)) == [cells[1]]
    race(cells, runs)  # even though this sweep has [stop]
    assert ends(cells, runs) == {1e-3: "done", 2e-3: "done"}
    assert [line["verdict"] for line in loser.verdicts()][-2:] == [STOP, RELEASED]
    assert [s[2] for s in traced(trace) if s[0] == loser.name].count(at) == 1, "it went on from its checkpoint"


def test_a_verdict_whose_worker_died_is_carried_out_by_the_next_without_training(tmp_path, trace):
    one, other, store = cell(), cell(optim__lr=4e-3), RunStore(tmp_path / "runs")
    train(store, other, curve(0), state="done")
    run = train(store, one, curve(0.5), share=0.4, state="preempted")
    run.add_verdict({STEP: 40, "verdict": STOP, "reason": "too slow", "by": other.run_id})
    race([one, other], tmp_path / "runs")
    assert run.state() == "stopped"
    assert traced(trace) == []


def test_a_sweep_whose_worker_is_killed_ends_as_it_would_have(tmp_path, trace):
    cells, runs = racers(RATES[:3]), tmp_path / "runs"
    doomed = multiprocessing.get_context("fork").Process(target=race, args=(cells, runs))
    doomed.start()
    while len(traced(trace)) < 45:  # one cell was put off, another one is under way
        time.sleep(0.01)
    doomed.kill()
    doomed.join()
    race(cells, runs)
    assert ends(cells, runs) == {1e-3: "done", 2e-3: "stopped", 8e-3: "stopped"}
    assert {s[2] for s in traced(trace) if s[0] == cells[0].run_id} == set(range(60))


def kills_itself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_judge_that_dies_stops_nothing(tmp_path, trace, monkeypatch):
    cells = racers(RATES[:2])
    monkeypatch.setattr("questctl.scaling.stopping.judge", kills_itself)
    race(cells, tmp_path / "runs")
    assert set(ends(cells, tmp_path / "runs").values()) == {"done"}


def test_two_cells_that_stop_each_other_both_go_on(tmp_path):
    a, b, store = cell(optim__lr=1e-3), cell(optim__lr=2e-3), RunStore(tmp_path)
    for one, other in ((a, b), (b, a)):
        train(store, one, curve(0), share=0.4, state="stopped").add_verdict(
            {STEP: 40, "verdict": STOP, "reason": "", "by": other.run_id}
        )
    assert set(reopen((a, b), read_outcomes((a, b), store), store)) == {a.run_id, b.run_id}
    assert {store.run(c.run_id).state() for c in (a, b)} == {"pending"}
    assert store.run(a.run_id).last_verdict()["verdict"] == WITHDRAWN
    assert reopen((a, b), read_outcomes((a, b), store), store) == []


@pytest.mark.parametrize(("state", "opened"), [("done", False), ("running", False), ("diverged", True), ("failed", True)])
def test_a_verdict_holds_as_long_as_the_run_ahead_does(tmp_path, state, opened):
    ahead, middle, last, store = cell(optim__lr=1e-3), cell(optim__lr=2e-3), cell(optim__lr=4e-3), RunStore(tmp_path)
    train(store, ahead, curve(0), share=0.8, state=state)
    for one, by in ((middle, ahead), (last, middle)):
        train(store, one, curve(1), share=0.4, state="stopped").add_verdict(
            {STEP: 40, "verdict": STOP, "reason": "", "by": by.run_id}
        )
    cells = (ahead, middle, last)
    assert bool(reopen(cells, read_outcomes(cells, store), store)) == opened
    assert store.run(middle.run_id).state() == ("pending" if opened else "stopped")


# --- what others see


def test_a_sweep_remembers_its_rule_and_one_without_is_written_as_before(tmp_path):
    for stop in (None, StopRule(after=0.5)):
        sweep = Sweep(SweepFile("s", "", (cell(),), {}, stop), RunStore(tmp_path / "runs"))
        join(sweep, [tiny_cell()], force=True)
        assert ("stop" in json.loads(sweep.manifest_path.read_text())) == (stop is not None)
        assert open_sweep(sweep.folder).file.stop == stop


def tiny_cell(**changes: object) -> Cell:
    return Cell(tiny.config(**changes), {})


def test_a_stopped_run_is_left_out_of_fits_by_name_and_listed_with_its_forecast(tmp_path):
    store, one, best = RunStore(tmp_path), cell(), cell(optim__lr=4e-3)
    train(store, best, curve(0), state="done")
    run = train(store, one, curve(0.3), share=0.4, state="preempted")
    with run.open_for_training(one.config) as writer:
        run.add_verdict({STEP: 40, **verdict(store, [one, best], one)})
        writer.set_state("stopped", 40, run.last_verdict()["reason"])
    (left,) = load_sources(tmp_path).left_out
    assert left.run == run.name
    assert left.reason.startswith("stopped: At step 40/100 it was +")
    (row,) = list_runs(tmp_path, state="stopped")
    assert row["by"] == best.run_id
    assert row["gap"][0] > 0
    assert row["forecast"] > curve(0)(1.0)
    outcome = read_outcome(one, run)
    assert outcome.settled
    assert outcome.forecast == row["forecast"]


def test_the_dry_run_says_how_little_may_be_trained(tmp_path):
    rates = (1e-2, 2e-2, 4e-2, 8e-2)
    file = SweepFile("s", "", tuple(tiny_cell(optim__lr=lr) for lr in rates), {}, StopRule())
    estimate = estimate_sweep(Sweep(file, RunStore(tmp_path)))
    at = StopRule().marks(12)[0] / 12
    assert estimate.least_flops == pytest.approx(estimate.flops / 4 * (1 + 3 * at))
    assert estimate.to_dict()["total"]["least_flops"] == estimate.least_flops
    plain = estimate_sweep(Sweep(SweepFile("s", "", file.cells), RunStore(tmp_path)))
    assert plain.least_flops == plain.flops


@pytest.mark.slow
def test_a_real_sweep_stops_a_cell_which_then_ends_bit_for_bit_as_if_nothing_had_happened(tmp_path):
    more = {"train.steps": 400, "train.log_every": 4, "optim.schedule": "wsd"}
    cells = tuple(tiny_cell(changes=more | {"optim.lr": lr}) for lr in (1e-2, 1e-5))

    def swept(cells, store, stopping=None) -> list[str]:
        return [o.state for o in launch(cells, store, jobs=1, threads=1, poll_s=0.05, stopping=stopping)]

    store = RunStore(tmp_path / "a")
    assert swept(cells, store, Stopping(StopRule(), cells)) == ["done", "stopped"]
    loser = store.run(cells[1].run_id)
    assert 160 <= loser.status().step < 400
    assert loser.checkpoint_steps()
    plain = Sweep(SweepFile("s", "", cells), store)
    assert [o.state for o in run_sweep(plain, launcher=LauncherOptions(jobs=1), record=False)] == ["done", "done"]
    assert swept(cells[1:], RunStore(tmp_path / "b")) == ["done"]
    assert tiny.outcome(loser.path) == tiny.outcome(tmp_path / "b" / loser.name)
