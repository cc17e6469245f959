"""Method presets and the labels that group runs."""

import itertools

import pytest

from questctl.errors import UsageError
from questctl.quant.methods import METHODS, label_specs, method_specs, scheme_label
from questctl.quant.spec import QuantSpec


@pytest.mark.parametrize(
    ("method", "bits", "word"),
    [
        ("quest", 4, "int4-h128-rms-trust"),
        ("quest", 1, "int1-h128-rms-clip1.3"),
        ("quest", 8, "int8-h128-rms-trust"),
        ("quest", "fp4", "fp4-h128-rms-trust"),
        ("quest", "ternary", "ternary-h128-rms-trust"),
        ("ste", 2, "int2-rms-ste"),
        ("quarot", "3", "int3-h128-rms-ste"),
        ("lsq", 4.0, "int4-learned-clip1"),
        ("bf16", 16, "bf16"),
        ("quest", 16, "bf16"),
        ("bf16", 4, "bf16"),
        ("bf16", None, "bf16"),
        ("quest-fp4", None, "fp4-h128-rms-trust"),
        ("pact", 2, "int2-learned-pact"),
        ("mxfp4", None, "fp4-e8m0.g32-ste"),
        ("nvfp4", "fp4", "fp4-e4m3.g16-ste"),
        ("nupes", 4, "power4-rms-ste"),
        ("olive", None, "olive4-mse-ste"),
    ],
)
def test_words_of_methods(method: str, bits: int | float | str, word: str) -> None:
    assert method_specs(method, bits) == (word, word)
    assert method_specs(method, bits, weight_only=True) == (word, "bf16")


def test_every_method_has_canonical_words_a_summary_and_a_source() -> None:
    for name, method in METHODS.items():
        for bits in (*method.bits, "16"):
            for word in method_specs(name, bits, block=32):
                assert str(QuantSpec.parse(word)) == word
        assert method.summary
        assert method.source or name == "bf16"


@pytest.mark.parametrize("bits", [0, 9, 3.5, "four", "", True, float("nan"), float("inf"), -1, [4], 10**40])
def test_bits_out_of_range(bits: object) -> None:
    with pytest.raises(UsageError, match=r"quant\.bits: .*: 1, 2, 3, 4, 5, 6, 7, 8, ternary, fp4, 16") as caught:
        method_specs("quest", bits)  # type: ignore[arg-type]
    assert str(bits) in str(caught.value)


@pytest.mark.parametrize(
    ("method", "bits", "words"),
    [
        ("nvfp4-2d", None, ("fp4-e4m3.b16-ste", "fp4-e4m3.g16-ste")),
        ("lsq+", 3, ("int3-learned-clip1", "int3-learned.o-clip1")),
        ("adabin", None, ("int1-meanstd-ste", "int1-learned.o-clip1")),
        ("bitnet", None, ("ternary-absmean.t-ste", "sint8-absmax-ste")),
        ("quest-sparse", 4, ("int4-h128-rms-2of4pairs-trust", "int4-h128-rms-trust")),
        ("quest-sparse", 1, ("int1-h128-rms-2of4pairs-clip1.3", "int1-h128-rms-clip1.3")),
    ],
)
def test_words_of_methods_that_treat_weights_and_activations_differently(
    method: str, bits: int | None, words: tuple[str, str]
) -> None:
    assert method_specs(method, bits) == words
    assert method_specs(method, bits, weight_only=True) == (words[0], "bf16")
    assert method_specs(method, 16) == ("bf16", "bf16")


def test_bits_that_a_method_is_not_made_for_and_bits_left_out() -> None:
    with pytest.raises(UsageError, match=r"quant\.bits: 2 is not what 'adabin' is made for; choices: 1, 16\."):
        method_specs("adabin", 2)
    with pytest.raises(UsageError, match=r"quant\.bits: fp4 .* 'nupes' .*: 3, 4, 5, 6, 7, 8, 16\."):
        method_specs("nupes", "fp4")
    with pytest.raises(UsageError, match=r"quant\.method: 'quest' needs quant\.bits \(--bits\), such as 4\."):
        method_specs("quest", None)


@pytest.mark.parametrize("block", [0, 1, 3, 100, -2, 64.0, "64"])
def test_block_is_a_power_of_two(block: object) -> None:
    with pytest.raises(UsageError, match=r"quant\.block: .*power of two"):
        method_specs("quest", 4, block=block)  # type: ignore[arg-type]


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"quant\.method: unknown method 'qest'; did you mean 'quest'\? Choices: quest, ste"):
        method_specs("qest", 4)


def label(weights: str, activations: str) -> str:
    return scheme_label(QuantSpec.parse(weights), QuantSpec.parse(activations))


