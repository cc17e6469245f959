"""What each format can store, from the config alone, and the sentence that refuses the rest."""

from __future__ import annotations

import pytest
import tiny

from questctl.config import PTQConfig
from questctl.errors import UsageError
from questctl.export.check import (
    EXACT,
    GGUF_TYPES,
    Layer,
    block_float,
    check,
    gguf_type,
    in_vllm,
    layers,
    lost_inputs,
    signed_bits,
    whole,
)
from questctl.export.formats import BLOCKS
from questctl.quant.spec import QuantSpec

QUEST = {"quant.method": "quest", "quant.block": 32}


def with_specs(weights, activations="bf16", **more):
    return tiny.config({"quant.weights": weights, "quant.activations": activations}, **more)


@pytest.mark.parametrize(
    ("spec_text", "multiple", "top", "bits"),
    [
        ("int1-rms-ste", 2, 1, 2),
        ("int2-rms-ste", 2, 3, 3),
        ("int3-rms-ste", 2, 7, 4),
        ("int4-rms-ste", 2, 15, 5),
        ("int7-rms-ste", 2, 127, 8),
        ("int8-rms-ste", 2, 255, 9),
        ("ternary-rms-ste", 1, 1, 2),
        ("sint4-rms-ste", 1, 7, 4),
        ("sint8-rms-ste", 1, 127, 8),
    ],
)
def test_grids_as_whole_numbers(spec_text, multiple, top, bits):
    spec = QuantSpec.parse(spec_text)
    assert whole(spec) == (multiple, top)
    assert signed_bits(top) == bits
    assert {multiple * x for x in spec.grid.levels} <= set(range(-top, top + 1))
    assert multiple * spec.grid.top == top


@pytest.mark.parametrize(
    "spec_text",
    ["fp4-rms-ste", "lloyd2-rms-ste", "power4-rms-ste", "olive4-mse-ste", "int1-meanstd-ste", "int4-learned.o-clip1"],
)
def test_grids_that_are_none(spec_text):
    assert whole(QuantSpec.parse(spec_text)) is None


REFUSED = [
    (with_specs("int4-rms-ste"), "onnx", None, "--format: unknown format 'onnx'"),
    (with_specs("int4-rms-ste"), "hf", "f16", "--dtype: unknown number format of hf 'f16'"),
    (tiny.config(), "compressed-tensors", None, "weights are not quantized"),
    (with_specs("fp4-rms-ste"), "compressed-tensors", None, "layer blocks.0.q: 'fp4-rms-ste' is no multiple of whole numbers"),
    (with_specs("int4-learned.o-clip1"), "compressed-tensors", None, "no multiple of whole numbers"),
    (
        with_specs("int8-rms-ste"),
        "compressed-tensors",
        None,
        "integers of 9 bits; the format ends at 8, and vLLM has kernels for 4 bits",
    ),
    (with_specs("int4-h32.s-rms-ste", "int4-h32.s-rms-ste"), "compressed-tensors", None, "signs"),
    (tiny.config({**QUEST, "quant.bits": 4}), "gguf", "exact", "trained with a rotation"),
    (tiny.config({**QUEST, "quant.bits": 2, "quant.weight_only": True}), "gguf", "q4_0", "trained with a rotation"),
    (tiny.config(), "gguf", "exact", "nothing is left for exact"),
    (with_specs("lloyd2-rms-ste"), "gguf", "exact", "no multiple of whole numbers"),
    (with_specs("int4-rms-ste"), "gguf", "q4_0", "does not fit into q4_0; --dtype exact takes q4_1"),
    (with_specs("int4-rms-2of4-ste"), "gguf", "q4_1", "does not fit into q4_1; --dtype exact takes q5_0"),
    (with_specs("sint4-rms-ste"), "gguf", "q4_1", "does not fit into q4_1; --dtype exact takes q4_0"),
    (with_specs("ternary-rms-ste"), "gguf", "tq2_0", "does not fit into tq2_0; --dtype exact takes q4_0"),
    (with_specs("fp4-e8m0.g32-ste"), "gguf", "q4_0", "does not fit into q4_0: mxfp4 and fp4-e8m0.g32 hold each other alone"),
    (with_specs("int4-rms-ste"), "gguf", "mxfp4", "does not fit into mxfp4"),
    (with_specs("fp4-e4m3.g16-ste"), "compressed-tensors", "fp32", "unpacks blocks of FP4 to bf16 alone; take --dtype bf16"),
    (with_specs("fp4-e4m3.g16-ste"), "gguf", "exact", "no multiple of whole numbers"),
    (with_specs("int2-rms.g16-ste"), "gguf", "exact", "scales of 16 neighbours"),
    (with_specs("int8-rms-ste"), "gguf", "exact", "integers to ±255"),
    (with_specs("int4-rms-ste", model__d_ff=48), "gguf", "q8_0", "48 is no multiple of 32"),
    (with_specs("int4-rms-ste", **{"model__d_ff": 48}), "gguf", "exact", "blocks.0.down"),
]


