"""A saved fit is repeated with the options it was made with; other options are refused."""

import dataclasses

import pytest
from helpers import empty_figures
from planted import planted

from questctl.analysis.document import FitDocument
from questctl.analysis.tables import TableOptions
from questctl.errors import UsageError
from questctl.scaling.fit import fit_again, fit_points, fit_sources, saved_fit
from questctl.scaling.plan import plan_budget


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A fit of another law than the default, with another objective and a fixed parameter, and its file."""
    points = planted("quest", noise=3e-3, sizes=(3e7, 1e8, 3e8, 1e9), ratios=(20, 80), schemes=("bf16", "w4a4"))[0]
    fit = fit_points(points, "eff-nd", objective="huber:1e-3", fix={"E": 1.6}, bootstrap=0, alternatives=False)
    folder = tmp_path_factory.mktemp("fit")
    with empty_figures():
        fit.save(folder)
    return fit, folder / "fit.json"


def test_a_plan_uses_the_fit_as_it_was_made(saved):
    fit, path = saved
    again = saved_fit(path)
    assert again.fit.law.name == "eff-nd"
    assert str(again.fit.objective) == "huber(0.001)"
    assert again.fit.fixed == {"E": 1.6}
    assert again.fit.cost == pytest.approx(fit.fit.cost, rel=1e-9)
    plans = [plan_budget(source, flops=1e20, bootstrap=0).options for source in (fit, path)]
    assert [option.N for option in plans[1]] == pytest.approx([option.N for option in plans[0]], rel=1e-6)


@pytest.mark.parametrize(
    ("option", "asked", "made"),
    [
        ("law", "quest", "--law quest.*eff-nd"),
        ("objective", "lsq", "--objective lsq.*huber:0.001"),
        ("fix", {"E": 1.7}, "--fix E=1.7.*E=1.6"),
        ("where", {"scheme": "bf16"}, "--where scheme=bf16.*all of its runs"),
        ("columns", {"N": "params"}, "--map N=params"),
    ],
)
def test_another_option_is_a_conflict(saved, option, asked, made):
    kept = {"law": None} | {option: asked}
    with pytest.raises(UsageError, match=made):
        saved_fit(saved[1], **kept)


def test_the_conflict_names_the_command_that_fits_again(saved):
    with pytest.raises(UsageError) as refused:
        saved_fit(saved[1], "quest", table=None)
    assert str(refused.value).endswith(f"again: questctl fit-scaling {saved[1]} --law quest --objective huber:0.001")
    with pytest.raises(UsageError, match=r"--law eff-nd --objective lsq --fix E=1\.6$"):
        saved_fit(saved[1], objective="lsq")


def test_the_same_options_are_none(saved):
    assert saved_fit(saved[1], "eff-nd", objective="huber:1e-3", fix={"E": 1.6}).fit.fixed == {"E": 1.6}


def test_a_saved_fit_keeps_its_clusters(tmp_path):
    points = planted("quest", noise=3e-3, sizes=(3e7, 1e8, 3e8, 1e9), ratios=(20, 80), schemes=("bf16", "w4a4"))[0]
    named = dataclasses.replace(points, cluster=tuple(f"{g}-{n:.0f}" for g, n in zip(points.group, points.N, strict=True)))
    with empty_figures():
        fit_points(named, bootstrap=0, alternatives=False).save(tmp_path)
    path = tmp_path / "fit.json"
    again = saved_fit(path).fit
    assert again.points.cluster == named.cluster
    assert "named cluster" in again.intervals_method
    command = fit_again(path, FitDocument.read(path))
    assert command == f"questctl fit-scaling {path} --law quest --cluster cluster"
    by_command = fit_sources(path, table=TableOptions(cluster="cluster"), bootstrap=0).fit
    assert by_command.intervals == again.intervals


def test_a_saved_fit_stands_alone(saved, tmp_path):
    (tmp_path / "t.csv").write_text("N,D,loss\n1e7,1e9,3.0\n")
    with pytest.raises(UsageError, match="used as it was made, without"):
        saved_fit([saved[1], tmp_path / "t.csv"])
    assert saved_fit(tmp_path / "t.csv") is None
