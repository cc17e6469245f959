"""Sweep files: the cells of a file, what is refused, and estimated costs."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from questctl.config import Layer, flatten, resolve
from questctl.errors import UsageError
from questctl.sweep.sweep_file import find_sweep_file, load_sweep_file

LAPTOP = """
name = "small"
[base]
data.source = "synthetic:markov"
train.tokens_per_param = 20
[matrix]
preset = ["53K", "107K"]
scheme = [{ quant.method = "bf16" }, { quant.method = "quest", quant.bits = [4, 2, 1] }]
[[exclude]]
preset = "107K"
quant.bits = 1
[[include]]
preset = "53K"
quant.method = "ste"
quant.bits = [2, 1]
"""


def load(tmp_path: Path, text: str, **kwargs):
    path = tmp_path / "p.toml"
    path.write_text(text)
    return load_sweep_file(path, **kwargs)


def refusal(tmp_path: Path, text: str, **kwargs) -> str:
    with pytest.raises(UsageError) as e:
        load(tmp_path, text, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def config(**values):
    return resolve([Layer("test", flatten(values, where="test"))]).config


def test_cells_are_the_products_without_the_excluded_with_the_included(tmp_path):
    cells = load(tmp_path, LAPTOP).cells
    common = {"data": {"source": "synthetic:markov"}, "train": {"tokens_per_param": 20}}
    schemes = [{"method": "bf16"}] + [{"method": "quest", "bits": b} for b in (4, 2, 1)]
    expected = [(p, q) for p in ("53K", "107K") for q in schemes if (p, q.get("bits")) != ("107K", 1)]
    expected += [("53K", {"method": "ste", "bits": b}) for b in (2, 1)]
    assert [c.config for c in cells] == [config(preset=p, quant=q, **common) for p, q in expected]
    assert cells[1].values == {"preset": "53K", "quant.method": "quest", "quant.bits": 4}
    assert len({c.run_id for c in cells}) == 9


@pytest.mark.parametrize(
    "axis",
    [
        "train.seed = [3, 1]",
        '"train.seed" = [3, 1]',
        "train = { seed = [3, 1] }",
        "any = [{train.seed = [3, 1]}]",
        'any = [{"train.seed" = 3}, {train.seed = 1}]',
    ],
)
def test_an_axis_has_one_meaning_however_it_is_written(tmp_path, axis):
    assert [c.config.train.seed for c in load(tmp_path, f"[matrix]\n{axis}").cells] == [3, 1]


def test_override_patterns_keep_their_dots(tmp_path):
    text = '[matrix]\nquant.overrides."blocks.*.down".weights = ["bf16", "int4-h64-rms-trust"]'
    specs = [str(c.config.quant.overrides["blocks.*.down"].weights) for c in load(tmp_path, text).cells]
    assert specs == ["bf16", "int4-h64-rms-trust"]


def test_set_overrules_every_cell_and_a_lone_base_is_one_cell(tmp_path):
    cells = load(tmp_path, LAPTOP, sets=["train.steps=7"]).cells
    assert {c.config.train.steps for c in cells} == {7}
    assert [c.config for c in load(tmp_path, '[base]\npreset = "107K"').cells] == [config(preset="107K")]


def test_exclude_sees_values_that_presets_and_defaults_give(tmp_path):
    text = '[matrix]\npreset = ["53K", "107K", "640K"]\n[[exclude]]\nmodel.d_model = 64\nmodel.n_layer = [1, 7]'
    assert [c.values["preset"] for c in load(tmp_path, text).cells] == ["107K", "640K"]
    text = "[matrix]\ntrain.seed = [1, 2]\ntrain.steps = [3, 4]\n[[exclude]]\ntrain.seed = 1\ntrain.steps = 4"
    assert len(load(tmp_path, text).cells) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[matrix]\ntrain.seed = []", ["train.seed", "empty"]),
        ("[matrix]\nscheme = []", ["scheme", "empty"]),
        ("[matrix]\ntrain.seed = 3", ["train.seed", "3", "not a list", "[base]"]),
        ("[matrix]\nscheme = [{train.seed = []}]", ["scheme", "train.seed", "empty"]),
        ("[matrix]\ntrain.sed = [1]", ["train.sed", "did you mean 'train.seed'"]),
        ("[matrix]\n'train.sed' = [1]", ["train.sed", "did you mean 'train.seed'"]),
        ("[matrix]\nsede = [1, 2]", ["sede", "unknown"]),
        ("[matrix]\ntrain.seed = [[1], [2]]", ["train.seed", "[1]"]),
        ("[matrix]\npreset = [{train.seed = 1}]", ["preset"]),
        ("[matrix]\ntrain.seed = [1]\na = [{train.seed = 2}]", ["train.seed", "two axes"]),
        ("[matrix]\ntrain.seed = [1]\n'train.seed' = [2]", ["train.seed", "twice"]),
        ("[matrix]\ntrain.seed = [1, -2]", ["train.seed=-2", "-2", "must be 0 or more"]),
        ("[matrix]\npreset = ['53K', '54K']", ["preset=54K", "did you mean '53K'"]),
        ("[matrix]\npreset = ['53K']\nquant.method = ['quest']\nquant.bits = [4, 99]", ["quant.bits=99", "99"]),
        ("[matrix]\nquant.overrides.'blocks.*.dwn'.weights = ['int4-rms-ste']", ["did you mean 'blocks.*.down'"]),
        ("[base]\ntrain.seed = [1, 2]", ["base", "train.seed", "[matrix]"]),
        ("[base]\ntrain.steps = 2\ntrain.tokens = 5", ["train.steps", "train.tokens", "give one"]),
        ("[bse]\ntrain.seed = 1", ["bse", "did you mean 'base'"]),
        ("matrix = 3", ["matrix", "3"]),
        ("include = {train.seed = 1}", ["[[include]]"]),
        ("[[include]]\ntrain.seed = []", ["include 1", "train.seed", "empty"]),
        ("[matrix]\ntrain.seed = [1]\n[[exclude]]\ntrain.seed = 2", ["exclude 1", "train.seed=2"]),
        ("[matrix]\ntrain.seed = [1]\n[[exclude]]", ["exclude 1"]),
        ("[matrix]\ntrain.seed = [1]\n[[exclude]]\ntrain.seed = 1", ["no cells"]),
        ("[matrix]", ["matrix"]),
        ("name = 'x'", ["no cells"]),
        ("name = 3\n[matrix]\ntrain.seed = [1]", ["name", "3"]),
        ("[matrix\n", ["TOML"]),
    ],
)
def test_refusals_name_what_is_wrong(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert message.startswith(("p.toml", str(tmp_path)))
    for word in words:
        assert word in message, message


def test_two_cells_of_one_experiment_are_both_named(tmp_path):
    text = "[matrix]\nquant.method = ['quest', 'bf16']\nquant.bits = [4, 2]\npreset = ['53K']\n"
    message = refusal(tmp_path, text.replace("'bf16']", "'quest']"))
    assert "cell 1 (" in message
    assert "cell 3 (" in message
    assert "quant.bits=4" in message
    assert config(preset="53K", quant={"method": "quest", "bits": 4}).run_id in message
    seeds = refusal(tmp_path, "[matrix]\ntrain.seed = [1, 2]", sets=["train.seed=5"])
    assert "train.seed=1" in seeds
    assert "train.seed=2" in seeds
    assert "one experiment" in refusal(tmp_path, "[matrix]\ntrain.seed = [1]\n[[include]]\ntrain.seed = 1")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["53K", "107K", "640K"]), min_size=1, max_size=3, unique=True),
)
def test_the_matrix_is_the_product_in_file_order(tmp_path_factory, seeds, steps, presets):
    text = f"[matrix]\ntrain.seed = {seeds}\npreset = {presets}\n[[include]]\nmodel.n_layer = 9\ntrain.steps = {steps}"
    cells = load(tmp_path_factory.mktemp("p"), text).cells
    product = list(itertools.product(seeds, presets))
    assert [(c.config.train.seed, c.values["preset"]) for c in cells[: len(product)]] == product
    assert [c.config.train.steps for c in cells[len(product) :]] == steps


def test_a_missing_sweep_file_is_one_sentence_and_a_path_is_taken_as_it_is(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.toml: there is no such sweep file"):
        find_sweep_file("nowhere.toml")
    (tmp_path / "x.toml").write_text("")
    assert find_sweep_file(tmp_path / "x.toml") == tmp_path / "x.toml"


def test_reading_a_sweep_file_imports_nothing_heavy(tmp_path):
    (tmp_path / "p.toml").write_text(LAPTOP)
    code = (
        "import sys; from pathlib import Path; from questctl.sweep import sweep_file as f;f.load_sweep_file(Path(sys.argv[1]));"
        "print([m for m in ('torch', 'numpy', 'pandas', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "p.toml")]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_cells_that_differ_in_their_seeds_are_those_that_each_alone_would_be(tmp_path):
    schemes = 'scheme = [{ quant.method = "bf16" }, { quant.method = "quest", quant.bits = 2 }]'
    text = f'base.preset = "53K"\nbase.train.steps = 4\n[matrix]\ntrain.seed = [3, 1, 4]\n{schemes}\n'
    together = load_sweep_file(write_file(tmp_path / "grid.toml", text)).cells
    alone = [
        load_sweep_file(write_file(tmp_path / "one.toml", text.replace("[3, 1, 4]", f"[{seed}]"))).cells for seed in (3, 1, 4)
    ]
    assert [(cell.config, cell.run_id, cell.values) for cell in together] == [
        (cell.config, cell.config.run_id, cell.values) for cells in alone for cell in cells
    ]
    assert len({id(cell.first) for cell in together}) == 2
    assert pickle.loads(pickle.dumps(together)) == together
