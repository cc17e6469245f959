"""A Llama for low-bit experiments, and its cost in parameters, bits and FLOPs, counted from its modules.

    x = embed(tokens);  per block:  x += o(attention(q, k, v of norm(x)));  x += down(silu(gate) · up of norm(x));
    head(norm(x))

RMSNorm, rotary positions, SwiGLU, no bias, untied head (arXiv 2302.13971), initialised as in arXiv 2502.05003. By its config it
is also a Llama 3, a Mistral, a Qwen2 or a Qwen3: with fewer heads of keys and values than of queries (arXiv 2305.13245), biases
in the attention, an RMSNorm on every head of q and k, stretched positions, a sliding window, or a head tied to the embedding.

The blocks are built of plain `nn.Linear`, which `quantize_model` replaces afterwards. The model itself only calls `fan_out`,
with the layers that share an input and the operation that computes that input.

Legend: B sequences, T tokens, D d_model, F d_ff, H heads of queries, G heads of keys and values, W width of a
head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig, QuantConfig
from ..config.rope import parse_scaling
from ..kernels import native
from ..quant.by_row import Kept
from ..quant.codes import RowCodes
from ..quant.components import memo
from ..quant.fusable import Gated, Normed, is_plain
from ..quant.linear import QuantLinear, TakesQuantized, fan_out
from ..quant.model import quantize_model
from ..quant.quantizer import Quantizer
from .loss import summed_loss


class Block(nn.Module):
    """One transformer block with seven linear layers: q, k, v, o, gate, up and down (`ModelConfig.block_shapes`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, eps, self.head_width, self.window = config.d_model, config.norm_eps, config.width_of_head, config.window
        layers = {name: _linear(k, n, bias=name in config.biased) for name, (n, k) in config.block_shapes.items()}
        self.attention_norm = nn.RMSNorm(d, eps=eps)
        self.q, self.k, self.v, self.o = (layers[name] for name in "qkvo")
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_width, eps=eps) if config.qk_norm else None for _ in "qk")
        self.ffn_norm = nn.RMSNorm(d, eps=eps)
        self.keys: Kept | None = None  # the quantizers of keys and values, if any
        self.values: Kept | None = None
        self.gate, self.up, self.down = layers["gate"], layers["up"], layers["down"]

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: Cache | None = None,
        index: int = 0,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, T, D), cos and sin (T, W) → (B, T, D). With a cache, x continues the sequence whose block `index` it holds.

        `mask` (B, 1, T, T) is true where a token attends to another, in place of the causal mask.
        """
        normed = Normed(self.attention_norm, x)
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, H, T, W) or (B, G, T, W)
            for y in fan_out(normed, self.q, self.k, self.v)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            kept = (self.keys, self.values) if self.keys is not None and self.values is not None else None
            q, k, v = cache.append(index, q, k, v, cos, sin, kept)
        else:
            q, k = turned(q, cos, sin), turned(k, cos, sin)
            if self.keys is not None and self.values is not None:
                k, v = self.keys(k), self.values(v)
        if mask is not None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        else:
            y = attend(q, k, v, self.window, square=cache is None or q.shape[2] > 1)
        x = normed.through + self.o(y.transpose(1, 2).flatten(-2))
        normed = Normed(self.ffn_norm, x)
        gate, up = fan_out(normed, self.gate, self.up)
        (y,) = fan_out(Gated(gate, up), self.down)
        return normed.through + y


class Llama(nn.Module):
    """The model of `config`, initialised from `seed`.

    Initial weights do not depend on the quantization, so that runs with the same seed are paired. Weights are N(0, init_std),
    the residual projections o and down N(0, init_std/√(2·n_layer)), norms 1; config/rates.py has the factors that
    `model.base_width` adds. Under `with torch.device(…)` they are drawn on
    that device, where the same seed gives other weights; on the meta device none are drawn. Biases are 0. With `tied` the head
    has no weight of its own.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        assert config.vocab_size > 0, "fill in the vocabulary of the data first (RunConfig.with_vocabulary)"
        self.config = config
        self.recomputes = (
            False  # in the backward pass what a block computed, instead of keeping it (train.checkpoint_activations)
        )
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model), freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = TiedHead(self.embed) if config.tied else _linear(config.d_model, config.vocab_size)
        if not self.embed.weight.is_meta:
            self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        narrower = self.config.narrower
        by_width = {"embed": 1.0, "blocks": math.sqrt(narrower), "head": narrower}
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = self.config.init_std * by_width[name.partition(".")[0]]
                residual = name.endswith((".o.weight", ".down.weight"))
                p.normal_(0.0, std / math.sqrt(2 * self.config.n_layer) if residual else std, generator=generator)
            elif name.endswith(".bias"):
                p.zero_()

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """tokens (B, T) int64 → logits (B, T, V); with targets (B, T) → the mean loss in nats/token, fp32, shape ().

        In packed sequences (data/packing.py), a token attends only to positions from `first` (B, T) on, where its document
        begins. Targets of -100 do not count; without any that count, the mean is 0. With a cache, tokens continue its sequence
        (B = 1): first the whole prompt, then one token at a time.
        """
        if cache is None:
            cos, sin = rotary_of(self.config, tokens.shape[1], tokens.device)
        else:
            now = cache.advance(tokens.shape[1])
            cos, sin = (t[now] for t in rotary_of(self.config, cache.capacity, tokens.device))
        x = self.embed(tokens)
        mask = None if first is None else document_mask(first, self.config.window)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, cos, sin, cache, i)
            elif self.recomputes and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask=mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask=mask)
        x = Normed(self.norm, x).value()
        logits: torch.Tensor
        if targets is None:
            logits = self.head(x)
            return logits
        rows = self.config.loss_rows(self.config.vocab_size)
        if targets.numel() > rows:
            weight = self.head.values() if isinstance(self.head, TakesQuantized) else self.head.weight
            total = summed_loss(x.flatten(0, 1), weight, targets.flatten(), rows)
        else:
            logits = self.head(x).float().flatten(0, 1)
            if first is None:
                return F.cross_entropy(logits, targets.flatten())
            total = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1)


