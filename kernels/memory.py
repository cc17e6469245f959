"""The peak memory of a call, beyond what is allocated when it begins.

On a GPU the allocator reports it. On a CPU, whose allocator does not, it is the largest sum, in order of time, of the blocks
that torch's profiler records as allocated and freed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes of torch's tensors during `call()` minus those before it. Call once before if the first call needs more."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record,
    ):
        call()
    blocks = [(e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(blocks, key=lambda block: block[0])), default=0)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what the profiler's library writes to file descriptor 2; it has no setting to be quiet."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
