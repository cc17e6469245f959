"""Predictions: the law's own numbers, with an interval that holds the truth, for one model or a table of them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import output
from planted import planted

import questctl
from questctl.analysis.laws import Design, get_law
from questctl.console import json_text
from questctl.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("each_fit_once")
HUGE, MANY = 7e9, 140e9


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    points, _ = planted("quest", noise=2e-3, schemes=("bf16", "w4a4", "w2a2"))
    path = tmp_path_factory.mktemp("predict") / "t.csv"
    pd.DataFrame(points.to_records()).drop(columns=["run"]).to_csv(path, index=False)
    return path


def test_a_prediction_is_the_law_at_that_point_and_its_interval_holds_the_truth(table: Path) -> None:
    fitted = questctl.fit_sources(table, bootstrap=0)
    predicted = questctl.predict(fitted, HUGE, MANY, "w4a4", bootstrap=100)
    (cell,) = predicted.cells
    assert cell.loss == float(fitted.fit.predict(HUGE, MANY, "w4a4"))
    assert cell.laws["quest"] == cell.loss
    assert cell.spread[0] <= cell.loss <= cell.spread[1]
    points, theta = planted("quest", schemes=("bf16", "w4a4", "w2a2"))
    at = Design.of(points).at(np.array([HUGE]), np.array([MANY]), np.array([points.index("w4a4")]))
    truth = float(get_law("quest").predict(theta, at)[0][0])
    assert cell.interval is not None
    assert cell.interval[0] < truth < cell.interval[1]
    assert cell.outside == {"N": pytest.approx(HUGE / 800e6), "D/N": pytest.approx(25 / 20)}
    assert [finding.kind for finding in predicted.findings if finding.kind == "outside"] == ["outside"] * 2


def test_all_schemes_are_predicted_where_none_is_named(table: Path) -> None:
    assert [cell.scheme for cell in questctl.predict(table, 1e8, 2e9, bootstrap=0).cells] == ["bf16", "w4a4", "w2a2"]
    (by_bits,) = questctl.predict(table, 1e8, 2e9, "4", bootstrap=0).cells
    assert (by_bits.scheme, by_bits.interval) == ("w4a4", None)


def test_a_table_of_cells_by_file_by_list_and_on_the_command_line(table: Path, tmp_path: Path) -> None:
    cells = [(1e8, 2e9, "w4a4"), (7e9, 1.4e11, "bf16")]
    (tmp_path / "cells.csv").write_text("params;tokens;scheme\n100M;2B;w4a4\n7B;140B;16\n")
    listed = questctl.predict(table, cells=cells, bootstrap=50)
    assert questctl.predict(table, cells=tmp_path / "cells.csv", bootstrap=50).cells == listed.cells
    shown = json.loads(output("predict", f"{table}", "--cells", f"{tmp_path}/cells.csv", "--bootstrap", "50", "--json"))
    assert [cell["loss"] for cell in shown["cells"]] == pytest.approx([cell.loss for cell in listed.cells])
    assert shown["findings"][0]["kind"] == "answer"
    asked = ("predict", f"{table}", "--N", "100M", "--D", "2B", "--scheme", "4", "--bootstrap", "0")
    one = json.loads(output(*asked, "--json"))
    assert one["cells"][0]["loss"] == pytest.approx(listed.cells[0].loss)
    assert "Predicted loss of w4a4" in output(*asked)


CELLS = {  # tables of one cell, which is (1e8, 2e9, "w4a4")
    "bits.csv": "N,D,w_bits,a_bits\n1e8,2e9,4,4\n",
    "ratio.csv": "N,tokens_per_param,scheme\n100M,20,w4a4\n",
    "units.csv": "Params (M);Tokens (B);scheme\n100;2,0;w4a4\n",
    "total.csv": "N,D,scheme\n1e8,2e9,w4a4\nTotal,2e9,\n",
    "one.json": '{"N": 1e8, "D": 2e9, "scheme": "w4a4"}',
}


@pytest.mark.parametrize("name", CELLS)
def test_cells_are_read_as_runs_are(name: str, table: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(CELLS[name])
    (cell,) = questctl.predict(table, cells=tmp_path / name, bootstrap=0).cells
    assert (cell.params_non_embedding, cell.tokens, cell.scheme) == (1e8, 2e9, "w4a4")


def test_a_cell_without_a_scheme_is_predicted_for_each(table: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_text("size,D\n1e8,2e9\n")
    mapped = questctl.predict(table, cells=tmp_path / "cells.csv", columns={"N": "size", "loss": "out"}, bootstrap=0)
    assert [cell.scheme for cell in mapped.cells] == ["bf16", "w4a4", "w2a2"]
    asked = questctl.predict(table, None, None, "4", cells=tmp_path / "cells.csv", columns={"N": "size"}, bootstrap=0)
    assert [cell.scheme for cell in asked.cells] == ["w4a4"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("N,D\n7%,2e9\n", r"row 1, column 'N': '7%' is a share"),
        ("N,scheme\n1e8,w4a4\n", r"row 1, column 'D': missing; name the column by --map D=COLUMN"),
        ("N,D\n1e8,2e9\n1e8,\n", r"row 2, column 'D': an empty cell"),
        ("size,D\n1e8,2e9\n", r"row 1, column 'N': missing; the table has: size, D"),
        ("N,D,scheme\n1e8,2e9,w4a4\n1e8,2e9,w9a9\n", r"row 2, column 'scheme': no runs of scheme 'w9a9'; schemes with"),
    ],
)
def test_cells_that_cannot_be_read_say_why(cells: str, message: str, table: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_text(cells)
    with pytest.raises(DataError, match=message):
        questctl.predict(table, cells=tmp_path / "cells.csv", bootstrap=0)


def test_what_cannot_be_predicted_says_why(table: Path, tmp_path: Path) -> None:
    assert "give --N and --D" in output("predict", f"{table}", "--N", "7B", code=2)
    with pytest.raises(UsageError, match="schemes with runs: bf16, w4a4, w2a2"):
        questctl.predict(table, 1e8, 2e9, "w3a3")
    with pytest.raises(UsageError, match="positive"):
        questctl.predict(table, -1.0, 2e9)
    (tmp_path / "cells.csv").write_text("N,D\n1e8,0\n")
    with pytest.raises(DataError, match=r"cells\.csv row 1, column 'D': 0 must be a positive finite number"):
        questctl.predict(table, cells=tmp_path / "cells.csv")


def test_a_fit_that_no_run_tests_gives_no_interval(tmp_path: Path) -> None:
    points, _ = planted("chinchilla", noise=1e-3, sizes=(30e6, 60e6, 120e6, 240e6, 480e6), ratios=(20,))
    pd.DataFrame(points.to_records()).drop(columns=["run"]).to_csv(tmp_path / "t.csv", index=False)
    predicted = questctl.predict(tmp_path / "t.csv", 1e9, 2e10)
    assert predicted.fit.status == "not identifiable"
    assert predicted.cells[0].interval is None
    assert any(finding.kind == "status" for finding in predicted.findings)


def test_a_saved_fit_predicts_as_it_was_made(table: Path, tmp_path: Path) -> None:
    made = questctl.fit_sources(table, fix={"E": 1.5}, bootstrap=0)
    (tmp_path / "fit.json").write_text(json_text(made.document.to_json()))
    asked = ("--N", "100M", "--D", "2B", "--scheme", "4", "--bootstrap", "0", "--json")
    saved = json.loads(output("predict", f"{tmp_path}/fit.json", *asked))
    loss = float(made.fit.predict(1e8, 2e9, "w4a4"))
    free = json.loads(output("predict", f"{table}", *asked))
    assert saved["cells"][0]["loss"] == pytest.approx(loss, rel=1e-9)
    assert saved["cells"][0]["loss"] != pytest.approx(free["cells"][0]["loss"], rel=1e-7)
    assert "is a saved fit" in output("predict", f"{tmp_path}/fit.json", "--law", "qat", *asked, code=2)
