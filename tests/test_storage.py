"""The size of a model in a file: to the byte where it is packed, and within a hundredth of the files that exports write."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
from helpers import slow_but

from questctl.config import ModelConfig
from questctl.quant.spec import QuantSpec
from questctl.quant.storage import artifact_bytes, code_bits, entropy, tensors_of, tokenizer_bytes
from questctl.scaling.sources import load_sources
from questctl.store import load_runs

SCHEMES = {
    "full": {},
    **{f"quest-{b}": {"quant.method": "quest", "quant.bits": b, "quant.block": 32} for b in (1, 2, 3, 4)},
    "learned": tiny.LSQ,
    "offset": {"quant.method": "adabin"},
    "groups": {"quant.method": "nvfp4"},
    "pruned": {"quant.method": "quest-sparse", "quant.bits": 4, "quant.block": 32},
    "bytes": {"quant.weights": "int6-h8.s-mse-ste", "quant.activations": "int8-h8.s-rms-ste"},
    "mixed": {**tiny.QUEST, ("quant", "overrides", "blocks.*.down", "weights"): "bf16"},
}


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, ("full", "groups", "mixed")))
def test_the_count_is_the_file_that_is_exported(trained, tmp_path, scheme):
    pytest.importorskip("transformers")
    from questctl.export import hf

    loaded, found, _ = trained({"model.d_model": 128, "model.d_ff": 256, **SCHEMES[scheme]})
    hf.write_hf(tmp_path, loaded.model, loaded.config, found, "bf16", {})
    size = (tmp_path / "model.safetensors").stat().st_size
    c = loaded.config.with_vocabulary(16)
    assert artifact_bytes(c.model, c.quant, "none") == pytest.approx(size, rel=0.015)
    row = load_runs(loaded.run.path).iloc[0]
    assert row.artifact_bytes == artifact_bytes(c.model, c.quant, "none")
    assert row.artifact_bytes > row.model_bits / 8


def test_the_frontier_may_be_over_files(trained):
    runs = [trained({"model.d_model": d, "model.d_ff": 64, **SCHEMES["quest-2"]})[0].run for d in (32, 64)]
    points = load_sources([run.path for run in runs], columns={"model_bits": "8*artifact_bytes"}).points
    assert sorted(points.memory_bits) == sorted(8 * run.artifact_bytes() for run in runs)


ENDS = {"quant.embedding": "int4-h32-rms-trust", "quant.head": "int4-rms-ste", "quant.kv": "int4-h16-rms-trust"}


def test_runs_carry_the_size_of_their_file_into_lists_and_reports(trained):
    from questctl.analysis.report import tables
    from questctl.store.listing import run_details, run_summary

    for keys in (SCHEMES["quest-4"], {**SCHEMES["quest-4"], **ENDS}):
        loaded = trained(keys)[0]
        c = loaded.config.with_vocabulary(16)
        size = artifact_bytes(c.model, c.quant, "none")
        assert run_summary(loaded.run)["artifact_bytes"] == size
        assert run_details(loaded.run.name, loaded.run.path.parent).to_json()["artifact_bytes"] == size
        frame = load_sources([loaded.run.path]).frame
        of_report = SimpleNamespace(runs=frame, points=None, fit=None)
        assert tables.run_table(of_report)["memory"].tolist() == [size]
        of_table = SimpleNamespace(runs=frame.drop(columns="artifact_bytes"), points=None, fit=None)
        rest, bits = 2 * 16 * c.model.d_model, 4 if len(keys) > 3 else 16
        assert tables.run_table(of_table)["memory"].tolist() == [(loaded.run.result().model_bits + bits * rest) / 8]


def test_what_is_not_known_is_not_made_up():
    c = tiny.config(tiny.QUEST)
    assert math.isnan(artifact_bytes(c.model, c.quant, "byte"))
    assert not math.isnan(artifact_bytes(c.with_vocabulary(16).model, c.quant, "byte"))


def test_every_part_counts():
    def size(model=None, tokenizer="byte", **more):
        c = tiny.config(tiny.QUEST, **{"model__vocab_size": 1000, **(model or {})})
        return artifact_bytes(c.model, c.quant, tokenizer, **more)

    c = tiny.config(tiny.QUEST, model__vocab_size=1000)
    assert isinstance(c.model, ModelConfig)
    head = 1000 * c.model.d_model
    assert size() - size({"model__tied": True}) == pytest.approx(2 * head, abs=200)
    assert size({"model__vocab_size": 2000}) - size() == 4 * head
    assert size(tokenizer="bpe:1000") - size() == pytest.approx(tokenizer_bytes("bpe:1000", 1000))
    weights = c.model.params_non_embedding - c.model.d_model * (2 * c.model.n_layer + 1)
    assert size() - size(coded=True) == pytest.approx(weights * (4 - entropy(QuantSpec.parse("int4-rms-ste"))) / 8)


@pytest.mark.parametrize(
    ("word", "bits"),
    [
        ("int1-rms-ste", 1),
        ("int2-rms-ste", 1.9037),
        ("int3-rms-ste", 2.7606),
        ("int4-rms-ste", 3.6025),
        ("ternary-rms-ste", 1.5358),
    ],
)
def test_entropy_is_that_of_samples(word, bits):
    import torch

    from questctl.quant.quantizer import Quantizer

    spec = QuantSpec.parse(word)
    assert entropy(spec) == pytest.approx(bits, abs=2e-4)
    q = Quantizer(spec).rounded(torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))).q
    shares = torch.unique(q, return_counts=True)[1] / q.numel()
    assert float(-(shares * shares.log2()).sum()) == pytest.approx(bits, abs=0.01)


def test_a_mask_adds_its_bits():
    assert entropy(QuantSpec.parse("int4-rms-2of4-ste")) == pytest.approx(3.6025 / 2 + 1, abs=1e-3)


@pytest.mark.parametrize(("word", "width", "bits"), [("int3-rms-ste", 64, 3), ("int3-rms-ste", 12, 8), ("int5-rms-ste", 64, 8)])
def test_codes_are_packed_where_rows_fill_bytes(word, width, bits):
    spec = QuantSpec.parse(word)
    assert code_bits(spec, width) == bits
    assert tensors_of(spec, 7, width, keep=False)["codes"].bytes == 7 * width * bits // 8


def test_tokenizers_of_python_sources():
    assert tokenizer_bytes("bpe:512", 512) == pytest.approx(8954, rel=0.01)
    assert tokenizer_bytes("bpe:4096", 4096) == pytest.approx(107_314, rel=0.01)
    assert tokenizer_bytes("byte", 256) == tokenizer_bytes("none", 16) == 0
