"""Forecasts of runs: the curve that a fitted law predicts, its end with an interval, and a picture of both.

    fits = fit_kinds(curves);  forecast_curve(fits[kind(curve)], curve, curve.rates).loss

Runs of the same size and scheme share one law, which is fitted to their curves so far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .charts import TRAINING_LOSS, Axis, Chart, Series, View
from .curve_fit import CurveFit, fit_curves, saw_a_fall
from .curves import Curve, Rates
from .laws import LawError
from .tables import PointError

LEVEL = 0.9  # of the intervals
SHOWN = 200  # points of a predicted curve
UNFINISHED = 0.98  # share of the steps from which a run counts as finished, since its last line is a mean over steps


@dataclasses.dataclass(frozen=True)
class RunForecast:
    """The forecast of one run: `loss` (nats/token) at the end of its `steps`, and its 90 % `interval`.

    `step`, `predicted`, `low` and `high` (n,) are the curve from after the warm-up to the end. `seen` is the share of the steps
    done. `falls` says whether any fitted curve shows the gain of a fall of the rate.
    """

    run: str
    steps: float
    seen: float
    loss: float
    interval: tuple[float, float]
    fit: CurveFit
    falls: bool
    curve: Curve
    step: np.ndarray
    predicted: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def sentences(self) -> list[str]:
        """The forecast and its caveats."""
        low, high = self.interval
        of = len(self.fit.curves)
        out = [
            f"{self.run}: {self.loss:.4f} [{low:.4f}, {high:.4f}] nats/token of {self.curve.of} loss at step {self.steps:,.0f} "
            f"({self.fit.law.name}, {of} curve{'s' if of > 1 else ''}, {100 * min(self.seen, 1):.0f} % of the steps seen)."
        ]
        if not self.falls:
            out.append(f"No curve shows a fall of its rate: what one gains is that of {self.fit.law.prior_source}.")
        if self.steps > 4 * max(curve.steps for curve in self.fit.curves):
            out.append("The length is more than four times that of the longest curve.")
        return out

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        arrays = {name: getattr(self, name).tolist() for name in ("step", "predicted", "low", "high")}
        about = {
            "run": self.run,
            "of": self.curve.of,
            "steps": self.steps,
            "seen": self.seen,
            "loss": self.loss,
            "interval": list(self.interval),
        }
        return {**about, "falls": self.falls, "fit": self.fit.to_dict(), "curve": arrays}


def kind(curve: Curve) -> tuple[Any, ...]:
    """Equal for curves that share a law: N and scheme, if the source gives them."""
    return (curve.N if curve.N == curve.N else None, curve.scheme)


def unfinished(curve: Curve) -> bool:
    """Whether the run has steps left."""
    return curve.steps < UNFINISHED * float(curve.rates.step[-1])


def forecast_curve(fit: CurveFit, curve: Curve, rates: Rates) -> RunForecast:
    """The forecast of a run like `curve` with this schedule. Raises PointError if nothing follows the warm-up."""
    end = float(rates.step[-1])
    step = np.linspace(float(rates.step[rates.warmup]) + 1, end, SHOWN)
    if step[0] >= step[-1]:
        raise PointError(f"{curve.name}: the schedule ends with its warm-up, at step {end:g}.")
    predicted = fit.predict(rates, step, curve)
    low, high = fit.interval(rates, step, curve, level=LEVEL)
    ends = (float(low[-1]), float(high[-1]))
    fell = saw_a_fall(fit)
    return RunForecast(
        curve.name,
        end,
        curve.steps / end if len(curve) else 0.0,
        float(predicted[-1]),
        ends,
        fit,
        fell,
        curve,
        step,
        predicted,
        low,
        high,
    )


def forecast_unfinished(curves: Sequence[Curve], most: int) -> tuple[RunForecast, ...]:
    """Forecasts of the first `most` unfinished runs by the multi-power law; those that it cannot fit are left out."""
    fits: dict[tuple[Any, ...], CurveFit | None] = {}
    out = []
    for curve in [c for c in curves if unfinished(c)][:most]:
        key = kind(curve)
        if key not in fits:
            try:
                fits[key] = fit_curves([c for c in curves if kind(c) == key])
            except (PointError, LawError):
                fits[key] = None
        if (fit := fits[key]) is not None:
            out.append(forecast_curve(fit, curve, curve.rates))
    return tuple(out)


def chart(forecasts: Sequence[RunForecast], *, apart: bool = False) -> Chart:
    """The measured curves, the predicted ones and their bands, in one view, or `apart`; each is in the style of its run."""
    groups = []
    for run in forecasts:
        first = run.curve.first
        measured = (run.curve.step[first:], run.curve.loss[first:])
        groups.append(
            (
                Series(run.run, "band", run.step, run.predicted, run.run, low=run.low, high=run.high, listed=not apart),
                Series(f"{run.run}, forecast", "line", run.step, run.predicted, run.run),
                Series(f"{run.run}, measured", "points", *measured, run.run, hollow=True),
            )
        )
    axes = (Axis("step"), Axis(TRAINING_LOSS))
    if apart:
        views = tuple(View(group, *axes, {"Run": run.run}) for group, run in zip(groups, forecasts, strict=True))
    else:
        views = (View(tuple(series for group in groups for series in group), *axes),)
    return Chart("forecast", "Where they will end", f"Measured curves, forecasts and their {LEVEL:.0%} intervals.", views)
