"""Fit tables of runs with questctl and with what people use otherwise, side by side: objective and time, in one run.

    python benchmarks/fitter.py --data FOLDER [--chinchilla PYTHON] [--out PAGE.md]
    python benchmarks/fitter.py mine.csv --law chinchilla --map N=params [--objective huber:1e-3]

Every tool minimises the same sum over the same points, and all are compared by it, computed in this file:

    L = A/(N·eff)^α + B/D^β + E,    cost = Σ ρ(log L - log y),    ρ(r) = r²/2, or Huber's: δ|r| - δ²/2 beyond |r| = δ

`--data` is a folder with the public tables of CASES. They are not part of the repository; SOURCES says where they come from.
Seconds are those of the processor, which other programs on the machine change little. The tools:

    questctl         `fit_law`: starts by variable projection, one batched bounded solver
    curve_fit        scipy's, from one start, as a first script does it
    L-BFGS, grid     scipy's L-BFGS-B on log-sum-exp from a grid of starts (Hoffmann et al., arXiv 2203.15556, appendix D.3)
    chinchilla       the PyPI package, run by the interpreter that `--chinchilla` names; it has no schemes
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from questctl.analysis.points import Points

Array = np.ndarray
HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1])]
NAMES = ("A", "alpha", "B", "beta", "E")
# Hoffmann et al., appendix D.3: starts for α, β, log E, log A, log B
STARTS = ([0, 0.5, 1, 1.5, 2], [0, 0.5, 1, 1.5, 2], [-1, -0.5, 0, 0.5, 1], [0, 5, 10, 15, 20, 25], [0, 5, 10, 15, 20, 25])
EFF_START = 0.5  # of each scheme below full precision
FAST_S = 2.0  # a fit that takes longer is timed once
SAME = 1e-6  # relative difference below which two objectives are one


@dataclass(frozen=True)
class Case:
    """A table and the question asked of it. `published` are parameters (eff by scheme as `eff.w4a4`), or what else is known."""

    name: str
    file: str
    law: str
    source: str
    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    best_of: tuple[str, ...] = ()
    delta: float = math.inf
    published: Mapping[str, float] = field(default_factory=dict)
    said: str = "no parameters of this law are published for these runs"


QUEST = {  # the repository's vector, arXiv 2502.05003
    **{"A": math.exp(2.09605662), "alpha": 0.062726522, "B": math.exp(4.45912547), "beta": 0.241288351},
    **{"E": math.exp(-6.55478434), "eff.w1a1": 0.0205046859, "eff.w2a2": 0.151870911, "eff.w3a3": 0.433126203},
    **{"eff.w4a4": 0.691831718, "eff.w8a8": 1.01619263},
}
CASES = (
    Case(
        *(
            "QuEST's 104 runs",
            "quest_runs.csv",
            "quest",
            "IST-DASLab/QuEST, `for_plots/runs_for_scaling.json`, arXiv 2502.05003",
        ),
        published=QUEST,
        said="the repository's vector; eff of the formats that it does not hold is fitted with the rest held",
    ),
    Case(
        *(
            "Quartet's bf16 grid",
            "quartet_runs.csv",
            "chinchilla",
            "IST-DASLab/Quartet, `notebooks/plots.ipynb`, arXiv 2505.14669",
        ),
        where={"fwd": "BF16", "bwd": "BF16"},
        delta=1e-4,
        said="the notebook's fit of this law stops at an objective of 7.799e-6",
    ),
    Case(
        *("Gadre et al., RedPajama", "gadre_runs.csv", "chinchilla", "mlfoundations/scaling, `exp_data`, arXiv 2403.08540"),
        columns={"N": "N_noembed", "loss": "loss_openlm"},
        where={"dataset": "rpj"},
        delta=1e-3,
    ),
    Case(
        *("Gadre et al., C4", "gadre_runs.csv", "chinchilla", "mlfoundations/scaling, `exp_data`, arXiv 2403.08540"),
        columns={"N": "N_noembed", "loss": "loss_openlm"},
        where={"dataset": "c4_original"},
        delta=1e-3,
    ),
    Case(
        *("Step Law, best learning rate and batch", "steplaw_dense.csv", "chinchilla"),
        "step-law/steplaw, `data/dense_lr_bs_loss.csv`, arXiv 2503.04715",
        columns={"loss": "smooth_loss"},
        best_of=("lr", "batch_sequences"),
    ),
)
SOURCES = """| table | where to download it | published fit |
|---|---|---|
| QuEST's runs | <https://github.com/IST-DASLab/QuEST>, `for_plots/runs_for_scaling.json` (MIT) | in the same repository |
| Quartet's runs | <https://github.com/IST-DASLab/Quartet>, `notebooks/plots.ipynb` (MIT) | in the same notebook |
| over-trained models | <https://github.com/mlfoundations/scaling>, `exp_data` (MIT) | arXiv 2403.08540, another law |
| learning rates | <https://github.com/step-law/steplaw>, `data/dense_lr_bs_loss.csv` | arXiv 2503.04715, another law |
| Chinchilla | <https://github.com/epoch-research/analyzing-chinchilla> | arXiv 2404.10102: α .3473, β .3672, E 1.8172 |
| Gemstones | the repository that arXiv 2502.06857 names | "hot": α .2989, β .6928, log A 5.457, log B 14.97, E .766 |
"""


# ---------------------------------------------------------------------------------------------------- the common objective


@dataclass(frozen=True)
class Data:
    """What every tool gets: (n,) arrays, the scheme of each point as a place in `labels`, whose first is the reference."""

    N: Array
    D: Array
    loss: Array
    group: Array
    labels: tuple[str, ...]

    def predicted(self, p: Mapping[str, float]) -> Array:
        """(n,) the law at these parameters."""
        eff = np.array([p.get(f"eff.{label}", 1.0) for label in self.labels])[self.group]
        with np.errstate(over="ignore", invalid="ignore"):
            return p["A"] / (self.N * eff) ** p["alpha"] + p["B"] / self.D ** p["beta"] + p["E"]

    def cost(self, p: Mapping[str, float], delta: float) -> float:
        """The sum by which all fits are compared."""
        size = np.abs(np.log(self.predicted(p)) - np.log(self.loss))
        return float(np.sum(np.where(size <= delta, size**2 / 2, 0 if math.isinf(delta) else delta * (size - delta / 2))))


def named(theta: Array, labels: Sequence[str]) -> dict[str, float]:
    """Parameters from (α, β, log E, log A, log B, log eff of each scheme but the first)."""
    alpha, beta, e, a, b, *effs = map(float, theta)
    shared = dict(zip(NAMES, (math.exp(a), alpha, math.exp(b), beta, math.exp(e)), strict=True))
    return shared | {f"eff.{label}": math.exp(x) for label, x in zip(labels[1:], effs, strict=True)}


# ---------------------------------------------------------------------------------------------------- the tools


def ours(points: Points, law: str, delta: float) -> dict[str, float]:
    """questctl."""
    from questctl.analysis import fit_law

    fit = fit_law(points, law, objective=None if math.isinf(delta) else delta)
    shared = {k: float(v) for k, v in fit.params.items() if v is not None}
    return shared | {f"eff.{k}": float(v) for k, v in fit.eff.items() if v is not None}


def by_curve_fit(data: Data, delta: float) -> dict[str, float]:
    """scipy.optimize.curve_fit of log losses, from the parameters of Hoffmann et al. as the one start."""
    from scipy.optimize import curve_fit

    def law(_: Any, *theta: float) -> Array:
        with np.errstate(all="ignore"):
            return np.log(data.predicted(named(np.array(theta), data.labels)))

    start = [0.34, 0.28, math.log(1.69), math.log(406.4), math.log(410.7), *[math.log(EFF_START)] * (len(data.labels) - 1)]
    how: dict[str, Any] = {} if math.isinf(delta) else {"method": "trf", "loss": "huber", "f_scale": delta}
    with np.errstate(all="ignore"):
        theta, _ = curve_fit(law, data.N, np.log(data.loss), p0=start, maxfev=20_000, **how)
    return named(theta, data.labels)


def log_sum_exp_objective(data: Data, delta: float) -> Callable[[Array], tuple[float, Array]]:
    """(α, β, log E, log A, log B, log eff of each scheme but the first) → the common sum and its gradient."""
    from scipy.special import logsumexp

    log_N, log_D, log_y = np.log(data.N), np.log(data.D), np.log(data.loss)
    member = (data.group[:, None] == np.arange(1, len(data.labels))).astype(float)  # (n, schemes - 1)

    def objective(theta: Array) -> tuple[float, Array]:
        alpha, beta, e, a, b = theta[:5]
        log_Neff = log_N + member @ theta[5:]
        terms = np.stack([a - alpha * log_Neff, b - beta * log_D, np.full_like(log_N, e)])
        log_L = logsumexp(terms, axis=0)
        by_N, by_D, by_E = np.exp(terms - log_L)  # ∂ log L / ∂ term
        r = log_L - log_y
        size = np.abs(r)
        cost = np.sum(np.where(size <= delta, r * r / 2, 0 if math.isinf(delta) else delta * (size - delta / 2)))
        slope = np.clip(r, -delta, delta)
        shared = [-by_N * log_Neff, -by_D * log_D, by_E, by_N, by_D]
        return float(cost), np.concatenate([[slope @ column for column in shared], (-alpha * slope * by_N) @ member])

    return objective


def by_grid(data: Data, delta: float, count: int) -> dict[str, float]:
    """L-BFGS-B with the gradient from `count` starts spread over the published grid, the lowest kept.

    scipy stops where the sum falls by less than `ftol` in absolute terms if the sum is below 1, as it is here. Its default of
    2e-9 would stop far above the minimum.
    """
    from scipy.optimize import minimize

    objective = log_sum_exp_objective(data, delta)
    grid = list(itertools.product(*STARTS))
    chosen = [grid[i] for i in np.linspace(0, len(grid) - 1, min(count, len(grid))).astype(int)]
    effs = [math.log(EFF_START)] * (len(data.labels) - 1)
    tight = {"ftol": 1e-16, "gtol": 1e-10, "maxiter": 2000}
    fits = (minimize(objective, [*start, *effs], jac=True, method="L-BFGS-B", options=tight) for start in chosen)
    return named(min(fits, key=lambda fit: fit.fun).x, data.labels)


PACKAGE = """
import json, sys, tempfile, time
import numpy as np, pandas as pd
from pathlib import Path
from chinchilla import Chinchilla
asked = json.load(sys.stdin)
N, D, loss, delta = (np.array(asked[k]) for k in ("N", "D", "loss", "delta"))
def rho(y, L):
    r = np.abs(np.log(L) - np.log(y))
    return np.where(r <= delta, r * r / 2, delta * (r - delta / 2)) if delta else r * r / 2
