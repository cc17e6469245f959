"""Predict the loss of models without runs, with an interval and the spread of the laws that fit about as well.

questctl.predict("runs", N=7e9, D=140e9, scheme="w4a4").cells[0].loss
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..words import few
from .fit import bootstraps
from .plan import REPLICATES, Fitted, check_share, check_unique, comparable, fit_of, fit_status, labels_of, repeats
from .sources import analysis_errors

if TYPE_CHECKING:
    from ..analysis.findings import Finding
    from ..analysis.fit_result import Fit
    from ..analysis.points import Points

BEYOND = 1.001  # factor by which a cell may lie outside the data without a finding


@dataclass(frozen=True)
class PredictedLoss:
    """The loss (nats/token) of one model.

    `interval` contains the loss of one new run with probability 95 % if the law is true. It is None if the fit's numbers cannot
    be trusted or no run tests it. `laws` are the losses by the laws that fit about as well, the fitted one first. `outside`
    maps those of N, D and D/N that lie outside the data to the factor by which they do. `share` of the tokens come before
    quantization, if the law includes it.
    """

    scheme: str
    params_non_embedding: float
    tokens: float
    loss: float
    interval: tuple[float, float] | None
    laws: Mapping[str, float]
    outside: Mapping[str, float]
    share: float | None = None

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest loss among the laws."""
        return min(self.laws.values()), max(self.laws.values())


