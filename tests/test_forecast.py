"""Forecasts of runs and curves: unfinished ones, other schedules and lengths, what is refused, the picture."""

from __future__ import annotations

import itertools
import json
import math
import time

import numpy as np
import pytest
import tiny
from command_line import run_cli
from hypothesis import given
from hypothesis import strategies as st

import questctl
from questctl.analysis.curve_laws import MultiPower, Scales, curve_design
from questctl.analysis.curve_schedule import STRAIGHT, straightened
from questctl.analysis.curves import Rates
from questctl.config import OptimConfig
from questctl.config.rates import learning_rate
from questctl.errors import DataError, UsageError
from questctl.metrics import VAL_LOSS
from questctl.scaling.curves import load_curves, parse_schedule
from questctl.scaling.live import LiveForecasts
from questctl.store import RunStore
from questctl.sweep.outcomes import Outcome
from questctl.training import train

SCALES = Scales(rate=0.01, sum=9.5, steps=1000.0)


def planted(text: str, steps) -> np.ndarray:
    """The multi-power law near its prior, at steps of a schedule."""
    law = MultiPower()
    values = {"A": 0.5, "alpha": 0.5, "L0": 3.0, "B": 0.11, "C": 2700.0, "beta": 0.58, "gamma": 0.6}
    theta = np.array([p.internal(values[p.name]) for p in law.shared])
    return law.predict(theta, curve_design([parse_schedule(text)], [np.asarray(steps, float)], SCALES))[0]


def write(path, text: str):
    """The planted curve of a schedule, every 10 steps, with .1 % of noise."""
    rates = parse_schedule(text)
    steps = np.arange(10, rates.step[-1] + 1, 10)
    rows = zip(
        steps,
        rates.rate_at(steps),
        planted(text, steps) * np.exp(np.random.default_rng(0).normal(0, 1e-3, len(steps))),
        strict=True,
    )
    path.write_text("step,lr,loss\n" + "".join(f"{s:g},{r},{y}\n" for s, r, y in rows))
    return path


def test_two_curves_forecast_another_length(tmp_path) -> None:
    sources = [write(tmp_path / f"{kind}.csv", f"{kind}:lr=.01,steps=1000") for kind in ("cosine", "constant")]
    asked = ("--run", "constant", "--schedule", "cosine:final=.05", "--steps", 1500, "--out", tmp_path / "f.png", "--json")
    (run,) = json.loads(run_cli("forecast", *sources, *asked).stdout)["runs"]
    true = planted("cosine:lr=.01,steps=1500,warmup=100,final=.05", [1500])[0]
    assert run["steps"] == 1500
    assert run["interval"][0] < true < run["interval"][1]
    assert run["loss"] == pytest.approx(true, rel=3e-3)
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_an_unfinished_run_is_forecast_with_the_schedule_of_its_config(tmp_path) -> None:
    """A folder with a finished run: cut to 60 % of its lines it is one that trains."""
    config = tiny.config({"train.steps": 60, "train.log_every": 1, "train.eval_every": 2, "train.eval_tokens": 64})
    name = train(config, runs=tmp_path).run
    (whole,) = questctl.forecast(tmp_path).runs
    assert whole.seen == pytest.approx(1, abs=0.02)
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / name / "metrics.jsonl").write_text("".join(lines[:36]))
    (run,) = questctl.forecast(tmp_path).runs
    assert (run.run, run.steps) == (name, 60)
    assert run.seen == pytest.approx(0.6, abs=0.02)
    assert run.interval[0] < run.loss < run.interval[1]
    with pytest.raises(DataError, match="18 of its lines hold a validation loss, and a law of curves needs 20"):
        questctl.forecast(tmp_path, loss="validation")