with tempfile.TemporaryDirectory() as folder:
    pd.DataFrame({"C": 6 * N * D, "N": N, "D": D, "loss": loss}).to_csv(Path(folder) / "df.csv", index=False)
    begun = time.process_time()
    grid = {k: tuple(map(float, v)) for k, v in asked["grid"].items()}
    seeds = {k: (float(v.min()), float(v.max())) for k, v in {"C": 6 * N * D, "N_to_D": D / N}.items()}
    c = Chinchilla(folder, param_grid=grid, loss_fn=rho, log_level=40, seed_ranges=seeds)
    c.fit(parallel=False)
    seconds = time.process_time() - begun
from importlib.metadata import version
found = {k: float(getattr(c, k)) for k in ("A", "alpha", "B", "beta", "E")}
print("\\n" + json.dumps({"params": found, "seconds": seconds, "version": version("chinchilla")}))
"""


def by_package(data: Data, delta: float, python: str, thin: int) -> tuple[dict[str, float], float]:
    """The PyPI package in its own interpreter, from the same grid with every `thin`-th value; parameters and seconds."""
    grid = dict(zip(("alpha", "beta", "e", "a", "b"), (values[::thin] for values in STARTS), strict=True))
    asked = {
        **{"N": data.N.tolist(), "D": data.D.tolist(), "loss": data.loss.tolist()},
        **{"delta": 0 if math.isinf(delta) else delta, "grid": {k: grid[k] for k in ("e", "a", "b", "alpha", "beta")}},
    }
    done = subprocess.run([python, "-c", PACKAGE], input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--chinchilla {python}: the package did not fit: {done.stderr.strip().splitlines()[-1]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return answer["params"], answer["seconds"]


# ---------------------------------------------------------------------------------------------------- one table


def compare(points: Points, case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each tool: objective, median seconds (None: not ours to time), rounds, parameters.

    Tools take turns, forwards and backwards; one that takes longer than FAST_S is timed once.
    """
    data = Data(points.N, points.D, points.loss, points.group, points.labels)
    tools: dict[str, Callable[[], dict[str, float]]] = {
        "questctl": partial(ours, points, case.law, case.delta),
        "curve_fit, one start": partial(by_curve_fit, data, case.delta),
        f"L-BFGS, {options.starts:,} starts": partial(by_grid, data, case.delta, options.starts),
    }
    params: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    failed: dict[str, str] = {}
    tools["questctl"]()  # imports
    for turn in range(options.rounds):
        for name in list(tools)[:: -1 if turn % 2 else 1]:
            if name in failed or (seconds[name] and seconds[name][0] > FAST_S):
                continue
            begun = time.process_time()
            try:
                params[name] = tools[name]()
            except (RuntimeError, ValueError, FloatingPointError) as error:  # curve_fit's words for no convergence
                failed[name] = str(error).splitlines()[0]
                continue
            seconds[name].append(time.process_time() - begun)
    if options.chinchilla and len(data.labels) == 1:
        name = "chinchilla (PyPI)"
        params[name], took = by_package(data, case.delta, options.chinchilla, options.thin)
        seconds[name] = [took]
    rows = []
    if case.published:
        from questctl.analysis import evaluate

        fit = evaluate(points, case.law, case.published, objective=None if math.isinf(case.delta) else case.delta)
        held = {k: float(v) for k, v in fit.params.items() if v is not None}
        held |= {f"eff.{k}": float(v) for k, v in fit.eff.items() if v is not None}
        rows.append(
            {"tool": "published", "objective": data.cost(held, case.delta), "seconds": None, "rounds": 0, "params": held}
        )
    for name in (*tools, *(n for n in params if n not in tools)):
        if name in failed:
            rows.append({"tool": name, "objective": None, "seconds": None, "rounds": 0, "params": {}, "failed": failed[name]})
        else:
            cost, times = data.cost(params[name], case.delta), seconds[name]
            row = {"tool": name, "objective": cost, "seconds": statistics.median(times), "rounds": len(times)}
            rows.append({**row, "params": params[name]})
    return rows


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who is lowest and who is fastest, of the tools that gave a fit; ties within SAME are ties."""
    fitted = [row for row in rows if row["objective"] is not None]
    mine = next(row for row in fitted if row["tool"] == "questctl")
    least = min(row["objective"] for row in fitted)
    lower = [row["tool"] for row in fitted if row["objective"] < mine["objective"] * (1 - SAME)]
    equal = [r["tool"] for r in fitted if r is not mine and abs(r["objective"] / mine["objective"] - 1) <= SAME]
    if lower:
        above = mine["objective"] / least - 1
        said = f"**A lower objective is reached by {' and '.join(lower)}**; questctl is {100 * above:.2g} % above it."
    else:
        said = "No tool reaches a lower objective than questctl" + (
            f"; the same is reached by {' and '.join(equal)}." if equal else "."
        )
    faster = [row for row in fitted if row["seconds"] is not None and row["seconds"] < mine["seconds"]]
    for row in faster:
        said += f" **{row['tool']} is faster**, by a factor of {mine['seconds'] / row['seconds']:.2g}."
    return said


def section(case: Case, points: Points, rows: Sequence[Mapping[str, Any]]) -> str:
    """The part of the page on one table."""
    mine = next(row for row in rows if row["tool"] == "questctl")
    least = min(row["objective"] for row in rows if row["objective"] is not None)
    rho = "least squares" if math.isinf(case.delta) else f"Huber, δ = {case.delta:g}"
    schemes = "1 scheme" if len(points.labels) == 1 else f"{len(points.labels)} schemes"
    shown = ("alpha", "beta", "E", *[f"eff.{label}" for label in points.labels[1:]][:3])
    lines = [
        f"## {case.name}",
        "",
        f"{len(points)} runs, {schemes}; law `{case.law}`, {rho} of log losses. Source: {case.source}. Published: {case.said}.",
        "",
        f"| tool | objective | above the lowest | seconds | times questctl | {' | '.join(shown)} |",
        "|---|" + "---:|" * (4 + len(shown)),
    ]
    for row in rows:
        if row["objective"] is None:
            lines.append(f"| {row['tool']} | failed: {row['failed']} |" + " |" * (3 + len(shown)))
            continue
        took = ("–", "–") if row["seconds"] is None else (f"{row['seconds']:.3g}", f"{row['seconds'] / mine['seconds']:.2g}")
        values = [f"{row['params'][name]:.4g}" if name in row["params"] else "–" for name in shown]
        above = f"{100 * (row['objective'] / least - 1):.2g} %"
        lines.append("| " + " | ".join([row["tool"], f"{row['objective']:.7g}", above, *took, *values]) + " |")
    return "\n".join([*lines, "", verdict(rows), ""])


# ---------------------------------------------------------------------------------------------------- the page


def machine() -> str:
    """The processor, cores and versions that the times belong to."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    load = os.getloadavg()[0]
    installed = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy"))
    return (
        f"{model}, {os.cpu_count()} cores, load {load:.1f} at the start, Python {platform.python_version()}, {installed}, "
        f"{date.today().isoformat()}"
    )


