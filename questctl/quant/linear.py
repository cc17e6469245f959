"""A linear layer with quantized weight and input.

    y = Q_x(x) · Q_w(W)ᵀ + b        x (…, K), W (N, K), y (…, N); the bias b (N,), if there is one, is not quantized

Both operands are quantized along K. With a rotation both are in the rotated basis, so that the rotations cancel in the product,
(xH)(WH)ᵀ = xWᵀ, and need not be undone. The cases in which only one operand is quantized or rotated:

| weights    | activations | the layer computes                                                                           |
|------------|-------------|----------------------------------------------------------------------------------------------|
| h128       | h128        | Q(xH)·Q(WH)ᵀ                                                                                 |
| h128       | bf16        | x·Q(WH)ᵀ: only the weight is rotated, a rotated parametrisation (weight-only runs of the paper) |
| bf16       | h128        | Q(xH)·(WH)ᵀ: the unquantized weight is rotated along, so that the product is that of x and W |
| h128       | other block | refused                                                                                      |

If only the weight is rotated, x is multiplied by WH, not by W. Training from random weights finds WH as well as W. Weights that
were trained without quantization must keep their meaning: with `rotate_back` the layer computes x·(Q(WH)·Hᵀ)ᵀ, which is x·Wᵀ up
to the error of the rounding.

Gradients are quantized on request (`quant.gradients`): the gradient g (…, N) of y becomes ĝ = Q_g(g·H)·Hᵀ before the two
products of the backward pass,

    ∂x = ĝ·Q_w(W)        ∂W = ĝᵀ·Q_x(x)

The gradient of the bias is the sum of g itself.
g is rounded once, along N, one row for each token. Both products take the same ĝ, and their other operands are those of the
forward pass, so that the noise in ĝ is the only difference. With `backward` "both" (`quant.backward`) both operands of each
product are rounded anew, along the dimension that the product sums over, as GPUs with block formats require (products.py).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UsageError
from . import fused, products
from .fusable import FusableInput, unaliased, value_of
from .layer_specs import check_fit, check_outputs
from .quantizer import Part, Quantizer
from .spec import IDENTITY, QuantSpec


class TakesQuantized:
    """A layer that can share its quantized input with others: `layer(x)` is `product(quantize_input(x))`."""

    input_quantizer: Quantizer
    bias: nn.Parameter | Any  # (N,) or None
    shared: SharedInput | None = None  # shared with layers that are called with the same tensor one after another
    watcher: Callable[[torch.Tensor], None] | None = None  # is called with every quantized input before it is multiplied

    @property
    def one_pass(self) -> fused.Settings | None:
        """The settings with which a fused kernel quantizes the input now; None if it is quantized by the formula."""
        raise NotImplementedError

    def quantize_input(self, x: torch.Tensor | FusableInput) -> Any:
        """x (…, K) → the quantized input, in the form that `product` takes.

        Layers that `shares_input_with` accepts take it, too.
        """
        raise NotImplementedError

    def product(self, x: Any) -> torch.Tensor:
        """The result of `quantize_input` → y (…, N)."""
        if self.watcher:
            self.watcher(x)
        return self.finish_output(self.multiply(x, self.values()))

    def multiply(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x (…, K), w (N, K) → x·wᵀ (…, N), as the layer computes it and its gradients."""
        return F.linear(x, w)

    def products(self, x: Any, layers: Sequence[TakesQuantized]) -> list[torch.Tensor]:
        """`[layer.product(x) for layer in layers]` for layers that share x, as one product with their weights concatenated."""
        for layer in layers:
            if layer.watcher:
                layer.watcher(x)
        weight, sizes = self.joined_values(layers)
        parts = F.linear(x, weight).split(sizes, dim=-1)
        return [layer.finish_output(y) for layer, y in zip(layers, parts, strict=True)]

    def joined_values(self, layers: Sequence[TakesQuantized]) -> tuple[torch.Tensor, list[int]]:
        """The quantized weights of several layers, one below the other, and the number of rows of each."""
        weights = [layer.values() for layer in layers]
        return torch.cat(weights), [len(w) for w in weights]

    def values(self) -> torch.Tensor:
        """The quantized weight (N, K), by which a quantized input is multiplied."""
        raise NotImplementedError

    def finish_output(self, y: torch.Tensor) -> torch.Tensor:
        """The product y (…, N), with the bias added."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def forward(self, x: torch.Tensor | FusableInput) -> torch.Tensor:
        """x (…, K) → y (…, N)."""
        if self.shared is None or not isinstance(x, torch.Tensor) or torch.compiler.is_compiling():
            return self.product(self.quantize_input(x))
        return self.product(self.shared.quantized(self, x))

    def shares_input_with(self, other: nn.Module) -> bool:
        """Whether `other` quantizes its input exactly as this layer does, without a parameter of its own."""
        return (
            type(other) is type(self)
            and isinstance(other, TakesQuantized)
            and self.input_quantizer.scale is None
            and other.input_quantizer.spec == self.input_quantizer.spec
        )


class SharedInput:
    """Keeps an input that was quantized for one of several layers, as long as another of them may be called with it.

    In models of this package `fan_out` calls such layers together. In others they are called one by one: the first quantizes
    the input, and the rest take its result if they get the same tensor, unchanged. A layer that is called again quantizes
    again, as in activation checkpointing. torch.compile does not need this: it computes equal expressions once.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._entry: tuple[weakref.ref[torch.Tensor], object, TakesQuantized, Any, list[TakesQuantized]] | None = None

    def quantized(self, layer: TakesQuantized, x: torch.Tensor) -> Any:
        """`layer.quantize_input(x)`, from memory if another layer has just computed it."""
        if x.is_inference() or (x.is_leaf and x.requires_grad):  # no version; may be in several backward passes
            return layer.quantize_input(x)
        state = x._version, torch.is_grad_enabled(), layer.one_pass
        entry = self._entry  # read once: replicas of a DataParallel module share this object
        if entry is not None:
            of, then, first, y, users = entry
            if of() is x and then == state and layer not in users and first.shares_input_with(cast(nn.Module, layer)):
                users.append(layer)
                if len(users) == self.layers:
                    self._entry = None
                return y
        y = layer.quantize_input(x)
        self._entry = weakref.ref(x, self._forget), state, layer, y, [layer]
        return y

    def _forget(self, of: weakref.ref[torch.Tensor]) -> None:
        if self._entry is not None and self._entry[0] is of:
            self._entry = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_entry": None}


