"""questctl: train low-bit language models, fit their scaling laws, and find out which bits pay.

One call for each thing that the command line can do; each docstring gives arguments, result and errors.

    Configure   make_config · train_command
    Train       train
    Look        load_runs
    Measure     benchmark · read_benchmark · compile_kernels

The names are looked up when they are first used: `import questctl` loads neither torch nor pandas. The rooms behind them, such
as `questctl.quant` and `questctl.analysis`, are attributes too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench.suite import benchmark, compile_kernels, read_benchmark
    from .config.commands import make_config, train_command
    from .store import load_runs
    from .training import train

_MODULES = {  # public name → the module that defines it
    "benchmark": "bench",
    "compile_kernels": "bench",
    "load_runs": "store",
    "make_config": "config.commands",
    "read_benchmark": "bench",
    "train": "training",
    "train_command": "config.commands",
}
_ROOMS = (
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

__all__ = [
    "__version__",
    "benchmark",
    "compile_kernels",
    "load_runs",
    "make_config",
    "read_benchmark",
    "train",
    "train_command",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("questctl")
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'questctl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_ROOMS])