@pytest.mark.parametrize(
    ("weights", "activations", "expected"),
    [
        ("bf16", "bf16", "bf16"),
        ("int4-h128-rms-trust", "int4-h128-rms-trust", "quest-w4a4"),
        ("int4-h64-rms-trust", "int4-h64-rms-trust", "quest-w4a4"),
        ("int1-h64-rms-clip1.3", "int1-h64-rms-clip1.3", "quest-w1a1"),
        ("int4-h128-rms-trust", "int8-h128-rms-trust", "quest-w4a8"),
        ("int4-h128-rms-trust", "bf16", "quest-w4a16"),
        ("bf16", "int4-h128-rms-trust", "quest-w16a4"),
        ("fp4-h128-rms-trust", "fp4-h128-rms-trust", "quest-fp4"),
        ("fp4-h128-rms-trust", "bf16", "quest-wfp4a16"),
        ("ternary-rms-ste", "ternary-rms-ste", "ste-ternary"),
        ("int4-h128-rms-2of4pairs-trust", "int4-h128-rms-trust", "quest-w4a4-2of4pairs"),
        ("int2-rms-ste", "int2-rms-ste", "ste-w2a2"),
        ("int2-h32-rms-ste", "int2-h32-rms-ste", "quarot-w2a2"),
        ("int4-learned-clip1", "int4-learned-clip1", "lsq-w4a4"),
        ("int1-h64-rms-trust", "int1-h64-rms-trust", "int1-h64-rms-trust"),
        ("int4-learned-clip1", "int4-learned.o-clip1", "lsq+-w4a4"),
        ("int4-learned-clip1", "bf16", "lsq-w4a16"),
        ("ternary-absmean.t-ste", "sint8-absmax-ste", "bitnet"),
        ("ternary-absmean.t-ste", "bf16", "bitnet-wternarya16"),
        ("ternary-absmean-ste", "sint8-absmax-ste", "ternary-absmean-ste+sint8-absmax-ste"),
        ("fp4-e8m0.g32-ste", "fp4-e8m0.g32-ste", "mxfp4"),
        ("power4-rms-ste", "power4-rms-ste", "nupes-w4a4"),
        ("int4-h64.s-rms-trust", "int4-h64.s-rms-trust", "int4-h64.s-rms-trust"),
        ("int4.sr-rms-ste", "int4.sr-rms-ste", "int4.sr-rms-ste"),
        ("int4-h64-rms-trust", "int4-rms-ste", "int4-h64-rms-trust+int4-rms-ste"),
        ("int4-h64-rms-2of4pairs-trust", "int4-h64-rms-2of4pairs-trust", "int4-h64-rms-2of4pairs-trust"),
    ],
)
def test_labels(weights: str, activations: str, expected: str) -> None:
    assert label(weights, activations) == expected


def test_different_pairs_never_share_a_label() -> None:
    words = ["bf16"] + [
        f"{grid}{rotation}-{scale}{mask}-{estimator}"
        for grid in ("int1", "fp4")
        for rotation in ("", "-h64")
        for scale in ("rms", "learned", "e8m0.g32")
        for mask in ("", "-2of4pairs")
        for estimator in ("ste", "clip1", "clip1.3", "trust")
        if not (scale == "learned" and estimator.startswith("trust"))
    ]
    labels = [label(w, a) for w, a in itertools.product(words, words)]
    assert len(set(labels)) == len(words) ** 2


def test_a_label_stands_for_the_words_that_it_was_made_of() -> None:
    pairs = [
        (method_specs(name, w, block=64)[0], method_specs(name, a, block=64)[1])
        for name, method in METHODS.items()
        for w, a in itertools.product((*method.bits, "16"), repeat=2)
    ]
    masked = [
        (f"{w.rpartition('-')[0]}-{mask}-{w.rpartition('-')[2]}", a)
        for w, a in pairs
        for mask in ("2of4pairs", "2of4", "sparse0.5")
        if w != "bf16" and "-2of4" not in w and not any(part in w for part in (".o-", "meanstd", "olive"))
    ]
    own = [("int4-h64.s-rms-trust", "int4-h64-rms-ste"), ("int4.sr-rms-ste", "int4.sr-rms-ste")]
    for weights, activations in [*pairs, *masked, *own]:
        assert label_specs(label(weights, activations), 64) == (weights, activations)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4", ("int4-h32-rms-trust", "int4-h32-rms-trust")),
        ("W4A16", ("int4-h32-rms-trust", "bf16")),
        ("1.585", ("ternary-h32-rms-trust", "ternary-h32-rms-trust")),
        ("w-fp4-a-fp4", ("fp4-h32-rms-trust", "fp4-h32-rms-trust")),
        ("w4sparse-a4", ("int4-h32-rms-2of4pairs-trust", "int4-h32-rms-trust")),
        ("w4a4-norot", ("int4-rms-trust", "int4-rms-trust")),
        ("w1a1-norot", ("int1-rms-clip1.25", "int1-rms-clip1.25")),
        ("quarot-w4a4", ("int4-h32-rms-ste", "int4-h32-rms-ste")),
        ("pact-w2a2", ("int2-learned-pact", "int2-learned-pact")),
        ("w4a4-lsq", ("int4-learned-clip1", "int4-learned-clip1")),
        *((text, None) for text in ("mystery", "quest", "w9a9", "w4a4-mine", "lloyd4", "a+b+c", "w4a4+12ab")),
    ],
)
def test_labels_of_other_tables(text: str, words: tuple[str, str] | None) -> None:
    assert label_specs(text, 32) == words
