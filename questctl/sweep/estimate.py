"""Estimates of what runs would take: time, disk, memory and operations, from their configs, texts and measured speeds.

Speeds are those of finished runs on this machine. A model unlike all of them is timed here for about a second, if it trains on
the CPU (calibrate.py). Without either, the time is unknown.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import RunConfig, human_bytes, human_count
from ..data.size_estimate import CorpusEstimate, estimate_corpus
from ..errors import DataError, QuestError
from ..store import Run, RunStore, describe
from ..training import compiling
from . import costs
from .calibrate import Calibration, calibrate
from .costs import AS_NEAR, FINISHED_SPREAD, Speed, TeacherCost, TimeRange
from .cpu_memory import cpu_bytes
from .outcomes import SETTLED, read_outcomes
from .slots import useful_threads, visible_gpus
from .sweep_file import Cell

METHOD = re.compile(r"\+(init|teacher)\..*")  # the part of a scheme's name that does not change the time of a step
MOST_MODELS = 6  # most models timed for one estimate; the others are compared with these
UNKNOWN = "no run like it has finished here, and only models that train on the CPU of this machine are timed beforehand"


@dataclass(frozen=True)
class CellCost:
    """What one cell costs; `time` is None where it is unknown."""

    run_id: str
    state: str
    params_non_embedding: int
    tokens: int
    flops: float  # of its own steps, without those of a branch's trunk
    time: TimeRange | None
    memory_bytes: int  # at least, of each process
    nproc: int = 1
    nodes: int = 1

    def to_json(self) -> dict[str, Any]:
        """A flat record: `seconds` is the likely time, between `seconds_low` and `seconds_high`."""
        own = {key: getattr(self, key) for key in ("run_id", "state", "params_non_embedding", "tokens", "flops")}
        return {**own, **time_fields(self.time), "memory_bytes": self.memory_bytes, "nproc": self.nproc, "nodes": self.nodes}


def time_fields(time: TimeRange | None) -> dict[str, float | None]:
    """A range of seconds under its names in JSON; null if it is unknown."""
    names = {"seconds": "likely", "seconds_low": "low", "seconds_high": "high"}
    return {name: getattr(time, end) if time else None for name, end in names.items()}


@dataclass(frozen=True)
class RunEstimate:
    """What a run would take; `time` is None if it is unknown, and `basis` says from what it is estimated."""

    config: RunConfig
    state: str
    params_total: int
    vocab_size: int | None
    flops: float  # of the run's own steps: a branch starts with those of its trunk
    time: TimeRange | None
    compiled: bool
    basis: str
    finished_runs: int
    disk_bytes: int  # at most, while it trains
    memory_bytes: int  # at least, of one device
    teacher: TeacherCost  # its part of operations and memory
    text: CorpusEstimate
    path: Path

    @property
    def seconds(self) -> float | None:
        """The likely time."""
        return self.time.likely if self.time else None

    @property
    def of_teacher(self) -> str:
        """The teacher's share of the cost, in words; empty without one."""
        of_all = self.config.new_tokens * self.teacher.flops_per_token / (self.flops or 1)
        size, memory = human_count(self.teacher.params_total), human_bytes(self.teacher.memory_bytes)
        about = f"{size} parameters, {100 * of_all:.0f} % of the FLOPs, {memory}"
        return f"{self.config.teacher.source}: {about}" if self.config.teacher.source else ""

    def to_json(self) -> dict[str, Any]:
        """One flat record, beginning with the columns that follow from the config alone."""
        return {
            **describe(self.config),
            "state": self.state,
            "steps": self.config.train.steps,
            "params_total": self.params_total,
            "vocab_size": self.vocab_size,
            "flops": self.flops,
            **time_fields(self.time),
            "compiled": self.compiled,
            "basis": self.basis,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "teacher_flops": self.config.new_tokens * self.teacher.flops_per_token,
            "teacher_memory_bytes": self.teacher.memory_bytes,
            "passes": self.text.passes(self.config),
            "passes_exact": self.text.exact,
            "path": str(self.path),
        }


