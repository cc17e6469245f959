"""Benchmark cases of a whole model: its quantizer, its training step, its prefill and its decode.

Weights are random, drawn from the config's seed, and are the same in all models that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .. import console
from ..config import ModelConfig, QuantConfig, RunConfig
from ..data.size_estimate import BYTES
from ..errors import UsageError
from ..kernels.devices import ROTATE_BYTES
from ..kernels.fake_quant import check_masked_gradient, check_values
from ..kernels.hadamard import COPY, relative_error, rotation_cost
from ..kernels.op import Case, Check, Cost, Implementation, Unit
from ..models.llama import Cache, Llama, build_model
from ..quant import make_quantizer
from ..quant.linear import QuantLinear, use_kernels
from ..quant.methods import method_specs
from ..quant.model import quantize_model
from ..quant.packed import PackedEmbedding, PackedLinear, freeze, packed_size
from ..quant.spec import QuantSpec
from ..training.optim import Optimizer
from .names import DECODE, PREFILL, QUANTIZER, TRAIN_STEP

FULL = "full precision"
STEP_TOLERANCE = {"fp32": 1e-2, "bf16": 5e-2}  # relative; a gradient that leaks between sequences has an error of order 1
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
PREFILL_ROWS = {"cuda": (1, 2, 4, 8), "cpu": (1,)}  # sequences at a time
LAYER_ROWS = 65  # most rows to check a layer; more than kernels.gemv.SKINNY_ROWS, so that both kernels are checked


# --- quantizer and training step --------------------------------------------------------------------------------------


def quantizer_cases(bits: int, device: torch.device) -> Iterator[Case]:
    """QuEST's quantizer at `bits`, forward and backward, on (R, C) normal rows with a few large columns."""
    spec = QuantSpec.parse(method_specs("quest", bits)[0])
    assert spec.estimator is not None
    bound = spec.estimator.bound(spec.grid)
    assert bound is not None
    alpha, limit = spec.grid.unit * spec.grid.top, bound * (2**bits - 1) / spec.grid.top
    quantizer = make_quantizer(str(spec)).to(device)
    shape = {"R": 1024 if device.type == "cpu" else 16384, "C": 2048, "bits": bits}

    def inputs(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(shape["R"], shape["C"], device=device, generator=generator)
        x[:, :3] *= 20.0
        return x, torch.randn(x.shape, device=device, generator=generator)

    def graph_of(function: Any) -> Any:
        def prepare(x: torch.Tensor, g: torch.Tensor) -> tuple[Any, ...]:
            leaf = x.clone().requires_grad_()
            return function(leaf), leaf, g

        return prepare

    def backward(y: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, x, g, retain_graph=True)[0]

    def check_gradient(arguments: tuple[Any, ...], gradient: torch.Tensor) -> Check:
        x, g = arguments
        return check_masked_gradient((x, bits, alpha, limit, spec.rotation), g, gradient)

    def check_output(arguments: tuple[Any, ...], output: torch.Tensor) -> Check:
        return check_values((arguments[0], bits, alpha, limit, spec.rotation), output)

    def first(x: torch.Tensor, g: torch.Tensor) -> tuple[Any, ...]:
        return (x.clone().requires_grad_(),)

    cost = rotation_cost({**shape, "block": spec.rotation}, 4, 2.0 * 4 * shape["R"] * shape["C"])
    forward = [Implementation("model", quantizer, first), Implementation("plain formula", quantizer.reference, first), COPY]
    yield Case(f"{QUANTIZER} forward", shape, forward, "plain formula", inputs, check_output, cost)
    back = [
        Implementation("model", backward, graph_of(quantizer)),
        Implementation("plain formula", backward, graph_of(quantizer.reference)),
        COPY,
    ]
    yield Case(f"{QUANTIZER} backward", shape, back, "plain formula", inputs, check_gradient, cost)


class _Step:
    """One training step of one model: forward, backward, clipping, optimizer; tokens (B, T + 1) int64."""

    def __init__(
        self,
        config: RunConfig,
        model_config: ModelConfig,
        quant: QuantConfig,
        device: torch.device,
        *,
        autocast: bool,
        compiled: bool,
    ) -> None:
        self.model = build_model(model_config, quant, config.train.seed).to(device)
        use_kernels(self.model, config.train.kernels, device)
        self.loss: Any = torch.compile(self.model) if compiled else self.model
        self.optimizer = Optimizer(self.model, config.optim)
        self.autocast, self.clip, self.lr = autocast, config.optim.grad_clip or float("inf"), config.optim.lr

    def __call__(self, tokens: torch.Tensor) -> _Step:
        """Take one step, and return it so that its check can look at the gradients."""
        self.backward(tokens)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step(self.lr)
        return self

    def backward(self, tokens: torch.Tensor) -> None:
        """Compute the gradient of the mean loss into the parameters."""
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()

    def gradient(self, tokens: torch.Tensor) -> torch.Tensor:
        """The gradients of all parameters as one fp32 vector."""
        self.backward(tokens)
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def train_step_case(config: RunConfig, precision: str, device: torch.device) -> Case:
    """The quantized model's step and the step of the same model in full precision, on random tokens.

    The check relies on activations being quantized row by row: the gradient of a batch is the mean of its halves' gradients, up
    to codes that another order of summation moves across a rounding threshold.
    """
    model_config = config.with_vocabulary(BYTES).model
    batch, length = config.train.micro_batch or config.train.batch_size, config.data.seq_len
    shape = {"d_model": model_config.d_model, "n_layer": model_config.n_layer, "batch": batch, "seq": length}

    def inputs(seed: int) -> tuple[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randint(0, model_config.vocab_size, (batch, length + 1), device=device, generator=generator),)

    def check(arguments: tuple[torch.Tensor], step: _Step) -> Check:
        (tokens,) = arguments
        whole = step.gradient(tokens)
        cut = batch // 2
        halves = (step.gradient(tokens[:cut]) * cut + step.gradient(tokens[cut:]) * (batch - cut)) / batch if cut else whole
        missing = sum(p.grad is None for p in step.model.parameters())
        return Check(float((whole - halves).norm() / whole.norm()), STEP_TOLERANCE[precision], missing, parts="gradients")

    def step(name: str, quant: QuantConfig, compiled: bool) -> Implementation:
        return Implementation(name, _Step(config, model_config, quant, device, autocast=precision == "bf16", compiled=compiled))

    steps = [step(config.quant.label, config.quant, False), step(FULL, type(config.quant)(), False)]
    if device.type == "cuda":  # runs compile their model on a GPU; the eager rows show the gain
        names = {f"{config.quant.label} compiled": config.quant, f"{FULL} compiled": type(config.quant)()}
        steps = [*(step(name, quant, True) for name, quant in names.items()), *steps]
    baseline = next(s.name for s in steps if s.name.startswith(FULL))
    return Case(f"{TRAIN_STEP} {precision}", shape, steps, baseline, inputs, check, rotations=2, memory=True)


# --- prefill and decode -----------------------------------------------------------------------------------------------


def inference_cases(name: str, config: RunConfig, device: torch.device) -> Iterator[Case]:
    """Prefill or decode of the packed model, by integers where its specs allow, and of the same model unquantized.

    All weights are those of one bf16 model. On a GPU everything else is bf16 too; on a CPU fp32 is measured as well. Raises
    UsageError if the config quantizes no weights.
    """
    with torch.device(device):
        full = Llama(config.with_vocabulary(BYTES).model, seed=config.train.seed).to(torch.bfloat16)
    for dtype in (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32):
        packed = _same_weights(full, dtype, config.quant)
        size = packed_size(freeze(packed, "integers"))
        if not size.layers:
            raise UsageError(f"{name}: {config.quant.label} quantizes no weights, so there is nothing to pack; see --quant.")
        by = {0: "values", size.layers: "integers"}.get(size.by_integers, f"integers in {size.by_integers} of {size.layers}")
        ours = {f"{config.quant.label} packed, by {by}": packed}
        if size.by_integers and (name == PREFILL or device.type == "cpu"):  # on a GPU one row always reads packed bytes
            more = ours[f"{config.quant.label} packed, a byte a weight"] = _same_weights(full, dtype, config.quant)
            freeze(more, "bytes")
        baseline = f"{FULL} bf16"
        runs = [_Inference(model).doing(name, title) for title, model in ours.items()]
        runs.append(_Inference(full).doing(name, baseline, checked=False))
        if dtype == torch.float32:
            runs.append(_Inference(_same_weights(full, dtype)).doing(name, f"{FULL} fp32", checked=False))
        check = _check_of(full, list(ours.values()), dtype, config.quant)
        for rows in PREFILL_ROWS[device.type] if name == PREFILL else (1,):
            shape = {"d_model": full.config.d_model, "n_layer": full.config.n_layer, "vocab": full.config.vocab_size}
            shape |= {"batch": rows, "seq": config.data.seq_len}
            cost: Cost | None = _cost(name, packed, shape)
            if cost and name == DECODE and cost.bytes < ROTATE_BYTES[device.type]:
                console.note(f"{name}: {cost.bytes / 2**20:.1f} MiB per token can stay in the cache, so that no GB/s is shown.")
                cost = None
            inputs = _tokens(name, shape, device)
            yield Case(f"{name} {NAMES[dtype]}", shape, runs, baseline, inputs, check, cost, rotations=2)


def _same_weights(model: Llama, dtype: torch.dtype, quant: QuantConfig | None = None) -> Llama:
    """Another model with the weights of `model` in `dtype`; tensors that have this dtype already are shared."""
    with torch.device("meta"):
        twin = Llama(model.config)
    twin.load_state_dict({name: p.to(dtype) for name, p in model.state_dict().items()}, assign=True)
    if quant:
        quantize_model(twin, quant)
    return twin.to(model.head.weight.device)


def _tokens(name: str, shape: dict[str, int], device: torch.device) -> Callable[[int], tuple[torch.Tensor]]:
    """Random ids (B, T); for decode (1, T + 1), of which the last is the new token."""

    def inputs(seed: int) -> tuple[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape["batch"], shape["seq"] + (name == DECODE))
        return (torch.randint(0, shape["vocab"], size, device=device, generator=generator),)

    return inputs


class _Inference:
    """Prefill and decode of one model: ids → logits. Decode fills its cache once and then repeats the step after it."""

    def __init__(self, model: Llama) -> None:
        self.model = model

    def doing(self, name: str, title: str, *, checked: bool = True) -> Implementation:
        """Prefill or decode as an implementation with this title."""
        if name == PREFILL:
            return Implementation(title, self.prefill, checked=checked)
        return Implementation(title, self.decode, self.fill, checked)

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) → logits (B, T, V)."""
        logits: torch.Tensor = self.model(tokens)
        return logits

    @torch.inference_mode()
    def fill(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        """Ids (1, T + 1) → the last id, and a cache filled with those before it."""
        cache = Cache(self.model.config, tokens.shape[1], tokens.device)
        self.model(tokens[:, :-1], cache=cache)
        return tokens[:, -1:], cache

    @torch.inference_mode()
    def decode(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The result of `fill` → logits (1, 1, V)."""
        cache.rewind(cache.capacity - 1)
        logits: torch.Tensor = self.model(token, cache=cache)
        return logits


