"""Quantization of what a model reads row by row: the embedding, the head, and the keys and values of its attention.

    x_t = Q(E)[token]     logits = x·Q(W)ᵀ     o = attention(q, Q(turned k), Q(v))     Q(z) = s·round(z·H / s)·Hᵀ per row z

A row is a token's vector (D) in the embedding or head, or the vector (W) of one token and attention head in the KV cache. Its
scale follows from its values alone, so its quantized value does not depend on the rows that are read with it. A step therefore
rounds only the rows that its batch looks up, if these are fewer than the vocabulary, and decoding from a cache of codes
computes with the values that training saw. Rows are rotated back after rounding, because they meet others that are not rotated.

Training rounds at every use, as `QuantLinear` does, and gradients pass as the estimator of the spec says. For inference
`packed.PackedEmbedding` holds codes, and so does `models.llama.Cache`.

V tokens of the vocabulary, D width of the model, W width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import QuantConfig
from ..config.sections import TIED_HEAD
from ..errors import UsageError
from .codes import RowCodes
from .layer_specs import check_width
from .linear import QuantLinear, replace_modules
from .quantizer import Quantizer
from .spec import IDENTITY, QuantSpec


class QuantEmbedding(nn.Embedding):
    """An embedding (V, D) whose rows are quantized when they are looked up; training updates the full-precision weight."""

    def __init__(self, embedding: nn.Embedding, spec: QuantSpec) -> None:
        """Takes over the weight itself, not a copy. Raises UsageError if the spec does not fit the width."""
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight)
        check_width(spec, self.embedding_dim, where="quant.embedding")
        self.weight = embedding.weight
        self.weight_quantizer = Quantizer(spec)

    def values(self) -> torch.Tensor:
        """The quantized weight (V, D)."""
        return self.weight_quantizer.in_its_basis(self.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (…) → (…, D). The whole table is rounded if it has no more rows than there are tokens, else their rows."""
        if self.num_embeddings <= tokens.numel():
            return F.embedding(tokens, self.values())
        return self.weight_quantizer.in_its_basis(F.embedding(tokens, self.weight))

    def extra_repr(self) -> str:
        """Shape and spec, as `print(model)` shows them."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weights={self.weight_quantizer.spec}"


class Kept(nn.Module):
    """Keys or values (…, W) as a cache keeps them: x → Q(x)."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.input_quantizer = Quantizer(spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, W) → (…, W)."""
        return self.input_quantizer.in_its_basis(x)

    def encoded(self, x: torch.Tensor) -> RowCodes:
        """x (…, W) → its codes."""
        return RowCodes.of(x, self.input_quantizer)

    def decoded(self, rows: RowCodes, like: torch.Tensor) -> torch.Tensor:
        """The codes of x (…, W) → what `forward` makes of x, of the width and dtype of `like`."""
        return rows.values(self.input_quantizer.spec, like.shape[-1]).to(like.dtype)


def quantize_rows(model: nn.Module, quant: QuantConfig) -> None:
    """Quantize embedding, head, keys and values of a model of ours with the specs of `quant`, in place.

    Raises UsageError for a spec that does not fit its width, and for one of a tied head, which reads the embedding.
    """
    embed, head = model.get_submodule("embed"), model.get_submodule("head")
    by: dict[nn.Module, nn.Module] = {}
    if not quant.embedding.is_identity:
        assert isinstance(embed, nn.Embedding)
        by[embed] = QuantEmbedding(embed, quant.embedding)
    if not quant.head.is_identity:
        if not isinstance(head, nn.Linear):
            raise UsageError(TIED_HEAD)
        check_width(quant.head, head.in_features, where="quant.head")
        by[head] = QuantLinear.from_linear(head, quant.head, IDENTITY, rotate_back=True, name="head")
    replace_modules(model, by)
    if not quant.kv.is_identity:
        for block in model.get_submodule("blocks").children():
            check_width(quant.kv, int(block.head_width), where="quant.kv")  # type: ignore[arg-type]
            block.keys, block.values = Kept(quant.kv), Kept(quant.kv)
