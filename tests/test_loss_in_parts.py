"""The loss without the logits of the whole batch, and blocks that compute again what they do not keep."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st

from questctl.config import sections
from questctl.kernels import native
from questctl.models.llama import Llama
from questctl.models.loss import summed_loss
from questctl.store import RunStore
from questctl.training.loop import train

STOCHASTIC = {"quant.weights": "int4-rms-ste", "quant.activations": "fp4.sr-ue8m0.g16-ste"}


def drawn(n, width, vocabulary, ignored, seed=0):
    """x (n, D), weight (V, D), targets (n,) with some that do not count."""
    g = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(rows, width, generator=g, requires_grad=True) for rows in (n, vocabulary))
    targets = torch.randint(vocabulary, (n,), generator=g)
    targets[:ignored] = -100
    return x, weight, targets


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 50), st.integers(0, 5), st.integers(1, 45))
def test_it_is_the_loss_of_torch_for_any_parts(n, width, vocabulary, ignored, rows):
    x, weight, targets = drawn(n, width, vocabulary, min(ignored, n))
    ours = summed_loss(x, weight, targets, rows)
    gradients = torch.autograd.grad(0.3 * ours, (x, weight))
    plain = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(0.3 * plain, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_its_gradients_are_those_of_finite_differences():
    x, weight, targets = (t.detach().double() if t.is_floating_point() else t for t in drawn(5, 3, 7, 1))
    x.requires_grad_()
    step = 1e-3  # the loss is summed in fp32
    loss = summed_loss(x, weight, targets, 2)
    (of_x,) = torch.autograd.grad(loss, x)
    for i, j in ((0, 0), (1, 2), (4, 1)):
        there, back = x.detach().clone(), x.detach().clone()
        there[i, j] += step
        back[i, j] -= step
        slope = (summed_loss(there, weight, targets, 2) - summed_loss(back, weight, targets, 2)) / (2 * step)
        assert float(of_x[i, j]) == pytest.approx(float(slope), abs=2e-3)


def test_frozen_operands_get_no_gradient_and_none_is_computed_without_grad():
    x, weight, targets = drawn(6, 4, 10, 0)
    summed_loss(x, weight.detach(), targets, 4).backward()
    assert x.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not summed_loss(x, weight, targets, 4).requires_grad


def test_in_bf16_it_is_as_near_to_fp32_as_the_loss_of_torch_is():
    x, weight, targets = drawn(64, 32, 100, 3)
    exact = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets, reduction="sum"), (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ours = summed_loss(x, weight, targets, 10)
        plain = F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")
    of_ours, of_plain = (torch.autograd.grad(loss, (x, weight)) for loss in (ours, plain))
    for a, b, c in zip(of_ours, of_plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() < 1.2 * (b - c).norm()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_takes_it_where_logits_are_many(monkeypatch, tied):
    c = tiny.config(model__vocab_size=50, model__tied=tied)
    model, tokens = Llama(c.model), torch.arange(48).view(3, 16)
    plain = model(tokens, tokens)
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    monkeypatch.setattr(sections, "LOGITS_AT_ONCE", 500)
    monkeypatch.setattr(model.head, "forward", lambda *_: pytest.fail("the logits of all tokens are computed"))
    found = model(tokens, tokens)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(found, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_run_is_the_same_to_the_accuracy_of_sums(monkeypatch, tmp_path):
    whole = train(tiny.config(tiny.QUEST), runs=tmp_path / "whole")
    monkeypatch.setattr(sections, "LOGITS_AT_ONCE", 16 * 40)
    parts = train(tiny.config(tiny.QUEST), runs=tmp_path / "parts")
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
    assert parts.loss != whole.loss  # it did go another way


BLOCKS = {"bf16": {}, "quest": tiny.QUEST, "lsq": tiny.LSQ, "stochastic": STOCHASTIC}


@pytest.mark.parametrize("name", slow_but(BLOCKS, ("quest", "stochastic")))
def test_blocks_that_compute_again_train_to_the_same_bits(tmp_path, name):
    quant = BLOCKS[name]
    for recompute in (False, True):
        native.checked.cache_clear()  # the first use of a native pass, which compares it with torch, is inside a block
        train(tiny.config(quant, train__checkpoint_activations=recompute), runs=tmp_path / str(recompute))
    c = tiny.config(quant)
    weights = [
        (RunStore(tmp_path / str(which)).run(c.run_id).path / "model.safetensors").read_bytes() for which in (False, True)
    ]
    assert weights[0] == weights[1]


def test_blocks_that_compute_again_keep_their_inputs_alone():
    """The tensors that autograd saves: of a plain model those of all blocks, else one input a block."""
    c = tiny.config(model__vocab_size=50, model__n_layer=4)
    model, tokens = Llama(c.model), torch.arange(48).view(3, 16)
    counts = {}
    for model.recomputes in (False, True):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.setdefault(x.data_ptr(), x), lambda x: x):
            model(tokens, tokens)
        counts[model.recomputes] = sum(x.numel() for x in kept.values())
    assert counts[True] < counts[False] / 3
