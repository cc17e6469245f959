"""`questctl export`: a folder with its report and card, and what it refuses, in one sentence and without leaving anything."""

from __future__ import annotations

import hashlib
import json
import os
import sys

import pytest
import tiny
from command_line import invoke
from helpers import needs_package

from questctl.config import QuantConfig
from questctl.store import RunStore
from questctl.training.loop import train

pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytestmark = needs_package("compressed_tensors")

ROTATED = tiny.config(tiny.QUEST, train__steps=4)
PLAIN = tiny.config({"quant.weights": "int2-rms-ste"}, train__steps=4)
FULL = tiny.config(train__steps=60)
BINARY = tiny.config({**tiny.QUEST, "quant.bits": 1}, train__steps=30)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for c in (ROTATED, PLAIN, FULL, BINARY):
        train(c, runs=root)
    return root


def export_run(runs, config, *args):
    return invoke("export", config.run_id, "--runs", runs, *args)


FILES = {
    "hf": {"config.json", "model.safetensors", "modeling_quest.py"},
    "hf-dense": {"config.json", "model.safetensors"},
    "compressed-tensors": {"config.json", "model.safetensors", "load_rotated.py"},
    "gguf": {"model.gguf"},
}


@pytest.mark.parametrize("format", FILES)
def test_every_format_of_a_rotated_run_with_quantized_inputs(runs, tmp_path, format):
    out = tmp_path / "sub" / "out"
    done = export_run(runs, ROTATED, "--format", format, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report.pop("path") == str(out)
    assert report == json.loads((out / "export_report.json").read_text())
    assert {p.name for p in out.iterdir()} == FILES[format] | {"export_report.json", "README.md"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    agreement, alone = report["agreement"], report["weights_alone"]
    if format == "hf":
        assert alone is None
        assert agreement["max_abs_delta_logit"] < 1e-5
        assert agreement["argmax_agreement"] == 1.0
        assert 4 < report["bits_per_linear_weight"] < 5.5
        assert report["does_not_reproduce"] != []  # a synthetic source has no tokenizer
    else:
        assert agreement["max_abs_delta_logit"] > 1e-3 > alone["max_abs_delta_logit"]
        assert agreement["kl"] > alone["kl"] >= 0
        assert "The run quantizes the inputs" in done.stderr
        assert "The run quantizes the inputs" in report["does_not_reproduce"][0]
    for about in ("run", "data_hash"):
        assert report[about] in (out / "README.md").read_text()
    for name in FILES[format]:
        data = (out / name).read_bytes()
        assert (report["files"][name], report["sha256"][name]) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_card_says_what_was_trained_and_how_to_load_it(runs, tmp_path):
    assert export_run(runs, ROTATED, "--format", "compressed-tensors", "--out", tmp_path / "a").exit_code == 0
    card = (tmp_path / "a" / "README.md").read_text()
    result = RunStore(runs).run(ROTATED.run_id).result()
    assert result is not None
    loss = f"{result.loss:.4f} nats/token"
    for piece in ("int4-h32-rms-trust", loss, "2502.05003", "from load_rotated import load", "is noise", "synthetic:markov"):
        assert piece in card


def test_a_table_for_people_and_exact_levels_for_llama_cpp(runs, tmp_path):
    done = export_run(runs, PLAIN, "-f", "gguf", "-o", tmp_path / "a", "--dtype", "exact", "--tokens", 256)
    assert done.exit_code == 0, done.output
    assert "4.50 bits per weight of the blocks" in done.stdout
    assert done.stderr == ""


def test_a_run_quantized_after_training(runs, tmp_path):
    from questctl.posttraining.quantize import quantize

    words = QuantConfig(weights="int3-h32-rms-ste", activations="int8-h32-rms-ste")
    result = quantize(RunStore(runs).run(FULL.run_id), words, calibration_tokens=256)
    done = invoke("export", result.run, "--runs", runs, "-f", "hf", "-o", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["agreement"]["kl"] < 1e-6
    assert report["bits_per_linear_weight"] < 4.5
    assert f"quantized after training (gptq) from {FULL.run_id}" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize(
    ("config", "args", "sentence"),
    [
        (ROTATED, ["--format", "onnx"], "--format: unknown format 'onnx'; choices: hf, hf-dense, compressed-tensors, gguf."),
        (ROTATED, ["--format", "gguf", "--dtype", "q5_0"], "was trained with a rotation, which q5_0 cannot carry"),
        (ROTATED, ["--format", "gguf", "--dtype", "q7_k"], "--dtype: unknown number format of gguf 'q7_k'"),
        (FULL, ["--format", "compressed-tensors"], "the run's weights are not quantized"),
    ],
)
def test_refusals(runs, tmp_path, config, args, sentence):
    done = export_run(runs, config, *args, "--out", tmp_path / "a")
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(runs, tmp_path):
    (tmp_path / "a").mkdir()
    assert export_run(runs, FULL, "-f", "hf", "-o", tmp_path / "a").exit_code == 0  # an empty folder is taken
    for there in (tmp_path / "a", tmp_path / "a" / "README.md"):
        done = export_run(runs, FULL, "-f", "hf", "-o", there)
        assert done.exit_code == 2
        assert "exists and is not an empty folder" in done.stderr


def test_a_run_that_is_not_finished(tmp_path):
    run = RunStore(tmp_path / "runs").run(FULL.run_id)
    run.create(FULL)
    done = export_run(tmp_path / "runs", FULL, "-f", "hf", "-o", tmp_path / "a")
    assert done.exit_code == 2
    assert "is not finished (pending)" in done.stderr


@pytest.mark.parametrize(
    ("format", "package", "extra"),
    [("hf", "transformers", "hf"), ("gguf", "gguf", "export"), ("compressed-tensors", "compressed_tensors", "export")],
)
def test_a_package_that_is_not_installed(runs, tmp_path, monkeypatch, format, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    done = export_run(runs, PLAIN, "-f", format, "-o", tmp_path / "a")
    assert done.exit_code == 5
    assert f"pip install 'questctl[{extra}]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_hold_the_run_are_not_kept(runs, tmp_path, monkeypatch):
    """Planted: a writer that turns one matrix around."""
    from questctl.export import hf

    def wrong(folder, tensors):
        name = "lm_head.weight"
        right(folder, {**tensors, name: tensors[name].flip(0)})

    right = hf.save
    monkeypatch.setattr(hf, "save", wrong)
    done = export_run(runs, FULL, "-f", "hf-dense", "-o", tmp_path / "a")
    assert done.exit_code == 1
    assert "are not kept" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_compared_with_the_run_in_bf16(runs, tmp_path, monkeypatch):
    """bf16 tips inputs across the edges between levels, in the run's own forward pass as in the files, which are sound."""
    from questctl.export import write

    monkeypatch.setattr(write, "KL_LIMIT", 1e-7)
    done = export_run(runs, BINARY, "-f", "hf", "-o", tmp_path / "a", "--dtype", "bf16", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["agreement"]["kl"] > 1e-5
    assert report["agreement"]["kl"] <= 3 * report["precision_alone"]["kl"]
    assert report["same_precision"]["kl"] < 1e-7
    assert "own forward pass in bf16" in (tmp_path / "a" / "README.md").read_text()
    exact = export_run(runs, BINARY, "-f", "hf", "-o", tmp_path / "b", "--json")
    assert json.loads(exact.stdout)["same_precision"] is None


@pytest.mark.slow
def test_bf16_does_not_excuse_wrong_files(runs, tmp_path, monkeypatch):
    from questctl.export import hf

    right = hf.save
    monkeypatch.setattr(hf, "save", lambda f, t: right(f, {**t, "lm_head.weight": t["lm_head.weight"].flip(0)}))
    done = export_run(runs, BINARY, "-f", "hf", "-o", tmp_path / "a", "--dtype", "bf16")
    assert done.exit_code == 1
    assert "are not kept" in done.stderr


def test_a_folder_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").write_text("")
    done = export_run(runs, FULL, "-f", "hf", "-o", tmp_path / "file" / "a")
    assert done.exit_code == 2
    assert "is not a folder" in done.stderr
    assert os.listdir(tmp_path) == ["file"]
