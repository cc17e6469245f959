"""Specs that no other test trains: a few steps of each, and the metrics they report."""

import pytest
from tiny import config

from questctl.errors import UsageError
from questctl.training.loop import train


@pytest.mark.slow
def test_olive_trains(tmp_path) -> None:
    """The method olive as a whole: pairs, searched scales, straight-through gradients."""
    result = train(config({"quant.method": "olive", "train.steps": 12}), runs=tmp_path)
    start = train(config({"quant.method": "olive", "train.steps": 1}), runs=tmp_path)
    assert (result.scheme, result.w_stored_bits) == ("olive", 4)
    assert result.loss < start.loss - 0.05


def test_entropy_coded_weights_train_with_a_fraction_of_the_bits(tmp_path) -> None:
    words = {"quant.weights": "ec2.5-h32-rms-trust", "train.steps": 40}
    result = train(config(words), runs=tmp_path)
    assert (result.w_stored_bits, result.a_stored_bits, result.weights) == (2.5, 16, "ec2.5-h32-rms-trust")
    assert result.loss < train(config(words, train__steps=1), runs=tmp_path).loss - 0.1
    with pytest.raises(UsageError, match=r"quant\.activations: 'ec2\.5-h32-rms-trust': the entropy code .* is for weights"):
        config(quant__activations="ec2.5-h32-rms-trust")
    with pytest.raises(UsageError, match=r"quant\.overrides: 'ec3-rms-ste': the entropy code .* is for weights"):
        config({("quant", "overrides", "blocks.*.down", "activations"): "ec3-rms-ste"})
