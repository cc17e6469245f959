"""Forecast the loss curve and final loss of a run, with intervals: for its own schedule, another one, or another length.

    questctl.forecast("runs").runs[0].loss
    questctl.forecast("curves.csv", schedule="wsd:decay=.2", steps=48_000)
    questctl.forecast("runs", law="joint", schedule="wsd", N=1e6, scheme="quest-w4a4")

The law is fitted to the run's curve so far and to curves of the same size and scheme; law `joint` takes all curves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..words import few
from .curves import Curves, load_curves, parse_schedule
from .sources import LeftOut, Paths, analysis_errors

if TYPE_CHECKING:
    from ..analysis.curve_fit import CurveFit
    from ..analysis.curve_laws import CurveLaw
    from ..analysis.curves import Curve, Rates
    from ..analysis.forecasts import RunForecast
    from ..config import OptimConfig

FIGURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Forecast:
    """The forecasts, by name of the run, and the runs without a curve, each with the reason."""

    runs: tuple[RunForecast, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def sentences(self) -> list[str]:
        """The sentences of all runs."""
        return [sentence for run in self.runs for sentence in run.sentences]

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
    loss: str = "training",
    out: str | Path | None = None,
) -> Forecast:
    """Forecast unfinished runs, or the `run` named; with `schedule` or `steps`, a run of each kind under these.

    `schedule`: `wsd:decay=.2`, `cosine:lr=3e-4,steps=24000`; missing keys are those of the run. `law`: multi-power, momentum,
    power or joint. `loss`: training or validation. The validation curve is smoother, since it is measured on one text, but only
    runs with `train.eval_every` have it. `given` is the schedule of files without a column of rates. `N` (parameters) and
    `scheme` ask for another model, which only law joint can forecast. `out` is a file for the picture (.png .svg .pdf). If all
    runs are finished and nothing else is asked for, each is forecast at its own end. Raises UsageError for an unknown law,
    schedule, loss, run or kind of picture, DataError for curves that cannot be read or fitted.
    """
    from ..analysis.forecasts import forecast_curve, kind, unfinished

    known, loaded = Asked(sources, run, law, given, columns, loss, out).load()
    wanted = [c for c in loaded.curves if run in (None, c.name)]
    if N is not None or scheme is not None:
        wanted = [_other_model(wanted[0], loaded.curves, known, N, scheme)]
    elif run is None and (left := [c for c in wanted if unfinished(c)]):
        wanted = left
    if run is None and (schedule or steps):
        wanted = list({kind(curve): curve for curve in reversed(wanted)}.values())[::-1]
    fits: dict[Any, CurveFit] = {}
    forecasts = []
    for curve in wanted:
        key = None if known.uses_scheme else kind(curve)
        if key not in fits:
            with analysis_errors():
                fits[key] = _fit([c for c in loaded.curves if key is None or kind(c) == key], law)
        rates = _rates(curve, schedule, steps)
        with analysis_errors():
            forecasts.append(forecast_curve(fits[key], curve, rates))
    result = Forecast(tuple(forecasts), loaded.left_out)
    if out is not None:
        draw(result, Path(out))
    return result


@dataclass(frozen=True)
class Asked:
    """The arguments that `forecast` and `best_schedule` share; they are explained at `forecast`."""

    sources: Paths
    run: str | None
    law: str
    given: str | None
    columns: Mapping[str, str] | None
    loss: str
    out: str | Path | None

    def load(self) -> tuple[CurveLaw, Curves]:
        """The law and the curves, checked before anything is fitted."""
        from ..analysis.curve_laws import get_curve_law

        if self.out is not None and Path(self.out).suffix not in FIGURES:
            raise UsageError(f"--out {self.out}: a picture ends in one of {', '.join(FIGURES)}.")
        with analysis_errors():
            known = get_curve_law(self.law)
        loaded = load_curves(self.sources, columns=self.columns, schedule=self.given, loss=self.loss)
        if self.run is not None and self.run not in _names(loaded):
            raise UsageError(f"no curve is called '{self.run}'; choices: {few(_names(loaded), 8)}.")
        return known, loaded


def fit_kind(asked: Asked) -> tuple[CurveFit, Curve, tuple[LeftOut, ...]]:
    """The law fitted to runs like the one asked for, that run's curve, and the runs without a curve.

    Raises UsageError if no run is named and there are several kinds.
    """
    from ..analysis.forecasts import kind

    known, loaded = asked.load()
    curve = next(c for c in loaded.curves if asked.run in (None, c.name))
    alike = [c for c in loaded.curves if known.uses_scheme or kind(c) == kind(curve)]
    if asked.run is None and any(kind(c) != kind(curve) for c in loaded.curves):
        raise UsageError(f"the curves are of several sizes or schemes: name one by --run; choices: {few(_names(loaded), 8)}.")
    with analysis_errors():
        return _fit(alike, asked.law), curve, loaded.left_out


def _names(loaded: Curves) -> list[str]:
    return [curve.name for curve in loaded.curves]


def _other_model(like: Curve, curves: Sequence[Curve], law: CurveLaw, N: float | None, scheme: str | None) -> Curve:
    """A run like `like` of another size or scheme. Raises UsageError if the law ignores these, or lacks the scheme."""
    from ..analysis.forecasts import kind

    if not law.uses_scheme:
        raise UsageError(f"--law {law.name}: is of one size and scheme; another N or scheme needs --law joint.")
    schemes = sorted({c.scheme or "bf16" for c in curves})
    if scheme is not None and scheme not in schemes:
        raise UsageError(f"--scheme {scheme}: no curve is of it; choices: {few(schemes, 8)}.")
    if N is not None and not 0 < N < math.inf:
        raise UsageError(f"--N {N:g}: must be a positive number of parameters.")
    scheme, N = scheme or like.scheme, like.N if N is None else N
    same = [c for c in curves if kind(c) == (N, scheme)]
    return same[0] if same else dataclasses.replace(like.until(-1), name=f"N={N:.4g} {scheme}", N=N, scheme=scheme, first=0)


def _fit(curves: list[Curve], law: str) -> CurveFit:
    from ..analysis.curve_fit import fit_curves

    return fit_curves(curves, law)


def _rates(curve: Curve, schedule: str | None, steps: int | None) -> Rates:
    """The schedule to forecast: the run's, or the one asked for, with missing keys from the run."""
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
    """The defaults of schedules over `length` steps for a run like this: its peak rate and its warm-up."""
    from ..config import OptimConfig

    own = curve.rates
    warmup = min(float(own.step[own.warmup]), length)
    return OptimConfig(lr=own.peak, warmup_frac=0.0, warmup_steps=warmup, final_factor=0.1)


def draw(result: Forecast, path: Path) -> None:
    """The measured curves, the predicted ones and their bands, in one picture."""
    from ..analysis.draw import figure, save
    from ..analysis.forecasts import chart
    from ..analysis.style import Style

    shown = chart(result.runs)
    looks = {run.run: Style(f"C{i % 10}", "o", "-") for i, run in enumerate(result.runs)}
    save(figure(shown, shown.views[0], looks), path.with_suffix(""), (path.suffix[1:],))
