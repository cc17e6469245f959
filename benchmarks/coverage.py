"""Measure how often 95 % intervals hold the truth: tables of coverage on simulated grids of runs.

    python benchmarks/coverage.py [--simulations N] [--runs 24 32 144] [--methods NAME …] [--errors NAME …] [--out FOLDER]
    python benchmarks/coverage.py --late switch switch-eff --simulations 200

Each simulation draws runs from a planted law `quest` with 0.5 % of noise, fits it and asks for α, β, E and every eff whether
the interval holds the true value. Errors are independent, or "clustered": 70 % of their variance is shared by the runs of one
scheme and size, as where a learning rate does not suit a size.

A profile interval holds a value exactly if the likelihood-ratio statistic with the parameter held there is below the threshold.
So one constrained fit per parameter gives the coverage of any threshold, of which two are compared: Student's, which the
intervals have, and χ²'s. `--late` asks the same of the laws that know when a run was quantized, of every parameter.
Results are added to coverage.json piece by piece, and coverage.md is made from it: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from questctl.analysis.fit import fit_law
from questctl.analysis.fit_result import Fit
from questctl.analysis.laws import LAWS, Design
from questctl.analysis.objective import Objective
from questctl.analysis.points import Points, make_points, points_from_frame
from questctl.analysis.solver import CHI2_95, minimise
from questctl.analysis.uncertainty import bootstrap, statistic, threshold

TRUTH = {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69}
EFF = {"bf16": 1.0, "w8a8": 0.97, "w4a4": 0.70, "w3a3": 0.45, "w2a2": 0.18, "w1a1": 0.03}
GRIDS: dict[
    int, tuple[tuple[float, float, int], tuple[float, ...], tuple[str, ...]]
] = {  # sizes, tokens per parameter, schemes
    24: ((3e7, 1e9, 4), (20, 60, 180), ("bf16", "w4a4")),
    32: ((3e7, 1e9, 4), (20, 100), ("bf16", "w4a4", "w3a3", "w2a2")),
    144: ((3e7, 1.6e9, 6), (10, 30, 90, 270), ("bf16", "w8a8", "w4a4", "w3a3", "w2a2", "w1a1")),
}
NOISE, SHARED = 5e-3, 0.7  # standard deviation of log losses; share of the variance that clusters have in common
DELTA = 1e-3  # of the Huber fits
REPLICATES = 300  # of each bootstrap
LATE: dict[str, dict[str, float]] = {
    "switch": {
        **{"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69, "theta": 0.4, "kappa": 0.9},
        **{"phi": 20.0, "chi": 0.5, "psi": 0.12, "omega": 0.6},
        **{"lambda": 3.0, "mu": 0.35, "nu": 0.15, "xi": -0.3, "rho": 0.25},
    },
    "switch-eff": {
        **{"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69},
        **{"tau": 0.8, "c": 0.03, "xi": 0.9, "omega": 0.5},
    },
}
LATE_GRID = ((3e7, 1.6e9, 5), (10, 40, 160), ("bf16", "w4a4", "w3a3", "w2a2", "w1a1"), (0.0, 0.2, 0.5, 0.8, 0.95))
LATE_NOISE = 2e-3  # of the grid of late quantization, whose exponents larger noise leaves open
METHODS = ("profile", "huber profile", "wild bootstrap", "huber wild bootstrap")
ERRORS = ("independent", "clustered")
SIMULATIONS = 500
PIECE = 50  # simulations between two writes


def grid(runs: int) -> Points:
    """The design of a simulation with its noiseless losses."""
    sizes, ratios, schemes = GRIDS[runs]
    cells = [(n, n * r, s) for s in schemes for n in np.geomspace(*sizes) for r in ratios]
    N, D, scheme = zip(*cells, strict=True)
    size = np.array(N) * np.array([EFF[s] for s in scheme])
    loss = TRUTH["A"] / size ** TRUTH["alpha"] + TRUTH["B"] / np.array(D) ** TRUTH["beta"] + TRUTH["E"]
    return make_points(N, D, loss, scheme)


def late_grid(law: str) -> Points:
    """The design of a simulation of a law that knows of shares, with its noiseless losses; bf16 runs have one share."""
    sizes, ratios, schemes, shares = LATE_GRID
    cells = [
        (n, n * r, s, share)
        for s in schemes
        for n in np.geomspace(*sizes)
        for r in ratios
        for share in (shares if s != "bf16" else (0.0,))
    ]
    N, D, scheme, share = zip(*cells, strict=True)
    trace = 1 + 1e-9 * np.arange(len(cells))
    frame = pd.DataFrame({"N": N, "D": D, "scheme": scheme, "tokens_fp": np.array(share) * np.array(D), "loss": trace})
    points = points_from_frame(frame)
    coordinates = LAWS[law].params(points.schemes)
    theta = np.array([p.internal(true_value(p.name, law)) for p in coordinates])
    return points.with_loss(LAWS[law].predict(theta, Design.of(points))[0])


def measure_late(points: Points, law: str, seed: int) -> dict[str, bool]:
    """One simulation of a law that knows of shares: parameter → whether its profile interval holds the truth."""
    noise = np.random.default_rng([len(points), list(LATE).index(law), seed]).standard_normal(len(points))
    fit = fit_law(points.with_loss(points.loss * np.exp(LATE_NOISE * noise)), law, n_starts=6)
    value = excluded(fit, list(fit.names), law)
    return {name: bool(v <= threshold(fit)) for name, v in zip(fit.names, value, strict=True)}


def draw(points: Points, errors: str, rng: np.random.Generator) -> Points:
    """The grid with noise."""
    noise = rng.standard_normal(len(points))
    if errors == "clustered":
        _, cluster = np.unique(np.stack([points.group, points.N], axis=1), axis=0, return_inverse=True)
        shared = rng.standard_normal(cluster.max() + 1)[cluster.ravel()]
        noise = math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * noise
    return points.with_loss(points.loss * np.exp(NOISE * noise))


def true_value(name: str, law: str = "quest") -> float:
    """The planted value of a parameter of the fit."""
    return EFF[name[4:]] if name.startswith("eff.") else LATE.get(law, TRUTH)[name]


def excluded(fit: Fit, names: list[str], law: str = "quest") -> np.ndarray:
    """(m,) likelihood-ratio statistics of the true values of these parameters, each held while the others are refitted."""
    index = np.array([fit.index(name) for name in names])
    theta, free = np.tile(fit.theta, (len(names), 1)), np.tile(fit.free, (len(names), 1))
    rows = np.arange(len(names))
    theta[rows, index] = [fit.coordinates[i].internal(true_value(name, law)) for i, name in zip(index, names, strict=True)]
    free[rows, index] = False
    return statistic(fit, minimise(fit.problem, theta, free, iterations=500, tolerance=1e-9).cost)


def measure(points: Points, method: str, errors: str, seed: int) -> dict[str, dict[str, bool]]:
    """One simulation: name of the threshold → parameter → whether its interval holds the truth."""
    drawn = draw(points, errors, np.random.default_rng([len(points), ERRORS.index(errors), seed]))
    objective = Objective(DELTA) if method.startswith("huber") else None
    fit = fit_law(drawn, "quest", objective=objective, n_starts=6)
    names = ["alpha", "beta", "E", *(name for name in fit.names if name.startswith("eff."))]
    if "bootstrap" in method:
        ends = bootstrap(fit, REPLICATES, seed=seed).intervals()
        return {"": {name: ends[name][0] <= true_value(name) <= ends[name][1] for name in names}}
    value = dict(zip(names, excluded(fit, names), strict=True))
    return {
        "": {name: bool(v <= threshold(fit)) for name, v in value.items()},
        "χ²": {name: bool(v <= CHI2_95) for name, v in value.items()},
    }


def path_of(folder: Path) -> Path:
    """The file of results."""
    return folder / "coverage.json"


def load(folder: Path) -> dict[str, Any]:
    """The results so far."""
    path = path_of(folder)
    return json.loads(path.read_text()) if path.exists() else {"cells": {}}


def run(folder: Path, runs: int, method: str, errors: str, simulations: int) -> None:
    """Add the simulations that are missing of one cell to the results, in pieces."""
    points, key = grid(runs), f"{runs} | {errors} | {method}"
    while (cell := load(folder)["cells"].get(key, {"simulations": 0, "seconds": 0.0, "hits": {}}))["simulations"] < simulations:
        begin, done = time.perf_counter(), cell["simulations"]
        for seed in range(done, min(done + PIECE, simulations)):
            for limit, holds in measure(points, method, errors, seed).items():
                hits = cell["hits"].setdefault(limit, {})
                for name, held in holds.items():
                    hits[name] = hits.get(name, 0) + int(held)
            cell["simulations"] = seed + 1
        cell["seconds"] = round(cell["seconds"] + time.perf_counter() - begin, 1)
        save(folder, {"cells": {**load(folder)["cells"], key: cell}})
        print(f"{key}: {cell['simulations']} simulations, {cell['seconds']:.0f} s", flush=True)


def run_late(folder: Path, law: str, simulations: int) -> None:
    """Add the simulations that are missing of one law of late quantization to the results, in pieces."""
    points = late_grid(law)
    while (cell := load(folder).get("late", {}).get(law, {"simulations": 0, "seconds": 0.0, "hits": {}}))[
        "simulations"
    ] < simulations:
        begin, done = time.process_time(), cell["simulations"]
        for seed in range(done, min(done + PIECE, simulations)):
            for name, held in measure_late(points, law, seed).items():
                cell["hits"][name] = cell["hits"].get(name, 0) + int(held)
            cell["simulations"] = seed + 1
        cell["seconds"] = round(cell["seconds"] + time.process_time() - begin, 1)
        save(folder, {"late": {**load(folder).get("late", {}), law: {**cell, "runs": len(points)}}})
        print(f"{law}: {cell['simulations']} simulations, {cell['seconds']:.0f} s", flush=True)


def save(folder: Path, new: dict[str, Any]) -> None:
    """Write the results with `new` entries, and the tables made from them."""
    results = load(folder) | new
    results |= {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {platform.system()}"}
    results["versions"] = {name: version(name) for name in ("numpy", "scipy")} | {"python": platform.python_version()}
    path_of(folder).write_text(json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    (folder / "coverage.md").write_text(table(results))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, a table for each kind of errors."""
    out = [
        "# Coverage of 95 % intervals",
        "",
        f"Made by `benchmarks/coverage.py` on {results['date']} ({results['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in sorted(results["versions"].items()))
        + "). Shares of simulations whose interval holds the truth; of 500, such a share has a standard error of .01.",
    ]
    for errors in ERRORS:
        rows = defaultdict(list)
        for (runs, method), cell in (
            ((runs, method), results["cells"].get(f"{runs} | {errors} | {method}")) for method, runs in product(METHODS, GRIDS)
        ):
            for limit, hits in (cell or {"hits": {}})["hits"].items():
                shares = {name: count / cell["simulations"] for name, count in hits.items()}
                effs = [share for name, share in shares.items() if name.startswith("eff.")]
                name = f"{method}, {limit}" if limit else method
                rows[name].append(
                    f"| {name} | {runs} | {cell['simulations']} | "
                    + " | ".join(f"{shares[p]:.3f}" for p in ("alpha", "beta", "E"))
                    + f" | {', '.join(f'{share:.3f}' for share in effs)} |"
                )
        head = "| interval | runs | simulations | α | β | E | eff, most bits first |"
        out += ["", f"## {errors.capitalize()} errors", "", head, "|---|---:|---:|---:|---:|---:|---|"]
        out += [line for lines in rows.values() for line in lines]
    for law, cell in sorted(results.get("late", {}).items()):
        shares = [f"{name} {hits / cell['simulations']:.3f}" for name, hits in cell["hits"].items()]
        out += [
            "",
            f"## Law {law}",
            "",
            f"{cell['runs']} runs, {cell['simulations']} simulations, {100 * LATE_NOISE:.2g} % of noise:",
        ]
        out += ["", f"{', '.join(shares)}."]
    return "\n".join(out) + "\n"


def main() -> None:
    """Measure what the options name and write coverage.json and coverage.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=SIMULATIONS)
    parser.add_argument("--runs", type=int, nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--errors", nargs="+", default=list(ERRORS), choices=ERRORS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--late", nargs="+", default=[], choices=list(LATE), help="only these laws of late quantization")
    options = parser.parse_args()
    for law in options.late:
        run_late(options.out, law, options.simulations)
    if options.late:
        return
    for runs, errors, method in product(options.runs, options.errors, options.methods):
        run(options.out, runs, method, errors, options.simulations)


if __name__ == "__main__":
    main()
