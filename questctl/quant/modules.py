"""Quantize the linear layers of any torch module: swap them, calibrate them, pack them, and say what each one is.

    quantize_(module, "quest", bits=2)      y = Q_x(x)·Q_w(W)ᵀ + b in place of y = x·Wᵀ + b
    calibrate_(module, batches)             learned scales from data
    freeze_(module)                         codes and scales in place of the full-precision weights
    describe(module)                        one line a layer

A swapped layer keeps its parameters, so that optimizers and checkpoints stay valid. It computes the function of the plain layer
up to the error of the rounding: a quantized weight whose input is not rotated is rotated back (linear.py).

Layers that are left as they are: those outside `include` or in `exclude`; the output head of a language model (`lm_head`, or
what `get_output_embeddings` returns), which keeps full precision as in torchao and ModelOpt; layers that share their weight
with an embedding; and layers that are not called like a plain linear layer. A head or a shared weight is quantized only if
`include` or `overrides` has its exact name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..config import LayerQuant, QuantConfig
from ..errors import UsageError, unknown
from .layer_specs import matching, specs_by_name, with_block_that_fits
from .linear import QuantConv1D, QuantLinear, SharedInput, calibrate_scales, replace_modules
from .methods import METHODS, label_specs, method_specs
from .packed import Kernels, PackedLinear, Product, freeze
from .spec import QuantSpec

M = TypeVar("M", bound=nn.Module)
Override = str | Mapping[str, str] | LayerQuant
HEAD = "lm_head"
SHARES = "shares its weight with"
SIBLINGS = (  # names of layers in attention and gated feed-forward modules that get the same input
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("gate", "up"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
BLOCK = 128  # of rotations, as in arXiv 2502.05003


def quantize_(
    module: M,
    quant: QuantConfig | str = "quest",
    bits: float | str | None = None,
    *,
    activations: str | None = None,
    gradients: str = "bf16",
    overrides: Mapping[str, Override] | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    block: int = BLOCK,
    strict: bool = False,
) -> M:
    """Replace linear layers of `module` by quantized ones, in place; returns the module.

    Layers are `nn.Linear` and `transformers.pytorch_utils.Conv1D`. Patterns are those of `quant.overrides`: globs on the dotted
    names of `module.named_modules()`, such as `*.mlp.*`, in which `*` also stands for dots.

    Args:
        module: Any module with linear layers inside.
        quant: A method with `bits` ("quest"), a label ("quest-w4a8"), a spec for weights and inputs ("int4-h64-rms-trust"), or
            a QuantConfig, which says all that the section [quant] of a config can say.
        bits: Bits of the method: 1 to 8, "ternary" or "fp4".
        activations: Method, label or spec of the layers' inputs. Default: that of `quant`; "bf16" leaves them unquantized.
        gradients: Spec of the gradients of the outputs.
        overrides: Pattern → what `quant` may be, or a mapping with `weights` and `activations`, or a LayerQuant. An exact name
            wins over a pattern.
        include: Patterns of the layers to quantize.
        exclude: Patterns of the layers to leave unquantized.
        block: Rotation block of methods and labels.
        strict: Refuse a rotation block that does not divide a width. Otherwise the largest power of two from 16 on that divides
            the width replaces it, or no rotation, with one warning for each width.

    Raises:
        UsageError: A method, spec or number is not allowed; a pattern matches no layer; two patterns disagree; a spec does not
            fit a layer; or no layer is left. The module is then unchanged.
    """
    config = _config(quant, bits, activations, gradients, overrides or {}, block)
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        raise UsageError("quantize_: the module is a linear layer itself; give the module that holds it, or nn.Sequential(it).")
    layers, left = _candidates(module, {*_patterns(include), *config.overrides})
    chosen = _chosen(layers, left, _patterns(include), _patterns(exclude))
    specs = specs_by_name([name for name in layers if name in chosen], config)
    notes = [f"{name} {why} and stays as it is" for name, why in left.items() if why and name in chosen]
    notes = [note + "; its exact name in include quantizes the layer" * (SHARES in note) for note in notes]
    swapped: dict[nn.Module, nn.Module] = {}
    fallen: dict[str, list[str]] = {}
    for name, (weights, inputs) in specs.items():
        k, n = _widths(layers[name])
        fitted = []
        for spec, width in ((weights, k), (inputs, k), (config.gradients, n)):
            own = spec if strict else with_block_that_fits(spec, width)
            if own != spec:
                instead = f"h{own.rotation}" if own.rotation else "no rotation"
                what = f"rotation h{spec.rotation} does not divide the width {width}: {instead} instead"
                fallen.setdefault(what, []).append(name)
            fitted.append(own)
        if not all(spec.is_identity for spec in fitted):
            swapped[layers[name]] = _quantized(layers[name], *fitted, name=name)
    for what, names in fallen.items():
        first, *others = dict.fromkeys(names)
        notes.append(f"{what} in {first}" + (f" and {len(others)} more" if others else ""))
    learned = [m for m in swapped.values() if isinstance(m, QuantLinear) and m.input_quantizer.scale is not None]
    if learned:
        notes.append(
            f"the learned scales of the inputs of {len(learned)} layers suit normal inputs of size 1 so far; "
            "questctl.calibrate_(module, batches) sets them from data"
        )
    for note in notes:
        warnings.warn(f"quantize_: {note}.", stacklevel=2)
    replace_modules(module, swapped)
    _share_inputs(module)
    _leave_fast_paths(module)
    return module


def calibrate_(module: M, batches: Iterable[Any]) -> M:
    """Set all learned scales and offsets of the quantized layers from data, in place; returns the module.

    Those of a weight become the optimum for that weight. Those of an input become the mean over `batches` of the optimum for
    the layer's input. Without learned scales nothing is computed. Call it before DistributedDataParallel wraps the module,
    which then gives all processes the same scales.

    Args:
        module: A module that `quantize_` has changed.
        batches: A few batches of the training data: a mapping holds keyword arguments of the module, a tuple or list its
            arguments, anything else is its one argument. The module is in evaluation mode meanwhile and records no gradients.

    Raises:
        UsageError: `batches` is a single batch or empty, or the module is wrapped already.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise UsageError("calibrate_: the module is wrapped in DistributedDataParallel; calibrate it before that.")
    if isinstance(batches, torch.Tensor | Mapping):
        raise UsageError(f"calibrate_: batches is one {type(batches).__name__}; give a list of batches, such as [batch].")
    modes = {m: m.training for m in module.modules()}
    module.eval()
    count, sums = 0, dict[str, torch.Tensor]()
    try:
        for batch in batches:
            named = dict(batch) if isinstance(batch, Mapping) else {}
            positional = () if named else tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            for name, value in calibrate_scales(module, *positional, **named).items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
    finally:
        for m, training in modes.items():
            m.training = training
    if not count:
        raise UsageError("calibrate_: batches is empty; give a few batches of the training data.")
    with torch.no_grad():
        for name, total in sums.items():
            module.get_parameter(name).copy_(total / count)
    return module


