"""Quantized gradients: the two products of the backward pass by hand, unbiased draws, run ids and labels, a run."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch._inductor.config as inductor
from command_line import invoke
from helpers import drawn_sums
from tiny import QUEST, config
from torch import nn

from questctl.analysis.schemes import read_scheme
from questctl.config import QuantConfig, RunConfig, flat_items
from questctl.errors import UsageError
from questctl.models.llama import build_model
from questctl.quant.layer_specs import check_layers
from questctl.quant.linear import QuantLinear
from questctl.quant.model import quantize_model
from questctl.quant.quantizer import make_quantizer
from questctl.quant.spec import QuantSpec
from questctl.store import RunStore
from questctl.training.loop import train

SPECS = [
    "int8-absmax-ste",
    "int4-h16-absmax-ste",
    "sint3-h8.s-rms-ste",
    "fp4-e8m0.g16-ste",
    "int2-rms.g16-2of4-ste",
    "int1-meanstd-ste",
]


def layer(weights: str, activations: str, gradients: str, k: int = 64, n: int = 48) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear(k, n, *(QuantSpec.parse(w) for w in (weights, activations, gradients)), name="blocks.0.q")


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(g: np.ndarray) -> np.ndarray:
    """int4-h16-absmax-ste in fp64, levels searched: rows rotated in blocks of 16, the largest entry on 7.5, turned back."""
    h = np.kron(np.eye(g.shape[1] // 16), scipy.linalg.hadamard(16) / 4)
    z = g @ h
    s = np.abs(z).max(1, keepdims=True) / 7.5
    levels = np.arange(16) - 7.5
    return s * levels[np.abs(z[..., None] / s[..., None] - levels).argmin(-1)] @ h.T


@pytest.mark.parametrize("shape", [(1,), (63,), (3, 5)])
def test_both_products_take_the_gradient_rounded_once_by_hand(shape: tuple[int, ...]) -> None:
    m, x, g = layer("bf16", "bf16", "int4-h16-absmax-ste"), normal(*shape, 64).requires_grad_(), normal(*shape, 48, seed=2)
    y = m(x)
    torch.testing.assert_close(y, x @ m.weight.T)  # the forward pass is that of the plain layer
    y.backward(g)
    rounded = by_hand(g.double().reshape(-1, 48).numpy())
    flat = x.detach().double().reshape(-1, 64).numpy()
    expected = rounded @ m.weight.detach().double().numpy(), rounded.T @ flat
    assert x.grad is not None
    assert m.weight.grad is not None
    np.testing.assert_allclose(x.grad.reshape(-1, 64).numpy(), expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(m.weight.grad.numpy(), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec_text", SPECS)
def test_quantized_operands_take_part_as_in_the_forward_pass(spec_text: str) -> None:
    """With QuEST's words: the chain rule written out around the products, for the input and for the weight."""
    quest = "int4-h32-rms-trust"
    m, x, g = layer(quest, quest, spec_text), normal(9, 64).requires_grad_(), normal(9, 48, seed=2)
    m(x).backward(g)
    rounded = m.gradient_quantizer.of_gradient(g)
    assert not torch.equal(rounded, g)
    spec = m.gradient_quantizer.spec
    turned = make_quantizer(spec_text)(g)
    torch.testing.assert_close(rounded, spec.basis.unrotate(turned) if spec.basis else turned)
    inputs, weights = (t.detach().clone().requires_grad_() for t in (x, m.weight))
    xq, wq = make_quantizer(quest)(inputs), make_quantizer(quest)(weights)
    (into_x,) = torch.autograd.grad(xq, inputs, rounded @ wq.detach())
    (into_w,) = torch.autograd.grad(wq, weights, rounded.T @ xq.detach())
    torch.testing.assert_close(x.grad, into_x)
    torch.testing.assert_close(m.weight.grad, into_w)


