"""Measure, by layer, the effect of quantization on the gradients of a trained model, and how much rotation and mask recover.

    alignment     cos(∂L_q/∂W, ∂L/∂W) of the quantized and the full-precision model, with the same weights and batch (arXiv
                  2502.05003, figure on gradient alignment). Over all linear layers: of their gradients as one vector. Mean over
                  batches.
    trusted       mean of the estimator's mask m: the share of entries that carry gradient
    persistence   share of the distrusted entries that are distrusted later, too (1 − trusted if by chance)
    error         Σ(Q(z) − z)² / Σz², beside that of the same quantizer on normal values of the same shape
    distribution  of z/RMS(row) before and after rotation: excess kurtosis (0 for a normal), Kolmogorov–Smirnov distance to it

Batches are drawn from the validation text and are as large as a training step, but at most `SEQUENCES`: a larger batch has a
smaller gradient without a smaller error, which lowers its alignment. Everything is computed in fp32.

Inputs are those of the full-precision model, so that all quantizers receive the same. The mask is read from the backward pass
itself: m is the gradient of ΣQ(x), in the basis where Q rounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..config import QuantConfig, RunConfig
from ..console import json_text
from ..data import sampler
from ..data.tokens import Dataset
from ..errors import StorageError, UsageError
from ..models.llama import Llama, build_model
from ..quant.estimators import STE
from ..quant.layer_specs import rotated_weights
from ..quant.linear import QuantLinear, calibrate_inputs
from ..quant.model import quantize_model
from ..quant.quantizer import Quantizer
from ..quant.rotations import Hadamard
from ..store import Run, checkpoint_steps
from ..training.loading import load, load_model, unfinished
from ..training.loop import Trainer, execution, pick_device
from .preflight import PROBE_BATCHES, PROBE_STEPS, check_probe, default_probe_quants

SEQUENCES = 16
NORMAL_SAMPLES = 2**19  # number of values for an expected error, to 0.3 % at 4 bits
KS_SAMPLES = 2**17

POOR_REFERENCE = (
    "{run} was trained with quantization ({scheme}): its weights lie where the quantized loss is low, and the full-precision "
    "gradient there is a poor reference. Alignment means something for a run trained with --quant bf16."
)


@dataclass(frozen=True)
class OperandProbe:
    """The effect of a quantizer on the weight or the input of a layer; the quantities are defined at the top of the module."""

    trusted: float
    persistence: float | None  # None if nothing is distrusted, or masks were not compared
    error: float
    normal_error: float  # the error on normal values of the same shape


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
    """The model under one quantizer config; losses in nats/token over the probe's batches."""

    name: str
    weights: str
    activations: str
    by_row: Mapping[str, str]  # specs of embedding, head and kv, those that are quantized
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
    rotation: str  # as in a spec, or none
    kurtosis: float  # E[z⁴] − 3
    distance: float  # Kolmogorov–Smirnov


@dataclass(frozen=True)
class Contribution:
    """The change of the alignment over all layers that one component of the spec makes."""

    part: str  # rotation or mask
    setting: str  # the spec with it
    without: str  # the same spec without it
    gain: float


