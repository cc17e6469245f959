"""Triton, if it is installed, and helpers that all kernels share.

`TRITON_INTERPRET=1` (set before the first import) runs every kernel on the CPU. The interpreter multiplies bf16 wrongly and has
no inline assembly, so kernels branch on one compile-time constant, `INTERPRET`: operands are widened before `tl.dot`, and every
inline instruction has a plain equivalent. Without Triton this module still imports; launching a kernel then raises KernelError.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .op import KernelError

if TYPE_CHECKING:
    import torch

PROCESSORS = 132  # multiprocessors of an H100; tiles are chosen for it, so that the choice is the same everywhere
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


class _Missing:
    """Stands in for a kernel if Triton is not installed."""

    def __getitem__(self, grid: object) -> Any:
        raise KernelError("Triton is not installed: CUDA tensors need it (pip install triton); CPU tensors run without.")


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, or a stand-in that raises KernelError when it is launched."""
    return triton.jit(fn) if triton is not None else _Missing()


def ceil_div(a: int, b: int) -> int:
    """⌈a/b⌉."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()


def programs(x: torch.Tensor, tiles: int, per_processor: int = 4) -> int:
    """The number of programs that share `tiles`: enough to fill the GPU, but few, since each makes its matrix first."""
    if x.device.type != "cuda":
        return min(tiles, 3)  # interpreted: programs are slow, and a test needs more than one
    import torch

    return min(tiles, per_processor * torch.cuda.get_device_properties(x.device).multi_processor_count)


def check_runs_on(x: torch.Tensor, op: str) -> None:
    """Raises KernelError unless the Triton kernels can run on x: on a GPU of compute capability ≥ 8.0, or interpreted."""
    if x.device.type == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability(x.device)
        if major < 8:
            name = torch.cuda.get_device_name(x.device)
            raise KernelError(f"{op}: {name} has compute capability {major}.{minor}; the kernels need 8.0 or newer.")
    elif not INTERPRETED and x.device.type != "meta":  # meta: compile.py, which launches nothing
        raise KernelError(f"{op}: the Triton kernel takes CUDA tensors, not {x.device.type} (or set TRITON_INTERPRET=1).")


def eager_on_cpu(x: torch.Tensor) -> bool:
    """Whether to call the torch implementation of an op directly: a custom op takes 0.1 ms more.

    The first call of one takes seconds, because torch imports its compiler for it.
    """
    import torch

    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def why_not(device: torch.device) -> str | None:
    """Why the kernels do not run on `device`, as a sentence; None if they do (on a CPU, their torch implementations)."""
    if device.type != "cuda":
        return None
    if triton is None:
        return "Triton is not installed (pip install triton)."
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return None if major >= 8 else f"{name} has compute capability {major}.{minor}; the kernels need 8.0 or newer."


INTERPRET = tl.constexpr(INTERPRETED) if triton is not None else INTERPRETED  # kernels read globals only as constexpr
