"""Fit the five-parameter law to the same points with questctl and with the PyPI package `chinchilla`; compare cost and time.

    python benchmarks/fit_chinchilla.py [--points N] [--starts N] [--json FILE]

Both minimise Huber(1e-3) on log-residuals of  A/N^α + B/D^β + E  and are compared by the same sum. The points are drawn from a
planted law, so that the distance to the truth can be shown too. Without `pip install chinchilla`, the published method is timed
instead: L-BFGS-B from the 4500 starts of Hoffmann et al. (arXiv 2203.15556, appendix D.3) on log-sum-exp.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from questctl.analysis import fit_law, make_points
from questctl.analysis.objective import Objective
from questctl.analysis.points import Points

DELTA = 1e-3
TRUTH = {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69}
# Hoffmann et al., appendix D.3: starts for α, β, log E, log A, log B
STARTS = ([0, 0.5, 1, 1.5, 2], [0, 0.5, 1, 1.5, 2], [-1, -0.5, 0, 0.5, 1], [0, 5, 10, 15, 20, 25], [0, 5, 10, 15, 20, 25])


def draw(count: int) -> Points:
    """Draw `count` points from the planted law with 0.5 % noise, over two decades of N and of D/N."""
    rng = np.random.default_rng(0)
    N = np.exp(rng.uniform(np.log(3e7), np.log(3e9), count))
    D = N * np.exp(rng.uniform(np.log(5), np.log(500), count))
    loss = TRUTH["A"] / N ** TRUTH["alpha"] + TRUTH["B"] / D ** TRUTH["beta"] + TRUTH["E"]
    return make_points(N, D, loss * np.exp(5e-3 * rng.standard_normal(count)), ["bf16"] * count)


def cost(points: Points, p: dict[str, float]) -> float:
    """The cost by which all fits are compared: the sum of Huber(δ) of the log-residuals."""
    L = p["A"] / points.N ** p["alpha"] + p["B"] / points.D ** p["beta"] + p["E"]
    return float(Objective(DELTA).cost(np.log(L) - np.log(points.loss), np.ones(len(points))))


def ours(points: Points) -> dict[str, float]:
    """Fit with questctl: variable-projection starts and one batched bounded solver."""
    return {k: float(v) for k, v in fit_law(points, "chinchilla", objective=DELTA).params.items() if v is not None}


def published(points: Points, count: int) -> dict[str, float]:
    """Fit with L-BFGS-B from `count` starts spread over the published grid, on log-sum-exp, and keep the lowest."""
    log_N, log_D, log_y = np.log(points.N), np.log(points.D), np.log(points.loss)

    def objective(t: np.ndarray) -> float:
        alpha, beta, e, a, b = t
        L = logsumexp(np.stack([a - alpha * log_N, b - beta * log_D, np.full_like(log_N, e)]), axis=0)
        return float(Objective(DELTA).cost(L - log_y, np.ones(len(log_y))))

    grid = list(itertools.product(*STARTS))
    chosen = [grid[i] for i in np.linspace(0, len(grid) - 1, min(count, len(grid))).astype(int)]
    best = min((minimize(objective, start, method="L-BFGS-B") for start in chosen), key=lambda r: r.fun)
    alpha, beta, e, a, b = best.x
    return {"A": float(np.exp(a)), "alpha": float(alpha), "B": float(np.exp(b)), "beta": float(beta), "E": float(np.exp(e))}


def package(points: Points) -> dict[str, float]:
    """Fit with `chinchilla.Chinchilla.fit` from the same starts in one process; it averages `loss_fn` over points."""
    import pandas as pd
    from chinchilla import Chinchilla  # type: ignore[import-not-found]

    grid = dict(zip(("alpha", "beta", "e", "a", "b"), STARTS, strict=True))
    C, ratio = 6 * points.N * points.D, points.D / points.N

    def huber(y: np.ndarray, L: np.ndarray) -> np.ndarray:
        r = np.abs(np.log(L) - np.log(y))
        return np.where(r <= DELTA, 0.5 * r**2, DELTA * (r - 0.5 * DELTA))

    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame({"C": C, "N": points.N, "D": points.D, "loss": points.loss}).to_csv(Path(folder) / "df.csv", index=False)
        fitted = Chinchilla(
            folder,
            param_grid={
                key: tuple(map(float, grid[key])) for key in ("e", "a", "b", "alpha", "beta")
            },  # the package reads them in this order
            seed_ranges={"C": (C.min(), C.max()), "N_to_D": (ratio.min(), ratio.max())},
            loss_fn=huber,
            log_level=40,
        )
        fitted.fit(parallel=False)
    return {k: float(getattr(fitted, k)) for k in ("A", "alpha", "B", "beta", "E")}


def main() -> None:
    """Run both fits, print the comparison, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--starts", type=int, default=4500, help="starts of the published method; fewer understate its time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    points = draw(options.points)
    rivals: dict[str, Callable[[Points], dict[str, float]]] = {"questctl": ours}
    if importlib.util.find_spec("chinchilla") is not None:
        rivals["chinchilla (PyPI)"] = package
    else:
        rivals[f"L-BFGS-B, {options.starts} starts"] = partial(published, count=options.starts)
    ours(points)  # imports
    rows: list[dict[str, Any]] = []
    for name, fit in rivals.items():
        begun = time.perf_counter()
        params = fit(points)
        seconds = time.perf_counter() - begun
        off = max(abs(params[k] / TRUTH[k] - 1) for k in ("alpha", "beta", "E"))
        rows.append(
            {"fit": name, "objective": cost(points, params), "seconds": seconds, "largest_error": off, "params": params}
        )
        print(f"{name:22s} objective {rows[-1]['objective']:.9e}  {seconds:9.4f} s  α, β, E within {100 * off:.2f} %")
    ratio = rows[1]["seconds"] / rows[0]["seconds"]
    print(f"{ratio:.0f} times faster, objective lower by {rows[1]['objective'] - rows[0]['objective']:.3e}")
    if options.json:
        installed = {name: version(name) for name in ("numpy", "scipy", "chinchilla") if importlib.util.find_spec(name)}
        machine = {"date": date.today().isoformat(), "python": platform.python_version(), **installed, "cores": os.cpu_count()}
        about = {"points": len(points), "delta": DELTA, **machine}
        options.json.write_text(json.dumps({**about, "rows": rows, "times_faster": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()
