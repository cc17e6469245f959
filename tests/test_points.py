"""Reading points: accepted tables, refused ones, and the row and column that an error names."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from shared_data import DATA, needs

from questctl.analysis.formats import FP4_LEVELS, format_mse, gaussian_mse, grid_mse
from questctl.analysis.points import make_points, points_from_frame, read_points
from questctl.analysis.schemes import find_scheme, read_scheme
from questctl.analysis.tables import PointError


def frame(**columns: list) -> pd.DataFrame:
    return pd.DataFrame(
        {"N": [1e6, 2e6, 3e6], "D": [1e7, 2e7, 3e7], "loss": [3.0, 2.5, 2.2], "scheme": ["bf16", "w4a4", "w2a2"]} | columns
    )


@pytest.mark.parametrize(
    ("label", "w", "a", "bits", "rotated"),
    [
        ("w4a4", 4, 4, 4, True),
        ("w4a16", 4, 16, 4, True),
        ("w-fp4-a-fp4", 4, 4, 4, True),
        ("w4sparse-a4", 4, 4, 2.5, True),
        ("bf16", 16, 16, 16, True),
        ("w2a2-norot", 2, 2, 2, False),
        ("4", 4, 4, 4, True),
        ("1.585", math.log2(3), math.log2(3), math.log2(3), True),
        ("quest-W3A3", 3, 3, 3, True),
        ("BF16+BF16", 16, 16, 16, True),
        ("ternary", math.log2(3), math.log2(3), math.log2(3), True),
    ],
)
def test_labels_say_their_bits(label: str, w: float, a: float, bits: float, rotated: bool) -> None:
    scheme = read_scheme(label)
    assert scheme is not None
    assert (scheme.w_grid_bits, scheme.a_grid_bits, scheme.w_stored_bits, scheme.rotated) == (w, a, bits, rotated)


def test_spec_words_beat_labels() -> None:
    s = read_scheme("small", "int4-h128-rms-2of4pairs-trust", "int8-h128-rms-trust")
    assert s is not None
    assert (s.w_grid_bits, s.a_grid_bits, s.w_stored_bits) == (4, 8, 2.5)
    assert read_scheme("no such thing") is None


def test_gaussian_errors_of_the_grids() -> None:
    # QuEST's constants, arXiv 2502.05003 and its repository: MSE of the best symmetric mid-rise grid on a standard normal
    for bits, mse in {1: 0.3633802276, math.log2(3): 0.1901740393, 2: 0.1188460504, 3: 0.0374396594, 4: 0.0115428845}.items():
        assert grid_mse(bits) == pytest.approx(mse, abs=2e-10)
    assert format_mse("fp4") == pytest.approx(0.0126849041, abs=2e-10)
    assert grid_mse(16) == 0
    assert math.isnan(format_mse("word"))
    z = np.random.default_rng(0).standard_normal(400_000)  # the formula against plain rounding, for a grid no table has
    levels = np.array(FP4_LEVELS) * 0.5
    direct = np.mean((z - levels[np.argmin(abs(z[:, None] - levels), axis=1)]) ** 2)
    assert direct >= gaussian_mse(FP4_LEVELS) * 0.99
    assert direct == pytest.approx(gaussian_mse(FP4_LEVELS), rel=0.03)


def test_one_order_and_one_hash() -> None:
    whole = frame()
    a, b = points_from_frame(whole), points_from_frame(whole.iloc[[2, 0, 1]])
    assert a.labels == ("bf16", "w4a4", "w2a2")
    assert a.hash == b.hash
    assert np.array_equal(a.loss, b.loss)
    assert a.hash != points_from_frame(frame(loss=[3.0, 2.5, 2.21])).hash
    assert np.array_equal(a.memory_bits, [16e6, 8e6, 6e6])


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_kinds_of_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"runs.{suffix}"
    if suffix == "csv":
        frame().to_csv(path, index=False)
    elif suffix == "json":
        path.write_text(json.dumps(frame().to_dict("records")))
    else:
        pytest.importorskip("pyarrow")
        frame().to_parquet(path)
    assert read_points(path).hash == points_from_frame(frame()).hash


def test_columns_and_filters() -> None:
    table = pd.DataFrame(
        {
            "params": [1e6, 2e6, 9.0],
            "T": [1e7, 2e7, 9.0],
            "nll": [3.0, 2.5, 9.0],
            "fwd": ["BF16", "BF16", "x"],
            "bwd": ["BF16", "BF16", "y"],
        }
    )
    points = points_from_frame(table, columns={"D": "T", "loss": "nll", "scheme": "fwd+bwd"}, where={"fwd": "BF16"})
    assert points.labels == ("BF16+BF16",)
    assert len(points) == 2
    with pytest.raises(PointError, match=r"'tokenz'.*the table has: params, T"):
        points_from_frame(table, columns={"D": "tokenz"})
    with pytest.raises(PointError, match="'mode'"):
        points_from_frame(table, where={"mode": "x"})
    with pytest.raises(PointError, match="no rows with fwd=FP8"):
        points_from_frame(table, columns={"loss": "nll"}, where={"fwd": "FP8"})


@pytest.mark.parametrize("value", ["3e7", "30000000", "3.0e+07", 3e7])
def test_where_compares_numbers_as_numbers(value):
    for N in ([30_000_000, 60_000_000], [3e7, 6e7], [30_000_000, 6e7]):
        table = pd.DataFrame({"N": N, "D": [1e9, 2e9], "loss": [3.0, 2.9], "scheme": ["4", "bf16"]})
        assert points_from_frame(table, where={"N": value}).N.tolist() == [3e7]
    mixed = pd.DataFrame({"N": [3e7, 6e7], "D": [1e9, 2e9], "loss": [3.0, 2.9], "tag": ["3e7", "x"], "bits": [4, 16]})
    assert points_from_frame(mixed, where={"tag": value}).N.tolist() == [3e7]
    assert points_from_frame(mixed, where={"tag": "x"}).N.tolist() == [6e7]


def test_where_that_matches_nothing_shows_what_there_is():
    table = pd.DataFrame({"N": [3e7 * (i + 1) for i in range(9)], "D": 1e9, "loss": [3.0 - i / 10 for i in range(9)]})
    with pytest.raises(PointError, match=r"with N=5e7; it has 30000000, 60000000, 90000000, 120000000, 150000000 and 4 more$"):
        points_from_frame(table, where={"N": "5e7"})
    with pytest.raises(PointError, match="no rows with N=small; it has 30000000"):
        points_from_frame(table, where={"N": "small"})


@pytest.mark.parametrize(
    ("change", "row", "column"),
    [
        ({"loss": [3.0, 2.5, -2.2]}, "points row 3", "loss"),
        ({"N": ["1e6", "many", "3e6"]}, "points row 2", "N"),
        ({"D": [0, 2e7, 3e7]}, "points row 1", "D"),
        ({"scheme": ["bf16", "mystery", "w2a2"]}, "points row 2", "scheme"),
        ({"w_bits": [16, 3, 2]}, "points row 2", "w_bits"),
        ({"data_hash": ["a", "a", "b"]}, "points row 3", "data_hash"),
        ({"weight": [1, 1, -1]}, "points row 3", "weight"),
        ({"loss": [3.0, float("inf"), 2.2], "run": ["a", "b", "c"]}, "run b", "loss"),
    ],
)
def test_refusals_name_row_and_column(change: dict, row: str, column: str) -> None:
    with pytest.raises(PointError) as caught:
        points_from_frame(frame(**change), source="points")
    assert (caught.value.row, caught.value.column) == (row, column)
    assert row in str(caught.value)
    assert f"'{column}'" in str(caught.value)


def test_duplicates_and_repeats() -> None:
    twice = {"N": [1e6, 1e6, 3e6], "D": [1e7, 1e7, 3e7], "scheme": ["bf16", "bf16", "w2a2"]}
    with pytest.raises(PointError, match=r"row 2.*repeats table row 1"):
        points_from_frame(frame(**twice, loss=[3.0, 3.0, 2.2]))
    assert len(points_from_frame(frame(**twice, loss=[3.0, 3.01, 2.2]))) == 3


def test_unfinished_runs_are_named_not_dropped_in_silence() -> None:
    points = points_from_frame(frame(run=["a", "b", "c"], state=["done", "diverged", "done"]))
    assert len(points) == 2
    assert "run b (diverged)" in points.notes[0].sentence
    with pytest.raises(PointError, match="no finished runs"):
        points_from_frame(frame(state=["failed"] * 3))
    with pytest.raises(PointError, match="no rows"):
        points_from_frame(pd.DataFrame({"N": [], "D": [], "loss": [], "scheme": []}))
    with pytest.raises(PointError, match="'loss'"):
        points_from_frame(pd.DataFrame({"N": [1.0], "D": [2.0]}))


def test_schemes_are_found_by_label_and_by_bits() -> None:
    points = make_points([1e6] * 5, [1e7] * 5, [3, 3.1, 3.2, 3.3, 3.4], ["bf16", "w4a4", "w4a4-norot", "w4sparse-a4", "w4a16"])
    assert [points.labels[points.index(w)] for w in (16, 4, "4", "W4A4", "w4a4-norot")] == [
        "bf16",
        "w4a4",
        "w4a4",
        "w4a4",
        "w4a4-norot",
    ]
    with pytest.raises(PointError, match=r"no runs of scheme '1.585'; schemes with runs: bf16, w4a16, w4a4, "):
        find_scheme(points.schemes, 1.585)


def test_unreadable_files(tmp_path: Path) -> None:
    for name, text in (("a.json", "{"), ("a.csv", ""), ("a.txt", "x")):
        (tmp_path / name).write_text(text)
        with pytest.raises(PointError, match=name):
            read_points(tmp_path / name)


@needs("quest_runs.csv")
def test_the_published_runs() -> None:
    points = read_points(DATA / "quest_runs.csv")
    assert len(points) == 104
    counts = {label: int((points.group == g).sum()) for g, label in enumerate(points.labels)}
    assert (counts["bf16"], counts["w8a8"], counts["w4a4"], counts["w3a3"], counts["w2a2"], counts["w1a1"]) == (
        6,
        3,
        14,
        13,
        12,
        6,
    )
    assert (counts["w4sparse-a4"], counts["w-fp4-a-fp4"], counts["w1a16"]) == (6, 4, 4)
    assert any(
        note.kind == "bits_column" and note.numbers["scheme"] == "w-fp4-a-fp4" and note.numbers["bits"] == 4
        for note in points.notes
    )
    assert int((abs(points.D / points.N - 100) > 5).sum()) == 24


def test_a_cell_that_is_no_number_is_named_by_row_and_column():
    for column in ("N", "w_bits", "model_bits"):
        broken = frame().assign(w_bits=16.0, model_bits=1e6).astype(object)
        broken.loc[1, column] = "16]16"
        with pytest.raises(PointError, match=f"row 2.*'{column}'.*'16]16' is not a number"):
            points_from_frame(broken)


def test_bits_of_runs_with_masks_and_grouped_scales_are_the_stored_ones():
    words = ["int4-h64-rms-2of4pairs-trust", "int4-h64-rms.g32-trust", "fp4-e8m0.g32-ste", "int4-h64-rms-trust"]
    stored = [2.5, 4.5, 4.25, 4.0]
    frame = pd.DataFrame(
        {
            "scheme": ["sparse", "grouped", "mx", "plain"],
            "weights": words,
            "activations": words,
            "w_bits": stored,
            "a_bits": stored,
            "N": [1e6] * 4,
            "D": [2e7] * 4,
            "loss": [3.0, 2.9, 2.95, 2.85],
        }
    )
    points = points_from_frame(frame)
    assert {s.label: s.w_stored_bits for s in points.schemes} == {"sparse": 2.5, "grouped": 4.5, "mx": 4.25, "plain": 4.0}
    with pytest.raises(PointError, match="contradicts"):
        points_from_frame(frame.assign(w_bits=[2.5, 4.5, 4.25, 3.0]))


def test_columns_of_bits_have_one_meaning_each_and_old_names_are_read() -> None:
    made = frame()
    now = points_from_frame(made.assign(scheme=["a", "b", "c"], w_grid_bits=[16, 4, 2], w_stored_bits=[16, 2.5, 2.25]))
    before = points_from_frame(made.assign(scheme=["a", "b", "c"], w_bits=[16, 4, 2], stored_bits=[16, 2.5, 2.25]))
    assert now.schemes == before.schemes
    assert [(s.w_grid_bits, s.a_grid_bits, s.w_stored_bits) for s in now.schemes] == [(16, 16, 16), (4, 4, 2.5), (2, 2, 2.25)]
    record = now.to_records()[1]
    assert (record["w_grid_bits"], record["w_stored_bits"]) == (4, 2.5)
    old = [
        {
            **{k: v for k, v in r.items() if "bits" not in k},
            "w_bits": r["w_grid_bits"],
            "a_bits": r["a_grid_bits"],
            "stored_bits": r["w_stored_bits"],
            "model_bits": r["model_bits"],
        }
        for r in now.to_records()
    ]
    assert points_from_frame(pd.DataFrame(old)).hash == now.hash  # the points of a fit.json of version 0.1
    mixed = made.assign(
        scheme=["bf16", "w4a4", "w4a4+1f2e"], w_grid_bits=[16, 4, np.nan], w_stored_bits=[16, 4, 3.5], a_stored_bits=[16, 4, 8]
    )
    assert {s.label: s.w_stored_bits for s in points_from_frame(mixed).schemes}["w4a4+1f2e"] == 3.5
    with pytest.raises(PointError, match="w_grid_bits"):
        points_from_frame(made.assign(w_grid_bits=[16, 3, 2]))


def test_sizes_that_differ_by_less_than_a_hundredth_of_a_percent_are_one() -> None:
    N = [1e8, 1e8 * (1 + 5e-5), 1e8, 2e8, 2e8 * (1 + 5e-4)]
    points = make_points(N, [2e9, 3e9, 4e9, 2e9, 3e9], [3.0, 2.9, 2.8, 2.7, 2.6], ["bf16"] * 5)
    assert points.sizes.tolist() == [1e8, 2e8, 2e8 * (1 + 5e-4)]
    assert points.memory_bits.tolist()[:3] == [16e8] * 3
    (note,) = [note for note in points.notes if note.kind == "near_sizes"]
    assert note.numbers["sizes"] == [[1e8, 1e8 * (1 + 5e-5)]]


@pytest.mark.parametrize(("step", "groups"), [(1.045, 6), (1.01, 3), (1.2, 12)])
def test_a_dense_range_of_ratios_is_many_budgets(step: float, groups: int) -> None:
    ratio = 20 * step ** np.arange(12)
    points = make_points([1e8] * 12, 1e8 * ratio, 3 - 0.01 * np.arange(12), ["bf16"] * 12)
    assert len(points.ratios) >= groups
    assert not points.D_follows_N
    together = make_points(np.geomspace(1e7, 1e9, 12), 20 * np.geomspace(1e7, 1e9, 12), 3 - 0.01 * np.arange(12), ["bf16"] * 12)
    assert together.D_follows_N
