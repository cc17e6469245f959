"""Rotary positions for generation: rotate q, rotate k into the cache, and copy v into it, in one launch.

    y = x ⊙ cos + roll(x, W/2) ⊙ sin        (x₁ cos − x₂ sin, x₂ cos + x₁ sin) of the halves x₁, x₂, sin being −sin in the first

Ten separate operations would do the same; for one token each moves a few kilobytes, so that launches take all the time. The
kernel computes in fp32 and rounds once.

B sequences, H heads of q, G heads of k and v, M tokens, W width of a head (even). q, k, v are views of the output of a layer;
keys, values those of a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hadamard import bench_dtype, check_against_naive, check_float, compiled, seeded
from .jit import ceil_div, check_runs_on, eager_on_cpu, jit, next_power_of_two, tl
from .op import Check, Cost, Implementation, KernelError, Op, Shape

# --- reference --------------------------------------------------------------------------------------------------------


def turn_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, M, W), tables (M, W) → x rotated by its positions, in its dtype."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def rotary_reference(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q (B, H, M, W), tables (M, W), the others (B, G, M, W): returns rotated q, and fills keys and values."""
    keys.copy_(turn_reference(k, cos, sin))
    values.copy_(v)
    return turn_reference(q, cos, sin)


# --- Triton kernel ----------------------------------------------------------------------------------------------------


@jit
def turned_store(x_at, to_at, cos_at, sin_at, inside, half):  # type: ignore[no-untyped-def]
    """Rotate the heads at x_at, both halves, and write them to to_at."""
    first = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_at + half, mask=inside, other=0.0).to(tl.float32)
    a = first * tl.load(cos_at, mask=inside, other=0.0) + second * tl.load(sin_at, mask=inside, other=0.0)
    b = second * tl.load(cos_at + half, mask=inside, other=0.0) + first * tl.load(sin_at + half, mask=inside, other=0.0)
    tl.store(to_at, a.to(to_at.dtype.element_ty), mask=inside)
    tl.store(to_at + half, b.to(to_at.dtype.element_ty), mask=inside)


@jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    H,
    G,
    half,
    q_h,
    q_m,
    k_h,
    k_m,
    v_h,
    v_m,
    out_h,
    out_m,
    keys_h,
    keys_m,
    values_h,
    values_m,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """BH heads of one token. `half` is W/2; x_h and x_m are the strides of heads and tokens of x."""
    m = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * BH + tl.arange(0, BH)).to(tl.int64)[:, None]
    c = tl.arange(0, BW)[None, :]
    inside, stored = (h < H) & (c < half), (h < G) & (c < half)
    cos_at, sin_at = (cos_ptr + 2 * m * half + c + 0 * h), (sin_ptr + 2 * m * half + c + 0 * h)
    turned_store(q_ptr + h * q_h + m * q_m + c, out_ptr + h * out_h + m * out_m + c, cos_at, sin_at, inside, half)
    turned_store(k_ptr + h * k_h + m * k_m + c, keys_ptr + h * keys_h + m * keys_m + c, cos_at, sin_at, stored, half)
    v_at, values_at = v_ptr + h * v_h + m * v_m + c, values_ptr + h * values_h + m * values_m + c
    tl.store(values_at, tl.load(v_at, mask=stored, other=0.0), mask=stored)
    tl.store(values_at + half, tl.load(v_at + half, mask=stored, other=0.0), mask=stored)


