"""Post-training quantization of a full-precision run by any spec: the baseline for quantization-aware training.

    rtn    Ŵ = Q(W), each weight to its nearest level
    gptq   for k = 1 … K:   ŵₖ = Q(wₖ);   W[:, k:] −= (wₖ − ŵₖ)/Uₖₖ · U[k, k:],     UᵀU = H⁻¹,  H = Σ x̂ᵀx̂ + λ·mean(diag)·1

GPTQ adjusts the weights that are not rounded yet, so that they compensate the error of those that are, measured at the layer's
output (Frantar et al. 2022, arXiv 2210.17323). With a rotation in the spec, both methods work in its basis: rows of W and
inputs are rotated first, and the result is rotated back. x̂ is the quantized input of the layer, in a model whose earlier
layers are quantized already. Scales and sparsity masks are those of the original row.

The quantized model is stored as a run like any other. Its config names the source run and the method, its weights are the
rounded ones in the model's own basis, and its tokens and FLOPs are those of the source. Two refinements of GPTQ are left out:
ordering columns by the diagonal of H, which matters little after a rotation, and choosing a sparsity mask along the way.

Legend: N outputs, K inputs of a layer, n calibration sequences, T tokens, D width of the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..config import QuantConfig, RunConfig
from ..data import sampler
from ..data.tokens import Dataset
from ..evaluate.loss import bits_per_byte
from ..models.llama import Llama, build_model, count_parameters, model_bits, rotary_of
from ..quant.layer_specs import STAGES, layer_specs, layer_widths
from ..quant.linear import QuantLinear, calibrate_inputs
from ..quant.model import quantize_model
from ..quant.quantizer import SMALLEST_SCALE, Quantizer
from ..quant.spec import QuantSpec
from ..store import Result, Run, RunStore, describe
from ..training import checkpoint
from ..training import provenance as environment
from ..training.loading import LoadedRun, load, loss_on
from ..training.loop import TRAIN_TOKENS, execution, pick_device
from ..training.run_data import text_record
from .preflight import CALIBRATION_TOKENS, DAMPING, ptq_config, require_full_precision

COLUMNS = 128  # rounded at a time before one product updates the rest of the row (§3.3 of the paper)


def quantize(
    run: Run,
    quant: QuantConfig,
    *,
    method: str = "gptq",
    calibration_tokens: int = CALIBRATION_TOKENS,
    damping: float = DAMPING,
    device: str = "auto",
) -> Result:
    """Quantize the finished full-precision `run` by the specs of `quant`; the new run is stored beside it.

    `calibration_tokens` are the first tokens in the run's own training order, `damping` is λ. If the new run is finished, its
    result is returned. See `quantize_run` for the errors.
    """
    source = require_full_precision(run, "quantize")
    config = ptq_config(source, quant, method, calibration_tokens, damping)
    target = RunStore(run.root).run(config.run_id)
    if (done := target.result()) is not None:
        return done
    place = pick_device(device)
    threads = int(run.env().get("threads") or torch.get_num_threads())
    with execution(threads, place):
        start = time.perf_counter()
        loaded = load(run, device=place)
        model = quantized(loaded, config)
        result = _result(model, config, loaded, run, start)
        with target.open_for_training(config) as writer:
            env = {**text_record(loaded.data), "threads": threads, "attempt": environment.attempt(place)}
            writer.begin(step=config.train.steps, steps=config.train.steps, env=env)
            about = {"run": target.name, "config": config.experiment, "data_hash": loaded.data.data_hash}
            writer.write_model(checkpoint.model_bytes(model.state_dict(), about))
            result = replace(result, attempts=writer.status.attempts)
            writer.finish(result)
    return result


def quantized(loaded: LoadedRun, config: RunConfig) -> Llama:
    """Turn the model of a full-precision run into that of `config`, in place: weights rounded, inputs quantized."""
    assert config.ptq is not None
    model, device = loaded.model, loaded.model.head.weight.device
    specs = {name: weights for name, (weights, _) in layer_specs(layer_widths(config.model), config.quant).items()}
    quantize_model(model, config.remaining_quant)
    model.to(device)
    tokens = calibration(loaded.config, loaded.data, config.ptq.calibration_tokens)[:, :-1].to(device)
    if len(tokens):
        calibrate_inputs(model, tokens[: config.train.batch_size])
    if config.ptq.method == "gptq":
        compensate_model(model, specs, tokens, damping=config.ptq.damping, rows=config.train.batch_size)
    else:
        round_model(model, specs)
    return model


def calibration(config: RunConfig, data: Dataset, tokens: int) -> torch.Tensor:
    """The first sequences in the run's training order, (n, T + 1) int64 with n = ⌊tokens / T⌋."""
    length = config.data.seq_len
    n = tokens // length
    rows = sampler.batch(data.train, seed=config.train.seed, step=0, batch_size=max(1, n), seq_len=length)
    return torch.from_numpy(rows[:n])


# --- rounding ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def round_model(model: nn.Module, specs: Mapping[str, QuantSpec]) -> None:
    """Round the weights of the layers in `specs` (name → spec) to their nearest levels, in place."""
    for name, spec in specs.items():
        weight = linear_of(model, name).weight
        weight.copy_(rounded(weight, spec))


