"""Provenance of an attempt: versions, machine, command, the commit of the code, and a hash of its uncommitted changes."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..system import PACKAGE, package_version


def attempt(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """The provenance of this process's attempt, as JSON values: one entry of `attempts` in env.json."""
    return {
        "command": shlex.join(sys.argv),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "questctl": package_version(),
        "cpu": cpu_model(),
        "processes": processes,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        **code_state(PACKAGE),
    }


def device_name(device: torch.device) -> str:
    """The name of the hardware on which a result was made: the GPU, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a GPU or, on a CPU, resident in this process (torch itself included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # getrusage(2)


def cpu_model() -> str:
    """The processor's name from /proc/cpuinfo, or its architecture where that is not available."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def code_state(package: Path) -> dict[str, str | None]:
    """The commit of the repository with `package` at its top level, and the SHA-256 of the diff of its tracked files.

    The commit is None without such a repository or without git, and the diff is None if nothing differs. A package that lies
    deeper in a repository was installed there and is not part of it, so that repository does not count.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if not top or Path(os.fsdecode(top.strip())) != package.parent:
        return {"commit": None, "diff_sha256": None}
    commit, diff = _git(package, "rev-parse", "HEAD"), _git(package, "diff", "HEAD")
    return {
        "commit": commit.decode().strip() if commit else None,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        return subprocess.run(("git", "-C", str(folder), *arguments), capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