def test_a_watched_run_is_forecast_while_it_trains(tmp_path, monkeypatch) -> None:
    finished, training = (
        train(tiny.config({"train.steps": 60, "train.log_every": 1, "train.seed": s}), runs=tmp_path).run for s in (1, 2)
    )
    lines = (tmp_path / training / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / training / "metrics.jsonl").write_text("".join(lines[:36]))
    outcomes = [Outcome(finished, "done", 60, 60), Outcome(training, "running", 36, 60), Outcome("new", "pending", 0, 60)]
    forecasts = LiveForecasts(RunStore(tmp_path))
    done, running, pending = forecasts(outcomes)
    (same,) = questctl.forecast(tmp_path, run=training).runs
    assert (running.forecast, running.forecast_low, running.forecast_high) == (same.loss, *same.interval)
    assert done.forecast is pending.forecast is None
    (tmp_path / training / "metrics.jsonl").write_text("".join(lines[:45]))
    assert forecasts(outcomes)[1] == running  # not made anew at once
    monkeypatch.setattr(time, "monotonic", lambda: math.inf)
    assert forecasts(outcomes)[1].forecast != running.forecast
    (tmp_path / training / "metrics.jsonl").write_text("".join(lines[:5]))
    forecasts(outcomes)
    assert forecasts(outcomes)[1].forecast is None


def test_validation_losses_are_a_curve_at_their_own_steps(tmp_path) -> None:
    config = tiny.config({"train.steps": 60, "train.log_every": 4, "train.eval_every": 2, "train.eval_tokens": 64})
    name = train(config, runs=tmp_path).run
    lines = [line for line in RunStore(tmp_path).run(name).metrics() if VAL_LOSS in line]
    (curve,) = load_curves(tmp_path, loss="validation").curves
    assert curve.of == "validation"
    assert curve.step.tolist() == [*range(2, 61, 2)] == [line["step"] for line in lines]
    assert curve.loss.tolist() == [line[VAL_LOSS] for line in lines]
    answer = json.loads(run_cli("forecast", tmp_path, "--loss", "validation", "--json").stdout)["runs"][0]
    assert (answer["run"], answer["of"]) == (name, "validation")
    assert "nats/token of validation loss at step 60" in run_cli("forecast", tmp_path, "--loss", "validation").stdout
    with pytest.raises(UsageError, match="loss 'test' is unknown; choices: training, validation"):
        questctl.forecast(tmp_path, loss="test")


def test_what_cannot_be_forecast_is_one_sentence(tmp_path) -> None:
    flat = write(tmp_path / "flat.csv", "constant:lr=.01,steps=600")
    falling = write(tmp_path / "falling.csv", "cosine:lr=.01,steps=600")
    for wanted, message in (
        ({"run": "steep"}, "no curve is called 'steep'; choices: flat"),
        ({"law": "quest"}, "unknown law of curves 'quest'; choices: multi-power"),
        ({"schedule": "linear"}, "unknown name 'linear'; choices: cosine, wsd, constant"),
        ({"steps": 100}, "a shorter run needs its schedule"),
        ({"out": "f.txt"}, r"a picture ends in one of \.png, \.svg, \.pdf"),
    ):
        with pytest.raises(UsageError, match=message):
            questctl.forecast(flat, **wanted)
    with pytest.raises(UsageError, match="a longer run needs its schedule"):
        questctl.forecast(falling, steps=900)
    with pytest.raises(DataError, match="there is no such"):
        questctl.forecast(tmp_path / "none.csv")
    assert "No curve shows a fall" in run_cli("forecast", flat, "--schedule", "wsd:decay=.2").stdout


def curve_of(name: str, text: str, N: float, scheme: str, level: float) -> str:
    """Rows of a long file of curves: the planted curve of a schedule, `level` nats above it."""
    rates = parse_schedule(text)
    steps = np.arange(10, rates.step[-1] + 1, 10)
    losses = planted(text, steps) + level
    about = f"{name},{N},{scheme}"
    return "".join(f"{about},{s * 1000:g},{s:g},{r},{y}\n" for s, r, y in zip(steps, rates.rate_at(steps), losses, strict=True))


