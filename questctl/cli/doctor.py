"""`questctl doctor`: what this machine has, what it can do with it, and what is missing for the rest.

Three answers per check: ok, limited (works, with a consequence that is named), missing (and the line that installs it). The two
matrix rates are measured here, 512×512×512, best of five, so that the advice on precision is this machine's own.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import console
from . import options as opt

OK, LIMITED, MISSING = "ok", "limited", "missing"
OPTIONAL = {"pyarrow": ("Parquet tables for fit-scaling", "pip install 'questctl[parquet]'")}


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    what: str
    state: str
    found: str
    means: str


def command(runs: opt.RunsDir = None, as_json: opt.Json = False) -> None:
    """Say what this machine can do: processor, memory, GPU, precision, kernels, disk, extras."""
    checks = list(diagnose(opt.runs_dir(runs)))
    if as_json:
        console.print_json([asdict(c) for c in checks])
        return
    console.print_table(
        ("check", "state", "found", "what it means"), [(c.what, c.state, c.found, c.means) for c in checks], left=4
    )


def diagnose(runs: Path) -> Iterator[Check]:
    """Every check in turn; none of them fails, none writes anything that stays."""
    import psutil
    import torch

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    free_gb = psutil.virtual_memory().available / 2**30
    yield Check("python", OK, platform.python_version(), "3.11 or newer is needed")
    yield Check("torch", OK, torch.__version__, "CUDA build" if torch.version.cuda else "CPU build")
    yield Check(
        "processor", OK, f"{cores} cores, {platform.machine()}", f"sweeps run {os.cpu_count()} runs at a time, one thread each"
    )
    yield Check("memory", OK if free_gb >= 2 else LIMITED, f"{free_gb:.1f} GiB free", "laptop presets need about 0.5 GiB a run")
    yield _precision(torch_rates())
    yield from _gpu()
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    yield Check("compiler", OK if compiler else LIMITED, compiler or "none", "only torch.compile (train.compile=on) needs one")
    yield _folder(runs)
    for module, (use, line) in OPTIONAL.items():
        found = importlib.util.find_spec(module) is not None
        yield Check(
            module, OK if found else MISSING, "installed" if found else "not installed", use if found else f"{use}: {line}"
        )


def torch_rates() -> dict[str, float]:
    """GFLOP/s of a 512³ matrix product on the CPU in fp32 and bf16: 2·512³ operations, best of five."""
    import torch

    def rate(dtype: torch.dtype) -> float:
        a, b = (torch.randn(512, 512).to(dtype) for _ in range(2))
        return 2 * 512**3 / best_time(lambda: a @ b) / 1e9

    return {"fp32": rate(torch.float32), "bf16": rate(torch.bfloat16)}


def best_time(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the quickest of `repeats` calls, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _precision(rates: dict[str, float]) -> Check:
    ratio = rates["bf16"] / rates["fp32"]
    advice = "train.precision=bf16 may pay at widths of 128 and more" if ratio > 1.3 else "stay with train.precision=fp32"
    return Check(
        "matrix rate", OK, f"fp32 {rates['fp32']:.0f}, bf16 {rates['bf16']:.0f} GFLOP/s", f"bf16 is {ratio:.1f}x fp32: {advice}"
    )


def _gpu() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("GPU", MISSING, "none", "training runs on the CPU: laptop presets, not the published sizes")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield Check(
            f"GPU {i}",
            OK,
            f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}",
            "bf16 autocast and torch.compile are used",
        )
    triton = importlib.util.find_spec("triton") is not None
    yield Check(
        "triton",
        OK if triton else LIMITED,
        "installed" if triton else "not installed",
        "GPU kernels; everything else works without",
    )


def _folder(runs: Path) -> Check:
    there = next(p for p in (runs.absolute(), *runs.absolute().parents) if p.exists())
    free_gb = shutil.disk_usage(there).free / 2**30
    if not os.access(there, os.W_OK):
        return Check("runs folder", MISSING, f"{runs}: not writable", "choose another with --runs or QUESTCTL_RUNS")
    return Check(
        "runs folder", OK if free_gb >= 1 else LIMITED, f"{runs}: {free_gb:.1f} GiB free", "a laptop run takes about 3 MiB"
    )