def test_a_rotated_weight_beside_rotated_inputs_alone_gets_rounded_gradients_too() -> None:
    m, x, g = layer("bf16", "int8-h32-rms-trust", "int2-absmax-ste"), normal(9, 64), normal(9, 48, seed=2)
    m(x).backward(g)
    plain = layer("bf16", "int8-h32-rms-trust", "bf16")
    plain(x).backward(m.gradient_quantizer.of_gradient(g))
    torch.testing.assert_close(m.weight.grad, plain.weight.grad)


@pytest.mark.parametrize(
    "spec_text",
    [pytest.param("sint4.sr-absmax-ste", marks=pytest.mark.slow), "int3.sr-h16-absmax-ste", "fp4.sr-h8.s-absmax.g16-ste"],
)
def test_stochastic_rounding_leaves_the_mean_of_both_gradients_as_it_is(spec_text: str) -> None:
    """Nothing is clipped by absmax, so E[Q(g)] = g; rounding to nearest is far from that."""
    x, g, draws = normal(6, 64).requires_grad_(), normal(6, 48, seed=2), 1500
    exact, m, nearest = (layer("bf16", "bf16", w) for w in ("bf16", spec_text, spec_text.replace(".sr", "")))
    wanted = torch.autograd.grad(exact(x), (x, exact.weight), g)
    sums, squares = drawn_sums(m, x, g, wanted, draws)
    biased = torch.autograd.grad(nearest(x), (x, nearest.weight), g)
    for total, square, true, off in zip(sums, squares, wanted, biased, strict=True):
        mean, error = total / draws, (square / draws / draws).sqrt()  # of the mean
        assert ((mean - true).abs() <= 5.5 * error + 1e-6).all()
        assert (off - true).norm() > 8 * (mean - true).norm()


