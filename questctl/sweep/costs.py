"""What cells cost before they run: parameters, operations, memory and disk by formula, training time by comparison.

    FLOPs = D·(6·W + 12·n_layer·T·q),   W = n_layer·(2·(q + kv)·d_model + 3·d_model·d_ff) + V·d_model

One multiply-add is 2 operations, and the backward pass costs twice the forward pass. W is the number of weights in all matrix
products, with the head but without the embedding. q and kv are the total widths of all heads of queries and of keys, both
d_model in the default model. Attention over T positions is counted in full, although half of it is masked (after arXiv
2204.02311, appendix B). `models.llama.count_flops` counts the same from the modules, with torch. Muon adds
`RunConfig.optimizer_flops` a step, and a teacher adds its forward pass. The work of quantizers and of validation is not
included; those of embedding, head and cache change the time of a step by a few hundredths, and beside tiny blocks in full
precision by a third, which only a measured speed of their scheme says.

    memory ≥ 4·(P + G + S) + B·T·n_layer·(a·d_model + b·q + c·kv + f·d_ff) + L        bytes on one device
    FSDP2 over n processes:  4·(P + G + S)/n + 12·P_block + 8·(P − n_layer·P_block)   in place of 4·(P + G + S)

P is the number of parameters, G of those that train, and S of values in the optimizer's state, 2·G for AdamW. B·T are the
tokens of one backward pass of one process, and a to f the bytes that a block keeps for it, counted from the tensors that
autograd saves (`KEPT`). L is the memory of the loss: 12·B·T·V for the logits, their gradient and their softmax in fp32. It is
less if the rows of logits are taken in parts (models/loss.py): then 8 bytes for each number of a part, and the gradients of the
last product's operands. Quantized embedding and head keep values (`table_bytes`). With train.checkpoint_activations, all blocks
keep their inputs, and only one block at a time keeps the rest. Workspaces, fragmentation and torch itself are not included, so
a run that does not fit by this formula does not fit. A teacher adds its weights and logits (`teacher_cost`). With FSDP2 a
process has, beside its share, the weights and gradients of one block and the weights of the next, P_block parameters each, and
all parameters outside the blocks.

V is `model.vocab_size` or, if that is not set, the vocabulary of the text. `sized` looks the latter up as far as it is known
before the text is prepared; an unknown vocabulary counts as 256 ids.

Times are ranges. They follow from measured speeds, of finished runs or of steps timed for the purpose (calibrate.py). The
speeds nearest in scheme and size are scaled by operations per token, and their range is widened by how much they differ from
the run in question. Validation counts as a third of training, because it has no backward pass.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..config import DataConfig, ModelConfig, RunConfig
from ..data.size_estimate import BYTES, vocabulary
from ..errors import QuestError
from ..pretrained import TEACHER, open_source
from ..quant.estimators import STE
from ..quant.layer_specs import layer_shapes, layer_specs, layer_widths
from ..store import Run
from .sweep_file import Cell

# (precision, quantized?) → bytes a token that a block keeps for the backward pass: per d_model, per width of the heads of q,
# per width of the heads of k (v included), per d_ff
KEPT = {
    ("fp32", False): (30, 8, 8, 16),
    ("fp32", True): (38, 20, 12, 20),
    ("bf16", False): (31, 4, 4, 8),
    ("bf16", True): (33, 12, 6, 12),
}
NORMED = 4  # more bytes per width of both, if heads have a norm
OTHER_SCHEME = 1.0  # a run of another scheme counts as far away as one of e times the size
# Operations a second rise from 0.29 to 0.67 of those of small matrix products between 53K and 640K parameters (AMD EPYC, one
# thread): by a factor of 2.3 for e**2.5 times the size, which is e**0.33 for each e.
DOUBT_PER_DISTANCE = 0.33
FINISHED_SPREAD = 1.15  # of the mean speed of a finished run, since other runs may train beside the next one
PARALLEL = 0.9  # share of its speed that a process keeps beside others of its run
CERTAIN = 1.3  # speeds whose spread is larger than the least by this factor are not used
AS_NEAR = 0.1  # speeds whose distances differ by less are used together; a speed nearer than this needs no calibration


@dataclass(frozen=True)
class TimeRange:
    """Seconds that something is estimated to take: at least `low`, at most `high`, and most probably `likely`."""

    low: float
    likely: float
    high: float

    def scaled(self, factor: float) -> TimeRange:
        """`factor` times this range."""
        return TimeRange(factor * self.low, factor * self.likely, factor * self.high)


@dataclass(frozen=True)
class Speed:
    """The measured speed of a run in one process, and the values that decide how comparable it is.

    `spread` is the factor by which the mean speed of a whole run may be higher or lower than the measured one.
    """

    scheme: str
    flops_per_token: float
    tokens_per_s: float
    spread: float = 1.0
    on_gpu: bool = False


def speedup(processes: int) -> float:
    """How many times faster a run is in so many processes: a little less than their number, because they communicate."""
    return processes * (PARALLEL if processes > 1 else 1.0)


def sized(cells: Sequence[Cell]) -> list[RunConfig]:
    """The configs of the cells with the vocabulary of their text, as far as it is known; texts are not checked."""
    vocabularies: dict[DataConfig, int | None] = {}
    for c in (cell.config for cell in cells):
        if not c.model.vocab_size and c.data not in vocabularies:
            vocabularies[c.data] = None
            with suppress(QuestError):
                vocabularies[c.data] = vocabulary(c.data)
    models: dict[int, ModelConfig] = {}  # shared by cells that differ only in their seeds
    for cell in cells:
        if id(cell.first) not in models:
            models[id(cell.first)] = cell.config.with_vocabulary(vocabularies.get(cell.config.data)).model
    return [cell.config.model_copy(update={"model": models[id(cell.first)]}) for cell in cells]


def params_total(config: RunConfig) -> int:
    """All parameters, those of embedding and head included."""
    m = config.model
    return m.params_non_embedding + m.params_embedding(m.vocab_size or BYTES)


def optimizer_values(config: RunConfig) -> int:
    """Numbers in the optimizer's state; a vocabulary left to the data counts as that of bytes."""
    return config.optimizer_values(config.model.vocab_size or BYTES)


