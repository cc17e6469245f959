"""How the help of every command reads, and what to do with an argument that a command does not take."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from typer.core import TyperArgument, TyperOption

from ..config.layers import command_for, read_toml
from ..errors import QuestError
from ..store import RunStore


def polish(command: Any) -> None:
    """Change the help of a command and, if it is a group, of all its commands."""
    paragraphs = (command.help or "").split("\n\n")  # typer keeps the line breaks of the source in all but the first
    command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for parameter in command.params:
        plain_type(parameter)
    get_help_option = command.get_help_option
    command.get_help_option = lambda ctx: plain_type(get_help_option(ctx))
    for child in getattr(command, "commands", {}).values():
        polish(child)


def plain_type(parameter: Any) -> Any:
    """`--json`, not `--json <bool>`; `--set <str>`, not `<list[str]>`; the name of an argument alone."""
    if isinstance(parameter, TyperArgument):
        parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
    elif isinstance(parameter, TyperOption) and parameter.metavar is None:
        if parameter.is_flag:
            parameter.metavar = ""
        else:
            kind = parameter.bare_type().removeprefix("list[").removesuffix("]").lower()
            parameter.metavar = f"<{'text' if kind == 'str' else 'number' if kind == 'float' else kind}>"
    return parameter


def way_out(message: str) -> str:
    """The message of a usage error, with the command that takes the argument which this one does not."""
    match = re.search(r"unexpected extra argument(?:s|\(s\))? \((?P<word>[^ )]+)", message)
    command = match and _taken_by(match["word"])
    return f"{message.removesuffix('.')}; {command}." if command else message


def _taken_by(word: str) -> str:
    with suppress(QuestError, OSError):
        if word.endswith(".toml"):
            tree = read_toml(Path(word))
            command = command_for(tree)
            return f"{command} {word} trains the sweep file" if command else f"--config {word} takes the config"
        if Path(word).exists() and not (Path(word) / "config.json").exists():
            return f"--data file:{word} trains on it"
        return f"questctl runs show {RunStore().find(Path(word).name).name} shows the run"
    return ""
