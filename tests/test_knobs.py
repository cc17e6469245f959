"""Laws of the learning rate and the batch: planted truths, edges, schemes that shift the optimum, the step law's table."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import run_cli
from shared_data import DATA, needs

import questctl
from questctl.analysis.knobs import Trials, fit_knobs, read_trials
from questctl.analysis.tables import PointError
from questctl.errors import DataError

SIZES, TOKENS = (1e8, 4e8, 1.6e9), (2e9, 8e9, 3.2e10)


def planted(shift=1.0, noise=0.0, seed=0, schemes=("bf16",)) -> Trials:
    """lr* = 2·N^-.7·D^.3 (times `shift` for the second scheme), B* = .6·D^.57, a quadratic in logs with a cross term."""
    rng, rows = np.random.default_rng(seed), []
    for g, s in enumerate(schemes):
        for n in SIZES:
            for d in TOKENS:
                lr, batch = 2 * n**-0.7 * d**0.3 * shift**g, 0.6 * d**0.57
                for i in range(-3, 4):
                    for j in range(-3, 4):
                        x, y = 0.5 * i + 0.1, 0.6 * j - 0.2
                        loss = 2 + 0.02 * x * x + 0.03 * y * y - 0.01 * x * y + noise * rng.normal()
                        rows.append((n, d, lr * np.exp(x), batch * np.exp(y), loss, s))
    *columns, labels = zip(*rows, strict=True)
    return Trials(*(np.array(c) for c in columns), labels)


def test_a_planted_law_of_the_knobs_is_found() -> None:
    fit = fit_knobs(planted())
    assert fit.laws["lr"].exponents == pytest.approx({"N": -0.7, "D": 0.3}, abs=1e-6)
    assert fit.laws["batch"].exponents == pytest.approx({"D": 0.57}, abs=1e-6)
    assert fit.laws["batch"].factor == pytest.approx(0.6, rel=1e-5)
    assert fit.predict(1e9, 1e10) == pytest.approx({"lr": 2 * 1e9**-0.7 * 1e10**0.3, "batch": 0.6 * 1e10**0.57}, rel=1e-5)
    assert all(-0.002 < cell.regret < 1e-9 for cell in fit.cells)  # the minimum lies between the runs


@pytest.mark.slow
def test_intervals_hold_the_truth_and_order_changes_nothing() -> None:
    held = 0
    for seed in range(20):
        law = fit_knobs(planted(noise=2e-3, seed=seed)).laws["lr"]
        held += law.intervals["N"][0] <= -0.7 <= law.intervals["N"][1]
    assert held >= 17
    t = planted(noise=2e-3)
    again = np.random.default_rng(1).permutation(len(t))
    moved = Trials(t.N[again], t.D[again], t.lr[again], t.batch[again], t.loss[again], tuple(t.scheme[i] for i in again))
    assert fit_knobs(moved).laws["lr"].exponents == pytest.approx(fit_knobs(t).laws["lr"].exponents, rel=1e-9)


def test_a_scheme_that_shifts_the_optimum_is_told_from_one_that_does_not() -> None:
    same = fit_knobs(planted(1.0, 2e-3, schemes=("bf16", "w4a4"))).laws["lr"]
    other = fit_knobs(planted(0.7, 2e-3, schemes=("bf16", "w4a4"))).laws["lr"]
    factor, low, high = other.offsets["w4a4"]
    assert low < 0.7 < high
    assert factor == pytest.approx(0.7, rel=0.1)
    assert other.p_value < 1e-3 < same.p_value


def test_minima_beyond_what_was_tried_are_edges() -> None:
    t = planted()
    kept = t.lr > 3 * t.N**-0.7 * t.D**0.3
    fit = fit_knobs(Trials(t.N[kept], t.D[kept], t.lr[kept], t.batch[kept], t.loss[kept], tuple(np.array(t.scheme)[kept])))
    assert all("lr" in cell.edge for cell in fit.cells)
    assert "lr" not in fit.laws
    assert "end of what was tried" in fit.notes[0]


def test_rows_that_cannot_be_read_are_named(tmp_path) -> None:
    good = {"N": 1e8, "D": 1e9, "lr": 1e-3, "loss": 3.0}
    with pytest.raises(PointError, match=r"row 2, column 'lr': an empty cell must be a positive finite number"):
        read_trials([good, {**good, "lr": None}], ["row 1", "row 2"])
    with pytest.raises(PointError, match="no column lr; it has N, D, loss"):
        read_trials([{k: v for k, v in good.items() if k != "lr"}], ["row 1"])
    (tmp_path / "one.csv").write_text("N,D,lr,loss\n1e8,1e9,.001,3\n")
    with pytest.raises(DataError, match="no cell of one scheme, N and D has 4 runs at three learning rates"):
        questctl.fit_knobs(tmp_path / "one.csv")


@needs("steplaw_dense.csv")
def test_the_step_law() -> None:
    """arXiv 2503.04715: lr* = 1.80·N^-.713·D^.307, B* = .58·D^.571."""
    fit = questctl.fit_knobs(DATA / "steplaw_dense.csv")
    lr, batch = fit.laws["lr"], fit.laws["batch"]
    assert lr.exponents["N"] == pytest.approx(-0.71, abs=0.05)
    assert batch.exponents["D"] == pytest.approx(0.57, abs=0.03)
    assert 1 / 1.3 < batch.factor / 0.58 < 1.3
    assert fit.relative_regret < 0.005
    assert all(cell.regret < 0.01 for cell in fit.cells)
    shown = run_cli("fit-knobs", DATA / "steplaw_dense.csv").stdout
    assert shown.startswith("lr = 1.4")
    assert "Regret on cells left out: 0.003" in shown
