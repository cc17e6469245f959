"""Allocation: the solver against trying everything, sensitivities against loops by hand, and a config that trains."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from command_line import invoke
from helpers import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import QUEST, config

from questctl.cli.options import build_config
from questctl.config import QuantConfig
from questctl.errors import UsageError
from questctl.posttraining.allocate import allocate, between_uniform, fisher_weights, gaussian, solve
from questctl.posttraining.preflight import check_candidates, quest_candidates
from questctl.posttraining.quantize import calibration, compensated, quantize, rounded
from questctl.quant.layer_specs import layer_specs, layer_widths
from questctl.quant.spec import QuantSpec
from questctl.store import RunStore
from questctl.sweep.sweep_file import find_sweep_file, load_sweep_file
from questctl.training.checkpoint import load_tensors, model_bytes
from questctl.training.loading import load, load_model, loss_on
from questctl.training.loop import train

SPECS = [QuantSpec.parse(f"int{b}-h32-rms-ste") for b in (2, 3, 4)]
FEW = 2048  # tokens that are enough to compensate layers of at most 64 inputs


@pytest.fixture(autouse=True)
def calibrated_by_few(monkeypatch):
    monkeypatch.setattr("questctl.posttraining.allocate.CALIBRATION_TOKENS", FEW)


# --- the solver -------------------------------------------------------------------------------------------------------


def by_trying(sizes, bits, costs, budget):
    """The least cost of all allocations within the budget."""
    within = (
        sum(costs[name][word] for name, word in zip(sizes, words, strict=True))
        for words in itertools.product(bits, repeat=len(sizes))
        if sum(n * bits[w] for n, w in zip(sizes.values(), words, strict=True)) <= budget * sum(sizes.values()) * (1 + 1e-12)
    )
    return min(within)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.lists(st.floats(-1e-3, 1), min_size=4, max_size=4)), min_size=1, max_size=4),
    st.floats(1, 4.5),
)
def test_no_other_allocation_within_the_budget_costs_less(layers, budget):
    sizes = {f"l{i}": n for i, (n, _) in enumerate(layers)}
    bits = {"a": 1.0, "b": 2.5, "c": 3.0, "d": 4.5}
    costs = {f"l{i}": dict(zip(bits, c, strict=True)) for i, (_, c) in enumerate(layers)}
    found = solve(sizes, bits, costs, budget)
    used = sum(sizes[name] * bits[word] for name, word in found.items()) / sum(sizes.values())
    assert used <= budget + 1e-6
    assert sum(costs[name][word] for name, word in found.items()) <= by_trying(sizes, bits, costs, budget) + 1e-6  # HiGHS's gap


def test_a_budget_that_can_be_met_exactly_is():
    costs = {name: {"a": weight * 1.0, "b": weight * 0.3} for name, weight in (("x", 1), ("y", 5), ("z", 2), ("w", 3))}
    found = solve(dict.fromkeys(costs, 4096), {"a": 2.0, "b": 3.0}, costs, 2.5)
    assert found == {"x": "a", "y": "b", "z": "a", "w": "b"}
    assert between_uniform({"a": 2.0, "b": 3.0}, costs, 2.25) == (pytest.approx(0.75 * 11 + 0.25 * 3.3), ("a", "b"))
    assert between_uniform({"a": 2.0, "b": 3.0}, costs, 3.0) == (pytest.approx(3.3), ("b",))
    assert between_uniform({"a": 2.0, "b": 3.0}, costs, 1.0) == (None, ())


# --- sensitivities ----------------------------------------------------------------------------------------------------


def linears(model):
    return {n: m.weight for n, m in model.named_modules() if n.startswith("blocks.") and isinstance(m, torch.nn.Linear)}


@pytest.mark.slow
def test_gaussian_sensitivity_is_noise_through_curvature_by_hand(source):
    loaded = load(source)
    tokens = calibration(loaded.config, loaded.data, 3 * 16)
    weights = linears(loaded.model)
    found = fisher_weights(loaded.model, weights, tokens)
    name, total = "blocks.1.up", 0.0
    for row in tokens:
        (g,) = torch.autograd.grad(loaded.model(row[None, :-1], row[None, 1:]), weights[name])
        for n in range(g.shape[0]):
            total += 0.5 * 16 / 3 * float(weights[name][n].detach().pow(2).mean() * g[n].pow(2).sum())
    assert found[name] == pytest.approx(total, rel=1e-4)
    specs = ("bf16", "int2-rms-ste", "int4-rms-ste", "int2-learned-ste")
    by_spec = gaussian(loaded.model, weights, [QuantSpec.parse(spec) for spec in specs], tokens)
    costs = {name: {str(spec): cost for spec, cost in layer.items()} for name, layer in by_spec.items()}
    assert costs[name]["bf16"] == 0
    assert costs[name]["int2-rms-ste"] == pytest.approx(0.1188 * total, rel=0.1)  # rows of 32 know their scale to 12 %
    assert costs[name]["int2-learned-ste"] == pytest.approx(0.1188 * total, rel=0.05)  # calibrated on this weight's RMS
    ratio = costs[name]["int2-rms-ste"] / costs[name]["int4-rms-ste"]
    assert ratio == pytest.approx(0.1188460504 / 0.0115428845, rel=0.15)


def test_measured_sensitivity_is_the_loss_with_one_layer_rounded(source):
    found = allocate(source, 2.5, SPECS, tokens=512)
    model, config_, data = load_model(source), source.config(), load(source).data
    base = loss_on(model, config_, data, part="train", max_tokens=512)
    assert found.loss == base
    choice = next(c for c in found.layers if c.layer == "blocks.0.down")
    with torch.no_grad():
        model.blocks[0].down.weight.copy_(rounded(model.blocks[0].down.weight, choice.spec))
    assert choice.cost == pytest.approx(loss_on(model, config_, data, part="train", max_tokens=512) - base, abs=1e-6)
    assert found.modelled == pytest.approx(sum(c.cost for c in found.layers))


@pytest.mark.slow
def test_with_compensation_a_layer_costs_what_it_costs_compensated_alone(source):
    specs = [QuantSpec.parse("int2-h32-rms-trust"), QuantSpec.parse("int4-rms-ste")]  # two bases
    found = allocate(source, 3.0, specs, method="gptq", tokens=512)
    loaded = load(source)
    tokens = calibration(loaded.config, loaded.data, FEW)[:, :-1]
    base = loss_on(loaded.model, loaded.config, loaded.data, part="train", max_tokens=512)
    for name, i in (("down", 0), ("v", 1)):
        choice = next(c for c in found.layers if c.layer == f"blocks.{i}.{name}")
        model, spec = load_model(source), choice.spec
        layer = getattr(model.blocks[i], name)
        seen = []
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1).double()))
        with torch.no_grad():
            model(tokens)
            x = torch.cat(seen)
            z = spec.basis.rotate(x) if spec.basis else x
            layer.weight.copy_(compensated(layer.weight, z.T @ z, spec))
        assert choice.cost == pytest.approx(
            loss_on(model, loaded.config, loaded.data, part="train", max_tokens=512) - base, abs=2e-5
        )


@pytest.mark.slow
def test_of_two_solutions_the_one_of_lower_loss_together_is_taken(source, monkeypatch):
    """Costs that add up say one thing, all layers rounded together another."""
    import questctl.posttraining.allocate as module

    real, seen = module._rounded_loss, []

    def together(loaded, specs, *rest):
        loss = real(loaded, specs, *rest)
        seen.append((dict(specs), loss))
        return loss

    monkeypatch.setattr(module, "_rounded_loss", together)
    found = allocate(source, 2.5, SPECS, tokens=512)
    (over_all, first), (beside, second) = seen
    assert set(beside.values()) <= {SPECS[0], SPECS[1]}
    assert {c.layer: c.spec for c in found.layers} == (over_all if first <= second else beside)
    assert found.rounded == min(first, second)
    flipped = iter((2.0, 1.0))
    monkeypatch.setattr(module, "_rounded_loss", lambda *_: next(flipped))
    assert {c.layer: c.spec for c in allocate(source, 2.5, SPECS, tokens=512).layers} == beside
    flipped = iter((1.0, 2.0))
    assert {c.layer: c.spec for c in allocate(source, 2.5, SPECS, tokens=512).layers} == over_all


def without_second_block(source, root):
    """The same run whose second block adds nothing: its layers need no bits at all."""
    tensors = load_tensors(source.model_path)
    for name in ("o", "down"):
        tensors[f"blocks.1.{name}.weight"].zero_()
    run = RunStore(root).run(source.name)
    with run.open_for_training(source.config()) as writer:
        writer.write_model(model_bytes(tensors, {}))
        writer.finish(source.result())
    return run


@pytest.mark.parametrize("sensitivity", ["measured", "gaussian"])
def test_bits_go_where_they_matter(source, tmp_path, sensitivity, monkeypatch):
    order = itertools.count()
    monkeypatch.setattr("questctl.posttraining.allocate._rounded_loss", lambda *_: next(order))  # the solution over all words
    found = allocate(without_second_block(source, tmp_path), 3.0, SPECS, sensitivity=sensitivity, tokens=512)
    first, second = ([c for c in found.layers if c.layer.startswith(f"blocks.{i}")] for i in (0, 1))
    assert sum(c.cost for c in second) == pytest.approx(0, abs=1e-9)
    assert sum(c.cost for c in first) < sum(c.cost for c in allocate(source, 2.0, SPECS, tokens=512).layers)
    if sensitivity == "gaussian":  # in so small a model a single layer may measure better when it is rounded
        assert {c.bits for c in first} == {4.0}
    assert found.bits <= 3.0 + 1e-9


# --- as a config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", slow_but(["rtn", "gptq"], ["rtn"]))
def test_rounding_by_the_allocation_gives_the_loss_that_it_reports(source, method):
    found = allocate(source, 2.75, SPECS, activations=QuantSpec.parse("int8-h32-rms-ste"), method=method, tokens=512)
    assert found.bits <= 2.75 + 1e-9
    made = quantize(source, found.quant(), method=method, calibration_tokens=FEW)
    after = RunStore(source.path.parent).run(made.run)
    assert loss_on(load_model(after), after.config(), load(source).data, part="train", max_tokens=512) == pytest.approx(
        found.rounded, abs=1e-5
    )
    mean = (after.result().model_bits - 16 * 5 * 32) / (after.result().params_non_embedding - 5 * 32)  # five norms
    assert mean == pytest.approx(found.bits)


def allocate_run(runs, *args):
    return invoke("allocate", config(train__steps=60).run_id, "--runs", runs, "--tokens", "256", *args)


def test_the_file_that_is_written_trains_the_run_that_is_named(runs, tmp_path):
    result = allocate_run(runs, "--bits", "2.5", "--out", str(tmp_path / "mixed.toml"), "--activations", "int4-h32-rms-trust")
    assert result.exit_code == 0, result.output
    assert "modelled between int2-h32-rms-trust and int3-h32-rms-trust" in result.stdout
    mixed = build_config(tmp_path / "mixed.toml", [], preset=None).config
    assert mixed.run_id in result.stderr.replace("\n", "")
    assert str(mixed.quant.activations) == "int4-h32-rms-trust"
    assert mixed.train.steps == 60
    few = mixed.model_copy(update={"train": mixed.train.model_copy(update={"steps": 2})})
    assert train(few, runs=tmp_path).model_bits < 4 * few.model.params_non_embedding
    printed = allocate_run(runs, "--bits", "2.5", "--activations", "int4-h32-rms-trust")
    assert printed.stdout.rstrip() == (tmp_path / "mixed.toml").read_text().rstrip()
    two = ("--specs", "int2-rms-ste,int4-rms-ste", "--sensitivity", "gaussian")
    said = json.loads(allocate_run(runs, "--bits", "2.5", *two, "--json").stdout)
    assert {c["spec"] for c in said["layers"]} == {"int2-rms-ste", "int4-rms-ste"}
    assert len(said["layers"]) == 14


@pytest.mark.slow
def test_entropy_coded_words_of_fractional_bits_are_choices(runs):
    words = [f"ec{b}-h32-rms-trust" for b in (1.5, 2.25, 3.5)]
    said = json.loads(
        allocate_run(runs, "--bits", "2.25", "--specs", ",".join(words), "--sensitivity", "gaussian", "--json").stdout
    )
    assert {c["spec"] for c in said["layers"]} <= set(words)
    assert {c["bits"] for c in said["layers"]} <= {1.5, 2.25, 3.5}
    assert said["bits"] <= 2.25 + 1e-9
    assert said["modelled"] <= said["interpolated"] + 1e-12
    inputs = allocate_run(runs, "--bits", "2.25", "--specs", ",".join(words), "--activations", "ec4-h32-rms-trust")
    assert inputs.exit_code == 2
    assert "--activations: 'ec4-h32-rms-trust': the entropy code of 'ec4' is for weights" in " ".join(inputs.stderr.split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--bits", "0.5"), ["--bits", "0.5", "1 to 8"]),
        (("--bits", "9"), ["--bits", "9"]),
        (("--bits", "nan"), ["--bits", "nan"]),
        (("--bits", "2.5", "--specs", "int2-rms-ste,int2-ste"), ["--specs", "different"]),
        (("--bits", "2.5", "--specs", "int9-rms-ste"), ["--specs", "int9"]),
        (("--bits", "2.5", "--specs", "int2-h64-rms-ste"), ["h64"]),
        (("--bits", "3", "--specs", "int2-rms-ste,int4-rms-ste", "--activations", "int4-h32-rms-ste"), ["rotated differently"]),
        (("--bits", "2.5", "--sensitivity", "guessed"), ["--sensitivity", "guessed", "measured"]),
        (("--bits", "2.5", "--method", "magic"), ["--method", "magic", "gptq"]),
        (("--bits", "2.5", "--sensitivity", "gaussian", "--method", "gptq"), ["--method", "gptq", "measured"]),
        (("--bits", "2.5", "--out", "/nowhere/at/all.toml"), ["/nowhere/at/all.toml"]),
    ],
)
def test_a_mistake_is_one_sentence(runs, args, words):
    result = allocate_run(runs, *args)
    assert result.exit_code == 2, result.output
    assert [w for w in words if w not in result.stderr] == []
    assert "Traceback" not in result.stderr


def test_quantized_runs_are_refused_and_the_default_candidates_fit(tmp_path):
    run = RunStore(tmp_path).run(train(config(QUEST, train__steps=2), runs=tmp_path).run)
    with pytest.raises(UsageError, match="quest-w4a4"):
        allocate(run, 2.5, SPECS)
    candidates, bf16 = quest_candidates(config().model), QuantSpec.parse("bf16")
    assert str(candidates[0]) == "int1-h32-rms-clip1.3"
    check_candidates(config().model, candidates, bf16, 2.5)
    assert [spec.bits for spec in candidates] == list(range(1, 9))
    with pytest.raises(UsageError, match="none"):
        check_candidates(config().model, [], bf16, 2.5)
    assert QuantConfig().label == "bf16"


@pytest.mark.parametrize(("scheme", "bits"), [("quest-w2a16+", 2.5), ("quest-w3a16+", 3.25)])
def test_the_plan_that_compares_allocations_with_uniform_bits_keeps_to_its_budgets(scheme, bits):
    cells = [cell.config for cell in load_sweep_file(find_sweep_file("mixed")).cells if cell.config.scheme.startswith(scheme)]
    assert [c.train.seed for c in cells] == [0, 1, 2]
    m = cells[0].model
    rows = {"q": m.d_model, "k": m.d_model, "v": m.d_model, "o": m.d_model, "gate": m.d_ff, "up": m.d_ff, "down": m.d_model}
    widths = layer_widths(m)
    sizes = {name: width * rows[name.rpartition(".")[2]] for name, width in widths.items()}
    used = sum(sizes[name] * w.bits for name, (w, _) in layer_specs(widths, cells[0].quant).items()) / sum(sizes.values())
    assert bits - 0.02 < used <= bits
