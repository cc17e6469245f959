"""Output of one run, and of several side by side: tables of results and of differing keys, and curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import metrics
from .curves import drawing, sparkline
from .numbers import number
from .streams import say
from .tables import print_table

MEASURED = {
    "params_non_embedding": "parameters, non-embedding",
    "tokens": "tokens",
    "tokens_per_param": "tokens per parameter",
    "passes": "passes over the text",
    "loss": "validation loss (nats/token)",
    "bits_per_byte": "bits per byte",
    metrics.TRAIN_LOSS: "last training loss",
    metrics.GRAD_NORM: "last gradient norm",
    "model_bits": "bits that store the parameters",
    "artifact_bytes": "bytes of the file to load",
    "flops": "training FLOPs",
    "tokens_per_s": "tokens/s",
    "seconds": "seconds",
    "peak_memory_bytes": "peak memory (bytes)",
    "device": "device",
    "updated_at": "last written",
}


def print_run(
    path: str,
    values: Mapping[str, Any],
    curves: Mapping[str, Sequence[float]],
    changed: Sequence[tuple[str, Any]],
    files: Mapping[str, str],
) -> None:
    """Print one run: its state, its values of MEASURED, a sparkline for each curve, the keys that differ from the default, and
    its files with their sizes."""
    say(f"{values['run']}: {values['state']}, step {values['step']}, attempts {values['attempts']}")
    if values["message"]:
        say(values["message"])
    rows = [(label, number(values[key])) for key, label in MEASURED.items() if values.get(key) is not None]
    print_table(("measured", "value"), rows, left=2)
    for key, curve in curves.items():
        if len(curve) > 1:
            say(f"{key:<22} {curve[0]:.3f} {sparkline(curve)} {curve[-1]:.3f}")
    print_table(("not as by default", "value"), [(key, str(value)) for key, value in changed], left=2)
    print_table((f"{path}/", "size"), list(files.items()))


def letters(count: int) -> list[str]:
    """Names for `count` runs: A, B, …, and numbers after Z."""
    return [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(count)]


def print_comparison(
    called: Sequence[str],
    config: Mapping[str, Sequence[Any]],
    result: Mapping[str, Sequence[Any]],
    minus_first: Mapping[str, Sequence[float | None]],
) -> None:
    """A row for each differing key and each result, a column for each run; `minus_first` is put behind results that it has."""
    rows: list[tuple[Any, ...]] = [(k, *("–" if x is None else str(x) for x in v)) for k, v in config.items()]
    for key, values in result.items():
        if any(x is not None for x in values):
            texts = [number(x) for x in values]
            if key in minus_first:
                differences = ["", *("" if d is None else f" ({d:+.4f})" for d in minus_first[key][1:])]
                texts = [text + difference for text, difference in zip(texts, differences, strict=True)]
            rows.append((key, *texts))
    print_table(("", *called), rows)


def print_curves(
    called: Sequence[str], key: str, curves: Sequence[Sequence[tuple[float, float]]], x_label: Callable[[float], str]
) -> None:
    """Draw a metric against tokens, for the runs with more than one point."""
    known = {letter: curve for letter, curve in zip(called, curves, strict=True) if len(curve) > 1}
    if known:
        say()
        say(f"{key} against tokens")
        for line in drawing(known, x_label=x_label):
            say(line, as_is=True)
