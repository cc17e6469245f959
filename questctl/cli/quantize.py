"""`questctl quantize RUN --quant WORD`: a full-precision run quantized after training, as the baseline beside trained ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .. import console
from ..config import Layer, ModelConfig, QuantConfig, file_layer, resolve
from ..errors import UsageError
from ..posttraining.preflight import CALIBRATION_TOKENS, DAMPING, after_training, require_full_precision
from ..quant.methods import METHODS, method_specs
from ..quant.spec import QuantSpec
from ..store import Result, Run, RunStore
from . import options as opt
from .runs import A_RUN

Words = Annotated[
    str | None,
    typer.Option("--quant", "-q", metavar="WORD", help="int4-h64-rms-ste, or a method with --bits.", show_default=False),
]
Bits = Annotated[str | None, typer.Option("--bits", "-b", help="Bits of the method.", show_default=False)]
Activations = Annotated[
    str | None, typer.Option(help="Word of the layers' inputs; left out: that of the weights; bf16: none.", show_default=False)
]
Section = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file whose [quant] to take, such as an allocation.", show_default=False),
]


def command(
    name: Annotated[str, A_RUN],
    quant: Words = None,
    bits: Bits = None,
    activations: Activations = None,
    config: Section = None,
    method: Annotated[str, typer.Option(help="rtn: round to nearest; gptq: compensate the error.")] = "gptq",
    calibration_tokens: Annotated[int, typer.Option(help="Training tokens to calibrate with (gptq).")] = CALIBRATION_TOKENS,
    damping: Annotated[float, typer.Option(help="Share of its mean added to the Hessian's diagonal (gptq).")] = DAMPING,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Quantize a finished full-precision run without training. The result is a run that ls, compare and fit-scaling know.

    For example: questctl quantize 06c72749 --quant int4-h64-rms-ste --method gptq
    """
    if (quant is None) == (config is None):
        raise UsageError("quantize: give --quant WORD, or --config FILE with a [quant] section; one of the two.")
    run = RunStore(opt.runs_dir(runs)).find(name)
    model = require_full_precision(run, "quantize").model
    if config is not None:
        words = quant_section(config, model)
    else:
        assert quant is not None
        inputs = spec_of(activations or quant, bits, model, side="activations")
        words = QuantConfig(weights=spec_of(quant, bits, model), activations=inputs)
    after_training(run.config(), words, method, calibration_tokens, damping)
    from ..posttraining.quantize import quantize

    result = quantize(run, words, method=method, calibration_tokens=calibration_tokens, damping=damping)
    source = run.result()
    assert source is not None
    if as_json:
        path = str(run.path.parent / result.run)
        console.print_json({**asdict(result), "source": run.name, "source_loss": source.loss, "path": path})
    else:
        show(result, source, run)


def spec_of(
    text: str, bits: str | None, model: ModelConfig, *, side: Literal["weights", "activations"] = "weights"
) -> QuantSpec:
    """The spec that `text` is, or that of one side of a method with its bits (and the rotation block that fits the model).

    Raises UsageError naming --quant.
    """
    if text not in METHODS:
        return QuantSpec.parse(text, key="--quant" if side == "weights" else "--activations", operand=side)
    if bits is None and text != "bf16" and len(METHODS[text].bits) > 1:
        raise UsageError(f"--quant: '{text}' is a method and needs --bits, such as 4; or give a word such as int4-rms-ste.")
    return QuantSpec.parse(method_specs(text, bits, block=model.rotation_block)[side == "activations"], operand=side)


def quant_section(path: Path, model: ModelConfig) -> QuantConfig:
    """The [quant] of a config file, for this model. Raises UsageError naming the file."""
    of_run: dict[tuple[str, ...], Any] = {("model", key): value for key, value in model.model_dump().items()}
    of_run[("quant", "block")] = model.rotation_block
    layer = file_layer(path)
    mine = {key: value for key, value in layer.values.items() if key[0] == "quant"}
    if not mine:
        raise UsageError(f"{path}: has no [quant] section.")
    return resolve([Layer("run", of_run), Layer(layer.origin, mine)]).config.quant


def show(result: Result, source: Result, run: Run) -> None:
    """Before and after, and where the new run is."""
    rows = [
        ("validation loss", f"{result.loss:.4f} nats/token, {result.loss - source.loss:+.4f} to {run.name}"),
        ("scheme", f"{result.scheme}: weights {result.weights}, activations {result.activations}"),
        ("stored in", f"{result.model_bits / result.params_non_embedding:.2f} bits per non-embedding parameter"),
        ("folder", str(run.path.parent / result.run)),
    ]
    console.print_table(("run", result.run), rows, left=2)
