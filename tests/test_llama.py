"""The Llama against a plain one, its counts against the published ones, and seeds that pair runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from questctl.config import Layer, LayerQuant, ModelConfig, QuantConfig, resolve
from questctl.config.presets import PRESETS
from questctl.errors import UsageError
from questctl.models.llama import Llama, build_model, count_flops, count_parameters, model_bits
from questctl.quant.linear import QuantLinear

TINY = ModelConfig(n_layer=2, d_model=32, n_head=2, d_ff=64, vocab_size=61)
QUEST = QuantConfig(weights="int4-h32-rms-trust", activations="int4-h32-rms-trust")
PUBLISHED = {  # non-embedding parameters: arXiv 2502.05003 and its runs; the laptop sizes by hand
    "30M": 30_482_560,
    "50M": 49_556_736,
    "100M": 102_777_856,
    "200M": 203_188_480,
    "430M": 443_068_288,
    "800M": 822_151_168,
    "53K": 53_440,
    "107K": 106_816,
    "214K": 213_568,
    "640K": 639_872,
}


def tokens(batch: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("preset", "n"), PUBLISHED.items())
def test_preset_counts_on_the_meta_device(preset: str, n: int) -> None:
    config = resolve([Layer("flags", {("preset",): preset, ("model", "vocab_size"): 50304})], PRESETS).config.model
    with torch.device("meta"):
        model = Llama(config)
    count = count_parameters(model)
    assert count.params_non_embedding == n
    assert count.embedding == count.head == 50304 * config.d_model
    assert count.total == n + 2 * 50304 * config.d_model


def plain_llama(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    """The same network written out in fp64, with loops and without any of the model's helpers."""
    p = {n: t.double() for n, t in model.named_parameters()}
    c = model.config
    width = c.d_model // c.n_head

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turn(x: torch.Tensor) -> torch.Tensor:  # (T, W)
        out = torch.empty_like(x)
        for t in range(len(x)):
            for i in range(width // 2):
                angle = t * c.rope_theta ** (-2 * i / width)
                a, b = x[t, i], x[t, i + width // 2]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    logits = []
    for row in ids:
        x = p["embed.weight"][row]
        causal = torch.full((len(row), len(row)), -math.inf, dtype=torch.float64).triu(1)
        for i in range(c.n_layer):
            w = {n: p[f"blocks.{i}.{n}.weight"] for n in ("q", "k", "v", "o", "gate", "up", "down")}
            h = norm(x, p[f"blocks.{i}.attention_norm.weight"])
            heads = []
            for part in range(c.n_head):
                cut = slice(part * width, (part + 1) * width)
                q, k, v = turn((h @ w["q"].T)[:, cut]), turn((h @ w["k"].T)[:, cut]), (h @ w["v"].T)[:, cut]
                heads.append(torch.softmax(q @ k.T / math.sqrt(width) + causal, -1) @ v)
            x = x + torch.cat(heads, -1) @ w["o"].T
            h = norm(x, p[f"blocks.{i}.ffn_norm.weight"])
            gate = h @ w["gate"].T
            x = x + (gate * torch.sigmoid(gate) * (h @ w["up"].T)) @ w["down"].T
        logits.append(norm(x, p["norm.weight"]) @ p["head.weight"].T)
    return torch.stack(logits)


def test_forward_and_gradients_equal_a_plain_llama() -> None:
    model = Llama(TINY, seed=3)
    with torch.no_grad():  # larger than at the start, so that attention and norms matter
        for p in model.parameters():
            p.mul_(8) if p.ndim == 2 else p.add_(torch.rand(p.shape))
    ids, targets = tokens(), tokens(seed=1)
    expected = plain_llama(model, ids)
    torch.testing.assert_close(model(ids).double(), expected, rtol=1e-4, atol=1e-4)
    loss = model(ids, targets)
    nll = -expected.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(nll.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(nll, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_token_sees_only_the_past() -> None:
    model = build_model(TINY, QUEST, 0)
    a, b = tokens(), tokens()
    b[:, 5:] = (b[:, 5:] + 1) % TINY.vocab_size
    torch.testing.assert_close(model(a)[:, :5], model(b)[:, :5])
    assert not torch.allclose(model(a)[:, 5:], model(b)[:, 5:])


def test_initial_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    models = [build_model(TINY, q, 5) for q in (QuantConfig(), QUEST, QuantConfig(weights="int4-learned-clip1"))]
    assert torch.equal(torch.get_rng_state(), state)  # no draw from anyone else's generator
    plain = dict(models[0].named_parameters())
    for model in models[1:]:
        weights = {n: p for n, p in model.named_parameters() if not n.endswith(".scale")}
        assert weights.keys() == plain.keys()
        assert all(torch.equal(p, plain[n]) for n, p in weights.items())
    assert not torch.equal(plain["embed.weight"], Llama(TINY, seed=6).embed.weight)


def test_initial_spread() -> None:
    model = Llama(ModelConfig(n_layer=3, d_model=128, n_head=4, d_ff=384, vocab_size=256), seed=0)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
        else:
            expected = 0.02 / math.sqrt(6) if name.split(".")[-2] in ("o", "down") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < 4 * expected / math.sqrt(p.numel())


def test_uniform_loss_at_the_start() -> None:
    assert Llama(TINY, seed=0)(tokens(), tokens(seed=1)).item() == pytest.approx(math.log(TINY.vocab_size), rel=0.01)


@pytest.mark.parametrize(
    ("weights", "bits"), [("bf16", 16), ("int4-h32-rms-trust", 4), ("int4-rms-2of4pairs-ste", 2.5), ("int4-learned-clip1", 4)]
)
def test_model_bits(weights: str, bits: float) -> None:
    model = build_model(TINY, QuantConfig(weights=weights), 0)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    norms = 5 * 32
    assert count_parameters(model).params_non_embedding == matrices + norms
    assert model_bits(model) == matrices * bits + norms * 16


def test_model_bits_with_overrides() -> None:
    quant = QuantConfig(weights="int4-rms-ste", overrides={"blocks.*.down": LayerQuant(weights="bf16")})
    down = 2 * 32 * 64
    assert model_bits(build_model(TINY, quant, 0)) == 16 * (down + 5 * 32) + 4 * (2 * (4 * 32 * 32 + 2 * 32 * 64))


def test_flops_by_hand() -> None:
    for quant in (QuantConfig(), QUEST):
        flops = count_flops(build_model(TINY, quant, 0), seq_len=10)
        matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)
        attention = 2 * (2 * 10 * 32 + 2 * 10 * 32)  # scores and their product with v, two layers
        assert flops.forward == 2 * matrices + 2 * 32 * 61 + attention
        assert flops.training == 3 * flops.forward
        assert flops.six_n == 6 * (matrices + 5 * 32)


def test_flops_agree_with_the_counter_of_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, length = Llama(TINY, seed=0), 12
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens(1, length))
    assert counter.get_total_flops() == pytest.approx(count_flops(model, length).forward * length, rel=0.02)


def test_a_quantized_model_trains() -> None:
    for quant in (QUEST, QuantConfig(weights="int2-learned-clip1", activations="int2-learned-clip1")):
        model = build_model(TINY, quant, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = tokens(4, 16)
        losses = []
        for _ in range(30):
            loss = model(ids[:, :-1], ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bf16_autocast_is_near_fp32_and_gives_an_fp32_loss() -> None:
    model = build_model(TINY, QUEST, 0)
    ids, targets = tokens(), tokens(seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(ids, targets).item(), rel=5e-3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_blocks_hold_the_seven_linears_by_name() -> None:
    model = build_model(TINY, QUEST, 0)
    names = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert names == {f"blocks.{i}.{n}" for i in range(2) for n in ("q", "k", "v", "o", "gate", "up", "down")}
    assert isinstance(model.head, nn.Linear)
    assert not isinstance(model.head, QuantLinear)
    assert "weights=int4-h32-rms-trust" in repr(model)


def test_a_width_that_does_not_fit_names_the_layer() -> None:
    words = QuantConfig(weights="int4-h64-rms-trust", activations="int4-h64-rms-trust")
    with pytest.raises(UsageError, match=r"layer blocks\.0\.q: rotation h64 does not divide the width 32"):
        build_model(TINY, words, 0)


def test_state_survives_a_round_trip() -> None:
    a = build_model(TINY, QuantConfig(weights="int4-learned-clip1"), 0)
    b = build_model(TINY, QuantConfig(weights="int4-learned-clip1"), 1)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(tokens()), b(tokens()))
    assert F.mse_loss(a(tokens()), build_model(TINY, QuantConfig(weights="int4-learned-clip1"), 1)(tokens())) > 0
