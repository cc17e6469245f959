"""The sparsity masks against loops."""

import pytest
import torch

from questctl.quant.masks import TwoOfFourPairs


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
