"""Trials of an op: each implementation at each odd shape, on memory filled with NaN, against the definition."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._library.custom_ops import CustomOpDef

from questctl.kernels import jit
from questctl.kernels.op import OPS, KernelError, Op, Shape, load

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MANY_ROWS = 100
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


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises a KernelError whose message has all these words."""
    with pytest.raises(KernelError) as e:
        yield
    assert all(word in str(e.value) for word in words), str(e.value)


def trials(*names: str) -> pytest.MarkDecorator:
    """Parametrize over (name, shape, which): every op, at its test shapes, by each of its implementations.

    Kernels that are interpreted take seconds for many rows: these shapes are slow, and others have an odd number of rows, too.
    """
    table = [(name, shape, which) for name in names for shape in load(name).test_shapes for which in NUMBERS]
    ids = [f"{name}-{'x'.join(map(str, shape.values()))}-{which}" for name, shape, which in table]
    slow = [which == "triton" and jit.INTERPRETED and next(iter(shape.values())) > MANY_ROWS for _, shape, which in table]
    rows = [pytest.param(*row, marks=pytest.mark.slow if late else []) for row, late in zip(table, slow, strict=True)]
    return pytest.mark.parametrize(("name", "shape", "which"), rows, ids=ids)


def attempt(name: str, shape: Shape, which: str, seed: int = 0) -> None:
    """Run one implementation and hold it against the op's own check."""
    assert jit.INTERPRETED or DEVICE.type == "cuda", "TRITON_INTERPRET=1 must be set before Triton is imported"
    op: Op = load(name)
    inputs = op.inputs(shape, DEVICE, seed)
    with poisoned():
        output = getattr(op, which)(*inputs)
    check = op.check(inputs, output)
    assert check.passed, check


@contextmanager
def as_on_a_gpu() -> Iterator[set[str]]:
    """Inside, ops on CPU tensors do what they do on CUDA tensors, kernels interpreted; yields the names of those that ran.

    What a model launches on a GPU, seen without one. (`fake_quantize` has a gradient of its own and stays as it is.)
    """
    if not jit.INTERPRETED:
        pytest.skip("Triton is not interpreted here")
    ran: set[str] = set()

    def of_a_gpu(name: str, op: CustomOpDef) -> Callable[..., Any]:
        return lambda *args: ran.add(name) or op._backend_fns["cuda"](*args)

    with pytest.MonkeyPatch.context() as patch:
        for module in (importlib.import_module(f"questctl.kernels.{name}") for name in set(OPS.values())):
            for name, value in list(vars(module).items()):
                if name == "eager_on_cpu":
                    patch.setattr(module, name, lambda x: False)
                elif isinstance(value, CustomOpDef) and value._setup_context_fn is None:
                    patch.setattr(module, name, of_a_gpu(name.strip("_"), value))
        yield ran
