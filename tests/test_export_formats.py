"""compressed-tensors and GGUF: the training's weights through other packages' readers, to the formats' own precision."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import needs_package, slow_but

from questctl.data import tokenizers
from questctl.models.llama import build_model

pytest.importorskip("transformers")
pytest.importorskip("gguf")

import gguf as gguf_package
import numpy as np
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from questctl.errors import UsageError
from questctl.export import check, compressed_tensors, gguf, hf, tokenizer
from questctl.export.weights import E2M1, block_floats, dense_model, weights

pytestmark = needs_package("compressed_tensors")
BITS = (1, 2, 3, 4)
HALF = 2.0**-11  # half a unit in the last place of fp16


# --- compressed-tensors -----------------------------------------------------------------------------------------------

PACKED = {
    **{f"rotated-{b}": {"quant.method": "quest", "quant.bits": b, "quant.block": 32} for b in BITS},
    **{f"parametrised-{b}": {"quant.weights": f"int{b}-h32-rms-ste"} for b in BITS},
    **{f"plain-{b}": {"quant.weights": f"int{b}-rms-ste"} for b in BITS},
    "groups": {"quant.weights": "sint4-absmax.g16-ste"},
    "learned": {"quant.weights": "int3-learned-clip1"},
    "pruned": {"quant.weights": "int4-rms-2of4pairs-ste"},
    "mixed": {
        **tiny.QUEST,
        ("quant", "overrides", "blocks.*.down", "weights"): "int7-h16-rms-trust",
        ("quant", "overrides", "blocks.*.down", "activations"): "int7-h16-rms-trust",
        ("quant", "overrides", "blocks.0.q", "weights"): "bf16",
    },
}


FLOATS = {
    "nvfp4": {"quant.method": "nvfp4"},
    "squares": {"quant.method": "nvfp4-2d"},
    "mxfp4": {"quant.weights": "fp4-e8m0.g32-ste"},
    "both": {
        "quant.weights": "fp4-e4m3.g16-ste",
        ("quant", "overrides", "blocks.*.down", "weights"): "fp4-e8m0.g32-ste",
        ("quant", "overrides", "blocks.0.q", "weights"): "int3-rms-ste",
    },
    "rotated": {"quant.weights": "fp4-h32-e8m0.g32-ste", "quant.activations": "int8-h32-rms-ste"},
}


@pytest.mark.parametrize("scheme", FLOATS)
def test_blocks_of_fp4_in_compressed_tensors(trained, tmp_path, scheme):
    """The package unpacks them to bf16, and computes in it."""
    loaded, found, tokens = trained(FLOATS[scheme])
    compressed_tensors.write(tmp_path, loaded.model, loaded.config, found, "bf16", {})
    own = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    kinds = {scheme: ["nvfp4-pack-quantized"] for scheme in ("nvfp4", "squares")}
    kinds |= {"mxfp4": ["mxfp4-pack-quantized"], "rotated": ["mxfp4-pack-quantized"]}
    assert own["format"] == kinds.get(scheme, ["mixed-precision"])[0]
    with torch.no_grad():
        model = compressed_tensors.load(tmp_path)
        expected, got = tiny.logits(dense_model(loaded.model, found), tokens), tiny.logits(model, tokens)
    assert (got.float() - expected).abs().max() < 0.1 * expected.std()
    name = "blocks.1.o"
    place = tmp_path / "model.safetensors"
    tensors = load_file(place)
    codes, e, t = block_floats(name, found[name])
    values = t * torch.tensor([*E2M1, *(-x for x in E2M1)])[codes.long()].unflatten(-1, (e.shape[1], -1)) * e.unsqueeze(-1)
    torch.testing.assert_close(values.flatten(1), found[name].stored.values(), rtol=1e-6, atol=0)
    assert tensors["model.layers.1.self_attn.o_proj.weight_packed"].shape == (32, 16)
    expected = {"nvfp4": 4.5, "both": 4.5, "squares": 4.5}.get(scheme, 4.25)
    stored = 8 * sum(tensor.nbytes for key, tensor in tensors.items() if "layers.1.self_attn.o_proj" in key) / (32 * 32)
    assert stored == pytest.approx(expected, abs=0.04)  # one scale of 32 bits in 1,024


def test_fp4_with_scales_of_no_format_is_refused(trained):
    """Planted: a scale that E4M3 does not have."""
    _, found, _ = trained(FLOATS["nvfp4"])
    weight = found["blocks.0.q"]
    scale = weight.stored.scale.clone()
    scale[0] *= 1.03
    wrong = dataclasses.replace(weight, stored=dataclasses.replace(weight.stored, scale=scale))
    with pytest.raises(UsageError, match="with scales of its format"):
        block_floats("blocks.0.q", wrong)


@pytest.mark.parametrize(
    "scheme", slow_but(PACKED, ("rotated-1", "rotated-4", "parametrised-3", "plain-2", "learned", "pruned", "mixed"))
)
def test_compressed_tensors_after_its_transform(trained, tmp_path, scheme):
    loaded, found, tokens = trained(PACKED[scheme])
    plain = dense_model(loaded.model, found)
    compressed_tensors.write(tmp_path, loaded.model, loaded.config, found, "fp32", {})
    expected = tiny.logits(plain, tokens)
    torch.testing.assert_close(tiny.logits(compressed_tensors.load(tmp_path), tokens), expected, rtol=0, atol=1e-4)
    if loaded.config.quant.activations.is_identity:
        torch.testing.assert_close(expected, tiny.logits(loaded.model, tokens), rtol=0, atol=1e-5)
    rotated = any(w.layer.rotates for w in found.values())
    assert (tmp_path / "load_rotated.py").exists() == rotated
    if scheme in ("rotated-4", "plain-4"):  # what the model card warns of
        alone = tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens)
        assert ((alone - expected).abs().max() > 0.05) == rotated


def test_the_loader_beside_the_weights_needs_no_questctl(trained, tmp_path, monkeypatch, capsys):
    """It runs as a script where `import questctl` fails."""
    loaded, found, _ = trained(PACKED["rotated-2"])
    compressed_tensors.write(tmp_path, loaded.model, loaded.config, found, "fp32", {})
    assert "questctl" not in (tmp_path / "load_rotated.py").read_text().replace("without questctl", "")
    for name in [name for name in sys.modules if name.partition(".")[0] == "questctl"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["load_rotated.py", str(tmp_path)])
    runpy.run_path(str(tmp_path / "load_rotated.py"), run_name="__main__")
    assert "HadamardTransform" in capsys.readouterr().out


@pytest.mark.slow
def test_the_loader_beside_the_weights_runs_alone(trained, tmp_path):
    loaded, found, _ = trained(PACKED["rotated-2"])
    compressed_tensors.write(tmp_path, loaded.model, loaded.config, found, "fp32", {})
    done = subprocess.run([sys.executable, "load_rotated.py", "."], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "HadamardTransform" in done.stdout


# --- GGUF -------------------------------------------------------------------------------------------------------------

WIDE = {"model.d_model": 256, "model.d_ff": 256, "model.n_layer": 1, "train.steps": 2}  # rows of whole blocks of 256
EXACT = [  # word of the weights, dtype → type of the blocks
    ("ternary-absmean.t-ste", "exact", "TQ2_0"),
    ("int1-rms-ste", "tq1_0", "TQ1_0"),
    ("int1-rms-2of4-ste", "tq2_0", "TQ2_0"),
    ("int1-rms-ste", "q1_0", "Q1_0"),
    ("int2-rms-ste", "exact", "Q2_K"),
    ("int2-rms-ste", "q4_0", "Q4_0"),
    ("int2-rms-2of4-ste", "exact", "Q3_K"),
    ("int3-learned-clip1", "q4_0", "Q4_0"),
    ("sint4-absmax.g32-ste", "exact", "Q4_0"),
    ("int4-rms-ste", "exact", "Q4_K"),
    ("int4-rms-2of4-ste", "exact", "Q5_0"),
    ("sint5-rms.g64-ste", "q5_0", "Q5_0"),
    ("int5-rms-ste", "exact", "Q5_K"),
    ("int5-rms-2of4-ste", "exact", "Q6_K"),
    ("int6-rms-ste", "exact", "Q8_0"),
    ("fp4-e8m0.g32-ste", "exact", "MXFP4"),
]


def tensors(folder):
    return {t.name: t for t in gguf_package.GGUFReader(folder / gguf.FILE).tensors}


def values(tensor):
    if tensor.tensor_type.name == "Q1_0":  # which the package cannot unpack: a scale, and a bit for each sign
        return torch.from_numpy(gguf._values(tensor))
    return torch.from_numpy(gguf_package.quants.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.mark.parametrize(("word", "dtype", "kind"), EXACT)
def test_gguf_blocks_hold_the_very_levels(trained, tmp_path, word, dtype, kind):
    loaded, found, _ = trained({**WIDE, "quant.weights": word})
    plain = dense_model(loaded.model, found)
    gguf.write(tmp_path, plain, loaded.config, found, dtype, None)
    read = tensors(tmp_path)
    for name, weight in found.items():
        tensor = read[gguf.gguf_name(f"{name}.weight")]
        assert tensor.tensor_type.name == kind
        value = gguf.halves(values(tensor), 2) if name.endswith((".q", ".k")) else values(tensor)
        torch.testing.assert_close(value, weight.dense, rtol=HALF, atol=0)
    assert {t.tensor_type.name for name, t in read.items() if "attn_q" not in name and "ffn" not in name} <= {kind, "F32"}
    torch.testing.assert_close(values(read["output.weight"]), plain.head.weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "dtype", "tolerance"),
    [
        ({"quant.method": "quest", "quant.bits": 4, "quant.block": 32}, "f32", 1e-5),
        ({"quant.method": "quest", "quant.bits": 1, "quant.block": 32, "quant.weight_only": True}, "f32", 1e-5),
        ({"quant.weights": "int2-rms-ste"}, "f16", 1e-2),
        ({"quant.weights": "int3-rms-ste"}, "q8_0", 5e-2),
        ({"quant.weights": "int4-rms-ste"}, "exact", 1e-2),
        ({**WIDE, "quant.weights": "int4-rms-ste"}, "exact", 1e-2),
        ({**WIDE, "quant.weights": "int2-rms-ste"}, "exact", 1e-2),
        ({"quant.weights": "int2-rms-ste"}, "q4_0", 1e-2),
        ({}, "f32", 1e-5),
        ({"quant.weights": "int4-rms-ste", ("quant", "overrides", "blocks.0.o", "weights"): "bf16"}, "exact", 1e-2),
    ],
)
def test_transformers_reads_the_gguf_as_the_same_model(trained, tmp_path, changes, dtype, tolerance):
    """Its reader is not ours: shapes, names, and the order of the rows of q and k are as llama.cpp has them."""
    pytest.importorskip("accelerate")
    loaded, found, tokens = trained({"model.n_head": 4, **changes})
    plain = dense_model(loaded.model, found)
    gguf.write(tmp_path, plain, loaded.config, found, dtype, None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.FILE)
    torch.testing.assert_close(tiny.logits(model, tokens), tiny.logits(plain, tokens), rtol=0, atol=tolerance)
    torch.testing.assert_close(tiny.logits(gguf.read(tmp_path, plain), tokens), tiny.logits(model, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", check.GGUF_TYPES)
def test_blocks_read_by_the_package_are_the_whole_numbers_times_the_scale(kind):
    """Every number a block can hold, at every place, with scales from the smallest to the largest."""
    form = check.GGUF_TYPES[kind]
    g = torch.Generator().manual_seed(0)
    k = torch.randint(-form.top, form.top + 1, (7, 2 * form.block), generator=g)
    if form.odd:
        k = torch.where(k % 2 == 0, k - 1, k)
    k[0, : 2 * form.top + 1] = torch.arange(-form.top, form.top + 1)[: 2 * form.block] | form.odd
    d = torch.tensor([1.0, 2e-4, 0.0123, 3.3, 700.0, 0.1, 0.0])[:, None]
    data = gguf.blocks(k.to(torch.int8), d, kind)
    assert data.shape == (7, 2 * form.size)
    if kind == "q1_0":
        bits = np.unpackbits(data[0, 2 : form.size], bitorder="little")
        assert (2 * bits.astype(int) - 1).tolist() == k[0, : form.block].tolist()
        return
    found = torch.from_numpy(gguf_package.quants.dequantize(data, gguf_package.GGMLQuantizationType[kind.upper()]))
    if kind in gguf.LINES:  # the smallest value is rounded by itself: by half a unit of fp16 of top·d
        assert ((found - k * d).abs() <= 2 * HALF * form.top * d).all()
        assert (found - k * d)[k.abs() <= 1].abs().max() <= HALF * form.top * 700
    else:
        torch.testing.assert_close(found, k * d.half().float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found, k * d, rtol=HALF, atol=0)


def test_scales_beyond_fp16_are_refused(trained, tmp_path):
    k = torch.ones(1, 32, dtype=torch.int8)
    for d in (1e-9, 1e6):
        with pytest.raises(UsageError, match="fp16"):
            gguf.blocks(k, torch.full((1, 1), d), "q4_0")
    assert len(gguf.blocks(k, torch.zeros(1, 1), "q4_0")[0]) == 18


# --- the vocabulary of a GGUF file ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_text(tmp_path_factory):
    """tokenizer → (the folder of a GGUF file, the tokenizer) of a model of random weights."""
    root = tmp_path_factory.mktemp("text")
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(tiny.__file__).parent.glob("test_e*.py")))

    def get(name):
        folder = root / name.replace(":", "-")
        kind, _, size = name.partition(":")
        own = tokenizers.ByteTokenizer()
        if kind != "byte":
            own = tokenizers.from_table(name, tokenizers.train_bpe([text], int(size), family=kind.partition(".")[2] or "own"))
        if not folder.exists():
            folder.mkdir()
            c = tiny.config(model__vocab_size=own.vocab_size)
            model = build_model(c.model, c.quant, 0)
            gguf.write(folder, model, c, weights(model, c), "f32", own)
        return folder, own

    return get


def test_the_byte_vocabulary_is_that_of_the_tokenizer(on_text):
    folder, _ = on_text("byte")
    fields = gguf_package.GGUFReader(folder / gguf.FILE).fields
    listed = fields["tokenizer.ggml.tokens"].contents()
    assert len(listed) == len(set(listed)) == 256
    assert [listed[b] for b in b"Az!"] == ["A", "z", "!"]
    assert listed[ord(" ")] == "Ġ"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.merges"].contents() == []


TEXTS = ("def f(x):\n    return [x, 12, 'é']  # it's\n\n", "Ā Latvian: Āžēī, 日本\t\r\n\n  end", "1 12 123", "")


@pytest.mark.parametrize("name", ["byte", "bpe:300", "bpe.llama3:600"])
def test_transformers_reads_the_vocabulary_of_the_gguf(on_text, name):
    """Its reader makes a tokenizer of the vocabulary, the merges and the name of the words; id 0 ends a text."""
    folder, own = on_text(name)
    made = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.FILE)
    for text in TEXTS:
        assert made(text).input_ids == own.encode(text).tolist()
        assert made.decode(own.encode(text)) == text
    assert made.eos_token_id == own.end == 0


def test_numbers_of_more_than_three_digits_are_refused_or_cut_alike(on_text):
    """Words of `bpe:V` end numbers after three digits, which no words of llama.cpp do together with the space before them."""
    with pytest.raises(UsageError, match=r"bpe:600 ends numbers after three digits.*train with bpe\.llama3:V"):
        on_text("bpe:600")
    folder, own = on_text("bpe.llama3:600")
    made = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.FILE)
    assert made("x = 100200300, 12345").input_ids == own.encode("x = 100200300, 12345").tolist()
    assert own.encode("100200300").tolist() == [i for part in ("100", "200", "300") for i in own.encode(part)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts text in no way that llama.cpp is known to"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text"),
        ({"model": {"ignore_merges": False}}, "merges tokens as llama.cpp does not"),
    ],
)
def test_tables_that_llama_cpp_would_read_otherwise_are_refused(on_text, change, sentence):
    _, own = on_text("bpe.llama3:600")
    table = json.loads(own.table)
    for key, value in change.items():
        table[key] = table[key] | value if key == "model" else value
    other = tokenizers.TableTokenizer("hf:other", json.dumps(table).encode(), own.end)
    with pytest.raises(UsageError, match=f"hf:other {sentence}"):
        tokenizer.vocabulary(other, other.vocab_size)


def test_ids_without_a_token_are_unused(on_text):
    _, own = on_text("bpe.llama3:600")
    words = tokenizer.vocabulary(own, own.vocab_size + 2)
    assert words.tokens[-2:] == [f"[PAD{own.vocab_size}]", f"[PAD{own.vocab_size + 1}]"]
    assert words.unused == {own.vocab_size, own.vocab_size + 1}
    assert (words.tokens[words.end], words.special) == (tokenizers.END, {words.end})
    assert tokenizer.vocabulary(None, 16) is None


def test_hf_names_are_those_of_a_llama(trained, tmp_path):
    loaded, found, _ = trained({})
    plain = dense_model(loaded.model, found)
    hf.write_dense(tmp_path, plain, loaded.config, "fp32", {})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
