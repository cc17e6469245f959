"""Products with packed weights for few rows of activations, as in decoding, which are bound by reading the weights once.

    out[m, n] = (Σ_k x[m, k]·o[n, k]) · s_x[m] · s_w[n]        o: odd codes of b bits, read packed (pack.py)

With s = (o − 1)/2 in the top bits of a byte, p = s·2^(8−b), one shift and one mask unpack a code, and the sum follows from

    Σ x·o = 2·Σ x·s + Σ x = (Σ x·p) >> (7 − b)  +  Σ x         exact in int32

For M = 1 the kernel multiplies four codes at a time on the CUDA cores (`dp4a`); for M ≤ 64 it uses the tensor cores with the
weight as the tall operand; for more rows it expands the weight to int8 and calls int_gemm. All three, and the CPU, give the
same bits. A 3-bit weight is twice its 2-bit plane plus its 1-bit plane. With 16-bit activations the sum is in fp32 and not
bit-exact.

M rows of activations, N output channels, K contraction, b bits, P = 8/b codes a byte, G = K/P bytes a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hadamard import bench_dtype, check_against_naive, check_float, seeded, without_autocast
from .int_gemm import (
    check_product,
    int_gemm_reference,
    int_gemm_torch,
    int_gemm_triton,
    linear_peers,
    product_cost,
    random_scales,
)
from .jit import INTERPRET, PROCESSORS, ceil_div, check_runs_on, jit, next_power_of_two, tl
from .op import Check, Cost, Implementation, KernelError, Op, Shape
from .pack import (
    PLANES,
    check_equal,
    check_packing,
    pack_reference,
    packed_width,
    random_codes,
    unpack_reference,
    unpack_triton,
)

SKINNY_ROWS = 64  # for more rows, expanding the weight once is cheaper than unpacking it for each tile of rows
ALIGN = 32  # K must be a multiple of this for the Triton kernels: whole 4-byte words in the plane of 1-bit codes


# --- reference --------------------------------------------------------------------------------------------------------


def packed_gemm_reference(x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """(M, K) int8, (N, K·b/8) uint8, (M, 1), (N, 1) → (M, N)."""
    return int_gemm_reference(x, unpack_reference(packed, bits, x.shape[1]), x_scale, w_scale, dtype)


def packed_gemm_torch(x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The implementation on a CPU: unpack, then `torch._int_mm`."""
    return int_gemm_torch(x, unpack_reference(packed, bits, x.shape[1]), x_scale, w_scale, dtype)


def packed_gemm_16_reference(x: Tensor, packed: Tensor, w_scale: Tensor, bits: int) -> Tensor:
    """(M, K) real, (N, K·b/8) uint8, (N, 1) → (M, N) in x's dtype; summed in fp32 (fp64 for an fp64 x)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        sums = x.to(wide) @ unpack_reference(packed, bits, x.shape[1]).to(wide).T
    return (sums * w_scale.T).to(x.dtype)


# --- Triton kernels ---------------------------------------------------------------------------------------------------


@jit
def dot4(a, b, c):  # type: ignore[no-untyped-def]
    """c + Σ of the four products of the signed bytes of a and b, int32: one `dp4a` instruction."""
    if INTERPRET:
        for shift in tl.static_range(0, 32, 8):
            c += ((a << (24 - shift)) >> 24) * ((b << (24 - shift)) >> 24)
        return c
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@jit
def gemv_plane(  # type: ignore[no-untyped-def]
    x_ptr, w_at, inside_n, words, bits: tl.constexpr, MASK: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr
):
    """Σ x·o over one plane, int32 (BN,). x_ptr and w_at point to 4-byte words; a row of the plane has `words` of them."""
    j = tl.arange(0, BW)
    sums = tl.zeros((BN, BW), tl.int32)
    x_sums = tl.zeros((BW,), tl.int32)
    for start in range(0, words, BW):
        inside = j < words - start
        w = tl.load(w_at + start + j[None, :], mask=inside_n & inside[None, :], other=0)
        for i in tl.static_range(8 // bits):
            x = tl.load(x_ptr + i * words + start + j, mask=inside, other=0)
            p = (w << (8 - bits * (i + 1))) & MASK
            sums = dot4(p, tl.broadcast_to(x[None, :], (BN, BW)), sums)
            x_sums = dot4(x, tl.full((BW,), 0x01010101, tl.int32), x_sums)
    return (tl.sum(sums, axis=1) >> (7 - bits)) + tl.sum(x_sums, axis=0)


@jit
def gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    N,
    row_words,
    words,
    bits: tl.constexpr,
    MASK: tl.constexpr,
    THREE: tl.constexpr,
    LOW_MASK: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """BN outputs of one row: x and w as 4-byte words, `row_words` in a packed row, `words` of them in its first plane."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside_n = (n < N)[:, None]
    row = w_ptr + n.to(tl.int64)[:, None] * row_words
    sums = gemv_plane(x_ptr, row, inside_n, words, bits, MASK, BN, BW)
    if THREE:
        sums = 2 * sums + gemv_plane(x_ptr, row + words, inside_n, words // 2, 1, LOW_MASK, BN, BW)
    w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    out = sums.to(tl.float32) * tl.load(x_scale_ptr) * w_scale
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < N)


