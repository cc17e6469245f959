"""Fake quantization in one pass over memory: rotate, scale, round and mask; and its backward pass.

    z = x·H    σ² = mean(x²) = mean(z²)    scale = α·σ / (2^b − 1)    t = z / scale
    code = clamp(2⌊t/2⌋ + 1, ±(2^b − 1))    ẑ = scale·code    mask = |t| ≤ limit    ∂L/∂x = (mask ⊙ ∂L/∂ẑ)·H

`code` is the nearest odd integer, so ẑ is the nearest of 2^b equally spaced levels between −α·σ and α·σ. One pass is enough,
since the rotation does not change the RMS of a row. `limit`, in units of `scale` (half a step is 1), decides which entries
carry gradient:

    trust (arXiv 2502.05003: rounding error ≤ half a step)  limit = 2^b        clip c (|z| ≤ c·α·σ)  limit = c·(2^b − 1)
    straight-through                                         limit = ∞

A row of zeros has scale 0, codes 1 and a full mask. A NaN or infinity in a row makes its scale, and so its values, not finite.
The mask is packed, eight entries to a byte, lowest bit first (`numpy.packbits(bitorder="little")`). The scale is computed from
the row before or after the rotation, whichever is available; the two differ in the last bit.

R rows, C columns, b bits (1 to 7), n block.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from .hadamard import (
    COPY,
    bench_dtype,
    check_against_naive,
    check_block,
    check_float,
    compiled,
    only_on_a_gpu,
    rotate_reference,
    rotate_tile,
    rotate_unscaled,
    rotation_cost,
    seeded,
    signs_for,
)
from .jit import INTERPRET, PROCESSORS, ceil_div, check_runs_on, eager_on_cpu, jit, next_power_of_two, programs, tl
from .op import Check, Implementation, KernelError, Op, Shape

# --- reference --------------------------------------------------------------------------------------------------------


def quantize_reference(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(R, C) → odd codes int8 (R, C), scale (R, 1), mask uint8 (R, C/8); block 0 means no rotation.

    Computed in fp32, or in fp64 for an fp64 x.
    """
    half, scale = _halves(x, bits, alpha, block)
    mask = pack_mask(half.abs() <= limit / 2)
    return _odd(half, bits), scale, mask


def quantize_codes_reference(x: Tensor, bits: int, alpha: float, block: int) -> tuple[Tensor, Tensor]:
    """`quantize_reference` without the mask, for inference."""
    half, scale = _halves(x, bits, alpha, block)
    return _odd(half, bits), scale


def _halves(x: Tensor, bits: int, alpha: float, block: int) -> tuple[Tensor, Tensor]:
    """t/2 (R, C), a new tensor, and scale (R, 1)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * (alpha / ((2**bits - 1) * x.shape[-1] ** 0.5))
    per_half = torch.where(scale > 0, 0.5 / scale, 0)
    return rotate_reference(x, block).mul_(per_half) if block else x * per_half, scale


def _odd(half: Tensor, bits: int) -> Tensor:
    """2⌊t/2⌋ + 1 within ±(2^b − 1), int8; overwrites its argument."""
    top = 2 ** (bits - 1)
    return half.floor_().clamp_(-top, top - 1).to(torch.int8).mul_(2).add_(1)


def fake_quantize_reference(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> Tensor:
    """(R, C) → values ẑ (R, C) in the dtype of x; the `detach` defines the masked gradient."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    z = rotate_reference(wide, block) if block else wide
    codes, scale, mask = quantize_reference(x.detach(), bits, alpha, limit, block)
    masked = z * unpack_mask(mask)
    return (masked + (codes * scale - masked).detach()).to(x.dtype)


def mask_rotate_reference(grad: Tensor, mask: Tensor, block: int) -> Tensor:
    """(R, C), packed mask (R, C/8) → (mask ⊙ grad)·H, (R, C), in grad's dtype."""
    masked = grad * unpack_mask(mask)
    return rotate_reference(masked, block) if block else masked


