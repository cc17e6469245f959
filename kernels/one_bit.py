"""The speed of one-bit tensor cores, measured by a loop of their instruction beside the same loop in int8.

    sum += Σ_k popcount(a & b)   m16n8k256, K = 256 bits        sum += Σ_k a·b   m16n8k32, K = 32 bytes        int32, exact

The rate decides whether a product of one-bit weights and activations is worth a kernel of its own: from WORTH_POPS on it would
take about half the time of the int8 product in use now. The operands stay in registers, so the rate is an upper limit; the cost
of memory is not measured.

The result proves that the loop ran. Each of a program's two words fills its whole operand, so that every element of a product
is 8·dot(a, b), wherever the hardware keeps it. Each of CHAINS independent accumulators ends at its index + rounds·8·dot(a, b).
A loop that the compiler removed, or a wrong instruction, gives a wrong sum.

N programs of 4 warps; K is 256 (bits) or 32 (bytes); each warp runs `rounds` of CHAINS instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .hadamard import seeded
from .jit import INTERPRET, check_runs_on, jit, tl
from .op import Cost, Implementation, Op, Shape
from .pack import check_equal

if TYPE_CHECKING:
    from .rows import BenchRow

WORTH_POPS = 4.0  # 10¹⁵ operations a second: twice the rate of int8 on an H100
CHAINS = 8  # independent accumulators of a warp, 4 registers each: enough to hide the latency of an instruction
THREADS = 128


# --- reference --------------------------------------------------------------------------------------------------------


def sums_reference(a: Tensor, b: Tensor, K: int, rounds: int) -> Tensor:
    """Words int32 (N,), (N,) → the sum of each thread's accumulators, int32 (N, 128)."""
    if K == 256:
        dot = (((a & b)[:, None] >> torch.arange(32, device=a.device)) & 1).sum(1)
    else:
        dot = (a.view(torch.int8).view(-1, 4).long() * b.view(torch.int8).view(-1, 4)).sum(1)
    total = 4 * (CHAINS * 8 * rounds * dot + CHAINS * (CHAINS - 1) // 2)
    return total.to(torch.int32)[:, None].repeat(1, THREADS)


# --- Triton kernel ----------------------------------------------------------------------------------------------------


def loop_of(instruction: str) -> str:
    """PTX: $0 = Σ of all accumulators after $3 rounds of `instruction` on words $1 and $2."""
    chains = [[f"c{chain}_{i}" for i in range(4)] for chain in range(CHAINS)]
    start = [f"mov.b32 {name}, {chain};" for chain, names in enumerate(chains) for name in names]
    tiles = [f"{{{', '.join(names)}}}" for names in chains]
    body = [f"{instruction} {tile}, {{$1, $1, $1, $1}}, {{$2, $2}}, {tile};" for tile in tiles]
    total = [f"add.s32 $0, $0, {name};" for names in chains for name in names]
    registers = ", ".join(name for names in chains for name in names)
    lines = [
        f"{{ .reg .pred more; .reg .b32 left, {registers};",
        *start,
        "mov.b32 left, $3;",
        "again:",
        *body,
        "sub.s32 left, left, 1;",
        "setp.gt.s32 more, left, 0;",
        "@more bra again;",
        "mov.b32 $0, 0;",
        *total,
        "}",
    ]
    return "\n".join(lines)


LOOPS = {
    256: loop_of("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"),
    32: loop_of("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"),
}


@jit
def mma_rate_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, out_ptr, rounds, K: tl.constexpr, LOOP: tl.constexpr, CHAINS: tl.constexpr, THREADS: tl.constexpr
):
    """Each thread has one element, so that each warp runs the loop once."""
    at = tl.arange(0, THREADS)
    a = tl.load(a_ptr + tl.program_id(0) + at * 0)
    b = tl.load(b_ptr + tl.program_id(0) + at * 0)
    if INTERPRET:
        dot = a * 0
        for i in tl.static_range(32 if K == 256 else 4):
            if K == 256:
                dot += ((a & b) >> i) & 1
            else:
                dot += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        total = 4 * (CHAINS * 8 * rounds * dot + CHAINS * (CHAINS - 1) // 2)
    else:
        total = tl.inline_asm_elementwise(LOOP, "=&r,r,r,r", [a, b, a * 0 + rounds], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out_ptr + tl.program_id(0) * THREADS + at, total)


def sums_triton(a: Tensor, b: Tensor, K: int, rounds: int) -> Tensor:
    """Launch on contiguous words."""
    check_runs_on(a, "one-bit-rate")
    out = torch.empty(len(a), THREADS, dtype=torch.int32, device=a.device)
    mma_rate_kernel[(len(a),)](a, b, out, rounds, K=K, LOOP=LOOPS[K], CHAINS=CHAINS, THREADS=THREADS, num_warps=4)
    return out


def sums(a: Tensor, b: Tensor, K: int, rounds: int) -> Tensor:
    """`sums_reference`, computed by the tensor cores on a GPU."""
    return sums_triton(a, b, K, rounds) if a.device.type == "cuda" else sums_reference(a, b, K, rounds)


def rule(rows: Sequence[BenchRow]) -> str:
    """Whether the measured rates make a one-bit kernel worthwhile, in one sentence; '' if the loop was not timed on a GPU."""
    rates = {row.shape["K"]: row.tops / 1000 for row in rows if row.implementation == "triton" and row.tops}
    if 256 not in rates:
        return ""
    beside = f"; int8 by the same loop {rates[32]:.2f}" if 32 in rates else ""
    verdict = "is worth writing" if rates[256] >= WORTH_POPS else "is dropped"
    return f"one-bit tensor cores: {rates[256]:.2f} POPS{beside}; a W1A1 kernel {verdict} (rule: at least {WORTH_POPS:g} POPS)"


# --- record -----------------------------------------------------------------------------------------------------------


def _inputs(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, Tensor, int, int]:
    words = torch.randint(-(2**31), 2**31, (2, shape["N"]), device=device, generator=seeded(device, seed)).to(torch.int32)
    return words[0], words[1], shape["K"], shape["rounds"]


def _cost(shape: Shape, size: int) -> Cost:
    products = shape["N"] * (THREADS // 32) * CHAINS * shape["rounds"]
    return Cost((8 + 4 * THREADS) * shape["N"], 2.0 * 16 * 8 * shape["K"] * products, "b1" if shape["K"] == 256 else "int8")


def _bench_shapes(device: str) -> list[Shape]:
    """16 warps on each multiprocessor of an H100; none on a CPU, which has no such instruction."""
    return [{"N": 528, "K": k, "rounds": 2000} for k in (256, 32)] if device == "cuda" else []


RECORDS = [
    Op(
        name="one-bit-rate",
        summary="rate of one-bit tensor cores, in registers",
        reference=sums_reference,
        function=sums,
        triton=sums_triton,
        inputs=_inputs,
        check=lambda inputs, out: check_equal(out, sums_reference(*inputs)),
        cost=_cost,
        test_shapes=[{"N": n, "K": k, "rounds": r} for n, k, r in ((1, 256, 1), (63, 32, 7), (123, 256, 100), (5, 32, 1000))],
        compile_shapes=[{"N": 1, "K": k, "rounds": 10} for k in (256, 32)],
        bench_shapes=_bench_shapes,
        peers=lambda s: [Implementation("predicted", sums_reference, checked=False)],  # the sums without the products
        baseline="predicted",
    )
]
