"""The measured leak: planted shares are found, and the interval of a sample holds the truth."""

from __future__ import annotations

import numpy as np
import pytest

from questctl.data import leak
from questctl.data.leak import Leak, measure, window_tokens


def ids(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n).astype(np.uint8)


def test_all_none_and_a_planted_share() -> None:
    train, other = ids(0, 50_000), ids(1, 10_000)
    assert measure(train, other, 1.0) == Leak(share=0.0, window=128, windows=10_000 - 127)
    assert measure(train, train[5_000:9_000], 1.0) == Leak(share=1.0, window=128, windows=4_000 - 127)
    mixed = np.concatenate([other[:1000], train[2_000:3_000], other[1000:2000]])
    assert measure(train, mixed, 1.0) == Leak(share=(1000 - 127) / (3000 - 127), window=128, windows=3000 - 127)


def test_a_window_has_the_same_text_in_every_tokenizer() -> None:
    assert [window_tokens(b) for b in (1.0, 2.56, 4.0, None, 100.0)] == [128, 50, 32, 32, 8]
    train = ids(0, 5_000)
    shares = [measure(train, np.concatenate([train[:400], ids(1, 400)]), b).share for b in (2.56, 4.0)]
    assert shares == [(400 - 49) / (800 - 49), (400 - 31) / (800 - 31)]


def test_a_side_shorter_than_a_window_is_not_measured() -> None:
    assert measure(ids(0, 1000), ids(0, 127), 1.0) is None
    assert measure(ids(0, 50), ids(0, 128), 1.0) == Leak(share=0.0, window=128, windows=1)


def test_parts_read_apart_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = ids(0, 3_000), np.concatenate([ids(0, 3_000)[900:1400], ids(1, 300)])
    whole = measure(train, val, 1.0)
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(leak, "_CHUNK", chunk)
        told: list[float] = []
        assert measure(train, val, 1.0, told.append) == whole
        assert told == sorted(told)
        assert told[-1] == 1.0


def test_a_sample_has_an_interval_that_holds_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    train = ids(0, 40_000)
    val = np.concatenate([train[:12_000], ids(1, 28_000)])
    exact = measure(train, val, 1.0)
    monkeypatch.setattr(leak, "MOST_WINDOWS", 500)
    sampled = measure(train, val, 1.0)
    assert exact is not None
    assert sampled is not None
    assert sampled.windows == 500
    assert sampled.low < exact.share < sampled.high  # type: ignore[operator]
    assert sampled.share == pytest.approx(exact.share, abs=0.01)
    assert str(sampled).startswith(f"{100 * sampled.share:.3g} % [")
    assert "[" not in str(exact)
    assert leak._wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe, Statistics in Medicine 1998
