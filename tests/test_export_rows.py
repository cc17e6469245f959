"""Exports of runs with quantized embedding, head and cache: the run's logits where a format has them, and what it lacks."""

from __future__ import annotations

import functools
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from questctl.export import bundle, hf
from questctl.export.check import lost_inputs
from questctl.export.weights import dense_model, model_in, tables
from questctl.export.write import statements
from questctl.quant.storage import artifact_bytes

ENDS = {"quant.embedding": "int4-h32-rms-trust", "quant.head": "int4-h32-rms-trust", "quant.kv": "int4-h16-rms-trust"}
SCHEMES = {
    "quest": {**tiny.QUEST, **ENDS},
    "alone": ENDS,
    "tied": {**tiny.QUEST, **ENDS, "quant.head": "bf16", "model.tied": True},
    "head": {"quant.head": "fp4-e8m0.g32-ste"},
    "other": {"quant.embedding": "int1-meanstd-ste", "quant.head": "int6-rms.g16-ste", "quant.kv": "int8-absmax-ste"},
}
FEW = ("quest", "tied", "other")


@pytest.fixture(scope="module", autouse=True)
def bundled_once():
    """The code in the exports is the same in all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "bundle", functools.cache(bundle.bundle))
        yield


@pytest.mark.parametrize("scheme", [pytest.param(s, marks=[] if s in FEW else pytest.mark.slow) for s in SCHEMES])
def test_hf_has_codes_and_computes_what_the_training_computed(trained, tmp_path, scheme):
    loaded, found, tokens = trained(SCHEMES[scheme])
    hf.write_hf(tmp_path, loaded.model, loaded.config, found, "fp32", {})
    export = hf.load(tmp_path)
    torch.testing.assert_close(tiny.logits(export, tokens), tiny.logits(loaded.model, tokens), rtol=0, atol=1e-5)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("model.embed_tokens.codes" in stored) == ("quant.embedding" in SCHEMES[scheme])
    assert not {"lm_head.weight", "lm_head.codes"} & stored.keys() or not loaded.config.model.tied
    written = export.generate(tokens[:1, :5], max_new_tokens=8, do_sample=False, pad_token_id=0)  # from a cache
    assert written[0, 5:].tolist() == tiny.logits(loaded.model, written)[0].argmax(-1)[4:-1].tolist()
    code = (tmp_path / hf.CODE_FILE).read_text(encoding="utf-8")
    assert all(f"class {name}(" in code for name in ("QuestEmbedding", "QuestTiedHead", "QuestLinear"))


@pytest.mark.parametrize("scheme", [pytest.param(s, marks=[] if s in FEW[:2] else pytest.mark.slow) for s in SCHEMES])
def test_the_count_is_the_file_that_is_exported(trained, tmp_path, scheme):
    loaded, found, _ = trained({"model.d_model": 128, "model.d_ff": 256, "data.source": VOCABULARY, **SCHEMES[scheme]})
    hf.write_hf(tmp_path, loaded.model, loaded.config, found, "bf16", {})
    size = (tmp_path / "model.safetensors").stat().st_size
    c = loaded.config.with_vocabulary(256)
    counted = artifact_bytes(c.model, c.quant, "none")
    assert counted == pytest.approx(size, rel=0.015)
    assert size <= 1.05 * counted
    plain = c.quant.model_copy(update={key: type(c.quant)().kv for key in ("embedding", "head")})
    saved = artifact_bytes(c.model, plain, "none") - counted
    assert saved > 0.3 * 256 * 128 * 2 * (2 if scheme in ("quest", "alone", "other") else 1)


VOCABULARY = "synthetic:markov?vocab=256&tokens=20000"


def test_in_bf16_rows_are_rounded_after_they_are_decoded(trained, tmp_path):
    loaded, found, tokens = trained(SCHEMES["tied"])
    hf.write_hf(tmp_path, loaded.model, loaded.config, found, "bf16", {})
    export = hf.load(tmp_path)
    own = model_in(loaded.model, found, torch.bfloat16)
    assert export.model.embed_tokens.steps.dtype == torch.float32
    rows = export.model.embed_tokens(tokens)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, own.embed(tokens))
    difference = tiny.logits(export, tokens).float() - tiny.logits(own, tokens).float()
    assert difference.abs().max() < 0.05 * tiny.logits(loaded.model, tokens).std()


def test_dense_formats_hold_the_values_and_say_what_they_lack(trained, tmp_path):
    loaded, found, tokens = trained(SCHEMES["quest"])
    plain = dense_model(loaded.model, found)
    with torch.no_grad():
        assert torch.equal(plain.embed.weight, loaded.model.embed.values())
        assert torch.equal(plain.head.weight, loaded.model.head.values())
    hf.write_dense(tmp_path, plain, loaded.config, "fp32", {})
    torch.testing.assert_close(tiny.logits(hf.load(tmp_path), tokens), tiny.logits(plain, tokens), rtol=0, atol=1e-5)
    lost = lost_inputs(loaded.config)
    assert "int4-h32-rms-trust in 14 layers) and keys and values (int4-h16-rms-trust)" in lost
    assert statements("hf-dense", "fp32", loaded.config, "byte")[1][0] == lost
    assert lost_inputs(tiny.config({"quant.kv": "int4-rms-ste"})).count("keys and values") == 1
    _, lacking = statements("compressed-tensors", "fp32", loaded.config, "byte")
    assert any(line.endswith("no type of compressed-tensors fits: embedding and head.") for line in lacking)


def test_compressed_tensors_writes_them_dense(trained, tmp_path):
    pytest.importorskip("compressed_tensors")
    from questctl.export import compressed_tensors

    ends = {"quant.embedding": "int4-rms-ste", "quant.head": "int2-rms-ste"}
    loaded, found, tokens = trained({"quant.weights": "int3-rms-ste", **ends})
    compressed_tensors.write(tmp_path, loaded.model, loaded.config, found, "fp32", {})
    got = tiny.logits(compressed_tensors.load(tmp_path), tokens)
    torch.testing.assert_close(got, tiny.logits(loaded.model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("embedding", "head", "kinds"),
    [
        ("int4-rms-ste", "sint4-rms-ste", ("Q4_1", "Q4_0")),
        ("fp4-e8m0.g32-ste", "int4-h32-rms-trust", ("MXFP4", "F32")),  # a rotation has no type, and is written out
        ("int7-rms-ste", "fp8-rms-ste", ("Q8_0", "F32")),
    ],
)
def test_gguf_has_types_for_grids_that_fit_exactly(trained, tmp_path, embedding, head, kinds):
    package = pytest.importorskip("gguf")
    from questctl.export import gguf

    loaded, found, tokens = trained({"quant.weights": "int3-rms-ste", "quant.embedding": embedding, "quant.head": head})
    plain, rows = dense_model(loaded.model, found), tables(loaded.model)
    gguf.write(tmp_path, plain, loaded.config, found, "exact", None, rows)
    types = {t.name: t.tensor_type.name for t in package.GGUFReader(tmp_path / gguf.FILE).tensors}
    assert (types["token_embd.weight"], types["output.weight"]) == kinds
    read = gguf.read(tmp_path, plain)
    for name in ("embed", "head"):
        own, back = plain.get_submodule(name).weight, read.get_submodule(name).weight
        slack = 2e-3 * float(own.detach().abs().max()) if kinds[0] == "Q4_1" else 0.0
        torch.testing.assert_close(back, own, rtol=2**-10, atol=slack)
    torch.testing.assert_close(tiny.logits(read, tokens), tiny.logits(plain, tokens), rtol=0, atol=2e-3)
    said = [line for line in statements("gguf", "exact", loaded.config, "byte")[1] if "plain values" in line]
    assert said == (["Written as plain values, since no type of gguf fits: head."] if "F32" in kinds else [])


def test_other_runs_write_the_config_that_they_wrote(trained, tmp_path):
    loaded, found, _ = trained(tiny.QUEST)
    hf.write_hf(tmp_path, loaded.model, loaded.config, found, "fp32", {})
    assert not {"quest_rows", "quest_tied"} & json.loads((tmp_path / "config.json").read_text()).keys()
