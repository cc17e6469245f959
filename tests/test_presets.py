"""The published sizes and recipes to the last digit, the rule of the laptop family, and the old sizes under their run ids."""

from __future__ import annotations

import csv
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from shared_data import DATA, needs

import questctl
from questctl.config import Layer, human_count, resolve
from questctl.config.describe import preset_table
from questctl.config.presets import FAMILIES, LAPTOP_BLOCK
from questctl.sweep import costs
from questctl.sweep.sweep_file import find_sweep_file, load_sweep_file

PUBLISHED = {  # arXiv 2502.05003: layers, width, heads, lr, non-embedding parameters; training tokens of the published runs
    "30M": (6, 640, 5, 1.2e-3, 30_482_560, 2_999_975_936),
    "50M": (7, 768, 6, 1.2e-3, 49_556_736, 4_999_872_512),
    "100M": (8, 1024, 8, 6e-4, 102_777_856, 9_999_745_024),
    "200M": (10, 1280, 10, 3e-4, 203_188_480, 19_999_752_192),
    "430M": (13, 1664, 13, 1.5e-4, 443_068_288, 42_999_742_464),
    "800M": (16, 2048, 16, 7.5e-5, 822_151_168, 79_999_795_200),
    "1600M": (20, 2560, 20, 3.75e-5, 1_586_076_160, 159_999_852_544),
}
LAPTOP = {  # layers, width, non-embedding parameters
    "laptop-27K": (2, 32, 26_784),
    "laptop-107K": (2, 64, 106_816),
    "laptop-222K": (2, 96, 221_664),
    "laptop-402K": (2, 128, 402_048),
    "laptop-636K": (2, 160, 635_680),
    "laptop-1.3M": (3, 192, 1_328_448),
    "laptop-1.8M": (3, 224, 1_829_408),
}
OLD = {  # non-embedding parameters, and the run id of W4A4 that version 0.1 gave
    "53K": (53_440, "53K-quest-w4a4-20x-s0-bcb567fd"),
    "107K": (106_816, "107K-quest-w4a4-20x-s0-070c63fb"),
    "214K": (213_568, "214K-quest-w4a4-20x-s0-d9c27f19"),
    "640K": (639_872, "640K-quest-w4a4-20x-s0-aa7c96fa"),
    "1.3M": (1_328_448, "1.3M-quest-w4a4-20x-s0-1e3e7a6b"),
    "1.8M": (1_771_200, "1.8M-quest-w4a4-20x-s0-f31b929a"),
}


def config_of(name):
    return resolve([Layer("test", {("preset",): name})]).config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_and_recipes(name):
    c = config_of(name)
    found = (c.model.n_layer, c.model.d_model, c.model.n_head, c.optim.lr, c.model.params_non_embedding, c.tokens)
    assert found == PUBLISHED[name]
    assert (c.data.seq_len, c.train.batch_size, c.train.precision) == (512, 512, "bf16")
    o = c.optim
    assert (o.beta1, o.beta2, o.weight_decay, o.grad_clip, o.schedule, o.warmup_frac) == (0.9, 0.95, 0.1, 1.0, "cosine", 0.1)
    assert (o.start_factor, o.final_factor) == (0.01, 0.1)


@pytest.mark.parametrize("name", OLD)
def test_old_sizes_are_what_they_were(name):
    c = questctl.make_config(preset=name, quant={"method": "quest", "bits": 4})
    assert (c.model.params_non_embedding, c.run_id) == OLD[name]
    assert (c.data.seq_len, c.train.batch_size, c.optim.name, c.optim.lr) == (128, 16, "adamw", 3e-3)


