"""Extract the weights of a run for export: levels, scales and offsets of each layer, and the dense weight that they give.

    stored = s·q + b   (N, K), in the basis in which the layer multiplies;   dense = stored, rotated back into the basis of x

For a trained run, q, s and b are those of its quantizers, to the last bit. A run that was quantized after training stores only
rounded values, from which levels and scales are recovered: among the scales max|z|/L over the levels L, the first that puts
every value on the grid, refined by least squares, s = ⟨z, q⟩/⟨q, q⟩. (Any scale that does so represents the same values.)

N outputs, K inputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import RunConfig
from ..errors import UsageError
from ..models.llama import Llama
from ..quant.by_row import QuantEmbedding
from ..quant.grids import Uniform
from ..quant.linear import QuantLinear, replace_modules
from ..quant.quantizer import Quantizer
from ..quant.spec import IDENTITY, QuantSpec
from . import check

ON_GRID = 1e-3  # largest distance, in steps, at which a rounded weight in fp32 counts as being at a level


@dataclass(frozen=True)
class Codes:
    """Levels q, scales s and offsets b of y = s·q + b, in the view of `spec.scale.share`."""

    q: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    spec: QuantSpec
    shape: tuple[int, int]  # N, K

    def values(self) -> torch.Tensor:
        """y (N, K), by the operations of `Quantizer.forward`."""
        y = self.q * self.scale
        return (y if self.offset is None else y + self.offset).view(self.shape)

    def levels(self) -> torch.Tensor:
        """q (N, K)."""
        return self.q.reshape(self.shape)

    def row_scales(self) -> torch.Tensor:
        """s (N, G), one for each group of K/G neighbours; a scale of the whole tensor is repeated."""
        n, width = self.shape
        group = (self.spec.scale.group if self.spec.scale else 0) or width
        return self.scale.reshape(n, -1) if self.scale.numel() > 1 else self.scale.reshape(1, 1).expand(n, width // group)


@dataclass(frozen=True)
class Weight:
    """One layer: its codes, or, if its weight is not quantized, its values in the basis in which the layer multiplies."""

    layer: check.Layer
    stored: Codes | torch.Tensor
    dense: torch.Tensor  # (N, K) fp32, in the basis of x
    input_quantizer: Quantizer | None


@torch.no_grad()
def weights(model: Llama, config: RunConfig) -> dict[str, Weight]:
    """The linear layers of the blocks by name; `model` is the result of `load_model` for the run of `config`."""
    by_layer = {}
    for name, layer in check.layers(config).items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        own = module.weight.detach().float()
        inputs = module.input_quantizer if isinstance(module, QuantLinear) else None
        basis = layer.rotates
        stored: Codes | torch.Tensor | None
        if layer.weights.is_identity:
            stored, dense = basis.rotate(own) if basis else own, own
        elif config.ptq is None:
            assert isinstance(module, QuantLinear)
            q, s, b = module.weight_quantizer.rounded(own)
            stored = Codes(q, s, b, layer.weights, (module.out_features, module.in_features))
            dense = basis.unrotate(stored.values()) if basis else stored.values()
        else:
            z = basis.rotate(own) if basis else own
            stored, dense = recover(z, layer.weights), own
            stored = z if stored is None else stored
        by_layer[name] = Weight(layer, stored, dense, inputs)
    return by_layer


@torch.no_grad()
def tables(model: Llama) -> dict[str, Weight]:
    """Embedding (`embed`) and head (`head`) if they are quantized, with rows in the basis of their layer's input."""
    rows_of = {}
    for name in ("embed", "head"):
        module = model.get_submodule(name)
        if isinstance(module, QuantEmbedding | QuantLinear):
            spec, own = module.weight_quantizer.spec, module.weight.detach().float()
            stored = Codes(*module.weight_quantizer.rounded(own), spec, (own.shape[0], own.shape[1]))
            dense = spec.basis.unrotate(stored.values()) if spec.basis else stored.values()
            rows_of[name] = Weight(check.Layer(spec, IDENTITY, own.shape[1], spec.basis), stored, dense, None)
    return rows_of


