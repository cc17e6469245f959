"""The most bytes of tensors that live at once in a training step of one process on a CPU.

    4·(P + M) + max(loss, last block, first block, weights)        P parameters and M numbers of the optimizer's state

    loss          what all blocks keep, logits, their softmax and their gradient
    last block    what all blocks keep, and the work of the last block's backward pass
    first block   the gradients of all blocks after it, what one block keeps, and the same work
    weights       all gradients, and the backward pass of the quantizers of weights, if there are any

A step passes these places in this order. Between the last and the first block the bytes change evenly, so one of both is the
most. A quantizer of a row keeps u, if its estimator masks, and the rounded value. It rounds all weights at the start of a step
and differentiates them together at its end (`quantized_once`). Its backward pass holds the gradient of the rounded value, the
masked one, the rotated one, and for rotations of 128 or more, which are two products, what lies between these. Autocast keeps a
copy of every weight.

`costs.memory_bytes` is an estimate for any device and any run. This is the count for the CPU with the C code of
kernels/native.py, for the runs that `is_counted` names. A process takes what it loads besides, and more where its allocator
keeps freed memory (benchmarks/results/memory.md).
"""

from __future__ import annotations

import math
import re

from ..config import RunConfig
from ..data.size_estimate import BYTES
from .costs import memory_bytes, optimizer_values, params_total, rows_at_once, tokens_at_once

# (precision, quantized?) → bytes a token that a block keeps: per d_model, per width of the heads of q, of k and v, per d_ff
KEPT = {
    ("fp32", False): (16, 8, 8, 16),
    ("fp32", True): (24, 20, 12, 20),
    ("bf16", False): (18, 4, 4, 8),
    ("bf16", True): (20, 12, 6, 12),
}
# → bytes a token and d_ff of the backward pass at the input of `down`, beyond what the block keeps
WORK = {("fp32", False): 8, ("fp32", True): 8, ("bf16", False): 4, ("bf16", True): 10}
STATISTICS = 8  # bytes a token: the reciprocal norms of both RMSNorms; the attention keeps 4 for each head
FACTORS = 128  # smallest rotation that is computed as two products (quant/rotations.py)
ONE_PASS = re.compile(r"bf16|int[1-8](-h\d+)?-rms-(ste|trust)")  # specs that round a row in one pass
LOADED = 56 * 2**20  # bytes of code and workspaces that the first step loads
LOADED_BY_CHECKPOINTS = 197 * 2**20  # the same with checkpointed activations, for which torch imports more of itself


def cpu_bytes(config: RunConfig, processes: int = 1) -> int:
    """Bytes by which a run on a CPU raises the memory of each process, if its allocator keeps no freed memory.

    Where tensors are not counted exactly, it is the estimate of `memory_bytes`.
    """
    if not is_counted(config, processes):
        return memory_bytes(config, processes)
    return step_bytes(config) + (LOADED_BY_CHECKPOINTS if config.train.checkpoint_activations else LOADED)


def is_counted(config: RunConfig, processes: int = 1) -> bool:
    """Whether `step_bytes` counts the tensors of a run: one process, no teacher, and quantizers that round rows in one pass."""
    q, keeps = config.quant, config.optim
    plain = all(ONE_PASS.fullmatch(str(spec)) for spec in (q.weights, q.activations))
    others = q.by_row or q.overrides or not q.gradients.is_identity or config.teacher.source or config.model.qk_norm
    corrected = keeps.average or keeps.cage or keeps.reset_ratio
    frozen = any(config.frozen_sizes(config.model.vocab_size or BYTES).values())
    return processes == 1 and plain and not (others or corrected or frozen)


def step_bytes(config: RunConfig) -> int:
    """The most bytes of tensors in a training step of `config` on a CPU, in one process."""
    m, t, T = config.model, config.train, tokens_at_once(config)
    weights, activations = config.quant.weights, config.quant.activations
    kind = t.precision, not (weights.is_identity and activations.is_identity)
    d, q, kv, f = m.d_model, m.n_head * m.width_of_head, m.kv_heads * m.width_of_head, m.d_ff
    V, P, n = m.vocab_size or BYTES, params_total(config), m.n_layer
    of_block = sum(rows * columns for rows, columns in m.block_shapes.values())
    W = n * of_block
    masks = [spec.estimator is not None and spec.estimator.bound(spec.grid) != math.inf for spec in (weights, activations)]
    block = sum(size * width for size, width in zip(KEPT[kind], (d, q, kv, f), strict=True)) + STATISTICS + 4 * m.n_head
    if kind[1] and not masks[1]:
        block -= 8 * d + 4 * q + 4 * f
    if kind[1] and activations.is_identity:  # the input of `o` is what the attention returns
        block -= (2 if t.precision == "bf16" else 4) * q
    wide = max(weights.rotation, activations.rotation) >= FACTORS
    work = WORK[kind] * f + 4 * f * (kind[1] and wide) + 4 * d
    kept = 4 * d * n + block - 4 * d if t.checkpoint_activations else block * n
    inputs = 4 * d * n if t.checkpoint_activations else block * n  # what is kept when the loss is computed
    rounded = 0 if weights.is_identity else (8 if masks[0] else 4) * W
    copies = 2 * (W + V * d) if t.precision == "bf16" else 0
    earlier = 4 * P if rows_at_once(config) < t.batch_size else 0  # gradients of the parts of the batch before this one
    of_head = earlier or 4 * V * d
    places = [
        T * inputs + _loss(T, V, d, m.loss_rows(V), t.precision) + rounded + copies + earlier,
        T * (kept + work) + rounded + copies + of_head + 4 * f * d,
        T * (block + work) + rounded + copies // n + (earlier or 4 * (P - of_block)),
        4 * P,
    ]
    if rounded:
        together = sum(r * c for name, (r, c) in m.block_shapes.items() if c == d) * n
        largest = max(together, W - together)
        back = 4 * masks[0] + 4 * (weights.rotation > 0) + 4 * (weights.rotation >= FACTORS)
        places.append(4 * (P - W) + 8 * W + rounded + back * largest)
    return 4 * (P + optimizer_values(config)) + max(places)


def _loss(T: int, V: int, d: int, rows: int, precision: str) -> int:
    """Bytes of the last norm, and of the loss with its gradient, for all T tokens or in parts of `rows`."""
    normed = T * d * (10 if precision == "bf16" else 8)
    if rows >= T:
        return normed + 12 * T * V
    return normed + 4 * d * (T + V) + max(8 * rows * V, 4 * rows * V + 4 * d * V, 4 * d * (T + V))