@pytest.mark.parametrize("name", LAPTOP)
def test_laptop_sizes(name):
    c = questctl.make_config(preset=name, quant={"method": "quest", "bits": 4})
    m = c.model
    assert (m.n_layer, m.d_model, m.params_non_embedding) == LAPTOP[name]
    assert name == f"laptop-{human_count(m.params_non_embedding)}"
    assert m.n_layer == max(2, m.d_model // 64)
    assert m.d_model == 32 * m.n_head
    assert 8 / 3 <= m.d_ff / m.d_model < 8 / 3 + 32 / m.d_model
    assert c.quant.weights.rotation == LAPTOP_BLOCK
    assert c.tokens_per_param == pytest.approx(20, rel=1e-3)


def test_laptop_sizes_are_one_family():
    """Each is larger than the one before by less than five times, 32 wider, and of the same recipe."""
    configs = [config_of(name) for name in FAMILIES["laptop"]]
    assert list(FAMILIES["laptop"]) == list(LAPTOP)
    sizes = [c.model.params_non_embedding for c in configs]
    assert all(1.3 < b / a < 5 for a, b in pairwise(sizes))
    assert sizes[-1] / sizes[0] > 30
    assert [c.model.d_model for c in configs] == list(range(32, 225, 32))
    assert len({(c.data, c.optim, c.train.model_copy(update={"steps": 1})) for c in configs}) == 1


def test_the_table_of_presets_has_the_families():
    rows = preset_table()
    assert [(row.family, row.preset) for row in rows] == [(f, name) for f, presets in FAMILIES.items() for name in presets]
    assert (rows[1].family, rows[1].optimizer, rows[1].warmup, rows[1].tokens) == ("laptop", "muon", 20, "2.1M")
    assert (rows[-1].family, rows[-1].preset, rows[-1].optimizer) == ("old", "1.8M", "adamw")


@pytest.mark.parametrize("name", ["107K", "laptop-107K", "1.3M", "laptop-1.3M"])
def test_the_command_of_a_run_names_the_preset_of_its_recipe(name):
    """Two presets have this model."""
    config = questctl.make_config(preset=name, quant={"method": "quest", "bits": 2}, train={"steps": 7})
    assert questctl.train_command(config) == f"questctl train --preset {name} -q quest -b 2 --steps 7"
    as_adamw = config.model_copy(update={"optim": config.optim.model_copy(update={"name": "adamw"})})
    said = questctl.train_command(as_adamw)
    assert ("--set optim.name=adamw" in said) == name.startswith("laptop")


def test_the_gpu_hour_costs_what_its_file_says():
    """Its first lines give FLOP and tokens; a dry run must agree, and no run may reread its text more than seven times."""
    text = (Path(__file__).parent.parent / "experiments" / "gpu-hour.toml").read_text()
    flops, tokens = map(float, re.search(r"cost is (\S+) FLOP and (\S+) tokens", text).groups())
    configs = [cell.config for cell in load_sweep_file(find_sweep_file("gpu-hour")).cells]
    assert sum(c.tokens for c in configs) == pytest.approx(tokens, rel=0.03)
    assert sum(c.tokens * costs.flops_per_token(c) for c in configs) == pytest.approx(flops, rel=0.03)
    assert max(c.tokens for c in configs) < 7 * 11.27e6  # training tokens of pystdlib:clean under Python 3.11


@needs("quest_runs.csv")
def test_the_published_grid_has_every_published_run():
    """Size, tokens, learning rate, bits, rotation and gradient of each of its 104 cells, against the published table."""
    cells = [cell.config for cell in load_sweep_file(find_sweep_file("paper")).cells]
    ours = Counter(
        (c.model.n_layer, c.model.d_model, c.tokens, c.optim.lr, str(c.quant.weights), str(c.quant.activations)) for c in cells
    )
    with (DATA / "quest_runs.csv").open() as f:
        published = Counter(
            (int(r["n_layer"]), int(r["n_embd"]), int(r["D"]), float(r["lr"]), *map(spec_of, [r, r], "wa"))
            for r in csv.DictReader(f)
        )
    assert ours == published
    assert {c.model.vocab_size for c in cells} == {50304}
    assert len({c.run_id for c in cells}) == 104


def spec_of(row, operand):
    """Our spec of a published quantizer, which its class and bits name."""
    name, bits = row[f"{operand}_quantizer"], row[f"{operand}_bits"]
    if name == "NoQuantizer":
        return "bf16"
    grid = "fp4" if "FP4" in name else f"int{bits}"
    rotation, sparse = ("-h128" if "Hadamard" in name else "", "-2of4pairs" if "FourEight" in name else "")
    return f"{grid}{rotation}-rms{sparse}-{'clip' + row['clip'] if 'Clip' in name else 'trust'}"


def test_the_published_grid_costs_what_its_file_says():
    text = (Path(__file__).parent.parent / "experiments" / "paper.toml").read_text()
    configs = [cell.config for cell in load_sweep_file(find_sweep_file("paper")).cells]
    flops = float(re.search(r"takes (\S+) FLOP", text)[1])
    assert sum(c.tokens * costs.flops_per_token(c) for c in configs) == pytest.approx(flops, rel=0.03)
