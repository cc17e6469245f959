"""Measured data that is not in the repository: where tests look for it, and what a test run says where it is absent."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

DATA = Path(os.environ.get("QUESTCTL_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
_REASON = "shared data absent: "


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where this file of `DATA` is absent."""
    return pytest.mark.skipif(not (DATA / name).is_file(), reason=_REASON + name)


def summary(reasons: Iterable[str]) -> list[str]:
    """One line for the end of a test run, from the reasons of its skips; no line where no test was skipped for want of data."""
    counts: dict[str, int] = defaultdict(int)
    for reason in reasons:
        _, absent, name = reason.partition(_REASON)
        if absent:
            counts[name] += 1
    if not counts:
        return []
    files = ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))
    return [f"{sum(counts.values())} tests were skipped for want of data in {DATA}: {files}"]
