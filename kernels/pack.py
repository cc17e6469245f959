"""The memory layout of packed weights: codes of 1 to 4 bits in bytes, planar.

An odd code o of b bits is stored as the b-bit two's complement number s = (o − 1)/2. With P = 8/b codes to a byte and G = K/P
bytes to a row,

    byte[n, j] = Σ_i  (s[n, i·G + j] mod 2^b) · 2^(b·i)          i = 0 … P − 1

so that one shift and one mask turn G bytes into G neighbouring codes. Codes of 3 bits are a 2-bit plane followed by a 1-bit
plane, o = 2·o₂ + o₁ with o₂ odd of 2 bits and o₁ = ±1, so that a product with them is two products of the other kernels. A
weight takes b/8 bytes, b/16 of those in bf16.

N rows, K codes a row, b bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .hadamard import check_device, seeded
from .jit import ceil_div, check_runs_on, eager_on_cpu, jit, tl
from .op import Check, Cost, Implementation, KernelError, Op, Shape

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}  # bits → bits of each stored plane


def packed_width(width: int, bits: int) -> int:
    """Bytes of one row of `width` codes, b/8 each."""
    return width * bits // 8


def split_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """Odd codes (…, K) → the odd codes of each stored plane: [o], or for 3 bits [o₂, o₁] with o = 2·o₂ + o₁."""
    if bits != 3:
        return [codes]
    high = 2 * torch.div(codes, 4, rounding_mode="floor").to(torch.int8) + 1  # o = 4h + 2l + 1, h in −2…1, l in 0, 1
    return [high, codes - 2 * high]


# --- reference --------------------------------------------------------------------------------------------------------


def pack_reference(codes: Tensor, bits: int) -> Tensor:
    """Odd codes int8 (N, K) → uint8 (N, K·b/8)."""
    return torch.cat([_pack_plane(c, b) for c, b in zip(split_planes(codes, bits), PLANES[bits], strict=True)], -1)


def unpack_reference(packed: Tensor, bits: int, width: int) -> Tensor:
    """uint8 (N, K·b/8) → odd codes int8 (N, K)."""
    if bits != 3:
        return _unpack_plane(packed, bits)
    high, low = packed.split([width // 4, width // 8], -1)
    return _unpack_plane(high, 2).mul_(2).add_(_unpack_plane(low, 1))


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    stored = (codes >> 1).view(torch.uint8) & (2**bits - 1)  # (o − 1)/2 of an odd o
    planes = stored.chunk(8 // bits, -1)
    packed = planes[0].clone()
    for i, plane in enumerate(planes[1:], 1):
        packed |= plane << (bits * i)
    return packed


def _unpack_plane(packed: Tensor, bits: int) -> Tensor:
    """uint8 (N, G) → odd codes int8 (N, P·G) of one plane.

    With the bits of a code at the top of a byte, s·2^(8−b) + rest, a right shift gives 2s or 2s + 1; setting the last bit makes
    it 2s + 1.
    """
    shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-2) << shifts.unsqueeze(-1)).view(torch.int8)  # (N, P, G), without `out`, which compilers refuse
    return codes.bitwise_right_shift_(7 - bits).bitwise_or_(1).flatten(-2)


# --- Triton kernels ---------------------------------------------------------------------------------------------------


@jit
def pack_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, out_ptr, n_rows, codes_stride, out_stride, group, bits: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr
):
    """One plane: codes (n_rows, P·group) → bytes (n_rows, group)."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    j = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = (r < n_rows)[:, None] & (j < group)[None, :]
    byte = tl.zeros((BR, BG), tl.int32)
    for i in tl.static_range(8 // bits):
        code = tl.load(codes_ptr + r[:, None] * codes_stride + i * group + j[None, :], mask=inside, other=1).to(tl.int32)
        byte |= (((code - 1) >> 1) & (2**bits - 1)) << (bits * i)
    tl.store(out_ptr + r[:, None] * out_stride + j[None, :], byte.to(tl.uint8), mask=inside)


@jit
def unpack_kernel(  # type: ignore[no-untyped-def]
    packed_ptr,
    low_ptr,
    out_ptr,
    n_rows,
    packed_stride,
    group,
    bits: tl.constexpr,
    TWO: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,
):
    """One plane: bytes (n_rows, group) → codes (n_rows, P·group); with TWO, 2·(2-bit plane) + (1-bit plane at low_ptr)."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    j = tl.program_id(1) * BG + tl.arange(0, BG)
    inside = (r < n_rows)[:, None] & (j < group)[None, :]
    byte = tl.load(packed_ptr + r[:, None] * packed_stride + j[None, :], mask=inside, other=0).to(tl.int32)
    for i in tl.static_range(8 // bits):
        code = 2 * ((byte << (32 - bits * (i + 1))) >> (32 - bits)) + 1  # the arithmetic shift extends the sign
        k = i * group + j
        if TWO:
            half = group // 2  # bytes of the 1-bit plane
            low = tl.load(low_ptr + r[:, None] * packed_stride + (k % half)[None, :], mask=inside, other=0).to(tl.int32)
            code = 2 * code + 1 - 2 * ((low >> (k // half)[None, :]) & 1)  # a set bit is s = −1, so o₁ = −1
        tl.store(out_ptr + r[:, None] * (8 // bits * group) + k[None, :], code.to(tl.int8), mask=inside)


TILE_ROWS, TILE_BYTES = 16, 128


def pack_triton(codes: Tensor, bits: int) -> Tensor:
    """Launch the kernel on contiguous codes (N, K), one plane at a time."""
    check_runs_on(codes, "pack")
    rows, width = codes.shape
    out = torch.empty(rows, packed_width(width, bits), dtype=torch.uint8, device=codes.device)
    start = 0
    for plane, b in zip(split_planes(codes, bits), PLANES[bits], strict=True):
        group = width * b // 8
        grid = (ceil_div(rows, TILE_ROWS), ceil_div(group, TILE_BYTES))
        if rows:
            pack_kernel[grid](plane, out[:, start:], rows, width, out.shape[1], group, bits=b, BR=TILE_ROWS, BG=TILE_BYTES)
        start += group
    return out


def unpack_triton(packed: Tensor, bits: int, width: int) -> Tensor:
    """Launch the kernel on contiguous bytes (N, K·b/8)."""
    check_runs_on(packed, "unpack")
    rows = len(packed)
    codes = torch.empty(rows, width, dtype=torch.int8, device=packed.device)
    plane = PLANES[bits][0]
    group = width * plane // 8
    if rows:
        unpack_kernel[(ceil_div(rows, TILE_ROWS), ceil_div(group, TILE_BYTES))](
            packed,
            packed[:, group:] if bits == 3 else packed,
            codes,
            rows,
            packed.shape[1],
            group,
            bits=plane,
            TWO=bits == 3,
            BR=TILE_ROWS,
            BG=TILE_BYTES,
        )
    return codes


# --- custom ops and public functions ----------------------------------------------------------------------------------


@torch.library.custom_op("questctl::pack", mutates_args=(), device_types="cpu")
def _pack(codes: Tensor, bits: int) -> Tensor:
    return pack_reference(codes, bits)


@_pack.register_kernel("cuda")
def _(codes: Tensor, bits: int) -> Tensor:
    return pack_triton(codes.contiguous(), bits)


@_pack.register_fake
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(codes.shape[0], codes.shape[1] * bits // 8, dtype=torch.uint8)


@torch.library.custom_op("questctl::unpack", mutates_args=(), device_types="cpu")
def _unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    return unpack_reference(packed, bits, width)


@_unpack.register_kernel("cuda")
def _(packed: Tensor, bits: int, width: int) -> Tensor:
    return unpack_triton(packed.contiguous(), bits, width)


@_unpack.register_fake
def _(packed: Tensor, bits: int, width: int) -> Tensor:
    return packed.new_empty(packed.shape[0], width, dtype=torch.int8)


def check_packing(width: int, bits: int, op: str) -> None:
    """Raises KernelError unless codes of `bits` can be packed and a row of `width` codes fills whole bytes of each plane."""
    if bits not in PLANES:
        raise KernelError(f"{op}: {bits} bits cannot be packed; choices: {', '.join(map(str, PLANES))}.")
    share = 8 // min(PLANES[bits])
    if width % share:
        raise KernelError(f"{op}: width {width} is not a multiple of the {share} codes that share a byte at {bits} bits.")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Odd codes int8 (N, K) of 1 to 4 bits → uint8 (N, K·b/8). Raises KernelError for bits or a width that cannot be packed."""
    check_device(codes, "pack")
    check_packing(codes.shape[-1], bits, "pack")
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise KernelError(f"pack: codes {tuple(codes.shape)} of {codes.dtype}; takes (N, K) of int8.")
    return (pack_reference if eager_on_cpu(codes) else _pack)(codes, bits)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """uint8 (N, K·b/8) → odd codes int8 (N, K), K = `width`. Raises KernelError if the sizes contradict each other."""
    check_device(packed, "unpack")
    check_packing(width, bits, "unpack")
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_width(width, bits):
        raise KernelError(f"unpack: {packed.dtype} {tuple(packed.shape)} does not hold rows of {width} codes of {bits} bits.")
    return (unpack_reference if eager_on_cpu(packed) else _unpack)(packed, bits, width)


# --- records ----------------------------------------------------------------------------------------------------------


def random_codes(rows: int, width: int, bits: int, device: torch.device, seed: int) -> Tensor:
    """Uniform odd codes of `bits` bits, int8 (rows, width)."""
    levels = torch.randint(0, 2**bits, (rows, width), device=device, generator=seeded(device, seed))
    return (2 * levels + 1 - 2**bits).to(torch.int8)


def check_equal(out: Tensor, truth: Tensor) -> Check:
    """Require equal values, dtype and shape."""
    if out.shape != truth.shape or out.dtype != truth.dtype:
        return Check(float("inf"), 0.0, truth.numel(), exact=True)
    wrong = int((out != truth).sum())
    return Check(float((out.double() - truth.double()).abs().max()) if out.numel() else 0.0, 0.0, wrong, exact=True)


def _inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, int]:
    return random_codes(shape["N"], shape["K"], shape["bits"], device, seed), shape["bits"]