def _check_of(
    full: Llama, packed: Sequence[Llama], dtype: torch.dtype, quant: QuantConfig
) -> Callable[[tuple[Any, ...], Any], Check]:
    """The correctness check of the packed models. It has two parts, since neither suffices alone.

    Layers: every packed layer and its unpacked original get the same random rows. The error of the packed one against an exact
    product may be twice that of the unpacked one, or that of one code in 10⁵ (at least one) on the wrong side of its threshold
    (`_tipped`).

    Logits are compared with those of the unpacked quantized model without a cache. A code on the wrong side of a threshold is
    an error of a whole step, and it moves codes of later layers. Even if it is right, a deep network with few bits therefore
    turns a difference in the last digit into one of the size of its quantization error. So the error against the unpacked model
    in a wider dtype may be twice that of the unpacked model in this dtype at its worst token, and twice that of one such code.
    Measured on random weights: 2e-7 (3 layers, fp32), 0.08 (3 layers, W4A4, bf16), 0.27 (6 layers), 0.85 (6 layers, W1A1). In
    the last case any logits would pass, and only the layers are checked.
    """

    @torch.no_grad()
    def check(arguments: tuple[Any, ...], logits: torch.Tensor) -> Check:
        (tokens,) = arguments
        unpacked = _same_weights(full, dtype, quant)
        rows = min(logits.shape[:2].numel(), LAYER_ROWS)
        named = [(name, m) for model in packed for name, m in model.named_modules() if isinstance(m, PackedLinear)]
        pairs = [(unpacked.get_submodule(name), m) for name, m in named]
        wrong = sum(not _replaces(layer, m, rows) for layer, m in pairs)
        exact = _same_weights(full, WIDER[dtype], quant)(tokens)
        per_token = (unpacked(tokens) - exact).norm(dim=-1) / exact.norm(dim=-1)
        tipped = max(_tipped(m, 1) for _, m in pairs)
        error = relative_error(logits, exact[:, -logits.shape[1] :])
        return Check(error, 2 * max(float(per_token.max()), tipped), wrong, parts="layers")

    return check


