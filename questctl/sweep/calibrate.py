"""Measure how fast this machine trains given models, by about a second of real steps of each in a separate process.

The parent loads no torch. The child imports it once and forks, for each model, as many processes as will train at a time, so
that they compete for memory and CPUs as the runs will. Importing, building the model and the first steps are not counted.

Only runs on the CPU are measured, and without the compiler; estimate.py adds the time to compile. On a GPU the first step of a
run compiles its model, which takes too long for an estimate, and a cluster has other machines than this one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from ..config import RunConfig
from ..data.size_estimate import BYTES
from ..system import PASSIVE_WAITING
from .costs import Speed, flops_per_token, memory_bytes
from .slots import host_memory

SECONDS = 1.0  # duration of the counted steps
WARM_UP = 2  # steps before, in which buffers are allocated and kernels chosen
BLOCKS = 4  # most blocks into which the steps are divided, to see how much they vary
LEAST_SPREAD = 1.2  # least spread: a second says little of minutes (0.86 to 1.15 of 20 s on two shared CPUs)
MOST_COPIES = 64  # at once
BUDGET_S = 8.0  # after this time no further model is begun
PATIENCE_S = 20.0  # for torch to be imported and, once more, for the models


@dataclass(frozen=True)
class Calibration:
    """The speeds of the models that could be measured, and the seconds from the start of a process to its first step."""

    speeds: tuple[Speed, ...] = ()
    start_s: float = 0.0


def calibrate(configs: Sequence[RunConfig], threads: Sequence[int], *, at_a_time: int = 1) -> Calibration:
    """Time steps of each config's model with its number of CPU threads (0: torch's choice), `at_a_time` processes at once.

    Models that do not fit into half of the memory, fail, or take no step within `PATIENCE_S` are left out.
    """
    tasks = []
    for config, n in zip(configs, threads, strict=True):
        copies = min(at_a_time, MOST_COPIES, int(host_memory() / 2 / memory_bytes(config)))
        if copies:
            tasks.append({"config": config.model_dump(mode="json"), "threads": n, "copies": copies})
    if not tasks:
        return Calibration()
    command = [sys.executable, "-c", "from questctl.sweep.calibrate import main; main()"]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**PASSIVE_WAITING, **os.environ},
    )
    try:
        lines, _ = child.communicate("\n".join(map(json.dumps, tasks)), timeout=2 * PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        lines, _ = child.communicate()  # results of the models before the one that took too long
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    rows = [json.loads(line) for line in lines.splitlines() if line.endswith("}")]
    speeds = (Speed(row["scheme"], row["flops_per_token"], row["tokens_per_s"], row["spread"]) for row in rows)
    return Calibration(tuple(speeds), min((row["start_s"] for row in rows), default=0.0))


def main() -> None:
    """In the child: read tasks from standard input, one a line, and write a line for each model that could be measured."""
    begin = time.perf_counter()
    import questctl.training.loop  # noqa: F401  imported before the forks

    start_s = time.perf_counter() - begin
    for line in sys.stdin.read().splitlines():
        if time.perf_counter() - begin - start_s > BUDGET_S:
            break
        task = json.loads(line)
        config = RunConfig.model_validate(task["config"])
        copies = _in_copies(config, task["threads"], task["copies"])
        if not copies:
            continue
        tokens_per_s, spread, build_s = (sum(column) / len(copies) for column in zip(*copies, strict=True))
        row = {
            "scheme": config.quant.label,
            "flops_per_token": flops_per_token(config),
            "tokens_per_s": tokens_per_s,
            "spread": spread,
            "start_s": start_s + build_s,
        }
        print(json.dumps(row), flush=True)


def _in_copies(config: RunConfig, threads: int, copies: int) -> list[tuple[float, float, float]]:
    """`time_steps` in so many processes at once; the results of those that succeeded."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    together = context.Barrier(copies)

    def copy() -> None:
        queue.put(time_steps(config, threads, wait=lambda: together.wait(PATIENCE_S)))

    children = [context.Process(target=copy, daemon=True) for _ in range(copies)]
    for child in children:
        child.start()
    deadline = time.monotonic() + PATIENCE_S
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()
    return [queue.get() for _ in children if not queue.empty()]


def time_steps(config: RunConfig, threads: int, *, seconds: float = SECONDS, wait: Any = None) -> tuple[float, float, float]:
    """Tokens per second of the config's steps on random ids, the spread of that speed, and the seconds before the first step.

    `wait` is called after the warm-up.
    """
    import numpy as np
    import torch

    from ..training.loop import Trainer, execution

    begin = time.perf_counter()
    optim = config.optim.model_copy(update={"scale_calibrations": 0})  # steps that set scales from data are few in a run
    stream = config.data.model_copy(update={"packing": "stream"})  # random ids are no documents
    plain = config.model_copy(update={"optim": optim, "data": stream})
    ids = np.random.default_rng(0).integers(
        config.model.vocab_size or BYTES, size=(4 * config.train.batch_size + 2) * config.data.seq_len
    )
    data: Any = SimpleNamespace(
        train=ids, val=ids, meta=SimpleNamespace(vocab_size=config.model.vocab_size or BYTES, train=SimpleNamespace(marks=None))
    )
    with execution(threads or torch.get_num_threads(), torch.device("cpu")):
        trainer = Trainer(plain, data, torch.device("cpu"), stop=lambda: False, compiled=False)
        built = time.perf_counter() - begin
        for _ in range(WARM_UP):
            trainer.step()
        if wait is not None:
            wait()
        ends = [time.perf_counter()]
        while ends[-1] - ends[0] < seconds or len(ends) < 3:
            trainer.step()
            ends.append(time.perf_counter())
    per_step = (ends[-1] - ends[0]) / (len(ends) - 1)
    n = min(BLOCKS, len(ends) - 1)
    marks = [round(i * (len(ends) - 1) / n) for i in range(n + 1)]
    blocks = [(ends[b] - ends[a]) / (b - a) for a, b in pairwise(marks)]
    spread = max(LEAST_SPREAD, max(blocks) / per_step, per_step / min(blocks))
    return config.train.batch_size * config.data.seq_len / per_step, spread, built
