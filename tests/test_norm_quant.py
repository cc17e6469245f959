"""RMSNorm and SiLU·mul fused with quantization: what the separate ops give, in one pass."""

import numpy as np
import pytest
import torch
from kernel_trials import DEVICE, attempt, trials

from questctl.kernels.fake_quant import quantize, unpack_mask
from questctl.kernels.norm_quant import rmsnorm_quantize, rmsnorm_quantize_triton, silu_mul_quantize, silu_mul_quantize_triton
from questctl.kernels.op import KernelError, load

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
        rmsnorm_quantize(x, ones, 1e-5, *REST), rmsnorm_quantize_triton(x.to(DEVICE), ones.to(DEVICE), 1e-5, *REST),
        silu_mul_quantize(x, x, *REST), silu_mul_quantize_triton(x.to(DEVICE), x.to(DEVICE), *REST),
    ):  # fmt: skip
        assert (scale == 0).all()
        assert (codes == 1).all()


def test_a_large_negative_gate_is_zero_not_nan():
    gate, up = torch.full((2, 64), -200.0), torch.ones(2, 64)
    gate[:, 0] = 1.0
    for _, scale, _ in (silu_mul_quantize(gate, up, *REST), silu_mul_quantize_triton(gate.to(DEVICE), up.to(DEVICE), *REST)):
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


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
    with pytest.raises(KernelError) as e:
        call()
    assert all(word in str(e.value) for word in words)
