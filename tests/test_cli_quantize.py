"""`questctl quantize`: words, methods and files; one sentence for mistakes; the runs that come of it."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import invoke
from tiny import QUEST, config

from questctl.training.loop import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for c in (config(), config(QUEST)):
        train(c, runs=root)
    torch.set_num_threads(1)
    return root


def quantize_run(runs, *args):
    return invoke("quantize", config().run_id, "--runs", runs, *args)


def test_a_word_and_a_method_with_bits_are_the_same_run(runs):
    by_word = json.loads(quantize_run(runs, "--quant", "int4-h32-rms-ste", "--method", "rtn", "--json").stdout)
    by_name = json.loads(quantize_run(runs, "-q", "quest", "-b", "4", "--method", "rtn", "--json").stdout)
    assert by_word == by_name
    assert by_word["scheme"] == "ptq-rtn-w4a4"
    assert by_word["source"] == config().run_id
    listed = invoke("runs", "ls", "--runs", runs, "--json")
    assert by_word["run"] in [row["run"] for row in json.loads(listed.stdout)]
    shown = invoke("runs", "show", by_word["run"], "--runs", runs)
    assert shown.exit_code == 0
    assert "ptq.source" in shown.stdout
    compared = invoke("runs", "compare", config().run_id, by_word["run"], "--runs", runs)
    assert "ptq.method" in compared.stdout


def test_a_file_gives_every_layer_its_word(runs, tmp_path):
    file = tmp_path / "mixed.toml"
    down = 'overrides."blocks.*.down".weights = "int8-rms-ste"'
    file.write_text(f'[model]\nd_model = 4096\n[quant]\nweights = "int2-h32-rms-ste"\n{down}\n')
    done = json.loads(quantize_run(runs, "--config", str(file), "--calibration-tokens", "256", "--json").stdout)
    assert done["scheme"].startswith("ptq-gptq-w2a16+")
    assert done["path"].endswith(done["run"])
    table = quantize_run(runs, "--config", str(file), "--calibration-tokens", "256")
    assert "nats/token" in table.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["--quant", "--config"]),
        (("--quant", "int4-rms-ste", "--config", "x.toml"), ["--quant", "--config"]),
        (("--quant", "int9-rms-ste"), ["int9", "1 to 8"]),
        (("--quant", "quest"), ["--bits"]),
        (("--quant", "int4-h64-rms-ste"), ["h64", "32"]),
        (("--quant", "int4-h32-rms-ste", "--activations", "int4-rms-ste"), ["rotated differently"]),
        (("--quant", "int4-rms-ste", "--method", "gptw"), ["gptw", "gptq"]),
        (("--quant", "int4-rms-ste", "--damping", "-1"), ["damping", "-1"]),
        (("--quant", "bf16"), ["bf16"]),
        (("--config", "nowhere.toml"), ["nowhere.toml"]),
    ],
)
def test_a_mistake_is_one_sentence(runs, args, words):
    before = len(list(runs.iterdir()))
    result = quantize_run(runs, *args)
    assert result.exit_code == 2
    assert [w for w in words if w not in result.stderr] == []
    assert "Traceback" not in result.stderr
    assert len(list(runs.iterdir())) == before


def test_a_quantized_run_is_refused(runs):
    result = invoke("quantize", config(QUEST).run_id, "--runs", runs, "-q", "int4-rms-ste")
    assert result.exit_code == 2
    assert "quest-w4a4" in result.stderr