def flops_per_token(config: RunConfig) -> float:
    """Operations of one training token, by the formula above; a vocabulary left to the data counts as that of bytes."""
    forward = config.model.forward_flops(config.data.seq_len, config.model.vocab_size or BYTES)
    of_optimizer = config.optimizer_flops / (config.train.batch_size * config.data.seq_len)
    return 3.0 * forward + of_optimizer + teacher_cost(config).flops_per_token


def disk_bytes(config: RunConfig) -> tuple[int, int]:
    """Most bytes of weights and checkpoints while a run trains, and the bytes that stay when it is done.

    A weight takes 4 bytes; a checkpoint holds the optimizer's state beside it. While a run trains, there are two complete
    checkpoints, a third that is being written, and those that `train.keep_steps` keeps for branches. Of checkpoints, only those
    for branches stay.
    """
    weights = 4 * params_total(config)
    checkpoint = weights + 4 * optimizer_values(config)
    done = weights + checkpoint * (config.train.keep_steps.count(",") + bool(config.train.keep_steps))
    return done + 3 * checkpoint, done


def disk_bytes_together(configs: Iterable[RunConfig], jobs: int) -> int:
    """Most bytes of weights and checkpoints of all these runs, of which `jobs` train at a time."""
    sizes = [disk_bytes(config) for config in configs]
    return sum(done for _, done in sizes) + sum(sorted((most - done for most, done in sizes), reverse=True)[:jobs])


def longest_first(cells: Sequence[Cell]) -> list[Cell]:
    """The cells by operations, most first: if several train at a time, the last one then ends soonest."""
    work = {c.run_id: config.new_tokens * flops_per_token(config) for c, config in zip(cells, sized(cells), strict=True)}
    return sorted(cells, key=lambda c: -work[c.run_id])


