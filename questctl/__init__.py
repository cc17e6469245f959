"""questctl: train low-bit language models, fit their scaling laws, and find out which bits pay.

For scripts: `questctl.train(config)` → Result · `questctl.load_runs(path)` → DataFrame · `questctl.quant.make_quantizer(word)`
· `questctl.analysis.fit_law(points)` → Fit. All are looked up when first used: importing this package imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "benchmark": "questctl.bench",
    "compile_kernels": "questctl.bench",
    "load_runs": "questctl.store",
    "read_benchmark": "questctl.bench",
    "train": "questctl.training",
}
_PARTS = (
    "analysis",
    "bench",
    "config",
    "data",
    "errors",
    "evaluate",
    "export",
    "kernels",
    "models",
    "posttraining",
    "quant",
    "scaling",
    "store",
    "sweep",
    "training",
)

__all__ = ["__version__", "benchmark", "compile_kernels", "load_runs", "read_benchmark", "train"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("questctl")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"questctl.{name}")
    raise AttributeError(f"module 'questctl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_PARTS])
