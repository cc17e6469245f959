"""Formats as laws read them, and that they are those of the quantizers: over every word of every grid, mask and group."""

import math

import numpy as np
import pandas as pd
import pytest
import tiny
from scipy.stats import norm

from questctl.analysis.formats import FP8_LEVELS, format_mse, gaussian_mse, read_format
from questctl.analysis.points import points_from_frame
from questctl.analysis.schemes import read_scheme
from questctl.analysis.tables import PointError
from questctl.models.llama import build_model, model_bits
from questctl.quant.grids import BF16, FP8, GRIDS, EntropyCoded
from questctl.quant.spec import QuantSpec
from questctl.store import describe

RATES = (1.5, 1.85, 2, 2.5, 3.25, 6.1, 8)


def every_grid_word() -> list[str]:
    """All words of all grids, with and without `.sr`; of a grid with any number of bits, several."""
    words = [w for c in GRIDS if c not in (EntropyCoded, BF16) for w in c.forms] + [f"ec{r:g}" for r in RATES]
    words = [w for w in words if w not in ("power7", "power8")]  # their search takes seconds, as that of power6
    stochastic = [f"{w}.sr" for w in words if "sr" in QuantSpec.parse(f"{w}-ste").grid.variants]
    assert len(stochastic) == len(words) - 1  # olive4
    return [*words, *stochastic]


@pytest.mark.parametrize("word", every_grid_word())
def test_bits_and_error_are_those_of_the_quantizer(word: str) -> None:
    found, grid = read_format(f"{word}-rms-ste"), QuantSpec.parse(f"{word}-ste").grid
    assert found is not None
    assert found.bits == pytest.approx(grid.bits, rel=1e-12)
    assert found.mse == pytest.approx(grid.mse, rel=1e-8)
    assert (found.stored, found.rotated) == (found.bits, False)
    assert read_format(word) == found


@pytest.mark.parametrize("head", ["int4", "ternary", "fp4", "sint3", "fp8"])
@pytest.mark.parametrize("rotation", ["", "-h64", "-h32.s"])
@pytest.mark.parametrize("scale", ["", "-rms.t", "-rms.g32", "-absmax.g128", "-e8m0.g32", "-e4m3.g16", "-mse.g64"])
@pytest.mark.parametrize("mask", ["", "-2of4", "-2of4pairs", "-sparse0.75", "-sparse0.5"])
def test_stored_bits_are_those_of_the_spec(head: str, rotation: str, scale: str, mask: str) -> None:
    word = f"{head}{rotation}{scale}{mask}-ste"
    found, spec = read_format(word), QuantSpec.parse(word)
    assert found is not None
    assert found.stored == pytest.approx(spec.bits, rel=1e-12)
    assert found.rotated == bool(spec.rotation)
    assert read_format(str(spec)) == found


def test_entropy_coded_words_store_their_rate_and_the_scales_of_groups() -> None:
    word = "ec2.5-h64-rms.g32-trust"
    found = read_format(word)
    assert found is not None
    assert (found.bits, found.stored, found.rotated) == (2.5, 3.0, True)
    assert QuantSpec.parse(word).bits == found.stored


@pytest.mark.parametrize("word", ["", "w", "int", "intx", "nf4", "olive", "ec", "lloyd", "int4x-rms", "h64-int4"])
def test_other_words_are_none(word: str) -> None:
    assert read_format(word) is None
    assert math.isnan(format_mse(word))


@pytest.mark.parametrize(("word", "bits"), [("sint2.5", 2.5), ("power2", 2), ("olive8", 8), ("lloyd2.5", 2.5), ("ec20", 20)])
def test_bits_without_a_known_error(word: str, bits: float) -> None:
    found = read_format(word)
    assert found is not None
    assert found.bits == bits
    assert math.isnan(found.mse)


