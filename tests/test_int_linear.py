"""The inference layer: quantize, exact product, scale; the same from int8 and from packed weights."""

import pytest
import torch
from helpers import slow_but
from kernel_trials import DEVICE, attempt, trials

from questctl.kernels.fake_quant import ALPHA, fake_quantize, trust_limit
from questctl.kernels.int_gemm import random_scales
from questctl.kernels.int_linear import int_linear, int_linear_triton
from questctl.kernels.op import KernelError, load
from questctl.kernels.pack import PLANES, pack, random_codes

CPU = torch.device("cpu")


@trials("int-linear")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


@pytest.mark.parametrize("bits", slow_but(PLANES, (1, 4)))
def test_packed_and_int8_weights_give_the_same_bits_and_the_simulated_layer(bits):
    x = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(0))
    w, w_scale = random_codes(30, 256, bits, CPU, 1), random_scales(30, CPU, 2) / 16
    wide = int_linear(x, w, w_scale, bits, ALPHA[bits], 64)
    assert wide.shape == (2, 40, 30)
    assert torch.equal(int_linear(x, pack(w, bits), w_scale, bits, ALPHA[bits], 64), wide)
    simulated = fake_quantize(x, bits, ALPHA[bits], trust_limit(bits), 64) @ (w * w_scale).T
    torch.testing.assert_close(wide, simulated, rtol=1e-4, atol=1e-4)
    rows = x[0].to(DEVICE)
    kernels = [int_linear_triton(rows, q.to(DEVICE), w_scale.to(DEVICE), bits, ALPHA[bits], 64) for q in (w, pack(w, bits))]
    assert torch.equal(*kernels)
    torch.testing.assert_close(kernels[0].cpu(), wide[0], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named():
    with pytest.raises(KernelError, match=r"float32.*int8.*uint8"):
        int_linear(torch.zeros(2, 64), torch.zeros(3, 64), torch.ones(3, 1), 4, 2.5, 64)
    with pytest.raises(KernelError, match=r"128.*64"):
        int_linear(torch.zeros(2, 64), torch.ones(3, 64, dtype=torch.int8), torch.ones(3, 1), 4, 2.5, 128)
    assert load("int-linear").compile_shapes == []