def whole_numbers(name: str, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """k (N, K) int8 and d (N, G) fp32 with stored = d·k, where K/G neighbours share a scale.

    Raises UsageError for a layer whose levels could not be recovered.
    """
    if not isinstance(weight.stored, Codes):
        raise UsageError(
            f"export: layer {name}: its rounded weights are not on the grid of '{weight.layer.weights}' with one scale each; "
            "take a format of dequantized weights."
        )
    fits = check.whole(weight.layer.weights)
    assert fits is not None
    return (weight.stored.levels() * fits[0]).round().to(torch.int8), weight.stored.row_scales() / fits[0]


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by their code; eight more is the same with a minus


def block_floats(name: str, weight: Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0 … 15 (N, K) uint8, scales of groups e (N, G) and one of the tensor t () with stored = t·e·E2M1[code].

    t is 1 for MXFP4; for NVFP4 it puts the largest e on 448, and all e are E4M3. Raises UsageError if they are not.
    """
    spec = weight.layer.weights
    codes = weight.stored if isinstance(weight.stored, Codes) else None
    if codes is not None:
        q, s = codes.levels(), codes.row_scales()
        magnitude = torch.bucketize(q.abs(), torch.tensor(E2M1))
        t = (s.max() / 448).clamp_min(1e-30) if check.block_float(spec) == "nvfp4" else torch.ones(())
        e = s / t
        stored = e.to(torch.float8_e4m3fn).float() if check.block_float(spec) == "nvfp4" else e.log2().round().exp2()
        if torch.allclose(stored, e, rtol=1e-5, atol=0.0):
            return (magnitude + 8 * (q < 0)).to(torch.uint8), stored, t
    raise UsageError(
        f"export: layer {name}: its rounded weights are not on the grid of '{spec}' with scales of its format; take a format "
        "of dequantized weights."
    )


def recover(z: torch.Tensor, spec: QuantSpec) -> Codes | None:
    """Levels and scales of values (N, K) that were rounded to the grid of `spec`; None if no scale puts all of them on it."""
    assert spec.scale is not None
    few = isinstance(spec.grid, Uniform) or len(spec.grid.levels) <= 16
    if spec.scale.centred or not few:
        return None
    shared = spec.scale.share(z).double()
    peak = shared.abs().amax(dim=-1, keepdim=True)
    zero = shared.abs() <= ON_GRID * 1e-2 * peak  # pruned, or at level 0
    best, error = torch.zeros_like(peak), torch.full_like(peak, torch.inf)
    for level in sorted((x for x in spec.grid.levels if x > 0), reverse=True):
        s = peak / level
        u = shared / s.clamp_min(torch.finfo(s.dtype).tiny)
        off = (u - spec.grid.quantize(u).masked_fill(zero, 0.0)).abs().amax(dim=-1, keepdim=True)
        better = (off < ON_GRID) & (error >= ON_GRID)
        best, error = torch.where(better, s, best), torch.where(better, off, error)
    if bool((error >= ON_GRID).any()):
        return None
    q = spec.grid.quantize(shared / best.clamp_min(torch.finfo(best.dtype).tiny)).masked_fill(zero, 0.0)
    square = q.square().sum(dim=-1, keepdim=True)
    scale = torch.where(square > 0, (shared * q).sum(dim=-1, keepdim=True) / square.clamp_min(1e-300), best)
    return Codes(q.float(), scale.float(), None, spec, (z.shape[0], z.shape[1]))


@torch.no_grad()
def dense_model(model: Llama, layer_weights: dict[str, Weight]) -> Llama:
    """The network with dense weights in plain layers: the computation of formats without quantized inputs and cache."""
    state = {name: p.detach() for name, p in model.state_dict().items() if "_quantizer." not in name}
    state |= {f"{name}.weight": weight.dense for name, weight in {**layer_weights, **tables(model)}.items()}
    with torch.device("meta"):
        plain = Llama(model.config)
    plain.load_state_dict(state, assign=True)
    return plain


class _Stored(nn.Module):
    """y = Q(x)·storedᵀ: the product of a layer with the weight as it is stored, x (…, K) → y (…, N)."""

    def __init__(self, stored: torch.Tensor, input_quantizer: nn.Module | None) -> None:
        super().__init__()
        self.register_buffer("stored", stored)
        self.input_quantizer = input_quantizer or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = F.linear(self.input_quantizer(x), self.get_buffer("stored").to(x.dtype))
        return y


@torch.no_grad()
def model_in(model: Llama, layer_weights: Mapping[str, Weight], dtype: torch.dtype) -> Llama:
    """The run's own network computing in `dtype`, as an export of that dtype should; codes, scales and learned steps stay.

    Weights are quantized in fp32 and only then rounded. Input quantizers compute in fp32 on inputs that `dtype` has rounded.
    """
    own = copy.deepcopy(model)
    stored = {}
    for name, weight in layer_weights.items():
        if weight.layer.rotates and weight.layer.activations.is_identity:  # the weight is rotated back
            values = weight.dense
        else:
            values = weight.stored.values() if isinstance(weight.stored, Codes) else weight.stored
        stored[name] = _Stored(values, copy.deepcopy(weight.input_quantizer))
        own.set_submodule(name, nn.Identity())
    for name, table in tables(model).items():
        old = own.get_submodule(name)
        new = nn.Embedding.from_pretrained(table.dense) if name == "embed" else _Stored(table.dense, None)
        replace_modules(own, {old: new})
    own.to(dtype)
    for name, layer in stored.items():
        own.set_submodule(name, layer)
    return own
