"""Models that begin with a checkpoint: the logits and gradients of transformers, the same bits back, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from command_line import run_cli
from helpers import files_in
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import questctl
from questctl.config import ModelConfig, QuantConfig, RunConfig
from questctl.errors import Preempted, QuestError, UsageError
from questctl.models.llama import Cache, count_flops, count_parameters
from questctl.models.pretrained import halves, initial_model, interleaved
from questctl.posttraining.preflight import default_probe_quants
from questctl.pretrained import open_source
from questctl.quant.methods import METHODS, method_specs
from questctl.store import RunStore
from questctl.sweep.calibrate import Calibration
from questctl.training.loading import load_model
from questctl.training.loop import train

transformers = pytest.importorskip("transformers")
from transformers.utils import logging as quiet  # noqa: E402

from questctl.export import hf  # noqa: E402

quiet.disable_progress_bar()
quiet.set_verbosity_error()
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
ROPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


def checkpoint(folder: Path, family: str, *, dtype=torch.float32, shard="10GB", rope="default", **values):
    """A model of transformers with large random weights, written to `folder`; returns it in fp32."""
    shape = {"vocab_size": 51, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    if family == "Mistral":
        shape["sliding_window"] = None
    rope_parameters = {"rope_type": rope, "rope_theta": 500.0, **ROPES[rope]}
    config = getattr(transformers, f"{family}Config")(**shape | {"rope_parameters": rope_parameters} | values)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.ndim == 1 else p
    model.save_pretrained(folder, max_shard_size=shard)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()  # `.float()` would keep rotary tables in bf16


def loaded(folder: Path, quant: QuantConfig | None = None):
    source = open_source(str(folder))
    config = ModelConfig(**source.model, init=str(folder), init_sha256=source.sha256)
    return initial_model(config, quant or QuantConfig(), 0)


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


@settings(max_examples=20, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_models_have_the_logits_and_gradients_of_transformers(data, tmp_path):
    family = data.draw(st.sampled_from(FAMILIES))
    groups, kv = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    width = data.draw(st.sampled_from([6, 8, 10]))
    apart = family == "Qwen3" or data.draw(st.booleans())
    values = {
        "num_attention_heads": groups * kv,
        "num_key_value_heads": kv,
        "hidden_size": data.draw(st.sampled_from([12, 20])) * groups * kv if apart else width * groups * kv,
        "vocab_size": data.draw(st.sampled_from([17, 64, 101])),
        "tie_word_embeddings": data.draw(st.booleans()),
        "rms_norm_eps": data.draw(st.sampled_from([1e-6, 1e-3])),
    }
    if apart:
        values["head_dim"] = width
    if family in ("Llama", "Qwen3"):
        values["attention_bias"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        values |= {"Llama": {}, "Mistral": {"sliding_window": 4}}.get(
            family, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
        )
    folder = tmp_path / "source"
    shutil.rmtree(tmp_path, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shard, rope = data.draw(st.sampled_from(["10KB", "10GB"])), data.draw(st.sampled_from(sorted(ROPES)))
    theirs = checkpoint(folder, family, dtype=dtype, shard=shard, rope=rope, **values)
    ours = loaded(folder)
    assert count_parameters(ours).total == sum(p.numel() for p in theirs.parameters())
    tokens = torch.randint(0, values["vocab_size"], (2, 9))

    expected = theirs(tokens).logits
    scale = float(expected.detach().abs().max().clamp(min=1))
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5 * scale)
    cache = Cache(ours.config, 9, "cpu")
    with torch.no_grad():
        parts = [ours(tokens[:1, :6], cache=cache), *(ours(tokens[:1, i : i + 1], cache=cache) for i in range(6, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), expected[:1], rtol=0, atol=1e-5 * scale)

    ours(tokens[:, :-1], tokens[:, 1:]).backward()
    theirs(tokens, labels=tokens).loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        other = gradients[hf.hf_name(name)].grad
        torch.testing.assert_close(p.grad, other, rtol=0, atol=1e-4 * max(1.0, float(other.abs().max())))

    back = tmp_path / "back"
    back.mkdir()
    hf.write_dense(back, ours, tiny.config(), "fp32", {})
    written = load_file(back / "model.safetensors")
    stored = {name: t.float() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], t) for name, t in stored.items())
    model = hf.load(back)
    assert type(model) is type(theirs)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-6 * scale)


def test_counts_follow_from_the_config_alone(tmp_path):
    checkpoint(tmp_path, "Qwen3", head_dim=10, attention_bias=True, tie_word_embeddings=True)
    model = loaded(tmp_path)
    c, n = model.config, count_parameters(model)
    assert n.params_non_embedding == c.params_non_embedding
    assert (n.head, n.total) == (0, c.params_non_embedding + c.params_embedding(51))
    linear = 2 * (24 * (40 + 20 + 20 + 40) + 3 * 24 * 40)
    assert count_flops(model, 7).forward == 2 * (linear + 51 * 24) + 4 * 7 * 40 * 2


EIGHT_BITS = [
    (name, weight_only)
    for name, m in METHODS.items()
    for weight_only in (False, True)
    if "8" in m.bits and name not in ("bf16", "quest-sparse")  # half of its weights are pruned
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose layers every rotation fits, and its logits."""
    folder = tmp_path_factory.mktemp("wide")
    model = checkpoint(folder, "Qwen2", hidden_size=64, intermediate_size=64, initializer_range=0.1)
    tokens = torch.randint(0, 51, (2, 16), generator=torch.Generator().manual_seed(0))
    return folder, tokens, tiny.logits(model, tokens)