@dataclass(frozen=True)
class Probe:
    """A probe of one run: settings, the contribution of rotation and mask, and distributions, as plain values."""

    run: str
    scheme: str
    reference_loss: float
    batches: int
    tokens_per_batch: int
    settings: tuple[SettingProbe, ...]
    contributions: tuple[Contribution, ...]
    distributions: tuple[Distribution, ...]
    persistence_of_weights: str  # the steps between which masks were compared
    persistence_of_activations: str
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: the content of probe.json."""
        return asdict(self)

    def write(self, folder: Path | str) -> None:
        """Write probe.json, probe.png and probe.svg into `folder`, which is made. Raises StorageError."""
        from ..analysis.draw import save
        from ..analysis.probe_figure import probe_figure

        out, document = Path(folder), self.to_dict()
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "probe.json").write_text(json_text(document), encoding="utf-8")
            save(probe_figure(document), out / "probe")
        except OSError as e:
            raise StorageError(f"{e.filename or out}: cannot be written: {e.strerror}.") from e


@dataclass(frozen=True)
class _Setting:
    """The reference model quantized by one config."""

    name: str
    quant: QuantConfig
    model: nn.Module
    rotations: Mapping[str, Hadamard]  # layers whose weight is stored in a rotated basis


def probe(
    run: Run,
    quants: Sequence[QuantConfig] = (),
    *,
    batches: int = PROBE_BATCHES,
    sequences: int | None = None,
    steps: int = PROBE_STEPS,
    device: str = "auto",
) -> Probe:
    """Probe `run` under each of `quants` (default: `default_probe_quants`) on `batches` batches of the validation text.

    To compare the masks of the weights, `steps` steps are trained from these weights, with the last learning rates of the run's
    schedule; with 0 they are not compared. See `probe_run` for the errors.
    """
    if min(batches - 1, sequences or 1) < 1:
        raise UsageError(f"probe: {batches} batches of {sequences} sequences are too few; two batches of one are the least.")
    config = run.config()
    quants = list(quants) or default_probe_quants(config)
    check_probe(config, quants)
    place = pick_device(device)
    with execution(int(run.env().get("threads") or torch.get_num_threads()), place):
        loaded = load(run, device=place)
        reference = _reference(loaded.model, config).to(place)
        data = _batches(config, loaded.data, batches, sequences or min(config.train.batch_size, SEQUENCES), place)
        with _inputs(reference) as inputs:
            batch_inputs = []
            for tokens in data[:2]:
                with torch.no_grad():
                    reference(tokens[:, :-1])
                batch_inputs.append(dict(inputs))
        settings = [_setting(q, loaded.model, reference, config, data[0][:, :-1]) for q in quants]
        reference_loss, gradients = _alignments(reference, settings, data)
        expected = NormalErrors(place)
        followed, later_masks = _follow(run, config, loaded.data, steps, place)
        probes = [
            _setting_probe(setting, loss, sums, batch_inputs, later_masks(setting), expected)
            for setting, (loss, sums) in zip(settings, gradients, strict=True)
        ]
        warnings = [partial.sentence(run.name)] if (partial := unfinished(run)) else []
        if config.is_quantized:
            warnings.append(POOR_REFERENCE.format(run=run.name, scheme=config.scheme))
        return Probe(
            run=run.name,
            scheme=config.scheme,
            reference_loss=reference_loss,
            batches=batches,
            tokens_per_batch=data[0][:, 1:].numel(),
            settings=tuple(probes),
            contributions=tuple(contributions(quants, probes)),
            distributions=tuple(_distributions(reference, batch_inputs[0], quants)),
            persistence_of_weights=followed,
            persistence_of_activations="between two batches: a distrusted entry's feature, in a token of the other batch",
            warnings=tuple(warnings),
        )


# --- models -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _reference(model: Llama, config: RunConfig) -> Llama:
    """The model without rounding. Weights that are stored in a rotated basis are rotated into that of their input first."""
    reference = build_model(model.config, QuantConfig(), config.train.seed)
    rotations = rotated_weights(config.model, config.quant)
    stored = dict(model.named_parameters())
    for name, p in reference.named_parameters():
        basis = rotations.get(name.removesuffix(".weight"))
        p.copy_(basis.rotate(stored[name]) if basis else stored[name])
    return reference


def _setting(quant: QuantConfig, own: Llama, reference: Llama, config: RunConfig, tokens: torch.Tensor) -> _Setting:
    mark = f"+g.{quant.gradients}" if not quant.gradients.is_identity else ""
    mark += "".join(f"+{key}.{spec}" for key, spec in quant.by_row.items())
    mark += "+" + quant.label.rpartition("+")[2] if quant.overrides else ""
    name = str(quant.weights) if quant.weights == quant.activations else f"{quant.weights}+{quant.activations}"
    if quant == config.quant:
        return _Setting(name + mark, quant, own, rotated_weights(config.model, quant))
    model = quantize_model(copy.deepcopy(reference), quant, rotate_back=True).to(tokens.device)
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
    """Inside the `with` block, yields name → the newest input of each linear layer of a plain model, as rows (n, K)."""
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
    """Mean loss of the reference; for each setting its mean loss and the products of its gradients with the reference's."""
    losses, reference_loss = [0.0] * len(settings), 0.0
    sums = [_Sums([], [], []) for _ in settings]
    for batch in data:
        loss, exact = _gradients(reference, batch, {})
        reference_loss += loss / len(data)
        for i, setting in enumerate(settings):
            loss, own = _gradients(setting.model, batch, setting.rotations)
            losses[i] += loss / len(data)
            sums[i].dot.append([float((own[name] * g).sum()) for name, g in exact.items()])
            sums[i].norm.append([float(own[name].square().sum()) for name in exact])
            sums[i].reference.append([float(g.square().sum()) for g in exact.values()])
    return reference_loss, list(zip(losses, sums, strict=True))


