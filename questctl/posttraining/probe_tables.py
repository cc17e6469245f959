"""A probe as tables for people: one line per setting, then one per layer for gradients, masks, errors and distributions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .probe import OperandProbe, Probe

Values = Sequence[float | None]


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns, and the rows."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


def setting_table(probe: Probe) -> Table:
    """One line per setting, named by a letter: how much the loss rises, and how well the gradients align."""
    rows = [
        (letter, s.name, s.loss - probe.reference_loss, s.alignment, "{:.2f}–{:.2f}".format(*s.alignment_range), s.layer_mean)
        for letter, s in zip(_letters(probe), probe.settings, strict=True)
    ]
    per_batch = f"{probe.batches} batches of {probe.tokens_per_batch:,} validation tokens"
    title = f"{probe.run}: loss {probe.reference_loss:.4f} nats/token, {per_batch}"
    return Table(title, ("", "quantized by", "loss +", "alignment", "batches", "layers' mean"), rows)


LEGEND = (  # legend of the table of settings, and of the tables of layers
    "loss +: rise of the loss, in nats/token; alignment: cosine between the gradients and those in full precision, 1 where "
    "they point the same way; batches: its lowest and highest value over the batches; layers' mean: mean of each layer's own",
    "cos, |g|: of a layer's gradient, its cosine to the one in full precision, and its norm over that one's; off %: entries of "
    "an operand that receive no gradient; stays %: of these, those that still receive none after the steps of training; "
    "error: quantization error over that of normally distributed values; kurt, KS: how far rows are from normal, 0 where they "
    "are",
)


def layer_tables(probe: Probe) -> Iterator[Table]:
    """One line per layer: gradients, then masks and errors of weights and of inputs, then distributions of their rows."""
    layers = [layer.layer for layer in probe.settings[0].layers]
    settings = list(zip(_letters(probe), (s.layers for s in probe.settings), strict=True))
    columns: dict[str, Values] = {f"{x} cos": [layer.alignment for layer in each] for x, each in settings}
    columns |= {f"{x} |g|": [layer.gradient_ratio for layer in each] for x, each in settings}
    yield _by_layer("gradients: cosine to those in full precision, norm over theirs", layers, columns)
    for operand, title in (("weights", "weights"), ("activations", "inputs")):
        columns = {}
        for what, value in (("off %", _distrusted), ("stays %", _stays), ("error", _excess)):
            columns |= {f"{x} {what}": [value(getattr(layer, operand)) for layer in each] for x, each in settings}
        yield _by_layer(
            f"{title}: % without gradient, % of these that stay so, error over that of normal values", layers, columns
        )
    columns = {}
    for operand, x in (("weights", "W"), ("activations", "x")):
        shapes = [d for d in probe.distributions if d.operand == operand]
        for basis in dict.fromkeys(d.rotation for d in shapes):
            rows, mark = [d for d in shapes if d.rotation == basis], "" if basis == "none" else f" {basis}"
            columns |= {f"{x}{mark} kurt": [d.kurtosis for d in rows], f"{x}{mark} KS": [100 * d.distance for d in rows]}
    yield _by_layer("rows against the normal: excess kurtosis, Kolmogorov–Smirnov distance (%)", layers, columns)


def sentences(probe: Probe) -> Iterator[str]:
    """The contribution of rotation and mask to the alignment."""
    for c in probe.contributions:
        yield f"the {c.part} changes the alignment by {c.gain:+.3f}: {c.setting} against {c.without}"


def _letters(probe: Probe) -> list[str]:
    """A, B, …; numbers beyond Z."""
    return [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(probe.settings))]


def _by_layer(title: str, layers: Sequence[str], columns: Mapping[str, Values]) -> Table:
    """A column that repeats an earlier one, or holds nothing but zeros, is left out."""
    kept: dict[str, Values] = {}
    for name, values in columns.items():
        if any(values) and values not in kept.values():
            kept[name] = values
    shown = [["–" if v is None else f"{v:.2f}" for v in values] for values in kept.values()]
    return Table(title, ("layer", *kept), list(zip(layers, *shown, strict=True)))


def _distrusted(o: OperandProbe | None) -> float | None:
    return None if o is None else 100 * (1 - o.trusted)


def _stays(o: OperandProbe | None) -> float | None:
    return None if o is None or o.persistence is None else 100 * o.persistence


def _excess(o: OperandProbe | None) -> float | None:
    return None if o is None or not o.normal_error else o.error / o.normal_error
