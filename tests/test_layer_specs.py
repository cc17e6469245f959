"""The spec of each layer: patterns, exact names, specs that do not fit; the same as the built model's, without torch."""

import subprocess
import sys

import pytest
import tiny

from questctl.config import LayerQuant, QuantConfig
from questctl.errors import UsageError
from questctl.quant.layer_specs import layer_specs, layer_widths
from questctl.quant.spec import QuantSpec

WIDTHS = {"blocks.0.q": 64, "blocks.0.down": 192, "blocks.1.q": 64, "blocks.1.down": 192}


def quant(weights="int4-h64-rms-trust", activations="int4-h64-rms-trust", **overrides):
    layers = {name.replace("_", "."): LayerQuant(**words) for name, words in overrides.items()}
    return QuantConfig(weights=weights, activations=activations, overrides=layers)


def test_exact_names_win_over_patterns_and_patterns_over_the_rest():
    config = QuantConfig(
        weights="int4-h64-rms-trust",
        activations="bf16",
        overrides={
            "blocks.*.down": LayerQuant(weights="int8-h64-rms-trust"),
            "blocks.1.down": LayerQuant(weights="int2-h64-rms-trust"),
            "blocks.1.*": LayerQuant(activations="int8-h64-rms-trust"),
        },
    )
    found = {name: tuple(map(str, words)) for name, words in layer_specs(WIDTHS, config).items()}
    assert found == {
        "blocks.0.q": ("int4-h64-rms-trust", "bf16"),
        "blocks.0.down": ("int8-h64-rms-trust", "bf16"),
        "blocks.1.q": ("int4-h64-rms-trust", "int8-h64-rms-trust"),
        "blocks.1.down": ("int2-h64-rms-trust", "int8-h64-rms-trust"),
    }


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (quant(**{"blocks_*_dwn": {"weights": "bf16"}}), "unknown layer 'blocks.*.dwn'; did you mean 'blocks.*.down'?"),
        (quant(**{"blocks_2_q": {"weights": "bf16"}}), "quant.overrides: unknown layer 'blocks.2.q'"),
        (quant(**{"blocks_*_q": {"weights": "bf16"}, "blocks_0_*": {"weights": "int8-rms-ste"}}), "give layer blocks.0.q"),
        (quant("int4-h128-rms-trust", "bf16"), "layer blocks.0.q: rotation h128 does not divide the width 64"),
        (quant("int4-h64-rms-trust", "int4-h32-rms-trust"), "are rotated differently"),
        (quant(**{"blocks_0_down": {"activations": "int4-rms-ste"}}), "layer blocks.0.down: weights"),
    ],
)
def test_misfits_are_one_sentence(config, sentence):
    with pytest.raises(UsageError) as e:
        layer_specs(WIDTHS, config)
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)


def test_a_mask_must_divide_the_width():
    with pytest.raises(UsageError, match="takes groups of 8, which do not divide the width 20"):
        layer_specs({"blocks.0.q": 20}, quant("int4-rms-2of4pairs-ste", "int4-rms-ste"))


def test_names_and_words_are_those_of_the_built_model():
    from questctl.models.llama import build_model
    from questctl.quant.linear import QuantLinear

    config = tiny.config(tiny.QUEST)
    model = build_model(config.model.model_copy(update={"vocab_size": 16}), config.quant, 0)
    built = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    words = layer_specs(layer_widths(config.model), config.quant)
    assert words.keys() == built.keys()
    assert layer_widths(config.model) == {n: m.in_features for n, m in built.items()}
    assert words == {n: (m.weight_quantizer.spec, m.input_quantizer.spec) for n, m in built.items()}
    assert set(words.values()) == {(QuantSpec.parse("int4-h32-rms-trust"),) * 2}


def test_no_torch_is_needed():
    code = "import sys, questctl.quant.layer_specs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
