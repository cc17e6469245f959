"""benchmarks/fitter.py: one sum compares all tools on a small planted table, and the page says who is lower or faster."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fitter.py"
TRUTH = {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "eff.w4a4": 0.7}


@pytest.fixture(scope="module")
def fitter():
    spec = importlib.util.spec_from_file_location("fitter", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fitter"] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(tmp_path):
    """24 runs of two schemes, with 0.3 % noise."""
    rng, lines = np.random.default_rng(0), ["N,D,loss,scheme"]
    for scheme, eff in (("bf16", 1.0), ("w4a4", 0.7)):
        for N in (3e7, 1e8, 3e8):
            for D in 20 * N, 50 * N, 100 * N, 400 * N:
                loss = 406.4 / (N * eff) ** 0.34 + 410.7 / D**0.28 + 1.69
                lines.append(f"{N},{D},{loss * math.exp(3e-3 * rng.standard_normal())},{scheme}")
    path = tmp_path / "planted.csv"
    path.write_text("\n".join(lines))
    return path


def test_a_planted_table_gives_a_page(fitter, table, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert fitter.main([str(table), "--law", "quest", "--starts", "3", "--rounds", "1", "--out", str(page)]) == 0
    text = page.read_text()
    assert "## planted" in text
    assert "24 runs, 2 schemes; law `quest`, least squares" in text
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in text.splitlines() if line.startswith("| ")}
    costs = [float(rows[tool][0]) for tool in ("questctl", "curve_fit, one start", "L-BFGS, 3 starts")]
    assert costs[0] <= min(costs) * (1 + 1e-6)
    assert "No tool reaches a lower objective than questctl" in text


def test_the_sum_is_that_of_its_formula(fitter):
    data = fitter.Data(np.array([1e8, 1e8]), np.array([2e9, 2e9]), np.array([3.0, 3.5]), np.array([0, 1]), ("bf16", "w4a4"))
    L = [406.4 / (1e8 * e) ** 0.34 + 410.7 / 2e9**0.28 + 1.69 for e in (1, 0.7)]
    r = np.abs(np.log(L) - np.log([3.0, 3.5]))
    assert data.cost(TRUTH, math.inf) == pytest.approx(sum(r**2) / 2)
    assert data.cost(TRUTH, 1e-3) == pytest.approx(sum(1e-3 * (r - 5e-4)))
    theta = [0.34, 0.28, math.log(1.69), math.log(406.4), math.log(410.7), math.log(0.7)]
    assert fitter.named(np.array(theta), data.labels) == pytest.approx(TRUTH)


@pytest.mark.parametrize("delta", [math.inf, 1e-2])
def test_the_objective_of_l_bfgs_is_the_common_sum_with_its_gradient(fitter, delta):
    rng = np.random.default_rng(1)
    data = fitter.Data(
        10 ** rng.uniform(7, 9, 12), 10 ** rng.uniform(9, 11, 12), rng.uniform(2, 4, 12), np.arange(12) % 2, ("bf16", "w4a4")
    )
    theta = np.array([0.34, 0.28, math.log(1.69), math.log(406.4), math.log(410.7), math.log(0.7)])
    objective = fitter.log_sum_exp_objective(data, delta)
    cost, gradient = objective(theta)
    assert cost == pytest.approx(data.cost(fitter.named(theta, data.labels), delta))
    slopes = [(objective(theta + step)[0] - objective(theta - step)[0]) / 2e-6 for step in 1e-6 * np.eye(6)]
    assert gradient == pytest.approx(slopes, rel=1e-5, abs=1e-8)


def test_what_is_lower_or_faster_elsewhere_is_said(fitter):
    rows = [
        {"tool": "questctl", "objective": 1.02, "seconds": 2.0},
        {"tool": "other", "objective": 1.0, "seconds": 1.0},
        {"tool": "third", "objective": None, "seconds": None},
    ]
    said = fitter.verdict(rows)
    assert "**A lower objective is reached by other**; questctl is 2 % above it" in said
    assert "**other is faster**, by a factor of 2" in said


@pytest.mark.parametrize(("arguments", "said"), [([], "give --data FOLDER"), (["--data", "nowhere"], "there is no such table")])
def test_missing_data_is_one_sentence(fitter, arguments, said, capsys):
    assert fitter.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err