def pack_mask(mask: Tensor) -> Tensor:
    """bool (…, C) → uint8 (…, C/8), lowest bit first.

    Eight bytes of 0 or 1 are one little-endian 64-bit number; the multiplication moves bit 8i to bit 56 + i, and no other bit
    there.
    """
    return ((mask.contiguous().view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack_mask(packed: Tensor) -> Tensor:
    """uint8 (…, C/8) → bool (…, C)."""
    return _bits_of_bytes(packed.device)[packed.int()].view(torch.bool).flatten(-2)


@lru_cache(maxsize=16)
def _bits_of_bytes(device: torch.device) -> Tensor:
    """The eight bits of each byte as a row of eight bytes, uint8 (256, 8)."""
    with torch.inference_mode(False):
        byte = torch.arange(256, dtype=torch.uint8, device=device)
        return (byte[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1


# --- Triton kernels ---------------------------------------------------------------------------------------------------

ORIGIN = tl.constexpr(1.5 * 2**23) if tl is not None else 1.5 * 2**23  # 0x4B400000; near it fp32 numbers are integers


@jit
def add_floor(z, factor):  # type: ignore[no-untyped-def]
    """ORIGIN + ⌊z·factor⌋, fp32: one multiply-add that rounds down, where fp32 numbers are 1 apart."""
    if INTERPRET:
        return tl.floor(z * factor) + ORIGIN
    else:
        return tl.inline_asm_elementwise(
            "fma.rm.f32 $0, $1, $2, 0f4B400000;",
            "=f,f,f",
            [z, tl.broadcast_to(factor, z.shape)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^−x), fp32, by approximate instructions (a few units in the last place); an exact `/` takes a dozen more."""
    if INTERPRET:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, e; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@jit
def quantize_tile(z, step, limit, top: tl.constexpr, T: tl.constexpr, n: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """z fp32 (T, n), step (T,) its scale → q = ORIGIN + (code − 1)/2 fp32 (T, n), mask in words of W bits int32 (T, n/W)."""
    safe = tl.where(step > 0, step, 1.0)
    q = add_floor(z, tl.where(step > 0, 0.5 / safe, 0.0)[:, None])
    half: tl.constexpr = (top + 1) // 2
    q = tl.minimum(tl.maximum(q, ORIGIN - half), ORIGIN + half - 1)
    kept = tl.abs(z) <= tl.where(step > 0, limit * safe, 0.0)[:, None]
    bits = tl.where(tl.reshape(kept, (T, n // W, W)), (1 << tl.arange(0, W))[None, None, :], 0)
    return q, tl.sum(bits, axis=2)


@jit
def load_input(a_ptr, b_ptr, at, column, inside, INPUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values to quantize, and a itself. They are a ("plain"), a·gain(column) ("norm", without the factor of the row), or
    silu(a)·b ("silu").
    """
    a = tl.load(a_ptr + at, mask=inside, other=0.0)
    x = a
    if INPUT == "norm":
        x = a.to(tl.float32) * tl.load(b_ptr + column, mask=inside, other=0.0).to(tl.float32)
    elif INPUT == "silu":
        gate = a.to(tl.float32)
        x = gate * sigmoid(gate) * tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x, a


@jit
def sum_squares(x):  # type: ignore[no-untyped-def]
    """Σ x² along the last dimension, in fp32."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1)


@jit
def whole_row(a_ptr, b_ptr, n_cols, INPUT: tl.constexpr, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ x² and Σ a² of one row, fp32 (1,) each."""
    squares, a_squares = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for piece in tl.static_range(PIECES):
        c = piece * 4096 + tl.arange(0, 4096)[None, :]
        x, a = load_input(a_ptr, b_ptr, c, c, c < n_cols, INPUT)
        squares += sum_squares(x)
        a_squares += sum_squares(a)
    return squares, a_squares


@jit
def of_rows(own, of_blocks):  # type: ignore[no-untyped-def]
    """Sums over the blocks of each row: (T,) → (ROWS,)."""
    return tl.sum(tl.where(own, of_blocks[:, None], 0.0), axis=0)


@jit
def of_blocks(own, of_rows):  # type: ignore[no-untyped-def]
    """The value of the row of each block: (ROWS,) → (T,)."""
    return tl.sum(tl.where(own, of_rows[None, :], 0.0), axis=1)


@jit
def store_tile(  # type: ignore[no-untyped-def]
    out_ptr,
    mask_ptr,
    at,
    mask_at,
    z,
    step,
    scale,
    limit,
    inside,
    top: tl.constexpr,
    T: tl.constexpr,
    n: tl.constexpr,
    W: tl.constexpr,
    VALUES: tl.constexpr,
    MASK: tl.constexpr,
):
    """Quantize z (T, n) and write codes or values at out_ptr + at, and the mask; step and scale are of each block, (T,)."""
    q, mask = quantize_tile(z, step, limit, top, T, n, W)
    if VALUES:
        values = (2.0 * (q - ORIGIN) + 1.0) * scale[:, None]
        tl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        codes = 2 * q.to(tl.int32, bitcast=True) + 1  # the bits of ORIGIN + q end as those of q
        tl.store(out_ptr + at, codes.to(tl.int8), mask=inside)
    if MASK:
        tl.store(mask_ptr + mask_at, mask.to(mask_ptr.dtype.element_ty), mask=inside)


@jit
def quantize_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    out_ptr,
    scale_ptr,
    mask_ptr,
    n_rows,
    blocks,
    parts,
    alpha_over_top,
    limit,
    eps,
    top: tl.constexpr,
    n: tl.constexpr,
    INPUT: tl.constexpr,
    ROTATE: tl.constexpr,
    VALUES: tl.constexpr,
    MASK: tl.constexpr,
    TERMS: tl.constexpr,
    HALVES: tl.constexpr,
    BR: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Quantize tiles of T neighbouring blocks of n: BR whole rows, or with PIECES a part of one row.

    Whole rows are read once. Their mean square is that of z, which is in registers as fp32, so that x goes to the tensor cores
    unchanged. A part also reads all of its row, in PIECES pieces. Each program makes H once and takes every p-th tile. `own`
    says which of the ROWS (BR, rounded up to a power of two) a block belongs to. z lacks the factor 1/√n of H; its scale is
    `step`. `out` takes codes (int8) or, with VALUES, the values code·scale in its own dtype. If the input is an RMSNorm, its
    factor 1/√(mean a² + eps) cancels in z/step and is needed for the scale only.

    HALVES computes [x, y]·H₂ₙ = [(x + y)·H, (x − y)·H] in fp32. If x is computed, its bf16 terms are operands in registers;
    half of them at a time fit without spilling.
    """
    part = tl.program_id(0) % parts
    n_cols = blocks * n
    block = part * T + tl.arange(0, T)
    k = tl.arange(0, ROWS)
    own = (block // blocks)[:, None] == k[None, :]
    m: tl.constexpr = n // 2 if HALVES else n
    size: tl.constexpr = n if ROTATE else 1
    W: tl.constexpr = mask_ptr.dtype.element_ty.primitive_bitwidth
    at = block[:, None] * n + tl.arange(0, m)[None, :]  # in 32 bits, and the same for every tile
    column = (block % blocks)[:, None] * n + tl.arange(0, m)[None, :]
    mask_at = block[:, None] * (n // W) + tl.arange(0, m // W)[None, :]
    if INPUT == "plain":
        h = signs_for(a_ptr.dtype.element_ty, m)
    else:
        h = signs_for(tl.float32, m)
    for first in range(tl.program_id(0) // parts * BR, n_rows, tl.num_programs(0) // parts * BR):
        inside = (block < tl.minimum(BR, n_rows - first) * blocks)[:, None]
        row_at = tl.cast(first, tl.int64) * n_cols
        b_row = b_ptr
        if INPUT == "silu":
            b_row = b_ptr + row_at
        x, a = load_input(a_ptr + row_at, b_row, at, column, inside, INPUT)
        if HALVES:
            y, b = load_input(a_ptr + row_at, b_row, at + m, column + m, inside, INPUT)
            z = rotate_unscaled(x + y, h, m, TERMS)
            z_high = rotate_unscaled(x - y, h, m, TERMS)
        elif ROTATE:
            z = rotate_unscaled(x, h, n, TERMS)
        else:
            z = x.to(tl.float32)
        if PIECES:
            squares, a_squares = whole_row(a_ptr + row_at, b_row, n_cols, INPUT, PIECES)
            squares *= size
        elif HALVES:
            squares = of_rows(own, sum_squares(z) + sum_squares(z_high))
            a_squares = of_rows(own, sum_squares(a) + sum_squares(b))
        else:
            squares, a_squares = of_rows(own, sum_squares(z)), of_rows(own, sum_squares(a))
        step = tl.sqrt(squares / n_cols) * alpha_over_top
        scale = step * (size**-0.5)
        if INPUT == "norm":
            scale = scale / tl.sqrt(a_squares / n_cols + eps)
        tl.store(scale_ptr + first + k, scale, mask=k < tl.minimum(BR, n_rows - first))  # parts of a row agree
        steps, scales = of_blocks(own, step), of_blocks(own, scale)
        to, bits = out_ptr + row_at, mask_ptr + row_at // W
        store_tile(to, bits, at, mask_at, z, steps, scales, limit, inside, top, T, m, W, VALUES, MASK)
        if HALVES:
            store_tile(to, bits, at + m, mask_at + m // W, z_high, steps, scales, limit, inside, top, T, m, W, VALUES, MASK)


@jit
def mask_rotate_kernel(  # type: ignore[no-untyped-def]
    g_ptr, mask_ptr, out_ptr, n_rows, n: tl.constexpr, ROTATE: tl.constexpr, BR: tl.constexpr
):
    """Gradient (n_rows, n), mask (n_rows, n/8) → (n_rows, n); a row here is one block of a row of x, as in hadamard_kernel."""
    h = signs_for(g_ptr.dtype.element_ty, n)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BR), tl.num_programs(0)):
        r = (tile * BR + tl.arange(0, BR)).to(tl.int64)
        inside = (r < n_rows)[:, None]
        at = r[:, None] * n + tl.arange(0, n)[None, :]
        packed = tl.load(mask_ptr + r[:, None] * (n // 8) + tl.arange(0, n // 8)[None, :], mask=inside, other=0).to(tl.int32)
        bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        g = tl.where(tl.reshape(bits, (BR, n)) != 0, g, 0.0)
        if ROTATE:
            out = rotate_tile(g, h, n)
        else:
            out = g.to(tl.float32)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def quantize_triton(
    x: Tensor, bits: int, alpha: float, limit: float, block: int, parts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on a contiguous x (R, C); `parts` is that of `quantize_tiling`."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, *launch_quantize("plain", x, x, codes, bits, alpha, limit, block, parts=parts)


def quantize_codes_triton(x: Tensor, bits: int, alpha: float, block: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel on a contiguous x (R, C)."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, launch_quantize("plain", x, x, codes, bits, alpha, None, block)[0]


def fake_quantize_triton(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel on a contiguous x (R, C); returns values in its dtype and the packed mask."""
    values = torch.empty_like(x)
    return values, launch_quantize("plain", x, x, values, bits, alpha, limit, block)[1]


def launch_quantize(
    kind: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bits: int,
    alpha: float,
    limit: float | None,
    block: int,
    eps: float = 0.0,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill `out` (codes if int8, else values) from contiguous a (R, C) and b; returns scale and packed mask.

    `kind` says what is quantized: "plain" a, "norm" the RMSNorm of a with gain b, "silu" SiLU(a)·b. Without a limit the mask
    has no columns. `parts` is that of `quantize_tiling`.
    """
    check_runs_on(a, "quantize")
    rows, cols = a.shape
    scale = torch.empty(rows, 1, dtype=torch.float32, device=a.device)
    n = block or _step(cols)
    unit = torch.uint8 if n % 32 else torch.int32  # the mask is written in units of this type
    mask = torch.empty(rows, 0 if limit is None else cols // (8 * unit.itemsize), dtype=unit, device=a.device)
    top = 2**bits - 1
    if rows:
        wide = kind != "plain" or a.dtype == torch.float32
        tile = quantize_tiling(rows, cols, n, wide, parts)
        parts = ceil_div(cols // n, tile["T"]) if tile["PIECES"] else 1
        resident = 2 if tile["T"] * n <= 8192 else 1  # programs whose registers fit on a multiprocessor
        grid = max(1, programs(a, parts * ceil_div(rows, tile["BR"]), resident) // parts) * parts
        quantize_kernel[(grid,)](
            a,
            b,
            out,
            scale,
            mask,
            rows,
            cols // n,
            parts,
            alpha / top,
            limit or 0.0,
            eps,
            top=top,
            n=n,
            INPUT=kind,
            ROTATE=block > 0,
            VALUES=out.dtype != torch.int8,
            MASK=limit is not None,
            TERMS=2 if a.dtype == torch.bfloat16 else 3,
            HALVES=wide and 32 < block < 256,
            ROWS=next_power_of_two(tile["BR"]),
            **tile,
        )
    return scale, mask.view(torch.uint8)


def quantize_tiling(rows: int, cols: int, n: int, wide: bool, parts: int | None = None) -> dict[str, int]:
    """Rows and blocks of a tile, pieces in which a part reads its row, and compile options; `wide`: x is computed, or fp32.

    With many rows the bytes moved decide, so each is read once. Tiles have 8192 entries (at n = 128 the 64 blocks that `wgmma`
    takes), of as many rows as fit while each multiprocessor still has a tile (and at least 1024 columns, which cost no more). A
    multiprocessor has registers for two programs, each with a tile in flight: 30 KB, where 3 TB/s · 0.7 µs / 132 = 16 KB are
    enough. The widest row that fits into registers has 16384 columns, 8192 if x is computed; wider ones are cut into parts.

    With few rows latency decides, so a row is cut into parts of at least 2048 columns while multiprocessors are free. Each part
    reads the whole row for its mean square, all but the first from L2: 5 to 57 KB at about 80 KB/µs.

    `parts` overrides the number of parts.
    """
    blocks = cols // n
    fewest = ceil_div(cols, 8192 if wide else 16384)
    asked = parts or (ceil_div(cols, 2048) if 2 * rows <= PROCESSORS else 1)
    tile = max(16, next_power_of_two(ceil_div(blocks, max(fewest, asked))))
    if tile < blocks and max(fewest, asked) > 1:
        pieces = ceil_div(cols, 4096)
        return {"BR": 1, "T": tile, "PIECES": pieces, "num_warps": 4 if pieces <= 2 else 8, "num_stages": 1}
    whole = max(1, min(8192 // cols, max(ceil_div(rows, PROCESSORS), 1024 // cols)))
    tile = max(8192 // n, next_power_of_two(whole * blocks))
    how = {"num_warps": 4, "num_stages": 2} if wide else {"num_warps": tile * n // 1024, "num_stages": 3}
    return {"BR": whole, "T": tile, "PIECES": 0, **how}


def _step(cols: int) -> int:
    """The block size without a rotation: the largest power of two up to 128 that divides `cols`."""
    return min(cols & -cols, 128)


def mask_rotate_triton(grad: Tensor, mask: Tensor, block: int) -> Tensor:
    """Launch the kernel on a contiguous gradient (R, C) and its packed mask."""
    check_runs_on(grad, "mask-rotate")
    out = torch.empty_like(grad)
    n = block or _step(grad.shape[-1])
    rows = grad.numel() // n
    tile = 64 if n <= 128 else 32
    if rows:
        mask_rotate_kernel[(programs(grad, ceil_div(rows, tile)),)](
            grad, mask, out, rows, n=n, ROTATE=block > 0, BR=tile, num_warps=4
        )
    return out


# --- custom ops and public functions ----------------------------------------------------------------------------------


@torch.library.custom_op("questctl::quantize", mutates_args=(), device_types="cpu")
def _quantize(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, mask = quantize_reference(x, bits, alpha, limit, block)
    return codes, scale, mask


@_quantize.register_kernel("cuda")
def _(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_triton(x.contiguous(), bits, alpha, limit, block)


@_quantize.register_fake
def _(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = x.shape
    return (
        x.new_empty(rows, cols, dtype=torch.int8),
        x.new_empty(rows, 1, dtype=torch.float32),
        x.new_empty(rows, cols // 8, dtype=torch.uint8),
    )


@torch.library.custom_op("questctl::quantize_codes", mutates_args=(), device_types="cpu")
def _quantize_codes(x: Tensor, bits: int, alpha: float, block: int) -> tuple[Tensor, Tensor]:
    return quantize_codes_reference(x, bits, alpha, block)


@_quantize_codes.register_kernel("cuda")
def _(x: Tensor, bits: int, alpha: float, block: int) -> tuple[Tensor, Tensor]:
    return quantize_codes_triton(x.contiguous(), bits, alpha, block)


@_quantize_codes.register_fake
def _(x: Tensor, bits: int, alpha: float, block: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("questctl::fake_quantize", mutates_args=(), device_types="cpu")
def _fake_quantize(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> tuple[Tensor, Tensor]:
    codes, scale, mask = quantize_reference(x, bits, alpha, limit, block)
    return (codes * scale).to(x.dtype), mask


@_fake_quantize.register_kernel("cuda")
def _(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> tuple[Tensor, Tensor]:
    return fake_quantize_triton(x.contiguous(), bits, alpha, limit, block)


@_fake_quantize.register_fake
def _(x: Tensor, bits: int, alpha: float, limit: float, block: int) -> tuple[Tensor, Tensor]:
    mask = x.new_empty(x.shape[0], x.shape[1] // 8, dtype=torch.uint8)
    return torch.empty_like(x, memory_format=torch.contiguous_format), mask


def _save_mask(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.block = inputs[4]


def _fake_quantize_backward(ctx, grad: Tensor, _):  # type: ignore[no-untyped-def]
    (mask,) = ctx.saved_tensors
    return _mask_rotate(grad, mask, ctx.block), None, None, None, None


_fake_quantize.register_autograd(_fake_quantize_backward, setup_context=_save_mask)


@torch.library.custom_op("questctl::mask_rotate", mutates_args=(), device_types="cpu")
def _mask_rotate(grad: Tensor, mask: Tensor, block: int) -> Tensor:
    return mask_rotate_reference(grad, mask, block)


@_mask_rotate.register_kernel("cuda")
def _(grad: Tensor, mask: Tensor, block: int) -> Tensor:
    return mask_rotate_triton(grad.contiguous(), mask, block)


@_mask_rotate.register_fake
def _(grad: Tensor, mask: Tensor, block: int) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def check_quantize(x: Tensor, bits: int, block: int, op: str) -> None:
    """Raises KernelError for bits outside 1 … 7, a width that 8 or the block does not divide, or a dtype other than floats."""
    check_float(x, op)
    if not 1 <= bits <= 7:
        raise KernelError(f"{op}: {bits} bits; odd codes fit int8 for 1 to 7 bits.")
    if x.shape[-1] % 8:
        raise KernelError(f"{op}: width {x.shape[-1]} is not a multiple of 8, as the packed mask needs.")
    if block:
        check_block(x.shape[-1], block, op)


def trust_limit(bits: int) -> float:
    """The `limit` of the trust estimator (arXiv 2502.05003): a rounding error of at most half a step."""
    return float(2**bits)


def quantize(x: Tensor, bits: int, alpha: float, limit: float, block: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate and quantize x: (…, C) → odd codes int8 (…, C), scale fp32 (…, 1), packed mask uint8 (…, C/8).

    `alpha` is the half-width of the grid in units of the row's RMS; block 0 means no rotation. Not differentiable. Raises
    KernelError.
    """
    check_quantize(x, bits, block, "quantize")
    codes, scale, mask = _quantize(x.reshape(-1, x.shape[-1]), bits, alpha, limit, block)
    lead = x.shape[:-1]
    return codes.view(*lead, -1), scale.view(*lead, 1), mask.view(*lead, -1)


def quantize_codes(x: Tensor, bits: int, alpha: float, block: int = 128) -> tuple[Tensor, Tensor]:
    """`quantize` without the mask, which only training needs: (…, C) → codes int8 (…, C), scale fp32 (…, 1)."""
    check_quantize(x, bits, block, "quantize")
    run = quantize_codes_reference if eager_on_cpu(x) else _quantize_codes
    codes, scale = run(x.reshape(-1, x.shape[-1]), bits, alpha, block)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def fake_quantize(x: Tensor, bits: int, alpha: float, limit: float, block: int = 128) -> Tensor:
    """Rotate and quantize x: (…, C) → values ẑ (…, C) in its dtype, differentiable through the mask, which alone is saved.

    Arguments and errors as in `quantize`.
    """
    check_quantize(x, bits, block, "fake-quantize")
    values, _ = _fake_quantize(x.reshape(-1, x.shape[-1]), bits, alpha, limit, block)
    return values.view(x.shape)


def mask_rotate(grad: Tensor, mask: Tensor, block: int = 128) -> Tensor:
    """(mask ⊙ grad)·H: gradient (…, C), packed mask (…, C/8) → (…, C) in grad's dtype. Raises KernelError."""
    check_float(grad, "mask-rotate")
    if block:
        check_block(grad.shape[-1], block, "mask-rotate")
    if mask.dtype != torch.uint8 or mask.numel() * 8 != grad.numel():
        raise KernelError(f"mask-rotate: mask {tuple(mask.shape)} ({mask.dtype}) does not pack a gradient {tuple(grad.shape)}.")
    cols = grad.shape[-1]
    return _mask_rotate(grad.reshape(-1, cols), mask.reshape(-1, cols // 8), block).view(grad.shape)


# --- records ----------------------------------------------------------------------------------------------------------

ALPHA = {1: 0.798, 2: 1.494, 3: 2.051, 4: 2.514}  # about the optimum for normal rows; the ops take any value


def check_codes(codes: Tensor, scale: Tensor, z: Tensor, bits: int, slack: float) -> int:
    """The number of codes that are not odd, or not a nearest level of z (fp64, (R, C)) up to `slack` in units of scale."""
    top = 2**bits - 1
    t = (z / scale.double().clamp_min(1e-300)).clamp(-top - 1, top + 1)
    wrong = ((codes - t).abs() > 1 + slack) | (codes.abs() > top) | (codes % 2 == 0)
    return int((wrong & (scale > 0)).sum())


def _slack(bits: int) -> float:
    """The rounding error of z and scale in units of scale: a few fp32 steps of the largest t."""
    return 2e-5 * 2**bits


def exact_mask(inputs: tuple[Tensor, int, float, float, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, scale and mask in fp64, and where |t| is so far from the limit that rounding cannot change the mask."""
    x, bits, alpha, limit, block = inputs
    exact = x.detach().double()
    _, scale, _ = quantize_reference(exact, bits, alpha, limit, block)
    z = rotate_reference(exact, block) if block else exact
    t = (z / scale.clamp_min(1e-300)).abs()
    return z, scale, t <= limit, (t - limit).abs() > _slack(bits)


def check_masked_gradient(inputs: tuple[Tensor, int, float, float, int], grad: Tensor, out: Tensor) -> Check:
    """Compare out (R, C) with (mask ⊙ grad)·H: in the rotated basis each entry must be masked right, or be at the threshold."""
    *_, block = inputs
    _, _, carries, clear = exact_mask(inputs)
    masked = rotate_reference(out.double(), block) if block else out.double()
    carried = torch.where(clear, carries, (masked - grad).abs() < masked.abs())  # at the threshold either is right
    truth = grad.double() * carried
    naive = rotate_reference(rotate_reference(truth.to(out.dtype), block), block) if block else truth.to(out.dtype)
    return check_against_naive(masked, truth, naive, block or 1)


def check_quantized(inputs: tuple[Tensor, int, float, float, int], output: tuple[Tensor, Tensor, Tensor]) -> Check:
    """Require a scale within rounding of fp64, nearest levels, and right mask bits where |t| is not too near the limit."""
    bits = inputs[1]
    codes, scale, mask = output
    z, true_scale, carries, clear = exact_mask(inputs)
    wrong_bits = clear & (unpack_mask(mask) != carries)
    wrong = check_codes(codes, true_scale, z, bits, _slack(bits)) + int(wrong_bits.sum())
    error = float(((scale.double() - true_scale) / true_scale.clamp_min(1e-300)).abs().max()) if scale.numel() else 0.0
    return Check(error, 1e-5, wrong)


def _inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, int, float, float, int]:
    x = torch.randn(shape["R"], shape["C"], device=device, generator=seeded(device, seed)).to(bench_dtype(device))
    return x, shape["bits"], ALPHA[shape["bits"]], trust_limit(shape["bits"]), shape["block"]


def _gradient_inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor, int]:
    x, bits, alpha, limit, block = _inputs(shape, device, seed)
    return _inputs(shape, device, seed + 1)[0], quantize_reference(x, bits, alpha, limit, block)[2], block


def check_values(inputs: tuple[Tensor, int, float, float, int], values: Tensor) -> Check:
    """Require nearest levels up to the rounding of the dtype; the error is relative to the largest level."""
    x, values, bits = inputs[0], values.detach(), inputs[1]
    z, scale, _, _ = exact_mask(inputs)
    top = 2**bits - 1
    near = (2 * torch.floor(values.double() / scale.clamp_min(1e-300) / 2) + 1).clamp(-top, top).to(torch.int8)
    wrong = check_codes(near, scale, z, bits, _slack(bits))
    step = torch.finfo(x.dtype).eps
    error = float((values.double() - near * scale).abs().max() / scale.max().clamp_min(1e-300)) / 2**bits
    return Check(error, max(step, 1e-5), wrong)


def _check_gradient(inputs: tuple[Tensor, Tensor, int], out: Tensor) -> Check:
    grad, mask, block = inputs
    return check_against_naive(
        out, mask_rotate_reference(grad.double(), mask, block), mask_rotate_reference(grad, mask, block), block
    )


def quantize_shapes(*cases: tuple[int, int, int, int]) -> list[Shape]:
    """The shapes of (R, C, bits, block)."""
    return [dict(zip(("R", "C", "bits", "block"), case, strict=True)) for case in cases]


def bench_shapes(device: str) -> list[Shape]:
    """The shapes at which quantizers of whole matrices are timed: 4 bits first, on a GPU 1 bit too."""
    rows, cols = (16384, 2560) if device == "cuda" else (1024, 2048)
    return quantize_shapes(*((rows, cols, b, 128) for b in ((4, 1) if device == "cuda" else (4,))))


def _quantize_bench_shapes(device: str) -> list[Shape]:
    few = quantize_shapes((1, 2560, 4, 128), (1, 8192, 4, 128), (64, 8192, 4, 128))  # decode, a short prefill
    return bench_shapes(device) + (few if device == "cuda" else [])


def _quantize_peers(shape: Shape) -> list[Implementation]:
    """Both ways to cut rows, of which `quantize_tiling` chooses one; the compiled reference only where compiling it pays."""
    ways = {"whole rows": 1, "parts of rows": ceil_div(shape["C"], 2048)}
    forced = [
        Implementation(f"triton, {name}", partial(quantize_triton, parts=parts), why_not=only_on_a_gpu)
        for name, parts in ways.items()
    ]
    plain = [COPY, Implementation("eager reference", quantize_reference)]
    return [*plain, *([compiled(quantize_reference)] if shape["R"] >= 1024 else []), *forced]


_TEST_SHAPES = quantize_shapes(
    *((1, 128, 4, 128), (63, 192, 2, 64), (123, 320, 1, 32), (5, 512, 3, 256)),
    *((17, 96, 2, 0), (3, 4224, 4, 128), (2, 2120, 2, 0)),
)
_COMPILE_SHAPES = quantize_shapes((64, 1024, 4, 128), (64, 1024, 4, 256))
TILING_SHAPES = quantize_shapes(  # one row in parts, a wide one, many narrow rows, rows of the most blocks
    *((1, 2560, 4, 128), (1, 8192, 4, 128), (16384, 2560, 4, 128), (4096, 8192, 4, 128))
)

RECORDS = [
    Op(
        name="quantize",
        summary="rotate, scale, round to odd codes, trust mask",
        reference=quantize_reference,
        function=quantize,
        triton=quantize_triton,
        inputs=_inputs,
        check=check_quantized,
        cost=lambda s, size: rotation_cost(s, size, (size + 1 + 1 / 8) * s["R"] * s["C"] + 4 * s["R"]),
        test_shapes=_TEST_SHAPES,
        compile_shapes=[*TILING_SHAPES, {"R": 4096, "C": 11008, "bits": 4, "block": 128}],
        bench_shapes=_quantize_bench_shapes,
        peers=_quantize_peers,
        baseline="copy",
    ),
    Op(
        name="fake-quantize",
        summary="the same to values, for training",
        reference=fake_quantize_reference,
        function=fake_quantize,
        triton=lambda *inputs: fake_quantize_triton(*inputs)[0],
        inputs=_inputs,
        check=check_values,
        cost=lambda s, size: rotation_cost(s, size, (2 * size + 1 / 8) * s["R"] * s["C"]),
        test_shapes=_TEST_SHAPES,
        compile_shapes=[{**s, "R": 16384} for s in _COMPILE_SHAPES],
        bench_shapes=bench_shapes,
        peers=lambda s: [COPY, Implementation("eager reference", fake_quantize_reference)],
        baseline="copy",
    ),
    Op(
        name="mask-rotate",
        summary="backward: mask and rotate the gradient",
        reference=mask_rotate_reference,
        function=mask_rotate,
        triton=mask_rotate_triton,
        inputs=_gradient_inputs,
        check=_check_gradient,
        cost=lambda s, size: rotation_cost(s, size, (2 * size + 1 / 8) * s["R"] * s["C"]),
        test_shapes=_TEST_SHAPES,
        compile_shapes=_COMPILE_SHAPES,
        bench_shapes=bench_shapes,
        peers=lambda s: [COPY, Implementation("eager reference", mask_rotate_reference), compiled(mask_rotate_reference)],
        baseline="copy",
    ),
]
