"""`questctl config show|explain|presets`: what a run would be, where each value comes from, and which sizes exist."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .. import console
from ..config import Resolved
from ..config.describe import explain_config, preset_table, to_toml
from . import options as opt

app = typer.Typer(help="Show a config, explain its origins, list the presets.", no_args_is_help=True)


@app.command("show")
@opt.takes_config
def show(resolved: Resolved, as_json: opt.Json = False) -> None:
    """Print the resolved config as TOML that `--config` reads back."""
    if as_json:
        console.print_json({"run_id": resolved.config.run_id, **resolved.config.to_json()})
    else:
        console.say(to_toml(resolved.config), as_is=True)


@app.command("explain")
@opt.takes_config
def explain(resolved: Resolved, as_json: opt.Json = False) -> None:
    """For every key: its value, where the value comes from, and what it means."""
    rows = [asdict(row) for row in explain_config(resolved)]
    if as_json:
        console.print_json(rows)
        return
    table = [(row["key"], str(row["value"]), row["origin"], row["meaning"]) for row in rows]
    console.print_table(("key", "value", "origin", "meaning"), table, left=4)
    console.note(f"run id {resolved.config.run_id}")


@app.command("presets")
def presets(as_json: opt.Json = False) -> None:
    """List the model sizes with their recipes."""
    rows = [asdict(row) for row in preset_table()]
    if as_json:
        console.print_json(rows)
    else:
        narrow = ("heads", "block", "hidden", "sequence", "warmup", "batch")
        console.print_table(list(rows[0]), [list(row.values()) for row in rows], left=2, optional=narrow)
