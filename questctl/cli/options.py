"""Options that several commands share, and the function that resolves them to a config."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import Layer, Resolved, env_layer, file_layer, resolve, set_layer
from ..config.commands import default_layer
from ..store import RunStore

OneRun = Annotated[str, typer.Argument(metavar="RUN", show_default=False, help="A run: its name, or a unique end of it.")]
RUNS = typer.Argument(metavar="RUN", show_default=False, help="Runs: their names, or unique ends of them.")
SomeRuns = Annotated[list[str] | None, RUNS]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of config keys.", show_default=False)]
Preset = Annotated[
    str | None, typer.Option(help="Model size and recipe: laptop-27K … 1600M (questctl config presets).", show_default=False)
]
Init = Annotated[
    str | None,
    typer.Option("--init", help="Weights from: a run, a folder of transformers, FILE.gguf, hf:NAME.", show_default=False),
]
Teacher = Annotated[str | None, typer.Option(help="Model to learn from, too: as --init, or init itself.", show_default=False)]
Method = Annotated[
    str | None, typer.Option("--quant", "-q", help="Method: quest, ste, lsq, …, bf16 for none.", show_default=False)
]
Bits = Annotated[str | None, typer.Option("--bits", "-b", help="Bits of weights and activations, 1 to 8.", show_default=False)]
Data = Annotated[
    str | None, typer.Option(help="pystdlib, pysite:NAME, file:PATH, bin:PATH, synthetic:markov.", show_default=False)
]
Seed = Annotated[int | None, typer.Option(help="Seed of weights and data order.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.", show_default=False)]
TokensPerParam = Annotated[float | None, typer.Option(help="Training tokens per parameter.", show_default=False)]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Any key: --set optim.lr=1e-3 (repeatable).", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Track = Annotated[
    str | None,
    typer.Option("--track", help="Also send metrics to: wandb, trackio, tensorboard, mlflow.", show_default=False),
]
RunsDir = Annotated[
    Path | None, typer.Option("--runs", help="Folder of the runs; left out: $QUESTCTL_RUNS, else runs.", show_default=False)
]


def track(words: str | None) -> None:
    """Mirror the runs of this process, and of those that it starts, in these trackers.

    Raises UsageError for an unknown tracker, MissingDependency for one whose package is not installed.
    """
    from ..training import trackers

    if words is not None:
        os.environ[trackers.VARIABLE] = ",".join(trackers.chosen(words))


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that make a config to `command(resolved, …)`, and pass the resolved config as its first argument."""

    @wraps(command)
    def with_options(**values: Any) -> None:
        mine = {name: values.pop(name) for name in list(values) if name in _CONFIG_OPTIONS}
        mine |= {name: checkpoint(mine[name], values.get("runs")) for name in ("init", "teacher")}
        command(build_config(mine.pop("config"), mine.pop("set_"), **mine), **values)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, (kind, _) in _CONFIG_OPTIONS.items()
    ]
    parameters = [*options, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in parameters}
    return with_options


_CONFIG_OPTIONS: dict[str, tuple[Any, tuple[str, str] | tuple[str] | None]] = {  # option → its type and the key that it sets
    "config": (ConfigFile, None),
    "preset": (Preset, ("preset",)),
    "init": (Init, ("model", "init")),
    "teacher": (Teacher, ("teacher", "source")),
    "quant": (Method, ("quant", "method")),
    "bits": (Bits, ("quant", "bits")),
    "data": (Data, ("data", "source")),
    "steps": (Steps, ("train", "steps")),
    "tokens_per_param": (TokensPerParam, ("train", "tokens_per_param")),
    "seed": (Seed, ("train", "seed")),
    "lr": (LearningRate, ("optim", "lr")),
    "set_": (Set, None),
}


def checkpoint(name: str | None, runs: Path | None) -> str | None:
    """What `--init` or `--teacher` name as their keys take it: a run that is named without its folder is one of `runs`."""
    if name in (None, "init") or name.startswith("hf:") or "/" in name or Path(name).exists():
        return name
    return str(RunStore(runs).find(name).require_folder("--init"))


def build_config(
    file: Path | None, sets: Sequence[str] | None, *, defaults: Mapping[tuple[str, ...], Any] | None = None, **flags: Any
) -> Resolved:
    """File, environment, `--set` and flags (by option name, None where not given) → the resolved config. Raises UsageError.

    Where nothing names a preset, it is the smallest, so that `questctl train` without options takes about a minute.
    """
    layers = [Layer("default", dict(defaults)) if defaults else default_layer()]
    if file is not None:
        layers.append(file_layer(file))
    layers += [env_layer(), set_layer(sets or [])]
    for name, value in flags.items():
        key = _CONFIG_OPTIONS[name][1]
        if value is not None and key is not None:
            layers.append(Layer(f"--{name.replace('_', '-')}", {key: value}))
    return resolve(layers)