def _gradients(
    model: nn.Module, batch: torch.Tensor, rotations: Mapping[str, Hadamard]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and ∂L/∂W (N, K) in fp64 of every linear layer, in the basis of its input."""
    model.zero_grad()
    loss = model(batch[:, :-1], batch[:, 1:])
    loss.backward()
    gradients = {}
    for name, layer in _linears(model).items():
        assert layer.weight.grad is not None
        g = layer.weight.grad.double()
        gradients[name] = rotations[name].rotate(g) if name in rotations else g
    model.zero_grad()
    return float(loss.detach()), gradients


def contributions(quants: Sequence[QuantConfig], probes: Sequence[SettingProbe]) -> list[Contribution]:
    """The gain by rotation and by mask: differences between settings that differ only in that component."""

    def without(quant: QuantConfig, **changes: Any) -> QuantConfig | None:
        specs = [quant.weights, quant.activations]
        try:
            changed = [spec if spec.is_identity else replace(spec, **changes) for spec in specs]
        except UsageError:  # the other components need this one
            return None
        if quant.overrides or changed == specs:
            return None
        return quant.model_copy(update={"weights": changed[0], "activations": changed[1]})

    gains = []
    for part, changes in (("rotation", {"basis": None}), ("mask", {"estimator": STE()})):
        for quant, setting in zip(quants, probes, strict=True):
            other = without(quant, **changes)
            if other is not None and other in quants:
                control = probes[quants.index(other)]
                gains.append(Contribution(part, setting.name, control.name, setting.alignment - control.alignment))
    return gains


# --- quantizers -------------------------------------------------------------------------------------------------------


def mask_of(quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
    """The mask m (…, K) that the backward pass applies to x (…, K), in the basis where the quantizer rounds."""
    x = x.detach().float().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(quantizer(x).sum(), x)
    return quantizer.spec.basis.rotate(g) if quantizer.spec.basis else g


@torch.no_grad()
def relative_error(quantizer: Quantizer, x: torch.Tensor) -> tuple[float, float]:
    """Σ(Q(z) − z)² and Σz² for x (…, K), with z in the basis where the quantizer rounds."""
    z = x.detach().float()
    y = quantizer(z)
    z = quantizer.spec.basis.rotate(z) if quantizer.spec.basis else z
    return float((y - z).double().square().sum()), float(z.double().square().sum())


class NormalErrors:
    """The relative error of quantizers on normal values, the expected error of their operands; computed once for each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._errors: dict[tuple[str, tuple[int, ...]], float] = {}

    def __call__(self, quantizer: Quantizer, x: torch.Tensor) -> float:
        """The error on draws with the shape and RMS of x (n, K), enough of them for `NORMAL_SAMPLES` values."""
        key = str(quantizer.spec), tuple(x.shape)
        if quantizer.scale is None and key in self._errors:
            return self._errors[key]
        rms = float(x.detach().double().square().mean().sqrt()) if quantizer.scale is not None else 1.0
        generator = torch.Generator().manual_seed(0)
        error = energy = 0.0
        for _ in range(-(-NORMAL_SAMPLES // x.numel())):
            e, n = relative_error(quantizer, (rms * torch.randn(x.shape, generator=generator)).to(self.device))
            error, energy = error + e, energy + n
        self._errors[key] = error / energy if energy else math.nan
        return self._errors[key]


def _setting_probe(
    setting: _Setting,
    loss: float,
    sums: _Sums,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    later: Mapping[str, torch.Tensor],
    expected: NormalErrors,
) -> SettingProbe:
    layers = []
    for i, (name, layer) in enumerate(_linears(setting.model).items()):
        weights = activations = None
        if isinstance(layer, QuantLinear):
            weights = _operand(layer.weight_quantizer, layer.weight, expected, later=later.get(name))
            activations = _operand(layer.input_quantizer, inputs[0][name], expected, other=inputs[1][name])
        layers.append(LayerProbe(name, sums.alignment(i), sums.ratio(i), weights, activations))
    overall = sums.overall()
    return SettingProbe(
        setting.name,
        str(setting.quant.weights),
        str(setting.quant.activations),
        {key: str(spec) for key, spec in setting.quant.by_row.items()},
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
    """Masks m (N, K) of one weight at two steps → the share of the entries distrusted now (m < ½) that still are later."""
    distrusted = now < 0.5
    return float((later[distrusted] < 0.5).double().mean()) if distrusted.any() else None


def persistence_of_features(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Masks m (n, K) of two batches → how likely the feature of an entry distrusted in the first is distrusted in the second.

    This is Σ p q / Σ p over features, with p and q their shares of distrusted tokens in the two batches.
    """
    p, q = ((m < 0.5).double().mean(0) for m in (a, b))
    return float((p * q).sum() / p.sum()) if p.any() else None


def _follow(
    run: Run, config: RunConfig, data: Dataset, steps: int, device: torch.device
) -> tuple[str, Callable[[_Setting], dict[str, torch.Tensor]]]:
    """The step with which the masks of the weights are compared, in words, and a function that returns the masks then.

    An unfinished run is compared with the checkpoint before its newest, if it still has one. Any other run is trained further.
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

    Normal rows have an excess kurtosis of −6/(K + 2), since each is divided by its own RMS. Rows of zeros are left out.
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