class TiedHead(nn.Module):
    """The product of x (…, D) with the embedding's weight (V, D); it has no parameters of its own."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self._embed: tuple[Any] = (embed,)  # in a tuple, so that it is not a submodule here, too

    def replaced(self, by: Mapping[nn.Module, nn.Module]) -> None:
        """Use another embedding from now on, if `replace_modules` has replaced this one."""
        self._embed = (by.get(self._embed[0], self._embed[0]),)

    @property
    def weight(self) -> torch.Tensor:
        """The embedding's weight (V, D), as it is looked up: quantized if the embedding is."""
        (embed,) = self._embed
        values: torch.Tensor = embed.weight if type(embed) is nn.Embedding else embed.values()
        return values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, D) → logits (…, V)."""
        return F.linear(x, self.weight)


class Cache:
    """The rotated keys and values of one sequence of up to `capacity` tokens in every block, without gradients.

    If quantized, they are held as codes and decoded at each use, to the values that training saw at their position.
    """

    def __init__(self, config: ModelConfig, capacity: int, device: torch.device | str) -> None:
        self.capacity, self._now = capacity, slice(0, 0)
        shape = (2, config.n_layer, 1, config.kv_heads, capacity, config.width_of_head)
        self._shape, self._device = shape, device
        self._tensors: torch.Tensor | None = None  # allocated by the first `append`, which knows the dtype
        self._coded: dict[Kept, RowCodes] = {}  # codes of quantized ones, also allocated by the first `append`

    def advance(self, count: int) -> slice:
        """Make room for the next `count` tokens; returns their positions."""
        assert self._now.stop == 0 or count == 1, "the prompt comes first and whole, since the causal mask is square"
        self._now = slice(self._now.stop, self._now.stop + count)
        assert self._now.stop <= self.capacity
        return self._now

    def rewind(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        assert count <= self._now.stop
        self._now = slice(count, count)

    def append(
        self,
        block: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kept: tuple[Kept, Kept] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (1, H, T, W), k and v (1, G, T, W) of the tokens that `advance` made room for → rotated q, all keys and values.

        `kept` are the quantizers of keys and values. This is one launch on a GPU that the kernels run on, instead of the ten of
        the formula.
        """
        from ..kernels.jit import why_not
        from ..kernels.rotary import rotary as turn
        from ..kernels.rotary import rotary_reference

        turn = rotary_reference if why_not(q.device) else turn
        if kept is not None:
            keys, values = torch.empty_like(k), torch.empty_like(v)
            q = turn(q, k, v, cos, sin, keys, values)
            return q, self._recoded(kept[0], keys), self._recoded(kept[1], values)
        if self._tensors is None:
            self._tensors = torch.empty(self._shape, dtype=k.dtype, device=self._device)
        keys, values = self._tensors[:, block]
        q = turn(q, k, v, cos, sin, keys[:, :, self._now], values[:, :, self._now])
        return q, keys[:, :, : self._now.stop], values[:, :, : self._now.stop]

    def _recoded(self, kept: Kept, x: torch.Tensor) -> torch.Tensor:
        """Append x (1, G, T, W) to the codes of `kept`; returns all of these decoded."""
        new = kept.encoded(x)
        if kept not in self._coded:
            self._coded[kept] = new.each(lambda t: t.new_empty(*t.shape[:2], self.capacity, t.shape[-1]))
        held = self._coded[kept]
        for to, of in zip(held, new, strict=True):
            if to is not None and of is not None:
                to[:, :, self._now] = of
        return kept.decoded(held.each(lambda t: t[:, :, : self._now.stop]), x)

    @property
    def bytes(self) -> int:
        """Bytes allocated for keys and values, 0 before the first token."""
        held = [t for rows in self._coded.values() for t in rows if t is not None]
        return sum(t.numel() * t.element_size() for t in (*held, *([] if self._tensors is None else [self._tensors])))


