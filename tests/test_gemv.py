"""Packed products: one row, few rows and many give the same bits as the product of the unpacked codes."""

import pytest
import torch
from helpers import slow_but
from kernel_trials import DEVICE, attempt, poisoned, refused, trials

from questctl.kernels.gemv import packed_gemm, packed_gemm_16, packed_gemm_16_triton, packed_gemm_triton
from questctl.kernels.int_gemm import int_gemm, int_gemm_triton, random_scales
from questctl.kernels.op import load
from questctl.kernels.pack import PLANES, pack, random_codes

CPU = torch.device("cpu")


@trials("packed-gemm", "packed-gemm-16")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


@pytest.mark.parametrize("bits", slow_but(PLANES, (1,)))
def test_gemv_skinny_gemm_and_cpu_are_the_same_bits(bits):
    m, n, k = 70, 35, 1024
    x, w = random_codes(m, k, 7, CPU, 0), random_codes(n, k, bits, CPU, 1)
    x_scale, w_scale = random_scales(m, CPU, 2), random_scales(n, CPU, 3)
    packed = pack(w, bits)
    truth = int_gemm(x, w, x_scale, w_scale)
    assert torch.equal(packed_gemm(x, packed, x_scale, w_scale, bits), truth)
    x, w, x_scale, w_scale, packed = (t.to(DEVICE) for t in (x, w, x_scale, w_scale, packed))
    with poisoned():
        large = int_gemm_triton(x, w, x_scale, w_scale, torch.float32)
        expanded = packed_gemm_triton(x, packed, x_scale, w_scale, bits, torch.float32)
        skinny = packed_gemm_triton(x[:64], packed, x_scale[:64], w_scale, bits, torch.float32)
        single = packed_gemm_triton(x[69:], packed, x_scale[69:], w_scale, bits, torch.float32)
    assert torch.equal(large.cpu(), truth)
    assert torch.equal(expanded.cpu(), truth)
    assert torch.equal(skinny.cpu(), truth[:64])
    assert torch.equal(single.cpu(), truth[69:])


@pytest.mark.parametrize("bits", slow_but(PLANES, (1, 3)))
def test_extreme_codes_do_not_overflow(bits):
    k, top = 2048, 2**bits - 1
    for sign in (1, -1):
        x = torch.full((2, k), 127, dtype=torch.int8)
        w = torch.full((3, k), sign * top, dtype=torch.int8)
        one = torch.ones(3, 1)
        for m in (1, 2):
            args = (x[:m].to(DEVICE), pack(w, bits).to(DEVICE), one[:m].to(DEVICE), one.to(DEVICE), bits)
            assert (packed_gemm_triton(*args, torch.float32) == sign * top * 127 * k).all()


@pytest.mark.parametrize("m", [1, 5, 65])
def test_half_precision_activations(m):
    bits, k = 3, 256
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).half()
    w = random_codes(20, k, bits, CPU, 1)
    w_scale = random_scales(20, CPU, 2) * 0.01
    truth = (x.double() @ w.double().T) * w_scale.T
    args = (x, pack(w, bits), w_scale)
    for found in (packed_gemm_16(*args, bits), packed_gemm_16_triton(*(t.to(DEVICE) for t in args), bits)):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.cpu().double(), truth, rtol=2e-3, atol=2e-3)


def test_leading_dimensions_and_no_rows():
    x, packed = random_codes(6, 64, 4, CPU, 0), pack(random_codes(5, 64, 2, CPU, 1), 2)
    x_scale, w_scale = random_scales(6, CPU, 2), random_scales(5, CPU, 3)
    flat = packed_gemm(x, packed, x_scale, w_scale, 2)
    assert torch.equal(packed_gemm(x.view(2, 3, 64), packed, x_scale.view(2, 3, 1), w_scale, 2), flat.view(2, 3, 5))
    assert packed_gemm(x[:0], packed, x_scale[:0], w_scale, 2).shape == (0, 5)
    assert packed_gemm_16(x.float().view(2, 3, 64), packed, w_scale, 2).shape == (2, 3, 5)


def test_the_custom_ops_keep_torchs_contract():
    shape = {"M": 3, "N": 8, "K": 32, "bits": 4}
    torch.library.opcheck(torch.ops.questctl.packed_gemm.default, load("packed-gemm").inputs(shape, CPU, 0))
    torch.library.opcheck(torch.ops.questctl.packed_gemm_16.default, load("packed-gemm-16").inputs(shape, CPU, 0))


def test_what_does_not_fit_is_named():
    x, packed = random_codes(3, 64, 4, CPU, 0), pack(random_codes(5, 64, 2, CPU, 1), 2)
    x_scale, w_scale = torch.ones(3, 1), torch.ones(5, 1)
    for call, words in (
        (lambda: packed_gemm(x, packed, x_scale, w_scale, 4), ["(5, 16)", "4-bit", "64"]),
        (lambda: packed_gemm(x, packed, x_scale, w_scale, 6), ["6 bits", "1, 2, 3, 4"]),
        (lambda: packed_gemm(x.float(), packed, x_scale, w_scale, 2), ["activations", "float32"]),
        (lambda: packed_gemm(x, packed, x_scale, w_scale[:4], 2), ["w_scale", "(4, 1)", "(5, 1)"]),
        (lambda: packed_gemm_16(x, packed, w_scale, 2), ["int8", "bfloat16"]),
        (lambda: packed_gemm_16(x.float(), packed, w_scale[:2], 2), ["w_scale", "(2, 1)"]),
        (lambda: packed_gemm_triton(x[:, :48], packed[:, :12], x_scale, w_scale, 2, torch.float32), ["48", "32"]),
    ):
        with refused(*words):
            call()
