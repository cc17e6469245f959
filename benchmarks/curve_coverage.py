"""Measure how often 95 % intervals of laws of curves hold the truth, with errors that neighbours on a curve share.

    python benchmarks/curve_coverage.py [--simulations N] [--noise SD] [--correlation RHO]

Each simulation draws a cosine, a constant and a warm-up-stable-decay curve from a planted multi-power law with AR(1) errors of
log loss, fits the law without a ridge, and asks for the end of a schedule that was not fitted whether the interval of the law's
loss holds its true value, and whether that of a new run holds a new measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import numpy as np

from questctl.analysis.curve_fit import fit_curves
from questctl.analysis.curve_laws import MultiPower, Scales, curve_design
from questctl.analysis.curves import Curve, Rates
from questctl.scaling.curves import parse_schedule

FITTED = ("cosine:lr=.003,steps=2000,final=.1", "constant:lr=.003,steps=2000", "wsd:lr=.003,steps=1500,decay=.3,final=.05")
TARGET = "wsd:lr=.003,steps=2500,decay=.2"
TRUTH = {"A": 0.5, "alpha": 0.5, "L0": 2.9, "B": 0.12, "C": 900.0, "beta": 0.5, "gamma": 0.5}
EVERY = 20  # steps between rows


def true_loss(rates: Rates, steps: np.ndarray, scales: Scales) -> np.ndarray:
    """The planted law at steps of a schedule."""
    law = MultiPower()
    theta = np.array([p.internal(TRUTH[p.name]) for p in law.shared])
    return law.predict(theta, curve_design([rates], [steps], scales))[0]


def main() -> None:
    """Print the two shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--noise", type=float, default=4e-3)
    parser.add_argument("--correlation", type=float, default=0.9)
    args = parser.parse_args()
    rates = [parse_schedule(text) for text in FITTED]
    steps = [np.arange(EVERY, r.step[-1] + 1, EVERY) for r in rates]
    scales = Scales.of(rates, [float(s[-1]) for s in steps])
    exact = [
        Curve(f"c{i}", s, r.rate_at(s), true_loss(r, s, scales), r, int(np.searchsorted(s, r.step[r.warmup])))
        for i, (r, s) in enumerate(zip(rates, steps, strict=True))
    ]
    target = parse_schedule(TARGET)
    end = target.step[-1:]
    wanted = float(true_loss(target, end, scales)[0])
    of_law = of_run = 0
    for seed in range(args.simulations):
        rng = np.random.default_rng(seed)
        noisy = []
        for curve in exact:
            errors = rng.normal(0, args.noise, len(curve))
            for i in range(1, len(errors)):
                errors[i] = args.correlation * errors[i - 1] + math.sqrt(1 - args.correlation**2) * errors[i]
            noisy.append(dataclasses.replace(curve, loss=curve.loss * np.exp(errors)))
        fit = fit_curves(noisy, ridge=0.0)
        low, high = fit.interval(target, end, new_run=False)
        of_law += bool(low[0] <= wanted <= high[0])
        low, high = fit.interval(target, end)
        of_run += bool(low[0] <= wanted * math.exp(rng.normal(0, args.noise)) <= high[0])
    n = args.simulations
    print(f"{n} simulations: the law's loss {of_law / n:.1%}, a new run {of_run / n:.1%}")


if __name__ == "__main__":
    main()