class QuantLinear(TakesQuantized, nn.Linear):
    """A linear layer with quantized weight (N, K) and input (…, K). Training updates the full-precision weight and the bias."""

    transposed: ClassVar[bool] = False  # whether the weight is stored as (K, N)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weights: QuantSpec,
        activations: QuantSpec,
        gradients: QuantSpec = IDENTITY,
        *,
        bias: bool = False,
        rotate_back: bool = False,
        backward: str = "once",
        name: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises UsageError naming the layer if its widths or its two rotations do not fit.

        `rotate_back` matters where the weight alone is rotated: the quantized weight is rotated back, so that the layer
        computes x·Wᵀ up to the error of the rounding. Otherwise it computes x·(WH)ᵀ. `backward` "once" rounds the gradient of
        the output, "both" both operands of each product of the backward pass.
        """
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        check_fit(weights, activations, in_features, name=name)
        check_outputs(weights, gradients, out_features, backward=backward, name=name)
        self.weight_quantizer = Quantizer(weights, numel=in_features * out_features, rows=out_features)
        self.input_quantizer = Quantizer(activations)
        self.gradient_quantizer = Quantizer(gradients)
        self.rounds_both = backward == "both" and not gradients.is_identity
        self.rotates_weight_only = weights.is_identity and activations.rotation > 0
        self.rotates_back = rotate_back and activations.is_identity and weights.rotation > 0
        squares = weights.scale is not None and weights.scale.rows > 1
        self.keeps_weight = self.rounds_both and squares and not self.rotates_back  # rotated back it is on no grid
        self.fused: tuple[fused.Settings, fused.Settings] | None = None  # of input and weight, where both use the fused kernels
        self._kept: torch.Tensor | fused.Codes | Rows | None = None  # the quantized weight, within `quantized_once`
        self.beside: tuple[QuantLinear, ...] = ()  # of the first layer: all that `fan_out` last called together
        self.calibrate_weight()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weights: QuantSpec,
        activations: QuantSpec,
        gradients: QuantSpec = IDENTITY,
        *,
        rotate_back: bool = False,
        backward: str = "once",
        name: str = "linear",
    ) -> QuantLinear:
        """The same layer with quantized operands; it takes over the parameters themselves, not copies."""
        k, n = linear.weight.shape if cls.transposed else reversed(linear.weight.shape)
        how: dict[str, Any] = {"rotate_back": rotate_back, "backward": backward, "name": name}
        layer = cls(k, n, weights, activations, gradients, **how, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            quantizer.to(linear.weight.device)
        layer.calibrate_weight()
        return layer

    @property
    def matrix(self) -> torch.Tensor:
        """The full-precision weight as (N, K)."""
        return self.weight.T if self.transposed else self.weight

    def calibrate_weight(self) -> None:
        """Set a learned weight scale to the optimum for the present weight."""
        if not self.weight.is_meta:
            self.weight_quantizer.calibrate(self.matrix)

    @property
    def one_pass(self) -> fused.Settings | None:
        """The settings of the input, while gradients are enabled and the layer is fused."""
        return self.fused[0] if self.fused and torch.is_grad_enabled() else None

    def quantize_input(self, x: torch.Tensor | FusableInput) -> torch.Tensor | fused.Codes:
        """x (…, K) → Q_x(x) (…, K) as `product` takes it: values, or codes while a fused layer trains."""
        if how := self.one_pass:
            return fused.quantize(x, how)
        y: torch.Tensor = self.input_quantizer(value_of(x))
        return y

    def product(self, x: torch.Tensor | fused.Codes) -> torch.Tensor:
        """The result of `quantize_input` → y (…, N)."""
        if isinstance(x, torch.Tensor):
            return super().product(x)
        w = self.operand()
        assert isinstance(w, fused.Codes)
        return self.finish_output(fused.product(x, w))

    def products(self, x: torch.Tensor | fused.Codes, layers: Sequence[TakesQuantized]) -> list[torch.Tensor]:
        """Codes are multiplied layer by layer: these products are large enough to be efficient by themselves.

        So are operands that are rounded anew in the backward pass, each layer with draws of its own.
        """
        if isinstance(x, torch.Tensor) and not self.rounds_both:
            return super().products(x, layers)
        return [layer.product(x) for layer in layers]

    def joined_values(self, layers: Sequence[TakesQuantized]) -> tuple[torch.Tensor, list[int]]:
        """As for other layers; a tensor of them that `quantized_once` made is returned as it is."""
        rows = self._kept
        if isinstance(rows, Rows) and rows.layers == layers and torch.is_grad_enabled():
            return rows.whole, rows.sizes
        if not torch.compiler.is_compiling():
            self.beside = tuple(layer for layer in layers if isinstance(layer, QuantLinear))
        return super().joined_values(layers)

    def multiply(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """As for other layers; with `backward` "both", by `products.product`, which rounds the operands of the gradients."""
        if not self.rounds_both:
            return super().multiply(x, w)
        return products.product(x, w, self.gradient_quantizer, keeps_weight=self.keeps_weight)

    def values(self) -> torch.Tensor:
        """The quantized weight (N, K), in the basis of the input."""
        w = self.operand()
        assert isinstance(w, torch.Tensor)
        return w

    def operand(self) -> torch.Tensor | fused.Codes:
        """The quantized weight: values, or codes while a fused layer trains."""
        if self._kept is not None and torch.is_grad_enabled():
            return self._kept.of(self) if isinstance(self._kept, Rows) else self._kept
        if self.fused and torch.is_grad_enabled():
            return fused.quantize(self.matrix, self.fused[1])
        if self.rotates_weight_only:
            basis = self.input_quantizer.spec.basis
            assert basis is not None
            return basis.rotate(self.matrix)
        w: torch.Tensor = self.weight_quantizer(self.matrix)
        return rotated_back(w, self.weight_quantizer.spec) if self.rotates_back else w

    def shares_input_with(self, other: nn.Module) -> bool:
        """As for other layers; in addition both must be fused, or neither."""
        return super().shares_input_with(other) and isinstance(other, QuantLinear) and (not self.fused) == (not other.fused)

    def finish_output(self, y: torch.Tensor) -> torch.Tensor:
        """As for other layers; if the layer quantizes gradients, the gradient of y (…, N) is rounded in the backward pass."""
        plain = self.gradient_quantizer.spec.is_identity or self.rounds_both
        return super().finish_output(y if plain else self._rounding_gradient(y))

    def _rounding_gradient(self, y: torch.Tensor) -> torch.Tensor:
        rounded: torch.Tensor = _RoundGradient.apply(y, self.gradient_quantizer)
        return rounded

    def extra_repr(self) -> str:
        """Shape and specs, as `print(model)` shows them."""
        specs = f"weights={self.weight_quantizer.spec}, activations={self.input_quantizer.spec}"
        if not self.gradient_quantizer.spec.is_identity:
            specs += f", gradients={self.gradient_quantizer.spec}" + ", backward=both" * self.rounds_both
        specs += ", bias=True" * (self.bias is not None) + ", rotate_back=True" * self.rotates_back
        return f"in_features={self.in_features}, out_features={self.out_features}, {specs}"


def rotated_back(w: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The quantized weight (N, K) of a spec with a rotation, in the basis of its layer's input."""
    assert spec.basis is not None
    return spec.basis.unrotate(w)


