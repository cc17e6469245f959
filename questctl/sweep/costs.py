"""What a sweep file will take: parameters, tokens, operations, and time as far as it can be known before.

    F = D·(6·W + 12·n_layer·T·d_model),   W = n_layer·(4·d_model² + 3·d_model·d_ff) + V·d_model

One multiply-add is 2 operations and the backward pass costs twice the forward; W are the weights of all matrix products, the
head's among them, the embedding's not; attention over T positions is counted in full, although half of it is masked (after
arXiv 2204.02311, appendix B). This is what `model.count_flops` counts from the modules, without torch. Neither the quantizers'
own work nor validation is in it.

    M ≥ 16·P + B·T·(n_layer·(a·d_model + f·d_ff) + 12·V)        bytes of one device

P are all parameters, 16 bytes each for weight, gradient and two moments; B·T the tokens of one backward pass; a and f the bytes
that a block keeps for it, counted from the tensors that autograd saves (`KEPT`); 12·V the logits, their gradient and their
softmax in fp32. Workspaces, fragmentation and torch itself are not in it: a run that does not fit by this does not fit.

V is that of the data where `model.vocab_size` leaves it to them: `sized` looks it up as far as it is known before the text is
prepared; what nobody knows counts as 256, and is said to be unknown.

Time is taken from finished runs of this machine: the speed of the run nearest in scheme and size, scaled by operations per
token. Without any it is a guess from a short matrix product, and says so.
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
from .outcomes import OutcomeReader
from .sweep_file import Cell

SHARE = 0.4  # training's rate to that of small matrix products: 0.29 to 0.67 from 53K to 640K parameters (AMD EPYC, one thread)
KEPT = {  # (precision, quantized?) → bytes a token that a block keeps for the backward pass, per d_model and per d_ff
    ("fp32", False): (40, 16),
    ("fp32", True): (56, 20),
    ("bf16", False): (34, 8),
    ("bf16", True): (48, 12),
}
OTHER_SCHEME = 1.0  # a run of another scheme is as far away as one of e times the size


@dataclass(frozen=True)
class Cost:
    """One cell before it runs; its training time is an estimate."""

    run_id: str
    state: str
    params_non_embedding: int
    tokens: int
    flops: float  # of its own steps: a branch has its trunk's already
    seconds: float
    memory_bytes: int  # at least


@dataclass(frozen=True)
class Speed:
    """What a run reached."""

    scheme: str
    flops_per_token: float
    tokens_per_s: float


def sized(cells: Sequence[Cell]) -> list[RunConfig]:
    """Their configs with the vocabulary of their text, as far as it is known; whether a text can be used is not asked."""
    known: dict[DataConfig, int | None] = {}
    for c in (cell.config for cell in cells):
        if not c.model.vocab_size and c.data not in known:
            known[c.data] = None
            with suppress(QuestError):
                known[c.data] = vocabulary(c.data)
    return [cell.config.with_vocabulary(known.get(cell.config.data)) for cell in cells]


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
    """Bytes of weights and checkpoints while a run trains, at the most, and when it is done.

    Weights are 4 bytes a parameter; a checkpoint has two moments beside them. There are two whole ones and one being written,
    and those that `train.keep_steps` keeps for branches, which alone stay beside the weights.
    """
    n = params_total(config)
    done = 4 * n * (1 + 3 * config.train.keep_steps.count(",") + 3 * bool(config.train.keep_steps))
    return done + 4 * n * 3 * 3, done


def disk_bytes_together(configs: Iterable[RunConfig], jobs: int) -> int:
    """Bytes of weights and checkpoints of all these runs, of which `jobs` train at a time, at the most."""
    sizes = [disk_bytes(config) for config in configs]
    return sum(done for _, done in sizes) + sum(sorted((most - done for most, done in sizes), reverse=True)[:jobs])


def longest_first(cells: Sequence[Cell]) -> list[Cell]:
    """By operations, the most first: the order that ends soonest when several are trained at a time."""
    work = {c.run_id: config.new_tokens * flops_per_token(config) for c, config in zip(cells, sized(cells), strict=True)}
    return sorted(cells, key=lambda c: -work[c.run_id])


def memory_bytes(config: RunConfig) -> int:
    """Bytes that a run needs on its device at the least, by the formula above."""
    m, t = config.model, config.train
    quantized = not (config.quant.weights.is_identity and config.quant.activations.is_identity)
    of_width, of_hidden = KEPT[t.precision, quantized]
    tokens = (t.micro_batch or t.batch_size) * config.data.seq_len
    activations = tokens * (m.n_layer * (of_width * m.d_model + of_hidden * m.d_ff) + 12 * (m.vocab_size or BYTES))
    return 16 * params_total(config) + activations


def seconds(config: RunConfig, speeds: Iterable[Speed]) -> float:
    """Training time of a run by the nearest of `speeds`, of which there is at least one."""
    work = flops_per_token(config)

    def distance(speed: Speed) -> float:
        return abs(math.log(speed.flops_per_token / work)) + OTHER_SCHEME * (speed.scheme != config.quant.label)

    nearest = min(speeds, key=distance)
    return config.new_tokens * work / nearest.flops_per_token / nearest.tokens_per_s


def wall_seconds(times: Iterable[float], jobs: int) -> float:
    """When the last of `jobs` workers is done, each taking the longest cell that is left."""
    ends = [0.0] * jobs
    for t in sorted(times, reverse=True):
        heapq.heapreplace(ends, ends[0] + t)
    return max(ends)


def speeds(store: RunStore) -> list[Speed]:
    """What the finished runs of this machine (by its host name) reached; damaged ones are passed over."""
    found = []
    for run in store.runs():
        with suppress(DataError):
            if (result := run.result()) is not None and run.env()["attempts"][-1]["host"] == platform.node():
                found.append(Speed(result.scheme, result.flops / result.tokens, result.tokens_per_s))
    return found


def guess() -> Speed:
    """A speed without any run to go by: a share of what products of 64×64 fp32 matrices reach in 0.2 s on one thread."""
    import numpy as np

    a = np.ones((64, 64), dtype=np.float32)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        a @ a
        rounds += 1
    rate = 2 * 64**3 * rounds / (time.perf_counter() - start)
    return Speed("", 1.0, SHARE * rate)


def costs(cells: Sequence[Cell], store: RunStore) -> tuple[list[Cost], str]:
    """The cost of each cell, in their order, and where the times come from."""
    known = speeds(store)
    basis = f"estimated from {len(known)} finished runs" if known else "rough: there is no finished run of this machine"
    known = known or [guess()]
    rows = []
    for cell, c, seen in zip(cells, sized(cells), OutcomeReader(cells, store)(), strict=True):
        work = c.new_tokens * flops_per_token(c)
        n, time = c.model.params_non_embedding, seconds(c, known)
        rows.append(Cost(cell.run_id, seen.state, n, c.tokens, work, time, memory_bytes(c)))
    return rows, basis