@pytest.mark.parametrize(("config", "format", "dtype", "sentence"), REFUSED)
def test_refusals_are_one_sentence(config, format, dtype, sentence):
    with pytest.raises(UsageError) as e:
        check(config, format, dtype)
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("config", "format", "dtype"),
    [
        (tiny.config(), "hf", "fp32"),
        (with_specs("fp4-e4m3.g16-ste", "fp8-absmax-ste"), "hf", "bf16"),
        (tiny.config(), "gguf", "f32"),
        (tiny.config({**QUEST, "quant.bits": 1}), "compressed-tensors", "fp32"),
        (with_specs("fp4-e4m3.g16-ste"), "compressed-tensors", "bf16"),
        (with_specs("int4-h32.s-rms-ste"), "compressed-tensors", "fp32"),
        (tiny.config({**QUEST, "quant.bits": 4}), "gguf", "q8_0"),
        (with_specs("int4-rms-2of4-ste"), "gguf", "exact"),
    ],
)
def test_what_passes(config, format, dtype):
    assert check(config, format, dtype) == dtype


@pytest.mark.parametrize(
    ("spec_text", "width", "exact"),
    [
        ("int1-rms-ste", 256, "tq2_0"),
        ("ternary-absmean.t-ste", 512, "tq2_0"),
        ("int1-rms-ste", 32, "q4_0"),
        ("int2-rms-ste", 256, "q2_k"),
        ("int2-rms-2of4-ste", 256, "q3_k"),
        ("sint3-rms-ste", 256, "q3_k"),
        ("int2-rms.g64-ste", 256, "q4_0"),
        ("int3-rms-ste", 256, "q4_0"),
        ("int3-rms.g64-ste", 64, "q4_0"),
        ("sint4-rms-2of4-ste", 32, "q4_0"),
        ("int4-rms-ste", 256, "q4_k"),
        ("int4-learned-clip1", 32, "q4_1"),
        ("int4-rms-2of4-ste", 256, "q5_0"),
        ("int5-rms-ste", 256, "q5_k"),
        ("int5-rms-ste", 32, "q5_1"),
        ("int5-rms-2of4-ste", 256, "q6_k"),
        ("int5-rms-2of4-ste", 32, "q8_0"),
        ("sint6-rms-ste", 256, "q6_k"),
        ("ternary-rms.g32-ste", 256, "q4_0"),
    ],
)
def test_the_smallest_exact_block_format(spec_text, width, exact):
    assert gguf_type("x", Layer(QuantSpec.parse(spec_text), QuantSpec.parse("bf16"), width, None), "exact") == exact