@pytest.mark.slow
def test_the_joint_law_forecasts_a_size_and_a_scheme(tmp_path) -> None:
    """A planted law over N: level 30·(N·eff)^-1/3, eff .5 for w4a4; what is left out is N = 4e6 at w4a4."""
    file, true = tmp_path / "curves.csv", {}
    rows = "run,N,scheme,tokens,step,lr,loss\n"
    for kind, (n, (scheme, eff)) in itertools.product(
        ("cosine", "constant", "wsd"), itertools.product((1e6, 2e6, 4e6), (("bf16", 1.0), ("quest-w4a4", 0.5)))
    ):
        level = 30 * (n * eff) ** (-1 / 3)
        text = f"{kind}:lr=.01,steps=1000"
        true[kind] = planted(text, [1000])[0] + level
        if (n, scheme) != (4e6, "quest-w4a4"):
            rows += curve_of(f"{kind}-{n:g}-{scheme}", text, n, scheme, level)
    file.write_text(rows)
    asked = ("--law", "joint", "--N", "4e6", "--scheme", "quest-w4a4", "--run", "wsd-1e+06-bf16", "--out", tmp_path / "f.svg")
    (run,) = json.loads(run_cli("forecast", file, *asked, "--json").stdout)["runs"]
    assert run["loss"] == pytest.approx(true["wsd"], rel=4e-3)
    assert run["seen"] == 0
    (first,) = questctl.forecast(file, law="joint", N=4e6, scheme="quest-w4a4").runs  # like the first of the curves
    assert first.loss == pytest.approx(true["constant"], rel=4e-3)
    for wanted, message in (
        ({"N": 4e6}, "needs --law joint"),
        ({"law": "joint", "scheme": "quest-w1a1"}, "no curve is of it; choices: bf16, quest-w4a4"),
        ({"law": "joint", "N": -1}, "must be a positive number"),
    ):
        with pytest.raises(UsageError, match=message):
            questctl.forecast(file, **wanted)
    with pytest.raises(UsageError, match="of several sizes or schemes: name one by --run"):
        questctl.best_schedule(file)


def test_the_best_schedule_beats_every_known_one_and_trains(tmp_path) -> None:
    """Brute force over cool-downs of a stable rate, by lines, roots and powers, finds nothing better for the law."""
    sources = [write(tmp_path / f"{kind}.csv", f"{kind}:lr=.01,steps=1000") for kind in ("cosine", "constant", "wsd")]
    best = questctl.best_schedule(sources, run="wsd", steps=2000)
    curve = best.forecast.runs[0].curve
    flat = parse_schedule("constant:lr=.01,steps=2000")
    left = 1 - np.arange(1, 1901) / 1900  # share of the steps after the warm-up that is left, at each of them
    tried = []
    for decay, power in itertools.product((0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0), (0.5, 1.0, 1.5, 2.0)):
        lr = np.append(flat.lr[:101], 0.01 * np.minimum(1, left / decay) ** power)
        tried.append(best.fit.predict(Rates(flat.step, lr), 2000, curve)[0])
    assert best.loss < min(tried)
    assert all(0 < low < gain < high for gain, low, high in best.gains.values())
    optim = OptimConfig(**{k.removeprefix("optim."): v for k, v in best.settings.items() if k != "train.steps"})
    rates = [learning_rate(step, 2000, optim) for step in range(2000)]
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert max(rates) == pytest.approx(0.01)
    shown = run_cli("forecast", *sources, "--run", "wsd", "--optimize", "--steps", 2000).stdout
    assert f'optim.knots = "{best.settings["optim.knots"]}"' in shown
    assert "nats/token over cosine" in " ".join(shown.split())


def test_the_best_schedule_needs_a_fall_and_room(tmp_path) -> None:
    flat = write(tmp_path / "flat.csv", "constant:lr=.01,steps=600")
    falling = write(tmp_path / "falling.csv", "cosine:lr=.01,steps=600")
    with pytest.raises(DataError, match="no curve shows a fall of its rate"):
        questctl.best_schedule(flat)
    with pytest.raises(UsageError, match="the warm-up of falling alone takes 60"):
        questctl.best_schedule(falling, steps=50)
    assert "leave out --schedule" in run_cli("forecast", falling, "--optimize", "--N", "1e6", code=2).stderr


@given(st.lists(st.floats(0, 1), min_size=1, max_size=24))
def test_a_straightened_schedule_stays_near_the_one_given(drops) -> None:
    factors = np.maximum(1 - np.cumsum(drops) / max(1.0, sum(drops)), 0)
    places = np.linspace(0, 1, len(drops) + 1)[1:]
    u, f = straightened(places, factors)
    assert np.abs(np.interp(places, np.append(0, u), np.append(1, f)) - factors).max() <= STRAIGHT
    assert u[-1] == 1
    assert (np.diff(u) > 0).all()
