"""Benchmarks of kernels and of whole models (quantizer, training step, prefill, decode): `benchmark(…)` → `Benchmark`.

suite.py        the public calls: what to measure, the measured rows, their files and comparisons
model_cases.py  the whole-model cases: models, correctness checks, bytes and operations
names.py        names of the whole-model cases
table.py        measured rows as a table and as sentences for people
"""

from __future__ import annotations

from ..lazy import lazy_names

__all__ = ["Benchmark", "benchmark", "compile_kernels", "read_benchmark"]


__getattr__ = lazy_names(__name__, dict.fromkeys(__all__, "suite"))
