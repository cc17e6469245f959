"""Small things that several test files do: write a file, wait for a condition, list a folder, leave figures empty."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def write_file(path: Path, content: str | bytes) -> Path:
    """Write a file and the folders above it; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def until(condition: Callable[[], object], seconds: float = 20, pause: float = 0.02) -> None:
    """Wait until `condition()` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def slow_but(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Cases of a test, names or rows of values, of which `make test` takes those that are kept, and `make test-slow` all.

    A row is kept if its first value is.
    """
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    assert set(kept) <= {row[0] for row in rows}, kept
    return [pytest.param(*row, marks=[] if row[0] in kept else pytest.mark.slow) for row in rows]


def needs_package(name: str) -> pytest.MarkDecorator:
    """Skip where this package is not installed. `pytest.importorskip` would import it, which for some takes seconds."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


def files_in(folder: Path) -> list[str]:
    """All files below a folder, as sorted relative paths."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@contextmanager
def empty_figures() -> Iterator[None]:
    """Files of figures have nothing in them: to draw them takes seconds, and what they show is tested in test_figures."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw_without_rendering", lambda self: None)
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
        yield


def drawn_sums(m, x, g, wanted, draws: int):
    """Sums over draws of the gradients of x and of the weight of layer m, and of their squared errors against `wanted`."""
    import torch

    torch.manual_seed(5)
    sums, squares = [torch.zeros_like(t) for t in wanted], [torch.zeros_like(t) for t in wanted]
    for _ in range(draws):
        for i, drawn in enumerate(torch.autograd.grad(m(x), (x, m.weight), g)):
            sums[i] += drawn
            squares[i] += (drawn - wanted[i]).square()
    return sums, squares
