"""`questctl allocate RUN --bits 2.5`: a word for each layer within a budget of bits, as a config to train or to quantize by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..config import RunConfig
from ..config.describe import to_toml
from ..errors import StorageError
from ..posttraining.preflight import check_sensitivity, check_words, palette, require_full_precision
from ..quant.spec import QuantSpec
from ..store import RunStore
from . import options as opt
from .runs import A_RUN

if TYPE_CHECKING:
    from ..posttraining.allocate import Allocation

Words = Annotated[
    list[str] | None, typer.Option(help="Words to choose from (repeatable) (default: QuEST, 1 to 8 bits).", show_default=False)
]
Sensitivity = Annotated[str, typer.Option(help="measured: each layer rounded alone; gaussian: noise through curvature.")]
Method = Annotated[str, typer.Option(help="Rounding behind measured ones: rtn: to nearest; gptq: compensated.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="TOML file to write; left out: the TOML on stdout.", show_default=False)
]


def command(
    name: Annotated[str, A_RUN],
    bits: Annotated[float, typer.Option("--bits", "-b", help="Budget: bits per weight of the quantized layers, on average.")],
    words: Words = None,
    activations: Annotated[str, typer.Option(help="Word of the layers' inputs.")] = "bf16",
    sensitivity: Sensitivity = "measured",
    method: Method = "rtn",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the training text to take it from.")] = 16_384,
    out: Out = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Give each layer of a model its own bits, so that the modelled loss is least within a budget.

    For example: questctl allocate 06c72749 --bits 2.5 --out mixed.toml && questctl train --config mixed.toml
    """
    check_sensitivity(sensitivity, method)
    run = RunStore(opt.runs_dir(runs)).find(name)
    config = require_full_precision(run, "allocate")
    given = [part for word in words or [] for part in word.split(",") if part]
    choices = [str(QuantSpec.parse(word, key="--words")) for word in given] or palette(config.model)
    inputs = str(QuantSpec.parse(activations, key="--activations", operand="activations"))
    check_words(config.model, choices, inputs, bits)
    from ..posttraining.allocate import allocate

    found = allocate(run, bits, choices, activations=inputs, sensitivity=sensitivity, method=method, tokens=tokens)
    mixed = config.model_copy(update={"quant": found.quant()})
    text = f"# {_summary(found)}\n{to_toml(mixed)}\n"
    if out is not None:
        try:
            out.write_text(text)
        except OSError as e:
            raise StorageError(f"{out}: cannot be written: {e.strerror}.") from e
    if as_json:
        console.print_json({**found.to_dict(), "run_id": mixed.run_id, "config": mixed.to_json()})
    elif out is None:
        console.say(text.rstrip("\n"))
    else:
        show(found, mixed, out)


def _summary(found: Allocation) -> str:
    by = found.sensitivity + (f" ({found.method})" if found.sensitivity == "measured" else "")
    return f"{found.bits:.4g} bits per weight, allocated on {found.run} by {by} sensitivities"


def show(found: Allocation, mixed: RunConfig, out: Path) -> None:
    """Layers, then what is expected and what was measured."""
    rows = [(c.layer, c.word, c.weights, c.bits, c.cost) for c in found.choices]
    console.print_table(("layer", "word", "weights", "bits", "loss +"), rows, title=_summary(found), left=2)
    together = f"all rounded ({found.method}) together: {found.rounded - found.loss:+.4f}"
    console.say(f"modelled: {found.modelled:+.4f} nats/token; {together}.")
    if found.interpolated is not None:
        console.say(f"modelled between {' and '.join(found.neighbours)} for all layers: {found.interpolated:+.4f}.")
    console.note(f"wrote {out}: questctl train --config {out} trains {mixed.run_id}")
