"""The forms of tables: one table of 32 runs, written in every way, gives the same points, or one sentence with the way out.

FORMS is also what docs/reference/table-forms.md lists (benchmarks/table_forms.py writes it).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from shared_data import DATA
from table_forms import FORMS, RUNS, Form, write

from questctl.analysis.points import Points, read_points
from questctl.analysis.tables import PointError, TableOptions
from questctl.errors import DataError
from questctl.scaling.imports import import_runs
from questctl.scaling.sources import load_sources
from questctl.store import load_runs

TABLES = DATA / "cases" / "tables"


def rows_of(points: Points) -> list[tuple[float, float, float, float]]:
    """N, D, loss, and bits of the weights' grid, in order."""
    bits = [points.schemes[g].w_grid_bits for g in points.group]
    return sorted(zip(points.N, points.D, points.loss, bits, strict=True))


def expected(form: Form) -> list[tuple[float, float, float, float]]:
    return sorted((r["N"], r["D"], r["loss"], 16.0 if r["scheme"] == "bf16" else form.bits) for r in RUNS)


@pytest.mark.parametrize("form", [f for f in FORMS if not f.refused], ids=lambda f: f.name)
def test_each_form_gives_the_same_points_to_a_fit_and_an_import(form: Form, tmp_path: Path) -> None:
    path = write(form, tmp_path)
    sources = load_sources(path, columns=form.columns, where=form.where, options=form.options)
    np.testing.assert_allclose(rows_of(sources.points), expected(form), rtol=form.rtol)
    assert {note.kind for note in sources.points.notes} == set(form.notes)
    assert len(set(sources.points.cluster)) == form.clusters
    assert sources.points.repeats.max() == pytest.approx(form.repeats)
    direct = read_points(path, columns=form.columns, where=form.where, options=form.options)
    assert direct.hash == sources.points.hash
    assert len(sources.left_out) == len(sources.records) - len(RUNS)  # no row is passed over in silence
    imported = import_runs(path, tmp_path / "runs", columns=form.columns, where=form.where, options=form.options)
    assert imported.notes == sources.points.notes
    frame = load_runs(tmp_path / "runs")
    assert len(frame) == len(RUNS)
    np.testing.assert_allclose(np.nanmax(load_sources(tmp_path / "runs").points.repeats), form.repeats, atol=1e-9)
    np.testing.assert_array_equal(np.sort(frame["loss"]), np.sort(direct.loss))


@pytest.mark.parametrize("form", [f for f in FORMS if f.refused], ids=lambda f: f.name)
def test_each_other_form_is_refused_with_the_way_out(form: Form, tmp_path: Path) -> None:
    path = write(form, tmp_path)
    with pytest.raises(DataError) as by_fit:
        _ = load_sources(path, columns=form.columns, where=form.where, options=form.options).points
    for part in form.refused:
        assert part in str(by_fit.value)
    with pytest.raises(DataError):
        import_runs(path, tmp_path / "runs", columns=form.columns, where=form.where, options=form.options)
    assert not (tmp_path / "runs").exists()


SAME = (
    *("bits_only.csv", "bom.csv", "columns.json", "comment.csv", "dict_of_runs.json", "flat.jsonl", "fp8.csv", "index_col.csv"),
    *("int8_e4m3.csv", "mxfp8.csv", "nan_rows.csv", "nested.json", "nested.jsonl", "nested3.json", "nvfp4.csv", "percent.csv"),
    *(
        "ratio_no_D.csv",
        "scientific.csv",
        "semicolon.csv",
        "spaces.csv",
        "state_lower.csv",
        "suffix.csv",
        "tab.csv",
        "upper.csv",
    ),
    *("w4a8kv4.csv", "wandb_config_prefix.csv", "wandb_state_csv.csv", "wbits_only.csv", "weight_column.csv", "bitnet.csv"),
)
WITH = {  # file → mapping, options
    "D_billions.csv": ({"D": "D*1e9"}, TableOptions()),
    "bpb.csv": ({}, TableOptions(loss_unit="bpb:4.4")),
    "flops_no_D.csv": ({"D": "flops/(6*N)"}, TableOptions()),
    "inf_row.csv": ({}, TableOptions(skip_bad=True)),
    "plus_in_name.csv": ({"loss": "loss+z"}, TableOptions()),
    "ppl.csv": ({}, TableOptions(loss_unit="ppl")),
}
REFUSED = {  # file → parts of the sentence without options
    "bpb.csv": ("column 'loss'", "--map loss=val_bpb --loss-unit bpb:BYTES_PER_TOKEN"),
    "flops_no_D.csv": ("column 'D'", "--map 'D=flops/(6*N)'"),
    "inf_row.csv": ("row 33, column 'loss'", "--skip-bad"),
    "plus_in_name.csv": ("column 'loss'", "--map loss=COLUMN"),
    "ppl.csv": ("column 'loss'", "--map loss=perplexity --loss-unit ppl"),
}


@pytest.mark.parametrize("name", [*SAME, *WITH])
def test_shared_tables_give_the_points_of_the_plain_one(name: str) -> None:
    if not (TABLES / name).is_file():
        pytest.skip(f"shared data absent: {name}")
    plain = load_sources(TABLES / "plain.csv").points
    columns, options = WITH.get(name, ({}, TableOptions()))
    points = load_sources(TABLES / name, columns=columns, options=options).points
    for ours in ("N", "D", "loss"):
        np.testing.assert_allclose(getattr(points, ours), getattr(plain, ours), rtol=1e-5)
    assert [s.full for s in points.schemes] == [True, False]


@pytest.mark.parametrize("name", REFUSED)
def test_shared_tables_that_need_an_option_say_which(name: str) -> None:
    if not (TABLES / name).is_file():
        pytest.skip(f"shared data absent: {name}")
    with pytest.raises(DataError) as refused:
        _ = load_sources(TABLES / name).points
    assert all(part in str(refused.value) for part in REFUSED[name]), refused.value
    with pytest.raises(PointError):
        read_points(TABLES / name)


def test_billions_of_tokens_are_doubted(tmp_path: Path) -> None:
    form = next(f for f in FORMS if f.name == "billions")
    (note,) = load_sources(write(form, tmp_path)).points.notes
    assert note.kind == "implausible_ratio"
    assert "--map 'D=D*1e9'" in note.sentence


def test_the_page_of_the_docs_is_what_the_forms_give() -> None:
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("table_forms_page", root / "benchmarks" / "table_forms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "python benchmarks/table_forms.py writes it anew"
