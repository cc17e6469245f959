"""Benchmarks of kernels and of whole models (quantizer, training step, prefill, decode): `benchmark(…)` → `Benchmark`.

suite.py        the public calls: what to measure, the measured rows, their files and comparisons
model_cases.py  the whole-model cases: models, correctness checks, bytes and operations
names.py        names of the whole-model cases
table.py        measured rows as a table and as sentences for people
"""

from __future__ import annotations

from typing import Any

__all__ = ["Benchmark", "benchmark", "compile_kernels", "read_benchmark"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import suite

        return getattr(suite, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
