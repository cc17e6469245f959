"""`questctl probe RUN`: what quantization does to a model's gradients, and what rotation and mask each repair of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..config import QuantConfig, RunConfig
from ..errors import StorageError, UsageError, unknown
from ..posttraining.preflight import check_quants, default_quants
from ..quant.methods import GRID_OF_BITS
from ..store import RunStore
from . import options as opt
from .eval import warn_unfinished
from .quantize import Activations, spec_of
from .runs import A_RUN

if TYPE_CHECKING:
    from ..posttraining.probe import OperandProbe, Probe

Words = Annotated[
    list[str] | None,
    typer.Option("--quant", "-q", metavar="WORD", help="Quantize by this word or method (repeatable).", show_default=False),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits", "-b", help="Bits of methods, and of the four words without --quant (default: 4).", show_default=False
    ),
]


def command(
    name: Annotated[str, A_RUN],
    quant: Words = None,
    bits: Bits = None,
    activations: Activations = None,
    batches: Annotated[int, typer.Option(min=2, help="Batches of the validation text.")] = 8,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a batch (default: the run's, 16 at most).", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps to train on, to follow the masks of the weights; 0: none.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Folder for probe.json and the figure.", show_default=False)] = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Compare the gradients of a model quantized in several ways with those in full precision, layer by layer.

    Without --quant: a full-precision run with and without rotation, with and without trust mask; a quantized run as it is.
    """
    run = RunStore(opt.runs_dir(runs)).find(name)
    config = run.config()
    settings = _settings(config, quant, bits, activations) or default_quants(config, _grid(bits or "4"))
    check_quants(config, settings)
    from ..posttraining.probe import probe
    from ..training.loading import unfinished

    if (partial := unfinished(run)) is not None:
        warn_unfinished(run.name, **partial._asdict())
    found = probe(run, settings, batches=batches, sequences=sequences, steps=steps)
    if out is not None:
        _write(found, out)
    if as_json:
        console.print_json(found.to_dict())
        return
    show(found)
    if out is not None:
        console.note(f"wrote {out}/probe.json, probe.png and probe.svg")


def show(found: Probe) -> None:
    """Settings, then layers, then sentences."""
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(found.settings))]
    per_batch = f"{found.batches} batches of {found.tokens_per_batch:,} validation tokens"
    rows = [
        (letter, s.name, s.loss - found.reference_loss, s.alignment, "{:.2f}–{:.2f}".format(*s.alignment_range), s.layer_mean)
        for letter, s in zip(letters, found.settings, strict=True)
    ]
    title = f"{found.run}: loss {found.reference_loss:.4f} nats/token, {per_batch}"
    console.print_table(("", "quantized by", "loss +", "alignment", "batches", "layers' mean"), rows, title=title, left=2)
    for c in found.contributions:
        console.say(f"the {c.part} changes the alignment by {c.gain:+.3f}: {c.setting} against {c.without}")
    layers = [layer.layer for layer in found.settings[0].layers]
    of_layers = list(zip(letters, (s.layers for s in found.settings), strict=True))
    columns: dict[str, list[float | None]] = {f"{x} cos": [layer.alignment for layer in each] for x, each in of_layers}
    columns |= {f"{x} |g|": [layer.gradient_ratio for layer in each] for x, each in of_layers}
    _by_layer("gradients: cosine to those in full precision, norm over theirs", layers, columns)
    for operand, title in (("weights", "weights"), ("activations", "inputs")):
        columns = {}
        for what, value in (("off %", _distrusted), ("stays %", _stays), ("error", _excess)):
            columns |= {f"{x} {what}": [value(getattr(layer, operand)) for layer in each] for x, each in of_layers}
        _by_layer(f"{title}: entries without gradient, how many stay so, error over a normal's", layers, columns)
    columns = {}
    for operand, x in (("weights", "W"), ("activations", "x")):
        shapes = [d for d in found.distributions if d.operand == operand]
        for basis in dict.fromkeys(d.rotation for d in shapes):
            here, mark = [d for d in shapes if d.rotation == basis], "" if basis == "none" else f" {basis}"
            columns |= {f"{x}{mark} kurt": [d.kurtosis for d in here], f"{x}{mark} KS": [100 * d.distance for d in here]}
    _by_layer("rows against the normal: excess kurtosis, Kolmogorov–Smirnov distance (%)", layers, columns)
    console.say()
    console.say(f"stays: weights {found.persistence_of_weights}; inputs {found.persistence_of_activations}.")
    for warning in found.warnings:
        console.warn(warning)


def _by_layer(title: str, layers: Sequence[str], columns: Mapping[str, Sequence[float | None]]) -> None:
    """A row for each layer. What another setting has already shown, or what is nothing throughout, is not shown."""
    kept: dict[str, Sequence[float | None]] = {}
    for name, values in columns.items():
        if any(values) and values not in kept.values():
            kept[name] = values
    shown = [["–" if v is None else f"{v:.2f}" for v in values] for values in kept.values()]
    rows = list(zip(layers, *shown, strict=True))
    console.say()
    console.print_table(("layer", *kept), rows, title=title)


def _distrusted(o: OperandProbe | None) -> float | None:
    return None if o is None else 100 * (1 - o.trusted)


def _stays(o: OperandProbe | None) -> float | None:
    return None if o is None or o.persistence is None else 100 * o.persistence


def _excess(o: OperandProbe | None) -> float | None:
    return None if o is None or not o.normal_error else o.error / o.normal_error


def _settings(config: RunConfig, words: Sequence[str] | None, bits: str | None, activations: str | None) -> list[QuantConfig]:
    given = [part for word in words or [] for part in word.split(",") if part]
    if not given and activations is not None:
        raise UsageError("--activations: needs --quant for the weights.")
    if not given and bits is not None and config.scheme != "bf16":
        raise UsageError(f"--bits: {config.run_id} is quantized and is probed as it is; give --quant to probe it otherwise.")
    settings = []
    for word in given:
        w = spec_of(word, bits, config.model)
        a = spec_of(activations or word, bits, config.model, side="activations")
        settings.append(QuantConfig(weights=w, activations=a))
    twice = next((s for i, s in enumerate(settings) if s in settings[:i]), None)
    if twice:
        raise UsageError(f"--quant: '{twice.weights}' is given twice.")
    return settings


def _grid(bits: str) -> str:
    if bits not in GRID_OF_BITS or GRID_OF_BITS[bits] == "bf16":
        raise UsageError(unknown("--bits", bits, [b for b in GRID_OF_BITS if b != "16"]))
    return GRID_OF_BITS[bits]


def _write(found: Probe, out: Path) -> None:
    from ..analysis.figures import save
    from ..analysis.layers import layers

    document = found.to_dict()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "probe.json").write_text(console.json_text(document))
        save(layers(document), out / "probe")
    except OSError as e:
        raise StorageError(f"{e.filename or out}: cannot be written: {e.strerror}.") from e
