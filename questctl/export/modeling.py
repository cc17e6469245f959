"""The network of a run for transformers: a Llama whose linear layers hold packed weights and quantize their inputs.

    y = Q_x(x)·(s·q + b)ᵀ          q unpacked at every use, (N, K); Q_x the quantizer of the training, without gradients

Norms, rotary embeddings and attention use the operations of the training's forward pass in the same order. An input at the edge
between two levels is then rounded to the same side, so that logits agree to the last bits and not only on average.

`bundle.py` makes the code file of each export from this module; there it needs torch and transformers only.

N outputs, K inputs of a layer; B sequences, T tokens, H heads, W width of a head, D width of the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, LlamaPreTrainedModel, eager_attention_forward

from ..kernels.pack import unpack_reference
from ..models.llama import rotary, rotary_tables
from ..quant.grids import Uniform
from ..quant.quantizer import Quantizer
from ..quant.spec import QuantSpec
from ..quant.storage import code_bits, tensors_of

LENGTH = 4096  # tokens


class QuestLlamaConfig(LlamaConfig):
    """A Llama's config with the entry `quest`: module name → specs of weights and activations, and flags of `QuestLinear`.

    `quest_rows` has the specs of embedding, head and kv where these are quantized; `quest_tied` says that the codes of the
    embedding are the head's, too.
    """

    model_type = "quest_llama"


class QuestRows(nn.Module):
    """A packed weight (N, K).

    Its tensors are those of `tensors_of`: `codes` are the index of each level, packed to 1 to 4 bits where a row fills whole
    bytes, else one per byte; `steps` the scales; `offsets` and `keep` (0 where a value is pruned) exist if the spec has them.
    With `unrotate` the weight is rotated back.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    offsets: torch.Tensor | None
    keep: torch.Tensor | None

    def __init__(self, rows: int, width: int, spec: QuantSpec, *, keep: bool, unrotate: bool) -> None:
        super().__init__()
        self.out_features, self.in_features, self.spec, self.unrotate = rows, width, spec, unrotate
        self.bits = 0 if spec.is_identity else code_bits(spec, width)
        tensors = {} if spec.is_identity else tensors_of(spec, rows, width, keep=keep)
        for name in ("codes", "steps", "offsets", "keep"):
            kind = tensors.get(name)
            self.register_buffer(name, kind and torch.empty(kind.shape, dtype=getattr(torch, kind.dtype)))

    def dense(self, at: torch.Tensor | None = None) -> torch.Tensor:
        """The dequantized weight (N, K) in fp32, or its rows `at` (n) as (n, K)."""
        assert self.spec.scale is not None
        index, steps, offsets = ((t if t is None or at is None else t[at]) for t in (self.codes, self.steps, self.offsets))
        assert index is not None
        assert steps is not None
        if self.bits < 8:
            index = (unpack_reference(index, self.bits, self.in_features) + (2**self.bits - 1)) >> 1
        levels = torch.tensor(self.spec.grid.levels, dtype=torch.float32, device=index.device)
        if isinstance(self.spec.grid, Uniform):
            q = index.float() + levels[0]
        else:
            q = levels.index_select(0, index.flatten().int()).view(index.shape)
        if self.keep is not None:
            q *= unpack_reference(self.keep, 1, self.in_features) > 0
        y = self.spec.scale.share(q) * steps.unsqueeze(-1)
        if offsets is not None:
            y += offsets.unsqueeze(-1)
        y = y.view(index.shape)
        return self.spec.basis.unrotate(y) if self.unrotate and self.spec.basis else y


class QuestEmbedding(QuestRows):
    """An embedding whose packed rows are expanded when they are looked up."""

    like: torch.Tensor

    def __init__(self, rows: int, width: int, spec: QuantSpec) -> None:
        super().__init__(rows, width, spec, keep=False, unrotate=True)
        self.register_buffer("like", torch.empty(0), persistent=False)  # has the dtype of the network

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (…) → (…, D)."""
        return self.dense(tokens.flatten()).view(*tokens.shape, -1).to(self.like.dtype)


class QuestTiedHead(nn.Module):
    """The product with the rows of a `QuestEmbedding`."""

    def __init__(self, embedding: QuestEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not a submodule here, too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, D) → logits (…, V)."""
        return F.linear(x, self._embedding[0].dense().to(x.dtype))


class QuestLinear(QuestRows):
    """A bias-free linear layer with packed weights (N, K) and quantized input (…, K).

    With `unrotate` the weight is rotated back into the basis of x, which is not rotated. An unquantized weight is stored as
    `weight` in fp32, in the basis of the inputs' spec.
    """

    def __init__(self, in_features: int, out_features: int, specs: dict[str, Any]) -> None:
        spec, keep, unrotate = QuantSpec.parse(specs["weights"]), bool(specs.get("keep")), bool(specs.get("unrotate"))
        super().__init__(out_features, in_features, spec, keep=keep, unrotate=unrotate)
        self.input_quantizer = quantizer_of(specs["activations"])
        if self.spec.is_identity:
            self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def dense(self, at: torch.Tensor | None = None) -> torch.Tensor:
        """The dequantized weight (N, K) in fp32, by which the input is multiplied; or its rows `at` (n)."""
        if not self.spec.is_identity:
            return super().dense(at)
        return self.weight if at is None else self.weight[at]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, K) → y (…, N)."""
        return F.linear(self.input_quantizer(x), self.dense().to(x.dtype))

    def extra_repr(self) -> str:
        """Shape and spec, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={self.spec}"