def build_model(
    model: ModelConfig,
    quant: QuantConfig,
    seed: int,
    *,
    rotate_back: bool = False,
    prepare: Callable[[Llama], None] = lambda _: None,
) -> Llama:
    """The model with quantized linear layers. Its initial weights depend only on `model` and `seed`.

    `rotate_back`, for weights that were trained without quantization, is that of `QuantLinear`. `prepare` may change the
    weights before the layers are quantized. Raises UsageError naming the layer that a spec or an override does not fit.
    """
    llama = Llama(model, seed=seed)
    prepare(llama)
    quantize_model(llama, quant, rotate_back=rotate_back)
    return llama


def rotary_of(config: ModelConfig, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The `rotary_tables` (T, W) of a model for the first `length` tokens."""
    return rotary_tables(length, config.width_of_head, config.rope_theta, device, config.rope_scaling)


@memo
def rotary_tables(
    length: int, width: int, theta: float, device: torch.device, scaling: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin (T, W), fp32, of the angle t·θ^(−2i/W) that turns the pair (i, i + W/2) (arXiv 2104.09864).

    `scaling` changes the frequencies θ^(−2i/W) as config/rope.py says; yarn multiplies cos and sin by its magnitude.
    """
    with torch.inference_mode(False):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        stretched, magnitude = stretch(frequency, theta, scaling)
        angle = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), stretched)  # (T, W/2)
        cos, sin = angle.cos() * magnitude, angle.sin() * magnitude
        return torch.cat([cos, cos], -1).float().to(device), torch.cat([-sin, sin], -1).float().to(device)


def stretch(frequency: torch.Tensor, theta: float, scaling: str) -> tuple[torch.Tensor, float]:
    """Frequencies (W/2,) in radians a token → the same, scaled, and what cos and sin are multiplied by."""
    s = parse_scaling(scaling)
    if s is None:
        return frequency, 1.0
    if s.kind == "linear":
        return frequency / s.factor, 1.0
    turns = s.length * frequency / (2 * math.pi)  # within the sequences of the first training
    if s.kind == "llama3":
        kept = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    else:  # yarn mixes over whole pairs, from the one with `high` turns to the one with `low`
        first, last = (len(frequency) * math.log(s.length / (n * 2 * math.pi)) / math.log(theta) for n in (s.high, s.low))
        first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * len(frequency) - 1)
        pair = torch.arange(len(frequency), dtype=torch.float64, device="cpu")
        kept = 1 - ((pair - first) / (last - first or 0.001)).clamp(0, 1)
    return frequency * kept + frequency / s.factor * (1 - kept), s.magnitude


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, *, square: bool) -> torch.Tensor:
    """Causal attention: q (B, H, T, W), k and v (B, G, S, W) → (B, H, T, W). H/G heads of q share one of k.

    If `square`, T = S and a token attends to all tokens up to itself; otherwise T is 1 and it attends to all S. With a `window`
    it attends only to the newest `window` of these.
    """
    grouped = q.shape[1] != k.shape[1]
    if not square:
        newest = slice(-window if window else None, None)
        return F.scaled_dot_product_attention(q, k[:, :, newest], v[:, :, newest], is_causal=False, enable_gqa=grouped)
    if not 0 < window < q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = window_mask(q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


@memo
def window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """(T, T), true where token i sees token j: i − window < j ≤ i."""
    with torch.inference_mode(False):
        behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
        return (behind >= 0) & (behind < window)


def document_mask(first: torch.Tensor, window: int) -> torch.Tensor:
    """The places `first` (B, T) where documents begin → (B, 1, T, T), true where token i sees token j: first_i ≤ j ≤ i."""
    at = torch.arange(first.shape[1], device=first.device)
    mask = (at >= first[:, :, None]) & (at <= at[:, None])
    if window:
        mask &= at > at[:, None] - window
    return mask[:, None]


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, H or G, T, W) rotated by its position: (x₁ cos − x₂ sin, x₂ cos + x₁ sin) for its halves x₁, x₂; same dtype."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotary` of x (B, H or G, T, W), on a CPU in one pass over memory with the same bits (kernels/native.py)."""
    if not is_plain(x) or native.usable("turn_rows") is None:
        return rotary(x, cos, sin)
    y: torch.Tensor = _Turned.apply(x, cos, sin)
    return y


