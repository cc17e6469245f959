"""Trainers for tests of the sweep protocol: no torch, but the same claims, states and checkpoints as the real one.

Each takes one step every `PACE` seconds and appends a line to the file $SWEEP_TRACE: `run_id attempt step pid ppid threads`.
The step in the status is the checkpoint: it is written every `CHECKPOINT` steps and when a signal asks to stop.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from questctl.config import RunConfig
from questctl.errors import Diverged, OutOfMemory, Preempted
from questctl.store import Result, RunStore, describe
from questctl.store import lease as lease_module
from questctl.store.lease import Lease

PACE = 0.01
CHECKPOINT = 5
ENDINGS = {
    31: lambda: 1 / 0,
    32: lambda: os.kill(os.getpid(), signal.SIGSEGV),
    33: lambda: os._exit(7),
    34: lambda: sys.exit("no"),
    35: lambda: os.kill(os.getpid(), signal.SIGKILL),
}  # seed → how the run ends at half its steps


if "SWEEP_STALE" in os.environ:  # workers import this before they claim anything
    Lease.__init__.__kwdefaults__["stale_after"] = float(os.environ["SWEEP_STALE"])
    lease_module.is_live.__defaults__ = (float(os.environ["SWEEP_STALE"]),)


def logged(config: RunConfig, *, runs: Path, lease: Lease) -> Result:
    """`train` that also writes a metrics line a step."""
    return train(config, runs=runs, lease=lease, loss=lambda _, step: 1.0 / (1 + step))


def race(config: RunConfig, *, runs: Path, lease: Lease) -> Result:
    """`train` with the loss `planted`."""
    return train(config, runs=runs, lease=lease, loss=planted)


def planted(config: RunConfig, step: int) -> float:
    """Training loss after a step: a power law, times 1.1 for each factor of two of the learning rate from 1e-3."""
    return (2.0 + (1 + step) ** -0.5) * 1.1 ** abs(math.log2(config.optim.lr / 1e-3))


def noop(config: RunConfig, *, runs: Path, lease: Lease) -> Result:
    """Claims, begins, and is done."""
    run = RunStore(runs).run(config.run_id)
    with run.open_for_training(config, lease=lease) as writer:
        writer.begin(step=0, steps=1, env={"data_hash": "0", "threads": 1, "attempt": {}})
        result = result_of(config, attempts=writer.status.attempts)
        writer.finish(result)
        trace(run.name, writer.status.attempts, 0, os.getpid(), os.getppid(), 0)
        return result


def environment(config: RunConfig, *, runs: Path, lease: Lease) -> Result:
    """As `noop`; leaves in the folder of runs how OpenMP's threads would wait."""
    (runs / "environment").write_text(os.environ.get("OMP_WAIT_POLICY", ""))
    return noop(config, runs=runs, lease=lease)


def train(config: RunConfig, *, runs: Path, lease: Lease, loss: Callable[[RunConfig, int], float] | None = None) -> Result:
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stops.append(n))
    run = RunStore(runs).run(config.run_id)
    with run.open_for_training(config, lease=lease) as writer:
        step, steps = writer.status.step, config.train.steps
        seen_gpu()
        writer.begin(step=step, steps=steps, env={"data_hash": "0", "threads": config.train.threads, "attempt": {"host": "x"}})
        while step < steps:
            if stops:
                writer.set_state("preempted", step, "stopped")
                raise Preempted("stopped")
            if config.train.seed in ENDINGS and step == steps // 2 and not _healed():
                ENDINGS[config.train.seed]()
            if config.train.seed == 36 and step == steps // 2:
                writer.set_state("diverged", step, "blocks.0.wq is not finite")
                raise Diverged("blocks.0.wq is not finite")
            if config.train.seed == 37:
                raise OutOfMemory("out of memory, and\na second line")
            if config.train.seed == 38 and step == steps // 2 and not writer.status.alone:
                raise OutOfMemory("out of memory")
            trace(run.name, writer.status.attempts, step, os.getpid(), os.getppid(), config.train.threads)
            if loss is not None:
                writer.log({"step": step, "train_loss(nats/token)": loss(config, step)}, {"step": step})
            time.sleep(PACE)
            step += 1
            if step % CHECKPOINT == 0:
                writer.set_state("running", step)
        result = result_of(config, loss=1 / (1 + config.train.seed), attempts=writer.status.attempts)
        writer.finish(result)
        return result


VALLEYS = {"bf16": (1.0, 4e-3), "quest-w2a2": (1.5, 1.6e-2), "ste-w2a2": (1.9, 1e-3)}  # scheme → least loss, its lr
CLIFF = 0.03  # beyond this learning rate a run diverges