@jit
def skinny_plane(  # type: ignore[no-untyped-def]
    x_ptr, w_at, m, n_inside, M, K, group, first, last, bits: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr
):
    """Σ x·o over the bytes first … last of one plane, int32 (BN, BM): the unpacked weight is the tall operand."""
    j = tl.arange(0, BG)
    sums = tl.zeros((BN, BM), tl.int32)
    x_sums = tl.zeros((BM,), tl.int32)
    x_row = x_ptr + m[:, None] * K
    for start in range(first, last, BG):
        inside = j < last - start
        w = tl.load(w_at + start + j[None, :], mask=n_inside & inside[None, :], other=0)
        for i in tl.static_range(8 // bits):
            x = tl.load(x_row + i * group + start + j[None, :], mask=(m < M)[:, None] & inside[None, :], other=0)
            p = ((w << (8 - bits * (i + 1))) & (256 - (1 << (8 - bits)))).to(tl.int8, bitcast=True)
            sums = tl.dot(p, x.T, sums, out_dtype=tl.int32)
            x_sums += tl.sum(x.to(tl.int32), axis=1)
    return (sums >> (7 - bits)) + x_sums[None, :]


@jit
def skinny_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    sums_ptr,
    M,
    N,
    K,
    row_bytes,
    group,
    bits: tl.constexpr,
    THREE: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
):
    """A (BN, BM) tile of the transposed output over 1/SPLIT of K. Parts are added in int32, in any order."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    n_inside = (n < N)[:, None]
    row = w_ptr + n.to(tl.int64)[:, None] * row_bytes
    step = tl.cdiv(tl.cdiv(group, SPLIT), BG) * BG
    first = tl.program_id(1) * step
    sums = skinny_plane(x_ptr, row, m, n_inside, M, K, group, first, tl.minimum(first + step, group), bits, BN, BM, BG)
    if THREE:
        half = group // 2
        step = tl.cdiv(tl.cdiv(half, SPLIT), BG) * BG
        first = tl.program_id(1) * step
        low = skinny_plane(x_ptr, row + group, m, n_inside, M, K, half, first, tl.minimum(first + step, half), 1, BN, BM, BG)
        sums = 2 * sums + low
    inside = n_inside & (m < M)[None, :]
    if SPLIT > 1:
        tl.atomic_add(sums_ptr + m[None, :] * N + n[:, None], sums, mask=inside)
    else:
        scaled_store(out_ptr, sums, x_scale_ptr, w_scale_ptr, m, n, M, N, inside)


@jit
def scaled_store(out_ptr, sums, x_scale_ptr, w_scale_ptr, m, n, M, N, inside):  # type: ignore[no-untyped-def]
    """out[m, n] = (sum·s_x)·s_w for a transposed (BN, BM) tile."""
    x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    out = sums.to(tl.float32) * x_scale[None, :] * w_scale[:, None]
    tl.store(out_ptr + m[None, :] * N + n[:, None], out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def scale_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, x_scale_ptr, w_scale_ptr, out_ptr, M, N, BN: tl.constexpr, BM: tl.constexpr
):
    """The epilogue if K was split: multiply the sums by their scales."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    inside = (n < N)[:, None] & (m < M)[None, :]
    sums = tl.load(sums_ptr + m[None, :] * N + n[:, None], mask=inside, other=0)
    scaled_store(out_ptr, sums, x_scale_ptr, w_scale_ptr, m, n, M, N, inside)


