"""A Llama for low-bit experiments, and what it costs: parameters, bits and FLOPs, counted from its modules.

    x = embed(tokens);  per block:  x += o(attention(q, k, v of norm(x)));  x += down(silu(gate) · up of norm(x));
    head(norm(x))

RMSNorm, rotary positions, SwiGLU, no bias, untied head (arXiv 2302.13971), initialised as in arXiv 2502.05003. The blocks
are built of plain `nn.Linear`; `quantize_model` swaps them afterwards. `fan_out` is all that the model knows of it: layers with
one input, and what that comes from.

Legend: B sequences, T tokens, D d_model, F d_ff, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import ModelConfig, QuantConfig
from ..quant.components import memo
from ..quant.fusable import Gated, Normed
from ..quant.linear import QuantLinear, fan_out, quantize_model
from ..quant.quantizer import Quantizer


class Block(nn.Module):
    """One transformer block; its seven linears are named as everywhere in the project: q, k, v, o, gate, up, down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f = config.d_model, config.d_ff
        self.head_width = d // config.n_head
        self.attention_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.q, self.k, self.v, self.o = (_linear(d, d) for _ in range(4))
        self.ffn_norm = nn.RMSNorm(d, eps=config.norm_eps)
        self.gate, self.up, self.down = _linear(d, f), _linear(d, f), _linear(f, d)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | None = None, index: int = 0
    ) -> torch.Tensor:
        """x (B, T, D), cos and sin (T, W) → (B, T, D); with a cache x follows on what it holds, as its block `index`."""
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, H, T, W), W = D/H
            for y in fan_out(Normed(self.attention_norm, x), self.q, self.k, self.v)
        )
        if cache is None:
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            q, k, v = cache.append(index, q, k, v, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        gate, up = fan_out(Normed(self.ffn_norm, x), self.gate, self.up)
        (y,) = fan_out(Gated(gate, up), self.down)
        return x + y


class Llama(nn.Module):
    """The model of `config`, initialised from `seed`: the same weights for every quantization, so that runs are paired.

    Weights are N(0, init_std), the residual projections o and down N(0, init_std/√(2·n_layer)), norms 1. Built on another
    device (`with torch.device(…)`) they are drawn there, other ones for the same seed; on the meta device none are.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        assert config.vocab_size > 0, "the vocabulary is that of the data"
        self.config = config
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = _linear(config.d_model, config.vocab_size)
        if not self.head.weight.is_meta:
            self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator(self.head.weight.device).manual_seed(seed)
        std = self.config.init_std
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith((".o.weight", ".down.weight"))
                p.normal_(0.0, std / math.sqrt(2 * self.config.n_layer) if residual else std, generator=generator)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None, *, cache: Cache | None = None) -> torch.Tensor:
        """tokens (B, T) int64 → logits (B, T, V); with targets (B, T) → the mean loss in nats/token, fp32, shape ().

        With a cache, tokens are what follows on those that it holds: all of a prompt (B = 1) first, then one at a time.
        """
        c, width = self.config, self.config.d_model // self.config.n_head
        if cache is None:
            cos, sin = rotary_tables(tokens.shape[1], width, c.rope_theta, tokens.device)
        else:
            now = cache.advance(tokens.shape[1])
            cos, sin = (t[now] for t in rotary_tables(cache.capacity, width, c.rope_theta, tokens.device))
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin) if cache is None else block(x, cos, sin, cache, i)
        logits: torch.Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Cache:
    """Rotated keys and values of the tokens so far, of every block, for one sequence of up to `capacity` tokens.

    They carry no gradient.
    """

    def __init__(self, config: ModelConfig, capacity: int, device: torch.device | str) -> None:
        self.capacity, self._now = capacity, slice(0, 0)
        shape = (2, config.n_layer, 1, config.n_head, capacity, config.d_model // config.n_head)
        self._shape, self._device = shape, device
        self._tensors: torch.Tensor | None = None  # made when the dtype is known

    def advance(self, count: int) -> slice:
        """Where the next `count` tokens stand."""
        assert self._now.stop == 0 or count == 1, "a prompt comes first and whole: the causal mask is that of a square"
        self._now = slice(self._now.stop, self._now.stop + count)
        assert self._now.stop <= self.capacity
        return self._now

    def rewind(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        assert count <= self._now.stop
        self._now = slice(count, count)

    def append(
        self, block: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v (1, H, T, W) of the tokens that `advance` made room for → q turned, and keys and values of all tokens so far.

        One launch on a GPU that the kernels run on, the ten separate ones of the same formula on others.
        """
        from ..kernels.jit import why_not
        from ..kernels.rotary import rotary as turn
        from ..kernels.rotary import rotary_reference

        if self._tensors is None:
            self._tensors = torch.empty(self._shape, dtype=k.dtype, device=self._device)
        keys, values = self._tensors[:, block]
        place = keys[:, :, self._now], values[:, :, self._now]
        q = (rotary_reference if why_not(q.device) else turn)(q, k, v, cos, sin, *place)
        return q, keys[:, :, : self._now.stop], values[:, :, : self._now.stop]


def build_model(model: ModelConfig, quant: QuantConfig, seed: int) -> Llama:
    """The model with its linears quantized. Its initial weights depend on `model` and `seed` alone.

    Raises UsageError naming the layer that a word or an override does not fit.
    """
    llama = Llama(model, seed=seed)
    quantize_model(llama, quant)
    return llama


@memo
def rotary_tables(length: int, width: int, theta: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin (T, W), fp32, of the angle t·θ^(−2i/W) that turns the pair (i, i + W/2) (arXiv 2104.09864)."""
    with torch.inference_mode(False):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        angle = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequency)  # (T, W/2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1).float().to(device), torch.cat([-sin, sin], -1).float().to(device)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H, T, W) turned by its position: (x₁ cos − x₂ sin, x₂ cos + x₁ sin) for its halves x₁, x₂; same dtype."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by place. Learned quantizer scales belong to the number format, as computed scales do, and are not counted."""

    total: int
    embedding: int
    head: int
    params_non_embedding: int  # the N of scaling laws: all but embedding and head, norms included


def count_parameters(model: Llama) -> ParameterCount:
    """Count from the modules, and assert that the config counts the same from its sizes."""
    scales = sum(p.numel() for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters())
    total = sum(p.numel() for p in model.parameters()) - scales
    embedding, head = model.embed.weight.numel(), model.head.weight.numel()
    n = total - embedding - head
    assert n == model.config.params_non_embedding, (n, model.config)
    return ParameterCount(total, embedding, head, n)


def model_bits(model: Llama) -> float:
    """Bits that store the non-embedding parameters: quantized weights at their spec's bits, all else (norms, bf16) at 16.

    Scales of groups are in the spec's bits; those of rows are not counted (16 bits per row of K weights add 16/K per weight).
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    quantized = sum(layer.weight.numel() for layer in layers)
    stored = sum(layer.weight.numel() * layer.weight_quantizer.spec.bits for layer in layers)
    return stored + 16.0 * (count_parameters(model).params_non_embedding - quantized)


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations per token, 2 per multiply-add, of the matrix products (whatever the bits they could run in)."""

    forward: int
    training: int  # forward + backward = 3 × forward: a product has two gradients of its own cost
    six_n: int  # the convention 6·N of scaling laws, N non-embedding, without head and attention


def count_flops(model: Llama, seq_len: int) -> FlopCount:
    """Per token at `seq_len`: 2 per weight of every linear layer (head included, embedding lookup not), and attention scores
    and their product with v, counted as full T×T (4·T·D per layer; arXiv 2204.02311 app. B) although the mask halves them. Fake
    quantization itself is not counted: it is what training in low precision costs on hardware without it.
    """
    linears = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    forward = linears + 4 * seq_len * model.config.d_model * model.config.n_layer
    return FlopCount(forward, 3 * forward, 6 * count_parameters(model).params_non_embedding)


def _linear(n_in: int, n_out: int) -> nn.Linear:
    """A bias-free layer with room for its weights but none drawn: `Llama` draws them all from its own seed."""
    layer = nn.Linear(n_in, n_out, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(n_out, n_in))
    return layer