def _replaces(layer: torch.nn.Module, packed: PackedLinear, rows: int) -> bool:
    """Whether the packed layer computes what the unpacked one does, on `rows` normal rows."""
    assert isinstance(layer, QuantLinear)
    generator = torch.Generator(layer.weight.device).manual_seed(0)
    x = torch.randn(rows, layer.in_features, device=layer.weight.device, generator=generator).to(layer.weight.dtype)
    w = layer.weight_quantizer(layer.weight.float()).double()
    exact = layer.input_quantizer(x.float()).double() @ w.T
    return relative_error(packed(x), exact) <= 2 * max(relative_error(layer(x), exact), _tipped(packed, rows))


def _tipped(packed: PackedLinear, rows: int) -> float:
    """Relative error of normal rows in which one code in 10⁵, but at least one, is off by one."""
    spec = packed.input_quantizer.spec
    return 0.0 if spec.is_identity else spec.grid.unit * max(1e-5, 1 / (rows * packed.in_features)) ** 0.5


def _cost(name: str, packed: Llama, shape: dict[str, int]) -> Cost:
    """The least bytes and operations of prefill or decode.

    Bytes: packed layers, all other parameters (of the embedding only the rows of the tokens), the cache that decode reads, and
    the logits. Operations: only those of the packed layers, a lower bound.
    """
    tokens = shape["batch"] * shape["seq"] if name == PREFILL else 1
    size, value = packed_size(packed), packed.norm.weight.element_size()
    rest = sum(p.numel() * p.element_size() for p in packed.parameters())
    rest -= packed.embed.stored_bytes if isinstance(packed.embed, PackedEmbedding) else packed.embed.weight.numel() * value
    cache = 2 * shape["n_layer"] * shape["seq"] * shape["d_model"] if name == DECODE else 0
    moved = size.bytes + rest + value * (tokens * (shape["d_model"] + shape["vocab"]) + cache)
    unit: Unit = "int8" if size.by_integers == size.layers else "bf16" if value == 2 else "fp32"
    return Cost(moved, tokens * size.bf16_bytes, unit)  # 2 operations for each weight, which are 2 bytes as bf16


# --- by name ----------------------------------------------------------------------------------------------------------


def _quantizer(config: RunConfig, device: torch.device) -> Iterator[tuple[Case, bool]]:
    for bits in (4, 2, 1):
        yield from ((case, False) for case in quantizer_cases(bits, device))


def _train_step(config: RunConfig, device: torch.device) -> Iterator[tuple[Case, bool]]:
    for precision in ("fp32", "bf16"):
        yield train_step_case(config, precision, device), False


def _inference(name: str) -> Callable[[RunConfig, torch.device], Iterator[tuple[Case, bool]]]:
    return lambda config, device: ((case, True) for case in inference_cases(name, config, device))


CASES: dict[str, Callable[[RunConfig, torch.device], Iterator[tuple[Case, bool]]]] = {  # with whether a CUDA graph can time it
    QUANTIZER: _quantizer,
    TRAIN_STEP: _train_step,
    PREFILL: _inference(PREFILL),
    DECODE: _inference(DECODE),
}
