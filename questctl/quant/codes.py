"""Quantized values as codes: the index of a level in rising order, packed to 1 to 4 bits where a row fills whole bytes.

    q (…, K) → index → codes (…, K·b/8);     y = s·level[index] + b

Packed codes are in the planar layout of kernels/pack.py, as the odd code 2·index + 1 − 2^b. Grids of more than 16 levels take
one byte a code, of more than 256 levels two. `RowCodes` are rows that are stored and read one by one: tokens' vectors of the
embedding, keys and values of a cache.

K values of a row, b bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .components import memo
from .quantizer import Quantizer
from .spec import QuantSpec


def stored_levels(spec: QuantSpec) -> tuple[float, ...]:
    """The values that a stored weight can have, in units of its scale and rising order; with a sparsity mask 0 is included."""
    levels = spec.grid.levels
    return tuple(sorted({*levels, 0.0})) if spec.sparsity else levels


@memo
def levels_of(spec: QuantSpec, device: torch.device) -> torch.Tensor:
    """The levels of a spec, fp32 and in rising order."""
    with torch.inference_mode(False):
        return torch.tensor(stored_levels(spec), dtype=torch.float32, device=device)


def bits_of(levels: torch.Tensor) -> int:
    """The bits of a code for so many levels."""
    return max(1, math.ceil(math.log2(len(levels))))


def packs(bits: int, width: int) -> bool:
    """Whether codes are packed: those of up to 4 bits are, if rows of `width` fill whole bytes."""
    from ..kernels.pack import PLANES

    return bits in PLANES and width * min(PLANES[bits]) % 8 == 0


def encode(q: torch.Tensor, levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels (…, K) → their codes: uint8 (…, K·b/8), or (…, K) in one or two bytes a code."""
    index = torch.bucketize(q.contiguous(), levels)
    assert torch.equal(levels[index], q)
    if not packs(bits, q.shape[-1]):
        return index.to(torch.uint8 if bits <= 8 else torch.int16)
    from ..kernels.pack import pack

    odd = (2 * index + 1 - 2**bits).to(torch.int8)
    return pack(odd.flatten(0, -2), bits).view(*q.shape[:-1], -1)


def decode(codes: torch.Tensor, levels: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Codes (…, K·b/8) of rows of `width` → their levels (…, K)."""
    index = codes.int()
    if packs(bits, width):
        from ..kernels.pack import unpack

        index = (unpack(codes.flatten(0, -2), bits, width).int() + 2**bits - 1) >> 1
    return levels[index].view(*codes.shape[:-1], width)


class RowCodes(NamedTuple):
    """Rows as codes (…, K·b/8), and their scales and offsets (…, G), one for each group of a row; None without offsets."""

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None

    @classmethod
    def of(cls, x: torch.Tensor, quantizer: Quantizer) -> RowCodes:
        """The codes of x (…, K), rounded as `quantizer` rounds; its scales are those of rows or of groups of their values."""
        q, s, b = quantizer.rounded(x)
        levels = levels_of(quantizer.spec, x.device)
        codes = encode(q.reshape(x.shape).to(levels.dtype), levels, bits_of(levels))
        by_group = (*x.shape[:-1], -1)
        return cls(codes, s.reshape(by_group), None if b is None else b.reshape(by_group))

    def values(self, spec: QuantSpec, width: int) -> torch.Tensor:
        """The quantized rows (…, K) in their own basis, with the bits of `Quantizer.in_its_basis`; dtype of the scale."""
        assert spec.scale is not None
        levels = levels_of(spec, self.codes.device)
        q = decode(self.codes, levels, bits_of(levels), width)
        s, b = ((t.unsqueeze(-1) if spec.scale.group and t is not None else t) for t in (self.scale, self.offset))
        assert s is not None
        y = spec.scale.share(q) * s
        y = (y if b is None else y + b).view(q.shape)
        return spec.basis.unrotate(y) if spec.basis else y

    def each(self, f: Callable[[torch.Tensor], torch.Tensor]) -> RowCodes:
        """`f` of codes, scales and offsets."""
        return RowCodes(f(self.codes), f(self.scale), None if self.offset is None else f(self.offset))
