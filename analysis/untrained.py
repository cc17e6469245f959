"""The efficiency of a format without runs, predicted from its error on a standard normal by law `unified`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .fit import optimum
from .fit_result import Fit
from .identify import leave_out
from .laws import LAWS, LawError
from .schemes import Scheme
from .uncertainty import Bootstrap

Array = np.ndarray
FEW = 3  # least number of formats, left out in turn, to measure the law's error


def format_error(fit: Fit) -> tuple[float, int] | None:
    """(error, number of formats): how well law `unified` predicts eff of formats left out in turn; None for fewer than FEW.

    The error is the root mean square over formats of log eff as law `quest` measures it minus log eff as law `unified` predicts
    it from the other formats. `fit` is one of law unified. A bootstrap of the fit does not show this error, since the law makes
    it.
    """
    count = len(fit.points.schemes) - 1
    if count < FEW:
        return None
    assert fit.law.counterpart
    measured = optimum(fit.points, fit.law.counterpart, objective=fit.objective)[0]
    without = leave_out(fit, [fit.points.group == g for g in range(1, count + 1)])
    predicted, observed = fit.law.log_eff(without, fit.design), measured.law.log_eff(measured.theta[None], measured.design)
    assert predicted is not None
    assert observed is not None
    return float(np.sqrt(np.mean((observed[0, 1:] - predicted[:, 1:].diagonal()) ** 2))), count


def eff_from_mse(
    fit: Fit, w_mse: float, a_mse: float, boot: Bootstrap | None = None, error: tuple[float, int] | None = None
) -> tuple[float, tuple[float, float] | None]:
    """eff of a format without runs, from its Gaussian errors, by a fit of law `unified`; with `boot`, also a 95 % interval.

    The interval combines that of the parameters, by the bootstrap, and the error of the law, by Student's t of
    `format_error(fit)` (`error`, or computed here); None if that does not exist.
    """
    if not fit.law.uses_mse:
        names = " or ".join(law.name for law in LAWS.values() if law.uses_mse)
        raise LawError(f"the eff of an untrained format needs a fit of law {names}")
    row = dataclasses.replace(fit.points.schemes[0], label="new", w_grid_bits=1.0, a_grid_bits=1.0, w_mse=w_mse, a_mse=a_mse)
    value = float(_log_eff(fit, fit.theta[None], row)[0])
    error = error or (format_error(fit) if boot is not None else None)
    if boot is None or error is None:
        return math.exp(value), None
    from scipy.special import stdtrit

    low, high = np.quantile(_log_eff(fit, boot.theta, row), [0.025, 0.975])
    reach = math.hypot((high - low) / 2, stdtrit(error[1], 0.975) * error[0])
    return math.exp(value), (math.exp(value - reach), math.exp(value + reach))


def _log_eff(fit: Fit, theta: Array, scheme: Scheme) -> Array:
    """(m,) log eff of a scheme, with or without runs, by a law in which eff follows from the format."""
    drawn = fit.law.log_eff(theta, dataclasses.replace(fit.design, schemes=(fit.points.schemes[0], scheme)))
    assert drawn is not None
    return drawn[:, 1]
