"""Packed layers for inference, which store the weight as codes with scales in place of the full-precision weight.

    W (N, K) → codes uint8 (N, K·b/8), scale fp32;    y = Q_x(x) · (scale·level[code])ᵀ

A code is the index of a level of the weight's grid, in rising order (codes.py; with a sparsity mask, 0 is a level, too). The
levels of an entropy-coded grid are numbered like any others; the entropy code itself is not written. There are three ways to
multiply:

    values    any spec                       the values of the weight, computed from the codes at each use
    integers  both operands on int grids     exact int32 sums, then the fp32 scales
              (weights to 4 bits, inputs to 7, dense, centred, one scale per row or tensor)
    bytes     as integers                    the same sums; each weight is also kept as one byte a code, which saves the
                                             unpacking in every product and takes more memory

The codes of weights and inputs are those that the unpacked layer rounds to. By values, the output is the same to the last bit,
also in bf16. By integers, the sum is exact, so the output is the same on every device and with any number of threads. It
differs in its last bits from the floating-point sum; a later quantizer then rounds a few inputs in a million differently, and
the loss changes in its sixth digit.

On a GPU the one-pass kernel computes the integers of an input if it supports their spec (`fused.settings`), together with the
RMSNorm or SiLU·mul before it (fusable.py). It sums in another order, which also changes a few integers in a million. Up to 64
rows are multiplied by the packed bytes themselves (kernels/gemv.py). Layers that share an input then take one product, since
the rows of their weights are stored below each other. For more rows, each weight is expanded to one byte a code for its
product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import nn

from .by_row import QuantEmbedding
from .codes import RowCodes, bits_of, decode, encode, packs, stored_levels
from .fusable import FusableInput, value_of
from .fused import Settings, in_one_pass, product_dtype, settings
from .grids import Int
from .layer_specs import STAGES
from .linear import QuantLinear, TakesQuantized, replace_modules, rotated_back
from .quantizer import Quantizer
from .spec import QuantSpec

if TYPE_CHECKING:
    from ..kernels.int_gemm import Prepacked

Product = Literal["values", "integers", "bytes"]
Kernels = Literal["auto", "fused", "reference"]  # how inputs of integer products are quantized; auto: fused on a GPU
PACKED_BITS, INPUT_BITS = 4, 7  # most bits of codes that kernels/pack.py packs, and of odd codes in an int8


class Codes(NamedTuple):
    """A quantized input: odd codes int8 (…, K) and scale fp32 (…, 1); its value is scale·code."""

    codes: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype  # of the product


class Exact(nn.Module):
    """A module whose buffers move with it, but keep their dtype when it is converted."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class Rows(Exact):
    """The stored rows of one weight, or of the weights of several layers below each other, which these layers share."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        self._expanded: torch.Tensor | Prepacked | None = None
        self.register_load_state_dict_post_hook(_forget)

    def expanded(self, bits: int, width: int) -> torch.Tensor | Prepacked:
        """One byte a code (N, K), in the fastest layout for products on this device; computed at the first use and kept."""
        from ..kernels.int_gemm import prepack
        from ..kernels.pack import unpack

        if self._expanded is None:
            self._expanded = prepack(unpack(self.codes, bits, width))
        return self._expanded

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        _forget(self)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_expanded": None}


def _forget(rows: Rows, *_: object) -> None:
    rows._expanded = None


class PackedLinear(TakesQuantized, Exact):
    """A `QuantLinear` without its full-precision weight, made by `freeze`; not differentiable.

    Converted to another dtype, it computes in that dtype; codes, levels and scales stay as they are.
    """

    levels: torch.Tensor

    def __init__(self, layer: QuantLinear, product: Product = "values", kernels: Kernels = "auto") -> None:
        """Store the rounded weight of `layer`, whose spec is not bf16. If its specs do not allow `product`: by values."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight_spec, self.input_quantizer = layer.weight_quantizer.spec, layer.input_quantizer
        self.dtype, self.kernels = layer.weight.dtype, kernels
        self.bias, self.rotates_back, self.shared = layer.bias, layer.rotates_back, layer.shared
        rounded = layer.weight_quantizer.rounded(layer.matrix)
        odd = _has_odd_codes(self.weight_spec, PACKED_BITS)
        per_unit = 2 if odd else 1  # odd codes count half steps, and the scale is that of half a step
        levels = torch.tensor(stored_levels(self.weight_spec), dtype=rounded.s.dtype, device=rounded.s.device)
        self.register_buffer("levels", levels * per_unit, persistent=False)
        self.bits = bits_of(levels)
        exact = odd and _has_odd_codes(self.input_quantizer.spec, INPUT_BITS)
        self.product_by: Product = product if exact and self.packs else "values"
        scale = rounded.s / per_unit
        if self.product_by != "values":  # the product takes one scale a row, also if all rows share it
            scale = scale.view(-1, 1).expand(self.out_features, 1).contiguous()
        self.rows, self.own = Rows(self._encode(rounded.q * per_unit), scale, rounded.b), slice(None)
        self.settings = settings(self.input_quantizer.spec, self.in_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.levels.device)).dtype
        return super()._apply(fn, recurse)

    @property
    def packs(self) -> bool:
        """Whether the codes are packed: those of up to 4 bits are, if their rows fill whole bytes."""
        return packs(self.bits, self.in_features)

    @property
    def codes(self) -> torch.Tensor:
        """The stored codes: uint8 (N, K·b/8), or (N, K) in one or two bytes a code."""
        return self.rows.codes[self.own]

    @property
    def scale(self) -> torch.Tensor:
        """The stored scales, fp32: (N, 1) for a product by integers, else as the spec of the weight has them."""
        return self.rows.scale[self.own]

    def _encode(self, q: torch.Tensor) -> torch.Tensor:
        """Levels in any view of (N, K) → the stored codes."""
        return encode(q.reshape(self.out_features, self.in_features), self.levels, self.bits)

    def values(self) -> torch.Tensor:
        """The weight (N, K) in its original dtype and in the basis of the input."""
        assert self.weight_spec.scale is not None
        y = decode(self.codes, self.levels, self.bits, self.in_features)
        y = (self.weight_spec.scale.share(y) if self.product_by == "values" else y).mul_(self.scale)
        if self.rows.offset is not None:
            y.add_(self.rows.offset)
        y = y.view(self.out_features, self.in_features).to(self.dtype)
        return rotated_back(y, self.weight_spec) if self.rotates_back else y

    @property
    def one_pass(self) -> Settings | None:
        """The settings of the input if a kernel computes its integers."""
        fused = self.kernels == "fused" or (self.kernels == "auto" and self.codes.is_cuda)
        return self.settings if fused and self.product_by != "values" else None

    def quantize_input(self, x: torch.Tensor | FusableInput) -> torch.Tensor | Codes:
        """x (…, K) → values, or codes for a product by integers."""
        if self.product_by == "values":
            y: torch.Tensor = self.input_quantizer(value_of(x))
            return y
        return Codes(*odd_codes(self.input_quantizer, x, self.one_pass), product_dtype(x))

    def product(self, x: torch.Tensor | Codes) -> torch.Tensor:
        """The result of `quantize_input` → y (…, N)."""
        if isinstance(x, torch.Tensor):
            return super().product(x)
        return self.finish_output(self._multiply(x, self.own))

    def products(self, x: torch.Tensor | Codes, layers: Sequence[TakesQuantized]) -> list[torch.Tensor]:
        """One product if the layers share their rows, except for packed bytes with many rows of x."""
        if isinstance(x, torch.Tensor):
            return super().products(x, layers)
        together = all(isinstance(m, PackedLinear) and m.rows is self.rows for m in layers)
        if not together or (self.product_by == "integers" and not _few(x)):
            return [layer.product(x) for layer in layers]
        y = self._multiply(x, slice(None))
        return [m.finish_output(y[..., m.own]) for m in layers if isinstance(m, PackedLinear)]

    def _multiply(self, x: Codes, own: slice) -> torch.Tensor:
        from ..kernels.gemv import packed_gemm
        from ..kernels.int_gemm import int_gemm

        if self.product_by == "bytes" and not (x.codes.is_cuda and _few(x)):
            rows = self.rows
            return int_gemm(x.codes, rows.expanded(self.bits, self.in_features), x.scale, rows.scale, x.dtype)[..., own]
        return packed_gemm(x.codes, self.rows.codes[own], x.scale, self.rows.scale[own], self.bits, x.dtype)

    def shares_input_with(self, other: nn.Module) -> bool:
        """As for other layers; in addition both must multiply in the same way."""
        return super().shares_input_with(other) and isinstance(other, PackedLinear) and other.product_by == self.product_by

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(b.numel() * b.element_size() for b in (self.codes, self.scale, self.rows.offset) if b is not None)

    def extra_repr(self) -> str:
        """Shape, specs and kind of product, as `print(model)` shows them."""
        specs = f"weights={self.weight_spec}, activations={self.input_quantizer.spec}, product_by={self.product_by}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {specs}"


