"""What quantization does to the gradient of a trained model, layer by layer, and what rotation and mask each repair of it.

    alignment     cos(∂L_q/∂W, ∂L/∂W): quantized against full precision, same weights, same batch (arXiv 2502.05003, figure on
                  gradient alignment); over all linear layers: of their gradients as one vector. Mean over batches.
    trusted       mean of the estimator's mask m: the share of entries that carry gradient
    persistence   of the entries that are distrusted now, the share that is distrusted later too (by chance: 1 − trusted)
    error         Σ(Q(z) − z)² / Σz², beside what the same quantizer makes of normal values of the same shape
    distribution  of z/RMS(row) before and after rotation: excess kurtosis (0 for a normal), Kolmogorov–Smirnov distance to it

Batches are of the validation text, as large as a training step unless that is larger than `SEQUENCES`: a larger batch has a
smaller gradient, but not a smaller error, so that its alignment is lower. Everything is computed in fp32.

Inputs are those of the full-precision model, so that every quantizer sees the same. The mask is read from the backward pass
itself: m is the gradient of ΣQ(x), in the basis where Q rounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..config import QuantConfig, RunConfig
from ..data import sampler
from ..data.tokens import Dataset
from ..errors import UsageError
from ..models.llama import Llama, build_model
from ..quant.estimators import STE
from ..quant.linear import QuantLinear, calibrate_inputs, quantize_model
from ..quant.quantizer import Quantizer
from ..quant.rotations import Hadamard
from ..store import Run, checkpoint_steps
from ..training.loading import load, load_model
from ..training.loop import Trainer, execution, pick_device
from .preflight import check_quants, default_quants, rotated_weights

BATCHES, SEQUENCES, STEPS = 8, 16, 10
NORMAL_SAMPLES = 2**19  # behind an expected error: 0.3 % of it at 4 bits
KS_SAMPLES = 2**17

POOR_REFERENCE = (
    "{run} was trained with quantization ({scheme}): its weights lie where the quantized loss is low, and the full-precision "
    "gradient there is a poor reference. Alignment means something for a run trained with --quant bf16."
)


@dataclass(frozen=True)
class OperandProbe:
    """What a quantizer does to the weight or the input of a layer."""

    trusted: float
    persistence: float | None  # None where nothing is distrusted, or was not followed
    error: float  # Σ(Q(z) − z)² / Σz²
    normal_error: float  # the same of normal values


@dataclass(frozen=True)
class LayerProbe:
    """One linear layer under one setting."""

    layer: str
    alignment: float
    gradient_ratio: float  # |∂L_q/∂W| / |∂L/∂W|
    weights: OperandProbe | None  # None in full precision
    activations: OperandProbe | None


@dataclass(frozen=True)
class SettingProbe:
    """The model quantized in one way; losses in nats/token over the probe's batches."""

    name: str
    weights: str
    activations: str
    loss: float
    alignment: float  # over all linear layers, mean over batches
    alignment_range: tuple[float, float]  # smallest and largest batch
    layer_mean: float  # mean over the layers of their alignments
    layers: tuple[LayerProbe, ...]


@dataclass(frozen=True)
class Distribution:
    """The values of one operand of one layer, each row divided by its RMS, in one basis."""

    layer: str
    operand: str  # weights or activations
    rotation: str  # word of the rotation, or none
    kurtosis: float  # E[z⁴] − 3
    distance: float  # Kolmogorov–Smirnov


@dataclass(frozen=True)
class Contribution:
    """What one part of the word adds to the alignment over all layers."""

    part: str  # rotation or mask
    setting: str  # with it
    without: str
    gain: float


