"""The learning rate against torch's scheduler and hand-made points; AdamW against torch's; AdamW and Muon against formulas."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from command_line import run_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from questctl.config import OptimConfig
from questctl.config.rates import ALL_ALIKE, GroupRates, group_rates, learning_rate
from questctl.data.tokens import prepare
from questctl.errors import DataError, UsageError
from questctl.models.llama import Llama, build_model
from questctl.quant.quantizer import Quantizer
from questctl.quant.spec import QuantSpec
from questctl.sweep.costs import flops_per_token, optimizer_values
from questctl.training import optim
from questctl.training.branch import branch
from questctl.training.loop import Trainer
from questctl.training.optim import Optimizer, calibration_steps, newton_schulz


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


def test_knots():
    c = OptimConfig(lr=2.0, warmup_frac=0.0, warmup_steps=11, schedule="knots", knots=".5:1,0.75 : .2,.9:.2")
    assert c.knots == "0.5:1, 0.75:0.2, 0.9:0.2"
    at = {10: 1.0, 60: 1.0, 85: 0.2, 100: 0.2, 110: 0.2, 72: 1 - 0.8 * (0.62 - 0.5) / 0.25}  # share .62 is step 72
    assert {step: learning_rate(step, 111, c) / 2 for step in at} == pytest.approx(at)
    for changes, message in (
        ({"knots": "0.5:1"}, "optim.knots: is for optim.schedule=knots, not cosine"),
        ({"schedule": "knots"}, "needs points such as"),
        ({"schedule": "knots", "knots": "0.5:1, 0.5:0"}, "shares must ascend"),
        ({"schedule": "knots", "knots": "50:1"}, "'50:1' is not SHARE:FACTOR"),
        ({"schedule": "knots", "knots": "0.5"}, "'0.5' is not SHARE:FACTOR"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimConfig(**changes)


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


def blocks():
    """The same with its linear layers where those of a Llama's blocks are, except the head."""
    m = model()
    return nn.ModuleDict({"embed": m[0], "blocks": nn.ModuleList([m[1], nn.Linear(5, 3, bias=False)]), "head": m[3]})


def with_gradients(m, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def assert_equal_steps(ours, optimizer, lr, theirs, reference):
    """A few steps by our optimizer at this rate, and by a reference from torch that has its rates, give the same weights."""
    for step in range(4):
        for m in (ours, theirs):
            with_gradients(m, step)
        optimizer.step(lr)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adamw_is_torchs():
    ours, theirs = model(), model()
    config = OptimConfig(weight_decay=0.3)
    optimizer = Optimizer(ours, config)
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
    optimizer = Optimizer(m, c)
    for t in range(1, 4):
        with_gradients(m, t)
        g = m[1].weight.grad.double()
        first = 0.9 * first + 0.1 * g
        second = 0.95 * second + 0.05 * g**2
        w = w - 0.1 * (first / (1 - 0.9**t) / ((second / (1 - 0.95**t)).sqrt() + 1e-8) + 0.1 * w)
        optimizer.step(0.1)
    torch.testing.assert_close(m[1].weight.double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing_not_even_for_nan_gradients(name):
    m = blocks()
    optimizer = Optimizer(m, OptimConfig(name=name))
    with_gradients(m, 0)
    optimizer.step(0.1, skip=torch.zeros(()))
    before = [p.clone() for p in m.parameters()], {k: v.clone() for k, v in optimizer.tensors().items()}
    for p in m.parameters():
        p.grad.fill_(math.nan)
    optimizer.step(0.1, skip=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), before[0], strict=True))
    assert all(torch.equal(v, before[1][k]) for k, v in optimizer.tensors().items())
    assert {float(s) for group in optimizer.groups for s in getattr(group, "steps", ())} == {1.0}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_out_and_in_bit_for_bit(name):
    a, b = blocks(), blocks()
    first, second = Optimizer(a, OptimConfig(name=name)), Optimizer(b, OptimConfig(name=name))
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
    optimizer = Optimizer(model(), OptimConfig())
    with pytest.raises(DataError, match="does not fit the model"):
        optimizer.load({}, 0)
    with pytest.raises(DataError, match="other shapes"):
        optimizer.load({k: torch.zeros(2) for k in optimizer.tensors()}, 0)