@dataclass(frozen=True)
class Predictions:
    """Predicted losses, in the order asked for, and the fit behind them."""

    fit: Fit
    cells: tuple[PredictedLoss, ...]
    unique_tokens: float = math.inf

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The first loss, then its caveats: the fit, other laws, extrapolation."""
        from ..analysis.findings import Finding
        from ..analysis.shares import outside_shares, share_words
        from ..analysis.style import count, with_interval

        first = self.cells[0]
        ends = " nats/token" if first.interval else " nats/token, without interval"
        size = f"{first.scheme} with {count(first.params_non_embedding)} parameters on {count(first.tokens)} tokens"
        size += share_words(first.share)
        out = [
            Finding("answer", f"Predicted loss of {size}: {with_interval(first.loss, first.interval)}{ends}.", asdict(first)),
            *fit_status(self.fit),
        ]
        wide = max(self.cells, key=lambda cell: cell.spread[1] - cell.spread[0])
        if len(wide.laws) > 1:
            low, high = (min(wide.laws, key=wide.laws.__getitem__), max(wide.laws, key=wide.laws.__getitem__))
            lowest, highest = (f"{wide.laws[law]:.4f}" for law in (low, high))
            spread = f"{lowest} ({low}) to {highest} ({high})" if lowest != highest else f"the same, {lowest},"
            size = f"{wide.scheme} with {count(wide.params_non_embedding)} parameters"
            text = f"Laws that fit about as well predict {spread} for {size}."
            out.append(Finding("other_laws", text, dict(wide.laws)))
        for name in ("N", "D", "D/N"):
            beyond = [cell for cell in self.cells if name in cell.outside]
            if beyond:
                most = max(cell.outside[name] for cell in beyond)
                schemes = few(dict.fromkeys(cell.scheme for cell in beyond), 3)
                text = f"{name} lies outside the data by a factor of up to {most:.3g}: {schemes}."
                out.append(Finding("outside", text, {"quantity": name, "factor": most}))
        shares = [cell.share for cell in self.cells if cell.share is not None]
        if far := [line for share in shares if (line := outside_shares(self.fit.points, share))]:
            out.append(Finding("outside", f"{far[0][0].upper()}{far[0][1:]}.", {"quantity": "share", "shares": shares}))
        return (*out, *repeats(self.fit, self.unique_tokens, max(cell.tokens for cell in self.cells)))

    def to_json(self) -> dict[str, Any]:
        """What `predict --json` prints."""
        about: dict[str, Any] = {"law": self.fit.law.name, "status": self.fit.status, "data_hash": self.fit.points.hash}
        about |= {} if math.isinf(self.unique_tokens) else {"unique_tokens": self.unique_tokens}
        findings = [finding.to_dict() for finding in self.findings]
        return {**about, "cells": [asdict(cell) for cell in self.cells], "findings": findings}


def predict(
    fitted: Fitted,
    N: float | None = None,
    D: float | None = None,
    scheme: str | Sequence[str] | None = None,
    *,
    cells: str | Path | Sequence[tuple[float, float, str]] | None = None,
    columns: Mapping[str, str] | None = None,
    unique_tokens: float = math.inf,
    share: float | None = None,
    bootstrap: int = REPLICATES,
) -> Predictions:
    """Predict the loss of N non-embedding parameters trained on D tokens in a scheme, or of many such cells.

    `fitted` is a FitResult, or sources that law quest is fitted to. `scheme` is a label or bits, or several; default: all with
    runs. `cells` are (N, D, scheme) instead, or a table that is read as tables of runs are, by `columns` that map our names to
    its own; rows without a scheme count for each `scheme`. `unique_tokens` are the distinct tokens available,
    for a law of repeated tokens. `share` of the tokens come before quantization, for a law that includes it; by default the
    best share. `bootstrap` replicates give the intervals.

    Raises UsageError for a scheme without runs, for numbers that are not positive, and unless either N and D or `cells` are
    given; DataError, which names the row, for a table of cells that cannot be read or has a scheme without runs.
    """
    import numpy as np

    from ..analysis.choice import alternatives
    from ..analysis.fit_result import UNTRUSTED
    from ..analysis.shares import best_share, has_share
    from ..analysis.uncertainty import extrapolation, prediction_interval

    if (cells is None) == (N is None and D is None) or (cells is None and (N is None or D is None)):
        raise UsageError("predict: give --N and --D, or --cells.")
    result = fit_of(fitted)
    fit, points = result.fit, result.points
    check_unique(fit, unique_tokens)
    check_share(fit, share)
    if cells is None:
        assert N is not None
        assert D is not None
        wanted = [(N, D, label) for label in labels_of("--scheme", points, _schemes(scheme)) or points.labels]
    else:
        default = labels_of("--scheme", points, _schemes(scheme)) or points.labels
        wanted = (
            read_cells(cells, points, default, columns)
            if isinstance(cells, str | Path)
            else [(n, d, labels_of("cells", points, [label])[0]) for n, d, label in cells]
        )
    if not wanted:
        raise UsageError("--cells: holds no cell.")
    if any(not (0 < n < math.inf and 0 < d < math.inf) for n, d, _ in wanted):
        raise UsageError("predict: parameters and tokens are positive numbers, such as --N 7B --D 140B.")
    trusted = fit.status not in UNTRUSTED
    boot = bootstraps([fit], bootstrap).get(fit.law.name) if trusted else None
    laws = comparable(result.choice.rivals if result.choice else alternatives(fit), unique_tokens, share)
    out = []
    with analysis_errors():
        for n, d, label in wanted:
            outside = {name: factor for name, factor in extrapolation(points, n, d).items() if factor > BEYOND}
            at, g = share, points.index(label)
            if at is None and has_share(fit, points.schemes[g]):
                at = best_share(fit, fit.theta, fit.design.at(np.array([n]), np.array([d]), np.array([g]), unique_tokens))
            interval = prediction_interval(boot, n, d, label, unique_tokens, at) if boot else None
            by_law = {other.law.name: float(other.predict(n, d, label, unique_tokens, share)) for other in laws}
            loss = float(fit.predict(n, d, label, unique_tokens, at))
            shown = at if has_share(fit, points.schemes[g]) else None
            out.append(PredictedLoss(label, n, d, loss, interval, by_law, outside, shown))
    return Predictions(fit, tuple(out), unique_tokens)


def read_cells(
    path: str | Path, points: Points, schemes: Sequence[str], columns: Mapping[str, str] | None = None
) -> list[tuple[float, float, str]]:
    """N, D and label of each row of a table; a row without a scheme counts for each of `schemes`.

    Raises DataError, which names the row, also for a scheme of which `points` have no runs.
    """
    from ..analysis import rows
    from ..analysis.tables import PointError, read_table

    out: list[tuple[float, float, str]] = []
    with analysis_errors():
        table = read_table(path)
        for row, n, d, own in rows.read_cells(table.records, table.row_names(), columns):
            try:
                labels = schemes if own is None else [points.labels[points.index(own)]]
            except PointError as e:
                raise PointError(str(e), row=row, column="scheme") from e
            out += [(n, d, label) for label in labels]
    return out


def _schemes(scheme: str | Sequence[str] | None) -> list[str]:
    if scheme is None:
        return []
    return [scheme] if isinstance(scheme, str) else list(scheme)
