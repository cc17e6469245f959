"""`questctl allocate RUN --bits 2.5`: one spec per layer within a budget of bits, as a config to train or to quantize by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..posttraining import allocate_bits
from ..store import RunStore
from . import options as opt

if TYPE_CHECKING:
    from ..posttraining.allocate import Allocation

Specs = Annotated[
    list[str] | None,
    typer.Option("--specs", "--words", help="Candidate specs (repeatable) (default: QuEST, 1 to 8 bits).", show_default=False),
]
Sensitivity = Annotated[str, typer.Option(help="measured: each layer rounded alone; gaussian: noise through curvature.")]
Method = Annotated[str, typer.Option(help="Rounding of measured layers: rtn: to nearest; gptq: compensated.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="TOML file to write (default: the TOML on stdout).", show_default=False)
]


def command(
    name: opt.OneRun,
    bits: Annotated[float, typer.Option("--bits", "-b", help="Budget: bits per weight of the quantized layers, on average.")],
    specs: Specs = None,
    activations: Annotated[str, typer.Option(help="Spec of the layers' inputs.")] = "bf16",
    sensitivity: Sensitivity = "measured",
    method: Method = "rtn",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the training text to measure on.")] = 16_384,
    out: Out = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Give each layer of a model its own bits, so that the modelled loss is least within a budget.

    For example: questctl allocate 06c72749 --bits 2.5 --out mixed.toml && questctl train --config mixed.toml
    """
    run = RunStore(runs).find(name)
    candidates = [spec for text in specs or [] for spec in text.split(",") if spec]
    allocation = allocate_bits(
        run, bits, candidates, activations=activations, sensitivity=sensitivity, method=method, tokens=tokens
    )
    if as_json:
        console.print_json(allocation.to_dict())
    elif out is None:
        console.say(allocation.to_toml().rstrip("\n"), as_is=True)
    else:
        _show(allocation)
    if out is not None:
        allocation.write_toml(out)
    if out is not None and not as_json:
        console.note(f"wrote {out}: questctl train --config {out} trains {allocation.config().run_id}")


def _show(a: Allocation) -> None:
    rows = [(layer.layer, str(layer.spec), layer.weights, layer.bits, layer.cost) for layer in a.layers]
    console.print_table(("layer", "spec", "weights", "bits", "loss +"), rows, title=a.summary(), left=2)
    together = f"all rounded ({a.method}) together: {a.rounded - a.loss:+.4f}"
    console.say(f"modelled: {a.modelled:+.4f} nats/token; {together}.")
    if a.interpolated is not None:
        uniform = " and ".join(map(str, a.neighbours))
        console.say(f"modelled between {uniform} for all layers: {a.interpolated:+.4f}.")
