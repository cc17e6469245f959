"""Supercollapse: planted families coincide, a run with another course is named, other schemes and budgets stay apart."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from command_line import run_cli
from test_forecast import planted

import questctl
from questctl.analysis.collapse import BINS, families
from questctl.analysis.curves import Curve, make_curve
from questctl.scaling.curves import parse_schedule


def curve(
    name: str,
    steps: int,
    N: float,
    seed: int,
    *,
    noise: float = 1e-3,
    scheme: str = "bf16",
    bend: float = 0.0,
    level: float = 1.0,
) -> Curve:
    """ℓ of every curve is the same function of the share of training; `bend` tilts it by so much in the middle."""
    rates = parse_schedule(f"wsd:lr=.01,steps={steps},warmup=.1,decay=.2")
    step = np.linspace(steps / 200, steps, 200)
    u = step / steps
    loss = level * (planted("wsd:lr=.01,steps=1000,warmup=.1,decay=.2", 1000 * u) / 3) * np.exp(bend * np.sin(math.pi * u))
    loss = loss * np.exp(np.random.default_rng(seed).normal(0, 1e-3, len(step)))
    return make_curve(name, step, rates.rate_at(step), loss, rates=rates, N=N, tokens_per_step=20 * N / steps, scheme=scheme)


def family(bend: float = 0.0) -> list[Curve]:
    sizes = [(400, 1e6, 4.0), (800, 2e6, 3.5), (1600, 4e6, 3.1), (3200, 8e6, 2.8)]
    curves = [curve(f"n{i}", steps, N, i, level=level) for i, (steps, N, level) in enumerate(sizes)]
    return [*curves, curve("again", 400, 1e6, 9, level=4.0), curve("bent", 800, 2.1e6, 10, level=3.5, bend=bend)]


def test_a_family_collapses_to_its_noise() -> None:
    (found,) = families(family())
    assert len(found.runs) == 6
    assert found.outliers == ()
    assert found.repeats == 2
    per_bin = 1e-3 * math.sqrt(2 * BINS / 180)  # two bins of 180 / BINS lines each
    assert 0.5 * per_bin < found.noise < 2 * per_bin
    assert found.spread < 2 * per_bin
    assert "coincide within 0.0" in found.sentence


def test_a_run_with_another_course_is_named() -> None:
    (found,) = families(family(bend=0.02))
    assert found.outliers == ("bent",)
    assert "but bent leaves them by" in found.sentence


def test_noise_without_repeated_runs_is_the_scatter_of_lines() -> None:
    (found,) = families([c for c in family() if c.name != "again"])
    assert found.repeats == 0
    assert found.noise == pytest.approx(1e-3 * math.sqrt(2 * BINS / 180), rel=0.3)


def test_another_scheme_budget_or_schedule_is_no_family() -> None:
    others = [curve(f"o{i}", 400, 1e6, i, scheme="quest-w4a4") for i in range(3)]
    rich = [curve(f"r{i}", 400, 0.5e6, i) for i in range(3)]
    rich = [type(c)(**{**vars(c), "tokens_per_step": 4 * c.tokens_per_step}) for c in rich]
    assert [f.scheme for f in families([*family(), *others, *rich])] == ["bf16"]
    assert families(others) == []
    unfinished = [c.until(200) for c in family()]
    assert families(unfinished) == []


def test_the_health_of_a_folder_says_whether_its_runs_collapse(tmp_path) -> None:
    """Four runs of one size and recipe, which differ in their seed."""
    model = {"n_layer": 1, "d_model": 32, "n_head": 2, "d_ff": 64}
    for seed in range(4):
        config = questctl.make_config(
            model=model,
            data={"source": "synthetic:markov?vocab=16&tokens=20000", "seq_len": 16},
            train={"batch_size": 8, "steps": 60, "log_every": 1, "eval_tokens": 256, "seed": seed, "threads": 1},
        )
        questctl.train(config, runs=tmp_path)
    (found,) = json.loads(run_cli("runs", "health", "--collapse", "--runs", tmp_path, "--json").stdout)
    assert len(found["runs"]) == found["repeats"] == 4
    ends = [name[-8:] for name in found["runs"]]
    (named,) = json.loads(run_cli("runs", "health", *ends, "--collapse", "--runs", tmp_path, "--json").stdout)
    assert named["runs"] == found["runs"]
    assert "divided by their last loss" in " ".join(run_cli("runs", "health", "--collapse", "--runs", tmp_path).stdout.split())
