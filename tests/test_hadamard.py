"""Block Hadamard rotation: against the popcount formula, in every implementation, forward and backward."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_trials import attempt, poisoned, refused, trials

from questctl.kernels.hadamard import BLOCKS, check_against_naive, hadamard_matrix, rotate, rotate_reference, rotate_triton
from questctl.kernels.op import load


def matrix_by_popcount(n: int) -> np.ndarray:
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]) / np.sqrt(n)


@trials("hadamard")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


@pytest.mark.parametrize("n", [1, 2, *BLOCKS])
def test_matrix_is_sylvesters_orthonormal_symmetric(n):
    h = hadamard_matrix(n, torch.float64).numpy()
    np.testing.assert_allclose(h, matrix_by_popcount(n), atol=1e-15)
    np.testing.assert_allclose(h @ h, np.eye(n), atol=1e-12)


def test_each_block_is_rotated_by_itself():
    x = np.random.default_rng(0).standard_normal((7, 96))
    h = matrix_by_popcount(32)
    expected = np.concatenate([x[:, i : i + 32] @ h for i in range(0, 96, 32)], axis=1)
    np.testing.assert_allclose(rotate(torch.tensor(x, dtype=torch.float32), 32).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_gradient_is_the_transposed_rotation(block):
    x = torch.randn(3, 5, 2 * block, generator=torch.Generator().manual_seed(1), requires_grad=True)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad(rotate(x, block), x, g)
    leaf = x.detach().double().requires_grad_()
    z = leaf.unflatten(-1, (-1, block)) @ hadamard_matrix(block, torch.float64)
    (truth,) = torch.autograd.grad(z, leaf, g.view(3, 5, 2, block).double())
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 3), st.sampled_from(BLOCKS), st.integers(0, 99))
def test_rotating_twice_gives_the_input_back_and_norms_stay(rows, blocks, block, seed):
    x = torch.randn(rows, blocks * block, generator=torch.Generator().manual_seed(seed))
    z = rotate(x, block)
    torch.testing.assert_close(rotate(z, block), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernel_takes_half_precision_and_no_rows(dtype):
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    with poisoned():
        z = rotate_triton(x, 128)
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), rotate_reference(x.double(), 128), rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert rotate_triton(x[:0], 128).shape == (0, 128)


def test_strided_bf16_and_autocast_change_nothing_but_the_dtype():
    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(4)).T
    assert torch.equal(rotate(x, 64), rotate(x.contiguous(), 64))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotate(x, 64), rotate_reference(x, 64))
    half = rotate(x.bfloat16(), 64)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), rotate(x, 64), rtol=0, atol=0.04)


def test_the_custom_op_keeps_torchs_contract():
    x = torch.randn(4, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.questctl.block_hadamard.default, (x, 32))


@pytest.mark.parametrize(
    ("x", "block", "words"),
    [
        (torch.zeros(2, 96), 48, ["48", "32, 64, 128, 256"]),
        (torch.zeros(2, 96), 64, ["64", "96"]),
        (torch.zeros(2, 64, dtype=torch.int32), 64, ["int32", "bfloat16"]),
        (torch.zeros(2, 64, dtype=torch.float64), 64, ["float64"]),
    ],
)
def test_what_does_not_fit_is_named(x, block, words):
    with refused(*words):
        rotate(x, block)


def test_the_check_notices_one_wrong_sign_and_one_unwritten_element():
    op = load("hadamard")
    inputs = op.inputs({"R": 123, "C": 640, "block": 128}, torch.device("cpu"), 0)
    good = op.function(*inputs)
    for spoil in (-good[5, 7], torch.tensor(float("nan"))):
        bad = good.clone()
        bad[5, 7] = spoil
        assert not op.check(inputs, bad).passed


@pytest.mark.parametrize("block", BLOCKS)
def test_any_order_of_summation_passes_the_check_and_fewer_digits_do_not(block):
    x = torch.randn(64, block, generator=torch.Generator().manual_seed(3))
    h = hadamard_matrix(block, torch.float32)
    truth, naive = rotate_reference(x.double(), block), rotate_reference(x, block)
    one_by_one = torch.zeros_like(x)
    for k in range(block):
        one_by_one += x[:, k, None] * h[k]
    pairs = (x[:, :, None] * h).view(64, 2, block // 2, block)
    assert check_against_naive(one_by_one, truth, naive, block).passed
    assert check_against_naive(pairs.sum(2).flip(1).sum(1), truth, naive, block).passed
    for dtype in (torch.bfloat16, torch.float16):
        assert not check_against_naive(rotate_reference(x.to(dtype).float(), block), truth, naive, block).passed