def memory_bytes(config: RunConfig, processes: int = 1) -> int:
    """Bytes that each of the processes of a run needs at least on its device, by the formula of this module."""
    without = sum(config.frozen_sizes(config.model.vocab_size or BYTES).values())
    states = 4 * (2 * params_total(config) - without + optimizer_values(config))
    if processes > 1 and config.train.parallel == "fsdp":
        blocks = config.model.params_non_embedding
        block = blocks // config.model.n_layer
        states = -(-states // processes) + 12 * block + 8 * (params_total(config) - blocks)
    return states + activation_bytes(config, processes) + teacher_cost(config, processes).memory_bytes


def activation_bytes(config: RunConfig, processes: int = 1) -> int:
    """Bytes that a forward pass of one process keeps for its backward pass, by the formula of this module."""
    m = config.model
    quantized = not (config.quant.weights.is_identity and config.quant.activations.is_identity)
    widths = (m.d_model, m.n_head * m.width_of_head, m.kv_heads * m.width_of_head, m.d_ff)
    kept = sum(bytes_ * width for bytes_, width in zip(KEPT[config.train.precision, quantized], widths, strict=True))
    kept += NORMED * sum(widths[1:3]) * m.qk_norm
    of_blocks = kept + 4 * m.d_model * m.n_layer if config.train.checkpoint_activations else kept * m.n_layer
    return tokens_at_once(config, processes) * of_blocks + table_bytes(config, processes) + loss_bytes(config, processes)


def table_bytes(config: RunConfig, processes: int = 1) -> int:
    """Bytes that quantized embedding and head keep; a tied head is the embedding.

    The values of a head for the gradient of its input, in fp32 (in bf16 they are cast anyway); and where the estimator is not
    ste, the values that it reads, of an embedding those of the rows that are looked up.
    """
    m, rows = config.model, config.quant.by_row
    vocabulary, count = m.vocab_size or BYTES, 0
    if spec := rows.get("embedding"):
        count += min(vocabulary, tokens_at_once(config, processes)) * (not isinstance(spec.estimator, STE))
    if spec := rows.get("embedding" if m.tied else "head"):
        count += vocabulary * ((config.train.precision == "fp32") + (not isinstance(spec.estimator, STE)))
    return 4 * m.d_model * count


def loss_bytes(config: RunConfig, processes: int = 1) -> int:
    """Bytes of the loss: logits, softmax and gradient in fp32, for a part of the rows if there are many."""
    m, tokens = config.model, tokens_at_once(config, processes)
    vocabulary = m.vocab_size or BYTES
    rows = m.loss_rows(vocabulary)
    if tokens <= rows:
        return 12 * tokens * vocabulary
    return 8 * rows * vocabulary + 4 * m.d_model * (tokens + vocabulary)


@dataclass(frozen=True)
class TeacherCost:
    """What a teacher adds: operations of its forward pass per token, and bytes of its weights and of its logits."""

    params_total: int = 0
    flops_per_token: int = 0
    memory_bytes: int = 0


def teacher_cost(config: RunConfig, processes: int = 1) -> TeacherCost:
    """The cost of a run's teacher in each process; zero without a teacher, or if the teacher is not known here."""
    try:
        source = open_source(config.teacher.source, TEACHER) if config.teacher.source else None
    except QuestError:
        source = None
    if source is None:
        return TeacherCost()
    m, width = ModelConfig(**source.model), 2 if config.teacher_precision == "bf16" else 4
    total = m.params_non_embedding + m.params_embedding(m.vocab_size)
    weights = width * total
    if source.kind == "run":  # its quantized weights stay packed
        quant = Run(source.path).config().remaining_quant
        specs = {name: spec for name, (spec, _) in layer_specs(layer_widths(m), quant).items()}
        specs |= {key: spec for key, spec in quant.by_row.items() if key != "kv"}
        packed = {name: spec.bits / 8 for name, spec in specs.items() if not spec.is_identity}
        sizes = {**layer_shapes(m), **dict.fromkeys(("embedding", "head"), (m.vocab_size, m.d_model))}
        weights += sum(int(math.prod(sizes[name]) * (size - width)) for name, size in packed.items())
    logits = width * m.vocab_size * tokens_at_once(config, processes)
    return TeacherCost(total, m.forward_flops(config.data.seq_len, m.vocab_size), weights + logits)


def rows_at_once(config: RunConfig, processes: int = 1) -> int:
    """Sequences of one backward pass of one process."""
    t = config.train
    return min(t.micro_batch or t.batch_size, t.batch_size // processes)


def tokens_at_once(config: RunConfig, processes: int = 1) -> int:
    """Tokens of one backward pass of one process."""
    return rows_at_once(config, processes) * config.data.seq_len


def tokens_of_work(config: RunConfig) -> float:
    """The tokens of a run's own steps, plus a third of the tokens of its validations."""
    t = config.train
    steps = config.new_tokens // (t.batch_size * config.data.seq_len)
    validations = 1 + (steps // t.eval_every if t.eval_every else 0)
    return config.new_tokens + validations * t.eval_tokens / 3


def distance(config: RunConfig, speed: Speed) -> float:
    """|log of the ratio of operations per token| of a run and a speed, plus `OTHER_SCHEME` if their schemes differ."""
    return _apart(config.quant.label, flops_per_token(config), speed)


def _apart(scheme: str, flops: float, speed: Speed) -> float:
    return abs(math.log(speed.flops_per_token / flops)) + OTHER_SCHEME * (speed.scheme != scheme)


class Speeds:
    """Measured speeds. An estimate depends only on scheme and operations per token, and is computed once for all runs that
    share both, because a sweep has many cells of few models."""

    def __init__(self, speeds: Iterable[Speed]) -> None:
        self._alike: dict[tuple[str, float, bool], list[Speed]] = {}
        for speed in speeds:
            self._alike.setdefault((speed.scheme, speed.flops_per_token, speed.on_gpu), []).append(speed)
        self._near: dict[tuple[str, float, bool], list[tuple[float, Speed]]] = {}
        self._ranges: dict[tuple[str, float, bool], TimeRange | None] = {}

    def near(self, config: RunConfig, *, on_gpu: bool) -> list[tuple[float, Speed]]:
        """The nearest speed of the same kind of device and those AS_NEAR to it, each with its distance."""
        key = (config.quant.label, flops_per_token(config), on_gpu)
        if key not in self._near:
            alike = [(_apart(*key[:2], each[0]), each) for kind, each in self._alike.items() if kind[2] == on_gpu]
            ranked = sorted(alike, key=lambda pair: pair[0])
            self._near[key] = [(d, s) for d, each in ranked if d <= ranked[0][0] + AS_NEAR for s in each]
        return self._near[key]

    def seconds_per_operation(self, config: RunConfig, *, on_gpu: bool) -> TimeRange | None:
        """How long an operation of the run takes; None without any speed."""
        key = (config.quant.label, flops_per_token(config), on_gpu)
        if key not in self._ranges:
            self._ranges[key] = _combined(self.near(config, on_gpu=on_gpu))
        return self._ranges[key]


def _combined(near: Sequence[tuple[float, Speed]]) -> TimeRange | None:
    """Seconds per operation from speeds and their distances."""
    if not near:
        return None
    certain = CERTAIN * min(s.spread for _, s in near)  # a cell that is done outweighs one that has just begun
    rows = [(d, s, 1 / s.flops_per_token / s.tokens_per_s) for d, s in near if s.spread <= certain]
    doubts = [(seconds, s.spread * math.exp(DOUBT_PER_DISTANCE * d)) for d, s, seconds in rows]
    likely = math.exp(sum(math.log(seconds) for *_, seconds in rows) / len(rows))
    low, high = min(seconds / doubt for seconds, doubt in doubts), max(seconds * doubt for seconds, doubt in doubts)
    return TimeRange(min(low, likely), likely, max(high, likely))


def training_time(config: RunConfig, speeds: Iterable[Speed] | Speeds, *, on_gpu: bool = False) -> TimeRange | None:
    """How long a run trains and validates, from the nearest of `speeds` on the same kind of device; None without any."""
    known = speeds if isinstance(speeds, Speeds) else Speeds(speeds)
    each = known.seconds_per_operation(config, on_gpu=on_gpu)
    if each is None:
        return None
    work = tokens_of_work(config) * flops_per_token(config)
    return TimeRange(work * each.low, work * each.likely, work * each.high)


def wall_time(times: Sequence[TimeRange], jobs: int, processes: Sequence[int] = ()) -> TimeRange:
    """Time until the last cell is done: `low` if all runs are fast, `high` if all are slow.

    `jobs` processes train at a time; a cell takes as many of them as `processes` says, or one.
    """
    low, likely, high = (wall_seconds([getattr(t, end) for t in times], jobs, processes) for end in ("low", "likely", "high"))
    return TimeRange(low, likely, high)


def wall_seconds(times: Sequence[float], jobs: int, processes: Sequence[int] = ()) -> float:
    """Time until the last cell is done: the longest remaining one begins when as many places are free as it takes."""
    ends = [0.0] * jobs
    for t, n in sorted(zip(times, processes or [1] * len(times), strict=True), reverse=True):
        taken = [heapq.heappop(ends) for _ in range(min(n, jobs))]
        for _ in taken:
            heapq.heappush(ends, taken[-1] + t)
    return max(ends)
