"""`questctl probe`: tables, JSON, figure, and one sentence for mistakes."""

from __future__ import annotations

import json

import pytest
from command_line import invoke
from helpers import empty_figures
from tiny import QUEST, config

from questctl.analysis.probe_figure import probe_figure
from questctl.training.loop import train


@pytest.fixture(autouse=True)
def few_normal_values(monkeypatch):
    """The errors that are expected of normal values are tested in test_probe."""
    monkeypatch.setattr("questctl.posttraining.probe.NORMAL_SAMPLES", 2**8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for c in (config(), config(QUEST)):
        train(c, runs=root)
    return root


def probe_run(runs, *args, of=None):
    few = ("--batches", "2", "--steps", "1")
    return invoke("probe", (of or config()).run_id, "--runs", runs, *few, *args)


def test_without_words_rotation_and_mask_are_told_apart_and_drawn(runs, tmp_path):
    with empty_figures():
        result = probe_run(runs, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    shown = ("int4-h32-rms-trust", "int4-rms-ste", "the rotation changes", "the mask changes", "blocks.1.down", "W h32 kurt")
    assert [text for text in shown if text not in result.stdout] == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"probe.json", "probe.png", "probe.svg"}
    document = json.loads((tmp_path / "out" / "probe.json").read_text())
    figure = probe_figure(document)
    assert len(figure.axes) == 8
    assert all(axes.get_ylabel() for axes in figure.axes)
    alignments = figure.axes[0].get_lines()[0].get_ydata()
    assert list(alignments) == [layer["alignment"] for layer in document["settings"][0]["layers"]]
    off = figure.axes[3].get_lines()[2].get_ydata()
    assert list(off) == [100 * (1 - layer["activations"]["trusted"]) for layer in document["settings"][2]["layers"]]


def test_words_methods_and_bits_say_what_to_probe(runs):
    said = json.loads(probe_run(runs, "-q", "quest,int2-rms-ste", "-q", "fp4-rms-trust", "--bits", "3", "--json").stdout)
    assert [s["name"] for s in said["settings"]] == ["int3-h32-rms-trust", "int2-rms-ste", "fp4-rms-trust"]
    default = json.loads(probe_run(runs, "--bits", "ternary", "--json").stdout)
    assert default["settings"][0]["name"] == "ternary-h32-rms-trust"
    weights = json.loads(probe_run(runs, "-q", "int4-rms-trust", "--activations", "bf16", "--json").stdout)
    assert weights["settings"][0]["layers"][0]["activations"] is None


def test_methods_whose_sides_differ_quantize_each_by_its_own_word(runs):
    said = json.loads(probe_run(runs, "-q", "quest-sparse,lsq+", "-q", "bitnet,adabin", "--bits", "4", "--json").stdout or "{}")
    assert not said  # bitnet and adabin have no 4 bits
    said = json.loads(probe_run(runs, "-q", "quest-sparse,lsq+", "--bits", "4", "--json").stdout)
    said["settings"] += json.loads(probe_run(runs, "-q", "bitnet,adabin", "--json").stdout)["settings"]
    assert [(s["weights"], s["activations"]) for s in said["settings"]] == [
        ("int4-h32-rms-2of4pairs-trust", "int4-h32-rms-trust"),
        ("int4-learned-clip1", "int4-learned.o-clip1"),
        ("ternary-absmean.t-ste", "sint8-absmax-ste"),
        ("int1-meanstd-ste", "int1-learned.o-clip1"),
    ]


def test_a_quantized_run_is_probed_as_it_is_with_a_warning(runs):
    result = probe_run(runs, of=config(QUEST))
    assert result.exit_code == 0, result.output
    assert "warning" in result.stderr
    assert "poor reference" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("args", "of", "words"),
    [
        (("-q", "int4-h64-rms-ste"), {}, ["h64", "32"]),
        (("-q", "int4-h32-rms-ste", "--activations", "bf16"), {}, ["rotated parametrisation"]),
        (("--activations", "bf16"), {}, ["--quant"]),
        (("--bits", "9"), {}, ["--bits", "9", "ternary"]),
        (("--bits", "16"), {}, ["--bits", "16"]),
        (("--bits", "4"), QUEST, ["--quant"]),
        (("-q", "quest"), {}, ["--bits"]),
        (("-q", "int4-rms-ste", "-q", "int4-ste"), {}, ["int4-rms-ste", "twice"]),
        (("--batches", "1"), {}, ["--batches"]),
    ],
)
def test_a_mistake_is_one_sentence(runs, args, of, words):
    result = probe_run(runs, *args, of=config(of))
    assert result.exit_code == 2
    assert [w for w in words if w not in result.stderr] == []
    assert "Traceback" not in result.stderr