def test_types_have_the_sizes_of_the_package():
    gguf = pytest.importorskip("gguf")
    for kind, form in GGUF_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] == (form.block, form.size)
    assert [GGUF_TYPES[kind].bits for kind in EXACT] == sorted(GGUF_TYPES[kind].bits for kind in EXACT)
    assert GGUF_TYPES["q2_k"].bits == 2.625
    assert {*BLOCKS, "q8_0"} == {*GGUF_TYPES, "mxfp4"}


def test_blocks_of_fp4_are_in_bf16_unless_said_otherwise():
    assert check(with_specs("fp4-e8m0.g32-ste"), "compressed-tensors") == "bf16"
    assert check(with_specs("int4-rms-ste"), "compressed-tensors") == "fp32"


@pytest.mark.parametrize(
    ("spec_text", "name"),
    [
        ("fp4-e4m3.g16-ste", "nvfp4"),
        ("fp4-h32-e8m0.g32-trust", "mxfp4"),
        ("fp4-e4m3.b16-ste", "nvfp4"),
        ("fp4-e4m3.g32-ste", ""),
        ("fp4-rms-ste", ""),
        ("fp8-e8m0.g32-ste", ""),
        ("fp4-e8m0.g32-2of4-ste", ""),
    ],
)
def test_fp4_by_the_scales_of_its_blocks(spec_text, name):
    assert block_float(QuantSpec.parse(spec_text)) == name


def test_overrides_decide_by_layer():
    c = tiny.config({"quant.weights": "int2-rms-ste", ("quant", "overrides", "blocks.1.*", "weights"): "fp4-rms-ste"})
    assert str(layers(c)["blocks.1.up"].weights) == "fp4-rms-ste"
    with pytest.raises(UsageError, match=r"blocks\.1\.q"):
        check(c, "gguf", "exact")


def test_which_weights_stand_in_a_rotated_basis():
    trained = with_specs("int4-h32-rms-trust")
    after = trained.model_copy(update={"ptq": PTQConfig(source="x")})
    both = with_specs("bf16", "int4-h32-rms-trust")
    assert layers(trained)["blocks.0.q"].rotates is None  # a rotated parametrisation: x meets it as it is
    assert layers(after)["blocks.0.q"].rotates is not None
    assert layers(both)["blocks.0.q"].rotates is not None


def test_lost_inputs_are_named():
    assert lost_inputs(with_specs("int4-rms-ste")) is None
    lost = lost_inputs(tiny.config({**QUEST, "quant.bits": 4, ("quant", "overrides", "blocks.0.q", "activations"): "bf16"}))
    assert lost is not None
    assert "int4-h32-rms-trust in 13 layers" in lost


@pytest.mark.parametrize(
    ("config", "dtype", "sentences"),
    [
        (
            with_specs("int4-rms-ste"),
            "fp32",
            ["refuses these integers of 5 bits, since it has kernels for 4 bits on a CPU and 4 and 8 bits on CUDA"],
        ),
        (with_specs("int1-rms-ste"), "bf16", ["refuses these integers of 2 bits"]),
        (with_specs("int3-rms-ste"), "bf16", ["integers of 4 bits on a CPU and CUDA"]),
        (with_specs("int3-rms-ste"), "fp32", ["integers of 4 bits on a CPU and CUDA", "export with --dtype bf16"]),
        (with_specs("int7-rms-ste"), "bf16", ["integers of 8 bits on CUDA."]),
        (tiny.config({**QUEST, "quant.bits": 3}), "bf16", ["integers of 4 bits on CUDA.", "hadacore: on CUDA alone"]),
        (
            tiny.config({"quant.weights": "int3-rms-ste", ("quant", "overrides", "blocks.0.q", "weights"): "int7-rms-ste"}),
            "bf16",
            ["integers of 4 and 8 bits on CUDA."],
        ),
    ],
)
def test_what_vllm_runs_is_said_by_width_and_device(config, dtype, sentences):
    found = in_vllm(config, dtype)
    assert len(found) == len(sentences)
    for line, sentence in zip(found, sentences, strict=True):
        assert sentence in line
        assert line.startswith(("vLLM", "Its kernels"))
