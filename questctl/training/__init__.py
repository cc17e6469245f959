"""Training of one run: `train(config)` returns its Result. `loop` uses the other modules, each of which does one thing."""

from __future__ import annotations

from typing import Any

from ..system import wait_passively

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # imported on first use, because it loads torch
        wait_passively()
        from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
