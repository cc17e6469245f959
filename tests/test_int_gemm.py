"""The exact integer product: equal to the product of Python integers bit for bit, then two fp32 roundings."""

import numpy as np
import pytest
import torch
from kernel_trials import DEVICE, attempt, refused, trials

from questctl.kernels import int_gemm as int_gemm_module
from questctl.kernels.int_gemm import MAX_K, int_gemm, int_gemm_tile, int_gemm_triton, prepack, random_scales
from questctl.kernels.op import load
from questctl.kernels.pack import random_codes

CPU = torch.device("cpu")


@trials("int-gemm")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_product_of_whole_numbers_scaled_in_fp32(dtype):
    x, w = random_codes(65, 200, 7, CPU, 0), random_codes(34, 200, 4, CPU, 1)
    x_scale, w_scale = random_scales(65, CPU, 2) * 1e-3, random_scales(34, CPU, 3)
    sums = x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T
    expected = (sums.astype(np.float32) * x_scale.numpy()) * w_scale.numpy().T
    expected = torch.from_numpy(expected).to(dtype)
    assert torch.equal(int_gemm(x, w, x_scale, w_scale, dtype), expected)
    assert torch.equal(int_gemm_triton(*(t.to(DEVICE) for t in (x, w, x_scale, w_scale)), dtype).cpu(), expected)


def test_the_largest_sums_do_not_overflow():
    k = 4096
    x = torch.full((1, k), 127, dtype=torch.int8)
    one = torch.ones(1, 1)
    for sign in (1, -1):
        found = int_gemm(x, sign * x, one, one)
        assert found.item() == sign * float(np.float32(127 * 127 * k))
    assert 127 * 127 * MAX_K < 2**31 <= 127 * 127 * (MAX_K + 1)


def test_leading_dimensions_strides_and_no_rows():
    x, w = random_codes(24, 64, 4, CPU, 0), random_codes(64, 10, 4, CPU, 1).T
    x_scale, w_scale = random_scales(24, CPU, 2), random_scales(10, CPU, 3)
    flat = int_gemm(x, w, x_scale, w_scale)
    assert torch.equal(int_gemm(x.view(2, 12, 64), w, x_scale.view(2, 12, 1), w_scale), flat.view(2, 12, 10))
    assert int_gemm(x[:0], w, x_scale[:0], w_scale).shape == (0, 10)


@pytest.fixture(params=["as it is here", "not exact", "absent"])
def onednn(request, monkeypatch):
    """oneDNN's product of bytes as this machine has it, on one without VNNI (pairs saturate), and in a torch without it."""
    module = int_gemm_module
    if request.param == "not exact":
        sums = module.Prepacked.sums
        monkeypatch.setattr(module.Prepacked, "sums", lambda self, x: sums(self, x).clamp(-(2**15), 2**15 - 1))
    if request.param == "absent":
        monkeypatch.setattr(torch.ops, "onednn", object())
    module.prepacking_is_exact.cache_clear()
    yield request.param
    module.prepacking_is_exact.cache_clear()


@pytest.mark.parametrize("shape", [(1, 16, 32), (1, 1, 1), (3, 5, 7), (63, 40, 96), (123, 129, 256), (2, 8, 5000), (0, 4, 8)])
def test_prepacked_weights_give_the_same_bits(onednn, shape):
    m, n, k = shape
    for seed, sign in enumerate((0, 1, -1)):  # mixed, and the largest sums of either sign
        x, w = random_codes(m, k, 7, CPU, seed), random_codes(n, k, 7, CPU, seed + 3)
        if sign:
            x, w = x.abs(), sign * w.abs()
        scales = random_scales(m, CPU, 2), random_scales(n, CPU, 3)
        packed = prepack(w)
        assert onednn == "as it is here" or isinstance(packed, torch.Tensor)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(int_gemm(x, packed, *scales, dtype), int_gemm(x, w, *scales, dtype))


@pytest.mark.parametrize("m", [1, 7, 64, 65, 300, 5000])
def test_tiles_are_powers_of_two_that_the_tensor_cores_take(m):
    tile = int_gemm_tile(m, 4096)
    assert all(tile[key] >= 16 and tile[key] & (tile[key] - 1) == 0 for key in ("BM", "BN", "BK"))


def test_few_rows_of_a_narrow_layer_still_reach_most_multiprocessors():
    for m, n in ((256, 2560), (256, 4096), (128, 7680), (4096, 2560)):
        tile = int_gemm_tile(m, n)
        assert -(-m // tile["BM"]) * -(-n // tile["BN"]) >= 0.75 * 132


def test_the_custom_op_keeps_torchs_contract():
    inputs = load("int-gemm").inputs({"M": 3, "N": 8, "K": 32, "bits": 4}, CPU, 0)
    torch.library.opcheck(torch.ops.questctl.int_gemm.default, inputs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(3, 32)}, ["activations", "float32", "int8"]),
        ({1: torch.zeros(8, 32)}, ["weights", "float32", "int8"]),
        ({0: torch.zeros(3, 16, dtype=torch.int8)}, ["(3, 16)", "32"]),
        ({2: torch.zeros(3, 1, dtype=torch.float64)}, ["x_scale", "float64"]),
        ({3: torch.zeros(8)}, ["w_scale", "(8,)", "(8, 1)"]),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    inputs = list(load("int-gemm").inputs({"M": 3, "N": 8, "K": 32, "bits": 4}, CPU, 0))
    for i, value in change.items():
        inputs[i] = value
    with refused(*words):
        int_gemm(*inputs)
