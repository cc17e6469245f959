"""Embedding, head and cache in low bits: rows have one value wherever they are read, and gradients pass as estimators say."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import tiny
import torch
from torch import nn

from questctl.config import Layer, ModelConfig, QuantConfig, RunConfig, resolve
from questctl.errors import UsageError
from questctl.models.llama import Cache, Llama, TiedHead, build_model
from questctl.quant.by_row import Kept, QuantEmbedding
from questctl.quant.codes import RowCodes
from questctl.quant.layer_specs import check_layers
from questctl.quant.methods import split_rows
from questctl.quant.packed import PackedEmbedding, PackedLinear, freeze, packed_size
from questctl.quant.quantizer import Quantizer
from questctl.quant.spec import QuantSpec
from questctl.store import RunStore
from questctl.training.health import operand_shares
from questctl.training.loading import load
from questctl.training.loop import train

SHAPE = ModelConfig(n_layer=2, d_model=32, n_head=2, d_ff=64, vocab_size=50)
SPECS = ["int4-h16-rms-trust", "int4-rms-ste", "fp4-e8m0.g32-ste", "int1-meanstd-ste", "fp8-absmax-clip1", "lloyd3-rms.g16-ste"]
KV = ["int4-h16-rms-trust", "int8-absmax-ste", "sint3-rms.g16-clip1", "int2-h4.s-rms-trust", "int1-meanstd-ste", "fp4-rms-ste"]
ENDS = {"quant.embedding": "int4-h32-rms-trust", "quant.head": "int4-h32-rms-trust", "quant.kv": "int4-h16-rms-trust"}


def model(tied: bool = False, **quant: str) -> Llama:
    return build_model(SHAPE.model_copy(update={"tied": tied}), QuantConfig(**quant), 0)


def rows_of(x: torch.Tensor, spec: str) -> torch.Tensor:
    """Each row of x (n, K) rounded alone, by the levels themselves."""
    parsed = QuantSpec.parse(spec)
    out = []
    for row in x.double():
        z = parsed.basis.rotate(row[None]) if parsed.basis else row[None]
        parts = parsed.scale.share(z)
        b = parsed.scale.centre(parts) if parsed.scale.centred else torch.zeros(())
        s = parsed.scale.of(parts - b, parsed.grid)
        levels = torch.tensor(parsed.grid.levels, dtype=torch.float64)
        nearest = levels[(((parts - b) / s).unsqueeze(-1) - levels).abs().argmin(-1)]
        y = (nearest * s + b).reshape(z.shape)
        out.append(parsed.basis.unrotate(y) if parsed.basis else y)
    return torch.cat(out).float()


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_a_token_is_its_row_rounded_alone(spec):
    m = model(embedding=spec, head=spec)
    tokens = torch.tensor([[3, 49, 3]])
    with torch.no_grad():
        torch.testing.assert_close(m.embed(tokens)[0], rows_of(m.embed.weight[tokens[0]], spec), rtol=1e-5, atol=1e-7)
        x = torch.randn(1, 5, 32)
        torch.testing.assert_close(m.head(x), x @ rows_of(m.head.weight, spec).T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_looked_up_rows_and_the_whole_table_give_one_value_and_gradient(spec):
    weight = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    g = torch.randn(1, 6, 32)
    tokens, out = torch.tensor([[2, 2, 5, 0, 2, 6]]), []
    for repeats in (1, 2):  # six tokens are fewer than the rows, twelve are not
        embed = QuantEmbedding(nn.Embedding.from_pretrained(weight.clone(), freeze=False), QuantSpec.parse(spec))
        y = embed(tokens.repeat(1, repeats))[:, :6]
        y.backward(g)
        out.append((y.detach(), embed.weight.grad))
    assert torch.equal(out[0][0], out[1][0])
    torch.testing.assert_close(out[0][1], out[1][1], rtol=1e-5, atol=1e-6)
    assert not out[0][1][[1, 3, 4]].any()


def test_the_gradient_of_a_row_is_masked_where_the_estimator_says():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    weight[1, 0] = 40.0  # far beyond the grid: the trust mask passes nothing there
    embed = QuantEmbedding(nn.Embedding.from_pretrained(weight, freeze=False), QuantSpec.parse("int4-rms-trust"))
    embed(torch.tensor([1, 1])).sum().backward()
    assert embed.weight.grad[1, 0] == 0
    assert (embed.weight.grad[1, 1:] == 2).all()


@pytest.mark.parametrize("spec", KV)
def test_keys_and_values_have_one_value_at_a_time_or_together(spec):
    kept = Kept(QuantSpec.parse(spec))
    x = torch.randn(3, 11, 2, 16, generator=torch.Generator().manual_seed(3)).transpose(1, 2)  # as heads leave a layer
    with torch.no_grad():
        whole = kept(x)
        assert all(torch.equal(kept(x[:1, :, i : i + 1]), whole[:1, :, i : i + 1]) for i in range(11))
        assert torch.equal(kept.decoded(kept.encoded(x), x), whole)
    torch.testing.assert_close(whole.reshape(-1, 16), rows_of(x.reshape(-1, 16), spec), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [*SPECS, "int8-rms-ste", "ternary-rms-ste", "int3-h8-rms-trust", "int2-rms-ste"])
@pytest.mark.parametrize("width", [32, 96])
def test_codes_are_the_rounded_rows_to_the_bit(spec, width):
    quantizer = Quantizer(QuantSpec.parse(spec))
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(4))
    x[0, 0] = 0
    rows = RowCodes.of(x, quantizer)
    assert torch.equal(rows.values(quantizer.spec, width), quantizer.in_its_basis(x))
    bits = math.ceil(quantizer.spec.grid.bits)
    assert rows.codes.shape[-1] == width * (bits if bits <= 4 else 8) // 8


@pytest.mark.parametrize(("spec", "kv"), list(zip(SPECS, KV, strict=True)))
@pytest.mark.parametrize("tied", [False, True])
def test_a_cache_of_codes_gives_the_logits_of_the_whole_text(spec, kv, tied):
    m = model(tied, embedding=spec, kv=kv, **({} if tied else {"head": spec}))
    x = torch.randint(50, (1, 19), generator=torch.Generator().manual_seed(2))
    cache = Cache(m.config, 19, "cpu")
    with torch.no_grad():
        whole = m(x)
        parts = [m(x[:, :7], cache=cache), *(m(x[:, i : i + 1], cache=cache) for i in range(7, 19))]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)
        cache.rewind(18)
        assert torch.equal(m(x[:, 18:], cache=cache), parts[-1])
    plain = Cache(m.config, 19, "cpu")
    with torch.no_grad():
        model()(x, cache=plain)
    assert cache.bytes < 0.55 * plain.bytes


def test_four_bits_of_a_cache_are_half_a_byte_and_a_scale():
    m = model(kv="int4-rms-ste")
    cache = Cache(m.config, 10, "cpu")
    with torch.no_grad():
        m(torch.zeros(1, 10, dtype=torch.int64), cache=cache)
    assert cache.bytes == 2 * 2 * 2 * 10 * (16 // 2 + 4)  # keys and values, blocks, heads, tokens


@pytest.mark.parametrize("tied", [False, True])
def test_packed_is_the_run_to_the_bit(tied):
    quant = {"embedding": "int4-h32-rms-trust", "kv": "int4-rms-ste", **({} if tied else {"head": "int3-rms-ste"})}
    m, x = model(tied, **quant), torch.randint(50, (2, 9))
    packed = freeze(copy.deepcopy(m))
    assert type(packed.embed) is PackedEmbedding
    assert type(packed.head) is (TiedHead if tied else PackedLinear)
    size = packed_size(packed)
    assert size.bytes == 50 * (16 + 4) + (0 if tied else 50 * (12 + 4))
    assert size.layers == 1 + (not tied)
    with torch.no_grad():
        assert torch.equal(packed(x), m(x))
        assert torch.equal(packed(x, x), m(x, x))
    assert not any(p.shape[0] == 50 for p in packed.parameters())


def test_the_loss_in_parts_is_that_of_the_quantized_head(monkeypatch):
    x = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(5))
    for tied in (False, True):
        m = model(tied, embedding="int3-rms-trust", **({} if tied else {"head": "int3-h32-rms-trust"}))
        found = []
        for at_once in (2**24, 350):
            monkeypatch.setattr("questctl.config.sections.LOGITS_AT_ONCE", at_once)
            m.zero_grad()
            loss = m(x, x)
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in m.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_weights_begin_as_those_of_the_same_seed_and_norms_are_left_alone():
    plain, m = model(), model(**{key.removeprefix("quant."): spec for key, spec in ENDS.items()})
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), m.parameters(), strict=True))
    assert plain.state_dict().keys() == m.state_dict().keys()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["embedding", "head", "kv"])
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("int4.sr-rms-ste", "rounds at random"),
        ("ec2.5-rms-ste", "an entropy code"),
        ("int4-rms-2of4-ste", "leaves out values"),
        ("int4-learned-clip1", "a parameter of a layer"),
        ("int4-learned.r-clip1", "a parameter of a layer"),
        ("ternary-absmean.t-ste", "a scale of the whole tensor"),
        ("fp4-e4m3.g16-ste", "a scale of the whole tensor"),
        ("int4-h16.f-rms-ste", "fresh signs"),
        ("int4-h64-rms-trust", "does not divide the width"),
    ],
)
def test_specs_that_cannot_hold_by_row_are_refused(key, spec, reason):
    with pytest.raises(UsageError, match=rf"quant\.{key}.*{reason}") as e:
        tiny.config({f"quant.{key}": spec})
    assert str(e.value).count(". ") == 0


def test_groups_must_divide_the_row():
    c = tiny.config({"quant.kv": "int4-rms.g32-ste"})
    with pytest.raises(UsageError, match=r"quant\.kv: scale rms\.g32: .*16"):
        check_layers(c.model, c.quant)


def test_a_tied_head_has_one_spelling():
    with pytest.raises(UsageError, match=r"quant\.head: with model\.tied"):
        tiny.config({"model.tied": True, "quant.head": "int4-rms-ste"})
    assert tiny.config({"model.tied": True, "quant.embedding": "int4-rms-ste"}).quant.by_row.keys() == {"embedding"}


# --- identity ---------------------------------------------------------------------------------------------------------


def test_each_choice_is_another_experiment_and_another_scheme():
    words = ["bf16", "int4-h16-rms-trust", "int4-rms-trust", "int8-rms-ste"]
    configs = [
        tiny.config({**tiny.QUEST, "quant.embedding": e, "quant.head": h, "quant.kv": kv})
        for e, h, kv in itertools.product(words, repeat=3)
    ]
    assert len({c.run_id for c in configs}) == len({c.scheme for c in configs}) == len(configs)
    assert configs[-1].scheme == "quest-w4a4+ehkv.int8-rms-ste"
    assert configs[-2].scheme == "quest-w4a4+eh.int8-rms-ste+kv.int4-rms-trust"
    assert all(RunConfig.from_json(c.to_json(), where="").run_id == c.run_id for c in configs)
    for c in configs:
        label, specs = split_rows(c.scheme, {"embedding": 16, "head": 16, "kv": 16})
        assert (label, specs) == ("quest-w4a4", {key: str(spec) for key, spec in c.quant.by_row.items()})
    assert split_rows("quest-w4a4+g.int8-absmax+ehkv.int4-h.s-rms-ste+1a2b") == (
        "quest-w4a4+g.int8-absmax+1a2b",
        dict.fromkeys(("embedding", "head", "kv"), "int4-rms-ste"),
    )


def test_full_precision_leaves_old_runs_as_they_were_and_shortcuts_leave_these_alone():
    plain = tiny.config(tiny.QUEST)
    assert tiny.config({**tiny.QUEST, "quant.kv": "bf16"}).run_id == plain.run_id
    assert not {"embedding", "head", "kv"} & plain.to_json()["quant"].keys()
    assert plain.quant.by_row == {}
    ends = tiny.config({**ENDS, **tiny.QUEST}).quant
    assert (str(ends.weights), str(ends.kv)) == ("int4-h32-rms-trust", "int4-h16-rms-trust")
    assert tiny.config({"quant.kv": "int4-rms-ste"}).is_quantized


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_resumes_to_the_bit_and_is_loaded_as_it_was(tmp_path, tied):
    ends = ENDS if not tied else {k: v for k, v in ENDS.items() if k != "quant.head"}
    c = tiny.config({**tiny.QUEST, **ends, "model.tied": tied, "train.micro_batch": 4})
    whole = tiny.assert_resumes(c, tmp_path)
    loaded = load(RunStore(tmp_path / "whole").run(c.run_id))
    assert isinstance(loaded.model.embed, QuantEmbedding)
    shares = operand_shares(loaded.model, lambda: loaded.model(torch.zeros(1, 4, dtype=torch.int64)))
    assert {"embed", *(() if tied else ("head",))} <= shares["weight_trust(fraction)"].keys()
    assert {"blocks.0.keys", "blocks.1.values"} <= shares["activation_trust(fraction)"].keys()
    assert whole.model_bits == train(tiny.config({**tiny.QUEST, "model.tied": tied}), runs=tmp_path).model_bits


def test_quantization_that_begins_late_takes_these_along(tmp_path):
    c = tiny.config({**ENDS, "quant.start": 0.5})
    assert [bool(quant.by_row) for _, quant in c.stages] == [False, True]
    assert c.full_precision_tokens == c.tokens // 2
    tiny.assert_resumes(c, tmp_path)


@pytest.fixture
def quickly(monkeypatch):
    """Graphs are traced, backward passes too, but no code is generated."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
