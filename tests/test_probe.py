"""The probe: masks, errors and shapes against written-out formulas, alignment on planted outliers, and what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import QUEST, config

from questctl.config import QuantConfig
from questctl.data import sampler
from questctl.errors import UsageError
from questctl.models.llama import build_model
from questctl.posttraining import probe_run
from questctl.posttraining.preflight import check_probe, default_probe_quants, ptq_config
from questctl.posttraining.probe import (
    NormalErrors,
    mask_of,
    normality,
    persistence_of_entries,
    persistence_of_features,
    probe,
    relative_error,
)
from questctl.quant.model import quantize_model
from questctl.quant.quantizer import Quantizer, make_quantizer
from questctl.quant.spec import QuantSpec
from questctl.store import RunStore
from questctl.training.checkpoint import load_tensors, model_bytes
from questctl.training.loop import train
from questctl.training.run_data import load_data

FAST = {"batches": 2, "steps": 0}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- quantizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "limit"), [("int2-rms-trust", 2.0), ("int2-rms-clip1", 1.5), ("int2-rms-ste", math.inf)])
def test_the_mask_is_the_region_that_the_estimator_declares(word, limit):
    x = normal(50, 32)
    s = 1.4935346 / 1.5 * x.pow(2).mean(1, keepdim=True).sqrt()
    assert torch.equal(mask_of(make_quantizer(word), x).round(), ((x / s).abs() <= limit).float())


def test_the_mask_stands_in_the_rotated_basis():
    x = normal(20, 8)
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    z = x @ torch.block_diag(torch.kron(h2, h2), torch.kron(h2, h2))
    found, expected = mask_of(make_quantizer("int2-h4-rms-trust"), x), mask_of(make_quantizer("int2-rms-trust"), z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert 0 < (expected < 0.5).sum() < expected.numel()


@pytest.mark.parametrize("word", ["int1-rms-ste", "int4-h64-rms-trust", "fp4-rms-ste", "ternary-h32-rms-ste", "lloyd2-rms-ste"])
def test_the_expected_error_is_the_derived_constant(word):
    quantizer = make_quantizer(word)
    found = NormalErrors(torch.device("cpu"))(quantizer, normal(16, 1024))
    assert found == pytest.approx(quantizer.spec.grid.mse, rel=0.02)  # 1024 values a row fix its scale to 2 %


def test_the_expected_error_of_a_learned_scale_is_at_that_scale():
    quantizer = make_quantizer("int8-learned-ste")
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    x = 4 * normal(64, 64)
    found = NormalErrors(torch.device("cpu"))(quantizer, x)
    assert found == pytest.approx(0.5**2 / 12 / 16, rel=0.02)  # steps of 0.5, no clipping: uniform noise
    error, energy = relative_error(quantizer, x)
    assert error / energy == pytest.approx(found, rel=0.05)


def test_the_relative_error_is_that_of_the_rotated_row():
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # rotated: four times ½, which one bit and a scale of ½·0.798 miss by 20 %
    error, energy = relative_error(Quantizer(QuantSpec.parse("int1-h4-rms-ste")), x)
    assert error / energy == pytest.approx((1 - 0.7978845587) ** 2, rel=1e-5)


def test_persistence_on_masks_written_by_hand():
    now, later = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    assert persistence_of_entries(now, later) == 0.5
    assert persistence_of_entries(torch.ones(1, 4), later) is None
    a = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])  # feature 0 always distrusted, feature 1 in a quarter
    b = torch.tensor([[0.0, 1.0], [1.0, 1.0]])  # feature 0 in a half, feature 1 never
    assert persistence_of_features(a, b) == pytest.approx((1 * 0.5 + 0.25 * 0) / 1.25)
    assert persistence_of_features(torch.ones(3, 2), b) is None


# --- distributions ----------------------------------------------------------------------------------------------------


def test_shape_is_kurtosis_and_kolmogorov_smirnov_distance():
    rng = np.random.default_rng(0)
    laplace = torch.from_numpy(rng.laplace(size=(20, 4000)) * rng.uniform(0.1, 10, size=(20, 1)))
    scaled = (laplace / laplace.square().mean(1, keepdim=True).sqrt()).flatten().numpy()
    kurtosis, distance = normality(laplace)
    assert kurtosis == pytest.approx((scaled**4).mean() - 3)
    assert kurtosis == pytest.approx(3, rel=0.2)
    assert distance == pytest.approx(stats.kstest(scaled, "norm").statistic, abs=1e-12)
    assert normality(normal(4000, 16))[0] == pytest.approx(-6 / 18, abs=0.03)  # rows are divided by their own RMS
    assert math.isnan(normality(torch.zeros(3, 4))[0])
    assert normality(torch.cat([normal(500, 64), torch.zeros(5, 64)])) == pytest.approx(normality(normal(500, 64)))


# --- whole runs -------------------------------------------------------------------------------------------------------


def words(*given):
    pairs = [(w, w) if isinstance(w, str) else w for w in given]
    return [QuantConfig(weights=w, activations=a) for w, a in pairs]


def gradients_by_hand(run, quant, batch):
    """∂L/∂W of every linear layer, of the run's weights quantized as `quant` says."""
    model = build_model(run.config().model.model_copy(update={"vocab_size": 16}), QuantConfig(), 0)
    model.load_state_dict(load_tensors(run.model_path))
    quantize_model(model, quant)(batch[:, :-1], batch[:, 1:]).backward()
    return {n: p.grad for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}


