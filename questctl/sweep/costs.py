"""What cells cost before they run: parameters, operations, memory and disk by formula, training time by comparison.

    FLOPs = D·(6·W + 12·n_layer·T·d_model),   W = n_layer·(4·d_model² + 3·d_model·d_ff) + V·d_model

One multiply-add is 2 operations, and the backward pass costs twice the forward pass. W are the weights of all matrix products:
those of the head are among them, those of the embedding are not. Attention over T positions is counted in full, although half
of it is masked (after arXiv 2204.02311, appendix B). `models.llama.count_flops` counts the same from the modules, with torch.
The work of the quantizers and of validation is not included.

    memory ≥ 16·P + B·T·(n_layer·(a·d_model + f·d_ff) + 12·V)        bytes on one device

P are all parameters, with 16 bytes each for weight, gradient and two moments; B·T are the tokens of one backward pass; a and f
are the bytes that a block keeps for it, counted from the tensors that autograd saves (`KEPT`); 12·V are the logits, their
gradient and their softmax in fp32. Workspaces, fragmentation and torch itself are not included, so a run that does not fit by
this formula does not fit.

V is the vocabulary of the text where `model.vocab_size` leaves it to the text. `sized` looks it up as far as it is known before
the text is prepared; an unknown vocabulary counts as 256 ids.

The training time is estimated from finished runs of this machine: the speed of the run nearest in scheme and size, scaled by
operations per token. Without such a run it is a rough guess from a short matrix product.
"""

from __future__ import annotations

import heapq
import math
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..config import DataConfig, RunConfig
from ..data.size_estimate import BYTES, vocabulary
from ..errors import DataError, QuestError
from ..store import RunStore
from .outcomes import read_outcomes
from .sweep_file import Cell

# Rate of training over that of small matrix products: 0.29 to 0.67 from 53K to 640K parameters (AMD EPYC, one thread).
TRAINING_SHARE = 0.4
KEPT = {  # (precision, quantized?) → bytes a token that a block keeps for the backward pass, per d_model and per d_ff
    ("fp32", False): (40, 16),
    ("fp32", True): (56, 20),
    ("bf16", False): (34, 8),
    ("bf16", True): (48, 12),
}
OTHER_SCHEME = 1.0  # a run of another scheme is as far away as one of e times the size


@dataclass(frozen=True)
class CellCost:
    """What one cell costs; its training time is an estimate."""

    run_id: str
    state: str
    params_non_embedding: int
    tokens: int
    flops: float  # of its own steps; a branch has those of its trunk already
    seconds: float
    memory_bytes: int  # at least


@dataclass(frozen=True)
class Speed:
    """The speed of a finished run, and what decides how comparable it is."""

    scheme: str
    flops_per_token: float
    tokens_per_s: float


def sized(cells: Sequence[Cell]) -> list[RunConfig]:
    """The configs of the cells with the vocabulary of their text, as far as it is known; texts are not checked."""
    vocabularies: dict[DataConfig, int | None] = {}
    for c in (cell.config for cell in cells):
        if not c.model.vocab_size and c.data not in vocabularies:
            vocabularies[c.data] = None
            with suppress(QuestError):
                vocabularies[c.data] = vocabulary(c.data)
    return [cell.config.with_vocabulary(vocabularies.get(cell.config.data)) for cell in cells]


def params_total(config: RunConfig) -> int:
    """All parameters, those of embedding and head included (these are not tied)."""
    m = config.model
    return m.params_non_embedding + 2 * (m.vocab_size or BYTES) * m.d_model


def flops_per_token(config: RunConfig) -> float:
    """Operations of one training token, by the formula above; a vocabulary left to the data counts as that of bytes."""
    m = config.model
    weights = m.linear_weights + (m.vocab_size or BYTES) * m.d_model
    return 6.0 * weights + 12.0 * m.n_layer * config.data.seq_len * m.d_model


