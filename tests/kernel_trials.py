"""What every op is put through: each implementation, at each odd shape, on memory full of NaN, against the definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from questctl.kernels import jit
from questctl.kernels.op import Op, Shape, load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUMBERS = {"reference": "the definition", "function": "what a user calls", "triton": "the kernel, interpreted without a GPU"}


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, `torch.empty` holds NaN (or the largest integer), so that an element which no one writes is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def trials(*names: str) -> pytest.MarkDecorator:
    """Parametrize over (name, shape, which): every op, at its test shapes, by each of its implementations."""
    table = [(name, shape, which) for name in names for shape in load(name).test_shapes for which in NUMBERS]
    ids = [f"{name}-{'x'.join(map(str, shape.values()))}-{which}" for name, shape, which in table]
    return pytest.mark.parametrize(("name", "shape", "which"), table, ids=ids)


def attempt(name: str, shape: Shape, which: str, seed: int = 0) -> None:
    """Run one implementation and hold it against the op's own check."""
    assert jit.INTERPRETED or DEVICE.type == "cuda", "TRITON_INTERPRET=1 must be set before Triton is imported"
    op: Op = load(name)
    inputs = op.inputs(shape, DEVICE, seed)
    with poisoned():
        output = getattr(op, which)(*inputs)
    check = op.check(inputs, output)
    assert check.passed, check
