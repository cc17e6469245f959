"""The rate of one-bit tensor cores: the expected sums, and the rule that reads the rate from them."""

import pytest
import torch
from kernel_trials import DEVICE, attempt, trials

from questctl.kernels.one_bit import CHAINS, LOOPS, rule, sums, sums_reference, sums_triton
from questctl.kernels.rows import BenchRow


@trials("one-bit-rate")
def test_every_implementation_at_odd_shapes(name, shape, which):
    attempt(name, shape, which)


def test_sums_are_those_of_whole_products_written_out():
    a, b = torch.tensor([0x0F0F0F0F, -1, 7]).int(), torch.tensor([0x01010101, -1, 0]).int()
    begins = sum(4 * chain for chain in range(CHAINS))
    bits = [4 * CHAINS * 8 * 3 * k + begins for k in (4, 32, 0)]
    assert sums_reference(a, b, 256, 3)[:, 5].tolist() == bits
    whole = [4 * CHAINS * 8 * 3 * k + begins for k in (4 * 15 * 1, 4, 0)]  # bytes of −1 make +1 each
    for found in (sums(a, b, 32, 3), sums_triton(a.to(DEVICE), b.to(DEVICE), 32, 3).cpu()):
        assert found[:, 127].tolist() == whole


@pytest.mark.parametrize("k", [256, 32])
def test_the_loop_is_one_instruction_for_each_accumulator(k):
    lines = [line for line in LOOPS[k].splitlines() if "mma.sync" in line]
    assert len(lines) == CHAINS == len(set(lines))
    between = LOOPS[k].split("again:")[1].split("bra again")[0]
    assert between.count("mma.sync") == CHAINS


def row(k: int, tops: float | None, implementation: str = "triton") -> BenchRow:
    return BenchRow(op="one-bit-rate", implementation=implementation, shape={"N": 1, "K": k}, verdict="PASS", tops=tops)


def test_the_rule_is_said_with_the_rate():
    assert "4.10 POPS" in rule([row(256, 4100.0), row(32, 900.0)])
    assert "0.90" in rule([row(256, 4100.0), row(32, 900.0)])
    assert "worth writing" in rule([row(256, 4100.0)])
    assert "dropped" in rule([row(256, 3900.0)])
    assert rule([row(256, None), row(256, 9000.0, "torch")]) == ""