class _Turned(torch.autograd.Function):
    """`rotary` in one pass; so is its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        lib = native.usable("turn_rows")
        assert lib is not None
        ctx.save_for_backward(cos, sin)
        return native.turn_rows(x, cos, sin, lib)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        lib = native.library()
        assert lib is not None
        cos, sin = ctx.saved_tensors
        return native.turn_rows(grads[0], cos, sin, lib, back=True), None, None


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. Learned quantizer scales are not counted: they belong to the number format, as others do."""

    total: int
    embedding: int
    head: int  # 0 if it is tied to the embedding
    params_non_embedding: int  # the N of scaling laws: all but embedding and head, norms included


def count_parameters(model: Llama) -> ParameterCount:
    """Count from the modules, and assert that the config counts the same from its sizes."""
    scales = sum(p.numel() for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters())
    total = sum(p.numel() for p in model.parameters()) - scales
    embedding, head = model.embed.weight.numel(), sum(p.numel() for p in model.head.parameters())
    n = total - embedding - head
    assert n == model.config.params_non_embedding, (n, model.config)
    return ParameterCount(total, embedding, head, n)


def model_bits(model: Llama) -> float:
    """The bits that store the non-embedding parameters: quantized weights at the bits of their spec, all others at 16.

    The bits of a spec include the scales of groups. Scales of rows are not counted (16 bits per row of K weights add 16/K bits
    per weight).
    """
    layers = [m for m in model.blocks.modules() if isinstance(m, QuantLinear)]
    quantized = sum(layer.weight.numel() for layer in layers)
    stored = sum(layer.weight.numel() * layer.weight_quantizer.spec.bits for layer in layers)
    return stored + 16.0 * (count_parameters(model).params_non_embedding - quantized)


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations of the matrix products per token, 2 per multiply-add, whatever bits they could run in."""

    forward: int
    training: int  # 3 × forward: the backward pass of a product is two products of the same cost
    six_n: int  # the convention 6·N of scaling laws, N = params_non_embedding: without head and attention


def count_flops(model: Llama, seq_len: int) -> FlopCount:
    """Count the operations per token at `seq_len`.

    They are 2 per weight of every linear layer (the head included, the embedding lookup not), and those of attention scores and
    of their product with v, counted as full T×T (4·T·H·W per layer; arXiv 2204.02311 app. B) although the mask halves them. The
    quantizers themselves are not counted: they are the overhead of simulating low precision on hardware that lacks it.
    """
    linears = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    linears += 2 * model.embed.weight.numel() if isinstance(model.head, TiedHead) else 0
    c = model.config
    forward = linears + 4 * seq_len * c.n_head * c.width_of_head * c.n_layer
    return FlopCount(forward, 3 * forward, 6 * count_parameters(model).params_non_embedding)


def _linear(n_in: int, n_out: int, *, bias: bool = False) -> nn.Linear:
    """A layer with uninitialised weights: `Llama` draws them all from its own seed."""
    layer = nn.Linear(n_in, n_out, bias=bias, device="meta")
    layer.weight = nn.Parameter(torch.empty(n_out, n_in))
    if bias:
        layer.bias = nn.Parameter(torch.empty(n_out))
    return layer