def estimate_run(config: RunConfig, runs: Path | str | None = None, *, processes: int = 1) -> RunEstimate:
    """What training `config` in the folder `runs` with so many processes would take; nothing is trained, prepared or written.

    Raises what training would raise about its input: UsageError, DataError, StorageError.
    """
    store = RunStore(runs)
    run = store.run(config.run_id)
    text = _text(config, run, processes)
    sized = config.with_vocabulary(text.vocab_size)
    finished, measured = known_speeds([sized], store, threads=[config.train.threads], here=processes == 1)
    on_gpu = trains_on_gpu(config)
    compiled = compiling.path_of(sized, run.env(), "cuda" if on_gpu else "cpu")
    alone = costs.training_time(sized, [*finished, *measured.speeds], on_gpu=on_gpu)
    time = alone and alone.scaled(1 / costs.speedup(processes))
    rests_on = basis(time is not None, len(finished), len(measured.speeds))
    if time is not None and compiled and not on_gpu:
        time = compiled_time(sized, time)
        rests_on += f"; compiled, which takes about {compiling.cost_s(sized):.0f} s of it"
    if time is not None and measured.speeds:
        time = TimeRange(time.low, time.likely + measured.start_s, time.high + 2 * measured.start_s)
    return RunEstimate(
        config=config,
        state=run.state(),
        params_total=costs.params_total(sized),
        vocab_size=sized.model.vocab_size or None,
        flops=config.new_tokens * costs.flops_per_token(sized),
        time=time,
        compiled=compiled,
        basis=rests_on,
        finished_runs=len(finished),
        disk_bytes=costs.disk_bytes(sized)[0],
        memory_bytes=(costs.memory_bytes if on_gpu else cpu_bytes)(sized, processes),
        teacher=costs.teacher_cost(sized),
        text=text,
        path=run.path,
    )


def _text(config: RunConfig, run: Run, processes: int) -> CorpusEstimate:
    """The estimated size of the text. For a finished run its input is not checked, because nothing is trained again."""
    from ..training.preflight import check_dry

    if run.result() is None:
        return check_dry(config, run, processes=processes)
    try:
        return estimate_corpus(config.data)
    except QuestError:
        return CorpusEstimate(None, None)


def cell_costs(
    cells: Sequence[Cell],
    store: RunStore,
    *,
    jobs: int = 1,
    cpus: int = 0,
    here: bool = True,
    retry: Sequence[str] = (),
    on_gpus: bool | None = None,
) -> tuple[list[CellCost], str]:
    """The cost of each cell, in their order; and, in words, from what the times are estimated.

    `jobs` cells train at a time, with `cpus` CPUs each, on this machine if `here`; `on_gpus` says whether on GPUs, if that is
    known. Settled cells whose state is not in `retry` are not timed.
    """
    configs, outcomes = costs.sized(cells), read_outcomes(cells, store)
    to_train = [o.state not in SETTLED or o.state in retry for o in outcomes]
    firsts = {id(c.first): config for c, config, trains in zip(cells, configs, to_train, strict=True) if trains}
    wanted, at_a_time = list(firsts.values()), min(jobs, sum(to_train))  # one for all that differ only in their seeds
    threads = [useful_threads(config, cpus) for config in wanted]
    finished, measured = known_speeds(wanted, store, threads=threads, at_a_time=at_a_time, here=here)
    rows, speeds = [], costs.Speeds([*finished, *measured.speeds])
    known: dict[int, CellCost] = {}
    for cell, config, outcome in zip(cells, configs, outcomes, strict=True):
        if id(cell.first) not in known:
            on_gpu = on_gpus
            if on_gpu is None:
                on_gpu = trains_on_gpu(config) if here else any(speed.on_gpu for speed in finished)
            alone = costs.training_time(config, speeds, on_gpu=on_gpu)
            time = alone and alone.scaled(1 / costs.speedup(cell.nproc))
            if time is not None and not on_gpu and compiling.compiles(config, "cpu"):
                time = compiled_time(config, time)
            known[id(cell.first)] = CellCost(
                run_id=outcome.run_id,
                state=outcome.state,
                params_non_embedding=config.model.params_non_embedding,
                tokens=config.tokens,
                flops=config.new_tokens * costs.flops_per_token(config),
                time=time,
                memory_bytes=(costs.memory_bytes if on_gpu else cpu_bytes)(config, cell.nproc),
                nproc=cell.nproc,
                nodes=cell.nodes,
            )
        rows.append(replace(known[id(cell.first)], run_id=outcome.run_id, state=outcome.state))
    complete = all(row.time is not None for row, trains in zip(rows, to_train, strict=True) if trains)
    return rows, basis(complete, len(finished), len(measured.speeds))


