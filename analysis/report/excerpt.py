"""Which runs of a large store a report shows one by one.

A page with the curves and rows of 10,000 runs takes minutes to make, and nobody can read it. Verdict, frontier, law and cost
are those of all runs. Curves, signals and rows are those of an excerpt, which depends on nothing but the runs:

* a quarter of it at most are runs without a final loss, states by turns, the diverged and failed first;
* the rest are the best runs of each cell, which is a scheme, size and number of tokens, equally many of each. If even one of
  each is too many, cells at even distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..tables import ALIASES

if TYPE_CHECKING:
    import pandas as pd

MOST_RUNS = 400
WORST_FIRST = ("diverged", "failed", "stopped", "preempted", "running", "pending")


@dataclass(frozen=True)
class Excerpt:
    """The runs that are shown one by one, by name, and in words which of all runs they are; no words if they are all."""

    runs: frozenset[str]
    words: str = ""


def excerpt(frame: pd.DataFrame, finished: Sequence[bool], most: int = MOST_RUNS) -> Excerpt:
    """At most `most` runs of `frame`, one row a run with `run`, `state` and names of our columns; all if they are not more.

    `finished` says of each run whether it has a final loss.
    """
    if len(frame) <= most:
        return Excerpt(frozenset(frame["run"]))
    cells, place = _cells(frame), np.arange(len(frame))
    is_done = np.asarray(finished, bool)
    open_ = _by_turns(frame["state"].map({s: i for i, s in enumerate(WORST_FIRST)}).fillna(len(WORST_FIRST)), place[~is_done])
    chosen, left = open_[: most // 4], most - len(open_[: most // 4])
    done = place[is_done]
    best = done[np.argsort(_numbers(frame, "loss")[done], kind="stable")]  # a loss that is unknown is the last
    cell = cells[best]
    count = len(np.unique(cell))
    rank = _ranks(cell)
    each = left // count if count else 0
    if count and each:
        some = best[rank < each]
        words = f"the {f'{each} best runs' if each > 1 else 'best run'} of each scheme, size and length"
    else:
        kept = np.unique(cell)[np.linspace(0, count - 1, min(left, count)).round().astype(int)] if count and left else cell[:0]
        some = best[(rank == 0) & np.isin(cell, kept)]
        words = f"the best run of {len(some):,} among {count:,} combinations of scheme, size and length"
    parts = [words] if count else []
    parts += [f"{len(chosen):,} of the {len(open_):,} without a final loss"] if len(open_) else []
    shown = np.concatenate([chosen, some])
    return Excerpt(frozenset(frame["run"].to_numpy()[shown]), f"{len(shown):,} of {len(frame):,} runs: {', and '.join(parts)}")


def _cells(frame: pd.DataFrame) -> np.ndarray:
    """The number (n,) of each run's cell; cells are in the order of their first run's scheme, then by size and tokens."""
    import pandas as pd

    scheme = pd.factorize(frame["scheme"])[0] if "scheme" in frame else np.zeros(len(frame), int)
    keys = np.stack([scheme.astype(float), _numbers(frame, "N"), _numbers(frame, "D")], axis=1)
    return np.unique(np.nan_to_num(keys, nan=-1.0), axis=0, return_inverse=True)[1].reshape(-1)


def _numbers(frame: pd.DataFrame, ours: str) -> np.ndarray:
    """A column of ours (n,), nan where a run has no number."""
    import pandas as pd

    column = next((c for c in ALIASES[ours] if c in frame), None)
    return np.full(len(frame), np.nan) if column is None else pd.to_numeric(frame[column], errors="coerce").to_numpy(float)


def _by_turns(group: pd.Series, place: np.ndarray) -> np.ndarray:
    """`place` in turns over the groups: the first of each group, then the second of each, …"""
    of = group.to_numpy()[place]
    return place[np.lexsort([of, _ranks(of)])]


def _ranks(group: np.ndarray) -> np.ndarray:
    """How many of the same group stand before each, (n,)."""
    order = np.argsort(group, kind="stable")
    sorted_ = group[order]
    first = np.searchsorted(sorted_, sorted_)
    out = np.empty(len(group), int)
    out[order] = np.arange(len(group)) - first
    return out
