"""Provenance of an attempt: versions, machine, command, the commit of the code, and a hash of uncommitted changes."""

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

from ..system import package_version

PACKAGE = Path(__file__).resolve().parent.parent


def attempt(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """One entry of `attempts` in env.json; plain JSON values."""
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
    """What a result says it was made on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: allocated on a GPU, or resident in this process (torch itself included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # getrusage(2)


def cpu_model() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def code_state(package: Path) -> dict[str, str | None]:
    """`{"commit": …, "diff_sha256": …}` of the repository that holds `package` at its top; None where there is none, or no git.

    A package installed into somebody else's repository is not part of it. The diff is of tracked files; None: no difference.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if not top or Path(os.fsdecode(top.strip())) != package.parent:
        return {"commit": None, "diff_sha256": None}
    commit, diff = _git(package, "rev-parse", "HEAD"), _git(package, "diff", "HEAD")
    return {
        "commit": commit.decode().strip() if commit else None,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def _git(folder: Path, *words: str) -> bytes | None:
    try:
        return subprocess.run(("git", "-C", str(folder), *words), capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