def _packed_inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, int, int]:
    codes, bits = _inputs(shape, device, seed)
    return pack_reference(codes, bits), bits, shape["K"]


def _bench_shapes(device: str) -> list[Shape]:
    n, bits = (8192, (4, 2, 1)) if device == "cuda" else (2048, (4, 1))
    return [{"N": n, "K": n, "bits": b} for b in bits]


_TEST_SHAPES: list[Shape] = [{"N": n, "K": k, "bits": b} for b in PLANES for n, k in ((1, 8), (63, 72), (123, 1032))]
_COPY = Implementation("copy", lambda x, *rest: x.clone(), checked=False)


def _op(
    name: str,
    summary: str,
    reference: Callable[..., Tensor],
    function: Callable[..., Any],
    triton: Callable[..., Any],
    inputs: Callable[..., Any],
) -> Op:
    return Op(
        name,
        summary,
        reference,
        function,
        triton,
        inputs,
        check=lambda inputs, out: check_equal(out, reference(*inputs)),
        cost=lambda s, size: Cost((1 + s["bits"] / 8) * s["N"] * s["K"]),
        test_shapes=_TEST_SHAPES,
        compile_shapes=[{"N": 64, "K": 512, "bits": 3}],
        bench_shapes=_bench_shapes,
        peers=lambda s: [_COPY],
        baseline="copy",
    )


RECORDS = [
    _op("pack", "odd codes to planar bytes", pack_reference, pack, pack_triton, _inputs),
    _op("unpack", "planar bytes to odd codes", unpack_reference, unpack, unpack_triton, _packed_inputs),
]