def test_compiled_steps_are_the_eager_ones(tmp_path):
    c = tiny.config({**ENDS, "train.steps": 3})
    compiled = c.model_copy(update={"train": c.train.model_copy(update={"compile": "on"})})
    losses = [train(config, runs=tmp_path / name).loss for name, config in (("eager", c), ("compiled", compiled))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert RunStore(tmp_path / "compiled").run(c.run_id).env()["compiled"]


def test_a_run_in_full_precision_goes_on_with_them_and_teaches(tmp_path):
    """What begins with a checkpoint computes what the checkpoint does, up to the rounding of 8 bits."""
    first = tiny.config({"train.steps": 6, "model.tied": True})
    before = train(first, runs=tmp_path).loss
    init = {"model.init": str(tmp_path / first.run_id), "data.tokenizer": "byte"}
    shape = {key: value for key, value in tiny.BASE.items() if not key.startswith("model.")}
    eight = {"quant.embedding": "int8-h32-rms-trust", "quant.kv": "int8-h16-rms-trust"}
    source = {k: v for k, v in {**shape, **init, **eight, "train.steps": 0}.items() if k != "data.tokenizer"}
    as_it_is = resolve([Layer("test", {tuple(k.split(".")): v for k, v in source.items()})]).config
    assert train(as_it_is, runs=tmp_path).loss == pytest.approx(before, abs=2e-3)
    taught = tiny.config({**ENDS, "train.steps": 3, "teacher.source": str(tmp_path / as_it_is.run_id)})
    assert train(taught, runs=tmp_path).loss > 0
