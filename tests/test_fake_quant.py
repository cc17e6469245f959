"""Fused rotate, scale, round and mask: against the formulas written out, on ordinary and extreme rows, with every gradient."""

import numpy as np
import pytest
import torch
from kernel_trials import DEVICE, attempt, poisoned, refused, trials

from questctl.kernels.fake_quant import (
    ALPHA,
    check_masked_gradient,
    check_quantized,
    fake_quantize,
    fake_quantize_reference,
    fake_quantize_triton,
    mask_rotate,
    mask_rotate_triton,
    pack_mask,
    quantize,
    quantize_codes,
    quantize_codes_triton,
    quantize_reference,
    quantize_tiling,
    quantize_triton,
    trust_limit,
    unpack_mask,
)
from questctl.kernels.hadamard import rotate_reference
from questctl.kernels.op import load

INF = float("inf")


KINDS = {"ordinary": 1.0, "tiny": 1e-4, "large": 1e4, "outlier": 1.0}


def rows(kind: str, n: int = 9, width: int = 256) -> torch.Tensor:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(7))
    if kind == "outlier":
        x[:, 3] *= 60
    return x * KINDS[kind]


def rows_of_all_kinds() -> torch.Tensor:
    """Three of each, in turn, so that neighbours differ by up to 8 orders of magnitude: (12, 256)."""
    return torch.stack([rows(kind, 3) for kind in KINDS], dim=1).flatten(0, 1)


