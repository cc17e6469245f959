"""Downstream error from loss, and the over-training law that predicts the loss: planted truths, published predictions."""

import numpy as np
import pandas as pd
import pytest
from shared_data import DATA, needs

from questctl.analysis.downstream import fit_downstream
from questctl.analysis.fit import fit_law
from questctl.analysis.points import points_from_frame
from questctl.analysis.tables import PointError


def test_planted_truth() -> None:
    loss = np.linspace(2.4, 5.4, 7)
    fit = fit_downstream(loss, 0.857 - 2.2 * np.exp(-0.71 * loss))
    assert (fit.epsilon, fit.k, fit.gamma) == pytest.approx((0.857, 2.2, 0.71), rel=1e-5)
    assert fit.predict(3.0) == pytest.approx(0.857 - 2.2 * np.exp(-0.71 * 3))


def test_refusals() -> None:
    with pytest.raises(PointError, match="3 models cannot fit"):
        fit_downstream(np.array([2.0, 3, 4]), np.array([0.5, 0.6, 0.7]))
    with pytest.raises(PointError, match="model 2"):
        fit_downstream(np.array([2.0, np.nan, 4, 5]), np.array([0.5, 0.6, 0.7, 0.75]))


@needs("gadre_runs.csv")
def test_published_overtraining_predictions() -> None:
    """Five small RedPajama runs predict the C4 loss of 1.4B at M = 640 within .7103 % and of 6.9B at M = 20 within .7320 %, and
    with 1.4B at M = 20 the 17-task error within 3.6365 % and .0464 % (Gadre et al., arXiv 2403.08540, their own protocol:
    squared residuals of the loss itself, which weights y² give to residuals of the log).
    """
    runs = pd.read_csv(DATA / "gadre_runs.csv")
    runs = runs[runs.dataset == "rpj"].assign(weight=lambda t: t.loss_c4_val**2)
    small, medium = "d=96_l=8_h=4", ["d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8"]
    five = runs[(runs.model.isin(medium) & (runs.M == 20)) | ((runs.model == small) & (runs.M == 320))]
    assert len(five) == 5
    six = pd.concat([five, runs[(runs.model == "open_lm_1b") & (runs.M == 20)]])
    law = fit_law(points_from_frame(five, columns={"loss": "loss_c4_val"}), "overtrain")
    down = fit_downstream(six.loss_c4_val.to_numpy(), six.err_avg_subset.to_numpy())
    for model, M, by_loss, by_error in (("open_lm_1b", 640, 0.7103, 3.6365), ("open_lm_7b", 20, 0.7320, 0.0464)):
        target = runs[(runs.model == model) & (runs.M == M)].iloc[0]
        predicted = float(law.predict(target.N, target.D))
        assert 100 * abs(predicted / target.loss_c4_val - 1) == pytest.approx(by_loss, rel=0.02)
        assert 100 * abs(predicted / target.loss_c4_val - 1) <= by_loss
        error = float(down.predict(target.loss_c4_val * (1 + by_loss / 100)))
        assert 100 * abs(error / target.err_avg_subset - 1) == pytest.approx(by_error, abs=2e-3)
