"""What can be made of a finished run, checked before torch is loaded: quantized, probed, its bits allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from ..config import LayerQuant, ModelConfig, PTQConfig, QuantConfig, RunConfig
from ..errors import DataError, UsageError, unknown
from ..quant.estimators import STE, Clip
from ..quant.layer_specs import layer_specs, layer_widths
from ..quant.methods import method_specs
from ..quant.rotations import Hadamard
from ..quant.spec import QuantSpec
from ..store import Run

PTQ_METHODS: tuple[str, ...] = get_args(PTQConfig.model_fields["method"].annotation)
CALIBRATION_TOKENS = 32_768
DAMPING = 0.01  # of the published code of GPTQ (percdamp)
SENSITIVITIES = ("measured", "gaussian")


def require_full_precision(run: Run, what: str) -> RunConfig:
    """The config of a finished run in full precision. Raises UsageError if it is quantized, DataError if it is not finished."""
    config = run.config()
    if config.scheme != "bf16":
        raise UsageError(f"{what}: {run.name} is quantized ({config.scheme}) already; take a run trained with --quant bf16.")
    if run.result() is None:
        raise DataError(f"{what}: {run.name} is not finished ({run.state()}); questctl train goes on with it.")
    return config


def after_training(
    source: RunConfig, quant: QuantConfig, method: str, calibration_tokens: int = CALIBRATION_TOKENS, damping: float = DAMPING
) -> RunConfig:
    """The config of a run quantized after training: one spelling for each experiment, so that what has no effect is not in it.

    Estimators and stochastic rounding belong to training: estimators become `ste` (`clip1` beside a learned offset). Raises
    UsageError if a word does not fit its layer, or for a number out of range.
    """
    if method not in PTQ_METHODS:
        raise UsageError(unknown("method", method, PTQ_METHODS, what="method"))
    if calibration_tokens < 1:
        raise UsageError(f"calibration tokens: {calibration_tokens} is not a positive number.")
    if not 0 < damping < float("inf"):
        raise UsageError(f"damping: {damping!r} is not a positive number.")
    overrides = {
        pattern: LayerQuant(**{side: spec and _without_gradient(spec) for side, spec in layer})
        for pattern, layer in quant.overrides.items()
    }
    weights, activations = (_without_gradient(spec) for spec in (quant.weights, quant.activations))
    quant = QuantConfig(weights=weights, activations=activations, overrides=overrides)
    words = layer_specs(layer_widths(source.model), quant)
    if all(w.is_identity and a.is_identity for w, a in words.values()):
        raise UsageError("quantize: bf16 quantizes nothing; give a word such as int4-h64-rms-ste.")
    pairs = next((w.grid.text for w, _ in words.values() if w.grid.group > 1), None)
    if method == "gptq" and pairs:
        raise UsageError(f"--method: gptq rounds one input after the other, but '{pairs}' rounds pairs; choose rtn.")
    t, length = source.train, source.data.seq_len
    learned = any(a.scale is not None and a.scale.learned for _, a in words.values())
    sequences = max(1, calibration_tokens // length) if method == "gptq" else t.batch_size * learned
    damping = damping if method == "gptq" else 0.0
    ptq = PTQConfig.model_validate(
        {"source": source.run_id, "method": method, "calibration_tokens": sequences * length, "damping": damping}
    )
    return source.model_copy(update={"quant": quant, "ptq": ptq})


def palette(model: ModelConfig) -> list[str]:
    """QuEST's words of 1 to 8 bits with the rotation that fits the model: what `allocate` chooses from if it is not told."""
    return [method_specs("quest", bits, block=model.rotation_block)[0] for bits in range(1, 9)]


def check_words(model: ModelConfig, words: Sequence[str], activations: str, bits: float) -> None:
    """Raises UsageError for words that do not fit the model or the word of the inputs, and for a budget beyond their bits."""
    specs, inputs = [QuantSpec.parse(word) for word in words], QuantSpec.parse(activations, operand="activations")
    for spec in specs:
        layer_specs(layer_widths(model), QuantConfig(weights=spec, activations=inputs))
    sizes = [spec.bits for spec in specs]
    if len(set(words)) < len(words) or not words:
        raise UsageError(f"--words: {', '.join(words) or 'none'}: give different words, two or more.")
    if not min(sizes) <= bits <= max(sizes):
        raise UsageError(f"--bits: {bits:g} lies outside what the words can give, {min(sizes):g} to {max(sizes):g} bits.")


def check_sensitivity(sensitivity: str, method: str) -> None:
    """Raises UsageError unless layers can be measured this way: Gaussian noise stands for rounding to nearest alone."""
    if sensitivity not in SENSITIVITIES:
        raise UsageError(unknown("--sensitivity", sensitivity, SENSITIVITIES))
    if method not in PTQ_METHODS:
        raise UsageError(unknown("--method", method, PTQ_METHODS))
    if (sensitivity, method) == ("gaussian", "gptq"):
        raise UsageError("--method: gptq: the gaussian model knows no compensation; take --sensitivity measured.")


def _without_gradient(spec: QuantSpec) -> QuantSpec:
    """The spec with the same levels, without what only matters in training: stochastic rounding and the estimator."""
    if spec.is_identity or spec.scale is None:
        return spec
    offset = spec.scale.learned and spec.scale.centred  # which goes with no `ste`
    return replace(spec, grid=replace(spec.grid, variant=""), estimator=Clip(1.0) if offset else STE())


def default_quants(config: RunConfig, grid: str = "int4") -> list[QuantConfig]:
    """What to probe. A run in full precision: with and without rotation, with and without mask. A quantized one: as it is."""
    if config.scheme != "bf16":
        return [config.quant]
    block = config.model.rotation_block
    bases = [f"-h{block}", ""] if block > 1 else [""]
    specs = [QuantSpec.parse(f"{grid}{basis}-rms-{mask}") for basis in bases for mask in ("trust", "ste")]
    return [QuantConfig(weights=spec, activations=spec) for spec in specs]


def check_quants(config: RunConfig, quants: Sequence[QuantConfig]) -> None:
    """Raises UsageError for what cannot be probed: words that do not fit, or that mean other weights than those of the run."""
    if config.ptq is not None:
        raise UsageError(f"probe: {config.run_id} has rounded weights; probe its source, {config.ptq.source}.")
    for quant in quants:
        if rotated_weights(config.model, quant) and quant != config.quant:
            raise UsageError(
                f"probe: weights '{quant.weights}' with inputs in full precision mean a rotated parametrisation, whose weights "
                "are not those of this run; rotate the inputs too (--activations), or leave the rotation out."
            )


def rotated_weights(model: ModelConfig, quant: QuantConfig) -> dict[str, Hadamard]:
    """The layers whose input is not rotated but whose weight is: there W is stored as what M turns into the layer's matrix."""
    words = layer_specs(layer_widths(model), quant)
    return {name: w.basis for name, (w, a) in words.items() if w.basis and a.is_identity}