@dataclass(frozen=True)
class Probe:
    """All of it, plain values."""

    run: str
    scheme: str
    reference_loss: float
    batches: int
    tokens_per_batch: int
    settings: tuple[SettingProbe, ...]
    contributions: tuple[Contribution, ...]
    distributions: tuple[Distribution, ...]
    persistence_of_weights: str  # over which steps
    persistence_of_activations: str
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Setting:
    """One way to quantize the reference model, built."""

    name: str
    quant: QuantConfig
    model: nn.Module
    turned: Mapping[str, Hadamard]  # layers whose weight is stored in the rotated basis


def probe(
    run: Run,
    quants: Sequence[QuantConfig] = (),
    *,
    batches: int = BATCHES,
    sequences: int | None = None,
    steps: int = STEPS,
    device: str = "auto",
) -> Probe:
    """Probe `run` under each of `quants` (default: `default_quants`) on `batches` batches of the validation text.

    `steps` are trained from these weights, the last of the run's schedule again, to follow the weights' masks; 0 follows none.
    Raises UsageError (words that do not fit or have no meaning here, numbers out of range) or DataError (no weights, damaged).
    """
    if min(batches - 1, sequences or 1) < 1:
        raise UsageError(f"probe: {batches} batches of {sequences} sequences are too few; two batches of one are the least.")
    config = run.config()
    quants = list(quants) or default_quants(config)
    check_quants(config, quants)
    place = pick_device(device)
    with execution(int(run.env().get("threads") or torch.get_num_threads()), place):
        loaded = load(run, device=place)
        reference = _reference(loaded.model, config).to(place)
        data = _batches(config, loaded.data, batches, sequences or min(config.train.batch_size, SEQUENCES), place)
        with _inputs(reference) as inputs:
            seen = []
            for tokens in data[:2]:
                with torch.no_grad():
                    reference(tokens[:, :-1])
                seen.append(dict(inputs))
        settings = [_setting(q, loaded.model, reference, config, data[0][:, :-1]) for q in quants]
        losses, gradients = _alignments(reference, settings, data)
        expected = NormalErrors(place)
        followed, later_masks = _follow(run, config, loaded.data, steps, place)
        probes = [
            _setting_probe(setting, loss, found, seen, later_masks(setting), expected)
            for setting, (loss, found) in zip(settings, gradients, strict=True)
        ]
        quantized = config.scheme != "bf16"
        return Probe(
            run=run.name,
            scheme=config.scheme,
            reference_loss=losses,
            batches=batches,
            tokens_per_batch=data[0][:, 1:].numel(),
            settings=tuple(probes),
            contributions=tuple(contributions(quants, probes)),
            distributions=tuple(_distributions(reference, seen[0], quants)),
            persistence_of_weights=followed,
            persistence_of_activations="between two batches: a distrusted entry's feature, in a token of the other batch",
            warnings=(POOR_REFERENCE.format(run=run.name, scheme=config.scheme),) if quantized else (),
        )


# --- models -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _reference(model: Llama, config: RunConfig) -> Llama:
    """The same function without rounding: weights that are stored in a rotated basis are what multiplies the input."""
    reference = build_model(model.config, QuantConfig(), config.train.seed)
    turned = rotated_weights(config.model, config.quant)
    stored = dict(model.named_parameters())
    for name, p in reference.named_parameters():
        basis = turned.get(name.removesuffix(".weight"))
        p.copy_(basis.rotate(stored[name]) if basis else stored[name])
    return reference


def _setting(quant: QuantConfig, own: Llama, reference: Llama, config: RunConfig, tokens: torch.Tensor) -> _Setting:
    mark = f"+g.{quant.gradients}" if not quant.gradients.is_identity else ""
    mark += "+" + quant.label.rpartition("+")[2] if quant.overrides else ""
    name = str(quant.weights) if quant.weights == quant.activations else f"{quant.weights}+{quant.activations}"
    if quant == config.quant:
        return _Setting(name + mark, quant, own, rotated_weights(config.model, quant))
    model = quantize_model(copy.deepcopy(reference), quant).to(tokens.device)
    calibrate_inputs(model, tokens)
    return _Setting(name + mark, quant, model, {})


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if name.startswith("blocks.") and isinstance(m, nn.Linear)}