def rotary_triton(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Launch the kernel for one sequence (B = 1), on contiguous tables and heads."""
    check_runs_on(q, "rotary")
    out = torch.empty_like(q)
    _, heads, tokens, width = q.shape
    tile = {"BH": 4, "BW": next_power_of_two(width // 2)}
    strides = [s for x in (q, k, v, out, keys, values) for s in x.stride()[1:3]]
    if tokens:
        rotary_kernel[(tokens, ceil_div(max(heads, k.shape[1]), tile["BH"]))](
            q, k, v, cos, sin, out, keys, values, heads, k.shape[1], width // 2, *strides, num_warps=4, **tile
        )
    return out


# --- custom op and public function ------------------------------------------------------------------------------------


@torch.library.custom_op("questctl::rotary", mutates_args=("keys", "values"), device_types="cpu")
def _rotary(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return rotary_reference(q, k, v, cos, sin, keys, values)


@_rotary.register_kernel("cuda")
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return rotary_triton(q, k, v, cos.contiguous(), sin.contiguous(), keys, values)


@_rotary.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(q)


def rotary(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q (1, H, M, W), k and v (1, G, M, W) of one dtype, fp32 tables (M, W) → rotated q.

    Rotated k and v are written to keys and values (1, G, M, W) of a cache. There is no gradient. Raises KernelError for
    unsupported shapes, dtypes or layouts.
    """
    check_float(q, "rotary")
    operands = {"q": q, "k": k, "v": v, "keys": keys, "values": values}
    for name, x in operands.items():
        like = q if x is q else k
        alike = x.dtype == q.dtype and x.shape == like.shape and x.shape[2:] == q.shape[2:]
        if not alike or x.dim() != 4 or len(x) != 1 or x.shape[-1] % 2 or x.stride(-1) != 1:
            layout = f"{tuple(x.shape)} of {x.dtype}, strides {x.stride()}"
            raise KernelError(f"rotary: {name} is {layout}; takes (1, heads, M, W) like q and k, W even, heads in one piece.")
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != q.shape[2:] or x.dtype != torch.float32:
            raise KernelError(f"rotary: {name} is {tuple(x.shape)} of {x.dtype}; takes {tuple(q.shape[2:])} of float32.")
    return (rotary_reference if eager_on_cpu(q) else _rotary)(q, k, v, cos, sin, keys, values)


# --- record -----------------------------------------------------------------------------------------------------------


def _inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Any, ...]:
    """q, k, v as views of one product, as in a packed model, and the place of M tokens in a cache that already holds three."""
    m, h, w = (shape[key] for key in ("M", "H", "W"))
    g = shape.get("G", h)
    generator, dtype = seeded(device, seed), bench_dtype(device)
    product = torch.randn(1, m, h + 2 * g, w, device=device, generator=generator).to(dtype).transpose(1, 2)
    angle = torch.randn(m, w, device=device, generator=generator)
    cache = torch.randn(2, 1, g, m + 5, w, device=device, generator=generator).to(dtype)
    return *product.split([h, g, g], dim=1), angle.cos(), angle.sin(), *cache[..., 3 : 3 + m, :]


def _check(inputs: tuple[Any, ...], out: Tensor) -> Check:
    """Compare q and keys with fp64, and values exactly. Clears the cache, which the next implementation must fill again."""
    q, k, v, cos, sin, keys, values = inputs
    truth, naive = (
        torch.cat([turn_reference(x.to(dtype), cos.to(wide), sin.to(wide)) for x in (q, k)], 1)
        for dtype, wide in ((torch.float64, torch.float64), (q.dtype, torch.float32))
    )
    check = check_against_naive(torch.cat([out, keys], 1), truth, naive)
    wrong = int((values != v).sum())
    keys.fill_(torch.nan), values.fill_(torch.nan)
    return Check(check.error, check.tolerance, wrong)


def _cost(shape: Shape, size: int) -> Cost:
    elements = shape["M"] * shape["H"] * shape["W"]
    return Cost(6.0 * size * elements + 8.0 * shape["M"] * shape["W"], 7.0 * elements)


def _bench_shapes(device: str) -> list[Shape]:
    return [{"M": m, "H": 20, "W": 128} for m in ((1, 512) if device == "cuda" else (1,))]


RECORDS = [
    Op(
        name="rotary",
        summary="turn q and k, fill the cache",
        reference=rotary_reference,
        function=rotary,
        triton=rotary_triton,
        inputs=_inputs,
        check=_check,
        cost=_cost,
        test_shapes=[
            *({"M": m, "H": h, "W": w} for m, h, w in ((1, 5, 64), (63, 4, 96), (123, 3, 10), (2, 20, 128))),
            *({"M": m, "H": h, "G": g, "W": w} for m, h, g, w in ((1, 9, 3, 64), (7, 10, 5, 6))),
        ],
        compile_shapes=[{"M": 64, "H": 20, "W": 128}],
        bench_shapes=_bench_shapes,
        peers=lambda s: [Implementation("separate operations", rotary_reference), compiled(rotary_reference)],
        baseline="separate operations",
    )
]
