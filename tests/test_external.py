"""External runs: published ones, W&B exports and plain tables become points beside one's own runs, marked as imported."""

import csv
import json
from pathlib import Path

import pytest
from command_line import invoke, output

from questctl import load_runs
from questctl.analysis.points import points_from_frame
from questctl.analysis.rows import published_scheme
from questctl.errors import DataError
from questctl.store.external import read


def published(scheme: str, n: int, w: str, a: str, w_bits: int, a_bits: int, loss: float) -> dict[str, object]:
    """A record as the published file has them; `scheme` is kept out of it."""
    return {
        "model_size": 30,
        "non_embedding_parameters": n,
        "w_bits": w_bits,
        "a_bits": a_bits,
        "loss": loss,
        "tokens": 100 * n,
        "bops": 100 * n * n,
        "w_quant": w,
        "a_quant": a,
        "trust": None,
        "p": None,
        "clip_scale": None,
        "args": {"dataset": "c4", "lr": 1.2e-3, "n_layer": 6, "n_embd": 640, "w_quant_kwargs": {"bits": w_bits}},
    }


PUBLISHED = [
    ("bf16", "NoQuantizer", "NoQuantizer", 16, 16),
    ("w4a4", "HadamardTrustQuantizer", "HadamardTrustQuantizer", 4, 4),
    ("w4a4", "HalfHadamardTrustQuantizer", "HalfHadamardTrustQuantizer", 4, 4),
    ("w4a16", "HalfHadamardTrustQuantizer", "NoQuantizer", 4, 16),
    ("w1a1-norot", "ClipQuantizer", "ClipQuantizer", 1, 1),
    ("w4sparse-a4", "HadamardFourEightTrustQuantizer", "HadamardTrustQuantizer", 4, 4),
    ("w-fp4-a-fp4", "HalfHadamardFP4TrustQuantizer", "HalfHadamardFP4TrustQuantizer", 16, 16),
]


def test_the_published_runs(tmp_path: Path) -> None:
    records = [published(s, 30_000_000 + i, w, a, wb, ab, 3 + i / 10) for i, (s, w, a, wb, ab) in enumerate(PUBLISHED)]
    (tmp_path / "runs.json").write_text(json.dumps(records))
    shown = json.loads(output("runs", "import", f"{tmp_path}/runs.json", "--runs", f"{tmp_path}/r", "--json"))
    assert shown["unknown_data"] == shown["runs"] == 7
    frame = load_runs(tmp_path / "r")
    assert frame["scheme"].tolist() == [scheme for scheme, *_ in PUBLISHED]
    assert frame["state"].tolist() == ["imported"] * 7
    assert frame["lr"].tolist() == [1.2e-3] * 7
    points = points_from_frame(frame)
    assert {s.label: s.w_stored_bits for s in points.schemes}["w4sparse-a4"] == 2.5
    assert any("7 of 7 runs are of unknown data" in note.sentence for note in points.notes)
    assert "trained elsewhere" in invoke("runs", "ls", "--runs", f"{tmp_path}/r").stderr
    assert json.loads(output("runs", "ls", "--runs", f"{tmp_path}/r", "--json")) == []  # none of them is a run of one's own


def test_all_schemes_of_the_published_table(data: Path) -> None:
    with (data / "quest_runs.csv").open() as f:
        for row in csv.DictReader(f):
            bits = float(row["w_bits"]), float(row["a_bits"])
            assert published_scheme(row["w_quantizer"], row["a_quantizer"], *bits) == row["scheme"]