class QuantConv1D(QuantLinear):
    """A `QuantLinear` in place of `transformers.pytorch_utils.Conv1D`, as GPT-2 has it."""

    transposed: ClassVar[bool] = True


class _RoundGradient(torch.autograd.Function):
    """The identity on y (…, N), with a rounded gradient."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
        ctx.quantizer = quantizer
        return unaliased(y.view_as(y))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.quantizer.of_gradient(grads[0]), None


def fan_out(x: torch.Tensor | FusableInput, *layers: nn.Module) -> list[torch.Tensor]:
    """`[layer(x) for layer in layers]`, computed together where all layers quantize x in the same way.

    Such an input is quantized once. The products are one product with the weights concatenated: fewer and larger operations,
    and one gradient of the input. Layers with a learned input scale quantize for themselves. A `FusableInput` is computed
    first, unless all layers take it as it is.
    """
    first = layers[0]
    if not isinstance(first, TakesQuantized) or not all(first.shares_input_with(layer) for layer in layers):
        x = value_of(x)
        return [layer(x) for layer in layers]
    if first.one_pass is None:
        x = value_of(x)
    if len(layers) == 1:
        return [first(x)]
    return first.products(first.quantize_input(x), [layer for layer in layers if isinstance(layer, TakesQuantized)])


def use_kernels(model: nn.Module, kernels: str, device: torch.device) -> int:
    """Choose whether the quantized layers of `model` train with the fused kernels; returns how many do.

    `kernels` is fused, reference, or auto: fused on a GPU that the kernels run on. Layers whose specs the kernels do not
    support (see fused.py) train by the formula. Evaluation always uses the formula, so that losses are the same everywhere.
    Raises UsageError for `fused` on a GPU that the kernels do not run on.
    """
    if kernels == "reference" or (kernels == "auto" and device.type != "cuda"):
        return 0
    from ..kernels.jit import why_not

    if reason := why_not(device):
        if kernels == "fused":
            raise UsageError(f"train.kernels: fused: {reason} Choose reference.")
        warnings.warn(f"train.kernels: reference instead of fused: {reason}", stacklevel=2)
        return 0
    count = 0
    for layer in (m for m in model.modules() if isinstance(m, QuantLinear)):
        x, w = (fused.settings(q.spec, layer.in_features) for q in (layer.input_quantizer, layer.weight_quantizer))
        layer.fused = (x, w) if x and w and not layer.rounds_both else None
        layer.input_quantizer.fused, layer.weight_quantizer.fused = x, w
        count += bool(x or w)
    return count


@contextmanager
def as_part(model: nn.Module, first: int, of: int) -> Iterator[None]:
    """Let the model's inputs inside a `with` block be rows `first`, … of a batch of `of` rows, for stochastic grids.

    If torch's generator has the same state before each part, all parts together are rounded as the whole batch is.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    quantizers = [q for m in layers for q in (m.input_quantizer, m.gradient_quantizer) if q.spec.draws]
    part = Part(torch.tensor(first, device=layers[0].weight.device), of) if quantizers else None
    for quantizer in quantizers:
        quantizer.part = part
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.part = None