def quantizer_of(text: str) -> Quantizer:
    """The quantizer with this spec, by operations of torch alone."""
    quantizer = Quantizer(QuantSpec.parse(text))
    quantizer.by_row = None  # the single pass has the same bits, but needs C code that this file lacks
    return quantizer


class QuestRotary(nn.Module):
    """Rotary angles from the training's tables; position_ids (B, T) → cos and signed sin (B, T, W), fp32.

    The tables reach to the longest sequence that the config names, or to 4,096 tokens if that is shorter. Their size depends on
    no data, so that runtimes can compile the network.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: QuestLlamaConfig) -> None:
        super().__init__()
        self.length, self.width = max(config.max_position_embeddings, LENGTH), config.head_dim
        self.scaling = str(getattr(config, "rope_text", ""))
        rope = getattr(config, "rope_parameters", None) or {}  # transformers 5; before it, rope_theta
        self.theta = float(rope.get("rope_theta") or config.rope_theta)
        for name, table in zip(("cos", "sin"), self.tables(torch.get_default_device()), strict=True):
            self.register_buffer(name, table, persistent=False)

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin (`length`, W); on the meta device without values, which `_init_weights` fills in."""
        if device.type == "meta":
            empty = torch.empty(self.length, self.width, dtype=torch.float32, device=device)
            return empty, torch.empty_like(empty)
        return rotary_tables(self.length, self.width, self.theta, device, self.scaling)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up cos and sin, which are fp32 as in training, whatever x is."""
        return self.cos[position_ids], self.sin[position_ids]


class QuestAttention(LlamaAttention):
    """Causal attention with the training's order of operations in the rotary embedding; the rest is that of transformers.

    Keys and values are quantized before they enter a cache, if those of the training were.
    """

    def __init__(self, config: QuestLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        kv = getattr(config, "quest_rows", {}).get("kv")
        self.kv_quantizer = quantizer_of(kv) if kv else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, T, D) → (B, T, D), and the attention weights if the implementation returns them."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (table.unsqueeze(1) for table in position_embeddings)  # (B, 1, T, W)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        if self.kv_quantizer is not None:
            k, v = self.kv_quantizer.in_its_basis(k), self.kv_quantizer.in_its_basis(v)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class QuestLlamaPreTrainedModel(LlamaPreTrainedModel):
    """The base of the two classes below."""

    config_class = QuestLlamaConfig
    _supports_attention_backend = True  # so that vLLM can use its own attention
    _keep_in_fp32_modules_strict = ("steps", "offsets", "input_quantizer")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill in the rotary tables of a network that was built without values; its weights come from the file."""
        if isinstance(module, QuestRotary):
            for own, table in zip((module.cos, module.sin), module.tables(module.cos.device), strict=True):
                own.copy_(table)
        else:
            super()._init_weights(module)


class QuestLlamaModel(QuestLlamaPreTrainedModel, LlamaModel):
    """`LlamaModel` with the training's norms and attention, whose layers in `config.quest` are replaced by `QuestLinear`.

    The layers are replaced here and not in the class with a head, because vLLM builds this one.
    """

    def __init__(self, config: QuestLlamaConfig) -> None:
        super().__init__(config)
        eps = config.rms_norm_eps
        self.rotary_emb = QuestRotary(config)
        for i, block in enumerate(self.layers):
            block.self_attn = QuestAttention(config, i)
            block.input_layernorm = nn.RMSNorm(config.hidden_size, eps=eps)
            block.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=eps)
        self.norm = nn.RMSNorm(config.hidden_size, eps=eps)
        if embedding := getattr(config, "quest_rows", {}).get("embedding"):
            self.embed_tokens = QuestEmbedding(config.vocab_size, config.hidden_size, QuantSpec.parse(embedding))
        for name, specs in config.quest.items():
            parent, _, child = name.removeprefix("model.").rpartition(".")
            linear = getattr(self.get_submodule(parent), child)
            setattr(self.get_submodule(parent), child, QuestLinear(linear.in_features, linear.out_features, specs))


class QuestLlamaForCausalLM(QuestLlamaPreTrainedModel, LlamaForCausalLM):
    """`LlamaForCausalLM` on a `QuestLlamaModel`."""

    def __init__(self, config: QuestLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = QuestLlamaModel(config)
        self.vocab_size = config.vocab_size
        head = getattr(config, "quest_rows", {}).get("head")
        self.lm_head: nn.Module
        if getattr(config, "quest_tied", False):
            self.lm_head = QuestTiedHead(self.model.embed_tokens)
        elif head:
            specs = {"weights": head, "activations": "bf16", "unrotate": True}
            self.lm_head = QuestLinear(config.hidden_size, config.vocab_size, specs)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
