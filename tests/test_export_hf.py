"""`hf` and `hf-dense`: the logits of the training forward, packed; by questctl and by the bundled file alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from questctl.config import QuantConfig
from questctl.data.sampler import validation_windows
from questctl.data.tokenizers import from_table, train_bpe
from questctl.data.tokens import tokenizer_of
from questctl.posttraining.quantize import quantize
from questctl.store import RunStore
from questctl.training.loading import load
from questctl.training.loop import train

pytest.importorskip("transformers")

from questctl.export import hf, tokenizer
from questctl.export.weights import Codes, dense_model, recover, weights

ROOT = Path(__file__).resolve().parent.parent
BITS = (1, 2, 3, 4)
SCHEMES = {
    **{f"rotated-{b}": {"quant.method": "quest", "quant.bits": b, "quant.block": 32} for b in BITS},
    **{f"plain-{b}": {"quant.method": "ste", "quant.bits": b} for b in BITS},
    **{f"learned-{b}": {"quant.method": "lsq", "quant.bits": b} for b in (2, 4)},
    "sparse": {"quant.method": "quest-sparse", "quant.bits": 4, "quant.block": 32},
    "offset": {"quant.method": "adabin"},
    "tensor": {"quant.method": "bitnet"},
    "groups": {"quant.method": "nvfp4"},
    "codebook": {"quant.weights": "lloyd3-h8-rms-trust", "quant.activations": "fp8-h8-absmax-ste"},
    "bytes": {"quant.weights": "int6-h8.s-mse-ste", "quant.activations": "int8-h8.s-rms-ste"},
    "pairs": {"quant.weights": "olive4-mse-ste", "quant.activations": "int4.sr-rms-ste"},
    "odd": {"quant.weights": "int3-rms-trust", "quant.activations": "int4-rms-trust", "model.d_ff": 36},
    "mixed": {
        **tiny.QUEST,
        ("quant", "overrides", "blocks.*.down", "weights"): "bf16",
        ("quant", "overrides", "blocks.0.q", "weights"): "int2-h32-rms-trust",
        ("quant", "overrides", "blocks.1.v", "weights"): "bf16",
        ("quant", "overrides", "blocks.1.v", "activations"): "bf16",
    },
}
WEIGHT_ONLY = {
    **{f"rotated-{b}": {"quant.method": "quest", "quant.bits": b, "quant.block": 32, "quant.weight_only": True} for b in BITS},
    "late": {"quant.method": "quest", "quant.bits": 4, "quant.block": 32, "quant.weight_only": True, "quant.start": 0.5},
    **{f"plain-{b}": {"quant.weights": f"int{b}-rms-ste"} for b in BITS},
}


FEW = ("rotated-4", "learned-4", "sparse", "groups", "codebook")


@pytest.mark.parametrize("scheme", slow_but(SCHEMES, FEW))
def test_hf_computes_what_the_training_computed(trained, tmp_path, scheme):
    loaded, found, tokens = trained(SCHEMES[scheme])
    model, config = loaded.model, loaded.config
    hf.write_hf(tmp_path, model, config, found, "fp32", {})
    torch.testing.assert_close(tiny.logits(hf.load(tmp_path), tokens), tiny.logits(model, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", slow_but(WEIGHT_ONLY, ("rotated-3", "late", "plain-1")))
def test_dense_weights_are_exact_where_inputs_are_not_quantized(trained, tmp_path, scheme):
    loaded, found, tokens = trained(WEIGHT_ONLY[scheme])
    model, config = loaded.model, loaded.config
    for folder, write in (
        ("a", lambda f: hf.write_hf(f, model, config, found, "fp32", {})),
        ("b", lambda f: hf.write_dense(f, dense_model(model, found), config, "fp32", {})),
    ):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder)
        export = hf.load(tmp_path / folder)
        torch.testing.assert_close(tiny.logits(export, tokens), tiny.logits(model, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["rotated-2", "plain-4", "mixed"])
def test_dense_weights_stand_in_the_basis_of_the_inputs(trained, tmp_path, scheme):
    """What the training computes with its input quantizers taken out, rotation and all."""
    loaded, found, tokens = trained(SCHEMES[scheme])
    model, config = loaded.model, loaded.config
    hf.write_dense(tmp_path, dense_model(model, found), config, "fp32", {})
    dense = tiny.logits(hf.load(tmp_path), tokens)
    for module in model.modules():
        if hasattr(module, "input_quantizer"):
            basis = module.input_quantizer.spec.basis
            module.quantize_input = basis.rotate if basis else lambda x: x
    try:
        without = tiny.logits(model, tokens)
    finally:
        for module in model.modules():
            module.__dict__.pop("quantize_input", None)
    torch.testing.assert_close(dense, without, rtol=0, atol=1e-5)
    assert (dense - tiny.logits(model, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("scheme", "bits"),
    slow_but(
        [("rotated-1", 1), ("plain-2", 2), ("plain-3", 3), ("rotated-4", 4), ("sparse", 5), ("codebook", 3), ("bytes", 8)],
        ("rotated-1", "plain-2", "sparse"),
    ),
)
def test_codes_take_the_bits_of_their_levels(trained, tmp_path, scheme, bits):
    loaded, found, _ = trained(SCHEMES[scheme])
    model, config = loaded.model, loaded.config
    hf.write_hf(tmp_path, model, config, found, "fp32", {})
    tensors = load_file(tmp_path / "model.safetensors")
    stored = sum(t.numel() for name, t in tensors.items() if name.endswith((".codes", ".keep")))
    assert stored * 8 == bits * sum(w.dense.numel() for w in found.values())
    steps = [t for name, t in tensors.items() if name.endswith(".steps")]
    assert {t.dtype for t in steps} == {torch.float32}
    assert not any(name.endswith("_proj.weight") for name in tensors)


AFTER_TRAINING = [
    ("int4-h32-rms-ste", "bf16", "gptq"),
    ("int2-rms-ste", "bf16", "rtn"),
    ("sint3-rms.g16-2of4-ste", "bf16", "gptq"),
    ("int4-rms-2of4-ste", "bf16", "rtn"),
    ("int3-h32-rms-ste", "int8-h32-rms-ste", "gptq"),
    ("fp4-absmax.g16-ste", "bf16", "rtn"),
    ("int1-meanstd-ste", "bf16", "gptq"),
]


@pytest.mark.parametrize(
    ("weights_word", "inputs", "method"),
    slow_but(AFTER_TRAINING, ("sint3-rms.g16-2of4-ste", "int1-meanstd-ste")),
)
def test_runs_that_were_quantized_after_training_are_packed_too(tmp_path, weights_word, inputs, method):
    source = tiny.config(train__steps=6)
    train(source, runs=tmp_path / "runs")
    store = RunStore(tmp_path / "runs")
    result = quantize(
        store.run(source.run_id), QuantConfig(weights=weights_word, activations=inputs), method=method, calibration_tokens=256
    )
    run = store.run(result.run)
    loaded = load(run)
    found = weights(loaded.model, run.config())
    assert {isinstance(w.stored, Codes) for w in found.values()} == {"meanstd" not in weights_word}
    out = tmp_path / "out"
    out.mkdir()
    hf.write_hf(out, loaded.model, run.config(), found, "fp32", {})
    tokens = torch.from_numpy(validation_windows(loaded.data.val, 16, 512))[:, :-1]
    a, b = tiny.logits(hf.load(out), tokens), tiny.logits(loaded.model, tokens)
    if inputs == "bf16":
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    else:  # an input on the edge between two levels may fall to the other side
        assert ((a - b).abs().amax(-1) > 1e-5).float().mean() < 0.05


def test_levels_are_found_again_or_not_made_up():
    from questctl.quant.quantizer import Quantizer
    from questctl.quant.spec import QuantSpec

    g = torch.Generator().manual_seed(0)
    z = torch.randn(7, 64, generator=g)
    z[3] = 0.0
    for word in (
        "int4-rms-ste",
        "int1-rms-ste",
        "ternary-absmean.t-ste",
        "sint5-absmax.g16-ste",
        "lloyd3-mse-ste",
        "int3-rms-2of4pairs-ste",
    ):
        spec = QuantSpec.parse(word)
        y = Quantizer(spec)(z)
        found = recover(y, spec)
        assert found is not None
        torch.testing.assert_close(found.values(), y, rtol=1e-6, atol=1e-9)
        assert recover(z, spec) is None


def test_bf16_halves_what_is_not_quantized_and_keeps_steps(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded, found, tokens = trained(SCHEMES["rotated-4"])
    model, config = loaded.model, loaded.config
    hf.write_hf(tmp_path, model, config, found, "bf16", {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = {name.rpartition(".")[2]: t.dtype for name, t in loaded.state_dict().items()}
    assert kinds == {"codes": torch.uint8, "steps": torch.float32, "weight": torch.bfloat16}
    assert (tiny.logits(loaded, tokens).argmax(-1) == tiny.logits(model, tokens).argmax(-1)).float().mean() > 0.9


def test_generate_with_and_without_a_cache_is_what_the_model_says(trained, tmp_path):
    loaded, found, tokens = trained(SCHEMES["rotated-3"])
    model, config = loaded.model, loaded.config
    hf.write_hf(tmp_path, model, config, found, "fp32", {})
    export = hf.load(tmp_path)
    expected = tokens[:1, :8]
    for _ in range(6):
        expected = torch.cat([expected, tiny.logits(model, expected)[:, -1:].argmax(-1)], 1)
    for cache in (True, False):
        got = export.generate(tokens[:1, :8], max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        assert torch.equal(got, expected)


def test_the_network_without_its_head_is_what_other_runtimes_build(trained, tmp_path):
    """vLLM makes an `AutoModel` and puts its attention in; the layers have to be replaced in that class."""
    from transformers import AutoConfig, AutoModel

    loaded, found, tokens = trained(SCHEMES["mixed"])
    hf.write_hf(tmp_path, loaded.model, loaded.config, found, "fp32", {})
    whole, part = hf.load(tmp_path), AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = tiny.logits(whole, tokens)
        torch.testing.assert_close(whole.lm_head(part(tokens).last_hidden_state), expected, rtol=0, atol=0)
    assert type(part)._supports_attention_backend
    assert type(part).__name__ in json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"]
    real = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    packed = {name for name, _ in real.named_buffers() if name.endswith((".codes", ".steps"))}
    assert {name for name in whole.state_dict() if name.endswith((".codes", ".steps"))} == {f"model.{name}" for name in packed}
    torch.testing.assert_close(real.rotary_emb.cos, part.rotary_emb.cos, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", slow_but(["rotated-4", "codebook"], []))
def test_the_parts_compile_as_one_graph_for_every_length(trained, tmp_path, scheme):
    """A table sized by the largest position broke it, and an operation that writes into a view."""
    loaded, found, _ = trained(SCHEMES[scheme])
    hf.write_hf(tmp_path, loaded.model, loaded.config, found, "fp32", {})
    model = hf.load(tmp_path).model
    rotary, layer = model.rotary_emb, model.layers[0].self_attn.q_proj
    assert len(rotary.cos) == 4096  # longer than the sequences of the training
    x, where = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)), torch.arange(5)[None]
    turned = torch.compile(lambda at: rotary(x, at), fullgraph=True, backend="eager", dynamic=True)
    product = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    with torch.inference_mode():
        for n in (5, 3):
            torch.testing.assert_close(turned(where[:, :n] + 100), rotary(x, where[:, :n] + 100), rtol=0, atol=0)
            torch.testing.assert_close(product(x[:, :n]), layer(x[:, :n]), rtol=0, atol=0)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_the_tokenizer_gives_bytes(text):
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer.byte_tokenizer())
    ids = made.encode(text).ids
    assert ids == list(text.encode())
    assert made.decode(ids, skip_special_tokens=False) == text


def test_a_tokenizer_with_a_table_brings_it(tmp_path):
    from transformers import AutoTokenizer

    text = "def f(x):\n    return [x, 12, 'é']  # words, words\n\n"
    own = from_table("bpe:300", train_bpe([text * 20], 300))
    assert tokenizer.write(tmp_path, own, 64)["eos_token_id"] == own.end
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert made(text).input_ids == own.encode(text).tolist()
    assert made.eos_token_id == own.end
    assert tokenizer.write(tmp_path, None, 64) == {}


# --- the bundled file, where there is no questctl ----------------------------------------------------------------------

WITHOUT_QUESTCTL = """
import sys
sys.modules["questctl"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("def f(é):\\n\\x00", return_tensors="pt")
assert ids.input_ids[0].tolist() == list("def f(é):\\n\\x00".encode()), ids
assert tokenizer.eos_token_id == 0
out = model.generate(**ids, max_new_tokens=5, do_sample=False)
assert out.shape[1] <= ids.input_ids.shape[1] + 5
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[3])
"""


@pytest.mark.slow
def test_the_bundled_file_alone_from_the_repository_root(tmp_path):
    """There lie folders called kernels and analysis on the path, the first of which transformers looks for as a package."""
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n\n" * 400)
    c = tiny.config(SCHEMES["rotated-4"], data__source=f"file:{tmp_path / 'text.txt'}", train__steps=3)
    train(c, runs=tmp_path / "runs")
    loaded = load(RunStore(tmp_path / "runs").run(c.run_id))
    out = tmp_path / "out"
    out.mkdir()
    special = tokenizer.write(out, tokenizer_of(loaded.data), 16)
    hf.write_hf(out, loaded.model, c, weights(loaded.model, c), "fp32", special)
    tokens = torch.from_numpy(validation_windows(loaded.data.val, 16, 256))[:, :-1]
    torch.save(tokens, tmp_path / "tokens.pt")
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    files = [str(out), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_QUESTCTL, *files], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), tiny.logits(loaded.model, tokens), rtol=0, atol=1e-5)
    assert json.loads((out / "config.json").read_text())["model_type"] == "quest_llama"


# --- memory -----------------------------------------------------------------------------------------------------------

LOAD = """
import sys
from questctl.export import hf

def mib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

hf.load(sys.argv[1])  # what the packages load lazily
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = mib("VmRSS")
model = hf.load(sys.argv[2])
sum(int(t.view(-1)[::512].sum()) for t in model.state_dict().values())  # every page of what is mapped
print(mib("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_four_bits_take_at_most_0_30_of_bf16_and_load_in_what_they_take(tmp_path):
    """103M parameters, 99.5 % of them in the linear layers (embedding and head stay in fp32: in tiny models they dominate)."""
    from questctl.models.llama import build_model

    for name, d, layers, d_ff in (("small", 128, 1, 128), ("large", 1024, 8, 2816)):
        c = tiny.config(
            {
                "model.d_model": d,
                "model.n_layer": layers,
                "model.d_ff": d_ff,
                "model.vocab_size": 256,
                "quant.method": "quest",
                "quant.bits": 4,
                "quant.block": 128,
            }
        )
        model = build_model(c.model, c.quant, 0)
        (tmp_path / name).mkdir()
        hf.write_hf(tmp_path / name, model, c, weights(model, c), "fp32", {})
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size <= 0.30 * 2 * sum(p.numel() for p in model.parameters())
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")],
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) * 2**20 <= 1.2 * size, (done.stdout, size)
