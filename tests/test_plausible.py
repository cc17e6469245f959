"""Plausibility checks of tables: each kind of warning names its column and the remedy, and sound tables give none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import planted
from table_forms import RUNS

from questctl.analysis import fit_law
from questctl.analysis.points import Points, points_from_frame
from questctl.analysis.tables import TableOptions


def kinds(points: Points) -> list[str]:
    return [note.kind for note in points.notes]


def read(columns: dict[str, str] | None = None, **changes: object) -> Points:
    return points_from_frame(pd.DataFrame(RUNS).assign(**changes), columns=columns)


RATES = ("several_rates", "--best-of lr")  # another learning rate in the cell of the first run


def test_bits_below_a_part_of_the_run_are_not_passed_over() -> None:
    table = pd.DataFrame(RUNS).assign(**{"quant.bits": [16, 4] * 16}).drop(columns="scheme")
    (note,) = points_from_frame(table).notes
    assert note.kind == "unnamed_schemes"
    assert "--map 'scheme=quant.bits'" in note.sentence
    assert kinds(points_from_frame(table, columns={"scheme": "quant.bits"})) == []


def test_a_plain_table_is_not_doubted() -> None:
    assert kinds(read()) == []
    assert kinds(read(dataset="c4", epochs=4)) == []


@pytest.mark.parametrize(
    ("changes", "kind", "way_out"),
    [
        ({"D": [run["D"] / 1e9 for run in RUNS]}, "implausible_ratio", "--map 'D=D*1e9'"),
        ({"N": [run["N"] / 1e9 for run in RUNS]}, "implausible_ratio", "--map 'N=N*1e6'"),
        ({"N": [run["N"] / 1e6 for run in RUNS], "D": [run["D"] / 1e6 for run in RUNS]}, "implausible_size", "--map 'N=N*1e6'"),
        ({"lr": [1e-3] * 31 + [2e-3], **{c: [r[c] for r in RUNS[:31]] + [RUNS[0][c]] for c in ("N", "D")}}, *RATES),
        ({"loss": [run["loss"] / 12 for run in RUNS]}, "implausible_loss", "--loss-unit"),
        ({"loss": [np.exp(run["loss"]) for run in RUNS]}, "implausible_loss", "--loss-unit"),
        ({"dataset": ["c4", "pile"] * 16}, "several_data", "--where dataset=c4"),
        ({"unique_tokens": 1e8}, "many_epochs", "column unique_tokens"),
        ({"Epochs": 6}, "many_epochs", "column Epochs"),
        ({"weight": [1.0, 2.0] * 16}, "weighted", "--weights none"),
        ({"optim.name": ["adamw"] * 9 + ["muon"] * 23}, "several_optimizers", "--where optim.name=muon"),
        ({"warmup_steps": [25, 100] * 16, "steps": 1000}, "several_warmups", "25 to 100 steps, 2.5 to 10 %"),
        ({"warmup_steps": [run["D"] ** 0.9 / 1e6 for run in RUNS]}, "several_warmups", "fit runs of one rule"),
    ],
)
def test_each_doubt_names_the_way_out(changes: dict, kind: str, way_out: str) -> None:
    notes = [note for note in read(**changes).notes if note.kind == kind]
    assert len(notes) == 1
    assert way_out in notes[0].sentence


def test_one_rule_for_the_warm_up_is_not_doubted() -> None:
    steps = [round(run["D"] / 2**18) for run in RUNS]
    assert len(set(steps)) > 4
    assert kinds(read(warmup_steps=100, steps=steps)) == []
    assert kinds(read(warmup_steps=[0.1 * n for n in steps], steps=steps)) == []
    assert kinds(read(warmup_steps=[round(0.1 * n) for n in steps], steps=steps, optimizer="Muon")) == []
    assert kinds(read(warmup_steps=[0.1 * run["D"] / 2**18 for run in RUNS])) == []
    assert kinds(read(warmup_steps=[100, None] * 16)) == []


def test_what_a_table_says_of_training_stays_with_its_points() -> None:
    mixed = read(optimizer=["adamw", "muon"] * 16, warmup_steps=[25, 100] * 16, steps=1000)
    again = points_from_frame(pd.DataFrame(mixed.subset(mixed.loss > np.median(mixed.loss)).to_records()))
    assert kinds(again) == kinds(mixed) == ["several_optimizers", "several_warmups"]
    assert {(r["optimizer"], r["warmup_steps"], r["steps"]) for r in again.to_records()} == {
        ("adamw", 25, 1000),
        ("muon", 100, 1000),
    }
    assert "optimizer" not in read().to_records()[0]


def test_parameters_with_embeddings_are_doubted_where_others_are_there() -> None:
    assert kinds(read({"N": "total"}, N=None, total=4e7, params_non_embedding=3e7, seed=range(32))) == ["with_embeddings"]


def test_failed_runs_are_kept_on_demand_and_named() -> None:
    frame = pd.DataFrame(RUNS).assign(state=["failed", *["done"] * 31])
    assert len(points_from_frame(frame)) == 31
    kept = points_from_frame(frame, options=TableOptions(keep_failed=True))
    assert len(kept) == 32
    assert kinds(kept) == ["kept_unfinished"]


def test_clusters_follow_the_rows() -> None:
    frame = pd.DataFrame(RUNS).assign(group=[f"g{run['N']}" for run in RUNS])
    points = points_from_frame(frame.sample(frac=1, random_state=0), options=TableOptions(cluster="group"))
    assert points.cluster == tuple(f"g{n:.0f}" for n in points.N)
    assert points.subset(points.N > 1e8).cluster == tuple(f"g{n:.0f}" for n in points.N if n > 1e8)
    again = points_from_frame(pd.DataFrame(points.to_records()), options=TableOptions(cluster="cluster"))
    assert (again.cluster, again.hash) == (points.cluster, points.hash)


def test_a_row_without_a_cluster_is_one_of_its_own() -> None:
    frame = pd.DataFrame(RUNS).assign(group=["a", None] * 16)
    assert len(set(points_from_frame(frame, options=TableOptions(cluster="group")).cluster)) == 17


def test_several_rows_of_a_run_are_checkpoints_which_share_an_error() -> None:
    """A run of one scheme and size at several D; names that stand for several sizes, or for one row, are no such runs."""
    run = [f"{r['scheme']}-{r['N']}" for r in RUNS]
    (note,) = read(run=run).notes
    assert (note.kind, note.numbers) == ("several_rows_per_run", {"runs": 8, "rows": 32})
    assert "(bf16-30000000: 4)" in note.sentence
    assert "--cluster run" in note.sentence
    assert [n.kind for n in read(Name=run).notes] == ["several_rows_per_run"]
    assert kinds(read(run=[f"r{i}" for i in range(32)])) == kinds(read(run=[r["scheme"] for r in RUNS])) == []
    frame = pd.DataFrame(RUNS).assign(run=run)
    clustered = points_from_frame(frame, options=TableOptions(cluster="run"))
    assert len(set(clustered.cluster)) == 8
    assert kinds(clustered) == []
    assert "several_rows_per_run" not in kinds(points_from_frame(frame, options=TableOptions(last=True)))


def test_outliers_are_named_for_huber_too_and_a_law_that_misses_its_points() -> None:
    points, _ = planted("quest", noise=1e-3, schemes=("bf16", "w4a4"))
    spoiled = points.with_loss(np.where(np.arange(len(points)) == 5, 1.3, 1.0) * points.loss)
    for objective, remedy in (("lsq", "use huber:1e-3"), ("huber:1e-3", "count less")):
        (note,) = [w for w in fit_law(spoiled, "quest", objective=objective).warnings if w.kind == "outliers"]
        assert note.numbers["rows"] == [points.where[5]]
        assert remedy in note.sentence
    noisy = points.with_loss(points.loss * np.exp(0.15 * np.random.default_rng(0).standard_normal(len(points))))
    assert "large_residuals" in [w.kind for w in fit_law(noisy, "quest").warnings]
    assert "large_residuals" not in [w.kind for w in fit_law(points, "quest").warnings]