class Rows(NamedTuple):
    """The quantized weights of layers that `fan_out` calls together, one below the other: a leaf of the backward pass."""

    whole: torch.Tensor
    layers: list[TakesQuantized]
    sizes: list[int]  # rows of each layer

    def of(self, layer: QuantLinear) -> torch.Tensor:
        """The quantized weight (N, K) of one of the layers."""
        i = next(i for i, other in enumerate(self.layers) if other is layer)
        return self.whole.narrow(0, sum(self.sizes[:i]), self.sizes[i])


def quantized_layers(model: nn.Module) -> list[QuantLinear]:
    """The quantized layers of a model, in its order."""
    return [m for m in model.modules() if isinstance(m, QuantLinear)]


@contextmanager
def quantized_once(model: nn.Module | Sequence[QuantLinear], enabled: bool = True) -> Iterator[None]:
    """Quantize every weight of a model, or of these layers of it, once for all backward passes inside a `with` block.

    Their gradients are summed at the quantized weight and go through the quantizer's backward pass once, when the block ends.
    Stochastic grids draw at each use, as they do outside the block. Weights of the same spec and width, whose rows are rounded
    independently, are quantized as one matrix: for small weights, calling the operations takes longer than computing them.
    """
    if not enabled:
        yield
        return
    layers = quantized_layers(model) if isinstance(model, nn.Module) else model
    layers = [m for m in layers if not m.weight_quantizer.spec.grid.stochastic]
    made: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []  # quantized tensors, each with the leaves that hold its rows
    try:
        for alike in _alike(layers):
            if len(alike) > 1:
                made.append(_keep_rows(alike))
                continue
            (layer,) = alike
            w = layer.operand()
            whole = w if isinstance(w, torch.Tensor) else w.handle
            leaf = whole.detach().requires_grad_(whole.requires_grad)
            _keep(layer, leaf if isinstance(w, torch.Tensor) else w._replace(handle=leaf))
            made.append((whole, [leaf]))
        yield
    finally:
        for layer in layers:
            _keep(layer, None)
    reached: list[torch.Tensor] = []
    for whole, leaves in made:
        grads = [leaf.grad for leaf in leaves]
        if len(grads) == 1 and grads[0] is not None:
            reached.append(_WithGradient.apply(whole, grads[0]))
        elif any(grad is not None for grad in grads):
            of_rows = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
            reached.append(_WithGradient.apply(whole, torch.cat(of_rows)))
    if reached:
        torch.stack(reached).sum().backward()


