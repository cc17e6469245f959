"""The size of a grid's unit."""

import pytest
import torch

from questctl.quant.grids import FP4, Int
from questctl.quant.scales import AbsMax, Learned, Rms


def test_shapes_and_values() -> None:
    z = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert Rms().of(z, Int(2)).squeeze(-1).tolist() == pytest.approx([12.5**0.5 * 1.4935346 / 1.5, 0])
    assert AbsMax().of(z, Int(2)).squeeze(-1).tolist() == pytest.approx([4 / 1.5, 0])
    assert AbsMax().of(z, FP4()).squeeze(-1).tolist() == pytest.approx([4 / 6, 0])
    assert Rms().of(torch.ones(2, 3, 5), Int(4)).shape == AbsMax().of(torch.ones(2, 3, 5), Int(4)).shape == (2, 3, 1)


def test_learned_scale_starts_at_the_optimum_of_the_whole_tensor() -> None:
    z = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    start = Learned().of(z, Int(2))
    assert start.shape == (1,)
    assert start.item() == pytest.approx(6.25**0.5 * 1.4935346 / 1.5)
    assert Learned.gradient_factor(100, Int(4)) == pytest.approx(1 / 750**0.5)