@pytest.mark.parametrize(("method", "weight_only"), EIGHT_BITS)
def test_every_method_at_eight_bits_keeps_the_logits(wide, method, weight_only):
    folder, tokens, expected = wide
    weights, activations = method_specs(method, 8, block=32, weight_only=weight_only)
    model = loaded(folder, QuantConfig(weights=weights, activations=activations))
    from questctl.quant.linear import calibrate_inputs

    calibrate_inputs(model, tokens)
    clips = activations != "bf16" and "-h32" not in activations  # without a rotation, the largest inputs of `down`
    assert relative(tiny.logits(model, tokens), expected) < (0.25 if clips else 0.1)


def test_rotated_weights_of_a_checkpoint_are_rotated_back(wide):
    """Rotated weights and unrotated inputs are a parametrisation for weights that are drawn, and nonsense for these."""
    folder, tokens, expected = wide
    quant = QuantConfig(weights="int8-h32-rms-trust")
    model = loaded(folder, quant)
    assert relative(tiny.logits(model, tokens), expected) < 0.05
    from questctl.quant.packed import freeze

    packed = tiny.logits(freeze(loaded(folder, quant)), tokens)
    torch.testing.assert_close(packed, tiny.logits(model, tokens), rtol=0, atol=1e-5)
    for block in model.blocks:
        block.q.rotates_back = False
    assert relative(tiny.logits(model, tokens), expected) > 0.3


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A folder of transformers with a byte tokenizer, and a text."""
    folder = tmp_path / "source"
    checkpoint(folder, "Qwen2", vocab_size=256, hidden_size=32, intermediate_size=64, tie_word_embeddings=True)
    from questctl.export.tokenizer import byte_tokenizer

    (folder / "tokenizer.json").write_text(byte_tokenizer())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "\\u0000"}')
    return folder


def config(source: Path, **changes):
    keys = {k: v for k, v in tiny.BASE.items() if not k.startswith("model.")}
    keys |= {"data.source": "synthetic:markov?vocab=16&tokens=20000", "model.init": str(source), **changes}
    from questctl.config import Layer, resolve

    return resolve([Layer("test", {tuple(k.replace("__", ".").split(".")): v for k, v in keys.items()})]).config


def test_a_stopped_run_continues_to_the_same_bits(source, tmp_path):
    quest = {"quant.method": "quest", "quant.bits": 4}
    c = config(source, **quest)
    whole = train(c, runs=tmp_path / "whole")
    steps = iter(range(100))
    with pytest.raises(Preempted):
        train(c, runs=tmp_path / "killed", stop=lambda: next(steps) == 7)
    again = train(c, runs=tmp_path / "killed")
    assert (again.loss, again.attempts) == (whole.loss, 2)
    assert tiny.outcome(tmp_path / "killed" / c.run_id) == tiny.outcome(tmp_path / "whole" / c.run_id)


def test_a_run_in_full_precision_that_began_with_a_checkpoint_can_be_quantized(source, tmp_path):
    c = config(source, train__steps=1)
    train(c, runs=tmp_path)
    done = questctl.quantize_run(tmp_path / c.run_id, "int8-absmax-ste", activations="bf16", method="rtn")
    assert done.result.loss == pytest.approx(done.source.loss, abs=0.01)
    assert len(default_probe_quants(c)) == 4


def test_the_way_through_an_export_changes_no_bit(source, tmp_path):
    (source / "chat_template.jinja").write_text("{{ messages }}")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(400)))
    c = config(source, data__source=f"file:{text}")
    train(c, runs=tmp_path)
    run_cli("export", c.run_id, "--runs", tmp_path, "--format", "hf-dense", "--out", tmp_path / "out")
    there = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (there["architectures"], there["tie_word_embeddings"]) == (["Qwen2ForCausalLM"], True)
    assert there["max_position_embeddings"] == 32768
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    from_run, from_export = (
        config(path, train__steps=4, data__source=f"file:{text}") for path in (tmp_path / c.run_id, tmp_path / "out")
    )
    assert from_run.run_id != from_export.run_id
    models = [initial_model(c.model, c.quant, 0).state_dict() for c in (from_run, from_export)]
    assert all(torch.equal(t, models[1][name]) for name, t in models[0].items())
    losses = {train(c, runs=tmp_path).loss for c in (from_run, from_export)}
    assert len(losses) == 1


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_gguf_file_holds_the_same_weights(family, tmp_path):
    pytest.importorskip("gguf")
    checkpoint(tmp_path / "source", family, vocab_size=256, hidden_size=32, intermediate_size=64)
    c = config(tmp_path / "source", train__steps=1)
    train(c, runs=tmp_path)
    run_cli("export", c.run_id, "--runs", tmp_path, "--format", "gguf", "--dtype", "f32", "--out", tmp_path / "out")
    first, then = load_model(RunStore(tmp_path).run(c.run_id)), loaded(tmp_path / "out" / "model.gguf")
    assert then.config.model_dump(exclude={"init", "init_sha256"}) == first.config.model_dump(exclude={"init", "init_sha256"})
    assert all(torch.equal(t, first.state_dict()[name]) for name, t in then.state_dict().items())


def test_a_run_of_a_rotated_parametrisation_is_taken_over_as_what_it_computes(tmp_path):
    c = tiny.config({"quant.weights": "int8-h32-rms-trust", "train.steps": 3})
    train(c, runs=tmp_path)
    run = RunStore(tmp_path).run(c.run_id)
    tokens = torch.randint(0, 16, (2, 8))
    first, then = tiny.logits(load_model(run), tokens), tiny.logits(loaded(run.path), tokens)
    assert relative(then, first) < 0.05


def test_the_run_id_holds_the_weights_and_not_their_place(source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(source, elsewhere)
    a, b = config(source), config(elsewhere)
    assert a.run_id == b.run_id
    assert "+init." in a.scheme
    weights = load_file(elsewhere / "model.safetensors")
    save_file({name: t + 1 for name, t in weights.items()}, elsewhere / "model.safetensors")
    assert config(elsewhere).run_id != a.run_id
    with pytest.raises(UsageError, match="has other weights"):
        train(b, runs=tmp_path / "runs")
    shutil.rmtree(elsewhere)
    with pytest.raises(ValueError, match=r"is not here.*began with it"):
        train(b, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def edited(source: Path, **values) -> None:
    stored = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stored | values))


def _drop_weights(source):
    (source / "model.safetensors").unlink()


def _drop_shard(source):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _other_dtype(source):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors")


def _cut_off(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _fewer_ids(source):
    edited(source, vocab_size=40)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:40].contiguous()
    save_file(tensors, source / "model.safetensors")


BAD = {
    "no weights": (_drop_weights, ["has no weights", "model.safetensors"]),
    "missing shard": (_drop_shard, ["model-1.safetensors", "is missing"]),
    "dtype": (_other_dtype, ["model.norm.weight", "F8_E4M3", "BF16"]),
    "cut off": (_cut_off, ["is damaged"]),
    "architecture": (lambda s: edited(s, architectures=["GemmaForCausalLM"]), ["GemmaForCausalLM", "Qwen3ForCausalLM"]),
    "field": (lambda s: edited(s, hidden_act="gelu"), ["Qwen2ForCausalLM", "hidden_act", "gelu", "silu"]),
    "rope": (lambda s: edited(s, rope_parameters={"rope_type": "dynamic"}), ["rope_type", "dynamic", "llama3"]),
    "shape": (lambda s: edited(s, intermediate_size=65), ["blocks.0.down.weight", "32×64", "32×65"]),
    "missing layer": (lambda s: edited(s, num_hidden_layers=3), ["blocks.2"]),
    "ids": (_fewer_ids, ["model.vocab_size", "40", "256"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_one_sentence_and_nothing_is_written(source, tmp_path, name):
    spoil, words = BAD[name]
    spoil(source)
    text = tmp_path / "text.txt"
    text.write_text("a line of text that is repeated\n" * 200)
    runs = tmp_path / "runs"
    result = run_cli("train", "--init", source, "--data", f"file:{text}", "--set=data.seq_len=16", "--runs", runs, code=2)
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stderr.count("error:") == 1
    assert not runs.exists() or files_in(runs) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.n_layer": 7}, ["model.n_layer", "7", "2"]),
        ({"model.init_sha256": "0" * 64}, ["has other weights"]),
        ({"model.init": "nowhere"}, ["nowhere", "hf:OWNER/NAME"]),
        ({"model.init": "", "data.tokenizer": "init"}, ["data.tokenizer", "model.init"]),
    ],
)
def test_keys_that_contradict_the_checkpoint(source, changes, words):
    with pytest.raises(ValueError, match=r".") as e:
        config(source, **changes)
    assert all(word in str(e.value) for word in words), str(e.value)


def test_rows_of_heads_are_reordered_there_and_back():
    x = torch.arange(24.0).view(12, 2)
    assert torch.equal(halves(interleaved(x, 3), 3), x)
    assert interleaved(x, 3)[:4, 0].tolist() == [0, 4, 2, 6]


def test_a_checkpoint_is_taken_as_it_is(source, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text\n" for i in range(400)))
    data = {"data.source": f"file:{text}", "train.steps": 0}
    c = config(source, **data)
    done = train(c, runs=tmp_path / "runs")
    assert (done.tokens, done.flops, done.steps, done.tokens_per_s) == (0, 0, 0, 0)
    model, weights = loaded(source), load_model(RunStore(tmp_path / "runs").run(c.run_id)).state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    run = tmp_path / "runs" / c.run_id
    assert questctl.evaluate_run(run)["loss"] == done.loss
    assert train(c, runs=tmp_path / "runs") == done
    quantized = questctl.quantize_run(run, "int8-absmax-ste", method="rtn").result
    rounded = train(
        config(source, **data, **{"quant.weights": "int8-absmax-ste", "quant.activations": "int8-absmax-ste"}), runs=run.parent
    )
    assert rounded.loss == pytest.approx(quantized.loss, abs=1e-4)
    learned = train(config(source, **data, **{"quant.method": "lsq", "quant.bits": 8}), runs=run.parent)
    assert learned.loss == pytest.approx(done.loss, abs=0.2)
    monkeypatch.setattr("questctl.sweep.estimate.calibrate", lambda *_, **__: Calibration())
    estimate = questctl.estimate_run(c, run.parent).to_json()
    assert (estimate["flops"], estimate["passes"]) == (0, 0)
    with pytest.raises(QuestError):
        questctl.fit_sources(run.parent)
    with pytest.raises(UsageError, match=r"train\.steps: 0 is not a positive whole number"):
        tiny.config(train__steps=0)
    with pytest.raises(UsageError, match=r"train\.steps: 0 takes a checkpoint as it is.*--init"):
        RunConfig.from_json({**tiny.config().to_json(), "train": {"steps": 0}})