class PackedEmbedding(Exact):
    """A `QuantEmbedding` as codes: rows are decoded when they are looked up; not differentiable."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        self.spec, self.width, self.dtype = embedding.weight_quantizer.spec, embedding.embedding_dim, embedding.weight.dtype
        for name, value in RowCodes.of(embedding.weight, embedding.weight_quantizer)._asdict().items():
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    @property
    def rows(self) -> RowCodes:
        """The stored rows."""
        return RowCodes(self.codes, self.scale, self.offset)

    def values(self) -> torch.Tensor:
        """The quantized weight (V, D)."""
        return self.rows.values(self.spec, self.width).to(self.dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (…) → (…, D)."""
        return self.rows.each(lambda t: t[tokens]).values(self.spec, self.width).to(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(b.numel() * b.element_size() for b in (self.codes, self.scale, self.offset) if b is not None)

    def extra_repr(self) -> str:
        """Shape and spec, as `print(model)` shows them."""
        return f"{len(self.codes)}, {self.width}, weights={self.spec}"


def odd_codes(
    quantizer: Quantizer, x: torch.Tensor | FusableInput, how: Settings | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (…, K) on an int grid of up to 7 bits → odd codes int8 (…, K) and fp32 scale (…, 1), value = scale·code.

    They are the codes that `quantizer` rounds to. With its settings `how` a kernel computes them; it may round values within a
    few fp32 steps of a threshold differently.
    """
    if how is not None:
        codes, scale, *_ = in_one_pass(x, how, mask=False)
        return codes, scale
    value = value_of(x)
    q, s, _ = quantizer.rounded(value)  # levels ±½, ±1½, …
    return (q * 2).to(torch.int8).view(value.shape), (s / 2).expand(*value.shape[:-1], 1).contiguous()


def _few(x: Codes) -> bool:
    """Whether x has so few rows that a GPU multiplies by the packed bytes themselves."""
    from ..kernels.gemv import SKINNY_ROWS

    return x.codes.shape[:-1].numel() <= SKINNY_ROWS


def _has_odd_codes(spec: QuantSpec, bits: int) -> bool:
    """Whether the codes are odd integers: an int grid of at most `bits` bits around zero, dense, one scale a row or tensor."""
    if not isinstance(spec.grid, Int) or spec.grid.b > bits or spec.sparsity or spec.scale is None:
        return False
    return not spec.scale.group and not spec.scale.centred


def freeze(model: nn.Module, product: Product = "values", kernels: Kernels = "auto") -> nn.Module:
    """Replace every `QuantLinear` with a quantized weight by a `PackedLinear` for inference, in place; returns the model.

    A `QuantEmbedding` becomes a `PackedEmbedding`.

    Layers multiply by `product` if their specs allow it, else by values. Layers that quantize only their inputs stay as they
    are. `kernels` is how inputs of products by integers are quantized: auto, fused or reference; specs that the kernel does not
    support are quantized by the formula.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear) and not m.weight_quantizer.spec.is_identity]
    by: dict[nn.Module, nn.Module] = {layer: PackedLinear(layer, product, kernels) for layer in layers}
    replace_modules(model, by | {m: PackedEmbedding(m) for m in model.modules() if isinstance(m, QuantEmbedding)})
    for block in model.modules():
        for names in STAGES:
            join([m for name in names if isinstance(m := getattr(block, name, None), PackedLinear)])
    return model


