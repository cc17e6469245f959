"""`questctl probe RUN`: what quantization does to a model's gradients, and what rotation and mask each recover."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..posttraining import probe_run
from ..store import RunStore
from . import options as opt
from .quantize import Activations

if TYPE_CHECKING:
    from ..posttraining.probe import Probe

Specs = Annotated[
    list[str] | None,
    typer.Option(
        "--quant", "-q", metavar="SPEC", help="Quantize by this spec, method or FILE.toml (repeatable).", show_default=False
    ),
]
Bits = Annotated[
    str | None,
    typer.Option("--bits", "-b", help="Bits of methods, and of the default specs (default: 4).", show_default=False),
]


def command(
    name: opt.OneRun,
    quant: Specs = None,
    bits: Bits = None,
    activations: Activations = None,
    batches: Annotated[int, typer.Option(min=2, help="Batches of the validation text.")] = 8,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences per batch (default: the run's, at most 16).", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps to train on, to follow the masks of the weights; 0: none.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Folder for probe.json and the figure.", show_default=False)] = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Compare the gradients of a model quantized in several ways with those in full precision, layer by layer.

    Without --quant: a full-precision run with and without rotation, with and without trust mask; a quantized run as it is.
    """
    run = RunStore(runs).find(name)
    specs = [spec for text in quant or [] for spec in text.split(",") if spec]
    probe = probe_run(run, specs, bits=bits, activations=activations, batches=batches, sequences=sequences, steps=steps)
    if as_json:
        console.print_json(probe.to_dict())
    else:
        _show(probe)
    for warning in probe.warnings:
        console.warn(warning)
    if out is not None:
        probe.write(out)
        if not as_json:
            console.note(f"wrote {out}/probe.json, probe.png and probe.svg")


def _show(probe: Probe) -> None:
    from ..posttraining.probe_tables import LEGEND, layer_tables, sentences, setting_table

    table = setting_table(probe)
    console.print_table(table.columns, table.rows, title=table.title, left=2)
    console.say(LEGEND[0])
    for sentence in sentences(probe):
        console.say(sentence)
    for table in layer_tables(probe):
        console.say()
        console.print_table(table.columns, table.rows, title=table.title)
    console.say(LEGEND[1])
    console.say()
    console.say(f"stays: weights {probe.persistence_of_weights}; inputs {probe.persistence_of_activations}.")
