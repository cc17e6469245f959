"""Block Hadamard rotation along the last dimension, on tensor cores.

    z = x · H,  H block-diagonal with orthonormal n×n Sylvester blocks:  H[i, j] = (−1)^popcount(i & j) / √n

H is symmetric and its own inverse, so the gradient is the same op. The kernel multiplies tiles by a ±1 matrix that it computes
from the parity of the popcount: nothing is loaded, products are exact, and the factor 1/√n is applied in fp32. On tensor cores
this takes less time than the memory traffic. fp32 inputs are split into three bf16 terms of 8 bits each and keep fp32 accuracy.

R rows, C columns, n block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .jit import INTERPRET, ceil_div, check_runs_on, jit, programs, tl
from .op import Check, Cost, Implementation, KernelError, Op, Shape

BLOCKS = (32, 64, 128, 256)


# --- reference --------------------------------------------------------------------------------------------------------


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal n×n Sylvester matrix, n a power of two: H₁ = 1, H₂ₙ = [[H, H], [H, −H]] / √2."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h * n**-0.5).to(device, dtype)


@lru_cache(maxsize=32)
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # cached, and therefore must not be an inference tensor
        return hadamard_matrix(n, dtype, device)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast, in which products keep the dtype of their operands."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def rotate_reference(x: Tensor, block: int = 128) -> Tensor:
    """(…, C) → (…, C) in x's dtype; computed in fp32 (fp64 stays fp64), also under autocast.

    On a CPU, H = H_left ⊗ H₁₆: rows of 16 are multiplied by H₁₆, and the columns by H_left, in a third of the time of one dense
    product.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        if block >= 128 and x.device.type == "cpu":
            left, right = (_matrix(n, wide, x.device) for n in (block // 16, 16))
            blocks = (x.to(wide).reshape(-1, 16) @ right).view(-1, len(left), 16)
            z = torch.bmm(left.expand(len(blocks), -1, -1), blocks)  # `matmul` would copy `left` for every block
        else:
            z = x.to(wide).reshape(-1, block) @ _matrix(block, wide, x.device)
    return z.view(x.shape).to(x.dtype)


# --- Triton kernel ----------------------------------------------------------------------------------------------------


@jit
def parity(n: tl.constexpr):  # type: ignore[no-untyped-def]
    """popcount(i & j) mod 2, int32 (n, n), n ≤ 256: bits are folded to four, and 0x6996 is the table of their parity."""
    i = tl.arange(0, n)
    v = i[:, None] & i[None, :]
    return (0x6996 >> ((v ^ (v >> 4)) & 15)) & 1


@jit
def signs_for(dtype: tl.constexpr, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ±1 matrix, at most 128×128, in the dtype in which tiles of `dtype` are multiplied: bf16 for the parts of fp32.

    The parity becomes the sign bit of a 16-bit 1, with half the instructions of a conversion from fp32. This matters, since a
    program that quantizes one row spends as much time on this matrix as on its row.
    """
    size: tl.constexpr = n if n < 128 else 128
    if INTERPRET:
        return 1.0 - 2.0 * parity(size).to(tl.float32)
    elif dtype == tl.float16:
        return (parity(size) << 15 | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return (parity(size) << 15 | 0x3F80).to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def rotate_tile(x, h, n: tl.constexpr):  # type: ignore[no-untyped-def]
    """x · H, fp32, (BR, n), of a tile x in its own dtype, with h = signs_for(that dtype, n)."""
    return rotate_unscaled(x, h, n, 3) * (n**-0.5)


@jit
def rotate_unscaled(x, h, n: tl.constexpr, TERMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """√n · x · H; TERMS as in multiply_signs.

    A block of 256 is two rows of 128 and one butterfly, [a, b]·H₂ₙ = [aH + bH, aH − bH], since a 256×256 matrix would fill
    shared memory.
    """
    if n == 256:
        z = tl.reshape(multiply_signs(tl.reshape(x, (2 * x.shape[0], 128)), h, TERMS), (x.shape[0], 2, 128))
        a, b = tl.split(tl.permute(z, (0, 2, 1)))
        z = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (x.shape[0], 256))
    else:
        z = multiply_signs(x, h, TERMS)
    return z


@jit
def multiply_signs(x, h, TERMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """x · h in fp32. An fp32 x is TERMS bf16 terms of 8 significant bits, whose products are exact; 3 are all of x."""
    z = tl.zeros((x.shape[0], h.shape[1]), tl.float32)
    if x.dtype == tl.float32:
        high = leading_bits(x)
        rest = x - high
        if TERMS == 3:
            middle = leading_bits(rest)
            z = multiply_term(rest - middle, h, z)
            z = multiply_term(middle, h, z)
        else:
            z = multiply_term(rest, h, z)
        z = multiply_term(high, h, z)
    else:
        z = multiply_term(x, h, z)
    return z


@jit
def leading_bits(x):  # type: ignore[no-untyped-def]
    """x rounded to the 8 significant bits of a bf16, as fp32."""
    return ((x.to(tl.int32, bitcast=True) + 0x8000) & -65536).to(tl.float32, bitcast=True)


@jit
def multiply_term(x, h, z):  # type: ignore[no-untyped-def]
    """z + x · h, with x converted to the dtype of h."""
    if INTERPRET:
        return tl.dot(x.to(tl.float32), h, z, input_precision="ieee")
    else:
        return tl.dot(x.to(h.dtype), h, z)


@jit
def hadamard_kernel(x_ptr, z_ptr, n_rows, n: tl.constexpr, BR: tl.constexpr):  # type: ignore[no-untyped-def]
    """(n_rows, n) → (n_rows, n); a row here is one block of a row of x. Each program makes H once and takes every p-th tile."""
    h = signs_for(x_ptr.dtype.element_ty, n)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BR), tl.num_programs(0)):
        r = (tile * BR + tl.arange(0, BR)).to(tl.int64)
        at = r[:, None] * n + tl.arange(0, n)[None, :]
        inside = (r < n_rows)[:, None]
        z = rotate_tile(tl.load(x_ptr + at, mask=inside, other=0.0), h, n)
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)


def rotate_triton(x: Tensor, block: int = 128) -> Tensor:
    """Launch the kernel on a contiguous x of fp32, fp16 or bf16."""
    check_runs_on(x, "hadamard")
    z = torch.empty_like(x)
    rows = x.numel() // block
    tile = 64 if block <= 128 else 32
    if rows:
        hadamard_kernel[(programs(x, ceil_div(rows, tile)),)](x, z, rows, n=block, BR=tile, num_warps=4)
    return z


# --- custom op and public function ------------------------------------------------------------------------------------


@torch.library.custom_op("questctl::block_hadamard", mutates_args=(), device_types="cpu")
def _rotate(x: Tensor, block: int) -> Tensor:
    return rotate_reference(x, block)


@_rotate.register_kernel("cuda")
def _(x: Tensor, block: int) -> Tensor:
    return rotate_triton(x.contiguous(), block)


@_rotate.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_block(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.block = inputs[1]


def _rotate_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return _rotate(grad, ctx.block), None


_rotate.register_autograd(_rotate_backward, setup_context=_save_block)


def check_block(width: int, block: int, op: str) -> None:
    """Raises KernelError unless `block` is one of BLOCKS and divides `width`."""
    if block not in BLOCKS:
        raise KernelError(f"{op}: block {block} is not one of {', '.join(map(str, BLOCKS))}.")
    if width % block:
        raise KernelError(f"{op}: rotation block {block} does not divide the width {width}.")


def check_device(x: Tensor, op: str) -> None:
    """Raises KernelError unless x is on a CPU or a CUDA GPU."""
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise KernelError(f"{op}: device {x.device.type} is not one of cpu, cuda.")


def check_float(x: Tensor, op: str) -> None:
    """Raises KernelError unless x is fp32, fp16 or bf16, on a CPU or a CUDA GPU."""
    check_device(x, op)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise KernelError(f"{op}: dtype {x.dtype} is not one of float32, float16, bfloat16.")


def rotate(x: Tensor, block: int = 128) -> Tensor:
    """x·H along the last dimension: (…, C) → (…, C), same dtype, differentiable; its own inverse.

    Raises KernelError if block is not in BLOCKS or does not divide C, or x is not fp32, fp16 or bf16.
    """
    check_float(x, "hadamard")
    check_block(x.shape[-1], block, "hadamard")
    return _rotate(x, block)


# --- records ----------------------------------------------------------------------------------------------------------


def relative_error(y: Tensor, truth: Tensor) -> float:
    """‖y − truth‖ / ‖truth‖ in fp64; infinite if an element of y is not finite."""
    if not torch.isfinite(y).all():
        return float("inf")
    truth = truth.double()
    return float((y.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def check_against_naive(y: Tensor, truth: Tensor, naive: Tensor, terms: int = 1) -> Check:
    """Allow twice the error of the plain implementation `naive` in the dtype of y against fp64.

    At least the error of fp32 sums of `terms` terms is allowed. It grows to about √terms·ε/2 in another order of summation
    (Higham & Mary 2019), and the order of a BLAS depends on the processor. One rounding is always allowed, even if the naive
    result is exact.
    """
    floor = torch.finfo(torch.float32).eps * max(math.sqrt(terms) / 2, 1.0)
    return Check(relative_error(y, truth), 2 * max(relative_error(naive, truth), floor))


def bench_dtype(device: torch.device) -> torch.dtype:
    """The dtype of real inputs in benchmarks: bf16 on a GPU, fp32 on a CPU and in the interpreter, which lacks bf16."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def seeded(device: torch.device, seed: int) -> torch.Generator | None:
    """A generator for random inputs; None on the meta device, whose tensors hold no values."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


def _inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, int]:
    x = torch.randn(shape["R"], shape["C"], device=device, generator=seeded(device, seed))
    return x.to(bench_dtype(device)), shape["block"]


def _check(inputs: tuple[Tensor, int], z: Tensor) -> Check:
    x, block = inputs
    return check_against_naive(z, rotate_reference(x.double(), block), rotate_reference(x, block), block)


def _bench_shapes(device: str) -> list[Shape]:
    rows = (16384, 65536) if device == "cuda" else (1024,)
    blocks = BLOCKS if device == "cuda" else (128,)
    return [{"R": r, "C": 2048, "block": b} for r in rows for b in blocks]


def rotation_cost(shape: Shape, size: int, moved: float) -> Cost:
    """The cost of an op that rotates (R, C) real elements of `size` bytes in blocks and moves `moved` bytes in all.

    It counts log₂ n additions an element, those of the fast transform; the dense product of a block takes 2n operations.
    """
    additions = max(shape["block"], 1).bit_length() - 1
    return Cost(moved, shape["R"] * shape["C"] * additions, "bf16" if size == 2 else "fp32")


def compiled(reference: Callable[..., Any]) -> Implementation:
    """The reference under torch.compile, as a peer on a GPU."""
    return Implementation("compiled reference", _compile_late(reference), why_not=only_on_a_gpu)


def only_on_a_gpu(device: torch.device) -> str | None:
    """The reason not to run an implementation on `device` unless it is a GPU."""
    return None if device.type == "cuda" else "only on a GPU"


def _compile_late(reference: Callable[..., Any]) -> Callable[..., Any]:
    @lru_cache(maxsize=1)
    def build() -> Callable[..., Any]:
        return torch.compile(reference, dynamic=False)

    def call(*inputs: Any) -> Any:
        return build()(*inputs)

    return call


COPY = Implementation("copy", lambda x, *rest: x.clone(), checked=False)  # the least memory traffic: read and write once


def dense_block_diagonal(width: int, block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The (width, width) block-diagonal matrix, for a peer that multiplies by all of it."""
    return torch.block_diag(*[hadamard_matrix(block, dtype, device)] * (width // block))


def _peers(shape: Shape) -> list[Implementation]:
    def dense(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        return x, dense_block_diagonal(x.shape[-1], block, x.dtype, x.device)

    def blocks(x: Tensor, h: Tensor) -> Tensor:
        return (x.view(-1, len(h)) @ h).view_as(x)

    return [
        COPY,
        Implementation("view @ H", blocks, lambda x, block: (x, _matrix(block, x.dtype, x.device))),
        Implementation("dense block-diagonal", torch.matmul, dense),
    ]


RECORDS = [
    Op(
        name="hadamard",
        summary="block Hadamard rotation",
        reference=rotate_reference,
        function=rotate,
        triton=rotate_triton,
        inputs=_inputs,
        check=_check,
        cost=lambda s, size: rotation_cost(s, size, 2 * size * s["R"] * s["C"]),
        test_shapes=[{"R": r, "C": c * b, "block": b} for r, c, b in ((1, 1, 32), (63, 3, 64), (123, 5, 128), (5, 2, 256))],
        compile_shapes=[{"R": 64, "C": 512, "block": 128}],
        bench_shapes=_bench_shapes,
        peers=_peers,
        baseline="copy",
    )
]
