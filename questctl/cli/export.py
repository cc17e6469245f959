"""`questctl export RUN --format … --out DIR`: a finished run as files for transformers, vLLM or llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..export import FORMATS, export_run
from ..export.api import COMPARED_TOKENS
from ..store import RunStore
from . import options as opt
from .eval import Average

FormatOption = Annotated[str, typer.Option("--format", "-f", help=", ".join(FORMATS) + ".", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
DType = Annotated[
    str | None,
    typer.Option(
        help="Type of all other tensors: fp32, bf16; gguf: f32, f16, q8_0, or exact, tq1_0, tq2_0, q4_0, q5_0 for its levels.",
        show_default=False,
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Validation tokens to compare on.")]


def command(
    name: opt.OneRun,
    format: FormatOption,
    out: Out,
    dtype: DType = None,
    tokens: Tokens = COMPARED_TOKENS,
    average: Average = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Write a finished run for other programs, read it back, and report how far it is from the run.

    For example: questctl export 670cc030 --format hf --out exports/quest-w2
    """
    run = RunStore(runs).find(name)
    card = export_run(run, out, format=format, dtype=dtype, tokens=tokens, average=average)
    for warning in card.warnings():
        console.warn(warning)
    if as_json:
        console.print_json({**card.to_json(), "path": str(out)})
        return
    a = card.agreement
    rows = [
        ("max |Δ logit|, KL", f"{a.max_abs_delta_logit:.2g}, {a.kl:.2g} nats/token on {a.tokens:,} validation tokens"),
        ("same argmax", f"{a.argmax_agreement:.2%}"),
        ("loss on these", f"{a.loss_run:.4f} of the run, {a.loss_export:.4f} of the export, nats/token"),
    ]
    if (b := card.weights_alone) is not None:
        rows.append(("without quantized inputs", f"max |Δ logit| {b.max_abs_delta_logit:.2g}, KL {b.kl:.2g}"))
    if (c := card.same_precision) is not None and (own := card.precision_alone) is not None:
        rows.append((f"from the run in {card.dtype}", f"KL {c.kl:.2g}; that run from the one in fp32: {own.kl:.2g}"))
    stored = f"{card.bits_per_linear_weight:.2f} bits per weight of the blocks, {card.bits_per_parameter:.2f} per parameter"
    rows.append(("on disk", f"{stored}; {card.share_of_bf16:.2f} of bf16"))
    rows.append(("to load", f"{card.artifact_bytes:,} bytes with the tokenizer; {card.compressed_bytes:,} after zlib"))
    rows.append(("folder", str(out)))
    console.print_table((card.format, card.run), rows, left=2)
