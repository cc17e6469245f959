"""Training one run: `train(config)` → Result. `loop` holds it together; the other modules know nothing of each other."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # torch is loaded when training is asked for, not before
        # Threads that wait shall sleep, not spin; OpenMP reads this when torch loads it. Where the cores are shared with other
        # programs, two spinning threads take 300 ms for a step of 53K W4A4 that takes 45 on one; two sleeping ones take 50.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