def _batches(config: RunConfig, data: Dataset, count: int, rows: int, device: torch.device) -> list[torch.Tensor]:
    """Batches (rows, T + 1) of the validation text, in an order of the run's seed."""
    seed, length = config.train.seed, config.data.seq_len
    drawn = (sampler.batch(data.val, seed=seed, step=i, batch_size=rows, seq_len=length) for i in range(count))
    return [torch.from_numpy(batch).to(device) for batch in drawn]


@contextmanager
def _inputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """While this is open: the newest input of each linear layer of a plain model, as rows (n, K)."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: inputs.__setitem__(name, args[0].detach().flatten(0, -2))

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in _linears(model).items()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


# --- gradients --------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Per layer, over batches: ⟨g, g₀⟩, |g|², |g₀|², (batches, layers)."""

    dot: list[list[float]]
    norm: list[list[float]]
    reference: list[list[float]]

    def alignment(self, layer: int) -> float:
        """Mean over batches of the cosine of one layer."""
        return fmean(_cosine(d[layer], n[layer], r[layer]) for d, n, r in zip(self.dot, self.norm, self.reference, strict=True))

    def overall(self) -> list[float]:
        """Cosine of all layers together, by batch."""
        return [_cosine(sum(d), sum(n), sum(r)) for d, n, r in zip(self.dot, self.norm, self.reference, strict=True)]

    def ratio(self, layer: int) -> float:
        """Root of the mean squared norm, quantized over reference."""
        reference = sum(r[layer] for r in self.reference)
        return math.sqrt(sum(n[layer] for n in self.norm) / reference) if reference else math.nan


def _cosine(dot: float, a: float, b: float) -> float:
    return dot / math.sqrt(a * b) if a and b else 0.0


def _alignments(
    reference: nn.Module, settings: Sequence[_Setting], data: Sequence[torch.Tensor]
) -> tuple[float, list[tuple[float, _Sums]]]:
    """Mean loss of the reference; for each setting its mean loss and what its gradients have in common with the reference's."""
    losses, reference_loss = [0.0] * len(settings), 0.0
    sums = [_Sums([], [], []) for _ in settings]
    for batch in data:
        loss, wanted = _gradients(reference, batch, {})
        reference_loss += loss / len(data)
        for i, setting in enumerate(settings):
            loss, found = _gradients(setting.model, batch, setting.turned)
            losses[i] += loss / len(data)
            sums[i].dot.append([float((found[name] * g).sum()) for name, g in wanted.items()])
            sums[i].norm.append([float(found[name].square().sum()) for name in wanted])
            sums[i].reference.append([float(g.square().sum()) for g in wanted.values()])
    return reference_loss, list(zip(losses, sums, strict=True))


