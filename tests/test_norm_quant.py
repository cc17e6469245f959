"""RMSNorm and SiLU·mul fused with quantization: equal to the separate operations."""

import numpy as np
import pytest
import torch
from kernel_trials import DEVICE, attempt, refused, trials

from questctl.kernels.fake_quant import quantize, unpack_mask
from questctl.kernels.norm_quant import (
    rmsnorm_backward,
    rmsnorm_quantize,
    rmsnorm_quantize_triton,
    rmsnorm_reference,
    silu_mul_backward,
    silu_mul_quantize,
    silu_mul_quantize_triton,
    silu_mul_reference,
)
from questctl.kernels.op import load

REST = (4, 2.5, 16.0, 64)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(2, 13, 192, generator=torch.Generator().manual_seed(5))
    a[0] *= 1e-4  # where eps is felt
    a[1] *= 1e4
    return a, b


@trials("rmsnorm-quantize", "silu-mul-quantize")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


def test_rmsnorm_then_quantize():
    x, gain = inputs()[0], 1 + 0.2 * inputs()[1][0]
    wide = x.double().numpy()
    normed = wide * gain.double().numpy() / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5)
    expect_like(normed, rmsnorm_quantize(x, gain, 1e-5, *REST))
    expect_like(normed, rmsnorm_quantize_triton(x.to(DEVICE), gain.to(DEVICE), 1e-5, *REST))


def test_silu_mul_then_quantize():
    gate, up = inputs()[1], inputs()[0]
    wide = gate.double().numpy()
    product = wide / (1 + np.exp(-wide)) * up.double().numpy()
    expect_like(product, silu_mul_quantize(gate, up, *REST))
    expect_like(product, silu_mul_quantize_triton(gate.to(DEVICE), up.to(DEVICE), *REST))


def expect_like(values: np.ndarray, found: tuple[torch.Tensor, ...]) -> None:
    """The codes, scale and mask that `quantize` gives for these values; two may fall to the other side of a threshold."""
    codes, scale, mask = quantize(torch.from_numpy(values).float(), *REST)
    assert (found[0].cpu() != codes).sum() <= 2
    torch.testing.assert_close(found[1].cpu(), scale, rtol=1e-5, atol=0)
    assert (unpack_mask(found[2].cpu()) != unpack_mask(mask)).sum() <= 2


def test_rows_of_zeros_stay_zero():
    x, ones = torch.zeros(3, 64), torch.ones(64)
    for codes, scale, _ in (
        rmsnorm_quantize(x, ones, 1e-5, *REST),
        rmsnorm_quantize_triton(x.to(DEVICE), ones.to(DEVICE), 1e-5, *REST),
        silu_mul_quantize(x, x, *REST),
        silu_mul_quantize_triton(x.to(DEVICE), x.to(DEVICE), *REST),
    ):
        assert (scale == 0).all()
        assert (codes == 1).all()


def test_a_large_negative_gate_is_zero_not_nan():
    gate, up = torch.full((2, 64), -200.0), torch.ones(2, 64)
    gate[:, 0] = 1.0
    for _, scale, _ in (silu_mul_quantize(gate, up, *REST), silu_mul_quantize_triton(gate.to(DEVICE), up.to(DEVICE), *REST)):
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


def test_without_a_limit_there_is_no_mask_and_the_rest_is_the_same():
    x, gate = inputs()
    gain, bits, alpha, limit, block = 1 + 0.2 * gate[0], *REST
    for op, triton, args in (
        (rmsnorm_quantize, rmsnorm_quantize_triton, (x, gain, 1e-5)),
        (silu_mul_quantize, silu_mul_quantize_triton, (gate, x)),
    ):
        for call, device in ((op, "cpu"), (triton, DEVICE)):
            placed = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
            codes, scale, mask = call(*placed, bits, alpha, None, block)
            with_mask = call(*placed, bits, alpha, limit, block)
            assert mask.shape == (13, 0)
            assert torch.equal(codes, with_mask[0])
            assert torch.equal(scale, with_mask[1])
    fake = torch.ops.questctl.rmsnorm_quantize(x.to("meta"), gain.to("meta"), 1e-5, bits, alpha, None, block)
    assert [t.shape for t in fake] == [(13, 192), (13, 1), (13, 0)]


@pytest.mark.parametrize("shape", [(1, 8), (63, 40), (3, 41, 24)])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_the_written_out_gradients_are_those_of_the_definitions(shape, eps):
    """In fp64, against autograd and, for one random direction, against central differences."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    for definition, backward, operands in (
        (
            lambda x, gain: rmsnorm_reference(x, gain, eps),
            lambda g, x, gain: rmsnorm_backward(g, x, gain, eps),
            (normal(*shape), 1 + 0.2 * normal(shape[-1])),
        ),
        (silu_mul_reference, silu_mul_backward, (4 * normal(*shape), normal(*shape))),
    ):
        g = normal(*shape)
        found = backward(g, *operands)
        leaves = [a.clone().requires_grad_() for a in operands]
        truth = torch.autograd.grad(definition(*leaves), leaves, g)
        for a, b, like in zip(found, truth, operands, strict=True):
            assert a.shape == like.shape
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        step = [1e-6 * normal(*a.shape) for a in operands]
        ends = [definition(*(a + sign * d for a, d in zip(operands, step, strict=True))) for sign in (1, -1)]
        slope = float(((ends[0] - ends[1]) * g).sum()) / 2
        assert slope == pytest.approx(sum(float((a * d).sum()) for a, d in zip(found, step, strict=True)), rel=1e-5)


def test_gradients_have_the_dtypes_of_what_they_are_of():
    x, gate, gain = torch.randn(5, 16).bfloat16(), torch.randn(5, 16).bfloat16(), torch.ones(16)
    assert [t.dtype for t in rmsnorm_backward(gate, x, gain, 1e-5)] == [torch.bfloat16, torch.float32]
    assert [t.dtype for t in silu_mul_backward(x.float(), gate, x)] == [torch.bfloat16] * 2
    assert (rmsnorm_backward(torch.ones(2, 16), torch.zeros(2, 16), gain, 1e-5)[1] == 0).all()
    assert torch.isfinite(silu_mul_backward(torch.ones(1, 2), torch.tensor([[-300.0, 300.0]]), torch.ones(1, 2))[0]).all()


def test_leading_dimensions_and_the_custom_ops_contract():
    codes, scale, mask = rmsnorm_quantize(torch.randn(2, 3, 64), torch.ones(64), 1e-5, *REST)
    assert (codes.shape, scale.shape, mask.shape) == ((2, 3, 64), (2, 3, 1), (2, 3, 8))
    for name in ("rmsnorm-quantize", "silu-mul-quantize"):
        op = load(name)
        call = getattr(torch.ops.questctl, name.replace("-", "_")).default
        torch.library.opcheck(call, op.inputs(op.test_shapes[0], torch.device("cpu"), 0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rmsnorm_quantize(torch.zeros(2, 64), torch.ones(32), 1e-5, *REST), ["gain", "(32,)", "(64,)"]),
        (lambda: rmsnorm_quantize(torch.zeros(2, 96), torch.ones(96), 1e-5, *REST), ["64", "96"]),
        (lambda: silu_mul_quantize(torch.zeros(2, 64), torch.zeros(2, 32), *REST), ["up", "(2, 32)", "(2, 64)"]),
        (lambda: silu_mul_quantize(torch.zeros(2, 64), torch.zeros(2, 64), 9, *REST[1:]), ["9 bits"]),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with refused(*words):
        call()