def compiled_time(config: RunConfig, time: TimeRange) -> TimeRange:
    """The time of a run on a CPU including compilation, from its time without the compiler."""
    cost, saved = compiling.cost_s(config), compiling.SHARE * (compiling.saving_s(config) > 0)
    shorter = time.scaled(1 - saved)
    return TimeRange(shorter.low + cost, shorter.likely + cost, time.high + 2 * cost)


def basis(complete: bool, finished: int, measured: int) -> str:
    """From what times are estimated, in words."""
    runs = f"{finished} finished run{'s' * (finished != 1)}" if finished else ""
    steps = f"a second of steps of {measured} model{'s' * (measured != 1)}" if measured else ""
    if not (complete and (runs or steps)):
        return f"unknown: {UNKNOWN}"
    return f"estimated from {' and '.join(filter(None, (runs, steps)))}"


def known_speeds(
    configs: Sequence[RunConfig], store: RunStore, *, threads: Sequence[int], at_a_time: int = 1, here: bool = True
) -> tuple[list[Speed], Calibration]:
    """The speeds of finished runs, and newly measured speeds of the models that are unlike all of these.

    Without `here` the runs train on other machines: nothing is measured, and finished runs of any machine count.
    """
    finished = finished_speeds(store, here=here)
    if not here:
        return finished, Calibration()
    models: dict[str, tuple[RunConfig, int]] = {}
    speeds = costs.Speeds(finished)
    for config, n in sorted(zip(configs, threads, strict=True), key=lambda pair: -_work(pair[0])):
        near = any(distance <= AS_NEAR for distance, _ in speeds.near(config, on_gpu=trains_on_gpu(config))[:1])
        if not near and not trains_on_gpu(config):
            models.setdefault(_shape(config), (config, n))
    chosen = list(models.values())[:MOST_MODELS]
    return finished, calibrate([config for config, _ in chosen], [n for _, n in chosen], at_a_time=at_a_time)


def _work(config: RunConfig) -> float:
    return config.new_tokens * costs.flops_per_token(config)


def _shape(config: RunConfig) -> str:
    """The fields of a config that decide how long a step takes, as text."""
    sizes = f"{config.train.batch_size} {config.train.micro_batch} {config.data.seq_len}"
    config = config.model_copy(update={"quant": config.quant.at_once})
    return (
        config.model_dump_json(include={"model": True, "quant": True, "teacher": True, "train": {"precision", "kernels"}})
        + sizes
    )


def trains_on_gpu(config: RunConfig) -> bool:
    """Whether a run of this config would train on a GPU of this machine."""
    return config.train.device.startswith("cuda") or (config.train.device == "auto" and bool(visible_gpus()))


def finished_speeds(store: RunStore, *, here: bool = True) -> list[Speed]:
    """The speeds of one process in the finished runs of this machine (by its host name), or of all.

    Damaged runs are skipped.
    """
    speeds, gpus = [], {gpu.name for gpu in visible_gpus()}
    for run in store.with_facts():
        with suppress(DataError):
            result = run.facts.result if run.facts else run.result()
            if result is None or not result.tokens:
                continue
            if not here or (run.facts.host if run.facts else run.env()["attempts"][-1]["host"]) == platform.node():
                on_gpu = result.device in gpus or "NVIDIA" in result.device
                work, processes = result.flops / result.tokens, run.facts.processes if run.facts else run.processes()
                speed = result.tokens_per_s / costs.speedup(processes)
                speeds.append(Speed(METHOD.sub("", result.scheme), work, speed, FINISHED_SPREAD, on_gpu))
    return speeds
