"""Findings: records that code asks for by kind, in sentences short enough to read."""

import json

import pytest
from shared_data import DATA

from questctl.analysis.findings import Finding, of_kind
from questctl.analysis.fit import fit_law
from questctl.analysis.points import make_points, read_points


def test_findings_are_asked_for_by_kind() -> None:
    found = [Finding("a", "One."), Finding("b", "Two.", {"n": 2}), Finding("a", "Three.")]
    assert [str(f) for f in of_kind(found, "a")] == ["One.", "Three."]
    assert of_kind(found, "c") == []
    assert found[1].to_dict() == {"kind": "b", "sentence": "Two.", "numbers": {"n": 2}}
    assert Finding("b", "Two.", {"n": 2}) == found[1]
    assert Finding("b", "Two.", {"n": 3}) != found[1]


TABLES = sorted({p for folder in ("synthetic", "cases/tables") for p in (DATA / folder).glob("*.csv")})
FEW = make_points([1e6, 1e6, 2e6, 2e6, 3e6, 3e6], [1e7, 2e7] * 3, [3.1, 3.0, 2.9, 2.8, 2.6, 2.5], ["w4a4"] * 5 + ["w2a2"])


def sources() -> list:
    return [FEW, *TABLES]


@pytest.mark.parametrize("source", sources(), ids=lambda s: "few" if s is FEW else s.stem)
def test_every_warning_is_one_short_sentence_with_numbers_for_json(source) -> None:
    """Names of runs and schemes are not counted: a sentence that lists them is as long as they are."""
    try:
        points = source if source is FEW else read_points(source)
        if len(points) > 600:
            pytest.skip("a large table says nothing new here")
        warnings = fit_law(points, n_starts=4).warnings
    except ValueError:
        return  # tables that are not read yet, or too few points
    assert source is not FEW or {"few_sizes", "no_reference", "one_run"} & {w.kind for w in warnings}
    for w in warnings:
        words = w.sentence.split(" (")[0].split(": run")[0].split()
        assert (w.sentence[-1], len(words) <= 25) == (".", True), w.sentence
        assert json.loads(json.dumps(w.to_dict())) == w.to_dict()