@pytest.fixture
def data() -> Path:
    import os

    folder = Path(os.environ.get("QUESTCTL_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared/data")
    if not (folder / "quest_runs.csv").is_file():
        pytest.skip(f"no published runs in {folder}")
    return folder


def test_a_wandb_export_as_csv(tmp_path: Path) -> None:
    (tmp_path / "export.csv").write_text(
        '"Name","State","Notes","scheme","params_non_embedding","tokens","final-val/loss"\n'
        '"a","finished","","w4a4","1000000","20000000","3.5"\n'
        '"b","crashed","","w4a4","1000000","40000000","3.4"\n'
        '"c","finished","","w4a4","2000000","40000000",""\n'
        '"a","finished","","bf16","1000000","20000000","3.25"\n'
    )
    found = read(tmp_path / "export.csv", data_hash="abc")
    assert [(r["run"], r["scheme"], r["params_non_embedding"], r["tokens"], r["loss"]) for r in found.rows] == [
        ("export/a-1", "w4a4", 1_000_000, 20_000_000, 3.5),
        ("export/a-2", "bf16", 1_000_000, 20_000_000, 3.25),
    ]
    assert (found.unfinished, found.without_loss) == (1, 1)
    assert {r["data_hash"] for r in found.rows} == {"abc"}


def test_a_wandb_export_as_json(tmp_path: Path) -> None:
    batch = {"iterations": 10, "batch_size": 4, "sequence_length": 512, "acc_steps": 2, "world_size": 1}
    wrapped = {k: {"value": v, "desc": None} for k, v in {**batch, "w_quant": "NoQuantizer", "a_quant": "NoQuantizer"}.items()}
    runs = [
        {
            "name": "x",
            "id": "1",
            "state": "finished",
            "config": wrapped,
            "summary": {"final-val/loss": 3.0, "non_embedding_parameters": 5000, "_step": 9},
        },
        {"name": "y", "state": "running", "config": batch, "summary": {}},
    ]
    (tmp_path / "w.json").write_text(json.dumps(runs))
    (row,) = read(tmp_path / "w.json").rows
    assert (row["run"], row["scheme"], row["tokens"], row["loss"]) == ("w/x", "bf16", 10 * 4 * 512 * 2, 3.0)


def test_a_plain_table_with_names_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("k,size,seen,fwd,bwd,L\n1,1e6,2e7,INT4,BF16,3.5\n2,1e6,3e7,INT4,BF16,3.4\n")
    with pytest.raises(DataError, match=r"column 'N': missing; the table has: k, size, .*; name the column by --map N=COLUMN"):
        read(table)
    with pytest.raises(DataError, match=r"column 'sizes': no such column \(mapped to N\)"):
        read(table, columns={"N": "sizes"})
    found = read(table, columns={"N": "size", "D": "seen", "scheme": "fwd"}, where={"k": "2"})
    assert [(r["tokens"], r["scheme"], r["loss"]) for r in found.rows] == [(30_000_000, "INT4", 3.4)]
    assert found.rows[0]["data_hash"] == "unknown"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "scheme,N,D,loss\nw4a4,many,1,3\n", r"column 'N': 'many' is not a number; --skip-bad leaves out such rows"),
        ("t.csv", "scheme,N,D,loss\nw4a4,-5,1,3\n", "must be a positive finite number"),
        ("t.csv", "scheme,N,D,loss\nwhat,5,1,3\n", "the bits of 'what' are unknown"),
        ("t.csv", "scheme,N,D,loss\n", "holds no rows"),
        ("t.csv", "scheme,N,D\nw4a4,5,1\n", "column 'loss': missing"),
        ("t.json", "[1, 2]", "must hold a list of runs"),
        ("t.json", "{", "is not a readable json table"),
        ("t.xlsx", "", r"unknown kind of table '\.xlsx'"),
    ],
)
def test_tables_that_are_refused_write_nothing(name: str, content: str, message: str, tmp_path: Path) -> None:
    import re

    (tmp_path / name).write_text(content)
    said = " ".join(output("runs", "import", f"{tmp_path}/{name}", "--runs", f"{tmp_path}/r", code=2).split())
    assert re.search(message, said), said
    assert not (tmp_path / "r").exists()


def test_the_same_name_twice_needs_force(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("scheme,N,D,loss,data_hash\nw4a4,5,1,3,h\n")
    args = ["runs", "import", f"{tmp_path}/t.csv", "--runs", f"{tmp_path}/r"]
    output(*args)
    assert "give --force" in output(*args, code=2)
    output(*args, "--force")
    output(*args, "--name", "again")
    assert len(load_runs(tmp_path / "r")) == 2


def test_different_known_data_are_still_refused_in_one_fit(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("scheme,N,D,loss,data_hash\nw4a4,5,1,3,unknown\nw4a4,6,1,3,aa\nw4a4,7,1,3,bb\n")
    said = output("runs", "import", f"{tmp_path}/t.csv", "--runs", f"{tmp_path}/r", code=2)
    assert "losses on different data cannot share a law (t.csv row 2 has aa)" in " ".join(said.split())
