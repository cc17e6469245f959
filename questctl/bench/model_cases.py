"""The cases of `questctl bench` that are of a whole model: its quantizer, its training step, its prefill and its decode.

Weights are random: those that the config's seed draws. What is compared has the same ones.
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
from ..quant.linear import QuantLinear, quantize_model, use_kernels
from ..quant.methods import method_specs
from ..quant.packed import PackedLinear, freeze, packed_size
from ..quant.spec import QuantSpec
from ..training.optim import AdamW
from .names import DECODE, PREFILL, QUANTIZER, TRAIN_STEP

FULL = "full precision"
STEP_TOLERANCE = {"fp32": 1e-2, "bf16": 5e-2}  # relative; a gradient that leaks between sequences is off by order 1
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
PREFILL_ROWS = {"cuda": (1, 2, 4, 8), "cpu": (1,)}  # sequences at a time
LAYER_ROWS = 65  # at the most, to compare one layer with: more than kernels.gemv.SKINNY_ROWS


# --- quantizer and training step --------------------------------------------------------------------------------------


def quantizer_cases(bits: int, device: torch.device) -> Iterator[Case]:
    """QuEST's quantizer at `bits`: forward, and backward given the forward, on (R, C) normal rows with a few large columns."""
    word = method_specs("quest", bits)[0]
    spec = QuantSpec.parse(word)
    assert spec.estimator is not None
    bound = spec.estimator.bound(spec.grid)
    assert bound is not None
    alpha, limit = spec.grid.unit * spec.grid.top, bound * (2**bits - 1) / spec.grid.top
    quantizer = make_quantizer(word).to(device)
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

    def check_gradient(given: tuple[Any, ...], found: torch.Tensor) -> Check:
        x, g = given
        return check_masked_gradient((x, bits, alpha, limit, spec.rotation), g, found)

    def check_output(given: tuple[Any, ...], found: torch.Tensor) -> Check:
        return check_values((given[0], bits, alpha, limit, spec.rotation), found)

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
    """One training step of one model: forward, backward, clipping, AdamW; tokens (B, T + 1) int64."""

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
        self.optimizer = AdamW(self.model, config.optim)
        self.autocast, self.clip, self.lr = autocast, config.optim.grad_clip or float("inf"), config.optim.lr

    def __call__(self, tokens: torch.Tensor) -> _Step:
        """Take the step."""
        self.backward(tokens)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step(self.lr)
        return self

    def backward(self, tokens: torch.Tensor) -> None:
        """Leave the gradient of the mean loss in the parameters."""
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()

    def gradient(self, tokens: torch.Tensor) -> torch.Tensor:
        """All parameters' gradients in one fp32 vector."""
        self.backward(tokens)
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def train_step_case(config: RunConfig, precision: str, device: torch.device) -> Case:
    """The quantized model's step and the step of the same model in full precision, on random tokens.

    The gate: activations are quantized row by row, so the gradient of a batch is the mean of its halves' gradients, up to
    codes that another order of summation tips over a rounding threshold.
    """
    model_config = config.with_vocabulary(BYTES).model
    batch, length = config.train.micro_batch or config.train.batch_size, config.data.seq_len
    shape = {"d_model": model_config.d_model, "n_layer": model_config.n_layer, "batch": batch, "seq": length}

    def inputs(seed: int) -> tuple[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return (torch.randint(0, model_config.vocab_size, (batch, length + 1), device=device, generator=generator),)

    def check(given: tuple[torch.Tensor], step: _Step) -> Check:
        (tokens,) = given
        whole = step.gradient(tokens)
        cut = batch // 2
        halves = (step.gradient(tokens[:cut]) * cut + step.gradient(tokens[cut:]) * (batch - cut)) / batch if cut else whole
        missing = sum(p.grad is None for p in step.model.parameters())
        return Check(float((whole - halves).norm() / whole.norm()), STEP_TOLERANCE[precision], missing, parts="gradients")

    def step(name: str, quant: QuantConfig, compiled: bool) -> Implementation:
        return Implementation(name, _Step(config, model_config, quant, device, autocast=precision == "bf16", compiled=compiled))

    steps = [step(config.quant.label, config.quant, False), step(FULL, type(config.quant)(), False)]
    if device.type == "cuda":  # there a run compiles its model; eager rows show what that gains
        names = {f"{config.quant.label} compiled": config.quant, f"{FULL} compiled": type(config.quant)()}
        steps = [*(step(name, quant, True) for name, quant in names.items()), *steps]
    baseline = next(s.name for s in steps if s.name.startswith(FULL))
    return Case(f"{TRAIN_STEP} {precision}", shape, steps, baseline, inputs, check, rotations=2, memory=True)


# --- prefill and decode -----------------------------------------------------------------------------------------------


def inference_cases(name: str, config: RunConfig, device: torch.device) -> Iterator[Case]:
    """Prefill or decode of the packed model, by integers where its words allow, and of the same model unquantized.

    All weights are those of one bf16 model. On a GPU everything else is bf16 too; on a CPU fp32 is measured as well. Raises
    UsageError where there is nothing to pack.
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
        if size.by_integers and (name == PREFILL or device.type == "cpu"):  # one row on a GPU reads the packed bytes anyway
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
                console.note(f"{name}: {cost.bytes / 2**20:.1f} MiB a token can stay in the cache: no GB/s to tell.")
                cost = None
            inputs = _tokens(name, shape, device)
            yield Case(f"{name} {NAMES[dtype]}", shape, runs, baseline, inputs, check, cost, rotations=2)


def _same_weights(model: Llama, dtype: torch.dtype, quant: QuantConfig | None = None) -> Llama:
    """Another model of the weights of `model`, in `dtype`: the very tensors where that is theirs."""
    with torch.device("meta"):
        twin = Llama(model.config)
    twin.load_state_dict({name: p.to(dtype) for name, p in model.state_dict().items()}, assign=True)
    if quant:
        quantize_model(twin, quant)
    return twin.to(model.head.weight.device)


def _tokens(name: str, shape: dict[str, int], device: torch.device) -> Callable[[int], tuple[torch.Tensor]]:
    """Random ids (B, T); for decode (1, T + 1), of which the last is the new one."""

    def inputs(seed: int) -> tuple[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        size = (shape["batch"], shape["seq"] + (name == DECODE))
        return (torch.randint(0, shape["vocab"], size, device=device, generator=generator),)

    return inputs


class _Inference:
    """What one model does: ids → logits. Decode has a cache that is filled once, and always takes the step after it."""

    def __init__(self, model: Llama) -> None:
        self.model = model

    def doing(self, name: str, title: str, *, checked: bool = True) -> Implementation:
        """Prefill or decode under a title."""
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
        """Ids (1, T + 1) → the last, and the cache of those before it."""
        cache = Cache(self.model.config, tokens.shape[1], tokens.device)
        self.model(tokens[:, :-1], cache=cache)
        return tokens[:, -1:], cache

    @torch.inference_mode()
    def decode(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """What `fill` gave → logits (1, 1, V)."""
        cache.rewind(cache.capacity - 1)
        logits: torch.Tensor = self.model(token, cache=cache)
        return logits


def _check_of(
    full: Llama, packed: Sequence[Llama], dtype: torch.dtype, quant: QuantConfig
) -> Callable[[tuple[Any, ...], Any], Check]:
    """The gate of the packed models. Two questions, for one alone would not do:

    Is every layer the one that it was packed from? Both get the same random rows; the error against an exact product may be
    twice that of the unpacked layer, or of one code in 10⁵ that is tipped over its threshold (one at least): see `_tipped`.

    Are the logits those of the unpacked quantized model, without a cache? A tipped code is an error of a whole step, which
    tips others in later layers: a deep network of few bits turns the last digit into a difference of its logits by the size of
    its quantization error, however right it is. So the error against the unpacked model in a wider dtype may be twice that of
    the unpacked model in this dtype at its worst token, and twice that of one tipped code. Measured on random weights: 2e-7
    (3 layers, fp32), 0.08 (3 layers, W4A4, bf16), 0.27 (6 layers), 0.85 (6 layers, W1A1), where any logits would pass and the
    layers alone are checked.
    """

    @torch.no_grad()
    def check(given: tuple[Any, ...], logits: torch.Tensor) -> Check:
        (tokens,) = given
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
    """Does the packed layer give what the unpacked one does, on `rows` normal rows?"""
    assert isinstance(layer, QuantLinear)
    generator = torch.Generator(layer.weight.device).manual_seed(0)
    x = torch.randn(rows, layer.in_features, device=layer.weight.device, generator=generator).to(layer.weight.dtype)
    w = layer.weight_quantizer(layer.weight.float()).double()
    exact = layer.input_quantizer(x.float()).double() @ w.T
    return relative_error(packed(x), exact) <= 2 * max(relative_error(layer(x), exact), _tipped(packed, rows))


def _tipped(packed: PackedLinear, rows: int) -> float:
    """Relative error of normal rows in which one code in 10⁵, but one at least, is the next one."""
    spec = packed.input_quantizer.spec
    return 0.0 if spec.is_identity else spec.grid.unit * max(1e-5, 1 / (rows * packed.in_features)) ** 0.5


def _cost(name: str, packed: Llama, shape: dict[str, int]) -> Cost:
    """Bytes: the packed layers, all other parameters but the embedding, of which only the tokens' rows, the cache that decode
    reads, the logits. Operations: of the packed layers alone, which are less than all."""
    tokens = shape["batch"] * shape["seq"] if name == PREFILL else 1
    size, value = packed_size(packed), packed.head.weight.element_size()
    rest = sum(p.numel() * p.element_size() for p in packed.parameters()) - packed.embed.weight.numel() * value
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
