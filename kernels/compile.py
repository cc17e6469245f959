"""Compile every kernel without a GPU, and report the registers, stack and matrix instructions of its machine code.

    python -m questctl.kernels.compile [--arch 80] [--arch 90] [OP…]     one JSON line per kernel

Each op's launch function runs on meta tensors at its `compile_shapes`. Instead of launching, it compiles the kernel to a cubin
for the wanted architecture, with the same specialization (dtypes, divisibility, tile sizes) as the launch. `cuobjdump`, which
comes with Triton, reports registers and stack; spilled registers show as stack. This needs no GPU and no driver. It needs a
process of its own, since it replaces Triton's driver; TRITON_INTERPRET must be unset.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import jit
from .op import OPS, KernelError, load

ARCHITECTURES = (80, 90)  # A100 and others of its generation; H100, H200
MMA = re.compile(r"\b(wgmma\.mma_async\S*|mma\.sync\S*|dp4a\S*)")


@dataclass(frozen=True)
class Compiled:
    """One kernel of one op at one shape, compiled for compute capability `arch` (90: 9.0)."""

    op: str
    kernel: str
    shape: dict[str, int]
    arch: int
    registers: int
    stack_bytes: int  # local memory per thread: spilled registers, or an array that is indexed at run time
    shared_bytes: int
    instructions: tuple[str, ...]  # the distinct matrix and dot-product instructions of its PTX


class _NoDevice:
    """The part of a GPU driver that Triton needs in order to compile."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # Triton caches compiled kernels under this number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def compile_ops(names: Sequence[str], arch: int) -> Iterator[Compiled]:
    """Compile all kernels that the named ops launch at `compile_shapes`. Raises KernelError if Triton cannot compile here."""
    if jit.triton is None:
        raise KernelError("Triton is not installed (pip install triton).")
    if jit.INTERPRETED:
        raise KernelError("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it.")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    built: list[Any] = []
    launch = JITFunction.run

    def build_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        built.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(_NoDevice(arch))
    JITFunction.run = build_only
    try:
        for name in names:
            op = load(name)
            for shape in op.compile_shapes:
                op.triton(*op.inputs(shape, torch.device("meta"), 0))
                for kernel in {k.hash: k for k in built}.values():
                    yield _read(name, dict(shape), arch, kernel)
                built.clear()
    finally:
        JITFunction.run = launch


def _read(op: str, shape: dict[str, int], arch: int, kernel: Any) -> Compiled:
    used = resource_usage(kernel.asm["cubin"])
    instructions = tuple(sorted(set(MMA.findall(kernel.asm["ptx"]))))
    meta, stack = kernel.metadata, used["STACK"] + used["LOCAL"]
    return Compiled(op, meta.name, shape, arch, used["REG"], stack, meta.shared, instructions)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Resources of the only kernel in a cubin: {'REG': 40, 'STACK': 0, 'LOCAL': 0, …}."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True)
    usage = re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text.stdout + text.stderr)
    return {key: int(value) for key, value in usage}


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m questctl.kernels.compile", description="Build every kernel without a GPU.")
    parser.add_argument("ops", nargs="*", metavar="OP", choices=[*OPS, []], help=", ".join(OPS))
    parser.add_argument("--arch", type=int, action="append", help="compute capability × 10, repeatable [default: 80, 90]")
    options = parser.parse_args()
    for arch in options.arch or ARCHITECTURES:
        for compiled in compile_ops(options.ops or list(OPS), arch):
            print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
