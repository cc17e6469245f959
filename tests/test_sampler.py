"""The data order: every window once per epoch, the same for any number of processes, uniform, and never changed by accident."""

import time
from itertools import pairwise

import numpy as np
import pytest
from helpers import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from questctl.data.sampler import _keys, batch, permute, validation_windows, windows_per_epoch
from questctl.errors import UsageError


def ramp(n: int) -> np.ndarray:
    """Tokens that say where they stand."""
    return np.arange(n, dtype=np.uint32)


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
@settings(max_examples=150, deadline=None)
def test_permute_is_a_bijection(n: int, keys: list[int]) -> None:
    image = permute(np.arange(n, dtype=np.uint64), n, [np.uint64(k) for k in keys])
    assert sorted(image.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 63, 123, 4096, 4097, 65_535, 100_003])
def test_permute_at_odd_sizes(n: int) -> None:
    *keys, _ = _keys(7, 3)
    image = permute(np.arange(n, dtype=np.uint64), n, keys)
    assert np.array_equal(np.sort(image), np.arange(n))
    one_by_one = [int(permute(np.array([i], dtype=np.uint64), n, keys)[0]) for i in range(0, n, max(1, n // 50))]
    assert one_by_one == image[:: max(1, n // 50)].tolist()


def test_permute_leaves_its_argument_alone() -> None:
    index = np.arange(63, dtype=np.uint64)
    permute(index, 63, _keys(0, 0)[:-1])
    assert np.array_equal(index, np.arange(63))


@given(st.integers(2, 700), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_every_window_once_per_epoch(n: int, seq_len: int, batch_size: int, seed: int) -> None:
    windows = windows_per_epoch(n, seq_len)
    if windows == 0:
        assert n <= seq_len
        return
    tokens, epochs = ramp(n), 3
    steps = -(-epochs * windows // batch_size)
    rows = np.concatenate([batch(tokens, seed=seed, step=s, batch_size=batch_size, seq_len=seq_len) for s in range(steps)])
    assert rows.shape == (steps * batch_size, seq_len + 1)
    assert rows.dtype == np.int64
    assert np.array_equal(np.diff(rows, axis=1), np.ones((len(rows), seq_len)))  # consecutive tokens
    for epoch in range(epochs):
        starts = np.sort(rows[epoch * windows : (epoch + 1) * windows, 0])
        assert len(starts) == windows
        assert np.array_equal(starts, starts[0] + seq_len * np.arange(windows))  # one grid, each of its windows once
        assert starts[0] < seq_len
        assert starts[-1] + seq_len < n
    assert n - windows * seq_len <= 2 * seq_len  # what an epoch leaves out


def test_the_grid_moves_and_reaches_both_ends() -> None:
    tokens, seq_len = ramp(7 * 5 + 6), 7  # windows: 4 (n // 7 = 5); offsets 0 … 6 all fit
    windows = windows_per_epoch(len(tokens), seq_len)
    seen, last = set(), 0
    for epoch in range(200):
        rows = batch(tokens, seed=1, step=epoch, batch_size=windows, seq_len=seq_len)
        seen.add(int(rows[:, 0].min()))
        last = max(last, int(rows.max()))
    assert seen == set(range(seq_len))
    assert last == seq_len - 1 + windows * seq_len


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("n", [130, 997])
def test_order_is_the_same_for_any_number_of_processes(world_size: int, n: int) -> None:
    tokens = ramp(n)
    for step in (0, 1, 2, 17, 10**6):
        alone = batch(tokens, seed=5, step=step, batch_size=12, seq_len=9)
        shares = [
            batch(tokens, seed=5, step=step, batch_size=12, seq_len=9, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert all(len(share) == 12 // world_size for share in shares)
        assert np.array_equal(np.concatenate(shares), alone)


def test_batch_size_does_not_change_the_order() -> None:
    tokens = ramp(1000)
    small = np.concatenate([batch(tokens, seed=5, step=s, batch_size=3, seq_len=9) for s in range(80)])
    large = np.concatenate([batch(tokens, seed=5, step=s, batch_size=60, seq_len=9) for s in range(4)])
    assert np.array_equal(small, large)


def test_no_state() -> None:
    tokens = ramp(500)
    steps = [3, 0, 3, 99, 1, 3]
    drawn = [batch(tokens, seed=0, step=s, batch_size=4, seq_len=8) for s in steps]
    assert np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(drawn[0], drawn[5])
    assert not np.array_equal(drawn[0], drawn[1])


def test_processes_that_cannot_share_are_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.batch_size: 16 sequences cannot be shared equally by 3 processes"):
        batch(ramp(1000), seed=0, step=0, batch_size=16, seq_len=8, world_size=3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_the_largest_ids_survive(dtype: type, tmp_path) -> None:
    top = int(np.iinfo(dtype).max)
    np.arange(top - 99, top + 1).astype(dtype).tofile(tmp_path / "t.bin")
    tokens = np.memmap(tmp_path / "t.bin", dtype=dtype, mode="r")
    rows = np.concatenate([batch(tokens, seed=s, step=0, batch_size=8, seq_len=10) for s in range(40)])
    assert rows.min() >= top - 99
    assert rows.max() <= top
    assert rows.max() > top - 12  # the last grid positions are reached
    assert validation_windows(tokens, 9, 1000)[-1, -1] == top


def chi_square(counts: np.ndarray) -> float:
    return float(stats.chisquare(counts.ravel()).pvalue)


@pytest.mark.parametrize("windows", slow_but([7, 97, 256], [7, 97]))
def test_where_an_epoch_begins_is_uniform(windows: int) -> None:
    first = [int(permute(np.zeros(1, np.uint64), windows, _keys(0, e)[:-1])[0]) for e in range(40 * windows)]
    assert chi_square(np.bincount(first, minlength=windows)) > 1e-3
    last = [int(permute(np.full(1, windows - 1, np.uint64), windows, _keys(e, 0)[:-1])[0]) for e in range(40 * windows)]
    assert chi_square(np.bincount(last, minlength=windows)) > 1e-3


@pytest.mark.parametrize("n", slow_but([5, 12, 30, 40], [5, 12]))
def test_neighbours_are_independent(n: int) -> None:
    """Ordered pairs (π(0), π(1)) and (π(i), π(i + ⌈√n⌉)), which share a half of the network, over many keys."""
    far = int(np.ceil(np.sqrt(n)))
    near, across = np.zeros((n, n)), np.zeros((n, n))
    for seed in range(20 * n * (n - 1)):
        image = permute(np.array([0, 1, far], dtype=np.uint64), n, _keys(seed, 1)[:-1])
        near[image[0], image[1]] += 1
        across[image[0], image[2]] += 1
    off = ~np.eye(n, dtype=bool)
    assert near[~off].sum() == across[~off].sum() == 0
    assert chi_square(near[off]) > 1e-3
    assert chi_square(across[off]) > 1e-3


def test_a_large_order_has_no_drift_and_no_rhythm() -> None:
    n = 100_003
    x = permute(np.arange(n, dtype=np.uint64), n, _keys(11, 0)[:-1]).astype(np.float64)
    for lag in (1, 2, 316, 317, 318):  # 317 = ⌈√n⌉
        assert abs(np.corrcoef(x[:-lag], x[lag:])[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), x)[0, 1]) < 4 / np.sqrt(n)
    steps = np.diff(x) % n
    assert chi_square(np.histogram(steps, bins=64, range=(0, n))[0]) > 1e-3


def test_epochs_and_seeds_differ() -> None:
    tokens = ramp(2000)
    one = {
        tuple(batch(tokens, seed=s, step=e, batch_size=windows_per_epoch(2000, 10), seq_len=10)[:, 0] // 10)
        for s in range(20)
        for e in range(5)
    }
    assert len(one) == 100


def test_golden_order() -> None:
    """Frozen: a change here changes every experiment."""
    *keys, draw = _keys(0, 0)
    assert int(keys[0]) == 12678219994093419282
    assert int(draw) == 7014397297712730406
    image = permute(np.arange(10, dtype=np.uint64), 94_000, keys)
    assert image.tolist() == [62090, 18416, 8301, 61580, 15433, 85181, 74533, 67975, 21115, 10691]
    assert permute(np.arange(11, dtype=np.uint64), 11, keys).tolist() == [0, 7, 4, 3, 2, 6, 8, 1, 5, 9, 10]
    rows = batch(ramp(100_000), seed=3, step=1267, batch_size=8, seq_len=128)  # from epoch 12 into 13
    assert rows[:, 0].tolist() == [94696, 64872, 30440, 79080, 15900, 19228, 52380, 70812]


@given(st.integers(2, 900), st.integers(1, 60), st.integers(1, 2000))
@settings(max_examples=200, deadline=None)
def test_validation_windows_are_disjoint_and_spread(n: int, seq_len: int, max_tokens: int) -> None:
    if n <= seq_len:
        return
    rows = validation_windows(ramp(n), seq_len, max_tokens)
    assert rows.shape[1] == seq_len + 1
    assert len(rows) == max(1, min((n - 1) // seq_len, max_tokens // seq_len))
    assert np.array_equal(np.diff(rows, axis=1), np.ones((len(rows), seq_len)))
    gaps = [int(b - a) for a, b in pairwise(rows[:, 0])]
    assert all(gap >= seq_len for gap in gaps)  # targets are counted once
    assert max(gaps, default=0) - min(gaps, default=0) <= seq_len  # evenly
    assert rows[0, 0] == 0
    if len(rows) > 1:
        assert n - rows[-1, 0] <= 2 * max(gaps) + seq_len  # to the end


def test_a_batch_costs_the_same_for_a_large_corpus() -> None:
    """No table of the epoch: 16 of 16 million windows in well under a millisecond (some 30 µs on an idle core)."""
    tokens = np.zeros(1 << 28, dtype=np.uint8)
    best = np.inf
    for step in range(50):
        start = time.perf_counter()
        batch(tokens, seed=0, step=step, batch_size=16, seq_len=16)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3
