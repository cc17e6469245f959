"""Rotary positions into a cache: rotation alone, copying alone, and no write outside their places."""

import math

import pytest
import torch
from kernel_trials import DEVICE, attempt, poisoned, refused, trials

from questctl.kernels.op import load
from questctl.kernels.rotary import rotary, rotary_reference, rotary_triton
from questctl.models import llama as model

CPU = torch.device("cpu")


@trials("rotary")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


def operands(tokens: int = 5, heads: int = 3, width: int = 20, capacity: int = 9, start: int = 2, joined: bool = True):
    """q, k, v as the layers give them, the tables at `start`, a cache and the place of the tokens in it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, tokens, 3, heads * width, generator=generator)
    parts = rows.unbind(2) if joined else [x.contiguous() for x in rows.unbind(2)]
    q, k, v = (x.unflatten(-1, (heads, width)).transpose(1, 2) for x in parts)
    tables = [t[start : start + tokens] for t in model.rotary_tables(capacity, width, 1e4, CPU)]
    cache = torch.randn(2, 4, 1, heads, capacity, width, generator=generator)
    place = [half[2, :, :, start : start + tokens] for half in cache]
    return (q, k, v, *tables, *place), cache


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("call", [rotary, rotary_reference, rotary_triton])
def test_by_hand_and_no_other_place_is_written(call, joined):
    (q, k, v, cos, sin, keys, values), cache = operands(joined=joined)
    before = cache.clone()
    with poisoned():
        placed = [t.to(DEVICE) for t in (q, k, v, cos, sin, keys, values)] if DEVICE.type == "cuda" else None
        out = call(*(placed or (q, k, v, cos, sin, keys, values))).cpu()
    if placed:  # copies: put back what a view would have taken
        keys.copy_(placed[5]), values.copy_(placed[6])
    for x, found in ((q, out), (k, keys)):
        for h in range(3):
            for m in range(5):
                for i in range(10):
                    angle = (2 + m) * 1e4 ** (-2 * i / 20)
                    a, b = float(x[0, h, m, i]), float(x[0, h, m, i + 10])
                    turned = (a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle))
                    assert (found[0, h, m, i].item(), found[0, h, m, i + 10].item()) == pytest.approx(turned, abs=1e-5)
    assert torch.equal(values, v)
    cache[:, 2, :, :, 2:7] = before[:, 2, :, :, 2:7]
    assert torch.equal(cache, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_turns_the_same_bits_without_a_cache(dtype):
    (q, k, v, cos, sin, keys, values), _ = operands()
    q, k, v, keys, values = (t.to(dtype) for t in (q, k, v, keys, values))
    assert torch.equal(rotary(q, k, v, cos, sin, keys, values), model.rotary(q, cos, sin))
    assert torch.equal(keys, model.rotary(k, cos, sin))


def test_the_custom_op_keeps_torchs_contract():
    torch.library.opcheck(torch.ops.questctl.rotary.default, load("rotary").inputs({"M": 3, "H": 2, "W": 8}, CPU, 0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: {0: a[0][..., :19]}, ["q", "(1, 3, 5, 19)", "W even"]),
        (lambda a: {0: a[0].double()}, ["float64", "bfloat16"]),
        (lambda a: {1: a[1].half()}, ["k", "float16", "like q"]),
        (lambda a: {2: a[2][:, :, :4]}, ["v", "(1, 3, 4, 20)"]),
        (lambda a: {5: a[5].transpose(2, 3).contiguous().transpose(2, 3)}, ["keys", "strides"]),
        (lambda a: {3: a[3][:4]}, ["cos", "(4, 20)", "(5, 20)"]),
        (lambda a: {4: a[4].double()}, ["sin", "float64"]),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    given = list(operands()[0])
    for i, x in change(given).items():
        given[i] = x
    with refused(*words):
        rotary(*given)
