"""The exact integer product of two matrices of codes, with the scales in the epilogue.

    out[m, n] = (Σ_k x[m, k]·w[n, k]) · s_x[m] · s_w[n]

x and w are int8. The sum is exact in int32 in any order (127²·K < 2³¹ for K ≤ 133,144), and the scales are two fp32 products in
this order. So the CPU, this kernel, and the packed kernels of gemv.py give the same bits. Hopper runs the product as
`wgmma … s8.s8` and has no 4-bit path: for large M, weights of any width are expanded to int8 once.

M rows of activations (tokens), N output channels, K contraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from .hadamard import bench_dtype, check_device, seeded
from .jit import PROCESSORS, ceil_div, check_runs_on, eager_on_cpu, jit, next_power_of_two, tl
from .op import Cost, Implementation, KernelError, Op, Shape
from .pack import check_equal, random_codes

MAX_K = (2**31 - 1) // 127**2


# --- reference --------------------------------------------------------------------------------------------------------


def int_gemm_reference(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, K) int8, (N, K) int8, (M, 1), (N, 1) → (M, N): sums in fp64, where they are exact, then the fp32 scales."""
    return apply_scales((x.double() @ w.double().T).to(torch.int32), x_scale, w_scale, dtype)


def apply_scales(sums: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (M, N), int32 or fp32 (overwritten) → (float(sum)·s_x)·s_w, rounded to `dtype` once."""
    return sums.to(torch.float32).mul_(x_scale).mul_(w_scale.T).to(dtype)


def int_gemm_torch(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product by `torch._int_mm`, which is exact: the implementation on a CPU, and a peer on a GPU."""
    return apply_scales(torch._int_mm(x, w.T), x_scale, w_scale, dtype)


@dataclass(frozen=True)
class Prepacked:
    """Weights (N, K) int8 in the layout of oneDNN, one byte a code, which is the fastest on a CPU. Made by `prepack`."""

    data: Tensor  # in a layout that only oneDNN reads
    shape: torch.Size
    scale: Tensor  # oneDNN's own scale and zero point, here ones and zeros, (N,)
    zero: Tensor
    dtype: ClassVar[torch.dtype] = torch.int8

    def sums(self, x: Tensor) -> Tensor:
        """int8 (M, K) → Σ_k x·w, exact in int32 and then rounded to fp32, (M, N).

        oneDNN multiplies unsigned by signed bytes: it gets x + 128, and subtracts 128·Σ_k w.
        """
        operand = (x.view(torch.uint8) ^ 128, 1.0, 128)  # with its scale and zero point
        no_bias, output = None, (1.0, 0, torch.float32)
        no_post_op: tuple[str, list[float], str] = ("none", [], "")
        args = (*operand, self.data, self.scale, self.zero, no_bias, *output, *no_post_op)
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(*args)
        return sums


def prepack(codes: Tensor) -> Tensor | Prepacked:
    """Weights (N, K) int8 in the layout that `int_gemm` multiplies fastest; call it once for many products.

    On a GPU the kernel reads rows. On a CPU with VNNI, the layout of oneDNN takes a fifth less time than `torch._int_mm` (one
    thread of an AMD EPYC). If the product of oneDNN is not exact, the next best is a transposed layout, in which the output
    channels of one k are neighbours.
    """
    if codes.device.type != "cpu":
        return codes.contiguous()
    return _prepack(codes) if prepacking_is_exact() else codes.T.contiguous().T


def _prepack(codes: Tensor) -> Prepacked:
    n = len(codes)
    data = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    return Prepacked(data, codes.shape, torch.ones(n), torch.zeros(n, dtype=torch.int32))


@lru_cache(maxsize=1)
def prepacking_is_exact() -> bool:
    """Whether oneDNN's product of bytes is exact here, tried once.

    It is an internal function of torch, and processors without VNNI add pairs of products in 16 bits, where the largest codes
    saturate.
    """
    with torch.inference_mode(False), torch.no_grad():
        x = (torch.arange(64 * 2048) % 255 - 127).to(torch.int8).view(64, 2048)
        largest = torch.full((2, 2048), 127, dtype=torch.int8)  # sums beyond 2²⁴ must be exact before they are rounded to fp32
        w = torch.cat([x.flip(0), largest, -largest])
        try:
            return all(torch.equal(_prepack(w).sums(part), torch._int_mm(part, w.T).float()) for part in (x, w[-4:-3]))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False


# --- Triton kernel ----------------------------------------------------------------------------------------------------


@jit
def int_gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One (BM, BN) tile of out. Tiles are visited in groups of GROUP rows of tiles, so that the weights stay in L2."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    m = (first + pid % (GROUP * tiles_n) % height) * BM + tl.arange(0, BM)
    n = (pid % (GROUP * tiles_n) // height) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x_ptr + (m % M).to(tl.int64)[:, None] * K + k[None, :]  # rows beyond the edge wrap around; they are not stored
    w_at = w_ptr + (n % N).to(tl.int64)[:, None] * K + k[None, :]
    sums = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        if EVEN_K:
            x, w = tl.load(x_at + start), tl.load(w_at + start)
        else:
            x = tl.load(x_at + start, mask=k[None, :] < K - start, other=0)
            w = tl.load(w_at + start, mask=k[None, :] < K - start, other=0)
        sums = tl.dot(x, w.T, sums, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    out = sums.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def int_gemm_tile(M: int, N: int) -> dict[str, int]:
    """Tile sizes, warps and stages by shape: full `wgmma` tiles for many rows, narrow ones for few.

    In between, where full tiles would leave a quarter of the multiprocessors idle (256 rows of a layer of 2560: 40 tiles),
    tiles are a quarter of that size: a step then loads 16 KB for a million products and takes 0.15 µs, while a full tile takes
    0.28.
    """
    if M <= 64:
        return {"BM": max(16, next_power_of_two(M)), "BN": 64, "BK": 128, "GROUP": 1, "num_warps": 4, "num_stages": 4}
    if 4 * ceil_div(M, 128) * ceil_div(N, 128) < 3 * PROCESSORS:
        return {"BM": 64, "BN": 64, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    if M * N <= PROCESSORS * 128 * 256:
        return {"BM": 128, "BN": 128, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    return {"BM": 128, "BN": 256, "BK": 128, "GROUP": 8, "num_warps": 8, "num_stages": 3}


def int_gemm_triton(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch the kernel on contiguous operands."""
    check_runs_on(x, "int-gemm")
    (m, k), n = x.shape, len(w)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    tile = int_gemm_tile(m, n)
    if m:
        grid = (ceil_div(m, tile["BM"]) * ceil_div(n, tile["BN"]),)
        int_gemm_kernel[grid](x, w, x_scale, w_scale, out, m, n, k, EVEN_K=k % tile["BK"] == 0, **tile)
    return out


# --- custom op and public function ------------------------------------------------------------------------------------


@torch.library.custom_op("questctl::int_gemm", mutates_args=(), device_types="cpu")
def _int_gemm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return int_gemm_torch(x, w, x_scale, w_scale, dtype)


@_int_gemm.register_kernel("cuda")
def _(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return int_gemm_triton(x.contiguous(), w.contiguous(), x_scale.contiguous(), w_scale.contiguous(), dtype)


@_int_gemm.register_fake
def _(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


def check_product(x: Tensor, width: int, x_scale: Tensor, w_scale: Tensor, n: int, op: str) -> None:
    """Raises KernelError unless x holds int8 codes (M, K) with K = `width` and the scales are fp32 (M, 1) and (n, 1)."""
    check_device(x, op)
    if x.dtype != torch.int8 or x.dim() != 2 or x.shape[1] != width:
        raise KernelError(f"{op}: activations {tuple(x.shape)} of {x.dtype}; takes (M, {width}) of int8.")
    if width > MAX_K:
        raise KernelError(f"{op}: K = {width} could overflow the int32 sum; the largest is {MAX_K}.")
    for name, scale, rows in (("x_scale", x_scale, len(x)), ("w_scale", w_scale, n)):
        if scale.dtype != torch.float32 or scale.shape != (rows, 1):
            raise KernelError(f"{op}: {name} {tuple(scale.shape)} of {scale.dtype}; takes ({rows}, 1) of float32.")


def int_gemm(x: Tensor, w: Tensor | Prepacked, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes int8 (…, K) and (N, K), scales fp32 (…, 1) and (N, 1) → (…, N) of `dtype`. Raises KernelError."""
    rows, scale = x.reshape(-1, x.shape[-1]), x_scale.reshape(-1, 1)
    if w.dtype != torch.int8 or len(w.shape) != 2:
        raise KernelError(f"int-gemm: weights {tuple(w.shape)} of {w.dtype}; takes (N, K) of int8.")
    n, k = w.shape
    check_product(rows, k, scale, w_scale, n, "int-gemm")
    if isinstance(w, Prepacked):
        out = apply_scales(w.sums(rows), scale, w_scale, dtype)
    else:
        out = (int_gemm_torch if eager_on_cpu(x) else _int_gemm)(rows, w, scale, w_scale, dtype)
    return out.view(*x.shape[:-1], n)


# --- records ----------------------------------------------------------------------------------------------------------


def random_scales(rows: int, device: torch.device, seed: int) -> Tensor:
    """Random scales, fp32 (rows, 1), between 0.01 and 1.01."""
    return torch.rand(rows, 1, device=device, generator=seeded(device, seed)) + 0.01


def _inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    m, n, k, bits = (shape[key] for key in ("M", "N", "K", "bits"))
    x, w = random_codes(m, k, bits, device, seed), random_codes(n, k, bits, device, seed + 1)
    return x, w, random_scales(m, device, seed), random_scales(n, device, seed + 1), bench_dtype(device)


def _values(
    dtype: torch.dtype, x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, out: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (x * x_scale).to(dtype), (w * w_scale).to(dtype)


def _fp8(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), x_scale, w_scale.T.contiguous()


def _scaled_mm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    return torch._scaled_mm(x, w.T, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16)


def _on_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA GPU"


def linear_peers(values: Callable[..., tuple[Tensor, Tensor]]) -> list[Implementation]:
    """The usual alternative: `linear` in bf16, and on a CPU in fp32. It rounds, so it is not checked.

    `values(dtype, *inputs)` gives the values of the codes of x and weight in `dtype`.
    """
    return [
        Implementation(f"linear {name}", torch.nn.functional.linear, partial(values, dtype), checked=False, why_not=why_not)
        for name, dtype, why_not in (("bf16", torch.bfloat16, lambda d: None), ("fp32", torch.float32, only_on_a_cpu))
    ]


def only_on_a_cpu(device: torch.device) -> str | None:
    """Why a peer in fp32 is not timed on a GPU."""
    return "compared on a CPU, where it is the usual choice" if device.type == "cuda" else None


def product_cost(shape: Shape, size: int, weight_bytes: float) -> Cost:
    """The cost of an int8 product: codes of x, `weight_bytes` per weight, both scales, an output of `size` bytes an element."""
    m, n, k = shape["M"], shape["N"], shape["K"]
    return Cost(m * k + weight_bytes * n * k + 4 * (m + n) + size * m * n, 2.0 * m * n * k, "int8")


def _bench_shapes(device: str) -> list[Shape]:
    if device == "cpu":
        return [{"M": m, "N": 2048, "K": 2048, "bits": 4} for m in (64, 256)]
    layers = [(7680, 2560), (2560, 2560), (13824, 2560), (2560, 6912), (12288, 4096), (22016, 4096)]
    return [{"M": m, "N": n, "K": k, "bits": 4} for m in (256, 2048, 4096) for n, k in layers]


RECORDS = [
    Op(
        name="int-gemm",
        summary="int8 product with scales",
        reference=int_gemm_reference,
        function=int_gemm,
        triton=int_gemm_triton,
        inputs=_inputs,
        check=lambda inputs, out: check_equal(out, int_gemm_reference(*inputs)),
        cost=lambda s, size: product_cost(s, size, 1.0),
        test_shapes=[
            {"M": m, "N": n, "K": k, "bits": b}
            for m, n, k, b in ((1, 16, 32, 7), (63, 40, 96, 4), (123, 129, 256, 2), (5, 8, 136, 1))
        ],
        compile_shapes=[{"M": m, "N": 4096, "K": 512, "bits": 4} for m in (64, 256, 4096)],
        bench_shapes=_bench_shapes,
        peers=lambda s: [
            *linear_peers(_values),
            Implementation("torch._int_mm", int_gemm_torch, why_not=lambda d: "is what runs here" if d.type == "cpu" else None),
            Implementation("torch._scaled_mm fp8", _scaled_mm, _fp8, checked=False, why_not=_on_cuda),
        ],
        baseline="linear bf16",
        prepare=lambda x, w, *rest: (x, prepack(w), *rest),
    )
]
