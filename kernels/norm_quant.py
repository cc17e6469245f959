"""Quantization fused with the operation that computes its input: RMSNorm, or SiLU(gate)·up.

    n = x·gain·r, r = 1/√(mean(x²) + eps)        then  codes, scale, mask = quantize(n)
    n = silu(gate) ⊙ up                          then  codes, scale, mask = quantize(n)

    backward, from g = ∂L/∂n:    ∂x = r·(w − x·r²·mean(w ⊙ x)), w = g ⊙ gain        ∂gain = Σ_rows g ⊙ x·r
                                 ∂gate = g ⊙ up ⊙ silu′(gate)                       ∂up = g ⊙ silu(gate)

n is never written to memory: the kernel writes a little more than 1 byte for every 2 (or 4) that it reads, less than the
unquantized op. The factor r of a row cancels in n/scale, so the codes need only x·gain. n stays in fp32 until it is rounded to
codes; a plain implementation rounds it to bf16 first, which is the only difference.

The backward formulas need neither n nor its codes; `mask_rotate` computes their g. They are plain torch, which `torch.compile`
fuses into one pass.

R rows, C columns; codes, scale, mask and the arguments bits, alpha, limit, block are those of fake_quant.py. Without a limit
(for inference) the mask has no columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fake_quant import (
    ALPHA,
    TILING_SHAPES,
    bench_shapes,
    check_quantize,
    check_quantized,
    launch_quantize,
    quantize_codes_reference,
    quantize_reference,
    quantize_shapes,
    trust_limit,
)
from .hadamard import bench_dtype, compiled, rotation_cost, seeded
from .op import Check, Implementation, KernelError, Op, Shape

Quantized = tuple[Tensor, Tensor, Tensor]


# --- reference --------------------------------------------------------------------------------------------------------


def rmsnorm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """(R, C), (C,) → (R, C), fp32 (fp64 for an fp64 x)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * gain.to(x.dtype) * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """(R, C), (R, C) → silu(gate)·up, fp32 (fp64 for an fp64 gate)."""
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return torch.nn.functional.silu(gate) * up.to(gate.dtype)


def rmsnorm_quantize_reference(
    x: Tensor, gain: Tensor, eps: float, bits: int, alpha: float, limit: float | None, block: int
) -> Quantized:
    """RMSNorm followed by `quantize`."""
    return _quantized(rmsnorm_reference(x, gain, eps), bits, alpha, limit, block)


def silu_mul_quantize_reference(
    gate: Tensor, up: Tensor, bits: int, alpha: float, limit: float | None, block: int
) -> Quantized:
    """SiLU·mul followed by `quantize`."""
    return _quantized(silu_mul_reference(gate, up), bits, alpha, limit, block)


def _quantized(n: Tensor, bits: int, alpha: float, limit: float | None, block: int) -> Quantized:
    if limit is not None:
        return quantize_reference(n, bits, alpha, limit, block)
    codes, scale = quantize_codes_reference(n, bits, alpha, block)
    return codes, scale, _empty_mask(n, limit)


