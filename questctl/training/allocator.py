"""Memory of a process that trains on a CPU: what was used once is kept.

glibc gives a freed activation back to the kernel, which hands it out again page by page: 3 to 13 % of a laptop-size step.
The setting holds for the whole process and to its end: glibc offers no way to read it and put it back.
"""

from __future__ import annotations

import ctypes
import os

# mallopt(3): bytes that may lie free at the top, bytes from which a block is mapped on its own, bytes by which the heap grows
SETTINGS = {"TRIM_THRESHOLD": (-1, 2_000_000_000), "MMAP_THRESHOLD": (-3, 2_000_000_000), "TOP_PAD": (-2, 64 * 2**20)}


def keep_memory() -> None:
    """From here on this process keeps what it frees, but where MALLOC_… variables say how; without glibc nothing changes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for name, (parameter, value) in SETTINGS.items():
            if f"MALLOC_{name}_" not in os.environ:
                libc.mallopt(parameter, value)