def shared() -> str:
    """Whether other programs were running, which can raise even seconds of the processor."""
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    return "Other programs kept its cores busy, so compare times only within a table." if busy else "It had idle cores."


HEAD = """# The fitter beside others

`make bench-fit CHINCHILLA=PYTHON` makes it. All tools minimise the same sum over the same points, and the script computes that
sum for all of them. Tools take turns in one process. Seconds are those of one processor, the median of up to {rounds} rounds;
what takes longer than {fast:g} s is timed once.

Machine: {machine}. {shared}

* **questctl** starts by variable projection and continues with one batched bounded solver. Times include no interval.
* **curve_fit** is scipy's, on log losses from one start, the parameters of Hoffmann et al. (arXiv 2203.15556).
* **L-BFGS** is scipy's, on log-sum-exp with its gradient, from {starts:,} of the 4,500 starts in their appendix D.3. With its
  default tolerance it would stop far above the minimum of so small a sum; here the tolerance is tight. All starts would take
  {more:.0f} times as long.
* **chinchilla** is the PyPI package, which fits one scheme: {package}.

"""


def load(case: Case, folder: Path) -> Points:
    """The points of a case. Raises DataError with row and column."""
    from questctl.analysis.tables import TableOptions
    from questctl.scaling.sources import load_sources

    path = folder / case.file
    return load_sources(path, columns=case.columns, where=case.where, options=TableOptions(best_of=case.best_of)).points


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the tools on each table; print the page, or write it. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nSources of the tables:\n\n{SOURCES}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", type=Path, metavar="TABLE", help="tables of your own, beside or without --data")
    parser.add_argument("--data", type=Path, help="folder with the public tables")
    parser.add_argument("--law", default="chinchilla", choices=("chinchilla", "quest"), help="law for your own tables")
    parser.add_argument("--map", action="append", default=[], metavar="OURS=THEIRS", help="columns of your own tables")
    parser.add_argument("--objective", default="lsq", help="lsq or huber:DELTA, for your own tables")
    parser.add_argument("--starts", type=int, default=32, help="starts of L-BFGS, of the 4,500 published")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chinchilla", metavar="PYTHON", help="an interpreter that has the PyPI package chinchilla")
    parser.add_argument("--thin", type=int, default=2, help="every THIN-th value of each axis of the grid for that package")
    parser.add_argument("--out", type=Path, help="file for the page (default: print it)")
    options = parser.parse_args(arguments)
    from questctl.analysis.objective import objective_from
    from questctl.errors import QuestError

    cases = [(case, options.data) for case in CASES] if options.data else []
    delta = objective_from(options.objective).delta
    columns = dict(pair.partition("=")[::2] for pair in options.map)
    cases += [
        (Case(path.stem, path.name, options.law, f"`{path.name}`", columns, delta=delta, said="yours to say"), path.parent)
        for path in options.tables
    ]
    if not cases:
        return refuse("give --data FOLDER with the public tables, or tables of your own; --help lists where to download them")
    missing = [str(folder / case.file) for case, folder in cases if not (folder / case.file).is_file()]
    if missing:
        return refuse(f"{missing[0]}: there is no such table; public ones are not in the repository (--help has their sources)")
    package = "not in this run"
    if options.chinchilla:
        package = f"run once from {grid_size(options.thin):,} of those starts, with its own BFGS, in an environment of its own"
    head = HEAD.format(
        **{"rounds": options.rounds, "fast": FAST_S, "machine": machine(), "shared": shared(), "package": package},
        **{"starts": options.starts, "more": grid_size(1) / options.starts},
    )
    parts = []
    for case, folder in cases:
        try:
            points = load(case, folder)
        except QuestError as error:
            return refuse(str(error))
        parts.append(section(case, points, compare(points, case, options)))
        print(parts[-1], flush=True)
    page = head + "\n".join(parts) + "\n## Tables that anyone can download\n\n" + SOURCES
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    return 0


def grid_size(thin: int) -> int:
    """How many starts are left of the published grid."""
    return math.prod(len(values[::thin]) for values in STARTS)


def refuse(why: str) -> int:
    """One sentence on stderr and the exit status of usage errors."""
    print(f"error: {why.removesuffix('.')}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
