"""The record that describes an op to its tests and its benchmark, and the names of all ops.

    roofline time = max(bytes / copy rate, operations / matmul rate)

Every byte that must cross memory counts once (inputs read, outputs written); a multiply-add counts as two operations. This file
does not import torch, so that a misspelt name on the command line is reported at once; `load(name)` imports the op's module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Shape = Mapping[str, int]
Unit = Literal["fp32", "bf16", "int8", "b1"]

OPS: dict[str, str] = {  # name → the module of this package whose RECORDS hold it
    "hadamard": "hadamard",
    "quantize": "fake_quant",
    "fake-quantize": "fake_quant",
    "mask-rotate": "fake_quant",
    "rotary": "rotary",
    "rmsnorm-quantize": "norm_quant",
    "silu-mul-quantize": "norm_quant",
    "pack": "pack",
    "unpack": "pack",
    "int-gemm": "int_gemm",
    "packed-gemm": "gemv",
    "packed-gemm-16": "gemv",
    "int-linear": "int_linear",
    "one-bit-rate": "one_bit",
}


class KernelError(ValueError):
    """The kernels do not support an input, device or installation; the message names the value and the choices."""


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of a kernel that are no fault of the caller; Triton's own errors are not RuntimeErrors."""
    try:
        from triton.errors import TritonError
    except ImportError:  # no Triton, or one that has moved the class
        return (RuntimeError, KernelError, NotImplementedError, ImportError)
    return (RuntimeError, KernelError, NotImplementedError, ImportError, TritonError)


@dataclass(frozen=True)
class Cost:
    """The work of a perfect implementation: bytes across memory, operations, and the matmul unit that computes them."""

    bytes: float
    operations: float = 0.0
    unit: Unit = "fp32"


@dataclass(frozen=True)
class Check:
    """The difference between an output and the definition: an error, the tolerance, and the number of wrong elements.

    `exact` says that the output was compared bit for bit. `parts` names what `wrong` counts. Only implementations that `passed`
    are timed.
    """

    error: float
    tolerance: float
    wrong: int = 0
    exact: bool = False
    parts: str = "elements"

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong and the error is within the tolerance (NaN is not)."""
        return self.wrong == 0 and self.error <= self.tolerance


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `prepare` converts inputs to what `call` takes (dtype, layout); this is done once and not timed. `checked=False` marks a
    lower bound that computes something else, such as a copy. `why_not(device)` is the reason why it cannot run there, or None.
    """

    name: str
    call: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs
    checked: bool = True
    why_not: Callable[[torch.device], str | None] = lambda device: None


@dataclass(frozen=True)
class Case:
    """The implementations of one op at one shape, which are compared with the one named `baseline`.

    `inputs(seed)` makes one set of arguments; `check(inputs, output)` compares an output with the definition. `rotations` is
    the number of sets that are used in turn (0: so many that they exceed the cache). `memory` asks for the peak memory, too.
    """

    op: str
    shape: Shape
    implementations: Sequence[Implementation]
    baseline: str
    inputs: Callable[[int], tuple[Any, ...]]
    check: Callable[[tuple[Any, ...], Any], Check]
    cost: Cost | None = None
    rotations: int = 0
    memory: bool = False


@dataclass(frozen=True)
class Op:
    """An op: its definition, its public function, its Triton launch, and how to test, benchmark and cost it.

    `inputs(shape, device, seed)` makes random arguments of `function`; `reference` and `triton` take the same arguments.
    `check` takes (arguments, output). `cost(shape, size)` takes the bytes of one real element. `test_shapes` contain odd sizes;
    `compile_shapes` reach every kernel and tile once; `bench_shapes(device type)` are those that are timed. `prepare` is what a
    user of the function does once, such as the layout of a weight.
    """

    name: str
    summary: str
    reference: Callable[..., Any]
    function: Callable[..., Any]
    triton: Callable[..., Any]
    inputs: Callable[[Shape, torch.device, int], tuple[Any, ...]]
    check: Callable[[tuple[Any, ...], Any], Check]
    cost: Callable[[Shape, int], Cost]
    test_shapes: Sequence[Shape]
    compile_shapes: Sequence[Shape]
    bench_shapes: Callable[[str], Sequence[Shape]]
    peers: Callable[[Shape], Sequence[Implementation]]
    baseline: str
    prepare: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs

    def case(self, shape: Shape, device: torch.device) -> Case:
        """This op at one shape on one device; the public function is called `triton` or `torch`, after what it runs there."""
        name = "triton" if device.type == "cuda" else "torch"
        ours = Implementation(name, self.function, self.prepare)
        return Case(
            self.name,
            shape,
            (ours, *self.peers(shape)),
            self.baseline,
            lambda seed: self.inputs(shape, device, seed),
            self.check,
            self.cost(shape, 2 if device.type == "cuda" else 4),
        )


def load(name: str) -> Op:
    """The record of one op; imports torch and the op's module. Raises KeyError for a name that is not in OPS."""
    module = importlib.import_module(f".{OPS[name]}", __package__)
    record = {op.name: op for op in module.RECORDS}[name]
    assert isinstance(record, Op)
    return record
