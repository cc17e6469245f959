"""Checks that run before torch is imported: whether a finished run can be quantized, probed, or given mixed bits.

It also makes the config of a run that is quantized after training, and the default quantizers of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from ..config import LayerQuant, ModelConfig, PTQConfig, QuantConfig, RunConfig
from ..errors import UsageError, unknown
from ..quant.estimators import STE, Clip
from ..quant.layer_specs import layer_specs, layer_widths, rotated_weights
from ..quant.methods import method_specs
from ..quant.spec import QuantSpec
from ..store import Run

PTQ_METHODS: tuple[str, ...] = get_args(PTQConfig.model_fields["method"].annotation)
CALIBRATION_TOKENS = 32_768
DAMPING = 0.01  # percdamp of the published code of GPTQ
SENSITIVITIES = ("measured", "gaussian")
SENSITIVITY_TOKENS = 16_384  # default tokens of the training text for sensitivities
PROBE_BATCHES, PROBE_STEPS = 8, 10


def require_full_precision(run: Run, command: str) -> RunConfig:
    """The config of a finished run in full precision. Raises UsageError if it is quantized, DataError if it is not finished."""
    config = run.config()
    if config.is_quantized:
        raise UsageError(f"{command}: {run.name} is quantized ({config.scheme}) already; take a run trained with --quant bf16.")
    run.require_result(command)
    return config


# --- quantization after training --------------------------------------------------------------------------------------


def ptq_config(
    source: RunConfig, quant: QuantConfig, method: str, calibration_tokens: int = CALIBRATION_TOKENS, damping: float = DAMPING
) -> RunConfig:
    """The config of the run that results from quantizing `source` after its training; equal experiments get equal configs.

    Settings without effect are therefore normalised. Estimators and stochastic rounding matter only in training: each estimator
    becomes `ste` (`clip1` beside a learned offset). Without gptq the damping is 0, and calibration tokens count only for
    learned scales of the inputs. Raises UsageError for a spec that does not fit its layer and for a number out of range.
    """
    if method not in PTQ_METHODS:
        raise UsageError(unknown("method", method, PTQ_METHODS, what="method"))
    if calibration_tokens < 1:
        raise UsageError(f"calibration tokens: {calibration_tokens} is not a positive number.")
    if not 0 < damping < float("inf"):
        raise UsageError(f"damping: {damping!r} is not a positive number.")
    if quant.by_row:
        key = next(iter(quant.by_row))
        raise UsageError(f"quantize: quant.{key}: is quantized in training alone; leave it out, or train with it.")
    overrides = {
        pattern: LayerQuant(**{side: spec and _without_gradient(spec) for side, spec in layer})
        for pattern, layer in quant.overrides.items()
    }
    weights, activations = (_without_gradient(spec) for spec in (quant.weights, quant.activations))
    quant = QuantConfig(weights=weights, activations=activations, overrides=overrides)
    specs = layer_specs(layer_widths(source.model), quant)
    if all(w.is_identity and a.is_identity for w, a in specs.values()):
        raise UsageError("quantize: bf16 quantizes nothing; give a spec such as int4-h64-rms-ste.")
    pairs = next((w.grid.text for w, _ in specs.values() if w.grid.group > 1), None)
    if method == "gptq" and pairs:
        raise UsageError(f"--method: gptq rounds one input after the other, but '{pairs}' rounds pairs; choose rtn.")
    t, length = source.train, source.data.seq_len
    learned = any(a.scale is not None and a.scale.learned for _, a in specs.values())
    sequences = max(1, calibration_tokens // length) if method == "gptq" else t.batch_size * learned
    damping = damping if method == "gptq" else 0.0
    ptq = PTQConfig.model_validate(
        {"source": source.run_id, "method": method, "calibration_tokens": sequences * length, "damping": damping}
    )
    return source.model_copy(update={"quant": quant, "ptq": ptq})


def _without_gradient(spec: QuantSpec) -> QuantSpec:
    """The spec with the same levels, without what only matters in training: stochastic rounding and the estimator."""
    if spec.is_identity or spec.scale is None:
        return spec
    offset = spec.scale.learned and spec.scale.centred  # a spec with a learned offset cannot end in `ste`
    return replace(spec, grid=replace(spec.grid, variant=""), estimator=Clip(1.0) if offset else STE())


# --- allocation of bits -----------------------------------------------------------------------------------------------


def quest_candidates(model: ModelConfig) -> list[QuantSpec]:
    """QuEST's specs of 1 to 8 bits with the rotation block that fits the model: the default candidates of an allocation."""
    return [QuantSpec.parse(method_specs("quest", bits, block=model.rotation_block)[0]) for bits in range(1, 9)]


def check_candidates(model: ModelConfig, specs: Sequence[QuantSpec], activations: QuantSpec, bits: float) -> None:
    """Raises UsageError for candidates that do not fit the model or its inputs' spec, and for a budget beyond their bits."""
    for spec in specs:
        layer_specs(layer_widths(model), QuantConfig(weights=spec, activations=activations))
    if len(set(specs)) < len(specs) or not specs:
        raise UsageError(f"--specs: {', '.join(map(str, specs)) or 'none'}: give different specs, two or more.")
    sizes = [spec.bits for spec in specs]
    if not min(sizes) <= bits <= max(sizes):
        raise UsageError(f"--bits: {bits:g} lies outside what the specs can give, {min(sizes):g} to {max(sizes):g} bits.")


def check_sensitivity(sensitivity: str, method: str) -> None:
    """Raises UsageError for an unknown sensitivity or method, and for gaussian with gptq, which models rounding to nearest."""
    if sensitivity not in SENSITIVITIES:
        raise UsageError(unknown("--sensitivity", sensitivity, SENSITIVITIES))
    if method not in PTQ_METHODS:
        raise UsageError(unknown("--method", method, PTQ_METHODS))
    if (sensitivity, method) == ("gaussian", "gptq"):
        raise UsageError("--method: gptq compensates errors, which gaussian sensitivities ignore; use --sensitivity measured.")


# --- probes -----------------------------------------------------------------------------------------------------------


def default_probe_quants(config: RunConfig, grid: str = "int4") -> list[QuantConfig]:
    """The default quantizers of a probe.

    A run in full precision is probed with and without rotation, each with and without trust mask; a quantized run as it is.
    """
    if config.is_quantized:
        return [config.quant]
    block = config.model.rotation_block
    bases = [f"-h{block}", ""] if block > 1 else [""]
    specs = [QuantSpec.parse(f"{grid}{basis}-rms-{mask}") for basis in bases for mask in ("trust", "ste")]
    return [QuantConfig(weights=spec, activations=spec) for spec in specs]


def check_probe(config: RunConfig, quants: Sequence[QuantConfig]) -> None:
    """Raises UsageError if a quantizer does not fit the model, or would give the stored weights another meaning."""
    if config.ptq is not None:
        raise UsageError(f"probe: {config.run_id} has rounded weights; probe its source, {config.ptq.source}.")
    for quant in quants:
        if rotated_weights(config.model, quant) and quant != config.quant:
            raise UsageError(
                f"probe: weights '{quant.weights}' with inputs in full precision mean a rotated parametrisation, whose weights "
                "are not those of this run; rotate the inputs too (--activations), or leave the rotation out."
            )
