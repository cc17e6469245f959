"""The demo: controls stay out of the law, the answer is short, and what it says of planted runs is what was planted."""

import json
import math

import numpy as np
import pytest
from command_line import output

import questctl
from questctl import demo
from questctl.analysis.choice import choose
from questctl.analysis.points import make_points
from questctl.analysis.summary import controls, held_out_sizes
from questctl.store import runs_in
from questctl.sweep.sweep_file import find_sweep_file, load_sweep_file

TINY = """
name = "tiny"
[base]
model = { n_layer = 1, n_head = 1, d_ff = 32 }
data = { source = "synthetic:markov?vocab=16&tokens=20000", seq_len = 16 }
quant.block = 16
train = { batch_size = 8, eval_tokens = 256, threads = 1 }
[matrix]
model.d_model = [16, 32]
train.steps = [8, 16]
scheme = [{ quant.method = "bf16" }, { quant.method = "quest", quant.bits = [4, 2] }]
[[include]]
model.d_model = 16
train.steps = 8
quant.method = "ste"
quant.bits = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("demo")
    (where / "tiny.toml").write_text(TINY)
    return where


@pytest.fixture(autouse=True)
def tiny_demo(folder, monkeypatch):
    monkeypatch.setattr(demo, "SWEEP", str(folder / "tiny.toml"))


def test_it_trains_once_fits_without_the_controls_and_answers_in_five_findings(folder) -> None:
    first = questctl.run_demo(folder / "runs")
    assert [outcome.state for outcome in first.outcomes] == ["done"] * 13
    assert not any(label.startswith("ste") for label in first.fit.points.labels)
    assert first.fit.fit.n == 12
    assert 0 < len(first.findings) <= 5
    assert "controls" in [finding.kind for finding in first.findings]
    said = json.loads(output("demo", "--runs", folder / "runs", "--out", folder / "out", "--json"))
    assert said["answer"] == [finding.to_dict() for finding in first.findings]
    assert (folder / "out" / "loss_vs_bits.png").exists()
    assert {run.result().attempts for run in runs_in(folder / "runs")} == {1}  # the second call trained nothing


def test_the_dry_run_writes_nothing(folder) -> None:
    estimate = questctl.estimate_demo(folder / "none")
    assert len(estimate.cells) == 13
    assert not (folder / "none").exists()


def test_the_built_in_demo_has_controls_and_several_lengths() -> None:
    cells = load_sweep_file(find_sweep_file("laptop")).cells
    methods = [str(cell.values.get("quant.method")) for cell in cells]
    assert methods.count(demo.CONTROL) >= 2
    law = [cell.config for cell, method in zip(cells, methods, strict=True) if method != demo.CONTROL]
    assert all(config.model.n_layer >= 2 for config in law)
    assert len({config.model.params_non_embedding for config in law}) >= 3
    assert len({config.train.steps for config in law}) >= 2


def test_controls_are_compared_at_equal_bits_size_and_tokens() -> None:
    rows = [
        ("bf16", 1e5, 1e6, 2.0),
        ("quest-w2a2", 1e5, 1e6, 2.3),
        ("quest-w2a2", 2e5, 1e6, 2.1),
        ("quest-w1a1", 1e5, 1e6, 2.6),
    ]
    rows += [("ste-w2a2", 1e5, 1e6, 2.5), ("ste-w2a2", 2e5, 1e6, 2.0), ("ste-w1a1", 1e5, 1e6, 3.2), ("ste-w4a4", 1e5, 1e6, 2.2)]
    scheme, N, D, loss = zip(*rows, strict=True)
    (finding,) = controls(make_points(N, D, loss, scheme), "ste")
    assert (finding.numbers["cells"], finding.numbers["of"]) == (2, 3)
    assert finding.numbers["gap"] == pytest.approx((0.2 - 0.1 + 0.6) / 3)
    assert controls(make_points(N[:4], D[:4], loss[:4], scheme[:4]), "ste") == []


def test_the_error_on_sizes_held_out_is_that_of_fits_without_them() -> None:
    rng = np.random.default_rng(0)
    grid = [(s, n, n * r) for s in ("bf16", "w4a4") for n in (1e6, 2e6, 4e6, 8e6) for r in (20, 60, 180)]
    scheme, N, D = (np.array(column) for column in zip(*grid, strict=True))
    eff = np.where(scheme == "w4a4", 0.7, 1.0)
    loss = 406.4 / (N * eff) ** 0.34 + 410.7 / D**0.28 + 1.69
    points = make_points(N, D, loss * np.exp(2e-3 * rng.standard_normal(len(N))), list(scheme))
    (finding,) = held_out_sizes(choose(points, ("quest",)))
    assert 1e-3 < finding.numbers["leave_one_size_out"] < 1e-2
    assert "%" in finding.sentence
    assert held_out_sizes(None) == []
    assert math.isnan(choose(points.subset(points.N == 1e6), ("quest",)).scores[0].leave_one_size_out)
