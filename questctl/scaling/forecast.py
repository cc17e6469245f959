"""Forecast the curve and the final loss of a run, for its schedule, another one or another length, with an interval.

    questctl.forecast("runs").runs[0].loss
    questctl.forecast("curves.csv", schedule="wsd:decay=.2", steps=48_000)
    questctl.forecast("runs", law="joint", schedule="wsd", N=1e6, scheme="quest-w4a4")

Curves of the same size and scheme as the run are fitted together with what the run has shown so far; law `joint` takes all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, UsageError
from ..words import few
from .curves import Curves, load_curves, parse_schedule
from .sources import Paths, analysis_errors

if TYPE_CHECKING:
    import numpy as np

    from ..analysis.curve_fit import CurveFit
    from ..analysis.curve_laws import CurveLaw
    from ..analysis.curves import Curve, Rates
    from ..config import OptimConfig

LEVEL = 0.9
SHOWN = 200  # points of a predicted curve
FIGURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class RunForecast:
    """What is forecast of one run: `loss` (nats/token) at the end of its `steps` and its 90 % `interval`.

    `step`, `predicted`, `low` and `high` (n,) are the curve from after the warm-up to the end. `seen` is the share of the steps
    that the run has behind it. `falls` says whether any fitted curve shows what a fall of the rate gains.
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
        """The forecast, and what speaks against it."""
        low, high = self.interval
        of = len(self.fit.curves)
        out = [
            f"{self.run}: {self.loss:.4f} [{low:.4f}, {high:.4f}] nats/token of training loss at step {self.steps:,.0f} "
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
        about = {"run": self.run, "steps": self.steps, "seen": self.seen, "loss": self.loss, "interval": list(self.interval)}
        return {**about, "falls": self.falls, "fit": self.fit.to_dict(), "curve": arrays}


@dataclass(frozen=True)
class Forecast:
    """The forecasts, by name of the run, and the runs without a curve, each with the reason."""

    runs: tuple[RunForecast, ...]
    left_out: tuple[Any, ...]

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        return {"runs": [run.to_dict() for run in self.runs], "left_out": [dataclasses.asdict(each) for each in self.left_out]}


def forecast(
    sources: Paths = None,
    *,
    run: str | None = None,
    schedule: str | None = None,
    steps: int | None = None,
    law: str = "multi-power",
    given: str | None = None,
    columns: Mapping[str, str] | None = None,
    N: float | None = None,
    scheme: str | None = None,
    out: str | Path | None = None,
) -> Forecast:
    """Forecast runs that are not finished, or the `run` named; with `schedule` or `steps`, a run of each kind with these.

    `schedule`: `wsd:decay=.2`, `cosine:lr=3e-4,steps=24000`; what it leaves out is that of the run. `law`: multi-power,
    momentum, power or joint. `given` is the schedule of files without a column of rates. `N` (parameters) and `scheme` are of
    another model, which law joint can forecast. `out` is a file for the picture (.png .svg .pdf).
    Where all runs are finished and nothing is asked for, each is forecast at its own end.
    Raises UsageError for an unknown law, schedule, run or kind of picture, DataError for curves that cannot be read or fitted.
    """
    known, loaded = _load(sources, run, law, given, columns, out)
    wanted = [c for c in loaded.curves if run in (None, c.name)]
    if N is not None or scheme is not None:
        wanted = [_other_model(wanted[0], loaded.curves, known, N, scheme)]
    if run is None and (unfinished := [c for c in wanted if c.steps < 0.98 * c.rates.step[-1]]):
        wanted = unfinished
    if run is None and (schedule or steps):
        wanted = list({_kind(curve): curve for curve in reversed(wanted)}.values())[::-1]
    fits: dict[Any, CurveFit] = {}
    forecasts = []
    for curve in wanted:
        key = None if known.uses_scheme else _kind(curve)
        if key not in fits:
            with analysis_errors():
                fits[key] = _fit([c for c in loaded.curves if key is None or _kind(c) == key], law)
        forecasts.append(forecast_curve(fits[key], curve, _rates(curve, schedule, steps)))
    result = Forecast(tuple(forecasts), loaded.left_out)
    if out is not None:
        draw(result, Path(out))
    return result


def fit_kind(
    sources: Paths,
    *,
    run: str | None,
    law: str,
    given: str | None,
    columns: Mapping[str, str] | None,
    out: str | Path | None,
) -> tuple[CurveFit, Curve]:
    """The law of the runs like `run`, and its curve. Raises UsageError where no run is named and there are several kinds."""
    known, loaded = _load(sources, run, law, given, columns, out)
    curve = next(c for c in loaded.curves if run in (None, c.name))
    alike = [c for c in loaded.curves if known.uses_scheme or _kind(c) == _kind(curve)]
    if run is None and any(_kind(c) != _kind(curve) for c in loaded.curves):
        raise UsageError(f"the curves are of several sizes or schemes: name one by --run; choices: {few(_names(loaded), 8)}.")
    with analysis_errors():
        return _fit(alike, law), curve


def _load(
    sources: Paths,
    run: str | None,
    law: str,
    given: str | None,
    columns: Mapping[str, str] | None,
    out: str | Path | None,
) -> tuple[CurveLaw, Curves]:
    """The law and the curves, checked before anything is fitted."""
    from ..analysis.curve_laws import get_curve_law

    if out is not None and Path(out).suffix not in FIGURES:
        raise UsageError(f"--out {out}: a picture ends in one of {', '.join(FIGURES)}.")
    with analysis_errors():
        known = get_curve_law(law)
    loaded = load_curves(sources, columns=columns, schedule=given)
    if run is not None and run not in _names(loaded):
        raise UsageError(f"no curve is called '{run}'; choices: {few(_names(loaded), 8)}.")
    return known, loaded


def _names(loaded: Curves) -> list[str]:
    return [curve.name for curve in loaded.curves]


def _other_model(like: Curve, curves: Sequence[Curve], law: CurveLaw, N: float | None, scheme: str | None) -> Curve:
    """A run like `like` of another size or scheme. Raises UsageError where the law does not know of these, or of the scheme."""
    if not law.uses_scheme:
        raise UsageError(f"--law {law.name}: is of one size and scheme; another N or scheme needs --law joint.")
    schemes = sorted({c.scheme or "bf16" for c in curves})
    if scheme is not None and scheme not in schemes:
        raise UsageError(f"--scheme {scheme}: no curve is of it; choices: {few(schemes, 8)}.")
    if N is not None and not 0 < N < math.inf:
        raise UsageError(f"--N {N:g}: must be a positive number of parameters.")
    scheme, N = scheme or like.scheme, like.N if N is None else N
    same = [c for c in curves if _kind(c) == (N, scheme)]
    return same[0] if same else dataclasses.replace(like.until(-1), name=f"N={N:.4g} {scheme}", N=N, scheme=scheme, first=0)


def _kind(curve: Curve) -> tuple[Any, ...]:
    """What curves of one law share: N and scheme, where the source says them."""
    return (curve.N if curve.N == curve.N else None, curve.scheme)


def _fit(curves: list[Curve], law: str) -> CurveFit:
    from ..analysis.curve_fit import fit_curves

    return fit_curves(curves, law)


def _rates(curve: Curve, schedule: str | None, steps: int | None) -> Rates:
    """The schedule to forecast: the run's, or the one asked for, with the run's values for what it leaves out."""
    own = curve.rates
    length = int(steps or own.step[-1])
    if schedule is None and steps is None:
        return own
    if schedule is None:
        if length <= own.step[-1]:
            raise UsageError(f"--steps {length}: a shorter run needs its schedule, such as --schedule cosine.")
        if own.lr[-1] < own.peak:
            raise UsageError(f"--steps {length}: a longer run needs its schedule, such as --schedule cosine.")
        schedule = "constant"
    return parse_schedule(schedule, like_run(curve, length), length)


def like_run(curve: Curve, length: int) -> OptimConfig:
    """What schedules of `length` steps take from a run: its peak rate and its warm-up."""
    from ..config import OptimConfig

    own = curve.rates
    warmup = min(float(own.step[own.warmup]), length)
    return OptimConfig(lr=own.peak, warmup_frac=0.0, warmup_steps=warmup, final_factor=0.1)


def forecast_curve(fit: CurveFit, curve: Curve, rates: Rates) -> RunForecast:
    """The forecast of a run like `curve` with this schedule. Raises DataError where nothing follows the warm-up."""
    import numpy as np

    from ..analysis.curve_fit import saw_a_fall

    end = float(rates.step[-1])
    step = np.linspace(float(rates.step[rates.warmup]) + 1, end, SHOWN)
    if step[0] >= step[-1]:
        raise DataError(f"{curve.name}: the schedule ends with its warm-up, at step {end:g}.")
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


def draw(result: Forecast, path: Path) -> None:
    """The measured curves, the predicted ones and their bands, in one picture."""
    from ..analysis.charts import TRAINING_LOSS, Axis, Chart, Series, View
    from ..analysis.draw import figure, save
    from ..analysis.style import Style

    series, looks = [], {}
    for i, run in enumerate(result.runs):
        looks[run.run] = Style(f"C{i % 10}", "o", "-")
        first = run.curve.first
        series += [
            Series(run.run, "band", run.step, run.predicted, run.run, low=run.low, high=run.high),
            Series(f"{run.run}, forecast", "line", run.step, run.predicted, run.run),
            Series(f"{run.run}, measured", "points", run.curve.step[first:], run.curve.loss[first:], run.run, hollow=True),
        ]
    view = View(tuple(series), Axis("step"), Axis(TRAINING_LOSS))
    chart = Chart("forecast", "Forecast", "Measured curves, forecasts and their 90 % intervals", (view,))
    save(figure(chart, view, looks), path.with_suffix(""), (path.suffix[1:],))