def valley(config: RunConfig, *, runs: Path, lease: Lease) -> Result:
    """A loss that is least at the scheme's own learning rate, and 0.01 more for each seed; gradient norms 1, 2, 3, ….

    Seeds of `ENDINGS` end as they do in `train`.
    """
    least, place = VALLEYS[config.scheme]
    run = RunStore(runs).run(config.run_id)
    with run.open_for_training(config, lease=lease) as writer:
        writer.begin(step=0, steps=config.train.steps, env={"data_hash": "0", "threads": 1, "attempt": {"host": "x"}})
        trace(run.name, 1, 0, os.getpid(), os.getppid(), 1)
        for step in range(1, config.train.steps + 1):
            writer.log({"step": step, "grad_norm": float(step)}, {"step": step})
        if config.train.seed in ENDINGS and not _healed():
            ENDINGS[config.train.seed]()
        if config.optim.lr > CLIFF:
            writer.set_state("diverged", 1, "loss is not finite")
            raise Diverged("loss is not finite")
        loss = least + 0.05 * math.log2(config.optim.lr / place) ** 2 + 0.01 * config.train.seed
        result = result_of(config, loss=loss, tokens=config.tokens, model_bits=2.0 * config.model.params_non_embedding)
        writer.finish(result)
        return result


def result_of(config: RunConfig, **measured: object) -> Result:
    """A result as a run of this config might have it."""
    numbers = {
        "loss": 2.0,
        "bits_per_byte": 3.0,
        "train_loss": 2.1,
        "model_bits": 1e5,
        "flops": 1e9,
        "tokens_per_s": 1e4,
        "seconds": 2.0,
        "peak_memory_bytes": 1000,
        "data_hash": "ab" * 32,
        "params_total": 1,
        "steps": config.train.steps,
        "val_tokens": 1,
        "attempts": 1,
        "device": "cpu",
    }
    return Result(**{**describe(config), **numbers, **measured})  # type: ignore[arg-type]


def deaf(config: RunConfig, *, runs: Path, lease: Lease) -> None:
    """Obeys no polite signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trace(config.run_id, 1, 0, os.getpid(), os.getppid(), 0)
    time.sleep(60)


def _healed() -> bool:
    return Path(os.environ["SWEEP_TRACE"]).with_name("healed").exists()


def seen_gpu() -> None:
    """A line with this process's CUDA_VISIBLE_DEVICES in the file $SWEEP_GPUS, if there is one."""
    if "SWEEP_GPUS" in os.environ:
        with Path(os.environ["SWEEP_GPUS"]).open("a") as f:
            f.write(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + "\n")


def trace(*fields: object) -> None:
    fd = os.open(os.environ["SWEEP_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, fields)) + "\n").encode())
    os.close(fd)


def traced(path: Path) -> list[tuple[str, int, int, int, int, int]]:
    """(run_id, attempt, step, pid, ppid, threads) of each step, in order."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(name, *map(int, rest)) for name, *rest in (line.split() for line in lines)]  # type: ignore[misc]


def assert_trained_once(path: Path, steps: dict[str, int], *, killed: bool = False) -> None:
    """Every run took each step; an attempt begins at the last checkpoint of the one before it, and none follows the end.

    `killed`: training processes were, so that one may have taken its last step and not written its result.
    """
    by_run: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for name, attempt, step, *_ in traced(path):
        by_run[name][attempt].append(step)
    assert set(by_run) == set(steps)
    for name, attempts in by_run.items():
        assert sorted(attempts) == list(attempts), (name, "attempts overlap")
        end = 0
        for attempt, taken in attempts.items():
            assert taken == list(range(taken[0], taken[0] + len(taken))), (name, attempt, taken)
            written = max(0, end - 1) // CHECKPOINT * CHECKPOINT  # a checkpoint after the last step may not have been
            assert written <= taken[0] <= end, (name, attempt, "lost or repeated more than it had to")
            assert end < steps[name] or killed, (name, attempt, "trained after its end")
            end = taken[-1] + 1
        assert end == steps[name]


def ranked(config: RunConfig, *, runs: Path, lease: Lease | None) -> None:
    """`logged` in rank 0; the other ranks wait for its result. Each traces itself as the run `…/rank`."""
    rank = os.environ["RANK"]
    trace(f"{config.run_id}/{rank}", os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.getpid(), os.getppid(), 0)
    if rank == "0":
        assert lease is not None
        logged(config, runs=runs, lease=lease)
        return
    assert lease is None
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda n, _: stops.append(n))
    if config.train.seed == 39:
        raise ValueError("this rank cannot")
    while not RunStore(runs).run(config.run_id).result_path.exists():
        if stops:
            raise Preempted("stopped")
        time.sleep(PACE)