def learning_model(spec="int4-learned.o-clip1"):
    """A model whose inputs have a learned scale and offset: small, large, and of the usual size."""
    torch.manual_seed(0)
    m = nn.Sequential(*(Quantizer(QuantSpec.parse(spec)) for _ in range(3)), nn.Linear(3, 2, bias=False))
    for quantizer, size in zip(m, (4e-3, 40.0, 0.3), strict=False):
        quantizer.scale.data.fill_(size)
        quantizer.offset.data.fill_(-size / 2)
    return m


def test_relative_steps_are_adamws_on_the_logarithm_of_a_scale_and_on_offsets_in_its_units():
    """TQT (arXiv 1903.08066 §3.2): ∂L/∂log s = s·∂L/∂s. The reference holds log s and b/s in fp64; torch's AdamW moves them.

    The outermost level of int4 is 7.5, by whose root LSQ's factor slows the scale.
    """
    m = learning_model()
    optimizer = Optimizer(m, OptimConfig(scale_lr=3.0, weight_decay=0.3))
    logs = [m[i].scale.detach().double().log().requires_grad_() for i in range(3)]
    units = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(3)]  # the way of b in units of s
    offsets = [m[i].offset.detach().double() for i in range(3)]
    reference = torch.optim.AdamW([*logs, *units], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(6):
        with_gradients(m, step)
        for i in range(3):
            s, before = logs[i].detach().exp(), units[i].detach().clone()
            logs[i].grad, units[i].grad = m[i].scale.grad.double() * s, m[i].offset.grad.double() * s
            offsets[i] = offsets[i] - before * s
        reference.param_groups[0]["lr"] = 3 * 0.02 / 7.5**0.5
        sizes = [x.detach().exp() for x in logs]
        reference.step()
        for i in range(3):
            offsets[i] = offsets[i] + units[i].detach() * sizes[i]
        optimizer.step(0.02)
        for i in range(3):
            torch.testing.assert_close(m[i].scale.double(), logs[i].exp(), rtol=1e-5, atol=0)
            torch.testing.assert_close(m[i].offset.double(), offsets[i], rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.sampled_from([1e-2, 1.0]))
def test_relative_steps_keep_scales_positive_and_absolute_ones_do_not(gradients, lr):
    m, old = learning_model(), learning_model()
    relative, absolute = Optimizer(m, OptimConfig(scale_lr=2.0)), Optimizer(old, OptimConfig(scale_update="absolute"))
    for g in [*gradients, 1.0]:
        for model_, optimizer in ((m, relative), (old, absolute)):
            for p in model_.parameters():
                p.grad = torch.full_like(p, g)
            optimizer.step(lr)
    assert all(m[i].scale.item() > 0 for i in range(3))
    if all(g > 0 for g in gradients):
        assert old[0].scale.item() < 0  # 4e-3 is less than one step


def test_absolute_steps_are_those_of_all_parameters():
    m, plain = learning_model(), learning_model()
    optimizer = Optimizer(m, OptimConfig(scale_update="absolute", scale_lr=2.0))
    reference = torch.optim.AdamW(
        [
            {"params": [plain[3].weight], "lr": 0.01, "weight_decay": 0.1},
            {"params": [p for q in plain[:3] for p in q.parameters()]},
        ],
        lr=0.02,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    assert_equal_steps(m, optimizer, 0.01, plain, reference)


def test_a_skipped_step_leaves_every_bit_of_a_scale():
    m = learning_model()
    optimizer = Optimizer(m, OptimConfig())
    with_gradients(m, 0)
    optimizer.step(0.1, skip=torch.zeros(()))
    before = [p.clone() for p in m.parameters()]
    m[0].scale.grad.fill_(math.nan)
    optimizer.step(0.1, skip=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"train.steps": 200}, {0, *range(2, 21, 2)}),
        ({"train.steps": 12}, set(range(11))),  # a warm-up shorter than the calibrations are many
        ({"train.steps": 200, "optim.scale_calibrations": 0}, {0}),
        ({"train.steps": 200, "optim.scale_calibrations": 2, "optim.warmup_frac": 0.0}, {0, 1, 2}),
        ({"train.steps": 200, "optim.scale_calibrations": 3, "optim.warmup_steps": 100.0}, {0, 33, 67, 100}),
    ],
)
def test_scales_are_calibrated_evenly_over_the_warm_up(changes, steps):
    assert calibration_steps(tiny.config(tiny.LSQ | changes)) == steps


