"""The learning rate against torch's scheduler and against hand-made points; AdamW against torch's and against its formula."""

import math
from itertools import pairwise

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from questctl.config import OptimConfig
from questctl.errors import DataError
from questctl.models.llama import build_model
from questctl.training.optim import AdamW, learning_rate


@pytest.mark.parametrize("steps", [3, 5, 11, 97, 522, 1000])  # where warmup·steps is 1, torch divides by zero
@pytest.mark.parametrize("warmup", [0.1, 0.25, 0.5])
def test_cosine_is_one_cycle(steps, warmup):
    config = OptimConfig(lr=3e-3, warmup_frac=warmup, start_factor=0.01, final_factor=0.1)
    reference = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        reference,
        max_lr=3e-3,
        total_steps=steps,
        pct_start=warmup,
        anneal_strategy="cos",
        div_factor=100,
        final_div_factor=0.1,
        cycle_momentum=False,
    )
    for step in range(steps):
        assert learning_rate(step, steps, config) == pytest.approx(cycle.get_last_lr()[0], rel=1e-12)
        reference.step()
        if step < steps - 1:
            cycle.step()


def test_landmarks():
    c = OptimConfig(lr=1.0, warmup_frac=0.1, start_factor=0.01, final_factor=0.1, decay_frac=0.2)
    for schedule in ("cosine", "wsd", "constant"):
        s = c.model_copy(update={"schedule": schedule})
        assert learning_rate(0, 100, s) == pytest.approx(0.01)
        assert learning_rate(9, 100, s) == pytest.approx(1.0)
    wsd = c.model_copy(update={"schedule": "wsd"})
    assert [learning_rate(i, 100, wsd) for i in (10, 50, 79)] == [1.0] * 3
    assert learning_rate(84, 100, wsd) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))
    assert learning_rate(99, 100, wsd) == pytest.approx(0.1)
    assert learning_rate(99, 100, c.model_copy(update={"schedule": "constant"})) == 1.0
    cosine_middle = 9 + 90 // 2
    assert learning_rate(cosine_middle, 100, c) == pytest.approx(0.55)


@settings(deadline=None)
@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.6),
    decay=st.floats(0, 0.4),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
)
def test_every_schedule_stays_in_range_and_turns_once(steps, warmup, decay, start, final, schedule):
    c = OptimConfig(lr=2.0, warmup_frac=warmup, decay_frac=decay, start_factor=start, final_factor=final, schedule=schedule)
    lrs = [learning_rate(i, steps, c) for i in range(steps)]
    assert all(2 * min(start, final) - 1e-9 <= lr <= 2 + 1e-9 for lr in lrs)
    top = lrs.index(max(lrs))
    assert all(a <= b + 1e-9 for a, b in pairwise(lrs[: top + 1]))
    assert all(a >= b - 1e-9 for a, b in pairwise(lrs[top:]))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3, bias=False), nn.RMSNorm(3), nn.Linear(3, 7, bias=False))


def with_gradients(m, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_adamw_is_torchs():
    ours, theirs = model(), model()
    config = OptimConfig(weight_decay=0.3)
    optimizer = AdamW(ours, config)
    groups = [
        {"params": [theirs[1].weight, theirs[3].weight], "weight_decay": 0.3},
        {"params": [theirs[0].weight, theirs[2].weight], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        for m in (ours, theirs):
            with_gradients(m, step)
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step(0.01 * (step + 1), skip=torch.zeros(()))
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adamw_is_its_formula():
    """arXiv 1711.05101, algorithm 2, in fp64 by hand."""
    m, c = model(), OptimConfig()
    w = m[1].weight.detach().double().clone()
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    optimizer = AdamW(m, c)
    for t in range(1, 4):
        with_gradients(m, t)
        g = m[1].weight.grad.double()
        first = 0.9 * first + 0.1 * g
        second = 0.95 * second + 0.05 * g**2
        w = w - 0.1 * (first / (1 - 0.9**t) / ((second / (1 - 0.95**t)).sqrt() + 1e-8) + 0.1 * w)
        optimizer.step(0.1)
    torch.testing.assert_close(m[1].weight.double(), w, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_changes_nothing_not_even_for_nan_gradients():
    m = model()
    optimizer = AdamW(m, OptimConfig())
    with_gradients(m, 0)
    optimizer.step(0.1, skip=torch.zeros(()))
    before = [p.clone() for p in m.parameters()], {k: v.clone() for k, v in optimizer.tensors().items()}
    m[1].weight.grad.fill_(math.nan)
    optimizer.step(0.1, skip=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), before[0], strict=True))
    assert all(torch.equal(v, before[1][k]) for k, v in optimizer.tensors().items())
    assert {float(s) for group in optimizer.groups for s in group.steps} == {1.0}


def test_state_goes_out_and_in_bit_for_bit():
    a, b = model(), model()
    first, second = AdamW(a, OptimConfig()), AdamW(b, OptimConfig())
    for step in range(3):
        with_gradients(a, step)
        first.step(0.1)
    b.load_state_dict(a.state_dict())
    second.load({k: v.clone() for k, v in first.tensors().items()}, step=3)
    for m, optimizer in ((a, first), (b, second)):
        with_gradients(m, 9)
        optimizer.step(0.1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_state_of_another_model_is_refused():
    optimizer = AdamW(model(), OptimConfig())
    with pytest.raises(DataError, match="does not fit the model"):
        optimizer.load({}, 0)
    with pytest.raises(DataError, match="other shapes"):
        optimizer.load({k: torch.zeros(2) for k in optimizer.tensors()}, 0)


def test_only_matrices_are_decayed():
    c = tiny.config(tiny.LSQ)
    llama = build_model(c.model.model_copy(update={"vocab_size": 16}), c.quant, 0)
    decayed, plain = AdamW(llama, c.optim).groups
    assert (decayed.decay, plain.decay) == (0.1, 0.0)
    assert {n.split(".")[-2] for n in decayed.names} == {"head", "q", "k", "v", "o", "gate", "up", "down"}
    assert {n.split(".")[-2] for n in plain.names} == {
        "embed",
        "norm",
        "attention_norm",
        "ffn_norm",
        "weight_quantizer",
        "input_quantizer",
    }
    assert len(decayed.names) + len(plain.names) == len(list(llama.parameters()))
