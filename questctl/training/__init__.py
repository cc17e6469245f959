"""Training one run: `train(config)` → Result. `loop` holds it together; the other modules know nothing of each other."""

from __future__ import annotations

from typing import Any

from ..system import wait_passively

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # torch is loaded when training is asked for, not before
        wait_passively()
        from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
