"""`questctl config show|explain|presets`: what a run would be, where each value comes from, and which sizes exist."""

from __future__ import annotations

import json

import typer

from .. import console
from ..config import Layer, Resolved, RunConfig, flat_items, flatten, human_count, known_keys, resolve
from ..config.presets import PRESETS
from . import options as opt

app = typer.Typer(help="Show a config, explain its origins, list the presets.", no_args_is_help=True)


@app.command("show")
@opt.takes_config
def show(resolved: Resolved, as_json: opt.Json = False) -> None:
    """Print the resolved config as TOML that `--config` reads back."""
    if as_json:
        console.print_json({"run_id": resolved.config.run_id, **resolved.config.to_json()})
    else:
        console.say(to_toml(resolved.config))


@app.command("explain")
@opt.takes_config
def explain(resolved: Resolved, as_json: opt.Json = False) -> None:
    """For every key: its value, where the value comes from, and what it means."""
    meaning = {".".join(k): text for k, text in known_keys().items()}
    rows = [(key, value, resolved.origins[key], meaning.get(key, "")) for key, value in flat_items(resolved.config)]
    if as_json:
        console.print_json([dict(zip(("key", "value", "origin", "meaning"), row, strict=True)) for row in rows])
        return
    console.print_table(("key", "value", "origin", "meaning"), [(k, str(v), o, m) for k, v, o, m in rows], left=4)
    console.note(f"run id {resolved.config.run_id}")


@app.command("presets")
def presets(as_json: opt.Json = False) -> None:
    """List the model sizes with their recipes."""
    rows = []
    for name, values in PRESETS.items():
        c = resolve([Layer("preset", flatten(values, where=name))]).config
        m = c.model
        shape = (m.non_embedding_parameters, m.n_layer, m.d_model, m.n_head, m.d_ff)
        recipe = (c.data.seq_len, c.train.batch_size, f"{c.optim.lr:g}", human_count(c.tokens), values["quant"]["block"])
        rows.append((name, *shape, *recipe))
    columns = ("preset", "parameters", "layers", "width", "heads", "hidden", "sequence", "batch", "lr", "tokens", "block")
    if as_json:
        console.print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        console.print_table(columns, rows, optional=("heads", "block"))


def to_toml(config: RunConfig) -> str:
    """The config as TOML, one section each; `--config` reads it back to the same run id."""
    lines = [f"# run id {config.run_id}"]
    for section, values in config.model_dump(mode="json").items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
        for pattern, words in values.get("overrides", {}).items():
            lines += [f"overrides.{json.dumps(pattern)}.{side} = {json.dumps(word)}" for side, word in words.items() if word]
    return "\n".join(lines)
