"""The quantized linear layer and the swap into a model."""

import copy
import fnmatch

import pytest
import torch
from torch import nn

from questctl.config import LayerQuant, QuantConfig
from questctl.errors import UsageError
from questctl.quant.linear import QuantLinear, calibrate_inputs, fan_out
from questctl.quant.model import quantize_model
from questctl.quant.packed import PackedLinear, freeze
from questctl.quant.quantizer import Quantizer
from questctl.quant.rotations import Hadamard
from questctl.quant.spec import QuantSpec

QUEST = "int4-h32-rms-trust"


def layer(weights: str, activations: str, k: int = 64, n: int = 48) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear(k, n, QuantSpec.parse(weights), QuantSpec.parse(activations), name="blocks.0.q")


def toy() -> nn.Module:
    """Two blocks with linears q and down, and a head that stays."""
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"q": nn.Linear(64, 64, bias=False), "down": nn.Linear(96, 64, bias=False)}) for _ in range(2)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(64, 10, bias=False)})


@pytest.mark.parametrize("rows", [1, 63, 123])
def test_product_of_the_quantized_operands(rows: int) -> None:
    m, x = layer(QUEST, QUEST), torch.randn(rows, 64)
    quantizer = Quantizer(QuantSpec.parse(QUEST))
    torch.testing.assert_close(m(x), quantizer(x) @ quantizer(m.weight).T)


@pytest.mark.parametrize("spec_text", [QUEST, "int4-rms-ste", "fp4-h64-rms-trust"])
def test_rotations_cancel(spec_text: str) -> None:
    """At 8 bits and many the layer is nearly the full-precision one, rotated or not."""
    spec_text = spec_text.replace("int4", "int8")
    m, x = layer(spec_text, spec_text), torch.randn(50, 64)
    exact = x @ m.weight.T
    assert (m(x) - exact).norm() / exact.norm() < (0.02 if "int8" in spec_text else 0.25)


def test_weight_only_is_a_rotated_parametrisation() -> None:
    m, x = layer("int8-h32-rms-trust", "bf16"), torch.randn(50, 64)
    rotated = x @ Hadamard(32).rotate(m.weight).T
    assert (m(x) - rotated).norm() / rotated.norm() < 0.02


def test_weights_that_mean_something_are_rotated_back() -> None:
    spec_texts = QuantSpec.parse("int8-h32.s-rms-trust"), QuantSpec.parse("bf16")
    plain, x = nn.Linear(64, 48), torch.randn(50, 64)
    m = QuantLinear.from_linear(plain, *spec_texts, rotate_back=True)
    exact = plain(x)
    for ours in (m(x), PackedLinear(m)(x)):
        assert (ours - exact).norm() / exact.norm() < 0.02
    (ours,) = torch.autograd.grad(m(x).square().sum(), m.weight)
    (theirs,) = torch.autograd.grad(exact.square().sum(), m.weight)
    assert (ours - theirs).norm() / theirs.norm() < 0.05


