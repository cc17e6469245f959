"""Tables: every kind of file and nesting, and that a fit and an import of the same table rest on the same points."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import planted
from shared_data import DATA

from questctl.analysis.filters import says, written
from questctl.analysis.points import Points, points_from_frame, read_points
from questctl.analysis.rows import label_of, read_rows
from questctl.analysis.tables import PointError, named_run, read_table
from questctl.cli.fit_options import conditions
from questctl.errors import DataError
from questctl.scaling.sources import load_sources
from questctl.store.external import read
from questctl.words import few

ROWS = [
    {"N": 1e6, "D": 2e7, "loss": 3.25, "scheme": "bf16"},
    {"N": 1e6, "D": 2e7, "loss": 3.5, "scheme": "w4a4"},
    {"N": 2e6, "D": 4e7, "loss": 3.125, "scheme": "bf16"},
    {"N": 2e6, "D": 4e7, "loss": 3.3799999999999998934, "scheme": "w4a4"},
]
BATCH = {"iterations": 10, "batch_size": 4, "sequence_length": 512, "acc_steps": 2, "world_size": 1}
QUANT = {"bf16": "NoQuantizer", "w4a4": "HadamardTrustQuantizer"}


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def wandb(rows: list[dict], *, wrapped: bool) -> list[dict]:
    def config(row: dict) -> dict:
        values = {"N": row["N"], "D": row["D"], "scheme": row["scheme"]}
        return {k: {"value": v, "desc": None} for k, v in values.items()} if wrapped else values

    return [
        {"name": f"r{i}", "state": "finished", "config": config(row), "summary": {"val/loss": row["loss"], "_step": 9}}
        for i, row in enumerate(rows)
    ]


def csv_text(rows: list[dict]) -> str:
    header = list(rows[0])
    return "\n".join([",".join(header), *(",".join(str(row.get(c, "")) for c in header) for row in rows)]) + "\n"


TABLES = {
    "plain.csv": csv_text(ROWS),
    "bom.csv": "\ufeff" + csv_text(ROWS),
    "renamed.csv": csv_text([{"params": r["N"], "tokens": r["D"], "val_loss": r["loss"], "P": r["scheme"]} for r in ROWS]),
    "records.json": json.dumps(ROWS),
    "columns.json": json.dumps(columns_of(ROWS)),
    "by_row.json": json.dumps({key: dict(enumerate(values)) for key, values in columns_of(ROWS).items()}),  # DataFrame.to_json
    "by_run.json": json.dumps({f"run{i}": row for i, row in enumerate(ROWS)}),
    "points.json": json.dumps({"law": "quest", "points": ROWS}),
    "lines.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "wandb.json": json.dumps(wandb(ROWS, wrapped=False)),
    "wandb_values.json": json.dumps(wandb(ROWS, wrapped=True)),
    "wandb.jsonl": "\n".join(json.dumps(row) for row in wandb(ROWS, wrapped=True)),
    "wandb_text.json": json.dumps([{**row, "config": json.dumps(row["config"])} for row in wandb(ROWS, wrapped=False)]),
    "states.csv": csv_text(
        [{**r, "State": "Finished"} for r in ROWS]
        + [{**ROWS[0], "N": 5e6, "State": "crashed"}, {**ROWS[0], "N": 6e6, "loss": "", "State": "finished"}]
    ),
}


def same(a: Points, b: Points) -> bool:
    return (a.hash, a.labels, a.schemes) == (b.hash, b.labels, b.schemes) and np.array_equal(a.memory_bits, b.memory_bits)


def imported(path: Path, **how: dict) -> Points:
    return points_from_frame(pd.DataFrame(read(path, **how).rows))


@pytest.mark.parametrize("name", TABLES)
def test_each_kind_of_table_gives_the_points_of_its_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(TABLES[name])
    points = read_points(path)
    assert same(points, points_from_frame(pd.DataFrame(ROWS)))
    assert points.loss.max() == 3.5
    assert 3.38 in points.loss  # read as Python reads it
    assert same(imported(path), points)


def test_what_is_left_out_is_named_by_both(tmp_path: Path) -> None:
    path = tmp_path / "states.csv"
    path.write_text(TABLES["states.csv"])
    notes = {note.kind: note.numbers["runs"] for note in read_points(path).notes}
    assert notes == {"unfinished_runs": ["states.csv row 5 (crashed)"], "no_loss": ["states.csv row 6"]}
    external = read(path)
    assert (external.unfinished, external.without_loss, len(external.rows)) == (1, 1, 4)


def test_published_records_and_tables_of_bits_name_their_schemes(tmp_path: Path) -> None:
    records = [
        {"args": {**BATCH, "w_quant": QUANT[r["scheme"]], "a_quant": QUANT[r["scheme"]]}, "N": r["N"], "loss": r["loss"]}
        | ({"w_bits": 4, "a_bits": 4} if r["scheme"] == "w4a4" else {"w_bits": 16, "a_bits": 16})
        for r in ROWS
    ]
    path = tmp_path / "published.json"
    path.write_text(json.dumps(records))
    points = read_points(path)
    assert points.labels == ("bf16", "w4a4")
    assert set(points.D) == {10 * 4 * 512 * 2}
    assert same(imported(path), points)
    bits = tmp_path / "bits.csv"
    bits.write_text(
        csv_text([{"N": r["N"], "D": r["D"], "loss": r["loss"], "w_bits": 16 if "b" in r["scheme"] else 4} for r in ROWS])
    )
    assert read_points(bits).labels == ("w16a16", "w4a4")
    assert same(imported(bits), read_points(bits))
    bare = tmp_path / "bare.csv"
    bare.write_text(csv_text([{k: r[k] for k in ("N", "D", "loss")} for r in ROWS]))
    assert read_points(bare).labels == ("all",)
    assert same(imported(bare), read_points(bare))


def test_weights_and_sizes_of_models_survive_an_import(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        csv_text(
            [
                {**r, "weight": 1 + i, "model_bits": 5e6 + i, "w_stored_bits": 16 if "b" in r["scheme"] else 4.5}
                for i, r in enumerate(ROWS)
            ]
        )
    )
    points = read_points(path)
    assert sorted(points.weight) == [1, 2, 3, 4]
    assert [s.w_stored_bits for s in points.schemes] == [16, 4.5]
    assert same(imported(path), points)


@pytest.mark.parametrize(
    "path",
    sorted([*DATA.glob("*_runs.csv"), *(DATA / "synthetic").glob("*"), *(DATA / "cases" / "tables").glob("*")]),
    ids=lambda p: p.name,
)
def test_a_fit_and_an_import_of_shared_tables_agree(path: Path) -> None:
    """The same points, or a refusal by both; an import needs the tokens as well, of which some laws know nothing."""
    maps = {"gadre_runs.csv": {"loss": "loss_c4_val"}, "quartet_runs.csv": {"scheme": "fwd+bwd"}}.get(path.name, {})
    try:
        points = read_points(path, columns=maps)
    except PointError as refused:
        why = str(refused).rpartition(": ")[2]
        with pytest.raises((DataError, PointError), match=re.escape(why.split(";")[0])):
            imported(path, columns=maps)
        return
    if np.isnan(points.D).any():
        with pytest.raises(DataError, match="column 'D': missing"):
            read(path, columns=maps)
        return
    assert same(imported(path, columns=maps), points)


def test_a_planted_grid_survives_csv_and_import_to_the_last_digit(tmp_path: Path) -> None:
    points, _ = planted("quest", noise=3e-3)
    frame = pd.DataFrame(points.to_records())
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_json(tmp_path / "t.json", orient="records", double_precision=15)
    assert read_points(tmp_path / "t.csv").hash == points.hash
    assert same(imported(tmp_path / "t.csv"), points)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "N,D,loss\n1,2,3,4\n", "line 2 has 4 cells, more than the 3 of the header"),
        ("t.csv", b"N,D\n\xff\n", "not a readable csv table"),
        ("t.json", '{"N": [1, 2], "D": [1]}', "columns have different lengths"),
        ("t.json", '{"a": 1}', "must hold a list of runs"),
        ("t.jsonl", "[1]\n", "must hold a list of runs"),
        (
            "t.xls",
            "",
            r"unknown kind of table '\.xls'; choices: \.csv, \.tsv, \.json, \.jsonl, \.parquet; save the sheet as CSV",
        ),
    ],
)
def test_files_that_cannot_be_read_say_why(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PointError, match=message):
        read_table(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_columns_of_numbers_are_numbers_and_names_stay_text(tmp_path: Path) -> None:
    with (tmp_path / "t.csv").open("w", newline="") as f:
        csv.writer(f).writerows(
            [["N", "lr", "data_hash", "tag", "x"], ["1", "1e-3", "0012", "3e7", ""], ["2", "", "0013", "b", ""]]
        )
    assert read_table(tmp_path / "t.csv").records == [
        {"N": 1, "lr": 1e-3, "data_hash": "0012", "tag": "3e7", "x": ""},
        {"N": 2, "lr": None, "data_hash": "0013", "tag": "b", "x": ""},
    ]


def test_rows_are_named_as_the_table_names_its_runs(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("run,N,D,loss\na,1,2,3\nb,1,x,3\n")
    with pytest.raises(PointError, match=r"run b, column 'D': 'x' is not a number"):
        read_points(tmp_path / "t.csv")
    table = read_table(tmp_path / "t.csv")
    rows = read_rows(table.records, table.row_names(), where={"run": "a"})
    assert (rows.names, rows.numbers, rows.rows[0]["N"]) == (["run a"], [1], 1)


@pytest.mark.parametrize("header", ["Name,State", "name,State", "ID,State", "Run Name,ID", "run_name,Notes"])
def test_names_of_runs_name_rows(header: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{header},N,D,loss\nsun,finished,1e6,2e7,3\nsea,finished,x,2e7,3\n")
    with pytest.raises(PointError, match=r"^run sea, column 'N': 'x' is not a number"):
        read_points(path)
    with pytest.raises(DataError, match=r"^run sea, column 'N'"):
        _ = load_sources(path).points


def test_names_that_stand_several_times_have_their_rows(tmp_path: Path) -> None:
    path, other = tmp_path / "t.csv", tmp_path / "other.csv"
    path.write_text("Name,N,D,loss\nsun,1e6,2e7,3\nsun,2e6,2e7,3\n,3e6,2e7,3\nsea,4e6,2e7,3\n")
    table = read_table(path)
    assert table.row_names() == ["run sun (row 1)", "run sun (row 2)", "t.csv row 3", "run sea"]
    assert [named_run(name) for name in table.row_names()] == ["sun", "sun", None, "sea"]
    other.write_text("Name,N,D,loss\nsea,5e6,2e7,3\n")
    assert load_sources([path, other]).names[-1] == "run sea, other.csv"


def test_few_values_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("N,D,loss,dataset\n" + "".join(f"1e6,2e7,3,set{i}\n" for i in range(12)))
    with pytest.raises(PointError, match="it has set0, set1, set2, set3, set4 and 7 more"):
        read_points(path, where={"dataset": "c4"})
    assert "(set0, set1, set10, set11, set2 and 7 more)" in read_points(path).notes[0].sentence
    with pytest.raises(PointError, match="choose one: h0, h1, h2, h3, h4 and 2 more"):
        points_from_frame(pd.DataFrame({"N": 1e6, "D": 2e7, "loss": 3.0, "data_hash": [f"h{i}" for i in range(7)]}))
    labels = [f"w{i}a{i}" for i in range(2, 9)]
    points = points_from_frame(pd.DataFrame({"N": 1e6, "D": 2e7, "loss": 3.0, "scheme": labels}))
    with pytest.raises(PointError, match="runs: w8a8, w7a7, w6a6, w5a5, w4a4 and 2 more; by bits: 8, 7, 6, 5, 4 and 2 more"):
        points.index("fp8")
    assert few(["a"]) == "a"
    assert few([]) == ""
    assert few("abc", last=" and ") == "a, b and c"
    assert few("abc", 2) == "a, b and 1 more"


@pytest.mark.parametrize(("value", "label"), [(4.0, "4"), ("4.0", "4"), (1.585, "1.585"), (" w4a4 ", "w4a4"), (16, "16")])
def test_labels(value: object, label: str) -> None:
    assert label_of(value) == label


@pytest.mark.parametrize(
    ("asked", "condition"),
    [
        ("N>=1e8", ">=1e8"),
        ("N=>1e8", "=>1e8"),
        ("N =< 1e8", "=<1e8"),
        ("N<>1e8", "<>1e8"),
        ("N>1e7 & N < 2e8", ">1e7&<2e8"),
        ("N>1e7,N<2e8", ">1e7&<2e8"),
    ],
)
def test_a_condition_is_what_was_written(asked: str, condition: str) -> None:
    assert conditions([asked]) == {"N": condition}
    assert conditions([written("N", condition)]) == {"N": condition}


@pytest.mark.parametrize(("condition", "kept"), [("=>1e8", [1e8, 2e8]), ("=<1e8", [1e7, 1e8]), ("<>1e8", [1e7, 2e8])])
def test_signs_of_other_languages_mean_the_same(condition: str, kept: list[float]) -> None:
    assert [cell for cell in (1e7, 1e8, 2e8) if says(cell, condition)] == kept


def test_numbers_in_filters_are_numbers() -> None:
    assert says(3e7, "30000000")
    assert says("3e7", "3.0e+07")
    assert not says(True, "1")
    assert not says(None, "x")
