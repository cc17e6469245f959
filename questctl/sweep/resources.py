"""Apply the rules of [resources] to each cell on given devices: number of processes, train.parallel, train.micro_batch.

    memory(processes n, parallel, rows of a backward pass) ≤ M          memory as in costs.py, M of one device

`auto` means the fewest processes for which this holds, then DDP before FSDP2, and then the most rows. The keys that are set are
execution keys: they are not part of a run's identity, and a run may resume with others. A micro-batch that the sweep file sets
in [train] itself stays. The resources are recorded in the sweep's manifest, so that all its workers agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..config import RunConfig, TrainConfig
from ..errors import UsageError
from ..words import few
from .costs import memory_bytes, sized
from .manifest import Sweep
from .resource_rules import AUTO, ResourceRule, Resources, merged
from .slots import CUDA_CONTEXT_BYTES, FILL, GPU, host_memory
from .sweep_file import Cell

LEFT_OPEN = ("nproc", "parallel", "micro_batch")  # the keys that may be auto


def settle(sweep: Sweep, devices: Sequence[GPU]) -> Sweep:
    """The sweep with the resources of each cell, for machines whose GPUs are `devices` (none: the processor of this machine).

    Cells of a recorded sweep have theirs already. Raises UsageError if processes cannot share a batch, and for `auto` if the
    memory of the devices is not known.
    """
    rules, cells = sweep.file.resources, sweep.cells
    if not rules:
        return sweep
    settled = tuple(_settled(cell, config, rules, devices) for cell, config in zip(cells, sized(cells), strict=True))
    return replace(sweep, file=replace(sweep.file, cells=settled))


def _settled(cell: Cell, config: RunConfig, rules: Sequence[ResourceRule], devices: Sequence[GPU]) -> Cell:
    """The cell with the first choice that fits, else with the last, which needs least. `config` has the vocabulary set."""
    rule, where = merged(rules, config.model.params_non_embedding), f"resources: {cell.run_id}"
    on_cpu = config.train.device == "cpu" or rule.gpus == 0 or not devices
    memory = host_memory() if on_cpu else FILL * min(gpu.memory for gpu in devices) - CUDA_CONTEXT_BYTES
    known = on_cpu or all(gpu.memory for gpu in devices)
    if not known and (auto := [key for key in LEFT_OPEN if getattr(rule, key) == AUTO]):
        raise UsageError(
            f"{where}: {auto[0]} = 'auto' needs the memory of a GPU, which is not known; set the launcher's gpu_memory_gib."
        )
    n, keys = 1, dict[str, Any]()
    again = {} if rule.checkpoint_activations is None else {"checkpoint_activations": rule.checkpoint_activations}
    for n, chosen in _choices(rule, config.train, where):
        keys = chosen | again
        need = memory_bytes(config.model_copy(update={"train": config.train.model_copy(update=keys)}), n)
        if not known or need * (n if on_cpu else 1) <= memory:
            break
    keys |= {"device": "cpu"} if rule.gpus == 0 else {}
    train = cell.config.train.model_copy(update=keys)
    resources = Resources(n, rule.nodes or 1)
    return replace(cell, config=cell.config.model_copy(update={"train": train}), resources=resources)


def _choices(rule: ResourceRule, t: TrainConfig, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The pairs (processes, keys of [train]) that the rule allows, in order of preference."""
    for n in _processes(rule, t, where):
        parallel = [t.parallel] if n == 1 or rule.parallel is None else [rule.parallel]
        for kind in ("ddp", "fsdp") if parallel == [AUTO] else parallel:
            for rows in _rows(rule, t, t.batch_size // n, where):
                yield n, {"parallel": kind, "micro_batch": rows}


def _processes(rule: ResourceRule, t: TrainConfig, where: str) -> list[int]:
    """The numbers of processes that the rule allows. Raises UsageError for one that does not divide batch or nodes."""
    nodes, choices = rule.nodes or 1, divisors(t.batch_size)
    if rule.gpus and rule.nproc not in (None, AUTO, rule.gpus):
        raise UsageError(
            f"{where}: gpus = {rule.gpus}, but nproc = {rule.nproc}; a process has one GPU, so leave one of them out."
        )
    if rule.nproc == AUTO and not rule.gpus and (even := [n for n in choices if n % nodes == 0]):
        return even
    n = rule.nproc if isinstance(rule.nproc, int) else rule.gpus or nodes
    if t.batch_size % n:
        raise UsageError(
            f"{where}: {n} processes cannot share train.batch_size {t.batch_size} equally; "
            f"set nproc to {few(choices, None, last=' or ')}."
        )
    if n % nodes:
        raise UsageError(
            f"{where}: nproc = {n} cannot be divided evenly among {nodes} nodes; set nproc to a multiple of {nodes}."
        )
    return [n]


def _rows(rule: ResourceRule, t: TrainConfig, of_process: int, where: str) -> list[int]:
    """The values of train.micro_batch that the rule allows, for a process that has `of_process` sequences of a batch."""
    if t.micro_batch or rule.micro_batch is None:
        return [t.micro_batch]
    if rule.micro_batch == AUTO:
        return [0, *divisors(of_process)[-2::-1]]  # 0: all at once
    if t.batch_size % rule.micro_batch:
        choices = few(divisors(t.batch_size), None)
        raise UsageError(
            f"{where}: micro_batch = {rule.micro_batch} does not divide train.batch_size {t.batch_size}; set one of {choices}."
        )
    return [rule.micro_batch]


def divisors(n: int) -> list[int]:
    """The divisors of n, rising."""
    return [d for d in range(1, n + 1) if n % d == 0]


def in_words(cells: Sequence[Cell]) -> str:
    """A sentence on how many processes the cells take; empty if each takes one."""

    def kind(cell: Cell) -> tuple[int, int, str]:
        return cell.nproc, cell.nodes, cell.config.train.parallel if cell.nproc > 1 else ""

    counts = sorted(Counter(map(kind, cells)).items())
    if all(n == 1 for (n, *_), _ in counts):
        return ""
    parts = [
        f"{cells} of {n} process{'es' * (n > 1)}{f' ({parallel})' * bool(parallel)}{f' on {nodes} nodes' * (nodes > 1)}"
        for (n, nodes, parallel), cells in counts
    ]
    return f"[resources]: {few(parts, None)}."