@jit
def packed_16_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    row_bytes,
    group,
    bits: tl.constexpr,
    THREE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
):
    """A (BN, BM) tile of the transposed output with real activations: codes are converted to the dtype of x, exactly."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    n_inside = (n < N)[:, None]
    row = w_ptr + n.to(tl.int64)[:, None] * row_bytes
    sums = packed_16_plane(x_ptr, row, m, n_inside, M, K, group, bits, BN, BM, BG)
    if THREE:
        sums = 2 * sums + packed_16_plane(x_ptr, row + group, m, n_inside, M, K, group // 2, 1, BN, BM, BG)
    w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    out = (sums * w_scale[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[None, :] * N + n[:, None], out, mask=n_inside & (m < M)[None, :])


@jit
def packed_16_plane(  # type: ignore[no-untyped-def]
    x_ptr, w_at, m, n_inside, M, K, group, bits: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr
):
    """Σ x·o over one plane, fp32 (BN, BM): by tensor cores, or for a single row (BM = 1) by plain multiply-adds."""
    j = tl.arange(0, BG)
    sums = tl.zeros((BN, BM), tl.float32)
    partial = tl.zeros((BN, BG), tl.float32)
    for start in range(0, group, BG):
        inside = j < group - start
        w = tl.load(w_at + start + j[None, :], mask=n_inside & inside[None, :], other=0).to(tl.int32)
        for i in tl.static_range(8 // bits):
            code = 2 * ((w << (32 - bits * (i + 1))) >> (32 - bits)) + 1
            if BM == 1:
                x = tl.load(x_ptr + i * group + start + j, mask=inside, other=0.0).to(tl.float32)
                partial += code.to(tl.float32) * x[None, :]
            else:
                at = x_ptr + m[:, None] * K + i * group + start + j[None, :]
                x = tl.load(at, mask=(m < M)[:, None] & inside[None, :], other=0.0)
                if INTERPRET:
                    sums = tl.dot(code.to(tl.float32), x.to(tl.float32).T, sums, input_precision="ieee")
                else:
                    sums = tl.dot(code.to(x.dtype), x.T, sums)
    if BM == 1:
        sums = tl.sum(partial, axis=1)[:, None]
    return sums


def _top_bits(bits: int) -> int:
    """The mask that keeps the top `bits` bits of each byte of a 4-byte word, as a signed 32-bit number."""
    return int.from_bytes(bytes([256 - (1 << (8 - bits))] * 4), "little", signed=True)


def _check_alignment(k: int, op: str) -> None:
    if k % ALIGN:
        raise KernelError(f"{op}: K = {k} is not a multiple of {ALIGN}, as the Triton kernel needs; int-gemm takes any.")


def packed_gemm_triton(x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Launch a kernel, chosen by M, on contiguous operands."""
    check_runs_on(x, "packed-gemm")
    (m, k), n = x.shape, len(packed)
    _check_alignment(k, "packed-gemm")
    if m > SKINNY_ROWS:
        return int_gemm_triton(x, unpack_triton(packed, bits, k), x_scale, w_scale, dtype)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    plane = PLANES[bits][0]
    group = k * plane // 8
    if m == 1:
        rows = 4 if n <= 8192 else 8
        words = min(512, max(32, next_power_of_two(group // 4)))
        gemv_kernel[(ceil_div(n, rows),)](
            x.view(torch.int32),
            packed.view(torch.int32),
            x_scale,
            w_scale,
            out,
            n,
            packed.shape[1] // 4,
            group // 4,
            bits=plane,
            MASK=_top_bits(plane),
            THREE=bits == 3,
            LOW_MASK=_top_bits(1),
            BN=rows,
            BW=words,
            num_warps=max(
                1, words // 128
            ),  # 16 bytes of each row a thread: x, too, is used by the thread that loads it, without barriers
        )
    elif m:
        tile = {"BN": 64, "BM": max(16, next_power_of_two(m))}
        split = _split(ceil_div(n, tile["BN"]), group)
        sums = torch.zeros(m, n, dtype=torch.int32, device=x.device) if split > 1 else out
        skinny_kernel[(ceil_div(n, tile["BN"]), split)](
            x,
            packed,
            x_scale,
            w_scale,
            out,
            sums,
            m,
            n,
            k,
            packed.shape[1],
            group,
            bits=plane,
            THREE=bits == 3,
            SPLIT=split,
            num_warps=4,
            **_stages(min(PLANES[bits]), tile["BM"]),
            **tile,
        )
        if split > 1:
            scale_kernel[(ceil_div(n, tile["BN"]),)](sums, x_scale, w_scale, out, m, n, num_warps=4, **tile)
    return out


def _stages(bits: int, BM: int) -> dict[str, int]:
    """Bytes of a weight's row in a step, and steps in flight, for 3 TB/s · 0.7 µs / 132 = 16 KB of weights a multiprocessor.

    A step of 128 bytes for 64 rows is 8 KB; its x takes BM·8/bits times a row of it. For many rows and few bits shared memory
    holds only shorter steps.
    """
    return {"BG": 128 if BM * 8 // bits <= 128 else 64, "num_stages": 4 if BM <= 16 else 3}


def _split(tiles: int, group: int) -> int:
    """The number of parts that K is cut into, a power of two: until three quarters of an H100's multiprocessors have a program.

    Parts cost two more launches, which zero and scale the sums; filling the last quarter would not pay for them.
    """
    split = 1
    while 4 * tiles * split < 3 * PROCESSORS and group // (2 * split) >= 256:
        split *= 2
    return split


def packed_gemm_16_triton(x: Tensor, packed: Tensor, w_scale: Tensor, bits: int) -> Tensor:
    """Launch the kernel on contiguous operands, in tiles of up to 64 rows of x."""
    check_runs_on(x, "packed-gemm-16")
    (m, k), n = x.shape, len(packed)
    _check_alignment(k, "packed-gemm-16")
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    plane = PLANES[bits][0]
    rows = 64 if m > 1 else 8
    for start in range(0, m, SKINNY_ROWS):
        part = x[start : start + SKINNY_ROWS]
        packed_16_kernel[(ceil_div(n, rows),)](
            part,
            packed,
            w_scale,
            out[start:],
            len(part),
            n,
            k,
            packed.shape[1],
            k * plane // 8,
            bits=plane,
            THREE=bits == 3,
            BN=rows,
            BM=1 if m == 1 else max(16, next_power_of_two(len(part))),
            BG=256 if m == 1 else 64 if bits == 4 else 32,
            num_warps=4,
            num_stages=2,
        )
    return out


# --- custom ops and public functions ----------------------------------------------------------------------------------


@torch.library.custom_op("questctl::packed_gemm", mutates_args=(), device_types="cpu")
def _packed_gemm(x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return packed_gemm_torch(x, packed, x_scale, w_scale, bits, dtype)


@_packed_gemm.register_kernel("cuda")
def _(x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return packed_gemm_triton(x.contiguous(), packed.contiguous(), x_scale.contiguous(), w_scale.contiguous(), bits, dtype)


@_packed_gemm.register_fake
def _(x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=dtype)


@torch.library.custom_op("questctl::packed_gemm_16", mutates_args=(), device_types="cpu")
def _packed_gemm_16(x: Tensor, packed: Tensor, w_scale: Tensor, bits: int) -> Tensor:
    return packed_gemm_16_reference(x, packed, w_scale, bits)


@_packed_gemm_16.register_kernel("cuda")
def _(x: Tensor, packed: Tensor, w_scale: Tensor, bits: int) -> Tensor:
    return packed_gemm_16_triton(x.contiguous(), packed.contiguous(), w_scale.contiguous(), bits)


@_packed_gemm_16.register_fake
def _(x: Tensor, packed: Tensor, w_scale: Tensor, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def check_packed(packed: Tensor, bits: int, width: int, op: str) -> None:
    """Raises KernelError unless `packed` holds rows of `width` codes of `bits` bits."""
    check_packing(width, bits, op)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_width(width, bits):
        shape = tuple(packed.shape)
        raise KernelError(f"{op}: weights {shape} of {packed.dtype} do not hold {bits}-bit rows of {width} codes.")


def packed_gemm(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Codes int8 (…, K), packed weights (N, K·b/8), scales fp32 (…, 1) and (N, 1) → (…, N) of `dtype`. Raises KernelError."""
    rows, scale = x.reshape(-1, x.shape[-1]), x_scale.reshape(-1, 1)
    check_packed(packed, bits, x.shape[-1], "packed-gemm")
    check_product(rows, x.shape[-1], scale, w_scale, len(packed), "packed-gemm")
    return _packed_gemm(rows, packed, scale, w_scale, bits, dtype).view(*x.shape[:-1], len(packed))


def packed_gemm_16(x: Tensor, packed: Tensor, w_scale: Tensor, bits: int) -> Tensor:
    """Real x (…, K), packed weights (N, K·b/8), scale fp32 (N, 1) → (…, N) in x's dtype. Raises KernelError."""
    check_float(x, "packed-gemm-16")
    check_packed(packed, bits, x.shape[-1], "packed-gemm-16")
    if w_scale.dtype != torch.float32 or w_scale.shape != (len(packed), 1):
        shape = tuple(w_scale.shape)
        raise KernelError(f"packed-gemm-16: w_scale {shape} of {w_scale.dtype}; takes ({len(packed)}, 1) of float32.")
    return _packed_gemm_16(x.reshape(-1, x.shape[-1]), packed, w_scale, bits).view(*x.shape[:-1], len(packed))


# --- records ----------------------------------------------------------------------------------------------------------


def _inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int, torch.dtype]:
    m, n, k, bits = (shape[key] for key in ("M", "N", "K", "bits"))
    packed = pack_reference(random_codes(n, k, bits, device, seed), bits)
    x = random_codes(m, k, 4, device, seed + 1)
    return x, packed, random_scales(m, device, seed), random_scales(n, device, seed + 1), bits, bench_dtype(device)


def _inputs_16(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    _, packed, _, w_scale, bits, dtype = _inputs(shape, device, seed)
    x = torch.randn(shape["M"], shape["K"], device=device, generator=seeded(device, seed))
    return x.to(dtype), packed, w_scale, bits


def _check_16(inputs: tuple[Tensor, Tensor, Tensor, int], out: Tensor) -> Check:
    x, packed, w_scale, bits = inputs
    truth = packed_gemm_16_reference(x.double(), packed, w_scale, bits)
    return check_against_naive(out, truth, packed_gemm_16_reference(x, packed, w_scale, bits), x.shape[1])


def _cost_16(shape: Shape, size: int) -> Cost:
    m, n, k = shape["M"], shape["N"], shape["K"]
    return Cost(n * k * shape["bits"] / 8 + size * m * (k + n) + 4 * n, 2.0 * m * n * k, "bf16" if size == 2 else "fp32")


def _peers(shape: Shape) -> list[Implementation]:
    def values(dtype: torch.dtype, x: Tensor, packed: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        return x.to(dtype), unpack_reference(packed, shape["bits"], shape["K"]).to(dtype)

    int4pack = Implementation(
        "torch._weight_int4pack_mm", _int4pack_mm, _int4pack, checked=False, why_not=_int4pack_runs(shape)
    )
    return [*linear_peers(values), int4pack]


def _int4pack_runs(shape: Shape):  # type: ignore[no-untyped-def]
    def why_not(device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a CUDA GPU"
        return None if shape["bits"] == 4 else "packs 4 bits only"

    return why_not


def _int4pack(x: Tensor, packed: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """The 4-bit layout of torch: two unsigned codes in a byte, one scale and zero point for each 128 codes of a row."""
    n, k = len(packed), x.shape[1]
    codes = (unpack_reference(packed, 4, k).int() + 15) // 2
    tiles = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    return x.to(torch.bfloat16), tiles, torch.ones(k // 128, n, 2, dtype=torch.bfloat16, device=x.device)


def _int4pack_mm(x: Tensor, tiles: Tensor, scales: Tensor) -> Tensor:
    return torch._weight_int4pack_mm(x, tiles, 128, scales)


def _bench_shapes(device: str) -> list[Shape]:
    if device == "cpu":
        return [{"M": m, "N": 2048, "K": 2048, "bits": b} for m, b in ((1, 4), (1, 1), (16, 4))]
    layers = [(8192, 8192), (12288, 4096), (57344, 8192)]
    return [{"M": m, "N": n, "K": k, "bits": b} for m in (1, 4, 16, 64) for n, k in layers for b in (4, 2, 1)]


def _bench_shapes_16(device: str) -> list[Shape]:
    return [s for s in _bench_shapes(device) if s["M"] in (1, 16) and s["K"] == s["N"]]


_TEST_SHAPES: list[Shape] = [
    {"M": m, "N": n, "K": k, "bits": b}
    for b in PLANES
    for m, n, k in ((1, 16, 32), (1, 37, 288), (2, 65, 96), (63, 70, 160), (17, 33, 2080), (123, 40, 64))
]

RECORDS = [
    Op(
        name="packed-gemm",
        summary="packed weights × integer activations",
        reference=packed_gemm_reference,
        function=packed_gemm,
        triton=packed_gemm_triton,
        inputs=_inputs,
        check=lambda inputs, out: check_equal(out, packed_gemm_reference(*inputs)),
        cost=lambda s, size: product_cost(s, size, s["bits"] / 8),
        test_shapes=_TEST_SHAPES,
        compile_shapes=[{"M": m, "N": 8192, "K": 2048, "bits": b} for m in (1, 64) for b in (4, 3)],
        bench_shapes=_bench_shapes,
        peers=_peers,
        baseline="linear bf16",
    ),
    Op(
        name="packed-gemm-16",
        summary="packed weights × 16-bit activations",
        reference=packed_gemm_16_reference,
        function=packed_gemm_16,
        triton=packed_gemm_16_triton,
        inputs=_inputs_16,
        check=_check_16,
        cost=_cost_16,
        test_shapes=_TEST_SHAPES,
        compile_shapes=[{"M": m, "N": 8192, "K": 2048, "bits": 3} for m in (1, 64)],
        bench_shapes=_bench_shapes_16,
        peers=_peers,
        baseline="linear bf16",
    ),
]
