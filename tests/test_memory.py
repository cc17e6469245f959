"""The peak memory of a call, against a count by hand."""

import os

import pytest
import torch

from questctl.kernels.memory import extra_bytes

CPU = torch.device("cpu")


def numbers(n: int) -> torch.Tensor:
    return torch.empty(n)


def one_after_the_other():
    for n in (1000, 3000, 2000):
        numbers(n)


def side_by_side():
    return numbers(1000), numbers(3000), numbers(2000)


def overlapping():
    a = numbers(1000)
    b = numbers(3000)
    del a
    return b, numbers(500)


@pytest.mark.parametrize(("call", "floats"), [(one_after_the_other, 3000), (side_by_side, 6000), (overlapping, 4000)])
def test_the_peak_is_what_lives_at_the_same_time(call, floats, capfd):
    assert extra_bytes(call, CPU) == 4 * floats
    assert capfd.readouterr() == ("", "")


def test_nothing_new_and_what_was_there_before_and_is_freed():
    kept = [numbers(1000)]
    assert extra_bytes(lambda: None, CPU) == 0
    assert extra_bytes(kept.clear, CPU) == 0


def test_what_autograd_keeps_is_counted():
    w = torch.ones(64, 64, requires_grad=True)
    w.grad = torch.zeros(64, 64)
    x = torch.ones(1000, 64)

    def step():
        torch.relu(x @ w).sum().backward()

    step()
    found = extra_bytes(step, CPU) / (4 * 1000 * 64)  # x @ w and its relu live until the backward pass, which needs another
    assert 2 <= found < 4


def test_a_failing_call_leaves_stderr_as_it_was(capfd):
    with pytest.raises(ZeroDivisionError):
        extra_bytes(lambda: 1 // 0, CPU)
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