def freeze_(module: M, product: Product = "values", kernels: Kernels = "auto") -> M:
    """Pack the quantized layers of `module` for inference, in place; returns the module.

    The full-precision weights are dropped. Outputs are the same to the last bit; with `product` "integers" or "bytes", layers
    whose specs allow it multiply by exact integers instead (see packed.py). Raises UsageError if no layer is quantized.
    """
    if not any(isinstance(m, QuantLinear) for m in module.modules()):
        raise UsageError(f"freeze_: {type(module).__name__} has no quantized layer; call questctl.quantize_(module, …) first.")
    freeze(module, product, kernels)
    return module


@dataclass(frozen=True)
class LayerDescription:
    """One linear layer: the shape (N, K) of its weight, its specs, and the bits that store a weight."""

    layer: str
    outputs: int
    inputs: int
    state: str  # plain, quantized or packed
    weights: str
    activations: str
    bits: float  # by the spec, with scales of groups but not of rows; if packed, all that is stored


@dataclass(frozen=True, repr=False)
class ModuleDescription:
    """The linear layers of a module; its text is a table."""

    layers: tuple[LayerDescription, ...]

    @property
    def bits(self) -> float:
        """Mean stored bits per weight of all these layers."""
        return sum(x.bits * x.outputs * x.inputs for x in self.layers) / max(1, sum(x.outputs * x.inputs for x in self.layers))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"bits": self.bits, "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        cells = [(x.layer, f"{x.outputs}×{x.inputs}", x.state, x.weights, x.activations, f"{x.bits:.4g}") for x in self.layers]
        rows = [("layer", "weight", "state", "weights", "activations", "bits"), *cells]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        low = sum(x.state != "plain" for x in self.layers)
        return "\n".join([*lines, f"{low} of {len(self.layers)} linear layers quantized, {self.bits:.4g} bits a weight in all"])

    __repr__ = __str__