def test_a_branch_calibrates_where_its_trunk_does():
    trunk = tiny.config(tiny.LSQ, optim__schedule="constant", optim__warmup_frac=0.25, train__steps=100)
    assert calibration_steps(branch(trunk, 40, 10)) == calibration_steps(trunk)


def test_only_matrices_are_decayed_and_only_scales_have_their_own_rate():
    c = tiny.config(tiny.LSQ, optim__scale_lr=3.0)
    llama = build_model(c.model.model_copy(update={"vocab_size": 16}), c.quant, 0)
    decayed, plain, scales = groups = Optimizer(llama, c.optim).groups
    assert [(g.decay, g.rate) for g in groups] == [(0.1, 1.0), (0.0, 1.0), (0.0, 3.0)]
    assert {n.split(".")[-2] for n in decayed.names} == {"head", "q", "k", "v", "o", "gate", "up", "down"}
    assert {n.split(".")[-2] for n in plain.names} == {"embed", "norm", "attention_norm", "ffn_norm"}
    assert {n.split(".")[-2] for n in scales.names} == {"weight_quantizer", "input_quantizer"}
    assert sum(len(g.names) for g in groups) == len(list(llama.parameters()))


MUON = OptimConfig(name="muon", weight_decay=0.1)


def llama(quant=None, seed=0):
    c = tiny.config(quant or {})
    return build_model(c.model.model_copy(update={"vocab_size": 16}), c.quant, seed)


def reference_muon_step(w, g, m, lr, decay):
    """One step for a matrix, as its author describes it (kellerjordan.github.io/posts/muon), with the factor of 2502.16982."""
    m.mul_(0.95).add_(g)
    x = g + 0.95 * m
    x = x / (x.norm() + 1e-7)
    x = x.T if w.shape[0] > w.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if w.shape[0] > w.shape[1] else x
    w.mul_(1 - lr * decay).sub_(lr * 0.2 * max(w.shape) ** 0.5 * x)


