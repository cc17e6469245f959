"""The set of document digests: membership as in a Python set, for any batch size."""

from pathlib import Path

import numpy as np
import pytest

from questctl.data.dedup import DocumentSet


@pytest.mark.parametrize("batch", [1, 63, 5000])
def test_it_is_a_set(batch: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    digests = rng.choice(np.append(rng.integers(0, 2**64, 6000, np.uint64), np.array([0, 2**64 - 1], np.uint64)), 15_000)
    if batch == 1:
        digests = digests[:2000]
    documents, reference = DocumentSet(tmp_path / "seen"), set()
    for at in range(0, len(digests), batch):
        part = digests[at : at + batch]
        expected = []
        for d in part.tolist():
            expected.append(max(d, 1) not in reference)
            reference.add(max(d, 1))
        assert documents.add(part).tolist() == expected
    assert documents.count == len(reference)


def test_digests_that_fall_on_one_slot(tmp_path: Path) -> None:
    inverse = pow(0x9E3779B97F4A7C15, -1, 2**64)
    digests = np.array([(5 * 2**52 + i) * inverse % 2**64 for i in range(300)], np.uint64)  # times the mixer: one slot of 2¹²
    documents = DocumentSet(tmp_path / "seen")
    assert documents.add(digests).all()
    assert not documents.add(digests[::-1]).any()