def _keep(layer: QuantLinear, operand: torch.Tensor | fused.Codes | Rows | None) -> None:
    """Set `layer._kept`, in a tenth of the time that `nn.Module.__setattr__` takes."""
    vars(layer)["_kept"] = operand


class _WithGradient(torch.autograd.Function):
    """A zero () with the gradient `grad` of x: `torch.autograd.backward(x, grad)` would import sympy, which takes a second."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grad)
        return grad.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0], None


def _alike(layers: Sequence[QuantLinear]) -> list[list[QuantLinear]]:
    """The layers in groups whose weights can be quantized as one matrix; those that `fan_out` calls together are adjacent."""
    groups: dict[Any, list[QuantLinear]] = {}
    left = {id(layer): layer for layer in layers}
    for first in layers:
        for layer in (*first.beside, first):
            if left.pop(id(layer), None) is not None:
                groups.setdefault(_key(layer), []).append(layer)
    return list(groups.values())


def _key(layer: QuantLinear) -> Any:
    """What the weights of two layers must share to be quantized as one matrix; the layer itself if it goes alone."""
    w, own = layer.weight, layer.weight_quantizer
    alone = layer.fused or layer.transposed or layer.rotates_weight_only or layer.rotates_back or own.has_hooks
    if alone or not own.rounds_rows(w) or not w.requires_grad:
        return id(layer)
    return id(own.spec), layer.in_features


def _keep_rows(layers: Sequence[QuantLinear]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Quantize the weights of `layers` as one matrix and let each layer keep its rows; returns the matrix and its leaves."""
    whole = layers[0].weight_quantizer(torch.cat([layer.weight for layer in layers]))
    leaves, first = [], 0
    for together in _runs(layers):
        sizes = [layer.out_features for layer in together]
        leaf = whole.detach()[first : first + sum(sizes)].requires_grad_()
        first += sum(sizes)
        leaves.append(leaf)
        for layer in together:
            _keep(layer, Rows(leaf, list(together), sizes))
    return whole, leaves