def test_muon_is_its_formula_over_a_hundred_steps():
    """The reference trains in fp64, and both sides take its gradients: rounding in a model would grow from step to step."""
    tokens = torch.randint(16, (100, 4, 17), generator=torch.Generator().manual_seed(0))
    ours, theirs = llama(), llama().double()
    optimizer = Optimizer(ours, MUON)
    named = dict(theirs.named_parameters())
    hidden = {name: torch.zeros_like(p) for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
    plain = [p for name, p in named.items() if name not in hidden and name != "head.weight"]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": [theirs.head.weight], "weight_decay": 0.1}]
    reference = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95), eps=1e-8)
    for batch in tokens:
        theirs.zero_grad()
        theirs(batch[:, :-1], batch[:, 1:]).backward()
        for name, p in ours.named_parameters():
            p.grad = named[name].grad.float()
            named[name].grad.copy_(p.grad)
        optimizer.step(4e-3)
        reference.step()
        for name, momentum in hidden.items():
            reference_muon_step(named[name].data, named[name].grad, momentum, 4e-3, 0.1)
    start = dict(llama().named_parameters())
    assert min(float((named[name] - start[name]).detach().abs().max()) for name in hidden) > 0.02
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.double(), named[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_muon_is_for_the_weights_of_the_blocks():
    optimizer = Optimizer(llama(tiny.LSQ), MUON)
    *muon, decayed, plain, scales = optimizer.groups
    assert {n.split(".")[-2] for g in muon for n in g.names} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert [n.split(".")[-2] for n in decayed.names] == ["head"]
    assert {n.split(".")[-2] for n in plain.names} == {"embed", "norm", "attention_norm", "ffn_norm"}
    assert {n.split(".")[-2] for n in scales.names} == {"weight_quantizer", "input_quantizer"}
    assert {g.decay for g in muon} == {0.1}
    m = llama()  # without learned scales, which the config does not count
    state = Optimizer(m, MUON).tensors()
    assert {name.partition("/")[2] for name in state if ".q." in name} == {"momentum"}
    config = tiny.config(optim__name="muon", model__vocab_size=16)
    assert sum(t.numel() for t in state.values()) == optimizer_values(config) < 2 * sum(p.numel() for p in m.parameters())


def test_the_operations_of_muon_are_those_that_torch_counts():
    config = tiny.config(optim__name="muon")
    m = llama()
    with_gradients(m, 0)
    with FlopCounterMode(display=False) as counter:
        Optimizer(m, MUON).step(0.1)
    assert config.optimizer_flops == counter.get_total_flops() > 0
    tokens = config.train.batch_size * config.data.seq_len
    assert flops_per_token(config) == flops_per_token(tiny.config()) + counter.get_total_flops() / tokens


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 64, 32), (2, 32, 64), (1, 5, 3)])
def test_newton_schulz_moves_singular_values_to_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    x = newton_schulz(g).double()
    middle = u.mT @ x @ v.mT  # diagonal: the singular vectors stay
    values = middle.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(middle, torch.diag_embed(values), atol=1e-4, rtol=0)
    large = s / torch.linalg.matrix_norm(g.double())[:, None] > 0.01
    assert bool(((values > 0.65) & (values < 1.25))[large].all())


def test_muon_does_not_depend_on_how_many_matrices_are_multiplied_together(monkeypatch):
    both = [llama(), llama()]
    optimizers = [Optimizer(m, MUON) for m in both]
    for step in range(2):
        for m, optimizer, together in zip(both, optimizers, (2**24, 1), strict=True):
            monkeypatch.setattr(optim, "MOST_TOGETHER", together)
            with_gradients(m, step)
            optimizer.step(0.01)
    for a, b in zip(*(m.parameters() for m in both), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({}, True),
        ({"warmup_steps": 64.0}, False),
        ({"warmup_steps": 63.0}, True),
        ({"warmup_frac": 0.0, "warmup_steps": 2.0}, True),
        ({"lr": 2e-3}, False),
        ({"name": "muon"}, False),
        ({"lr": 8e-3}, False),  # the run has no room for a longer one
    ],
)
def test_a_short_warm_up_for_the_learning_rate_is_warned_of(changes, warns):
    c = tiny.config({f"optim.{key}": x for key, x in {"lr": 4e-3, "warmup_frac": 0.1, **changes}.items()}, train__steps=500)
    assert bool(c.warmup_warning) == warns
    if warns:
        assert f"a warm-up of {c.warmup_steps:g} of 500 steps is short for AdamW at learning rate 0.004" in c.warmup_warning


def test_one_command_warns_of_a_short_warm_up_for_all_cells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hasty = ["--set", "optim.lr=4e-3", "--set", "optim.warmup_steps=40"]
    alone = run_cli("train", "--dry-run", "--set", "train.steps=500", *hasty).stderr.replace("\n", " ")
    assert "warm-up of 40 of 500 steps" in alone
    (tmp_path / "s.toml").write_text("matrix.train.steps = [20, 500, 600]")
    together = run_cli("sweep", "s.toml", "--dry-run", *hasty).stderr.replace("\n", " ")
    assert together.count("is short for AdamW") == 1
    assert "The same holds for 1 of the other cells." in together


