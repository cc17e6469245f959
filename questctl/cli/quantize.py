"""`questctl quantize RUN --quant SPEC`: quantize a full-precision run after training, as the baseline beside trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..errors import UsageError
from ..posttraining import QuantizedRun, quantize_run
from ..posttraining.preflight import CALIBRATION_TOKENS, DAMPING
from ..store import RunStore
from . import options as opt

Specs = Annotated[
    str | None,
    typer.Option("--quant", "-q", metavar="SPEC", help="int4-h64-rms-ste, or a method with --bits.", show_default=False),
]
Bits = Annotated[str | None, typer.Option("--bits", "-b", help="Bits of the method.", show_default=False)]
Activations = Annotated[
    str | None, typer.Option(help="Spec of the layers' inputs (default: that of the weights); bf16: none.", show_default=False)
]
Section = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file whose table quant applies, such as an allocation.", show_default=False),
]


def command(
    name: opt.OneRun,
    quant: Specs = None,
    bits: Bits = None,
    activations: Activations = None,
    config: Section = None,
    method: Annotated[str, typer.Option(help="rtn: round to nearest; gptq: compensate the error.")] = "gptq",
    calibration_tokens: Annotated[int, typer.Option(help="Training tokens to calibrate with (gptq).")] = CALIBRATION_TOKENS,
    damping: Annotated[float, typer.Option(help="Share of its mean added to the Hessian's diagonal (gptq).")] = DAMPING,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Quantize a finished full-precision run without training; the new run appears in ls, compare and fit-scaling.

    For example: questctl quantize 06c72749 --quant int4-h64-rms-ste --method gptq
    """
    chosen = quant or config
    if chosen is None or (quant and config):
        raise UsageError("quantize: give --quant SPEC, or --config FILE with a [quant] section; one of the two.")
    done = quantize_run(
        RunStore(runs).find(name),
        chosen,
        bits=bits,
        activations=activations,
        method=method,
        calibration_tokens=calibration_tokens,
        damping=damping,
    )
    if as_json:
        console.print_json(done.to_dict())
    else:
        _show(done)


def _show(done: QuantizedRun) -> None:
    result, source = done.result, done.source
    rows = [
        ("validation loss", f"{result.loss:.4f} nats/token, {result.loss - source.loss:+.4f} to {source.run}"),
        ("scheme", f"{result.scheme}: weights {result.weights}, activations {result.activations}"),
        ("stored in", f"{result.model_bits / result.params_non_embedding:.2f} bits per non-embedding parameter"),
        ("folder", str(done.run.path)),
    ]
    console.print_table(("run", result.run), rows, left=2)
