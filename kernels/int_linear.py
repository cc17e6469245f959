"""The low-bit linear layer of inference: quantization of the input and the product, as a user runs it.

    codes, s_x = quantize(x);   out = (codes · weightᵀ) · s_x · s_w

weight is int8 codes (N, K) for many rows of x, or packed bytes (N, K·b/8) for few; it has one scale per output channel. These
are two launches, of which the second is bit-exact.

M rows of activations, N output channels, K contraction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fake_quant import ALPHA, quantize_codes, quantize_codes_reference, quantize_codes_triton
from .gemv import SKINNY_ROWS, packed_gemm, packed_gemm_triton
from .hadamard import bench_dtype, relative_error, seeded
from .int_gemm import (
    Prepacked,
    int_gemm,
    int_gemm_reference,
    int_gemm_triton,
    linear_peers,
    prepack,
    product_cost,
    random_scales,
)
from .op import Check, Cost, Implementation, KernelError, Op, Shape
from .pack import pack_reference, random_codes, unpack_reference


def codes_of(weight: Tensor, bits: int, width: int) -> Tensor:
    """The int8 codes (N, K) of a weight in either form."""
    return weight if weight.dtype == torch.int8 else unpack_reference(weight, bits, width)


def int_linear_reference(x: Tensor, weight: Tensor, w_scale: Tensor, bits: int, alpha: float, block: int) -> Tensor:
    """x (M, K), weight (N, K) int8 or (N, K·b/8) uint8, w_scale (N, 1) → (M, N) in x's dtype."""
    codes, scale = quantize_codes_reference(x, bits, alpha, block)
    return int_gemm_reference(codes, codes_of(weight, bits, x.shape[1]), scale, w_scale, x.dtype)


def int_linear_triton(x: Tensor, weight: Tensor, w_scale: Tensor, bits: int, alpha: float, block: int) -> Tensor:
    """Launch the kernels on contiguous operands."""
    codes, scale = quantize_codes_triton(x, bits, alpha, block)
    if weight.dtype == torch.int8:
        return int_gemm_triton(codes, weight, scale, w_scale, x.dtype)
    return packed_gemm_triton(codes, weight, scale, w_scale, bits, x.dtype)


def int_linear(x: Tensor, weight: Tensor | Prepacked, w_scale: Tensor, bits: int, alpha: float, block: int = 128) -> Tensor:
    """x (…, K), weight (N, K) int8 or packed (N, K·b/8) uint8, w_scale fp32 (N, 1) → (…, N) in x's dtype.

    int8 weights may be prepacked. x is rotated in blocks and quantized to `bits` on the grid of half-width alpha·RMS; the codes
    of the weight have the same bits and basis. Not differentiable. Raises KernelError.
    """
    if weight.dtype not in (torch.int8, torch.uint8):
        raise KernelError(f"int-linear: weight of {weight.dtype}; takes int8 codes or packed uint8.")
    codes, scale = quantize_codes(x, bits, alpha, block)
    if isinstance(weight, Prepacked) or weight.dtype == torch.int8:
        return int_gemm(codes, weight, scale, w_scale, x.dtype)
    return packed_gemm(codes, weight, scale, w_scale, bits, x.dtype)


# --- record -----------------------------------------------------------------------------------------------------------


def _inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Any, ...]:
    m, n, k, bits = (shape[key] for key in ("M", "N", "K", "bits"))
    x = torch.randn(m, k, device=device, generator=seeded(device, seed)).to(bench_dtype(device))
    codes = random_codes(n, k, bits, device, seed + 1)
    weight = pack_reference(codes, bits) if shape["packed"] else codes
    return x, weight, random_scales(n, device, seed) / k, bits, ALPHA[bits], shape["block"]


TIPPED = 1e-3  # relative error if rounding moves one code in 10⁵ over its threshold, by 0.33 of the RMS each


def _check(inputs: tuple[Any, ...], out: Tensor) -> Check:
    """Against fp64; its two halves, quantize and product, have exact checks of their own."""
    x, weight, w_scale, bits, alpha, block = inputs
    codes, scale = quantize_codes_reference(x.double(), bits, alpha, block)
    truth = (codes * scale) @ (codes_of(weight, bits, x.shape[1]) * w_scale).double().T
    naive = int_linear_reference(*inputs)
    return Check(relative_error(out, truth), 2 * max(relative_error(naive, truth), TIPPED))


def _peers(shape: Shape) -> list[Implementation]:
    def values(dtype: torch.dtype, x: Tensor, weight: Tensor, w_scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return x.to(dtype), (codes_of(weight, shape["bits"], x.shape[1]) * w_scale).to(dtype)

    return linear_peers(values)


def _cost(shape: Shape, size: int) -> Cost:
    weight_bytes = shape["bits"] / 8 if shape["packed"] else 1.0
    product = product_cost(shape, size, weight_bytes)
    return Cost(product.bytes + (size - 1) * shape["M"] * shape["K"] - 4 * shape["M"], product.operations, "int8")


def _bench_shapes(device: str) -> list[Shape]:
    if device == "cpu":
        square = {"N": 2048, "K": 2048, "bits": 4, "block": 128}
        return [{"M": m, **square, "packed": p} for m, p in ((64, 0), (64, 1), (256, 0))]
    small = [(7680, 2560), (2560, 2560), (13824, 2560), (2560, 6912)]  # 1.6B: qkv, o, gate·up, down
    large = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]  # 7B
    rows = (16, 64, 256, 4096)
    return [
        {"M": m, "N": n, "K": k, "bits": 4, "block": 128, "packed": int(m <= SKINNY_ROWS)}
        for m in rows
        for n, k in (*small, *large)
    ]


RECORDS = [
    Op(
        name="int-linear",
        summary="quantize x, multiply, scale",
        reference=int_linear_reference,
        function=int_linear,
        triton=int_linear_triton,
        inputs=_inputs,
        check=_check,
        cost=_cost,
        test_shapes=[
            {"M": m, "N": n, "K": k, "bits": b, "block": c, "packed": p}
            for m, n, k, b, c, p in (
                (1, 16, 32, 4, 32, 1),
                (63, 40, 256, 2, 64, 1),
                (123, 24, 128, 1, 128, 0),
                (5, 8, 96, 3, 0, 1),
            )
        ],
        compile_shapes=[],
        bench_shapes=_bench_shapes,
        peers=_peers,
        baseline="linear bf16",
        prepare=lambda x, weight, *rest: (x, prepack(weight) if weight.dtype == torch.int8 else weight, *rest),
    )
]