def join(layers: Sequence[PackedLinear]) -> None:
    """Store the rows of layers that share an input below each other, if one product can compute all their outputs."""
    if len(layers) < 2 or layers[0].product_by == "values":
        return
    if not all(layers[0].shares_input_with(layer) and layer.bits == layers[0].bits for layer in layers):
        return
    rows = Rows(torch.cat([layer.codes for layer in layers]), torch.cat([layer.scale for layer in layers]))
    stop = 0
    for layer in layers:
        start, stop = stop, stop + layer.out_features
        layer.rows, layer.own = rows, slice(start, stop)


class PackedSize(NamedTuple):
    """The size of all packed layers of a model."""

    layers: int
    by_integers: int  # layers that multiply by integers
    bytes: int  # stored: codes, scales, offsets
    bf16_bytes: int  # of the same weights in bf16
    expanded_bytes: int = 0  # of the weights that are also kept as one byte a code

    def sentence(self) -> str:
        """How many layers were packed, into how many bytes, and how they are multiplied."""
        how = f"{self.by_integers} multiplied by integers, {self.layers - self.by_integers} by values"
        share = f"{self.bytes / self.bf16_bytes:.3f} of bf16"
        more = f"; {self.expanded_bytes / 1024:,.1f} KiB more as a byte a weight" if self.expanded_bytes else ""
        return f"{self.layers} layers packed in {self.bytes / 1024:,.1f} KiB, {share}; {how}{more}"


def packed_size(model: nn.Module) -> PackedSize:
    """The size of the packed layers of a model that `freeze` has packed."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    tables = [m for m in model.modules() if isinstance(m, PackedEmbedding)]
    return PackedSize(
        len(packed) + len(tables),
        sum(m.product_by != "values" for m in packed),
        sum(m.stored_bytes for m in packed) + sum(m.stored_bytes for m in tables),
        sum(2 * m.in_features * m.out_features for m in packed) + sum(2 * len(m.codes) * m.width for m in tables),
        sum(m.in_features * m.out_features for m in packed if m.product_by == "bytes"),
    )
