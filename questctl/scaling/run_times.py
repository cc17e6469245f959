"""The time of a run from the times of finished runs: log(seconds a token) = a + b·log N, for each scheme.

The time of models with steps of milliseconds is not proportional to 6·N·D FLOP: most of it goes into launching operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import DataError
from .sources import Sources

if TYPE_CHECKING:
    from ..analysis.points import Points


def seconds_of_runs(sources: Sources, points: Points) -> Callable[[int, float, float], float]:
    """`seconds(group, N, D)` of a run of a scheme of `points`: least squares over the finished runs of the scheme.

    A scheme with runs of one size takes the slope from all runs, and a scheme without runs the whole line. Raises DataError
    without any times.
    """
    import numpy as np

    frame = sources.frame[list(sources.finished)]
    if "seconds" not in frame or not (frame["seconds"] > 0).any():
        raise DataError("--seconds: the sources have no runs with times; give run folders, or leave it out.")
    frame = frame[frame["seconds"] > 0]
    x = np.log(frame["params_non_embedding"].to_numpy(float))
    y = np.log(frame["seconds"].to_numpy(float) / frame["tokens"].to_numpy(float))
    scheme = frame["scheme"].to_numpy()

    def line(rows: np.ndarray, slope: float | None) -> tuple[float, float]:
        if len(np.unique(x[rows])) > 1:
            b, a = np.polyfit(x[rows], y[rows], 1)
            return float(a), float(b)
        b = slope or 0.0
        return float(np.mean(y[rows] - b * x[rows])), b

    everything = line(np.ones(len(x), bool), None)
    lines = {
        g: line(scheme == label, everything[1]) if (scheme == label).any() else everything
        for g, label in enumerate(points.labels)
    }

    def seconds(group: int, N: float, D: float) -> float:
        a, b = lines[group]
        return float(np.exp(a + b * np.log(N)) * D)

    return seconds