def test_alignment_is_the_cosine_of_gradients_by_hand(source):
    (quant,) = words("int2-h32-rms-trust")
    found = probe(source, [quant], sequences=4, **FAST).settings[0]
    text, one, everything = load_data(source.config()).val, [], []
    for step in range(2):
        batch = torch.from_numpy(sampler.batch(text, seed=0, step=step, batch_size=4, seq_len=16))
        a, b = (gradients_by_hand(source, q, batch) for q in (QuantConfig(), quant))
        one.append(float(torch.cosine_similarity(*(g["blocks.1.up.weight"].flatten() for g in (a, b)), 0)))
        everything.append(float(torch.cosine_similarity(*(torch.cat([x.flatten() for x in g.values()]) for g in (a, b)), 0)))
    by_name = {layer.layer: layer for layer in found.layers}
    assert by_name["blocks.1.up"].alignment == pytest.approx(sum(one) / 2, abs=1e-5)
    assert found.alignment == pytest.approx(sum(everything) / 2, abs=1e-5)
    assert found.alignment_range == pytest.approx((min(everything), max(everything)), abs=1e-5)
    assert found.layer_mean == pytest.approx(sum(layer.alignment for layer in found.layers) / 14)


def with_outliers(source, root):
    """The same function with features that are thirty times larger: norms scaled up, the weights that read them down."""
    tensors = load_tensors(source.model_path)
    for i in range(2):
        for norm, readers in (("attention_norm", "qkv"), ("ffn_norm", ("gate", "up"))):
            tensors[f"blocks.{i}.{norm}.weight"][::16] *= 30
            for reader in readers:
                tensors[f"blocks.{i}.{reader}.weight"][:, ::16] /= 30
    c = config(train__steps=60, train__seed=1)
    other = RunStore(root).run(c.run_id)
    other.create(c)
    other.model_path.write_bytes(model_bytes(tensors, {}))
    return other


def test_rotation_and_mask_are_told_apart_where_outliers_are_planted(source, tmp_path):
    found = probe(with_outliers(source, tmp_path), **FAST)
    assert [s.name for s in found.settings] == [f"int4{h}-rms-{m}" for h in ("-h32", "") for m in ("trust", "ste")]
    rotated, _, plain, _ = found.settings
    gains = {(c.part, c.setting): c.gain for c in found.contributions}
    assert gains["rotation", "int4-h32-rms-trust"] == rotated.alignment - plain.alignment
    assert gains["mask", "int4-rms-trust"] == plain.alignment - found.settings[3].alignment
    assert len(gains) == 4
    q = rotated.layers[0].activations, plain.layers[0].activations
    assert q[0].error < q[1].error / 3
    assert q[1].error > 5 * q[1].normal_error
    assert q[1].persistence > 0.5 > (q[0].persistence or 0)  # outliers stay in their features, unless they are rotated
    shape = {(d.layer, d.operand, d.rotation): d for d in found.distributions}
    assert shape["blocks.0.q", "activations", "none"].kurtosis > 5 > shape["blocks.0.q", "activations", "h32"].kurtosis
    assert len(found.distributions) == 14 * 2 * 2
    assert found.warnings == ()


def test_many_bits_are_all_but_full_precision_and_straight_through_trusts_all(source):
    found = probe(source, words("int8-h32-rms-ste", ("bf16", "int8-h32-rms-trust"), ("int8-rms-trust", "bf16")), **FAST)
    for setting in found.settings:
        assert setting.alignment > 0.99
        assert setting.loss == pytest.approx(found.reference_loss, abs=5e-3)
        assert all(layer.gradient_ratio == pytest.approx(1, abs=0.1) for layer in setting.layers)
    everything, inputs, weights = (setting.layers[3] for setting in found.settings)
    assert everything.weights.trusted == pytest.approx(1)
    assert everything.weights.persistence is None
    assert inputs.weights is None
    assert weights.activations is None
    assert found.contributions == ()


