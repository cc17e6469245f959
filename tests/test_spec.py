"""Words and specs: one is the other, and what cannot be meant is refused with its place and the choices."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from questctl.errors import UsageError
from questctl.quant.estimators import STE, Clip, Trust
from questctl.quant.grids import BF16, FP4, Int, Lloyd, Ternary
from questctl.quant.masks import TwoOfFourPairs
from questctl.quant.rotations import Hadamard
from questctl.quant.scales import AbsMax, Learned, Rms
from questctl.quant.spec import KINDS, QuantSpec

factors = st.one_of(st.floats(1e-7, 9e5), st.integers(1, 99).map(lambda n: n / 10))
grids = st.one_of(st.builds(Int, st.integers(1, 8)), st.builds(Lloyd, st.integers(1, 4)), st.just(Ternary()), st.just(FP4()))
specs = st.one_of(
    st.just(QuantSpec(BF16())),
    st.builds(
        QuantSpec, grids, st.one_of(st.none(), st.builds(Hadamard, st.integers(1, 16).map(lambda n: 2**n))),
        st.sampled_from([Rms(), AbsMax()]), st.sampled_from([None, TwoOfFourPairs()]),
        st.one_of(st.just(STE()), st.builds(Clip, factors), st.builds(Trust, factors)),
    ),
    st.builds(QuantSpec, grids, st.none(), st.just(Learned()), st.none(), st.one_of(st.just(STE()), st.builds(Clip, factors))),
)  # fmt: skip


@given(specs)
def test_parse_is_the_inverse_of_str(spec: QuantSpec) -> None:
    assert QuantSpec.parse(str(spec)) == spec
    assert str(QuantSpec.parse(str(spec))) == str(spec)


def test_every_registered_part_appears_in_the_property_above() -> None:
    assert {c for classes in KINDS.values() for c in classes} == {
        Int, Ternary, FP4, Lloyd, BF16, Hadamard, Rms, AbsMax, Learned, TwoOfFourPairs, STE, Clip, Trust,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "canonical"),
    [
        ("int4-ste", "int4-rms-ste"), ("int4-h128-trust", "int4-h128-rms-trust"), ("int1-h64-clip1.30", "int1-h64-rms-clip1.3"),
        ("bf16", "bf16"), ("fp4-trust1.0", "fp4-rms-trust"), ("int4-trust2.00", "int4-rms-trust2"),
        ("int4-2of4pairs-ste", "int4-rms-2of4pairs-ste"), ("int08-ste", "int8-rms-ste"),
        ("ternary-absmax-clip0.0000001", "ternary-absmax-clip0.0000001"),
    ],
)  # fmt: skip
def test_canonical_words(word: str, canonical: str) -> None:
    assert str(QuantSpec.parse(word)) == canonical


def test_properties() -> None:
    spec = QuantSpec.parse("int4-h128-rms-2of4pairs-trust")
    assert (spec.bits, spec.rotation, spec.is_identity) == (2.5, 128, False)
    plain = QuantSpec.parse("bf16")
    assert (plain.bits, plain.rotation, plain.is_identity) == (16, 0, True)
    assert QuantSpec.parse("ternary-ste").bits == pytest.approx(1.5849625007)
    assert QuantSpec.parse("fp4-ste").bits == 4


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("int4-h128-rms-trsut", ["part 4", "'trsut'", "did you mean 'trust'", "clip<c>"]),
        ("it4-h128-rms-trust", ["part 1", "grid", "'it4'", "int4", "lloyd4"]),
        ("int9-ste", ["part 1", "'int9'", "1 to 8 bits", "int8"]),
        ("int0-ste", ["part 1", "1 to 8 bits"]),
        ("int4.5-ste", ["part 1", "4.5", "whole number"]),
        ("lloyd5-ste", ["part 1", "1 to 4 bits"]),
        ("int4-h100-ste", ["part 2", "'h100'", "power of two"]),
        ("int4-h1-ste", ["part 2", "power of two"]),
        ("int4-rsm-ste", ["part 2", "'rsm'", "did you mean 'rms'", "absmax"]),
        ("int4-rms-h128-ste", ["part 3", "rotation", "wrong place", "grid[-rotation]-scale"]),
        ("ste-int4", ["part 1", "estimator", "wrong place"]),
        ("int4-h64-h32-ste", ["part 3", "second rotation", "'h64'"]),
        ("int4-ste-trust", ["part 3", "second estimator"]),
        ("int4-ste-x", ["part 3", "one part too many"]),
        ("int4-h128-rms", ["no estimator", "trust<factor>"]),
        ("int4-clip-x", ["part 2", "'clip'", "clip<c>"]),
        ("int4-clip0", ["part 2", "clip factor", "above 0"]),
        ("int4-trust-1", ["part 3", "'1'"]),
        ("int4-learned-trust", ["'trust'", "learned scale", "use clip<c> or ste"]),
        ("bf16-ste", ["bf16", "not quantized", "'ste'"]),
        ("bf16-2of4pairs-ste", ["not quantized"]),
        ("", ["part 1", "grid"]),
        ("int4--ste", ["part 2", "''"]),
        ("INT4-ste", ["part 1", "'INT4'"]),
        ("int4-ste ", ["part 2", "'ste '"]),
        ("int٤-ste", ["part 1", "int٤"]),
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
