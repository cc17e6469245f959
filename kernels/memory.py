"""How much memory a call takes beyond what is there when it begins: its peak.

On a GPU by the allocator's own account. On a CPU, whose allocator keeps none, from the profiler's record of every block that
torch takes and gives back, summed in order of time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes of torch's tensors during `call()` less those before it; a second call's, where a first one prepares."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    blocks = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(blocks, key=lambda block: block[0])), default=0)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Swallow what the profiler's library writes to file 2 when it starts and stops; no setting of it stops that."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