def test_masks_are_followed_by_training_on(source):
    before = source.model_path.read_bytes()
    found = probe(source, words("int2-rms-trust", "int2-rms-ste"), batches=2, steps=3)
    assert "last 3 steps" in found.persistence_of_weights
    trusted = [layer.weights for layer in found.settings[0].layers]
    assert all(0.3 < w.persistence <= 1 for w in trusted)
    assert min(w.persistence for w in trusted) < 1
    assert all(layer.weights.persistence is None for layer in found.settings[1].layers)
    assert source.model_path.read_bytes() == before
    assert probe(source, words("int2-rms-trust", "int2-rms-ste"), batches=2, steps=3) == found
    assert json.loads(json.dumps(found.to_dict()))["settings"][0]["name"] == "int2-rms-trust"


def test_a_quantized_run_is_probed_as_it_is_with_a_warning(tmp_path):
    run = RunStore(tmp_path).run(train(config(QUEST), runs=tmp_path).run)
    found = probe(run, **FAST)
    assert [s.name for s in found.settings] == ["int4-h32-rms-trust"]
    assert "poor reference" in found.warnings[0]
    assert run.name in found.warnings[0]


def test_a_rotated_parametrisation_is_compared_with_the_function_that_it_stands_for(tmp_path):
    """Weight-only training with a rotation stores W of x·(WH)ᵀ: the reference must be that function, and not x·Wᵀ."""
    c = config({"quant.weights": "int8-h32-rms-trust", "train.steps": 30})
    found = probe(RunStore(tmp_path).run(train(c, runs=tmp_path).run), **FAST)
    assert found.settings[0].loss == pytest.approx(found.reference_loss, abs=5e-3)
    assert found.settings[0].alignment > 0.99
    with pytest.raises(UsageError, match="rotated parametrisation"):
        check_probe(config(), [c.quant])


def test_an_unfinished_run_is_compared_with_its_checkpoint_before(tmp_path):
    c = config(QUEST, **{"quant.bits": 2})
    asked = iter(range(100))
    with pytest.raises(InterruptedError):
        train(c, runs=tmp_path, stop=lambda: next(asked) == 9)
    found = probe(RunStore(tmp_path).run(c.run_id), batches=2)
    assert found.persistence_of_weights == "from step 9 back to step 8"
    assert all(0.5 < layer.weights.persistence <= 1 for layer in found.settings[0].layers)


def test_embedding_head_and_cache_raise_the_loss_by_what_their_rounding_does(source, tmp_path):
    ends = {"embedding": "int2-h32-rms-trust", "head": "int2-rms-ste", "kv": "int2-h16-rms-trust"}
    (tmp_path / "q.toml").write_text("[quant]\n" + "".join(f"{key} = '{spec}'\n" for key, spec in ends.items()))
    found = probe_run(source, [tmp_path / "q.toml"], sequences=4, **FAST)
    text, losses = load_data(source.config()).val, []
    for quant in (QuantConfig(), QuantConfig(**ends)):
        model = build_model(source.config().model.model_copy(update={"vocab_size": 16}), quant, 0)
        model.load_state_dict(load_tensors(source.model_path))
        batches = [torch.from_numpy(sampler.batch(text, seed=0, step=i, batch_size=4, seq_len=16)) for i in range(2)]
        losses.append(sum(float(model(b[:, :-1], b[:, 1:]).detach()) for b in batches) / 2)
    (setting,) = found.settings
    assert setting.by_row == ends
    assert setting.loss - found.reference_loss == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert losses[1] != losses[0]
    assert {layer.weights for layer in setting.layers} == {None}


def test_words_that_have_no_meaning_here_are_refused(source):
    with pytest.raises(UsageError, match=r"quant\.kv: rotation h32 does not divide the width 16"):
        probe(source, [QuantConfig(kv="int4-h32-rms-trust")], **FAST)
    with pytest.raises(UsageError, match=r"quantize: quant\.kv: is quantized in training alone"):
        ptq_config(source.config(), QuantConfig(weights="int4-rms-ste", kv="int4-rms-ste"), "rtn")
    with pytest.raises(UsageError, match="h64"):
        probe(source, words("int4-h64-rms-ste"))
    with pytest.raises(UsageError, match="1 batches"):
        probe(source, batches=1)
    assert [str(q.weights) for q in default_probe_quants(source.config(), "fp4")] == [
        "fp4-h32-rms-trust",
        "fp4-h32-rms-ste",
        "fp4-rms-trust",
        "fp4-rms-ste",
    ]
