"""Words and specs: one is the other, and what cannot be meant is refused with its place and the choices."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from questctl.errors import UsageError
from questctl.quant.components import Component
from questctl.quant.estimators import STE, Clip, Erf, Estimator, Pact, Tanh, Trust
from questctl.quant.grids import BF16, FP4, FP8, EntropyCoded, Grid, Int, Lloyd, Olive, Power, SInt, Ternary
from questctl.quant.masks import Mask, Sparse, TwoOfFour, TwoOfFourPairs
from questctl.quant.rotations import Hadamard
from questctl.quant.scales import (
    E4M3,
    E8M0,
    AbsMax,
    AbsMean,
    Eden,
    FourOverSix,
    Learned,
    MeanStd,
    Mse,
    Rms,
    Scale,
    UpE4M3,
    UpE8M0,
)
from questctl.quant.spec import KINDS, OPERANDS, QuantSpec

factors = st.one_of(st.floats(1e-3, 1e3), st.integers(1, 99).map(lambda n: n / 10))
NUMBERS = {
    Int: st.integers(1, 8),
    SInt: st.integers(2, 8),
    Lloyd: st.integers(1, 4),
    Power: st.integers(3, 6),
    EntropyCoded: st.floats(1.5, 8),
    Hadamard: st.integers(1, 16).map(lambda n: 2**n),
    Clip: st.one_of(factors, st.floats(1e-7, 9e5)),
    Trust: st.one_of(factors, st.floats(1e-7, 9e5)),
    Tanh: factors,
    Erf: factors,
    Sparse: st.floats(1e-7, 1, exclude_max=True),
}


def components(kind: str) -> st.SearchStrategy[Component]:
    """Any component of a kind, with any number and any variant that its class declares."""

    def of(cls: type[Component]) -> st.SearchStrategy[Component]:
        return st.builds(cls, *([NUMBERS[cls]] if cls in NUMBERS else []), variant=st.sampled_from(("", *cls.variants)))

    return st.one_of([of(cls) for cls in KINDS[kind] if cls is not BF16])


COMPONENTS = {kind: components(kind) for kind in KINDS}  # built once: building takes longer than drawing
MAYBE = {kind: st.none() | strategy for kind, strategy in COMPONENTS.items()}


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Any spec at all: components that contradict each other are drawn again."""
    grid, scale, estimator = draw(COMPONENTS["grid"]), draw(COMPONENTS["scale"]), draw(COMPONENTS["estimator"])
    basis, sparsity = draw(MAYBE["basis"]), draw(MAYBE["sparsity"])
    assert isinstance(grid, Grid)
    assert isinstance(scale, Scale)
    assert isinstance(estimator, Estimator)
    assert basis is None or isinstance(basis, Hadamard)
    assert sparsity is None or isinstance(sparsity, Mask)
    try:
        return QuantSpec(grid, basis, scale, sparsity, estimator)
    except UsageError:
        reject()


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(st.just(QuantSpec(BF16())) | specs())
def test_parse_is_the_inverse_of_str(spec: QuantSpec) -> None:
    of_gradients = (spec.basis is not None and spec.basis.fresh) or (spec.scale is not None and spec.scale.corrected)
    try:
        parsed = QuantSpec.parse(str(spec), operand="gradients" if of_gradients else "weights")
    except UsageError:
        if not of_gradients:  # weights may have any estimator, grid and scale
            raise
        reject()
    assert parsed == spec
    assert str(parsed) == str(spec)


def test_every_registered_part_appears_in_the_property_above() -> None:
    assert {c for classes in KINDS.values() for c in classes} == {
        Int,
        SInt,
        Ternary,
        FP4,
        FP8,
        Lloyd,
        Power,
        Olive,
        EntropyCoded,
        BF16,
        Hadamard,
        Rms,
        Mse,
        AbsMax,
        AbsMean,
        MeanStd,
        E8M0,
        E4M3,
        UpE8M0,
        UpE4M3,
        FourOverSix,
        Eden,
        Learned,
        TwoOfFourPairs,
        TwoOfFour,
        Sparse,
        STE,
        Clip,
        Trust,
        Pact,
        Tanh,
        Erf,
    }