def describe(module: nn.Module) -> ModuleDescription:
    """The linear layers of `module`, plain, quantized and packed, with their specs and stored bits.

    `print` shows a table with one line a layer; `to_json` gives the same as values.
    """
    layers = []
    for name, m in module.named_modules():
        if isinstance(m, PackedLinear):
            shape, bits = (m.out_features, m.in_features), 8 * m.stored_bytes / (m.out_features * m.in_features)
            layers.append(LayerDescription(name, *shape, "packed", str(m.weight_spec), str(m.input_quantizer.spec), bits))
        elif isinstance(m, QuantLinear):
            spec, inputs = m.weight_quantizer.spec, m.input_quantizer.spec
            bits = _plain_bits(m) if spec.is_identity else spec.bits
            layers.append(LayerDescription(name, m.out_features, m.in_features, "quantized", str(spec), str(inputs), bits))
        elif isinstance(m, nn.Linear) or _is_conv1d(m):
            k, n = _widths(m)
            dtype = str(_weight(m).dtype).removeprefix("torch.")
            layers.append(LayerDescription(name, n, k, "plain", dtype, "", _plain_bits(m)))
    return ModuleDescription(tuple(layers))


# --- requests ---------------------------------------------------------------------------------------------------------


def _config(
    quant: QuantConfig | str,
    bits: float | str | None,
    activations: str | None,
    gradients: str,
    overrides: Mapping[str, Override],
    block: int,
) -> QuantConfig:
    """The arguments of `quantize_` as the section [quant] of a config."""
    if isinstance(quant, QuantConfig):
        if bits is not None or activations is not None or gradients != "bf16" or overrides:
            raise UsageError("quant: a QuantConfig says all itself; leave bits, activations, gradients and overrides out.")
        return quant
    weights, inputs = _specs(quant, bits, block, key="quant")
    if activations is not None:
        inputs = _specs(activations, bits if activations in METHODS else None, block, key="activations")[1]
    by_pattern = {p: _override(o, block, key=f"overrides: '{p}'") for p, o in overrides.items()}
    parsed = QuantSpec.parse(gradients, key="gradients", operand="gradients")
    return QuantConfig(weights=weights, activations=inputs, gradients=parsed, overrides=by_pattern)


def _override(override: Override, block: int, *, key: str) -> LayerQuant:
    if isinstance(override, LayerQuant):
        return override
    if isinstance(override, str):
        weights, inputs = _specs(override, None, block, key=key)
        return LayerQuant(weights=weights, activations=inputs)
    if wrong := override.keys() - LayerQuant.model_fields:
        raise UsageError(unknown(key, min(wrong), LayerQuant.model_fields, what="key"))
    return LayerQuant(**{side: QuantSpec.parse(text, key=key, operand=side) for side, text in override.items()})


def _specs(text: str, bits: float | str | None, block: int, *, key: str) -> tuple[QuantSpec, QuantSpec]:
    """The specs of weights and activations that a method with its bits, a label or a spec stands for."""
    if text in METHODS:
        if bits is None and len(METHODS[text].bits) > 1 and text != "bf16":
            raise UsageError(f"{key}: '{text}' needs bits, such as quantize_(module, '{text}', bits=4) or '{text}-w4a4'.")
        w, a = method_specs(text, bits, block=block)
    elif bits is not None and "-" in text:
        raise UsageError(
            f"{key}: '{text}' says its bits itself; leave bits={bits} out, or name a method: {', '.join(METHODS)}."
        )
    elif bits is not None:
        raise UsageError(unknown(key, text, METHODS, what="method"))
    else:
        try:
            spec = QuantSpec.parse(text, key=key)
            return spec, QuantSpec.parse(text, key=key, operand="activations")
        except UsageError as e:
            pair = label_specs(text, block)
            if pair is None:
                raise (e if "-" in text else UsageError(unknown(key, text, METHODS, what="method"))) from None
            w, a = pair
    return QuantSpec.parse(w, key=key), QuantSpec.parse(a, key=key, operand="activations")


def _patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


# --- layers -----------------------------------------------------------------------------------------------------------