# --- rates of groups, and their transfer over width -------------------------------------------------------------------

FACTORS = {"optim.embedding_lr": 3.0, "optim.hidden_lr": 0.5, "optim.head_lr": 0.25}
WIDTHS = (32, 64, 128, 256)


def of_width(d, changes=None):
    shape = {"model.d_model": d, "model.n_head": d // 16, "model.d_ff": 2 * d}  # heads of one width
    return tiny.config({**shape, "optim.warmup_frac": 0.0, **(changes or {})})


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("d", WIDTHS)
def test_rates_over_width_are_those_of_the_rule(name, d):
    """Tensor Programs V (arXiv 2203.03466), table 3, for Adam; the root for Muon, whose updates grow as a root anyway."""
    keys = {"optim.name": name, "model.base_width": 64}
    hidden = {"adamw": 64 / d, "muon": (64 / d) ** 0.5}[name]
    assert group_rates(of_width(d, keys)) == pytest.approx((1.0, hidden, 64 / d))
    assert group_rates(of_width(d, keys | FACTORS)) == pytest.approx((3.0, 0.5 * hidden, 0.25 * 64 / d))
    assert group_rates(of_width(d, {"optim.name": name} | FACTORS)) == (3.0, 0.5, 0.25)
    assert group_rates(of_width(d)) == (1.0, 1.0, 1.0)


def test_a_step_moves_each_group_at_its_rate_and_decays_all_at_one():
    ours, theirs = blocks(), blocks()
    optimizer = Optimizer(ours, OptimConfig(weight_decay=0.3), GroupRates(3.0, 0.5, 0.25))
    groups = [
        {"params": [theirs["embed"].weight], "lr": 0.06, "weight_decay": 0.0},
        {"params": [m.weight for m in theirs["blocks"]], "lr": 0.01, "weight_decay": 0.6},  # .02 · .3 in all
        {"params": [theirs["head"].weight], "lr": 0.005, "weight_decay": 1.2},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    assert_equal_steps(ours, optimizer, 0.02, theirs, reference)


def test_muon_moves_hidden_weights_at_their_rate():
    whole, half = blocks(), blocks()
    for m, rates in ((whole, ALL_ALIKE), (half, GroupRates(1.0, 0.5, 1.0))):
        with_gradients(m, 0)
        before = m["blocks"][0].weight.detach().clone()
        Optimizer(m, OptimConfig(name="muon", weight_decay=0.0), rates).step(0.1)
        m["blocks"][0].weight.data.sub_(before)
    torch.testing.assert_close(half["blocks"][0].weight, whole["blocks"][0].weight / 2)
    assert torch.equal(half["head"].weight, whole["head"].weight)


def test_initial_weights_follow_the_width():
    """The same draws, times √r in the blocks and r in the head; without a base width as ever."""
    made = [Llama(of_width(64, keys).model.model_copy(update={"vocab_size": 16})) for keys in ({}, {"model.base_width": 32})]
    plain, narrower = ({name: p.detach() for name, p in m.named_parameters()} for m in made)
    for name, p in plain.items():
        factor = {"embed": 1, "blocks": 0.5**0.5, "head": 0.5}.get(name.partition(".")[0], 1) if p.ndim == 2 else 1
        torch.testing.assert_close(narrower[name], p * factor, rtol=1e-5, atol=0)


def change_of_logits(config):
    """Root mean square by which four steps on random tokens change a model's logits for others."""
    model = build_model(config.model.model_copy(update={"vocab_size": 16}), config.quant, 0)
    optimizer = Optimizer(model, config.optim, group_rates(config))
    tokens = torch.randint(16, (5, 8, 17), generator=torch.Generator().manual_seed(0))
    before = tiny.logits(model, tokens[4, :, :-1])
    for batch in tokens[:4]:
        model.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step(config.optim.lr)
    return float((tiny.logits(model, tokens[4, :, :-1]) - before).square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "quant"),
    [("adamw", {}), *(pytest.param(*row, marks=pytest.mark.slow) for row in (("muon", {}), ("adamw", tiny.QUEST)))],
)
def test_steps_change_wide_models_as_much_as_narrow_ones(name, quant):
    """The coordinate check of µP: over widths 32 to 256 the slope of the change is near 0, and without the rule it is not."""
    slopes = []
    for base in (32, 0):
        keys = {"optim.name": name, "model.base_width": base, "optim.lr": 4e-3, **quant}
        changes = [change_of_logits(of_width(d, keys)) for d in WIDTHS]
        slopes.append(np.polyfit(np.log(WIDTHS), np.log(changes), 1)[0])
    assert abs(slopes[0]) < 0.25, slopes
    assert slopes[1] > slopes[0] + 0.4, slopes


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model.base_width": 32}, "model.base_width: with model.tied the head is the embedding"),
        ({"optim.head_lr": 2.0}, "optim.head_lr: with model.tied the head is the embedding; set optim.embedding_lr"),
    ],
)
def test_a_tied_head_has_no_rate_of_its_own(keys, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        tiny.config({"model.tied": True, **keys})


def test_runs_without_rates_of_groups_keep_their_ids():
    off = {"optim.embedding_lr": 1.0, "optim.hidden_lr": 1.0, "optim.head_lr": 1.0, "model.base_width": 0}
    assert tiny.config(off).run_id == tiny.config().run_id
    assert tiny.config(off).to_json() == tiny.config().to_json()
    assert len({tiny.config({key: 2.0}).run_id for key in FACTORS} | {tiny.config(model__base_width=32).run_id}) == 4


FROZEN = "embed, blocks.0.*, blocks.1.q, *norm"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_modules_keep_their_weights_and_have_no_state(tmp_path, name):
    config = tiny.config({**tiny.LSQ, "optim.name": name, "optim.freeze": FROZEN, "train.steps": 3})
    data = prepare(config.data.source, config.data.tokenizer, val_fraction=config.data.val_fraction)
    trainer = Trainer(config, data, torch.device("cpu"), stop=lambda: False)
    before = {key: p.clone() for key, p in trainer.model.named_parameters()}
    state = trainer.optimizer.tensors()
    for _ in range(3):
        trainer.step()
    moved = {key for key, p in trainer.model.named_parameters() if not torch.equal(p, before[key])}
    sizes, frozen = config.model.module_sizes(16), config.frozen_sizes(16)
    trained = [part for part in sizes if part not in frozen]
    assert trained == [f"blocks.1.{part}" for part in ("k", "v", "o", "gate", "up", "down")] + ["head"]
    assert {key.rpartition(".")[0] for key in moved if key.endswith(".weight")} == set(trained)
    scales = sum(t.numel() for key, t in state.items() if "quantizer" in key)
    assert {".".join(key.split(".")[:3]) for key in state if "quantizer" in key} <= set(trained)
    assert sum(t.numel() for t in state.values()) - scales == config.optimizer_values(16)
    assert config.run_id != tiny.config({**tiny.LSQ, "optim.name": name, "train.steps": 3}).run_id


def test_sizes_of_modules_are_those_of_the_model():
    shape = tiny.config({"model.bias": "qkvo", "model.qk_norm": True, "model.n_kv_head": 1}).model
    model = Llama(shape.model_copy(update={"vocab_size": 16}))
    sizes = {part: sum(p.numel() for p in model.get_submodule(part).parameters()) for part in shape.module_sizes(16)}
    assert sizes == shape.module_sizes(16)
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    assert "head" not in shape.model_copy(update={"tied": True}).module_sizes(16)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("blocks.0.qq", "did you mean 'blocks.*.q'"),
        ("embed, heed", "'heed'; did you mean 'head'"),
        ("*", "leaves nothing to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(patterns, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        tiny.config({"optim.freeze": patterns})