def _gradients(model: nn.Module, batch: torch.Tensor, turned: Mapping[str, Hadamard]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and ∂L/∂W (N, K), fp64, of every linear layer in the basis of its input."""
    model.zero_grad()
    loss = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    found = {}
    for name, layer in _linears(model).items():
        assert layer.weight.grad is not None
        g = layer.weight.grad.double()
        found[name] = turned[name].rotate(g) if name in turned else g
    model.zero_grad()
    return float(loss.detach()), found


def contributions(quants: Sequence[QuantConfig], probes: Sequence[SettingProbe]) -> list[Contribution]:
    """What rotation and mask add: the differences between settings that are the same but for that part."""

    def without(quant: QuantConfig, **changes: Any) -> QuantConfig | None:
        specs = [quant.weights, quant.activations]
        try:
            changed = [spec if spec.is_identity else replace(spec, **changes) for spec in specs]
        except UsageError:  # a part that the others need
            return None
        if quant.overrides or changed == specs:
            return None
        return quant.model_copy(update={"weights": changed[0], "activations": changed[1]})

    found = []
    for part, changes in (("rotation", {"basis": None}), ("mask", {"estimator": STE()})):
        for quant, there in zip(quants, probes, strict=True):
            other = without(quant, **changes)
            if other is not None and other in quants:
                control = probes[quants.index(other)]
                found.append(Contribution(part, there.name, control.name, there.alignment - control.alignment))
    return found


# --- quantizers -------------------------------------------------------------------------------------------------------


def mask_of(quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
    """m (…, K) as the backward pass applies it to x (…, K), in the basis where it rounds."""
    x = x.detach().float().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(quantizer(x).sum(), x)
    return quantizer.spec.basis.rotate(g) if quantizer.spec.basis else g


@torch.no_grad()
def relative_error(quantizer: Quantizer, x: torch.Tensor) -> tuple[float, float]:
    """Σ(Q(z) − z)² and Σz² of x (…, K), z in the basis where it rounds."""
    z = x.detach().float()
    y = quantizer(z)
    z = quantizer.spec.basis.rotate(z) if quantizer.spec.basis else z
    return float((y - z).double().square().sum()), float(z.double().square().sum())


class NormalErrors:
    """The relative error of a quantizer on normal values: what theory expects of its operand."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known: dict[tuple[str, tuple[int, ...]], float] = {}

    def __call__(self, quantizer: Quantizer, x: torch.Tensor) -> float:
        """Of as many draws of the shape of x (n, K) and its RMS as make `NORMAL_SAMPLES` values."""
        key = str(quantizer.spec), tuple(x.shape)
        if quantizer.scale is None and key in self.known:
            return self.known[key]
        rms = float(x.detach().double().square().mean().sqrt()) if quantizer.scale is not None else 1.0
        generator = torch.Generator().manual_seed(0)
        error = energy = 0.0
        for _ in range(-(-NORMAL_SAMPLES // x.numel())):
            e, n = relative_error(quantizer, (rms * torch.randn(x.shape, generator=generator)).to(self.device))
            error, energy = error + e, energy + n
        self.known[key] = error / energy if energy else math.nan
        return self.known[key]


def _setting_probe(
    setting: _Setting,
    loss: float,
    sums: _Sums,
    seen: Sequence[Mapping[str, torch.Tensor]],
    later: Mapping[str, torch.Tensor],
    expected: NormalErrors,
) -> SettingProbe:
    layers = []
    for i, (name, layer) in enumerate(_linears(setting.model).items()):
        weights = activations = None
        if isinstance(layer, QuantLinear):
            weights = _operand(layer.weight_quantizer, layer.weight, expected, later=later.get(name))
            activations = _operand(layer.input_quantizer, seen[0][name], expected, other=seen[1][name])
        layers.append(LayerProbe(name, sums.alignment(i), sums.ratio(i), weights, activations))
    overall = sums.overall()
    return SettingProbe(
        setting.name,
        str(setting.quant.weights),
        str(setting.quant.activations),
        loss,
        fmean(overall),
        (min(overall), max(overall)),
        fmean(layer.alignment for layer in layers),
        tuple(layers),
    )


def _operand(
    quantizer: Quantizer,
    x: torch.Tensor,
    expected: NormalErrors,
    *,
    later: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
) -> OperandProbe | None:
    if quantizer.spec.is_identity:
        return None
    m = mask_of(quantizer, x)
    error, energy = relative_error(quantizer, x)
    persistence = None
    if later is not None:
        persistence = persistence_of_entries(m, later)
    elif other is not None:
        persistence = persistence_of_features(m, mask_of(quantizer, other))
    return OperandProbe(float(m.mean()), persistence, error / energy if energy else math.nan, expected(quantizer, x))


def persistence_of_entries(now: torch.Tensor, later: torch.Tensor) -> float | None:
    """Masks m (N, K) of one weight at two steps → the share of the entries distrusted (m < ½) now that are so later."""
    distrusted = now < 0.5
    return float((later[distrusted] < 0.5).double().mean()) if distrusted.any() else None


def persistence_of_features(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Masks m (n, K) of two batches → the probability that the feature of a distrusted entry of the first is distrusted in a
    token of the second: Σ p q / Σ p over features, p and q their shares of distrusted tokens."""
    p, q = ((m < 0.5).double().mean(0) for m in (a, b))
    return float((p * q).sum() / p.sum()) if p.any() else None


def _follow(
    run: Run, config: RunConfig, data: Dataset, steps: int, device: torch.device
) -> tuple[str, Callable[[_Setting], dict[str, torch.Tensor]]]:
    """Which other step the masks of the weights are compared with, and a function that gives them there.

    A run that is not finished still has a checkpoint before the newest, which says how its own masks came about; else the run
    is trained on.
    """
    kept = checkpoint_steps(run.checkpoints_path)
    steps = min(steps, config.train.steps)

    def before(setting: _Setting) -> dict[str, torch.Tensor]:
        return _weight_masks(load_model(run, step=kept[-2], device=device)) if setting.quant == config.quant else {}

    def after(setting: _Setting) -> dict[str, torch.Tensor]:
        if not any((m < 0.5).any() for m in _weight_masks(setting.model).values()):
            return {}
        train = config.train.model_copy(update={"compile": "off", "device": str(device)})
        trainer = Trainer(config.model_copy(update={"quant": setting.quant, "train": train}), data, device, stop=lambda: False)
        trainer.model.load_state_dict(setting.model.state_dict())
        trainer.counters.step = config.train.steps - steps
        for _ in range(steps):
            trainer.step()
        return _weight_masks(trainer.model)

    if not run.model_path.exists() and len(kept) > 1:
        return f"from step {kept[-1]} back to step {kept[-2]}", before
    if steps < 1:
        return "not followed", lambda setting: {}
    return f"after the last {steps} steps of the schedule, trained again in each setting", after


def _weight_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: mask_of(layer.weight_quantizer, layer.weight)
        for name, layer in _linears(model).items()
        if isinstance(layer, QuantLinear) and not layer.weight_quantizer.spec.is_identity
    }


# --- distributions ----------------------------------------------------------------------------------------------------


def _distributions(
    reference: nn.Module, inputs: Mapping[str, torch.Tensor], quants: Sequence[QuantConfig]
) -> Iterator[Distribution]:
    specs = [spec for quant in quants for spec in (quant.weights, quant.activations)]
    bases: list[Hadamard | None] = [None, *dict.fromkeys(spec.basis for spec in specs if spec.basis)]
    for name, layer in _linears(reference).items():
        for operand, x in (("weights", layer.weight.detach()), ("activations", inputs[name])):
            for basis in bases:
                kurtosis, distance = normality(basis.rotate(x) if basis else x)
                yield Distribution(name, operand, basis.text if basis else "none", kurtosis, distance)


@torch.no_grad()
def normality(z: torch.Tensor) -> tuple[float, float]:
    """Excess kurtosis and Kolmogorov–Smirnov distance to the normal of z (n, K), each row divided by its RMS.

    Normal rows have kurtosis −6/(K + 2), as their RMS is their own. Rows of zeros are left out.
    """
    z = z.double()
    rms = z.square().mean(-1, keepdim=True).sqrt()
    z = (z / rms)[rms.squeeze(-1) > 0]
    if not z.numel():
        return math.nan, math.nan
    values = z.flatten()[:: max(1, z.numel() // KS_SAMPLES)].sort().values
    cdf = torch.special.ndtr(values)
    below = torch.arange(len(values), dtype=torch.float64, device=z.device) / len(values)
    distance = torch.maximum((cdf - below).max(), (below + 1 / len(values) - cdf).max())
    return float(z.pow(4).mean()) - 3, float(distance)
