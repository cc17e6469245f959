"""Masks, levels and divergence rules of a run: planted faults are seen where they are, and nothing else is."""

import json
import math

import pytest
import tiny
import torch
from command_line import invoke

from questctl.analysis.health import SATURATION, clamped_operands, diagnose
from questctl.errors import Diverged, Preempted
from questctl.store import RunStore
from questctl.training import health, loop
from questctl.training.loop import Counters, train


def lines_of(root, config):
    return RunStore(root).run(config.run_id).metrics()


def trainer_of(config):
    return loop.Trainer(config, loop.load_data(config), torch.device("cpu"), stop=lambda: False)


def shares(trainer):
    few = trainer.batch(0)[:2, :-1]
    return health.operand_shares(trainer.model, lambda: trainer.model(few))


def test_every_operand_is_measured_by_its_name():
    found = shares(trainer_of(tiny.config(tiny.QUEST)))
    layers = [f"blocks.{i}.{name}" for i in range(2) for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert list(found["weight_trust(fraction)"]) == list(found["weight_saturation(fraction)"]) == layers
    inputs = [name for name in layers if name[-2:] not in (".k", ".v", "up")]  # q's and gate's input is theirs too
    assert list(found["activation_trust(fraction)"]) == inputs
    assert all(0.95 < x <= 1 for x in found["weight_trust(fraction)"].values())
    for kind in ("weight", "activation"):  # a trusted entry of a uniform grid is one that is not clamped
        trust, clamped = found[f"{kind}_trust(fraction)"], found[f"{kind}_saturation(fraction)"]
        assert all(trust[name] + clamped[name] == pytest.approx(1, abs=2e-6) for name in trust)
    assert shares(trainer_of(tiny.config())) == {}


def test_a_dead_mask_is_seen_where_it_is():
    trainer = trainer_of(tiny.config({"quant.weights": "int4-learned-clip1", "quant.activations": "bf16"}))
    trainer.model.blocks[1].up.weight_quantizer.scale.data.mul_(1e-3)
    found = shares(trainer)
    assert found.keys() == {"weight_trust(fraction)", "weight_saturation(fraction)"}
    trust = found["weight_trust(fraction)"]
    assert {name for name, x in trust.items() if x < 0.5} == {"blocks.1.up"}
    assert trust["blocks.1.up"] < 0.05
    assert found["weight_saturation(fraction)"]["blocks.1.up"] > 0.95


def test_looking_changes_nothing(tmp_path):
    """Also where rounding draws random numbers."""
    words = dict.fromkeys(("quant.weights", "quant.activations"), "int4.sr-h16-rms-ste")
    often, never = (tiny.config(words, train__health_every=n) for n in (1, 1000))
    assert train(often, runs=tmp_path / "a").loss == train(never, runs=tmp_path / "b").loss
    seen = [[m["step"] for m in lines_of(tmp_path / x, often) if "weight_trust(fraction)" in m] for x in "ab"]
    assert seen == [[2, 4, 6, 8, 10, 12], [12]]


def test_levels_are_means_of_the_windows_before():
    c, found = Counters(), []
    for norm, peak in ((1.0, 5.0), (3.0, 4.0), (8.0, 9.0)):
        c.loss_peak = peak
        found.append(c.end_window(peak - 1, norm))
    assert found == [
        {},
        {"loss_spike(nats/token)": 0.0, "grad_norm_growth(ratio)": 3.0},
        {"loss_spike(nats/token)": 9 - 3.5, "grad_norm_growth(ratio)": 4.0},
    ]
    for _ in range(200):
        c.end_window(2.0, 7.0)
    assert (c.loss_level, c.norm_level, c.windows) == (pytest.approx(2), pytest.approx(7), loop.LEVEL_WINDOWS)


def test_a_planted_spike_is_in_its_line_and_only_there(tmp_path, monkeypatch):
    real = loop.Trainer.forward_backward
    monkeypatch.setattr(loop.Trainer, "forward_backward", lambda self, step: real(self, step) + 5.0 * (step == 6))
    config = tiny.config()
    train(config, runs=tmp_path)
    spikes = {m["step"]: m["loss_spike(nats/token)"] for m in lines_of(tmp_path, config)[1:]}
    assert spikes.pop(8) == pytest.approx(5, abs=0.5)
    assert max(spikes.values()) < 0.5
    result = invoke("runs", "health", "--runs", tmp_path)
    assert result.exit_code == 0
    assert "loss spiked 1×" in result.output
    header = next(line for line in result.output.splitlines() if line.startswith("run "))
    for column in header.split()[3:]:
        assert f"{column}: " in result.output  # the legend
    assert "before step 8" in result.output
    (row,) = json.loads(invoke("runs", "health", config.run_id, "--runs", tmp_path, "--json").stdout)
    assert (row["run"], row["state"], row["spikes"], row["spike"]["step"], row["layers"]) == (config.run_id, "done", 1, 8, {})


# --- divergence rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 5, 12])
def test_a_rule_ends_the_run_at_the_last_of_its_steps(tmp_path, log_every):
    """The loss begins at ln 16 = 2.77 and stays above 1: the fourth step is refused, whenever the loop looks."""
    config = tiny.config(train__diverged_loss=1.0, train__diverged_steps=4, train__log_every=log_every)
    run = RunStore(tmp_path).run(config.run_id)
    message = "diverged at step 3/12: loss above 1 in 4 steps in a row; the state before it is kept."
    for _ in range(2):  # at once again, from the state that was kept
        with pytest.raises(Diverged) as e:
            train(config, runs=tmp_path)
        assert message in str(e.value)
        assert (run.state(), run.status().step, run.status().message) == ("diverged", 3, message)
    relaxed = tiny.config(train__log_every=log_every)
    assert relaxed.run_id == config.run_id
    assert train(relaxed, runs=tmp_path).loss == train(relaxed, runs=tmp_path / "other").loss


def test_a_rule_counts_across_a_stop_and_not_what_came_between(tmp_path, monkeypatch):
    high, real = {1, 2, 5, 6, 7}, loop.Trainer.forward_backward
    monkeypatch.setattr(loop.Trainer, "forward_backward", lambda self, step: real(self, step) + 50.0 * (step in high))
    config, asked = tiny.config(train__diverged_loss=20.0, train__diverged_steps=3), iter(range(100))
    with pytest.raises(Preempted, match="step 6/12"):
        train(config, runs=tmp_path, stop=lambda: next(asked) >= 6)
    with pytest.raises(Diverged, match=r"step 7/12: loss above 20 in 3 steps in a row"):
        train(config, runs=tmp_path)


def test_a_rule_of_the_gradient(tmp_path):
    with pytest.raises(Diverged, match=r"step 0/12: gradient norm above 0\.001 in 1 steps in a row"):
        train(tiny.config(train__diverged_grad_norm=1e-3, train__diverged_steps=1), runs=tmp_path)


def test_the_worst_of_the_clamped_operands_is_named():
    """A share of exactly the threshold is not too large."""
    line = {
        "step": 9,
        "activation_saturation(fraction)": {"a": SATURATION, "b": 0.9, "c": 0.6},
        "weight_saturation(fraction)": {},
    }
    assert clamped_operands(line) == ["90% of the entries are clamped in b activations (and in 1 more operands)"]
    assert clamped_operands({"step": 9, "activation_saturation(fraction)": {"a": SATURATION}}) == []
    assert clamped_operands({"step": 9}) == []
    weights = {"step": 9, "weight_saturation(fraction)": {"a": 0.8}}
    assert clamped_operands(weights) == ["80% of the entries are clamped in a weights"]
    assert clamped_operands(weights, ["activation"]) == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_findings():
    calm = [{"step": i, "grad_norm": 1.0, "loss_spike(nats/token)": 0.1, "grad_norm_growth(ratio)": 1.0} for i in (10, 20)]
    assert diagnose("r", "done", calm).findings == ()
    assert diagnose("r", "pending", []).findings == ()
    look = {
        "weight_trust(fraction)": {"a": 0.9, "b": 0.3},
        "activation_trust(fraction)": {"a": 0.4},
        "activation_saturation(fraction)": {"a": 0.6},
    }
    worse = [*calm, {"step": 30, "grad_norm": 9.0, "loss_spike(nats/token)": 0.75, "grad_norm_growth(ratio)": 9.0, **look}]
    found = diagnose("r", "diverged", worse, "diverged at step 30: loss.")
    assert found.findings == (
        "diverged at step 30: loss.",
        "loss spiked 1×, worst by 0.75 nats/token before step 30",
        "gradient norm jumped 9.0× before step 30",
        "gradient norm grew to 9.0× its smallest by step 30",
        "30% of the entries receive gradient in b weights (and in 1 more operands)",
        "60% of the entries are clamped in a activations",
    )
    assert math.isclose(found.trust.value, 0.3)
