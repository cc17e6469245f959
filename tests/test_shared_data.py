"""The summary line of a test run about tests skipped because measured data is absent."""

from __future__ import annotations

import shared_data


def test_skips_for_want_of_data_are_counted_by_file():
    skips = ["Skipped: shared data absent: a.csv", "Skipped: shared data absent: b.npz", "Skipped: no GPU"]
    (line,) = shared_data.summary([*skips, skips[0]])
    assert line == f"3 tests were skipped for want of data in {shared_data.DATA}: a.csv (2), b.npz (1)"


def test_without_such_skips_nothing_is_said():
    assert shared_data.summary(["Skipped: no GPU"]) == []


def test_a_mark_gives_the_reason_that_is_counted():
    mark = shared_data.needs("no such file").mark
    assert mark.args == (True,)
    assert shared_data.summary([mark.kwargs["reason"]])
