"""Diagnose a machine: its hardware and software, what questctl can do with them, and what is missing."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .store import default_root
from .system import OtherWork, cpu_count

OK, LIMITED, MISSING = "ok", "limited", "missing"
SIZE, REPEATS = 512, 10  # size and number of the timed matrix products
BUSY = 0.5  # with so many CPUs busy with other programs, a measured rate says little
BF16_PAYS = 1.3  # ratio of bf16 to fp32 rate above which autocast outweighs its casts
OPTIONAL = {"pyarrow": ("Parquet tables for fit-scaling", "pip install 'questctl[parquet]'")}


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    `state` is `ok`, `limited` (it works, with the consequence in `means`) or `missing` (`means` says how to get it).
    """

    what: str
    state: str
    found: str
    means: str


def check_machine(runs: Path | str | None = None) -> list[Check]:
    """Check interpreter, processor, memory, precision, GPU, compiler, the folder of runs, and optional packages.

    `runs` is the folder that training would write to, by default `$QUESTCTL_RUNS` or `runs/`; it is not created. The matrix
    rates are measured, so that the advice on `train.precision` is this machine's own; all checks take about a second.
    """
    return list(_checks(default_root() if runs is None else Path(runs)))


def _checks(runs: Path) -> Iterator[Check]:
    import psutil
    import torch

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    free_gib = psutil.virtual_memory().available / 2**30
    usable = cpu_count()
    may = "" if usable >= cores else f", of which this process may use {usable} (affinity, control group or SLURM)"
    beside = f"sweeps train {usable} runs at a time, one thread each{may and '; a run has no more threads than that'}"
    yield Check("python", OK, platform.python_version(), "3.11 or newer is needed")
    yield Check("torch", OK, torch.__version__, "CUDA build" if torch.version.cuda else "CPU build")
    yield Check("processor", OK, f"{cores} cores{may}, {platform.machine()}", beside)
    yield Check(
        "memory", OK if free_gib >= 2 else LIMITED, f"{free_gib:.1f} GiB free", "laptop presets need about 0.5 GiB a run"
    )
    others = OtherWork()
    rates = matrix_rates()
    yield _precision(rates, others.cpus())
    yield from _gpus()
    yield _compiler()
    yield _folder(runs)
    for module, (use, remedy) in OPTIONAL.items():
        installed = importlib.util.find_spec(module) is not None
        state = (OK, "installed", use) if installed else (MISSING, "not installed", f"{use}: {remedy}")
        yield Check(module, *state)


def matrix_rates() -> dict[str, float]:
    """GFLOP/s of a SIZE³ matrix product on the CPU, in fp32 and in bf16: 2·SIZE³ operations in the least of REPEATS times.

    The two products take turns, so that other work on the machine delays both, not only one of them.
    """
    import torch

    pairs = {"fp32": torch.float32, "bf16": torch.bfloat16}
    operands = {name: [torch.randn(SIZE, SIZE).to(dtype) for _ in range(2)] for name, dtype in pairs.items()}
    best = dict.fromkeys(pairs, math.inf)
    for i in range(REPEATS + 1):
        for name, (a, b) in operands.items():
            start = time.perf_counter()
            a @ b
            if i:  # the first call warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: 2 * SIZE**3 / seconds / 1e9 for name, seconds in best.items()}


def _precision(rates: dict[str, float], others: float) -> Check:
    if others > BUSY:
        advice = f"other programs use {others:.1f} CPUs, so these rates say little; ask again when the machine is idle"
        return Check("matrix rate", LIMITED, f"fp32 {rates['fp32']:.0f}, bf16 {rates['bf16']:.0f} GFLOP/s", advice)
    ratio = rates["bf16"] / rates["fp32"]
    wide = "train.precision=bf16 may pay at widths of 128 and more"
    advice = wide if ratio > BF16_PAYS else "stay with train.precision=fp32"
    measured = f"fp32 {rates['fp32']:.0f}, bf16 {rates['bf16']:.0f} GFLOP/s"
    return Check("matrix rate", OK, measured, f"bf16 is {ratio:.1f}x fp32: {advice}")


def _gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("GPU", MISSING, "none", "training runs on the CPU: laptop presets, not the published sizes")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        about = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
        yield Check(f"GPU {i}", OK, about, "bf16 autocast and torch.compile are used")
    triton = importlib.util.find_spec("triton") is not None
    installed = "installed" if triton else "not installed"
    yield Check("triton", OK if triton else LIMITED, installed, "GPU kernels; everything else works without")


def _compiler() -> Check:
    from .kernels import native

    compiler = native.find_compiler()
    if compiler is None:
        return Check("compiler", LIMITED, "none", "with one (gcc), training on a CPU is faster, and torch.compile can be used")
    try:
        native.compiled_library()
    except (OSError, subprocess.SubprocessError) as e:
        return Check("compiler", LIMITED, f"{compiler} fails: {type(e).__name__}", "training on the CPU is slower without")
    return Check("compiler", OK, compiler, "makes steps on the CPU faster; torch.compile needs it, too")


def _folder(runs: Path) -> Check:
    existing = next(p for p in (runs.absolute(), *runs.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        return Check("runs folder", MISSING, f"{runs}: not writable", "choose another with --runs or QUESTCTL_RUNS")
    free_gib = shutil.disk_usage(existing).free / 2**30
    state = OK if free_gib >= 1 else LIMITED
    return Check("runs folder", state, f"{runs}: {free_gib:.1f} GiB free", "a laptop run takes about 3 MiB")