@pytest.mark.parametrize(
    ("word", "canonical"),
    [
        ("int4-ste", "int4-rms-ste"),
        ("int4-h128-trust", "int4-h128-rms-trust"),
        ("int1-h64-clip1.30", "int1-h64-rms-clip1.3"),
        ("bf16", "bf16"),
        ("fp4-trust1.0", "fp4-rms-trust"),
        ("int4-trust2.00", "int4-rms-trust2"),
        ("int4-2of4pairs-ste", "int4-rms-2of4pairs-ste"),
        ("int08-ste", "int8-rms-ste"),
        ("ternary-absmax-clip0.0000001", "ternary-absmax-clip0.0000001"),
        ("sint4.sr-ste", "sint4.sr-rms-ste"),
        ("int4-h64.s-rms.g32-sparse0.50-tanh1.0", "int4-h64.s-rms.g32-sparse0.5-tanh"),
        ("fp4-e8m0.g32-ste", "fp4-e8m0.g32-ste"),
        ("int2-learned.o-pact", "int2-learned.o-pact"),
        ("ternary-absmean.t-erf0.5", "ternary-absmean.t-erf0.5"),
    ],
)
def test_canonical_words(word: str, canonical: str) -> None:
    assert str(QuantSpec.parse(word)) == canonical


