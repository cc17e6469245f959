"""The sparsity masks against loops."""

import pytest
import torch

from questctl.quant.masks import Sparse, TwoOfFour, TwoOfFourPairs


@pytest.mark.parametrize("shape", [(1, 8), (63, 16), (2, 123, 24)])
def test_two_of_four_pairs_keeps_the_larger(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    keep = TwoOfFourPairs().keep(z)
    for row, kept in zip(z.reshape(-1, shape[-1]), keep.reshape(-1, shape[-1]), strict=True):
        for start in range(0, shape[-1], 8):
            norms = [float(row[start + 2 * i : start + 2 * i + 2].norm()) for i in range(4)]
            best = sorted(range(4), key=lambda i: -norms[i])[:2]
            assert kept[start : start + 8].tolist() == [i // 2 in best for i in range(8)]


def test_ties_keep_the_earlier_pairs() -> None:
    assert TwoOfFourPairs().keep(torch.ones(1, 8)).tolist() == [[True] * 4 + [False] * 4]
    assert TwoOfFourPairs().keep(torch.zeros(1, 8)).sum() == 4


def test_bits() -> None:
    assert TwoOfFourPairs().bits(4) == 2.5
    assert TwoOfFour().bits(4) == 3  # two indices of 2 bits for 4 values
    assert Sparse(0.75).bits(8) == 3  # a quarter of the values, one bit each for the place


@pytest.mark.parametrize("shape", [(1, 8), (63, 16), (2, 123, 20)])
def test_two_of_four_keeps_the_larger(shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for row, kept in zip(z.reshape(-1, 4), TwoOfFour().keep(z).reshape(-1, 4), strict=True):
        best = sorted(range(4), key=lambda i: -abs(float(row[i])))[:2]
        assert kept.tolist() == [i in best for i in range(4)]
    assert TwoOfFour().keep(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("f", [0.1, 0.5, 0.9, 0.001])
@pytest.mark.parametrize("shape", [(1, 7), (63, 16), (2, 5, 123)])
def test_unstructured_fraction_keeps_the_larger_of_every_row(f: float, shape: tuple[int, ...]) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    zeros = int(f * shape[-1])
    for row, kept in zip(z.reshape(-1, shape[-1]), Sparse(f).keep(z).reshape(-1, shape[-1]), strict=True):
        assert (~kept).sum() == zeros
        if zeros:
            assert row[~kept].abs().max() <= row[kept].abs().min()
    assert Sparse(0.5).keep(torch.ones(1, 4)).tolist() == [[True, True, False, False]]