def test_fp8_levels_and_the_deepest_of_their_minima() -> None:
    assert FP8().levels == FP8_LEVELS
    z, levels = norm.ppf((np.arange(200_000) + 0.5) / 200_000), np.array(FP8_LEVELS)
    edges = (levels[1:] + levels[:-1]) / 2
    errors = [np.mean((z - s * levels[np.searchsorted(edges, z / s)]) ** 2) for s in np.geomspace(1, 64, 200) / 448]
    assert gaussian_mse(FP8_LEVELS) == pytest.approx(min(errors), rel=2e-3)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_whose_layers_differ_report_the_bits_that_they_store() -> None:
    """As `questctl allocate` writes them: the record and the points, against the bits counted from the modules."""
    words = {
        "blocks.*.down": {"weights": "int8-h32-rms-trust"},
        "blocks.0.q": {"weights": "ec2.5-h32-rms-trust"},
        "blocks.1.up": {"weights": "bf16", "activations": "bf16"},
    }
    changes = {("quant", "overrides", layer, side): w for layer, sides in words.items() for side, w in sides.items()}
    config = tiny.config(tiny.QUEST | changes)
    row = describe(config)
    model = build_model(config.model.model_copy(update={"vocab_size": 16}), config.quant, 0)
    n, norms = config.model.params_non_embedding, sum(p.numel() for p in model.blocks.parameters() if p.ndim == 1) + 32
    assert row["w_stored_bits"] * (n - norms) + 16 * norms == pytest.approx(model_bits(model))
    assert row["w_stored_bits"] != 4
    d, f = 32, 64
    weights = 8 * d * d + 6 * d * f
    assert row["a_stored_bits"] == pytest.approx((4 * (weights - d * f) + 16 * d * f) / weights)
    frame = pd.DataFrame(
        [
            {**describe(tiny.config()), "loss": 2.0, "model_bits": 16 * n},
            {**row, "loss": 2.1, "model_bits": model_bits(model)},
            {**describe(tiny.config(tiny.QUEST)), "loss": 2.2, "model_bits": 4.5 * n},
        ]
    )
    points = points_from_frame(frame)
    mixed = next(s for s in points.schemes if s.label == row["scheme"])
    assert (mixed.w_grid_bits, mixed.a_grid_bits, mixed.w_stored_bits) == tuple(
        row[c] for c in ("w_grid_bits", "a_grid_bits", "w_stored_bits")
    )
    assert math.isnan(mixed.w_mse)
    assert {s.w_stored_bits for s in points.schemes if s.label != row["scheme"]} == {16, 4}


def test_mixed_runs_of_several_sizes_are_one_scheme() -> None:
    rows = [
        {
            "scheme": "quest-w4a4+1a2b",
            "weights": "int4-h64-rms-trust",
            "activations": "int4-h64-rms-trust",
            "w_bits": bits,
            "a_bits": 4.0,
            "N": n,
            "D": 20 * n,
            "loss": loss,
        }
        for bits, n, loss in ((3.2, 1e6, 3.0), (3.25, 2e6, 2.9))
    ]
    points = points_from_frame(pd.DataFrame(rows))
    assert [s.label for s in points.schemes] == ["quest-w4a4+1a2b"]
    assert points.schemes[0].w_stored_bits == 3.2
    with pytest.raises(PointError, match="contradicts"):  # without the mark a record must say what its words say
        points_from_frame(pd.DataFrame([rows[0] | {"scheme": "quest-w4a4"}]))


def test_a_pair_of_words_in_a_label_is_no_mark() -> None:
    words = {"weights": "int4-h64-rms-clip1", "activations": "bf16"}
    row = {"scheme": "int4-h64-rms-clip1+bf16", **words, "w_bits": 4.0, "a_bits": 16.0, "N": 1e6, "D": 2e7, "loss": 3.0}
    assert points_from_frame(pd.DataFrame([row])).schemes[0].w_mse == pytest.approx(0.0115428845)


@pytest.mark.parametrize("word", ["ec2.5-h64-rms-trust", "sint4.sr-rms-ste", "olive4-mse-ste", "power4-rms-ste", "fp8-rms-ste"])
def test_words_beyond_the_plain_ones_become_schemes(word: str) -> None:
    scheme, spec = read_scheme("some", word, "int8-h64-rms-trust"), QuantSpec.parse(word)
    assert scheme is not None
    assert (scheme.w_grid_bits, scheme.w_stored_bits, scheme.a_grid_bits) == (spec.grid.bits, spec.bits, 8)
    assert scheme.w_mse == pytest.approx(spec.grid.mse, rel=1e-8)