def test_draws_are_new_each_time_and_those_of_the_generator() -> None:
    q, g = make_quantizer("int2.sr-h16-absmax-ste"), normal(5, 48)
    one, same, other = (q.of_gradient(g, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    plain = make_quantizer("int2-h16-absmax-ste")
    assert torch.equal(plain.of_gradient(g), plain.of_gradient(g))


def test_zero_and_tiny_gradients_and_half_precision() -> None:
    for spec_text in SPECS:
        q = make_quantizer(spec_text)
        assert not q.of_gradient(torch.zeros(3, 48)).any()
        g = normal(3, 48)
        torch.testing.assert_close(q.of_gradient(g * 2.0**-40) * 2.0**40, q.of_gradient(g), rtol=0, atol=0)
        half = q.of_gradient(g.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), q.of_gradient(g.bfloat16().float()), rtol=2**-8, atol=0)


# --- configs ----------------------------------------------------------------------------------------------------------


def test_full_precision_gradients_leave_json_and_run_id_as_they_were() -> None:
    c = config(QUEST)
    assert "gradients" not in c.to_json()["quant"]
    assert RunConfig.from_json(c.to_json()) == c
    assert config(QUEST, quant__gradients="bf16").run_id == c.run_id
    assert dict(flat_items(c))["quant.gradients"] == "bf16"
    changed = config(QUEST, quant__gradients="int8.sr-h32-absmax-ste")
    assert changed.run_id != c.run_id
    assert changed.scheme == "quest-w4a4+g.int8.sr-h32-absmax"
    assert changed.to_json()["quant"]["gradients"] == "int8.sr-h32-absmax-ste"
    assert RunConfig.from_json(changed.to_json()) == changed
    assert RunStore("x").run(changed.run_id).name == changed.run_id
    labels = {QuantConfig(gradients=w).label for w in ("bf16", "int8-absmax-ste", "int8.sr-absmax-ste", "int4-absmax-ste")}
    assert labels == {"bf16", "bf16+g.int8-absmax", "bf16+g.int8.sr-absmax", "bf16+g.int4-absmax"}


def test_labels_with_gradients_are_read_as_schemes() -> None:
    scheme = read_scheme("quest-w4a4+g.int8-absmax")
    assert scheme is not None
    assert (scheme.w_grid_bits, scheme.a_grid_bits) == (4, 4)


@pytest.mark.parametrize(
    ("spec_text", "says"),
    [
        ("int8-h64-absmax-ste", ["quant.gradients", "64", "d_model 32"]),
        ("int8-absmax-trust", ["quant.gradients", "'trust'", "ste"]),
        ("int8-learned-ste", ["quant.gradients", "'learned'"]),
        ("ec4-ste", ["quant.gradients", "'ec4'", "weights"]),
        ("int8-absmx-ste", ["quant.gradients", "'absmx'", "did you mean 'absmax'"]),
    ],
)
def test_words_that_do_not_suit_are_refused_when_configured(spec_text: str, says: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        config(quant__gradients=spec_text)
    assert [text for text in says if text not in str(caught.value)] == []


def test_groups_that_do_not_divide_the_outputs_are_refused_naming_the_layer() -> None:
    c = config({"quant.gradients": "int8-rms.g64-ste", "model.d_ff": 96})
    with pytest.raises(UsageError, match=r"quant\.gradients: outputs of layer blocks\.0\.q: scale rms\.g64: .* width 32"):
        check_layers(c.model, c.quant)
    with pytest.raises(UsageError, match=r"quant\.gradients: outputs of layer"):
        build_model(c.model.model_copy(update={"vocab_size": 16}), c.quant, 0)


def test_layers_in_full_precision_are_swapped_for_their_gradients() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(32, 32, bias=False)]), "head": nn.Linear(32, 4, bias=False)})
    quantize_model(model, QuantConfig(gradients="int8-absmax-ste"))
    assert isinstance(model.blocks[0], QuantLinear)
    assert not isinstance(model.head, QuantLinear)
    assert "gradients=int8-absmax-ste" in repr(model)
    assert "gradients" not in repr(layer("int4-rms-ste", "bf16", "bf16"))


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_run_with_quantized_gradients(tmp_path) -> None:
    """It learns, draws the same again, and differs from the run with exact gradients."""
    keys = {"quant.gradients": "int4.sr-h32-absmax-ste", "train.steps": 40}
    first = train(config(QUEST | keys), runs=tmp_path / "a")
    again = train(config(QUEST | keys), runs=tmp_path / "b")
    exact = train(config(QUEST, train__steps=40), runs=tmp_path / "a")
    assert first.loss == again.loss
    assert first.loss != exact.loss
    assert abs(first.loss - exact.loss) < 0.1
    assert (first.scheme, first.w_stored_bits, first.model_bits) == ("quest-w4a4+g.int4.sr-h32-absmax", 4, exact.model_bits)
    shown = invoke("runs", "ls", "--runs", tmp_path / "a")
    assert shown.exit_code == 0


@pytest.mark.parametrize("backward", ["once", "both"])
def test_a_run_may_quantize_gradients_alone(backward: str, tmp_path) -> None:
    """There are no operands whose masks could be measured."""
    c = config({"quant.gradients": "int8-absmax-ste", "quant.backward": backward, "train.steps": 2})
    assert train(c, runs=tmp_path).steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("spec_text", ["int4-h16-absmax-ste", "sint4.sr-rms.g16-ste"])
@inductor.patch(fallback_random=True)  # compiled code has another generator of its own
def test_compiled_equals_eager(spec_text: str) -> None:
    m, x, g = (
        layer("int4-h32-rms-trust", "int4-h32-rms-trust", spec_text),
        normal(9, 64).requires_grad_(),
        normal(9, 48, seed=2),
    )
    torch.compiler.reset()
    results = []
    for f in (m, torch.compile(m, fullgraph=True)):
        torch.manual_seed(3)
        y = f(x)
        results.append((y.detach(), *torch.autograd.grad(y, (x, m.weight), g)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