@pytest.mark.parametrize("gradients", ["bf16", "int8-absmax-ste"])
def test_a_bias_is_added_to_the_product_and_takes_the_whole_gradient(gradients: str) -> None:
    spec_texts = [QuantSpec.parse(spec_text) for spec_text in (QUEST, QUEST, gradients)]
    biased, other = (QuantLinear.from_linear(nn.Linear(64, 48, bias=bias), *spec_texts) for bias in (True, False))
    x, g = torch.randn(3, 5, 64), torch.randn(3, 5, 48)
    y = biased(x)
    without = QuantLinear.from_linear(biased, *spec_texts)
    without.bias = None
    assert torch.equal(y, without(x) + biased.bias)
    assert all(torch.equal(a, b) for a, b in zip(fan_out(x, biased, other), (y, other(x)), strict=True))
    assert torch.equal(torch.autograd.grad(y, biased.bias, g)[0], g.sum((0, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert biased(x).dtype == torch.bfloat16
    with torch.no_grad():
        together = nn.ModuleDict({"q": biased, "k": other})
        assert torch.equal(freeze(nn.Sequential(copy.deepcopy(biased)))(x), y)
        exact = freeze(together, "integers")
        assert exact.q.rows is exact.k.rows
        torch.testing.assert_close(fan_out(x, exact.q, exact.k)[0], y)


def test_activations_only_rotate_the_weight_along() -> None:
    m, x = layer("bf16", "int8-h32-rms-trust"), torch.randn(50, 64)
    exact = x @ m.weight.T
    assert (m(x) - exact).norm() / exact.norm() < 0.02
    (ours,) = torch.autograd.grad(m(x).square().sum(), m.weight)
    (theirs,) = torch.autograd.grad(exact.square().sum(), m.weight)
    assert (ours - theirs).norm() / theirs.norm() < 0.05


@pytest.mark.parametrize(
    ("weights", "activations", "says"),
    [
        ("int4-h128-rms-trust", "bf16", "quant.weights: layer blocks.0.q: rotation h128 does not divide the width 64"),
        ("bf16", "int4-h128-rms-trust", "quant.activations: layer blocks.0.q: rotation h128"),
        (QUEST, "int4-h64-rms-trust", "layer blocks.0.q: weights 'int4-h32-rms-trust' and activations 'int4-h64-rms-trust'"),
        (QUEST, "int4-rms-ste", "rotated differently"),
    ],
)
def test_what_does_not_fit_names_the_layer(weights: str, activations: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        layer(weights, activations)
    assert says in str(caught.value)


def test_learned_scales_count_what_shares_them() -> None:
    m = layer("int4-learned-clip1", "int4-learned-clip1")
    assert (m.weight_quantizer.numel, m.input_quantizer.numel) == (64 * 48, None)
    scale = m.weight_quantizer.scale
    assert scale is not None
    assert scale.item() == pytest.approx(2.5139306 / 7.5 * m.weight.square().mean().sqrt().item(), rel=1e-5)


# --- one input, several layers ----------------------------------------------------------------------------------------


def test_fan_out_quantizes_a_shared_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer(QUEST, QUEST) for _ in range(3)]
    x = torch.randn(5, 64, requires_grad=True)
    calls = []
    monkeypatch.setattr(QuantLinear, "quantize_input", lambda self, x: calls.append(1) or self.input_quantizer(x))
    outs = fan_out(x, *layers)
    assert len(calls) == 1
    separate = [m(x) for m in layers]
    assert all(torch.equal(a, b) for a, b in zip(outs, separate, strict=True))
    shared = torch.autograd.grad(sum(o.square().sum() for o in outs), x)[0]
    torch.testing.assert_close(shared, torch.autograd.grad(sum(o.square().sum() for o in separate), x)[0])


@pytest.mark.parametrize(
    "spec_texts", [[QUEST, "bf16"], [QUEST, "int4-h32-rms-ste"], ["int4-learned-clip1"] * 2, ["bf16", "bf16"]], ids="+".join
)
def test_fan_out_is_what_the_layers_give(spec_texts: list[str]) -> None:
    layers = [layer(w, w) for w in spec_texts]
    for i, m in enumerate(layers):
        if m.input_quantizer.scale is not None:  # each layer has trained its own
            m.input_quantizer.scale.data.mul_(i + 1)
    x = torch.randn(5, 64)
    assert all(torch.equal(a, m(x)) for a, m in zip(fan_out(x, *layers), layers, strict=True))
    plain = nn.Linear(64, 3)
    assert torch.equal(fan_out(x, plain)[0], plain(x))


def test_a_rotated_unquantized_weight_shares_its_input_too() -> None:
    layers = [layer("bf16", QUEST), layer(QUEST, QUEST)]
    x = torch.randn(5, 64)
    assert all(torch.equal(a, m(x)) for a, m in zip(fan_out(x, *layers), layers, strict=True))


# --- the swap ---------------------------------------------------------------------------------------------------------


def config(overrides: dict[str, LayerQuant] | None = None, **spec_texts: str) -> QuantConfig:
    return QuantConfig(overrides=overrides or {}, **spec_texts)


def test_swap_keeps_the_parameters_and_leaves_the_head() -> None:
    model = toy()
    before = dict(model.named_parameters())
    quantize_model(model, config(weights=QUEST, activations=QUEST))
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds == {"head": nn.Linear} | {f"blocks.{i}.{n}": QuantLinear for i in range(2) for n in ("q", "down")}
    assert f"weights={QUEST}, activations={QUEST}" in repr(model)


def test_bf16_swaps_nothing() -> None:
    model = quantize_model(toy(), config())
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_overrides() -> None:
    down = LayerQuant(weights="int8-h32-rms-trust")
    exact = LayerQuant(weights="bf16", activations="bf16")
    model = quantize_model(toy(), config({"blocks.*.down": down, "blocks.1.down": exact}, weights=QUEST, activations=QUEST))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    spec_texts = {n: (str(m.weight_quantizer.spec), str(m.input_quantizer.spec)) for n, m in layers.items()}
    assert spec_texts == {
        "blocks.0.q": (QUEST, QUEST),
        "blocks.1.q": (QUEST, QUEST),
        "blocks.0.down": ("int8-h32-rms-trust", QUEST),
    }


@pytest.mark.parametrize("pattern", ["blocks.*.dwon", "head", "blocks.7.q", "", "q", "blocks"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"quant\.overrides: unknown layer") as caught:
        quantize_model(toy(), config({pattern: LayerQuant(weights=QUEST)}))
    assert "blocks.*.down, blocks.*.q" in str(caught.value)
    assert not fnmatch.fnmatch("blocks.0.q", pattern)


def test_two_patterns_that_disagree_are_refused_and_two_that_agree_are_not() -> None:
    eight, four = LayerQuant(weights="int8-h32-rms-trust"), LayerQuant(weights=QUEST)
    with pytest.raises(UsageError, match=r"'blocks\.\*\.q' \(int8-h32-rms-trust\) and 'blocks\.0\.\*' .* layer blocks\.0\.q"):
        quantize_model(toy(), config({"blocks.*.q": eight, "blocks.0.*": four}))
    quantize_model(toy(), config({"blocks.*.q": eight, "blocks.0.*": LayerQuant(activations="bf16")}))
    quantize_model(toy(), config({"blocks.*.q": eight, "blocks.0.q": four, "blocks.1.*": eight}))


def test_a_width_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(UsageError, match=r"quant\.weights: layer blocks\.0\.down: rotation h64 does not divide the width 96"):
        quantize_model(toy(), config(weights="int4-h64-rms-trust", activations="int4-h64-rms-trust"))


def test_calibration_sets_every_learned_input_scale_from_what_the_layer_sees() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Chain()
    quantize_model(model, config(weights="int8-learned-clip1", activations="int8-learned-clip1"))
    x = 5 * torch.randn(200, 64)
    calibrate_inputs(model, x)
    first, second = (m for m in model.blocks if isinstance(m, QuantLinear))
    for linear, seen in ((first, x), (second, first(x))):
        spec, scale = linear.input_quantizer.spec, linear.input_quantizer.scale
        assert scale is not None
        assert scale.item() == pytest.approx(spec.grid.unit * seen.square().mean().sqrt().item(), rel=1e-5)
    frozen = [p.clone() for p in model.parameters()]
    model(x)
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.parameters(), strict=True))
