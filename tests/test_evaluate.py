"""Validation against a loop over single targets; every target once, the same for every batch size."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from questctl.evaluate.loss import Interrupted, bits_per_byte, evaluate

TOKENS = np.random.default_rng(0).integers(0, 11, 1000, dtype=np.uint8)
TABLE = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))  # a bigram model: logits of the next token


def bigram(tokens, targets):
    return F.cross_entropy(TABLE[tokens].flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
@pytest.mark.parametrize(("seq_len", "max_tokens"), [(1, 999), (9, 999), (9, 100), (50, 1), (999, 5000)])
def test_mean_over_targets(seq_len, max_tokens, batch_size):
    fit = 999 // seq_len
    count = max(1, min(fit, max_tokens // seq_len))
    starts = [i * fit // count * seq_len for i in range(count)]
    targets = [t for s in starts for t in range(s + 1, s + seq_len + 1)]
    assert len(set(targets)) == len(targets)
    log_p = TABLE.double().log_softmax(-1)
    expected = -sum(float(log_p[TOKENS[t - 1], TOKENS[t]]) for t in targets) / len(targets)
    found = evaluate(bigram, TOKENS, seq_len=seq_len, max_tokens=max_tokens, batch_size=batch_size)
    assert found == pytest.approx(expected, rel=1e-6)


def test_leaves_no_graph_and_stops_when_asked():
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        evaluate(bigram, TOKENS, seq_len=9, max_tokens=999, batch_size=4, stop=lambda: next(asked))
    weight = TABLE.clone().requires_grad_()
    evaluate(lambda x, y: F.cross_entropy(weight[x].flatten(0, 1), y.flatten()), TOKENS, seq_len=9, max_tokens=99, batch_size=4)
    assert weight.grad is None


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), 1.0) == pytest.approx(1.0)
    assert bits_per_byte(3 * math.log(2), 4.0) == pytest.approx(0.75)
    assert bits_per_byte(1.0, None) is None
