"""Forecasts of runs and curves: unfinished ones, other schedules and lengths, what is refused, the picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from command_line import run_cli

import questctl
from questctl.analysis.curve_laws import MultiPower, Scales, curve_design
from questctl.errors import DataError, UsageError
from questctl.scaling.curves import parse_schedule
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
    config = tiny.config({"train.steps": 60, "train.log_every": 1})
    name = train(config, runs=tmp_path).run
    (whole,) = questctl.forecast(tmp_path).runs
    assert whole.seen == pytest.approx(1, abs=0.02)
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / name / "metrics.jsonl").write_text("".join(lines[:36]))
    (run,) = questctl.forecast(tmp_path).runs
    assert (run.run, run.steps) == (name, 60)
    assert run.seen == pytest.approx(0.6, abs=0.02)
    assert run.interval[0] < run.loss < run.interval[1]


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
