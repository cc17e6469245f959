"""The best learning-rate schedule by a law of loss curves: the non-increasing one with the lowest predicted final loss.

best = questctl.best_schedule("runs", steps=24_000)
best.settings                                              # keys of a config: optim.schedule, optim.knots, …
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, UsageError
from .curves import parse_schedule
from .forecast import Asked, Forecast, draw, fit_kind, like_run
from .plan_files import toml_lines
from .sources import LeftOut, Paths

if TYPE_CHECKING:
    from ..analysis.curve_fit import CurveFit

KNOWN = ("cosine", "wsd", "constant")  # schedules that the best one is compared with


@dataclass(frozen=True)
class BestSchedule:
    """The schedule for a run like `run` over `steps` steps; `settings` are the config keys that train with it.

    `loss` (nats/token) is the predicted final loss, and `interval` its 90 % interval. `gains` has, for each known schedule with
    the same peak, warm-up and length, by how much the best one is lower: estimate, low, high, by the law alone.
    """

    run: str
    steps: int
    settings: dict[str, Any]
    loss: float
    interval: tuple[float, float]
    gains: dict[str, tuple[float, float, float]]
    fit: CurveFit
    forecast: Forecast

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The runs without a curve, each with the reason."""
        return self.forecast.left_out

    @property
    def toml(self) -> str:
        """The settings as lines of a config file."""
        return "\n".join(toml_lines(self.settings))

    @property
    def sentences(self) -> list[str]:
        """The answer, its gains, and the caveats."""
        low, high = self.interval
        out = [
            f"{self.loss:.4f} [{low:.4f}, {high:.4f}] nats/token of {self.fit.curves[0].of} loss at step "
            f"{self.steps:,} ({self.fit.law.name})."
        ]
        for name, (gain, low, high) in self.gains.items():
            out.append(f"It gains {gain:.4f} [{low:.4f}, {high:.4f}] nats/token over {name}.")
        return out + self.forecast.runs[0].sentences[1:]

    def to_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        about = {"run": self.run, "steps": self.steps, "settings": self.settings, "loss": self.loss}
        gains = {name: list(gain) for name, gain in self.gains.items()}
        return {**about, "interval": list(self.interval), "gains": gains, "fit": self.fit.to_dict()}


def best_schedule(
    sources: Paths = None,
    *,
    run: str | None = None,
    steps: int | None = None,
    law: str = "multi-power",
    given: str | None = None,
    columns: Mapping[str, str] | None = None,
    loss: str = "training",
    out: str | Path | None = None,
) -> BestSchedule:
    """The best non-increasing schedule for a run like `run`, with its warm-up and peak rate, over `steps` (default: its own).

    The arguments are those of `forecast`. `run` may be left out if the source holds runs of a single size and scheme. Raises
    UsageError for an unknown run, or several kinds of runs, and DataError if no curve shows what a decay of the learning rate
    gains.
    """
    from ..analysis.curve_fit import saw_a_fall
    from ..analysis.curve_schedule import best_shape
    from ..analysis.forecasts import LEVEL, forecast_curve
    from ..config.knots import format_knots

    fit, curve, left_out = fit_kind(Asked(sources, run, law, given, columns, loss, out))
    if not saw_a_fall(fit):
        raise DataError(f"{curve.name}: no curve shows a fall of its rate, so none can tell which fall is best.")
    own = curve.rates
    length = int(steps or own.step[-1])
    like = like_run(curve, length)
    if length <= (warmup := float(own.step[own.warmup])):
        raise UsageError(f"--steps {length}: the warm-up of {curve.name} alone takes {warmup:g}.")
    knots = format_knots(zip(*(axis.tolist() for axis in best_shape(fit, curve, length)), strict=True))
    rates = parse_schedule(f"knots:{knots}", like, length)
    low, high = (float(side[0]) for side in fit.interval(rates, length, curve, level=LEVEL))
    gains = {name: fit.gain(rates, parse_schedule(name, like, length), length, curve, level=LEVEL) for name in KNOWN}
    settings = {
        "train.steps": length,
        "optim.lr": like.lr,
        "optim.warmup_steps": like.warmup_steps,
        "optim.schedule": "knots",
        "optim.knots": knots,
    }
    picture = Forecast((forecast_curve(fit, curve, rates),), left_out)
    if out is not None:
        draw(picture, Path(out))
    end = float(fit.predict(rates, length, curve)[0])
    return BestSchedule(curve.name, length, settings, end, (low, high), gains, fit, picture)
