"""Quantizing after training: GPTQ against a hand-written elimination, the rotated basis, and a run like any other."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import BASE, QUEST, config

from questctl.analysis import points_from_frame
from questctl.config import QuantConfig, RunConfig
from questctl.errors import DataError, UsageError
from questctl.posttraining.preflight import ptq_config
from questctl.posttraining.quantize import calibration, compensate_model, compensated, quantize, round_model, rounded
from questctl.quant.layer_specs import layer_specs, layer_widths
from questctl.quant.model import quantize_model
from questctl.quant.spec import QuantSpec
from questctl.store import RunStore, load_runs
from questctl.training.loading import load, load_model, loss_on
from questctl.training.loop import train

WORDS = [
    "int4-rms-ste",
    "int2-h8-rms-ste",
    "ternary-absmax-ste",
    "fp4-h8-rms-ste",
    "lloyd3-h8-absmax-ste",
    "int4-h8-rms-2of4pairs-ste",
    "int3-learned-ste",
]


def correlated(n, k, seed=0):
    """Inputs (n, K) whose features share a few directions."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g) @ torch.randn(5, k, generator=g) + 0.1 * torch.randn(n, k, generator=g)


def weights(n, k, seed=1):
    return 0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def by_elimination(z, h, quantize_column, damping):
    """The method by its first definition (optimal brain surgeon, one input after the other): after each rounding the other
    weights move along H⁻¹, and the rounded one is eliminated from H⁻¹."""
    w, k = z.double().clone(), z.shape[1]
    h = h.double() + damping * h.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    out = torch.zeros_like(w)
    for j in range(k):
        out[:, j] = quantize_column(w[:, j], j)
        w -= torch.outer((w[:, j] - out[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # of no more use
    return out


# --- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 24, 150])  # beyond the 128 columns of one block too
def test_compensation_is_the_elimination_written_out(k):
    w, x = weights(5, k), correlated(200, k)
    h = x.T @ x
    top, unit = 1.5, 1.4935346 / 1.5  # int2, its Gaussian optimum
    s = unit * w.double().pow(2).mean(1).sqrt()
    expected = by_elimination(w, h, lambda c, j: s * ((c / s - 0.5).round() + 0.5).clamp(-top, top), 0.01)
    found = compensated(w, h, QuantSpec.parse("int2-rms-ste"), damping=0.01)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


OF_OTHER_SCALES = [
    "int4-rms.g16-ste",
    "int2-h8.s-rms.t-ste",
    "int1-meanstd-ste",
    "fp4-e8m0.g16-ste",
    "fp4-e4m3.g16-ste",
    "int3-learned.o-clip1",
    "int4-mse-ste",
    "sint3-rms.g16-sparse0.5-ste",
    "olive4-mse-ste",
    "ec2.5-h8-rms-ste",
]


@pytest.mark.parametrize("word", [*WORDS, *OF_OTHER_SCALES])
def test_without_correlation_it_is_rounding_to_nearest(word):
    w, spec = weights(6, 32), QuantSpec.parse(word)
    torch.testing.assert_close(compensated(w, torch.eye(32) * 3, spec), rounded(w, spec))


@pytest.mark.parametrize("word", WORDS)
def test_it_keeps_the_levels_and_lessens_the_error_of_the_output(word):
    w, x, spec = weights(12, 64), correlated(400, 64), QuantSpec.parse(word)
    turn = spec.basis.rotate if spec.basis else lambda v: v
    z, x_turned = turn(w), turn(x)
    good, plain = compensated(w, x_turned.T @ x_turned, spec), rounded(w, spec)
    error = [float(((w - v) @ x.T).pow(2).mean()) for v in (good, plain)]
    assert error[0] < 0.7 * error[1]
    in_units = turn(good) / spec.scale.of(z, spec.grid)  # the scale of the original row
    levels = torch.tensor(sorted({*spec.grid.levels, 0.0} if spec.sparsity else spec.grid.levels))
    assert (in_units[..., None] - levels).abs().amin(-1).max() < 1e-4
    if spec.sparsity:
        assert torch.equal(in_units.abs() > 1e-4, spec.sparsity.keep(z))


def test_values_that_are_rounded_together_stay_a_pair():
    w, x, spec = weights(8, 64), correlated(400, 64), QuantSpec.parse("olive4-mse-ste")
    w[:, ::7] *= 12  # outliers, whose neighbours are victims
    in_units = compensated(w, x.T @ x, spec) / spec.scale.of(w, spec.grid)
    torch.testing.assert_close(spec.grid.quantize(in_units), in_units, rtol=0, atol=1e-3)
    assert (in_units.abs() > 10).any()


def test_a_rotation_is_nothing_but_another_basis():
    """Rotated weights and inputs, rounded without rotation and turned back, by hand."""
    w, x = weights(6, 16), correlated(100, 16)
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    block = torch.block_diag(torch.kron(h2, h2), torch.kron(h2, h2), torch.kron(h2, h2), torch.kron(h2, h2))
    z, y = w @ block, x @ block
    for found, turned in (
        (compensated(w, y.T @ y, QuantSpec.parse("int3-h4-rms-ste")), compensated(z, y.T @ y, QuantSpec.parse("int3-rms-ste"))),
        (rounded(w, QuantSpec.parse("int3-h4-rms-ste")), rounded(z, QuantSpec.parse("int3-rms-ste"))),
    ):
        torch.testing.assert_close(found, turned @ block.T, rtol=1e-4, atol=1e-6)


def test_dead_inputs_zero_rows_and_full_precision_are_no_trouble():
    w, spec = weights(4, 16), QuantSpec.parse("int4-rms-ste")
    w[1] = 0
    x = correlated(50, 16)
    x[:, 3] = 0
    found = compensated(w, x.T @ x, spec)
    assert found.isfinite().all()
    assert not found[1].any()
    torch.testing.assert_close(found[:, 3], rounded(w, spec)[:, 3], rtol=0, atol=1e-3)  # nothing to make good for, or with
    assert compensated(w, torch.zeros(16, 16), spec).isfinite().all()
    assert compensated(w, x.T @ x, QuantSpec.parse("bf16")) is w


# --- a whole model ----------------------------------------------------------------------------------------------------


def words_of(quant):
    return {name: w for name, (w, _) in layer_specs(layer_widths(config().model), quant).items()}


@pytest.mark.parametrize("word", ["int4-h32-rms-ste", "int2-rms-ste"])
def test_rounding_to_nearest_is_the_layer_of_quantized_training_with_the_same_weights(source, word):
    quant = QuantConfig(weights=word, activations=word)
    tokens = torch.randint(0, 16, (4, 16), generator=torch.Generator().manual_seed(3))
    expected = quantize_model(load_model(source), quant)(tokens)
    found = load_model(RunStore(source.path.parent).run(quantize(source, quant, method="rtn").run))(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_weights_alone_are_rounded_in_the_rotated_basis_and_used_in_the_models_own(source):
    """In quantized training such a word means a rotated parametrisation, which full-precision weights are not."""
    quant = QuantConfig(weights="int4-h32-rms-ste", activations="bf16")
    tokens = torch.randint(0, 16, (4, 16), generator=torch.Generator().manual_seed(3))
    model = load_model(source)
    full = model(tokens)
    round_model(model, words_of(quant))
    after = RunStore(source.path.parent).run(quantize(source, quant, method="rtn").run)
    torch.testing.assert_close(load_model(after)(tokens), model(tokens))
    assert 0 < (model(tokens) - full).pow(2).mean().item() < 0.1 * full.var().item()


def test_compensation_goes_through_the_blocks_with_what_is_quantized_so_far(source):
    """Each layer's Ŵ is that of its inputs in the model whose earlier layers are rounded: recomputed here from plain hooks."""
    loaded = load(source)
    tokens = calibration(loaded.config, loaded.data, 512)[:, :-1]
    quant = QuantConfig(weights="int2-h32-rms-ste", activations="bf16", overrides={"blocks.1.o": {"weights": "bf16"}})
    specs, original = words_of(quant), {n: p.clone() for n, p in loaded.model.named_parameters()}
    model = loaded.model
    compensate_model(model, specs, tokens, rows=8)
    assert torch.equal(model.blocks[1].o.weight, original["blocks.1.o.weight"])
    for name in ("blocks.0.k", "blocks.1.up", "blocks.1.down"):
        seen = []
        layer = model.get_submodule(name)
        hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            model(tokens)
        hook.remove()
        x = specs[name].basis.rotate(seen[0])
        expected = compensated(original[f"{name}.weight"], x.T @ x, specs[name])
        close = (layer.weight - expected).abs() < 1e-4
        assert close.float().mean() > 0.98, name  # a value on the edge between two levels may fall to either side


def test_shared_and_quantized_inputs_are_seen_as_the_layer_multiplies_them(source):
    quant = QuantConfig(weights="int2-h32-rms-ste", activations="int4-h32-rms-ste")
    loaded = load(source)
    original = loaded.model.blocks[0].v.weight.clone()
    seen = []
    x = loaded.model.blocks[0].attention_norm(loaded.model.embed(calibration(loaded.config, loaded.data, 512)[:, :-1]))
    quantized_input = quantize_model(load_model(source), quant).blocks[0].q.quantize_input(x).flatten(0, -2)
    seen.append(compensated(original, quantized_input.T @ quantized_input, quant.weights))
    after = quantize(source, quant, method="gptq", calibration_tokens=512)
    found = load_model(RunStore(source.path.parent).run(after.run)).blocks[0].v.weight
    assert ((found - seen[0]).abs() < 1e-4).float().mean() > 0.98


# --- a run like any other ---------------------------------------------------------------------------------------------


def test_it_stands_in_one_table_with_trained_runs(source):
    quant = QuantConfig(weights="int2-h32-rms-trust", activations="int4-h32-rms-trust")
    results = {m: quantize(source, quant, method=m, calibration_tokens=1024) for m in ("rtn", "gptq")}
    assert len({source.result().loss, *(r.loss for r in results.values())}) == 3
    frame = load_runs(source.path.parent).set_index("run")
    row = frame.loc[results["gptq"].run]
    assert (row.state, row.scheme) == ("done", "ptq-gptq-w2a4")
    assert (row.w_stored_bits, row.a_stored_bits, row.tokens) == (2.0, 4.0, source.result().tokens)
    assert row.model_bits < frame.loc[source.name].model_bits / 3
    points = points_from_frame(frame.loc[[source.name, *(r.run for r in results.values())]].reset_index())
    assert {s.label: s.w_stored_bits for s in points.schemes} == {"bf16": 16, "ptq-rtn-w2a4": 2, "ptq-gptq-w2a4": 2}


def test_the_stored_model_has_the_reported_loss_and_is_not_made_twice(source, monkeypatch):
    quant = QuantConfig(weights="int3-learned-ste", activations="int4-learned-ste")
    result = quantize(source, quant, method="gptq", calibration_tokens=512)
    after = RunStore(source.path.parent).run(result.run)
    assert loss_on(load_model(after), after.config(), load(source).data) == result.loss
    written = after.model_path.stat().st_mtime_ns
    assert quantize(source, quant, method="gptq", calibration_tokens=512) == result
    assert after.model_path.stat().st_mtime_ns == written
    assert json.loads(after.config_path.read_text())["ptq"]["source"] == source.name
    assert after.state() == "done"


def test_what_makes_no_difference_is_not_another_run():
    c = config()

    def name(word, method="rtn", tokens=512, damping=0.01):
        return ptq_config(c, QuantConfig(weights=word, activations=word), method, tokens, damping).run_id

    assert name("int4-h32-rms-trust") == name("int4-h32-rms-ste") == name("int4-h32-rms-clip1.3") == name("int4.sr-h32-rms-ste")
    assert name("int4-learned.o-pact") == name("int4-learned.o-clip1")
    assert name("int4-h32-rms-ste", tokens=4096, damping=0.1) == name("int4-h32-rms-ste")
    assert name("int4-h32-rms-ste", "gptq", 512) == name("int4-h32-rms-ste", "gptq", 527)  # whole sequences
    assert len({name("int4-h32-rms-ste", "gptq", t, d) for t in (512, 1024) for d in (0.01, 0.1)}) == 4
    assert RunConfig.from_json(c.to_json()).run_id == c.run_id


@pytest.mark.parametrize(
    ("quant", "more", "words"),
    [
        ({"weights": "int4-h64-rms-ste"}, {}, ["h64", "blocks.0.q"]),
        ({"weights": "bf16"}, {}, ["bf16"]),
        ({"weights": "int4-h32-rms-ste", "activations": "int4-rms-ste"}, {}, ["rotated differently"]),
        ({"weights": "int4-rms-ste", "overrides": {"blocks.*.x": {"weights": "bf16"}}}, {}, ["blocks.*.x"]),
        ({"weights": "int4-rms-ste"}, {"calibration_tokens": 0}, ["calibration", "0"]),
        ({"weights": "int4-rms-ste"}, {"damping": 0.0}, ["damping", "0.0"]),
        ({"weights": "olive4-rms-ste"}, {}, ["gptq", "'olive4' rounds pairs", "choose rtn"]),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(source, quant, more, words):
    before = sorted(p.name for p in source.path.parent.iterdir())
    with pytest.raises(UsageError) as e:
        quantize(source, QuantConfig(**quant), method="gptq", **more)
    assert [w for w in words if w not in str(e.value)] == []
    assert sorted(p.name for p in source.path.parent.iterdir()) == before


def test_only_finished_full_precision_runs_are_quantized(tmp_path):
    quant = QuantConfig(weights="int4-rms-ste")
    store = RunStore(tmp_path)
    trained = store.run(train(config(QUEST, train__steps=2), runs=tmp_path).run)
    with pytest.raises(UsageError, match="quantized"):
        quantize(trained, quant)
    pending = store.run(config().run_id)
    pending.create(config())
    with pytest.raises(DataError, match="not finished"):
        quantize(pending, quant)
    assert BASE["train.steps"] == 12