def _runs(layers: Sequence[QuantLinear]) -> Iterator[Sequence[QuantLinear]]:
    """`layers` cut into runs that `fan_out` calls together."""
    i = 0
    while i < len(layers):
        beside = layers[i].beside
        n = len(beside) if beside and tuple(layers[i : i + len(beside)]) == beside else 1
        yield layers[i : i + n]
        i += n


def replace_modules(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in place of old ones wherever `model` holds them; they take over mode and hooks.

    Modules that use another module without holding it are told of the change (`replaced`).
    """
    for old, new in by.items():
        new.train(old.training)
        vars(new).update({name: value for name, value in vars(old).items() if "hook" in name})
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):  # `named_children` names a module once
            if module in by and module is not None:
                setattr(parent, child, by[module])
        if (replaced := getattr(parent, "replaced", None)) is not None:
            replaced(by)


@torch.no_grad()
def calibrate_inputs(model: nn.Module, *inputs: torch.Tensor) -> None:
    """Set every learned input scale, layer after layer, in one forward pass of `model(*inputs)`.

    Without learned input scales nothing is computed.
    """
    learned = [m for m in model.modules() if isinstance(m, QuantLinear) and m.input_quantizer.scale is not None]
    _calibrated_forward(lambda: model(*inputs), learned, [])


@torch.no_grad()
def calibrate_scales(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, torch.Tensor]:
    """Set every learned scale and offset, of weights and inputs, in one forward pass of the model; returns them by name.

    The arguments are those of the model. Each layer is calibrated when the pass reaches it, so its input comes from layers that
    have their new scales. A sharded model has its whole weights only at that moment, and loses what was set when it shards them
    again. The caller therefore assigns the returned values.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    of_input = [m for m in layers if m.input_quantizer.scale is not None]
    of_weight = [m for m in layers if m.weight_quantizer.scale is not None]
    values: dict[str, torch.Tensor] = {}
    paths = {id(m): path for path, m in model.named_modules() if isinstance(m, Quantizer)}

    def keep(quantizer: Quantizer) -> None:
        for own, p in quantizer.named_parameters():
            values[f"{paths[id(quantizer)]}.{own}"] = p.detach().clone()

    _calibrated_forward(lambda: model(*inputs, **named), of_input, of_weight, keep)
    return values


def _calibrated_forward(
    forward: Callable[[], object],
    of_input: Sequence[QuantLinear],
    of_weight: Sequence[QuantLinear],
    done: Callable[[Quantizer], None] = lambda _: None,
) -> None:
    """Run `forward`; calibrate the input and the weight of these layers when it reaches them, and tell `done`."""

    def calibrate_input(layer: nn.Module, args: Sequence[torch.Tensor]) -> None:
        assert isinstance(layer, QuantLinear)
        layer.input_quantizer.calibrate(args[0])
        done(layer.input_quantizer)

    def calibrate_weight(layer: QuantLinear) -> None:
        layer.calibrate_weight()
        done(layer.weight_quantizer)

    if not of_input and not of_weight:
        return
    with ExitStack() as undo:
        for layer in of_input:
            undo.callback(layer.register_forward_pre_hook(calibrate_input).remove)
        for layer in of_weight:  # layers that share an input are not called; so each is watched before its product
            layer.watcher = lambda _, layer=layer: calibrate_weight(layer)
            undo.callback(delattr, layer, "watcher")
        forward()
