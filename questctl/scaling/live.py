"""Forecasts of the final loss of runs in training, for `questctl runs watch`, renewed while the runs go on.

forecasts = LiveForecasts(store)
while True:
    show(forecasts(read_outcomes(cells, store)))
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import DataError
from ..store import RunStore
from ..sweep.outcomes import Outcome
from .curves import run_curve
from .sources import analysis_errors

if TYPE_CHECKING:
    from ..analysis.curves import Curve

EVERY_S = 30.0  # between two rounds of forecasts
SHARE = 0.05  # of the time, at most, for forecasts
MOST = 16  # runs to forecast, and as many finished runs of their kinds for the fit


class LiveForecasts:
    """Call it repeatedly with outcomes: those of runs in training get `forecast`, `forecast_low` and `forecast_high`.

    A forecast is of the training loss at the end of the run (nats/token), with its 90 % interval, by the multi-power law; the
    finished runs of the same size and scheme are fitted with it. A run with too few lines has none. The first MOST runs in
    training are forecast every EVERY_S seconds, or less often if that would take more than SHARE of the time.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._known: dict[str, tuple[float, float, float]] = {}
        self._finished: dict[str, Curve | None] = {}
        self._next = 0.0

    def __call__(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The same outcomes, with forecasts."""
        training = [outcome.run_id for outcome in outcomes if outcome.state == "running"][:MOST]
        if training and (start := time.monotonic()) >= self._next:
            done = [outcome.run_id for outcome in outcomes if outcome.state == "done"][:MOST]
            self._known = self._forecast(training, done)
            taken = time.monotonic() - start
            self._next = start + max(EVERY_S, taken / SHARE)
        return [self._with_forecast(outcome) for outcome in outcomes]

    def _with_forecast(self, outcome: Outcome) -> Outcome:
        if outcome.state != "running" or outcome.run_id not in self._known:
            return outcome
        loss, low, high = self._known[outcome.run_id]
        return dataclasses.replace(outcome, forecast=loss, forecast_low=low, forecast_high=high)

    def _forecast(self, training: Sequence[str], done: Sequence[str]) -> dict[str, tuple[float, float, float]]:
        from ..analysis.forecasts import forecast_unfinished

        for name in done:
            if name not in self._finished:
                self._finished[name] = self._curve(name)
        curves = [curve for curve in (self._curve(name) for name in training) if curve is not None]
        curves += [curve for name in done if (curve := self._finished[name]) is not None]
        forecasts = forecast_unfinished(curves, MOST)
        return {each.run: (each.loss, *each.interval) for each in forecasts}

    def _curve(self, name: str) -> Curve | None:
        """The curve of a run, if it has enough lines."""
        with suppress(DataError), analysis_errors():
            return run_curve(self._store.run(name))
        return None