def _empty_mask(n: Tensor, limit: float | None) -> Tensor:
    return n.new_empty(n.shape[0], 0 if limit is None else n.shape[1] // 8, dtype=torch.uint8)


# --- backward ---------------------------------------------------------------------------------------------------------


def rmsnorm_backward(grad: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """grad and x (…, C), gain (C,) → gradients of x and gain in their dtypes; in fp32, or fp64 for an fp64 x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g, z = grad.to(wide), x.to(wide)
    r = torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    w, normed = g * gain.to(wide), z * r
    grad_x = r * (w - normed * (w * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (g * normed).flatten(0, -2).sum(0).to(gain.dtype)


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """grad, gate, up (…, C) → gradients of gate and up in their dtype; in fp32, or fp64 for an fp64 gate."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, a = grad.to(wide), gate.to(wide)
    sigmoid = torch.sigmoid(a)
    silu = a * sigmoid
    return (g * up.to(wide) * (sigmoid + silu * (1 - sigmoid))).to(gate.dtype), (g * silu).to(up.dtype)


# --- Triton: the kernel of fake_quant.py with another input -----------------------------------------------------------


def rmsnorm_quantize_triton(
    x: Tensor, gain: Tensor, eps: float, bits: int, alpha: float, limit: float | None, block: int
) -> Quantized:
    """Launch the kernel on contiguous x (R, C) and gain (C,)."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, *launch_quantize("norm", x, gain, codes, bits, alpha, limit, block, eps)


def silu_mul_quantize_triton(gate: Tensor, up: Tensor, bits: int, alpha: float, limit: float | None, block: int) -> Quantized:
    """Launch the kernel on contiguous gate and up (R, C)."""
    codes = torch.empty(gate.shape, dtype=torch.int8, device=gate.device)
    return codes, *launch_quantize("silu", gate, up, codes, bits, alpha, limit, block)


# --- custom ops and public functions ----------------------------------------------------------------------------------


def _empty(x: Tensor, limit: float | None) -> Quantized:
    # `len` gives a number, for which torch.compile would compile anew; the shape may hold a symbol
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32), _empty_mask(x, limit)


@torch.library.custom_op("questctl::rmsnorm_quantize", mutates_args=(), device_types="cpu")
def _rmsnorm_quantize(
    x: Tensor, gain: Tensor, eps: float, bits: int, alpha: float, limit: float | None, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    return rmsnorm_quantize_reference(x, gain, eps, bits, alpha, limit, block)


@_rmsnorm_quantize.register_kernel("cuda")
def _(
    x: Tensor, gain: Tensor, eps: float, bits: int, alpha: float, limit: float | None, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    return rmsnorm_quantize_triton(x.contiguous(), gain.contiguous(), eps, bits, alpha, limit, block)


@_rmsnorm_quantize.register_fake
def _(x: Tensor, gain: Tensor, eps: float, bits: int, alpha: float, limit: float | None, block: int) -> Quantized:
    return _empty(x, limit)


@torch.library.custom_op("questctl::silu_mul_quantize", mutates_args=(), device_types="cpu")
def _silu_mul_quantize(
    gate: Tensor, up: Tensor, bits: int, alpha: float, limit: float | None, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    return silu_mul_quantize_reference(gate, up, bits, alpha, limit, block)


@_silu_mul_quantize.register_kernel("cuda")
def _(gate: Tensor, up: Tensor, bits: int, alpha: float, limit: float | None, block: int) -> tuple[Tensor, Tensor, Tensor]:
    return silu_mul_quantize_triton(gate.contiguous(), up.contiguous(), bits, alpha, limit, block)


@_silu_mul_quantize.register_fake
def _(gate: Tensor, up: Tensor, bits: int, alpha: float, limit: float | None, block: int) -> Quantized:
    return _empty(gate, limit)


def rmsnorm_quantize(
    x: Tensor, gain: Tensor, eps: float, bits: int, alpha: float, limit: float | None, block: int = 128
) -> Quantized:
    """Quantize the RMSNorm of x (…, C) with gain (C,): codes int8 (…, C), scale fp32 (…, 1), packed mask uint8 (…, C/8).

    There is no gradient; `rmsnorm_backward` turns the gradient of n into those of x and gain. Raises KernelError for
    unsupported bits, blocks and dtypes, and for a gain of another shape.
    """
    check_quantize(x, bits, block, "rmsnorm-quantize")
    if gain.shape != x.shape[-1:]:
        raise KernelError(f"rmsnorm-quantize: gain {tuple(gain.shape)}; takes ({x.shape[-1]},).")
    return _shaped(_rmsnorm_quantize(x.reshape(-1, x.shape[-1]), gain, eps, bits, alpha, limit, block), x)


def silu_mul_quantize(gate: Tensor, up: Tensor, bits: int, alpha: float, limit: float | None, block: int = 128) -> Quantized:
    """Quantize silu(gate)·up, both (…, C); results and errors are those of `rmsnorm_quantize`."""
    check_quantize(gate, bits, block, "silu-mul-quantize")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        other, wanted = (f"{tuple(x.shape)} of {x.dtype}" for x in (up, gate))
        raise KernelError(f"silu-mul-quantize: up is {other}; takes what gate is, {wanted}.")
    cols = gate.shape[-1]
    return _shaped(_silu_mul_quantize(gate.reshape(-1, cols), up.reshape(-1, cols), bits, alpha, limit, block), gate)


def _shaped(quantized: Quantized, x: Tensor) -> Quantized:
    codes, scale, mask = (y.view(*x.shape[:-1], y.shape[-1]) for y in quantized)
    return codes, scale, mask


# --- records ----------------------------------------------------------------------------------------------------------

EPS = 1e-5


def _two(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor, tuple[int, float, float, int]]:
    a, b = torch.randn(2, shape["R"], shape["C"], device=device, generator=seeded(device, seed)).to(bench_dtype(device))
    return a, b, (shape["bits"], ALPHA[shape["bits"]], trust_limit(shape["bits"]), shape["block"])


def _norm_inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Any, ...]:
    x, gain, settings = _two(shape, device, seed)
    return x, 1 + 0.1 * gain[0], EPS, *settings


def _silu_inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Any, ...]:
    gate, up, settings = _two(shape, device, seed)
    return gate, up, *settings


def _check_norm(inputs: tuple[Any, ...], out: Quantized) -> Check:
    x, gain, eps, *settings = inputs
    return check_quantized((rmsnorm_reference(x.double(), gain, eps), *settings), out)


def _check_silu(inputs: tuple[Any, ...], out: Quantized) -> Check:
    gate, up, *settings = inputs
    return check_quantized((silu_mul_reference(gate.double(), up), *settings), out)


def _rmsnorm_only(x: Tensor, gain: Tensor, *rest: Any) -> Tensor:
    return torch.nn.functional.rms_norm(x, gain.shape, gain, EPS)


def _silu_mul_only(gate: Tensor, up: Tensor, *rest: Any) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _bench_shapes(device: str) -> list[Shape]:
    return bench_shapes(device)[:1]


_TEST_SHAPES = quantize_shapes(
    *((1, 128, 4, 128), (63, 192, 2, 64), (123, 96, 1, 32), (5, 40, 3, 0), (3, 4224, 4, 128), (2, 512, 4, 256))
)


def _unquantized(function: Any) -> list[Implementation]:
    plain = compiled(function)
    return [
        Implementation("unquantized", function, checked=False),
        Implementation("unquantized, compiled", plain.call, checked=False, why_not=plain.why_not),
    ]


RECORDS = [
    Op(
        name="rmsnorm-quantize",
        summary="RMSNorm fused with quantize",
        reference=rmsnorm_quantize_reference,
        function=rmsnorm_quantize,
        triton=rmsnorm_quantize_triton,
        inputs=_norm_inputs,
        check=_check_norm,
        cost=lambda s, size: rotation_cost(s, size, (size + 1 + 1 / 8) * s["R"] * s["C"] + 4 * s["R"]),
        test_shapes=_TEST_SHAPES,
        compile_shapes=TILING_SHAPES[:3],
        bench_shapes=_bench_shapes,
        peers=lambda s: [*_unquantized(_rmsnorm_only), compiled(rmsnorm_quantize_reference)],
        baseline="unquantized",
    ),
    Op(
        name="silu-mul-quantize",
        summary="SiLU·mul fused with quantize",
        reference=silu_mul_quantize_reference,
        function=silu_mul_quantize,
        triton=silu_mul_quantize_triton,
        inputs=_silu_inputs,
        check=_check_silu,
        cost=lambda s, size: rotation_cost(s, size, (2 * size + 1 + 1 / 8) * s["R"] * s["C"] + 4 * s["R"]),
        test_shapes=_TEST_SHAPES,
        compile_shapes=TILING_SHAPES[:3],
        bench_shapes=_bench_shapes,
        peers=lambda s: [*_unquantized(_silu_mul_only), compiled(silu_mul_quantize_reference)],
        baseline="unquantized",
    ),
]
