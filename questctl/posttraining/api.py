"""Public calls on a trained run: quantize it, allocate bits to its layers, probe it. Checks precede the import of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Layer, ModelConfig, QuantConfig, RunConfig, file_layer, resolve
from ..errors import UsageError, unknown
from ..quant.methods import GRID_OF_BITS, METHODS, method_specs
from ..quant.spec import QuantSpec
from ..store import Result, Run, open_run
from .preflight import (
    CALIBRATION_TOKENS,
    DAMPING,
    PROBE_BATCHES,
    PROBE_STEPS,
    SENSITIVITY_TOKENS,
    check_candidates,
    check_probe,
    check_sensitivity,
    default_probe_quants,
    ptq_config,
    quest_candidates,
    require_full_precision,
)

if TYPE_CHECKING:
    from .allocate import Allocation
    from .probe import Probe

Quantizer = QuantSpec | str  # a spec, its text, or the name of a method that is completed by `bits`


@dataclass(frozen=True)
class QuantizedRun:
    """A run that was quantized after training, its result, and the result of the full-precision run that it was made from."""

    run: Run
    result: Result
    source: Result

    def to_dict(self) -> dict[str, Any]:
        """The new run's result, with the source's name and loss and the new folder, as JSON values."""
        about = {"source": self.source.run, "source_loss": self.source.loss, "path": str(self.run.path)}
        return {**asdict(self.result), **about}


def quantize_run(
    run: Run | Path | str,
    quant: QuantConfig | Quantizer | Path,
    *,
    bits: str | int | None = None,
    activations: Quantizer | None = None,
    method: str = "gptq",
    calibration_tokens: int = CALIBRATION_TOKENS,
    damping: float = DAMPING,
    device: str = "auto",
) -> QuantizedRun:
    """Quantize a finished full-precision run without further training; the new run is stored beside it.

    Args:
        run: A run, its folder, or its name in the default folder of runs.
        quant: A spec such as "int4-h64-rms-ste", the name of a method together with `bits`, a QuantConfig, or the Path of a
            TOML file with a [quant] section, such as an allocation.
        bits: Bits of the method that `quant` names.
        activations: Spec or method of the layers' inputs. Default: that of the weights; "bf16" leaves inputs unquantized.
        method: "gptq" compensates the error of each rounded weight in those that follow; "rtn" rounds to nearest.
        calibration_tokens: Number of training tokens to calibrate with (gptq).
        damping: Share of the diagonal's mean that is added to the diagonal of the Hessian (gptq).
        device: As `train.device`.

    Raises:
        UsageError: The run is quantized already, a spec does not fit a layer, or a number is out of range.
        DataError: The run is not finished, or damaged.
        StorageError: The new run cannot be written.
        LeaseHeld: Another process is writing the new run.
    """
    source = open_run(run)
    config = require_full_precision(source, "quantize")
    if isinstance(quant, Path):
        chosen = _quant_section(quant, config.model)
    elif isinstance(quant, QuantConfig):
        chosen = quant
    else:
        chosen = _quant_of(quant, activations, bits, config.model)
    ptq_config(config, chosen, method, calibration_tokens, damping)  # raises, before torch is imported, if this cannot be done
    from .quantize import quantize

    result = quantize(source, chosen, method=method, calibration_tokens=calibration_tokens, damping=damping, device=device)
    return QuantizedRun(source.sibling(result.run), result, source.require_result("quantize"))


def allocate_bits(
    run: Run | Path | str,
    bits: float,
    specs: Sequence[Quantizer] = (),
    *,
    activations: Quantizer = "bf16",
    sensitivity: str = "measured",
    method: str = "rtn",
    tokens: int = SENSITIVITY_TOKENS,
    device: str = "auto",
) -> Allocation:
    """Choose a spec for the weights of each layer so that the modelled loss is least within a budget of bits per weight.

    Args:
        run: A finished full-precision run, its folder, or its name in the default folder of runs.
        bits: The budget: mean stored bits per weight of the quantized layers. Scales of rows and tensors are not counted.
        specs: The candidates. Default: QuEST at 1 to 8 bits.
        activations: The spec of all inputs.
        sensitivity: "measured" rounds each layer alone and measures the loss; "gaussian" models noise through the curvature.
        method: How weights are rounded for measured sensitivities: "rtn" as training does, "gptq" as `quantize_run` does.
        tokens: Number of tokens of the training text for sensitivities.
        device: As `train.device`.

    Raises:
        UsageError: The run is quantized already, a spec does not fit, or the budget lies outside the candidates' bits.
        DataError: The run is not finished, or damaged.
    """
    check_sensitivity(sensitivity, method)
    source = open_run(run)
    config = require_full_precision(source, "allocate")
    candidates = [_parsed(spec, "--specs") for spec in specs] or quest_candidates(config.model)
    inputs = _parsed(activations, "--activations", "activations")
    check_candidates(config.model, candidates, inputs, bits)
    from .allocate import allocate

    return allocate(
        source, bits, candidates, activations=inputs, sensitivity=sensitivity, method=method, tokens=tokens, device=device
    )


def probe_run(
    run: Run | Path | str,
    quants: Sequence[QuantConfig | Quantizer | Path] = (),
    *,
    bits: str | int | None = None,
    activations: Quantizer | None = None,
    batches: int = PROBE_BATCHES,
    sequences: int | None = None,
    steps: int = PROBE_STEPS,
    device: str = "auto",
) -> Probe:
    """Compare the gradients of a trained model, quantized in several ways, with those in full precision, layer by layer.

    Args:
        run: A run, its folder, or its name in the default folder of runs. It need not be finished.
        quants: Specs, methods (with `bits`), QuantConfigs, or paths of config files with a [quant] section. Default: of a
            full-precision run four specs, with and without rotation and trust mask; of a quantized run its own.
        bits: Bits of the methods, and of the four default specs (default: 4).
        activations: Spec or method of the layers' inputs. Default: that of the weights.
        batches: Number of batches of the validation text.
        sequences: Sequences per batch. Default: those of a training step, at most 16.
        steps: Training steps after which the masks of the weights are compared; 0: they are not compared.
        device: As `train.device`.

    Raises:
        UsageError: A spec does not fit or would give the stored weights another meaning, or a number is out of range.
        DataError: The run has no weights yet, or is damaged.
    """
    source = open_run(run)
    config = source.config()
    settings = _probe_quants(config, quants, bits, activations)
    check_probe(config, settings)
    from .probe import probe

    return probe(source, settings, batches=batches, sequences=sequences, steps=steps, device=device)


# --- requests ---------------------------------------------------------------------------------------------------------


def _parsed(spec: Quantizer, key: str, operand: str = "weights") -> QuantSpec:
    return spec if isinstance(spec, QuantSpec) else QuantSpec.parse(spec, key=key, operand=operand)


def _quant_of(weights: Quantizer, activations: Quantizer | None, bits: str | int | None, model: ModelConfig) -> QuantConfig:
    """The quantizers of weights and inputs. Without `activations`, those of a method, or the spec of the weights, apply."""
    inputs = weights if activations is None else activations
    return QuantConfig(
        weights=_spec_of(weights, bits, model, "weights"), activations=_spec_of(inputs, bits, model, "activations")
    )


def _spec_of(text: Quantizer, bits: str | int | None, model: ModelConfig, side: str) -> QuantSpec:
    """The spec itself, or that of one side of a method with its bits and the rotation block that fits the model."""
    if isinstance(text, QuantSpec) or text not in METHODS:
        return _parsed(text, "--quant" if side == "weights" else "--activations", side)
    if bits is None and text != "bf16" and len(METHODS[text].bits) > 1:
        raise UsageError(f"--quant: '{text}' is a method and needs --bits, such as 4; or give a spec such as int4-rms-ste.")
    return QuantSpec.parse(method_specs(text, bits, block=model.rotation_block)[side == "activations"], operand=side)


def _quant_section(path: Path, model: ModelConfig) -> QuantConfig:
    """The [quant] section of a config file, for this model; other sections are ignored. Raises UsageError naming the file."""
    values: dict[tuple[str, ...], Any] = {("model", key): value for key, value in model.model_dump().items()}
    values[("quant", "block")] = model.rotation_block
    layer = file_layer(path)
    section = {key: value for key, value in layer.values.items() if key[0] == "quant"}
    if not section:
        raise UsageError(f"{path}: has no [quant] section.")
    return resolve([Layer("run", values), Layer(layer.origin, section)]).config.quant


def _probe_quants(
    config: RunConfig, quants: Sequence[QuantConfig | Quantizer | Path], bits: str | int | None, activations: Quantizer | None
) -> list[QuantConfig]:
    if not quants and activations is not None:
        raise UsageError("--activations: needs --quant for the weights.")
    if not quants and bits is not None and config.is_quantized:
        raise UsageError(f"--bits: {config.run_id} is quantized and is probed as it is; give --quant to probe it otherwise.")

    def setting(q: QuantConfig | Quantizer | Path) -> QuantConfig:
        if isinstance(q, Path) or str(q).endswith(".toml"):
            return _quant_section(Path(str(q)), config.model)
        return q if isinstance(q, QuantConfig) else _quant_of(q, activations, bits, config.model)

    settings = [setting(q) for q in quants]
    twice = next((s for i, s in enumerate(settings) if s in settings[:i]), None)
    if twice:
        raise UsageError(f"--quant: '{twice.weights}' is given twice.")
    return settings or default_probe_quants(config, _grid(str(bits or "4")))


def _grid(bits: str) -> str:
    if bits not in GRID_OF_BITS or GRID_OF_BITS[bits] == "bf16":
        raise UsageError(unknown("--bits", bits, [b for b in GRID_OF_BITS if b != "16"]))
    return GRID_OF_BITS[bits]