def test_properties() -> None:
    spec = QuantSpec.parse("int4-h128-rms-2of4pairs-trust")
    assert (spec.bits, spec.rotation, spec.is_identity) == (2.5, 128, False)
    plain = QuantSpec.parse("bf16")
    assert (plain.bits, plain.rotation, plain.is_identity) == (16, 0, True)
    assert QuantSpec.parse("ternary-ste").bits == pytest.approx(1.5849625007)
    assert QuantSpec.parse("fp4-ste").bits == 4
    # OCP Microscaling v1.0: 32 values share 8 bits; NVFP4: 16 values do
    stored = {
        "fp4-e8m0.g32-ste": 4.25,
        "fp4-e4m3.g16-ste": 4.5,
        "fp8-e8m0.g32-ste": 8.25,
        "int4-rms.g32-trust": 4.5,
        "int4-rms.g128-trust": 4.125,
        "fp4-e4m3.b16-ste": 4 + 8 / 256,
        "int4-rms.t-trust": 4,
        "sint3-ste": 3,
        "int4-2of4-ste": 3,
        "power4-ste": 4,
        "int8-sparse0.75-ste": 3,
        "int4-rms.g64-2of4pairs-trust": 2.75,
        "int4.sr-ste": 4,
        "ec2.5-ste": 2.5,
        "ec3.25-h64-rms.g32-trust": 3.75,
    }
    assert {word: QuantSpec.parse(word).bits for word in stored} == stored


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("int4-learned-trust", ["component 3", "'trust'", "use clip<c> or ste"]),
        ("lloyd4-rms-2of4-ste", ["component 3", "'2of4'", "'lloyd4'", "another grid"]),
        ("bf16-h64", ["component 2", "'h64'", "bf16 alone"]),
        ("int4-h128-rms-trsut", ["component 4", "'trsut'", "did you mean 'trust'", "clip<c>"]),
        ("it4-h128-rms-trust", ["component 1", "grid", "'it4'", "int4", "sint4"]),
        ("int9-ste", ["component 1", "'int9'", "1 to 8 bits", "int8"]),
        ("int0-ste", ["component 1", "1 to 8 bits"]),
        ("int4.5-ste", ["component 1", "4.5", "whole number"]),
        ("lloyd5-ste", ["component 1", "1 to 4 bits"]),
        ("int4-h100-ste", ["component 2", "'h100'", "power of two"]),
        ("int4-h1-ste", ["component 2", "power of two"]),
        ("int4-rsm-ste", ["component 2", "'rsm'", "did you mean 'rms'", "trust"]),
        ("int4-rms-h128-ste", ["component 3", "rotation", "wrong place", "grid[-rotation]-scale"]),
        ("ste-int4", ["component 1", "estimator", "wrong place"]),
        ("int4-h64-h32-ste", ["component 3", "second rotation", "'h64'"]),
        ("int4-ste-trust", ["component 3", "second estimator"]),
        ("int4-ste-x", ["component 3", "one component too many"]),
        ("int4-h128-rms", ["no estimator", "trust<factor>"]),
        ("int4-clip-x", ["component 2", "'clip'", "clip<c>"]),
        ("int4-clip0", ["component 2", "clip factor", "above 0"]),
        ("int4-trust-1", ["component 3", "'1'"]),
        ("int4-learned-trust", ["'trust'", "learned scale", "use clip<c> or ste"]),
        ("int4.sr-trust", ["'trust'", "stochastic rounding of 'int4.sr'", "use clip<c> or ste"]),
        ("int4-absmean-ste", ["'absmean'", "'int4'", "int1, ternary and sint2"]),
        ("fp4.sr-mse-ste", ["'mse'", "nearest level", "'fp4.sr'"]),
        ("int4-rms-pact", ["'pact'", "'rms'", "write learned"]),
        ("int4-learned.o-ste", ["'learned.o'", "'ste'", "use clip1"]),
        ("int1-meanstd-2of4-ste", ["'2of4'", "'meanstd'", "scale without one"]),
        ("lloyd2-2of4-ste", ["'2of4'", "codebook 'lloyd2'"]),
        ("olive4-2of4-ste", ["'2of4'", "'olive4'", "neighbours"]),
        ("olive4.sr-ste", ["component 1", "'olive4.sr'"]),
        ("int4.x-ste", ["component 1", "'int4.x'", "after the dot stands one of sr"]),
        ("int4-rms.g48-ste", ["component 2", "'rms.g48'", "g16, g32, g64, g128, b16, b32, t"]),
        ("int4-rms.-ste", ["component 2", "'rms.'"]),
        ("int4-learned.t-ste", ["component 2", "'learned.t'", "one of r, o"]),
        ("int4-h64.t-ste", ["component 2", "'h64.t'", "one of s"]),
        ("int4-ste.sr", ["component 2", "'ste.sr'"]),
        ("bf16.sr", ["component 1", "'bf16.sr'"]),
        ("sint1-ste", ["component 1", "'sint1'", "2 to 8 bits", "sint8"]),
        ("power2-ste", ["component 1", "3 to 8 bits"]),
        ("int4-sparse1-ste", ["component 2", "between 0 and 1"]),
        ("int4-tanh0", ["component 2", "0.001 to 1000"]),
        ("ec1.4-ste", ["component 1", "'ec1.4'", "1.5 to 8 bits"]),
        ("ec9-ste", ["component 1", "1.5 to 8 bits"]),
        ("ec-ste", ["component 1", "'ec'", "ec<1.5 to 8>"]),
        ("ec2.5-absmax-ste", ["'ec2.5'", "'absmax'", "use rms"]),
        ("ec2.5-learned-clip1", ["'ec2.5'", "'learned'", "use rms"]),
        ("ec2.5-2of4-ste", ["'2of4'", "'ec2.5'"]),
        ("bf16-ste", ["bf16", "not quantized", "'ste'"]),
        ("bf16-2of4pairs-ste", ["not quantized"]),
        ("", ["component 1", "grid"]),
        ("int4--ste", ["component 2", "''"]),
        ("INT4-ste", ["component 1", "'INT4'"]),
        ("int4-ste ", ["component 2", "'ste '"]),
        ("int٤-ste", ["component 1", "int٤"]),
    ],
)
def test_what_cannot_be_meant_is_refused(word: str, says: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        QuantSpec.parse(word, key="quant.weights")
    message = str(caught.value)
    assert message.startswith("quant.weights: ")
    assert f"'{word}'" in message
    for text in says:
        assert text in message
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    ("word", "operand", "says"),
    [
        ("ec2.5-h64-rms-trust", "activations", ["'ec2.5'", "weights, which are stored", "activations need"]),
        ("ec4-rms-ste", "gradients", ["'ec4'", "gradients need"]),
        ("int8-h64-rms-trust", "gradients", ["'trust'", "write ste"]),
        ("int8-learned-ste", "gradients", ["'learned'", "another scale, such as absmax"]),
    ],
)
def test_words_that_do_not_suit_the_operand_are_refused(word: str, operand: str, says: list[str]) -> None:
    assert str(QuantSpec.parse(word)) == word
    with pytest.raises(UsageError) as caught:
        QuantSpec.parse(word, key=f"quant.{operand}", operand=operand)
    message = str(caught.value)
    assert message.startswith(f"quant.{operand}: '{word}': ")
    assert [text for text in says if text not in message] == []


def test_every_operand_takes_plain_words() -> None:
    for operand in OPERANDS:
        for word in ("bf16", "int8-h64-absmax-ste", "sint4.sr-rms.g32-ste", "fp4-e8m0.g32-ste"):
            assert str(QuantSpec.parse(word, operand=operand)) == word


def test_parts_that_contradict_are_refused_without_a_word_too() -> None:
    with pytest.raises(UsageError, match="learned scale"):
        QuantSpec(Int(4), None, Learned(), None, Trust())
    with pytest.raises(UsageError, match="no estimator"):
        QuantSpec(Int(4), None, Rms())
    with pytest.raises(UsageError, match="no scale"):
        QuantSpec(Int(4), estimator=STE())


def test_words_cost_no_torch() -> None:
    code = "import sys, questctl.quant.methods, questctl.quant; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
