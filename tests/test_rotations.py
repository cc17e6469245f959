"""The block Hadamard rotation against scipy's matrix."""

import numpy as np
import pytest
import scipy.linalg
import torch

from questctl.quant.rotations import Hadamard, matrix


@pytest.mark.parametrize("block", [2, 4, 32, 64, 128])
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 123)])
def test_rotation_is_blockwise_orthonormal_and_undone(block: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, 3 * block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = Hadamard(block).rotate(x)
    full = scipy.linalg.block_diag(*[scipy.linalg.hadamard(block) / np.sqrt(block)] * 3)
    torch.testing.assert_close(z, x @ torch.from_numpy(full), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(Hadamard(block).unrotate(z), x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(z.square().sum(-1), x.square().sum(-1))


def test_rotation_takes_views_and_keeps_its_dtype_under_autocast() -> None:
    x = torch.randn(8, 64, 5).transpose(1, 2)  # not contiguous
    torch.testing.assert_close(Hadamard(32).rotate(x), Hadamard(32).rotate(x.contiguous()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = Hadamard(32).rotate(x)
    assert z.dtype == torch.float32
    assert torch.equal(z, Hadamard(32).rotate(x))


def test_matrix_is_made_once_and_can_be_trained_through_after_inference_mode() -> None:
    with torch.inference_mode():
        h = matrix(16, torch.float32, torch.device("cpu"))
    assert matrix(16, torch.float32, torch.device("cpu")) is h
    x = torch.randn(3, 16, requires_grad=True)
    Hadamard(16).rotate(x).sum().backward()
    torch.testing.assert_close(x.grad, (torch.ones(3, 16) @ h.T))


@pytest.mark.parametrize("block", [0, 1, 3, 96, -4, 2**17])
def test_block_must_be_a_power_of_two(block: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Hadamard(block)


@pytest.mark.parametrize("block", [2, 16, 128])
def test_signs_turn_columns_first_and_are_undone(block: int) -> None:
    x = torch.randn(5, 3 * block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signed = Hadamard(block, variant="s")
    m = matrix(block, torch.float64, torch.device("cpu"), True)
    signs = m[:, 0] * block**0.5
    assert set(signs.round(decimals=9).tolist()) <= {1.0, -1.0}
    z = signed.rotate(x)
    torch.testing.assert_close(z, Hadamard(block).rotate(x * signs.repeat(3)), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(signed.unrotate(z), x, rtol=1e-12, atol=1e-13)
    if block > 2:
        assert abs(float(signs.sum())) < block * 0.6
        # plain blocks gather a constant in one entry, signs spread it
        constant = torch.ones(1, block, dtype=torch.float64)
        assert Hadamard(block).rotate(constant).abs().max() == pytest.approx(block**0.5)
        assert signed.rotate(constant).abs().max() < 0.7 * block**0.5


def test_signs_are_the_same_for_ever() -> None:
    m = matrix(8, torch.float32, torch.device("cpu"), True)
    assert (m[:, 0] * 8**0.5).round().tolist() == [1, -1, 1, -1, 1, 1, -1, 1]
