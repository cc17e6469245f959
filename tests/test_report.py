"""The report: every number leads back to a file, nothing from outside is markup, and what is missing is said."""

import json
import math
import re
import shlex
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report_runs
from command_line import invoke, run_cli
from helpers import empty_figures
from hypothesis import given
from hypothesis import strategies as st
from planted import planted
from shared_data import DATA, needs

from questctl.analysis import charts, draw
from questctl.analysis.fit import fit_law
from questctl.analysis.health import SPIKE, diagnose
from questctl.analysis.report import tables
from questctl.analysis.report.excerpt import Excerpt, excerpt
from questctl.analysis.report.page import DARK, _luminance, _rgb, chart_json, look_json
from questctl.analysis.style import Style, styles
from questctl.analysis.uncertainty import bootstrap
from questctl.cli.options import build_config
from questctl.config.commands import train_command
from questctl.metrics import LOSS_SPIKE, STEP, TRAIN_LOSS
from questctl.store import RunStore

pytest.importorskip("jinja2")
pytest.importorskip("plotly")


pytestmark = pytest.mark.usefixtures("each_fit_once")


class Page(HTMLParser):
    """Cells with data attributes, the text of the page, and the scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[dict[str, str]] = []
        self.rows: list[tuple[dict[str, str], list[dict[str, str]]]] = []
        self.scripts: dict[str, str] = {}
        self.sections: list[str] = []
        self.words: list[str] = []
        self.code: list[dict[str, str]] = []
        self._script: dict[str, str] | None = None
        self._within: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {k: v or "" for k, v in attrs}
        if tag == "script":
            self._script = given
            self.code.append(given)
        if tag == "section":
            self.sections.append(given["id"])
        if tag == "tr":
            self.rows.append((given, []))
        if tag == "td":
            self.rows[-1][1].append(given)
        if any(k in given for k in ("data-run", "data-fit", "data-key")):
            self.cells.append(given)

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.words.append(data)
        elif "id" in self._script:
            self.scripts[self._script["id"]] = data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(*words: object, code: int = 0) -> str:
    return run_cli("report", *words, code=code).output


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    report_runs.write_all(folder, report_runs.configs())
    report_runs.write(folder, report_runs.config(seed=5, bits=4), state="diverged", message="blocks.0 is not <finite>")
    report_runs.write(folder, report_runs.config(seed=6, bits=4), state="preempted")
    report_runs.write(folder, report_runs.config(seed=7, bits=4), state="stopped", message="At step 9/20 it was behind.")
    damaged = report_runs.write(folder, report_runs.config(seed=8, bits=4))
    (damaged / "result.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Page:
    out = tmp_path_factory.mktemp("page") / "report.html"
    bench = report_runs.write_bench(out.with_name("bench.json"))
    report(runs, "--out", out, "--bench", bench, "--bootstrap", 40)
    return Page(out.read_text())


def at(document, pointer: str):
    for word in pointer.split("/")[1:]:
        part = word.replace("~1", "/").replace("~0", "~")
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def test_sections_stand_in_reading_order(page):
    assert page.sections == [
        "verdict",
        "frontier",
        "law",
        "doubt",
        "curves",
        "health",
        "kernels",
        "cost",
        "runs",
        "left_out",
        "about",
    ]


def test_numbers_of_runs_are_those_of_their_files(page, runs):
    seen = 0
    for cell in page.cells:
        if "data-run" in cell and "data-value" in cell:
            folder = runs / cell["data-run"]
            if (folder / "result.json").exists():
                stored = json.loads((folder / "result.json").read_text())
                assert float(cell["data-value"]) == pytest.approx(stored[cell["data-key"]], rel=1e-12), cell
                seen += 1
    assert seen > 150


def test_numbers_of_the_fit_are_those_of_its_json(page, runs, tmp_path):
    document = json.loads(page.scripts["fit"])
    seen = 0
    for cell in page.cells:
        if "data-fit" in cell:
            found = at(document, cell["data-fit"])
            seen += 1
            if "data-value" in cell and isinstance(found, int | float):
                scale = 100 if cell["data-fit"].startswith("/choice/laws") and "aicc" not in cell["data-fit"] else 1
                assert float(cell["data-value"]) == pytest.approx(scale * found, rel=1e-12)
    assert seen > 25
    used = [r["run"] for r in document["points"]]
    rows = pd.DataFrame([json.loads((runs / name / "result.json").read_text()) for name in used])
    rows.to_csv(tmp_path / "points.csv", index=False)
    alone = json.loads(invoke("fit-scaling", tmp_path / "points.csv", "--json").stdout)
    assert alone["params"] == pytest.approx(document["params"], rel=1e-6)
    assert alone["eff"] == pytest.approx(document["eff"], rel=1e-6)


def test_medians_are_of_the_runs_that_the_row_names(page, runs):
    seen = 0
    for row, cells in page.rows:
        for cell in cells:
            stored = cell.get("data-key") in ("tokens_per_s", "seconds", "peak_memory_bytes")
            if stored and cell.get("data-of") in ("median", "sum"):
                files = [runs / name / "result.json" for name in row["data-runs"].split()]
                values = [json.loads(file.read_text())[cell["data-key"]] for file in files]
                wanted = np.median(values) if cell["data-of"] == "median" else sum(values)
                assert float(cell["data-value"]) == pytest.approx(wanted)
                seen += 1
            if cell.get("data-of") == "max":
                metrics = [m for name in row["data-runs"].split() for m in RunStore(runs).run(name).metrics()]
                assert float(cell["data-value"]) == max(m["grad_norm"] for m in metrics)
                seen += 1
    assert seen > 30


def test_left_out_runs_are_named_with_the_reason(page, runs):
    reasons = {
        report_runs.config(seed=s, bits=4).run_id: words
        for s, words in (
            (5, "diverged: blocks.0 is not <finite>"),
            (6, "preempted"),
            (7, "stopped: At step 9/20 it was behind."),
            (8, "damaged: "),
        )
    }
    for name, words in reasons.items():
        assert name in page.text
        assert words in page.text
    assert "4 of 28 runs" in page.text
    assert "Diverged: " + report_runs.config(seed=5, bits=4).run_id in page.text
    assert "Stopped early by their sweep, so not in any fit: " + report_runs.config(seed=7, bits=4).run_id in page.text
    document = json.loads(page.scripts["fit"])
    assert not {r["run"] for r in document["points"]} & set(reasons)
    assert document["n"] == 24


def test_the_page_is_one_file_that_asks_for_nothing(page, runs, tmp_path):
    report(runs, "--out", tmp_path / "r.html", "--bootstrap", 0)
    text = (tmp_path / "r.html").read_text()
    assert text.count("plotly.js v") == 1
    assert "default-src 'none'" in text
    assert not re.search(r"<(?:link|img|iframe|script[^>]* src)", re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))
    assert len([s for s in page.code if "type" not in s]) == 2


def test_signals_that_are_logged_are_shown_and_absent_ones_named(page, runs, tmp_path):
    assert "last trust_fraction(weights)" in page.text
    lone = tmp_path / "runs"
    run = report_runs.write(lone, report_runs.config(bits=4))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bare = [{k: v for k, v in m.items() if "trust" not in k and "grad" not in k} for m in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in bare))
    report(lone, "--out", tmp_path / "r.html")
    assert "Not logged by these runs: trust fraction, gradient norm" in Page((tmp_path / "r.html").read_text()).text


def test_what_is_named_like_markup_is_only_text(tmp_path):
    evil = "<script>alert(1)</script>"
    cells = [(n, *s) for n in (1e5, 2e5, 4e5) for s in (("<img src=x>", 4), ("bf16", 16))]
    rows = [
        {"run": f"{evil}{i}", "scheme": s, "N": n, "D": 20 * n, "loss": 3 / np.log(n) + b, "w_bits": b, "a_bits": b}
        for i, (n, s, b) in enumerate(cells)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "evil.csv", index=False)
    report(tmp_path / "evil.csv", "--out", tmp_path / "r.html", "--title", evil)
    text = (tmp_path / "r.html").read_text()
    found = Page(text)
    assert text.count("<script>") == 2
    assert "<img" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert f"{evil}3" in found.text
    assert json.loads(found.scripts["names"])[3] == f"{evil}3"
    assert all(s.get("type") == "application/json" for s in found.code if s)


@needs("quest_runs.csv")
def test_unfinished_runs_are_forecast_and_families_compared(tmp_path):
    """Five seeds of one size make a family; a run that was preempted half-way has a forecast, a diverged one has none."""
    for seed in range(5):
        report_runs.write(tmp_path / "runs", report_runs.config(bits=4, seed=seed), lines=80)
    half = report_runs.write(tmp_path / "runs", report_runs.config(bits=4, seed=6), lines=80, state="preempted")
    report_runs.write(tmp_path / "runs", report_runs.config(bits=4, seed=7), lines=80, state="diverged")
    found = report(tmp_path / "runs", "--out", tmp_path / "r.html", "--bootstrap", 0) and Page(
        (tmp_path / "r.html").read_text()
    )
    assert {"forecast", "collapse"} <= set(found.sections)
    assert "5 runs of quest-w4a4, divided by their last loss, coincide within" in found.text
    rows = [cells for _, cells in found.rows if any(cell.get("data-run") == half.name for cell in cells)]
    assert len(rows) == 2  # in the table of forecasts and in that of all runs
    with empty_figures():
        report(tmp_path / "runs", "--figures", tmp_path / "figures", "--bootstrap", 0)
    assert {p.stem for p in (tmp_path / "figures").glob("*.svg")} >= {"forecast", "collapse"}


def test_published_points_make_a_page_without_the_sections_of_runs(tmp_path):
    report(DATA / "quest_runs.csv", "--out", tmp_path / "r.html", "--bootstrap", 20)
    found = Page((tmp_path / "r.html").read_text())
    assert found.sections == ["verdict", "frontier", "law", "doubt", "runs", "left_out", "about"]
    eff = {row[0]: row for row in _table(tmp_path / "r.html", "eff")}
    assert (eff["w4a4"][3], eff["w4a4"][6]) == ("0.692", "0.69")
    assert eff["w4a4-norot"][6] == "–"


def _table(page: Path, key: str) -> list[list[str]]:
    part = page.read_text().split(f'data-table="{key}"')[1].split("</table>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in part.split("<tr")[2:]]


def test_empty_and_unfinished_sweeps_say_so(tmp_path):
    (tmp_path / "none").mkdir()
    assert f"{tmp_path}/none: There are no finished runs yet." in report(tmp_path / "none", "--out", tmp_path / "none.html")
    assert (tmp_path / "none.html").stat().st_size < 100_000  # without a chart, no library to draw it
    empty = Page((tmp_path / "none.html").read_text())
    assert "There are no finished runs yet." in empty.text
    assert empty.sections == ["verdict", "left_out", "about"]
    folder = tmp_path / "runs"
    report_runs.write(folder, report_runs.config(bits=4), state="preempted")
    report(folder, "--out", tmp_path / "begun.html")
    begun = Page((tmp_path / "begun.html").read_text())
    assert "There are no finished runs yet." in begun.text
    assert "curves" in begun.sections
    report_runs.write(folder, report_runs.config(bits=2))
    report(folder, "--out", tmp_path / "one.html")
    one = Page((tmp_path / "one.html").read_text())
    assert "No law was fitted: " in one.text
    assert "frontier" in one.sections
    words = report(folder, "--where", "seed=7", "--out", tmp_path / "other.html")
    assert "--where seed=7 keeps none of the 1 finished runs." in words


@pytest.mark.slow
def test_without_the_extra_the_page_is_refused_and_figures_are_as_ever(runs, tmp_path):
    block = (
        "import sys; sys.modules['plotly'] = sys.modules['jinja2'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('plotly', 'jinja2') else real(n, *a)\n"
        "from questctl.cli.app import main; main()"
    )

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", block, "report", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    refused = call(runs, "--out", tmp_path / "r.html")
    assert refused.returncode == 5
    assert "pip install 'questctl[report]'" in refused.stderr
    drawn = call(_small(tmp_path), "--figures", tmp_path / "figures", "--bootstrap", 0)
    assert drawn.returncode == 0, drawn.stderr
    assert not (tmp_path / "r.html").exists()
    report(tmp_path / "small.csv", "--figures", tmp_path / "again", "--bootstrap", 0)
    first, again = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("figures", "again"))
    assert first == again  # the same bytes from another process
    kinds = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}
    assert set(first) == {f"{stem}.{kind}" for stem in ("frontier-model-bits", "frontier-training-FLOPs") for kind in kinds}
    assert all(content.startswith(kinds[name.rpartition(".")[2]]) for name, content in first.items())


def _small(folder: Path) -> Path:
    """Four points of one budget: few figures. The label is no mathematics, whatever matplotlib thinks."""
    rows = [{"scheme": "$w4a4_{$", "N": n, "D": 20 * n, "loss": 3 - np.log10(n) / 5} for n in (1e5, 2e5, 4e5, 8e5)]
    pd.DataFrame(rows).to_csv(folder / "small.csv", index=False)
    return folder / "small.csv"


def test_both_renderers_draw_the_measured_points_and_the_law():
    points, _ = planted("quest", noise=3e-3, sizes=(5e4, 1e5, 2e5, 6e5), ratios=(8, 20), schemes=("bf16", "w4a4", "w2a2"))
    fit = fit_law(points)
    chart = charts.size(fit, np.arange(len(points)), bootstrap(fit, 20))
    looks = styles(points.schemes)
    for view, ratio in zip(chart.views, (20, 8), strict=True):  # of budgets as common the largest first
        assert view.choice == {"Tokens per parameter": str(ratio)}
        on_page = next(v for v in json.loads(chart_json(chart)) if v["choice"] == view.choice)
        series = {(s["name"], s["kind"]): s for s in on_page["series"]}
        axes = draw.figure(chart, view, looks).axes[0]
        for g, label in enumerate(points.labels):
            rows = (points.group == g) & np.isclose(points.D / points.N, ratio)
            assert series[label, "points"]["y"] == pytest.approx(points.loss[rows], rel=1e-5)
            assert [points.loss[i] for i in series[label, "points"]["run"]] == points.loss[rows].tolist()
            N = np.array(series[label, "line"]["x"])
            assert series[label, "line"]["y"] == pytest.approx(fit.predict(N, ratio * N, label), rel=1e-4)
            band = series[label, "band"]
            assert (np.array(band["low"]) <= np.array(band["high"])).all()
            marks = next(line for line in axes.lines if line.get_label() == label)
            assert marks.get_ydata() == pytest.approx(points.loss[rows])
            assert (marks.get_marker(), marks.get_color()) == (looks[label].marker, looks[label].color)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "nowhere/r.html"], "does not exist"),
        (["--figures", "f", "--open"], "no page to open"),
        (["--law", "qest"], "did you mean 'quest'"),
        (["--where", "colour=red"], "unknown column 'colour'"),
        (["--bench", "small.csv"], "is not a file written by `questctl bench"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    output = report(_small(tmp_path), *words, code=2)
    assert message in " ".join(output.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.csv"]
    assert "no such folder" in report(tmp_path / "x", code=2)


def test_json_says_what_was_written(runs, tmp_path):
    said = json.loads(report(runs, "--out", tmp_path / "r.html", "--json", "--bootstrap", 0))
    assert said["page"] == str(tmp_path / "r.html")
    assert said["bytes"] == (tmp_path / "r.html").stat().st_size
    assert said["runs"] == 27
    assert len(said["left_out"]) == 4
    assert said["fit"]["n"] == 24


# ------------------------------------------------------------------------------------------------------------- parts


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(6, 120))
def test_decimation_keeps_ends_and_extremes(values, most):
    y = np.array(values)
    kept = charts.decimate(y, most)
    assert len(kept) <= max(most, len(y) if len(y) <= most else most)
    assert (np.diff(kept) > 0).all()
    assert {kept[0], kept[-1]} == {0, len(y) - 1}
    assert (y[kept].min(), y[kept].max()) == (y.min(), y.max())


def test_spikes_are_those_of_the_diagnosis():
    """The page and `runs health` count the same windows of a planted curve, and a run that logged none has no number."""
    spikes = [0.0, 0.1, SPIKE - 1e-9, SPIKE, 1.7, 0.2]
    lines = [{STEP: 10 * i, TRAIN_LOSS: 3.0, LOSS_SPIKE: value} for i, value in enumerate(spikes)]
    metrics = pd.DataFrame([{"row": 0, **line} for line in lines] + [{"row": 1, STEP: 10, TRAIN_LOSS: 9.0}])
    runs = pd.DataFrame({"run": ["a", "b"], "scheme": ["w4a4", "bf16"], "state": "done"})
    runs = runs.assign(w_grid_bits=[4.0, 16.0], a_grid_bits=[4.0, 16.0])
    table = tables.health(metrics, runs).set_index("scheme")
    diagnosis = diagnose("a", "done", lines)
    assert table.loc["w4a4", "spikes"] == diagnosis.spikes == 2
    assert table.loc["w4a4", "spiky"] == ["a"]
    assert math.isnan(table.loc["bf16", "spikes"])
    assert diagnosis.findings == ("loss spiked 2×, worst by 1.70 nats/token before step 40",)


def test_runs_that_end_with_a_clamped_operand_are_named():
    key = "activation_saturation(fraction)"
    lines = (
        [{STEP: 10, key: {"q": 0.9, "o": 0.1}}, {STEP: 20, key: {"q": 0.1, "o": 0.2}}],
        [{STEP: 10, key: {"q": 0.1, "o": 0.8}}],
    )
    metrics = tables.over_layers(pd.DataFrame([{"row": r, **line} for r, some in enumerate(lines) for line in some]))
    assert metrics[f"{key}, highest layer"].tolist() == [0.9, 0.2, 0.8]
    runs = pd.DataFrame({"run": ["a", "b"], "scheme": "lsq-w4a4", "state": "done", "w_grid_bits": 4.0, "a_grid_bits": 4.0})
    assert tables.health(metrics, runs)["clamped"].tolist() == [["b"]]
    for r, some in enumerate(lines):
        assert any("clamped" in finding for finding in diagnose("x", "done", some).findings) == bool(r)


def test_layers_are_summed_up():
    lines = pd.DataFrame(
        [
            {"run": "a", "step": 1, "trust(fraction)": {"q": 0.5, "k": 1.0}},
            {"run": "a", "step": 2, "grad_norm": 2.0},
        ]
    )
    flat = tables.over_layers(lines)
    assert tables.signals(flat) == ["grad_norm", "trust(fraction), mean of layers", "trust(fraction), lowest layer"]
    assert flat["trust(fraction), mean of layers"].tolist()[0] == 0.75
    assert flat["trust(fraction), lowest layer"].tolist()[0] == 0.5
    assert flat.iloc[1].isna().sum() == 2


def test_overhead_is_time_beside_full_precision():
    rows = pd.DataFrame(
        {
            "run": list("abcd"),
            "device": "x",
            "scheme": ["bf16", "w4a4", "w4a4", "w2a2"],
            "params_non_embedding": [1.0, 1.0, 1.0, 2.0],
            "w_grid_bits": [16.0, 4.0, 4.0, 2.0],
            "a_grid_bits": [16.0, 4.0, 4.0, 2.0],
            "tokens_per_s": [100.0, 50.0, 80.0, 10.0],
            "seconds": 1.0,
            "peak_memory_bytes": 1.0,
            "memory": 1.0,
        }
    )
    table = tables.cost(rows).set_index("scheme")
    assert table.loc["w4a4", "overhead"] == pytest.approx(100 / 65 - 1)
    assert math.isnan(table.loc["w2a2", "overhead"])  # no unquantized run of that size
    assert table.loc["w4a4", "names"] == ["b", "c"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preset": "107K", "quant": "bf16"},
        {"quant": "quest", "bits": 2, "seed": 7},
        {"quant": "lsq", "bits": 4, "lr": 0.02},
        {"quant": "bitnet"},
        {"preset": "53K", "sets": ["quant.weights=int4-rms-ste", "quant.activations=bf16", "model.n_layer=3"]},
        {"quant": "quest", "bits": 2, "sets": ['quant.overrides."blocks.*.down".weights=int8-h64-rms-trust', "optim.lr=1e-3"]},
        {"preset": "30M", "quant": "quest-fp4"},
    ],
)
def test_the_command_of_a_run_trains_that_run(changes):
    wanted = build_config(None, changes.get("sets"), **{k: v for k, v in changes.items() if k != "sets"}).config
    words = shlex.split(train_command(wanted))
    assert words[:2] == ["questctl", "train"]
    result = invoke(*words[1:], "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert wanted.run_id in result.stdout


def test_colours_can_be_read_on_the_dark_page():
    from questctl.analysis.points import make_points

    labels = ["bf16", "8", "4", "3", "2", "1", "ste-w2a2", "lsq-w2a2", "ste-w1a1"]
    schemes = make_points([1e5] * 9, [1e6] * 9, np.linspace(2, 3, 9), labels).schemes
    back = _luminance(_rgb(DARK)) + 0.05
    for look in [*styles(schemes).values(), Style("#444444", "|", "-")]:
        assert (_luminance(_rgb(look_json(look)["dark"])) + 0.05) / back >= 4.5


@pytest.mark.slow
def test_a_thousand_runs_of_five_hundred_points(tmp_path):
    some = report_runs.configs(ratios=tuple(range(8, 108, 2)), seeds=(0,), presets=("53K", "107K", "214K", "640K", "1.3M"))
    assert len(some) == 1000
    report_runs.write_all(tmp_path / "runs", some, lines=500)
    begun = time.process_time()
    report(tmp_path / "runs", "--out", tmp_path / "r.html")
    assert time.process_time() - begun < 20
    assert (tmp_path / "r.html").stat().st_size < 15e6


def test_without_unquantized_runs_the_page_is_relative_to_the_reference(tmp_path):
    """The headline, the column and the published values are relative to w4a4 where the table has no 16 bits."""
    points, _ = planted("quest", noise=1e-3, schemes=("w4a4", "w2a2"))
    table = tmp_path / "nobf16.csv"
    table.write_text(
        "N,D,loss,scheme\n"
        + "".join(
            f"{n},{d},{loss},{points.labels[g]}\n"
            for n, d, loss, g in zip(points.N, points.D, points.loss, points.group, strict=True)
        )
    )
    report(table, "--out", tmp_path / "page.html", "--bootstrap", 0)
    text = Page((tmp_path / "page.html").read_text()).text
    assert "most from each stored bit w4a4 w2a2 has 0.97" in text
    assert "16·eff/bits" not in text
    assert "4·eff/bits" in text
    assert tables.published(fit_law(points)) == {"w4a4": 1.0, "w2a2": pytest.approx(0.15 / 0.69)}


def scattered(count: int, states=("done",)) -> pd.DataFrame:
    """Runs of 3 schemes, 4 sizes and 2 numbers of tokens, in turns; the loss falls with each."""
    at = np.arange(count)
    return pd.DataFrame(
        {
            "run": [f"r{i}" for i in at],
            "state": [states[i % len(states)] for i in at],
            "scheme": [("bf16", "w4a4", "w2a2")[i % 3] for i in at],
            "params_non_embedding": 1000.0 * (1 + at // 3 % 4),
            "tokens": 1e5 * (1 + at // 12 % 2),
            "loss": 5.0 - at / count,
        }
    )


def test_of_many_runs_the_best_of_each_cell_are_shown():
    frame = scattered(240)
    done = [True] * 240
    assert excerpt(frame, done, 240) == Excerpt(frozenset(frame["run"]))
    some = excerpt(frame, done, 100)  # 24 cells of 10 runs: 4 of each
    assert some.runs == {f"r{i}" for i in range(240 - 4 * 24, 240)}, "losses fall, so the last four turns are the best"
    assert some.words == "96 of 240 runs: the 4 best runs of each scheme, size and length"
    few = excerpt(frame, done, 5)
    assert few.words == "5 of 240 runs: the best run of 5 among 24 combinations of scheme, size and length"
    assert {int(name[1:]) // 24 for name in few.runs} == {9}
    assert excerpt(frame, done, 5) == few


def test_runs_without_a_loss_are_shown_by_turns_over_their_states():
    states = ("done", "done", "running", "failed", "pending", "diverged")
    frame = scattered(240, states)
    some = excerpt(frame, [s == "done" for s in frame["state"]], 40)
    shown = frame[frame["run"].isin(some.runs)]
    assert shown["state"].value_counts().to_dict() == {"done": 24, "diverged": 3, "failed": 3, "running": 2, "pending": 2}
    assert some.words.endswith("the 3 best runs of each scheme, size and length, and 10 of the 160 without a final loss")


def test_a_large_store_is_shown_in_part_and_the_rest_is_named(runs, tmp_path):
    """Each run is in the CSV file, and each count on the page is of all runs."""
    report(runs, "--out", tmp_path / "all.html", "--bootstrap", 0)
    answer = json.loads(report(runs, "--out", tmp_path / "some.html", "--bootstrap", 0, "--most-runs", 8, "--json"))
    whole, part = (Page((tmp_path / name).read_text()) for name in ("all.html", "some.html"))
    assert not (tmp_path / "all.csv").exists()
    assert answer["table"] == str(tmp_path / "some.csv")
    table = pd.read_csv(tmp_path / "some.csv")
    assert set(table["run"]) == {folder.name for folder in runs.iterdir() if (folder / "config.json").exists()}
    assert set(table["left_out"].dropna()) >= {"preempted"}
    rows = [row for row, cells in part.rows if any(cell.get("data-key") == "loss" for cell in cells)]
    assert len(rows) == 8
    words = re.search(r"8 of \d+ runs: [^.]*\. ", part.text)
    assert words
    assert f"{tmp_path / 'some.csv'} has all; --most-runs shows more." in part.text
    assert part.text.split("Verdict", 2)[1][:60] == whole.text.split("Verdict", 2)[1][:60]
    assert json.loads(part.scripts["fit"])["params"] == json.loads(whole.scripts["fit"])["params"]
    assert len(json.loads(part.scripts["names"])) == len(json.loads(whole.scripts["names"]))