def _chosen(
    layers: Mapping[str, nn.Module], left: Mapping[str, str], include: Sequence[str], exclude: Sequence[str]
) -> set[str]:
    """The names that `include` and not `exclude` matches. Raises UsageError if none of `layers` is among them."""
    for name in include:
        if left.get(name):
            raise UsageError(f"include: {name} {left[name]} and cannot be quantized.")
    if not layers:
        reasons = "".join(f"; {name} {why}" for name, why in left.items() if why)
        raise UsageError(f"quantize_: the module has no linear layer that can be quantized{reasons}.")
    chosen = {name for pattern in include for name in matching({**layers, **left}, pattern, key="include")}
    chosen -= {name for pattern in exclude for name in matching({**layers, **left}, pattern, key="exclude")}
    if not chosen & layers.keys():
        raise UsageError(f"quantize_: include={list(include)} without exclude={list(exclude)} leaves no layer to quantize.")
    return chosen


def _candidates(module: nn.Module, named: set[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that can be quantized, by their first name; and those that are left as they are, with a clause that says why.

    The clause is empty for heads and for layers that are quantized already, which need no explanation.
    """
    modules = dict(module.named_modules())
    linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | PackedLinear) or _is_conv1d(m)}
    owners: dict[int, str] = {}
    for name, m in modules.items():
        for p in m.parameters(recurse=False):
            if name not in linears:
                owners.setdefault(id(p), name)
    heads = {id(m.get_output_embeddings()) for m in modules.values() if callable(getattr(m, "get_output_embeddings", None))}
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, m in linears.items():
        if isinstance(m, QuantLinear | PackedLinear):
            left[name] = ""
        elif reason := _own_way(m):
            left[name] = reason
        elif id(_weight(m)) in owners and name not in named:
            left[name] = f"{SHARES} {owners[id(_weight(m))]}"
        elif (id(m) in heads or name.rpartition(".")[2] == HEAD) and name not in named:
            left[name] = ""
        else:
            layers[name] = m
    return layers, left


def _own_way(m: nn.Module) -> str:
    """Why a linear layer cannot be swapped, as a clause; '' if it can."""
    if isinstance(m, NonDynamicallyQuantizableLinear):
        return "is not called by its attention, which multiplies by its weight itself,"
    if isinstance(m, nn.Linear) and (type(m).forward is not nn.Linear.forward or "forward" in vars(m)):
        return f"is a {type(m).__name__} with a forward of its own"
    if not isinstance(m._parameters.get("weight"), nn.Parameter):
        return "computes its weight from other parameters"
    if isinstance(m.weight, nn.UninitializedParameter):
        return "has no weight before its first batch"
    return ""


def _quantized(m: nn.Module, weights: QuantSpec, inputs: QuantSpec, gradients: QuantSpec, *, name: str) -> QuantLinear:
    """The layer with quantized operands; learned scales train if its weight does."""
    cls = QuantConv1D if _is_conv1d(m) else QuantLinear
    layer = cls.from_linear(cast(nn.Linear, m), weights, inputs, gradients, rotate_back=True, name=name)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.requires_grad_(layer.weight.requires_grad)
    return layer


def _is_conv1d(m: nn.Module) -> bool:
    """Whether this is the transposed linear layer of transformers, which is not imported for that."""
    cls = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return cls is not None and isinstance(m, cls)


def _weight(m: nn.Module) -> torch.Tensor:
    weight = m.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _widths(m: nn.Module) -> tuple[int, int]:
    """Inputs K and outputs N."""
    if isinstance(m, nn.Linear):
        return m.in_features, m.out_features
    k, n = _weight(m).shape
    return k, n


def _plain_bits(m: nn.Module) -> float:
    return 8.0 * _weight(m).dtype.itemsize


def _share_inputs(module: nn.Module) -> None:
    """Let layers of one attention or feed-forward module that get the same input quantize it once."""
    for parent in module.modules():
        for names in SIBLINGS:
            layers = [m for name in names if isinstance(m := getattr(parent, name, None), QuantLinear)]
            quantized = len(layers) > 1 and not layers[0].input_quantizer.spec.is_identity
            if quantized and all(layers[0].shares_input_with(m) for m in layers):
                shared = SharedInput(len(layers))
                for layer in layers:
                    layer.shared = shared


def _leave_fast_paths(module: nn.Module) -> None:
    """Let torch's transformer layers call their swapped layers in evaluation; their fast path would use the plain weights."""
    for m in module.modules():
        if isinstance(m, nn.TransformerEncoderLayer) and any(isinstance(x, QuantLinear) for x in m.modules()):
            m.activation_relu_or_gelu = 0
        if isinstance(m, nn.TransformerEncoder) and any(isinstance(x, QuantLinear) for x in m.modules()):
            m.use_nested_tensor = False