def by_hand(x: np.ndarray, bits: int, alpha: float, limit: float, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale and mask of fp64 rows by search over the levels; ties cannot happen on random rows."""
    h = np.array([[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]) / np.sqrt(block)
    z = np.concatenate([x[:, i : i + block] @ h for i in range(0, x.shape[1], block)], axis=1)
    sigma = np.sqrt((z**2).mean(axis=1, keepdims=True))
    levels = np.linspace(-alpha, alpha, 2**bits)
    index = np.abs(z[..., None] / sigma[..., None] - levels).argmin(-1)
    error = np.abs(z - levels[index] * sigma)
    step = 2 * alpha * sigma / (2**bits - 1)
    mask = error <= step / 2 if limit == trust_limit(bits) else np.abs(z) <= limit / (2**bits - 1) * alpha * sigma
    return 2 * index - (2**bits - 1), step / 2, mask


@trials("quantize", "fake-quantize", "mask-rotate")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_codes_scale_and_mask_are_those_of_the_formula(bits):
    x, alpha = rows_of_all_kinds(), ALPHA.get(bits, 3.6)
    for limit in (trust_limit(bits), 1.3 * (2**bits - 1)):
        codes, scale, mask = by_hand(x.double().numpy(), bits, alpha, limit, 128)
        for function in (quantize, quantize_triton):
            found = function(x.to(DEVICE), bits, alpha, limit, 128)
            assert (found[0].cpu().numpy() != codes).sum() <= 1  # a value on a threshold may fall to either side
            np.testing.assert_allclose(found[1].cpu().numpy(), scale, rtol=1e-5)
            assert (unpack_mask(found[2].cpu()).numpy() != mask).sum() <= 1


@pytest.mark.parametrize(("bits", "block"), [(1, 128), (4, 32), (7, 0)])
def test_without_the_mask_codes_and_scale_are_the_same(bits, block):
    x = rows("outlier")
    for masked, bare in ((quantize, quantize_codes), (quantize_triton, quantize_codes_triton)):
        whole, found = masked(x.to(DEVICE), bits, 2.5, 3.0, block), bare(x.to(DEVICE), bits, 2.5, block)
        assert all(map(torch.equal, whole[:2], found))


@pytest.mark.parametrize("bits", [1, 3, 7])
def test_codes_are_odd_and_within_the_grid(bits):
    codes, _, _ = quantize(rows("outlier"), bits, 1.5, trust_limit(bits), 64)
    assert set(np.unique(codes.numpy())) <= set(range(1 - 2**bits, 2**bits, 2))


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = rows("ordinary")
    x[0], x[1, 5], x[2, 5] = 0, float("nan"), float("inf")
    for function in (quantize, quantize_triton):
        codes, scale, mask = function(x.to(DEVICE), 4, 2.5, 16.0, 128)
        assert scale[0] == 0
        assert (codes[0] == 1).all()
        assert (mask[0] == 255).all()
        assert not torch.isfinite(scale[1:3]).any()
        assert torch.isfinite(scale[3:]).all()
    values = fake_quantize(x, 4, 2.5, 16.0, 128)
    assert (values[0] == 0).all()
    assert not torch.isfinite(values[1:3]).all()


def test_the_mask_is_packed_as_numpy_packs_bits():
    mask = torch.rand(5, 64, generator=torch.Generator().manual_seed(0)) < 0.4
    assert np.array_equal(pack_mask(mask).numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack_mask(pack_mask(mask)), mask)


@pytest.mark.parametrize(("bits", "limit"), [(4, 16.0), (2, 4.0), (1, 1.3), (3, INF)])
def test_the_gradient_is_masked_and_rotated_back(bits, limit):
    x = rows_of_all_kinds().requires_grad_()
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(11))
    (found,) = torch.autograd.grad(fake_quantize(x, bits, ALPHA[bits], limit, 128), x, g)
    (truth,) = torch.autograd.grad(fake_quantize_reference(x, bits, ALPHA[bits], limit, 128), x, g)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    with poisoned():
        values, mask = fake_quantize_triton(x.detach().to(DEVICE), bits, ALPHA[bits], limit, 128)
        kernel = mask_rotate_triton(g.to(DEVICE), mask, 128)
    z = fake_quantize_reference(x.detach(), bits, ALPHA[bits], limit, 128)
    assert ((values.cpu() - z).abs() > 1e-5 * z.abs().amax(-1, keepdim=True)).sum() <= 1
    changed = (kernel.cpu() - truth).abs().amax(-1) > 1e-4
    assert changed.sum() <= 1  # a row whose mask has a bit on the threshold
    if limit == INF:
        torch.testing.assert_close(found, rotate_reference(g, 128), rtol=1e-5, atol=1e-5)


def test_trust_and_clip_differ_where_they_should():
    x = rows("outlier")
    _, _, trust = quantize(x, 2, ALPHA[2], trust_limit(2), 0)
    _, _, clip = quantize(x, 2, ALPHA[2], 1.0 * 3, 0)
    assert unpack_mask(trust).sum() > unpack_mask(clip).sum()
    assert not unpack_mask(trust)[:, 3].all()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("n", [8, 32, 128, 256])
def test_tiles_cover_every_row_and_stay_within_registers(n, wide):
    for rows_ in (1, 2, 63, 66, 67, 132, 133, 529, 16384):
        for blocks in (1, 2, 3, 5, 17, 54, 64, 65, 86, 224):
            cols = blocks * n
            tile = quantize_tiling(rows_, cols, n, wide)
            size = tile["T"] * n
            assert tile["T"] & (tile["T"] - 1) == 0 == tile["T"] % 16
            assert size <= 16384
            assert size >= 32 * tile["num_warps"]
            if tile["PIECES"]:
                assert tile["BR"] == 1
                assert tile["PIECES"] * 4096 >= cols
            else:
                assert tile["BR"] * blocks <= tile["T"]
                assert tile["BR"] * cols <= max(cols, 1024) or rows_ > 132 * (tile["BR"] - 1), "all multiprocessors busy"


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("block", [0, 32, 128])
def test_a_row_in_parts_is_the_row_as_a_whole(parts, block):
    x = rows("outlier", 3, 128 * 19)
    with poisoned():
        codes, scale, mask = quantize_triton(x.to(DEVICE), 3, 2.05, 8.0, block, parts)
    truth = quantize_reference(x, 3, 2.05, 8.0, block)
    torch.testing.assert_close(scale.cpu(), truth[1], rtol=1e-6, atol=0)
    assert (codes.cpu() != truth[0]).sum() <= 1
    assert (unpack_mask(mask.cpu()) != unpack_mask(truth[2])).sum() <= 1


@pytest.mark.parametrize("block", [0, 64, 256])
def test_a_tile_of_several_rows_keeps_them_apart(monkeypatch, block):
    monkeypatch.setattr("questctl.kernels.fake_quant.PROCESSORS", 2)
    x = rows("outlier", 8, 1280) * torch.logspace(-3, 3, 8)[:, None]
    assert quantize_tiling(8, 1280, block or 128, True)["BR"] == 4
    x[5] = 0
    x[6, 3] = float("nan")
    values, mask = fake_quantize_triton(x.to(DEVICE), 4, 2.5, 16.0, block)
    assert not values[6].isfinite().any()
    sound = [0, 1, 2, 3, 4, 5, 7]
    truth = quantize_reference(x[sound], 4, 2.5, 16.0, block)
    torch.testing.assert_close(values.cpu()[sound], truth[0] * truth[1], rtol=1e-5, atol=1e-12)
    assert (unpack_mask(mask.cpu()[sound]) != unpack_mask(truth[2])).sum() <= 1


def test_rows_wider_than_registers_go_in_parts_however_many_there_are(monkeypatch):
    monkeypatch.setattr("questctl.kernels.fake_quant.PROCESSORS", 1)  # of which 3 rows are many
    assert quantize_tiling(3, 16512, 128, False)["PIECES"]
    x = rows("ordinary", 3, 16512)
    found = quantize_triton(x.to(DEVICE), 4, 2.5, 16.0, 128)
    assert check_quantized((x, 4, 2.5, 16.0, 128), tuple(y.cpu() for y in found)).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    x = rows("ordinary").to(dtype)
    truth = quantize_reference(x.double(), 4, 2.5, 16.0, 128)
    for found in (quantize(x, 4, 2.5, 16.0, 128), quantize_triton(x.to(DEVICE), 4, 2.5, 16.0, 128)):
        assert (found[0].cpu() != truth[0]).sum() <= 1
    y = fake_quantize(x, 4, 2.5, 16.0, 128)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), (truth[0] * truth[1]), rtol=torch.finfo(dtype).eps, atol=0)


def test_leading_dimensions_and_no_rows():
    x = torch.randn(2, 3, 64)
    codes, scale, mask = quantize(x, 4, 2.5, 16.0, 64)
    assert (codes.shape, scale.shape, mask.shape) == ((2, 3, 64), (2, 3, 1), (2, 3, 8))
    assert fake_quantize(x[:0], 4, 2.5, 16.0, 64).shape == (0, 3, 64)
    assert mask_rotate(x, mask, 64).shape == x.shape
    assert quantize_triton(x[:0].reshape(0, 64), 4, 2.5, 16.0, 64)[0].shape == (0, 64)


def test_the_custom_ops_keep_torchs_contract():
    x = torch.randn(4, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.questctl.fake_quantize.default, (x, 4, 2.5, 16.0, 32))
    torch.library.opcheck(torch.ops.questctl.quantize.default, (x.detach(), 4, 2.5, 16.0, 32))
    torch.library.opcheck(torch.ops.questctl.quantize_codes.default, (x.detach(), 4, 2.5, 32))
    mask = torch.randint(0, 256, (4, 8), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.questctl.mask_rotate.default, (x.detach(), mask, 32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize(torch.zeros(2, 64), 8, 2.5, 1.0, 64), ["8 bits", "1 to 7"]),
        (lambda: quantize(torch.zeros(2, 60), 4, 2.5, 1.0, 0), ["60", "8"]),
        (lambda: fake_quantize(torch.zeros(2, 64), 4, 2.5, 1.0, 128), ["128", "64"]),
        (lambda: quantize(torch.zeros(2, 64, dtype=torch.int8), 4, 2.5, 1.0, 64), ["int8", "float16"]),
        (lambda: mask_rotate(torch.zeros(2, 64), torch.zeros(2, 9, dtype=torch.uint8), 64), ["(2, 9)", "(2, 64)"]),
        (lambda: mask_rotate(torch.zeros(2, 64), torch.zeros(2, 8), 64), ["float32"]),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with refused(*words):
        call()


def test_the_checks_notice_one_wrong_code_bit_or_scale():
    op = load("quantize")
    inputs = op.inputs({"R": 63, "C": 192, "bits": 2, "block": 64}, torch.device("cpu"), 0)
    for part, spoil in ((0, lambda c: -c), (0, lambda c: c * 0), (1, lambda s: s * 1.001), (2, lambda m: m ^ 4)):
        output = [y.clone() for y in op.function(*inputs)]
        output[part][3, 0] = spoil(output[part][3, 0])
        assert not op.check(inputs, tuple(output)).passed
    values = load("fake-quantize")
    y = values.function(*inputs)
    for factor in (-1.0, 1.01, float("nan")):
        bad = y.clone()
        bad[3, 0] *= factor
        assert not values.check(inputs, bad).passed


def test_the_gradient_check_forgives_thresholds_and_nothing_else():
    x, g = rows("ordinary"), torch.randn(9, 256, generator=torch.Generator().manual_seed(2))
    z = rotate_reference(x.double(), 128)
    sigma = x.double().square().mean(-1, keepdim=True).sqrt()
    limit = float((z / (sigma * ALPHA[1])).abs()[4, 100])  # one entry of the mask lies on the limit itself
    inputs = (x, 1, ALPHA[1], limit, 128)
    mask = (z / (sigma * ALPHA[1])).abs() <= limit
    mask[4, 100] = False
    for on_the_limit in (False, True):
        mask[4, 100] = on_the_limit
        good = rotate_reference(g * mask, 128)
        assert check_masked_gradient(inputs, g, good).passed
    mask[5, 7] ^= True
    assert not check_masked_gradient(inputs, g, rotate_reference(g * mask, 128)).passed
    assert not check_masked_gradient(inputs, g, good * 1.001).passed
    assert not check_masked_gradient(inputs, g, good * float("nan")).passed
