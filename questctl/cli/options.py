"""Options that several commands share, and the one function that turns them into a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import Layer, Resolved, env_layer, file_layer, resolve, set_layer

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of config keys.", show_default=False)]
Preset = Annotated[str | None, typer.Option(help="Model size and recipe: 53K … 1600M (questctl config presets).", show_default=False)]
Method = Annotated[str | None, typer.Option("--quant", "-q", help="Method: quest, ste, lsq, …, bf16 for none.", show_default=False)]
Bits = Annotated[str | None, typer.Option("--bits", "-b", help="Bits of weights and activations, 1 to 8.", show_default=False)]
Data = Annotated[str | None, typer.Option(help="pystdlib, pysite:NAME, file:PATH, bin:PATH, synthetic:markov.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of weights and data order.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.", show_default=False)]
TokensPerParam = Annotated[float | None, typer.Option(help="Training tokens per parameter.", show_default=False)]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="Any key: --set optim.lr=1e-3 (repeatable).", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
RunsDir = Annotated[Path | None, typer.Option("--runs", help="Folder of the runs [default: runs, or $QUESTCTL_RUNS].", show_default=False)]


def runs_dir(given: Path | None) -> Path:
    """`--runs`, else `$QUESTCTL_RUNS`, else `runs/` here."""
    return given or Path(os.environ.get("QUESTCTL_RUNS") or "runs")


def build_config(
    file: Path | None = None, sets: Sequence[str] | None = None, *, default_preset: str | None = None, **flags: Any
) -> Resolved:
    """Files, environment, `--set` and flags (by option name, None where not given) → the resolved config. Raises UsageError."""
    where = {
        "preset": ("preset",), "quant": ("quant", "method"), "bits": ("quant", "bits"), "data": ("data", "source"),
        "seed": ("train", "seed"), "steps": ("train", "steps"), "tokens_per_param": ("train", "tokens_per_param"),
        "lr": ("optim", "lr"),
    }  # fmt: skip
    if isinstance(flags.get("bits"), str) and flags["bits"].isdigit():
        flags["bits"] = int(flags["bits"])
    layers = [Layer("default", {("preset",): default_preset})] if default_preset else []
    if file is not None:
        layers.append(file_layer(file))
    layers += [env_layer(), set_layer(sets or [])]
    layers += [Layer(f"--{k.replace('_', '-')}", {where[k]: v}) for k, v in flags.items() if v is not None]
    return resolve(layers)
