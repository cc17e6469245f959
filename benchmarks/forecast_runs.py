"""Measure how well runs are forecast at 40 % of their steps: 60 small runs of four precisions, three lengths and five rates.

    python benchmarks/forecast_runs.py --runs runs/forecasts [--out benchmarks/results/forecasts.md]

Each run (27K parameters, warm-up-stable-decay) is cut at 40 % of its steps, where no rate has fallen yet, and forecast twice:
beside the finished runs of its scheme with the other lengths or rates, and alone, where what a fall gains is the prior's.
What is forecast is the validation loss, and the training loss. The end of the second is the mean of the lines of the last 2 %
of the steps. It is known to some 2 % only, because each step has other text. Finished runs are not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import questctl
from questctl.analysis.curve_fit import fit_curves
from questctl.analysis.curves import LOSSES, VALIDATION, Curve
from questctl.analysis.forecasts import forecast_curve
from questctl.kernels.devices import device_name
from questctl.scaling.curves import load_curves
from questctl.sweep import LauncherOptions

SEEN = 0.4
SWEEP = """
name = "forecasts"
[base]
preset = "laptop-27K"
data.source = "pystdlib:clean"
optim.schedule = "wsd"
optim.warmup_steps = 20
train.log_every = 4
train.eval_every = 4
train.eval_tokens = 8192
[matrix]
scheme = [{ quant.method = "bf16" }, { quant.method = "quest", quant.bits = [4, 2, 1] }]
train.steps = [384, 640, 1024]
optim.lr = [1e-3, 2e-3, 4e-3, 6e-3, 8e-3]
"""


def final_loss(curve: Curve) -> float:
    """The last validation loss; of training losses the mean over the last 2 % of the steps."""
    if curve.of == VALIDATION:
        return float(curve.loss[-1])
    return float(curve.loss[curve.step >= 0.98 * curve.rates.step[-1]].mean())


def table(curves: Sequence[Curve]) -> list[str]:
    """Its rows for the curves of one kind of loss."""
    rows: dict[tuple[str, str], list[tuple[float, bool, float]]] = {}
    for curve in curves:
        others = [c for c in curves if c.scheme == curve.scheme and c is not curve]
        cut = curve.until(SEEN * float(curve.rates.step[-1]))
        for how, beside in (("beside finished runs", others), ("alone", [])):
            forecast = forecast_curve(fit_curves([cut, *beside]), cut, curve.rates)
            measured, (low, high) = final_loss(curve), forecast.interval
            held = low <= measured <= high
            rows.setdefault((how, str(curve.scheme)), []).append((forecast.loss / measured - 1, held, (high - low) / measured))
    lines = []
    for how in ("beside finished runs", "alone"):
        mine = [(scheme, found) for (h, scheme), found in rows.items() if h == how]
        for scheme, found in [*mine, ("all", [row for _, some in mine for row in some])]:
            error, held, width = (np.array(column) for column in zip(*found, strict=True))
            lines.append(
                f"| {curves[0].of} | {how} | {scheme} | {len(error)} "
                f"| {np.median(np.abs(error)):.2%} | {np.abs(error).max():.2%} | {held.mean():.0%} | {np.median(width):.2%} |"
            )
    return lines


def main() -> None:
    """Train what is missing, forecast, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    file = args.runs.parent / f"{args.runs.name}.toml"
    file.write_text(SWEEP, encoding="utf-8")
    questctl.run_sweep(file, runs=args.runs, launcher=LauncherOptions(jobs=args.jobs), record=False)
    lines = [
        f"60 runs of 27K parameters, forecast at {SEEN:.0%} of their steps; {device_name(torch.device('cpu'))}.",
        "",
        "| loss | forecast | scheme | runs | median error | largest error | 90 % interval holds | median width |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for loss in reversed(LOSSES):
        lines += table(load_curves(args.runs, loss=loss).curves)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text("# Forecasts at 40 % of a run\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