def disk_bytes(config: RunConfig) -> tuple[int, int]:
    """Most bytes of weights and checkpoints while a run trains, and the bytes that stay when it is done.

    A weight takes 4 bytes; a checkpoint holds two moments beside it. While a run trains, there are two whole checkpoints, one
    that is being written, and those that `train.keep_steps` keeps for branches; only these stay beside the weights.
    """
    n = params_total(config)
    done = 4 * n * (1 + 3 * config.train.keep_steps.count(",") + 3 * bool(config.train.keep_steps))
    return done + 4 * n * 3 * 3, done


def disk_bytes_together(configs: Iterable[RunConfig], jobs: int) -> int:
    """Most bytes of weights and checkpoints of all these runs, of which `jobs` train at a time."""
    sizes = [disk_bytes(config) for config in configs]
    return sum(done for _, done in sizes) + sum(sorted((most - done for most, done in sizes), reverse=True)[:jobs])


def longest_first(cells: Sequence[Cell]) -> list[Cell]:
    """The cells in order of operations, most first: when several train at a time, this order ends soonest."""
    work = {c.run_id: config.new_tokens * flops_per_token(config) for c, config in zip(cells, sized(cells), strict=True)}
    return sorted(cells, key=lambda c: -work[c.run_id])


def memory_bytes(config: RunConfig) -> int:
    """Bytes that a run needs at least on its device, by the formula of this module."""
    m, t = config.model, config.train
    quantized = not (config.quant.weights.is_identity and config.quant.activations.is_identity)
    of_width, of_hidden = KEPT[t.precision, quantized]
    tokens = (t.micro_batch or t.batch_size) * config.data.seq_len
    activations = tokens * (m.n_layer * (of_width * m.d_model + of_hidden * m.d_ff) + 12 * (m.vocab_size or BYTES))
    return 16 * params_total(config) + activations


def seconds(config: RunConfig, speeds: Iterable[Speed]) -> float:
    """Training time of a run, from the nearest of `speeds`, which must not be empty."""
    work = flops_per_token(config)

    def distance(speed: Speed) -> float:
        return abs(math.log(speed.flops_per_token / work)) + OTHER_SCHEME * (speed.scheme != config.quant.label)

    nearest = min(speeds, key=distance)
    return config.new_tokens * work / nearest.flops_per_token / nearest.tokens_per_s


def wall_seconds(times: Iterable[float], jobs: int) -> float:
    """Time until the last of `jobs` workers is done, where each takes the longest remaining cell."""
    ends = [0.0] * jobs
    for t in sorted(times, reverse=True):
        heapq.heapreplace(ends, ends[0] + t)
    return max(ends)


def measured_speeds(store: RunStore) -> list[Speed]:
    """The speeds of the finished runs of this machine (by its host name); damaged runs are skipped."""
    speeds = []
    for run in store.runs():
        with suppress(DataError):
            if (result := run.result()) is not None and run.env()["attempts"][-1]["host"] == platform.node():
                speeds.append(Speed(result.scheme, result.flops / result.tokens, result.tokens_per_s))
    return speeds


def guess_speed() -> Speed:
    """A rough speed where no run was measured: a share of that of 64×64 fp32 matrix products in 0.2 s on one thread."""
    import numpy as np

    a = np.ones((64, 64), dtype=np.float32)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        a @ a
        rounds += 1
    rate = 2 * 64**3 * rounds / (time.perf_counter() - start)
    return Speed("", 1.0, TRAINING_SHARE * rate)


def cell_costs(cells: Sequence[Cell], store: RunStore) -> tuple[list[CellCost], str]:
    """The cost of each cell, in their order, and in words what the times are estimated from."""
    speeds = measured_speeds(store)
    basis = f"estimated from {len(speeds)} finished runs" if speeds else "rough: there is no finished run of this machine"
    speeds = speeds or [guess_speed()]
    rows = []
    for cell, config, outcome in zip(cells, sized(cells), read_outcomes(cells, store), strict=True):
        rows.append(
            CellCost(
                run_id=cell.run_id,
                state=outcome.state,
                params_non_embedding=config.model.params_non_embedding,
                tokens=config.tokens,
                flops=config.new_tokens * flops_per_token(config),
                seconds=seconds(config, speeds),
                memory_bytes=memory_bytes(config),
            )
        )
    return rows, basis
