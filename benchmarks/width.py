"""How the best learning rate moves with the width of a model, with `model.base_width` and without it.

    questctl sweep width && python benchmarks/width.py [--runs runs]

For each width, recipe and seed the best rate is the vertex of a parabola in log(rate) through the three losses around the
least. The slope of log(best rate) over log(width) is 0 where the rate transfers. Its 95 % interval is that of a least-squares
line through all widths and seeds (Student's t). A cell whose least loss is at an end of the rates has no best rate.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from questctl.store import RunStore
from questctl.sweep.sweep_file import find_sweep_file, load_sweep_file


class Slope(NamedTuple):
    """Of log(best rate) over log(width), with its 95 % interval."""

    value: float
    low: float
    high: float


def best_rate(losses: Mapping[float, float]) -> float:
    """Loss by rate → the rate with the least loss; NaN if that is at an end of the rates."""
    known = sorted((rate, loss) for rate, loss in losses.items() if math.isfinite(loss))
    least = min(range(len(known)), key=lambda i: known[i][1], default=0)
    if not 0 < least < len(known) - 1:
        return math.nan
    x, y = (np.array(values) for values in zip(*known[least - 1 : least + 2], strict=True))
    curvature, slope, _ = np.polyfit(np.log(x), y, 2)
    return float(np.exp(-slope / (2 * curvature)))


def slope_over_width(best: Sequence[tuple[int, float]]) -> Slope:
    """Pairs of width and best rate, of all widths and seeds → the slope. NaN with fewer than three pairs or a single width."""
    pairs = [(d, rate) for d, rate in best if math.isfinite(rate)]
    if len(pairs) < 3 or len({d for d, _ in pairs}) < 2:
        return Slope(math.nan, math.nan, math.nan)
    x, y = np.log(np.array(pairs, float)).T
    x = x - x.mean()
    value = float(x @ y / (x @ x))
    rest = y - y.mean() - value * x
    half = float(stats.t.ppf(0.975, len(pairs) - 2)) * math.sqrt(rest @ rest / (len(pairs) - 2) / (x @ x))
    return Slope(value, value - half, value + half)


def losses_of(runs: Path) -> dict[tuple[str, int], dict[tuple[int, int], dict[float, float]]]:
    """Finished runs of the sweep: (recipe, base width) → (width, seed) → rate → validation loss."""
    store = RunStore(runs)
    found: dict[tuple[str, int], dict[tuple[int, int], dict[float, float]]] = {}
    for cell in load_sweep_file(find_sweep_file("width")).cells:
        c, run = cell.config, store.run(cell.run_id)
        if run.result_path.exists():
            recipe = found.setdefault((f"{c.optim.name} {c.scheme}", c.model.base_width), {})
            recipe.setdefault((c.model.d_model, c.train.seed), {})[c.optim.lr] = run.result().loss
    return found


def main() -> None:
    """Print the best rates, and how they move."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs")
    for (recipe, base), cells in sorted(losses_of(parser.parse_args().runs).items()):
        best = {at: best_rate(losses) for at, losses in cells.items()}
        s = slope_over_width([(d, rate) for (d, _), rate in best.items()])
        print(f"{recipe}, base width {base or 'none'}: slope {s.value:.2f} [{s.low:.2f}, {s.high:.2f}]")
        for (d, seed), rate in sorted(best.items()):
            least = min(cells[d, seed].values())
            where = f"{rate:.2e}" if math.isfinite(rate) else "at an end of the rates"
            print(f"  width {d:4d}, seed {seed}: best rate {where}, least loss {least:.4f}")


if __name__ == "__main__":
    main()