@torch.no_grad()
def rounded(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """W (N, K) → Ŵ (N, K): each entry is rounded to its nearest level in the basis of the spec, and the result rotated back."""
    quantizer = Quantizer(spec, numel=weight.numel(), rows=len(weight)).to(weight.device)
    quantizer.calibrate(weight)
    y: torch.Tensor = quantizer(weight)
    return spec.basis.unrotate(y) if spec.basis else y


@torch.no_grad()
def compensated(weight: torch.Tensor, hessian: torch.Tensor, spec: QuantSpec, *, damping: float = DAMPING) -> torch.Tensor:
    """GPTQ of one layer, in fp64: W (N, K), H = Σ x̂ᵀx̂ (K, K) of the inputs in the spec's basis → Ŵ (N, K) in the basis of W."""
    if spec.is_identity:
        return weight
    assert spec.scale is not None
    z = spec.basis.rotate(weight.float()) if spec.basis else weight.float()
    shared = spec.scale.share(z)
    offset = spec.scale.centres(shared).expand_as(shared) if spec.scale.centred else torch.zeros_like(shared)
    # scale and offset are those of the original weight
    scale = spec.scale.sizes(shared - offset, spec.grid).double().expand_as(shared).reshape(z.shape)
    offset = offset.double().reshape(z.shape)
    divisor = scale.clamp_min(SMALLEST_SCALE)
    step = scale * spec.sparsity.keep(z) if spec.sparsity else scale
    upper = _inverse_factor(hessian.double(), damping)
    w, out, width = z.double() - offset, torch.empty_like(z, dtype=torch.float64), z.shape[1]
    for low in range(0, width, COLUMNS):
        high = min(low + COLUMNS, width)
        errors = torch.empty_like(w[:, low:high])
        for k in range(low, high):
            if k % spec.grid.group == 0:
                together = slice(k, k + spec.grid.group)
                out[:, together] = spec.grid.quantize(w[:, together] / divisor[:, together]) * step[:, together]
            errors[:, k - low] = (w[:, k] - out[:, k]) / upper[k, k]
            w[:, k:high] -= torch.outer(errors[:, k - low], upper[k, k:high])
        w[:, high:] -= errors @ upper[low:high, high:]
    out += offset
    back = spec.basis.unrotate(out) if spec.basis else out
    return back.to(weight.dtype)


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with UᵀU = (H + λ·mean(diag)·1)⁻¹. If all inputs are zero, the mean is taken as 1."""
    mean = float(hessian.diagonal().mean()) or 1.0
    damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


@torch.no_grad()
def compensate_model(
    model: Llama, specs: Mapping[str, QuantSpec], tokens: torch.Tensor, *, damping: float = DAMPING, rows: int = 16
) -> None:
    """Apply GPTQ to the layers in `specs` (name → spec) in place, block after block; tokens (n, T), `rows` sequences at once.

    The inputs of `model` are quantized already. Hidden states (n, T, D) are kept from block to block, so that the whole model
    costs five forward passes.
    """
    cos, sin = rotary_of(model.config, tokens.shape[1], tokens.device)
    x = model.embed(tokens)
    for i, block in enumerate(model.blocks):
        for stage in STAGES:
            layers = {name: linear_of(block, name) for name in stage if not specs[f"blocks.{i}.{name}"].is_identity}
            with input_hessians(layers) as hessians:
                for part in x.split(rows):
                    block(part, cos, sin)
            for name, layer in layers.items():
                spec = specs[f"blocks.{i}.{name}"]
                h = in_basis(hessians[name], layer, spec)
                layer.weight.copy_(compensated(layer.weight, h, spec, damping=damping))
        x = torch.cat([block(part, cos, sin) for part in x.split(rows)])


@contextmanager
def input_hessians(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """Sum x̂ᵀx̂ (K, K), in fp64, over the inputs that each layer multiplies by its weight inside the `with` block.

    Yields name → Σ x̂ᵀx̂. Layers that receive the same input tensor share one sum, which is computed once.
    """
    sums: dict[str, torch.Tensor] = {}
    last: tuple[torch.Tensor | None, str] = None, ""

    def record(name: str, x: torch.Tensor) -> None:
        nonlocal last
        if x is last[0]:
            sums[name] = sums[last[1]]
            return
        last = x, name
        flat = x.flatten(0, -2).double()
        sums[name] = sums[name].add_(flat.T @ flat) if name in sums else flat.T @ flat

    hooks = []
    for name, layer in layers.items():
        if isinstance(layer, QuantLinear):
            layer.watcher = partial(record, name)
        else:
            hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0])))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            if isinstance(layer, QuantLinear):
                layer.watcher = None


def in_basis(hessian: torch.Tensor, layer: nn.Linear, spec: QuantSpec) -> torch.Tensor:
    """H (K, K) of the inputs of `layer`, in the basis of `spec`: rotated, unless the layer's inputs already are."""
    if spec.basis and not isinstance(layer, QuantLinear):
        return spec.basis.rotate(spec.basis.rotate(hessian).T)
    return hessian


def linear_of(parent: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name below `parent`."""
    layer = parent.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _result(model: Llama, config: RunConfig, loaded: LoadedRun, run: Run, start: float) -> Result:
    """The result of the quantized run: its own losses and storage, but cost and speed of the training from its source."""
    source = run.require_result("quantize")
    with torch.device("meta"):  # `model` no longer has the specs of its weights, which determine the stored bits
        specified = build_model(model.config, config.quant, config.train.seed)
    loss = loss_on(model, config, loaded.data)
    return replace(
        source,
        **describe(config),
        loss=loss,
        bits_per_byte=bits_per_byte(loss, loaded.data.meta.val.bytes_per_token),
        train_loss=loss_on(model, config, loaded.data, part="train", max_tokens=TRAIN_TOKENS),
        model_bits=model_bits(specified),
        seconds=source.seconds + time.perf_counter() - start,
        params_total=count_parameters(model).total,
        peak_memory_bytes=environment.peak_memory(model.head.weight.device),
        device=environment.device_name(model.head.weight.device),
    )
