"""Seconds of a run from the times of finished runs, and goals of next runs as text."""

import json

import pytest

from questctl.errors import DataError, UsageError
from questctl.scaling.plan import EffGoal, LossGoal, TransitionGoal, parse_goal
from questctl.scaling.run_times import seconds_of_runs
from questctl.scaling.sources import load_sources

HEAD = "scheme,params_non_embedding,tokens,loss,seconds"


def table(tmp_path, rows: list[str], head: str = HEAD):
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([head, *rows]))
    return load_sources([path])


def test_a_power_of_the_size_is_recovered_for_each_scheme(tmp_path) -> None:
    sizes = (1e5, 2e5, 8e5)
    rows = [f"bf16,{n:.0f},1e6,{3 + i / 10},{1e-4 * n**0.5 * 1e6}" for i, n in enumerate(sizes)]
    rows += [f"w4a4,{n:.0f},2e6,{3.2 + i / 10},{3e-4 * n**0.25 * 2e6}" for i, n in enumerate(sizes)]
    sources = table(tmp_path, rows)
    seconds, labels = seconds_of_runs(sources, sources.points), sources.points.labels
    assert seconds(labels.index("bf16"), 4e5, 5e6) == pytest.approx(1e-4 * 4e5**0.5 * 5e6)
    assert seconds(labels.index("w4a4"), 4e5, 5e6) == pytest.approx(3e-4 * 4e5**0.25 * 5e6)


def test_a_scheme_of_one_size_takes_the_slope_of_all(tmp_path) -> None:
    rows = [f"bf16,{n:.0f},1e6,{3 + i / 10},{1e-6 * n * 1e6}" for i, n in enumerate((1e5, 2e5, 4e5))]
    sources = table(tmp_path, [*rows, f"w4a4,2e5,1e6,3.3,{1e-6 * 2e5 * 1e6}"])
    seconds, labels = seconds_of_runs(sources, sources.points), sources.points.labels
    assert seconds(labels.index("w4a4"), 8e5, 1e6) == pytest.approx(8e5)


def test_a_table_without_times_is_refused(tmp_path) -> None:
    sources = table(tmp_path, ["bf16,1e5,1e6,3", "bf16,2e5,1e6,2.9"], HEAD.rpartition(",")[0])
    with pytest.raises(DataError, match="--seconds: the sources have no runs with times"):
        seconds_of_runs(sources, sources.points)


def test_goals_as_text() -> None:
    assert parse_goal("transition@7B") == TransitionGoal(7e9, "8", "4")
    assert parse_goal("eff") == EffGoal(())
    assert parse_goal("eff:w4a4,w2a2") == EffGoal(("w4a4", "w2a2"))
    assert parse_goal("loss@1B:20B") == LossGoal(1e9, 2e10, ())
    assert parse_goal("loss@1B:20B:w4a4,4") == LossGoal(1e9, 2e10, ("w4a4", "4"))
    with pytest.raises(UsageError, match="none of transition@SIZE"):
        parse_goal("loss")
    assert json.dumps(str(parse_goal("eff:2,1"))) == '"eff of 2, 1"'
