"""The command line: one lazily loaded file per command, and one place where errors become a sentence and an exit code.

A command's file is imported only when it is called or described, and none imports torch, pandas, scipy or matplotlib before it
works, so that `--help` and every mistake answer at once. The list of commands quotes the files without importing them.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import console
from ..errors import QuestError

COMMANDS = {  # heading → commands; `fit-scaling` is `command`, or the group `app`, of fit_scaling.py
    "Train": ("train", "sweep", "worker", "study", "demo", "quantize", "allocate"),
    "Understand": ("fit-scaling", "report", "plan", "eval", "generate", "probe", "bench"),
    "Ship": ("export",),
    "Look after": ("runs", "data", "config", "doctor"),
}
PANELS = {name: panel for panel, names in COMMANDS.items() for name in names}
SUMMARY = re.compile(
    r'^def command\(.*?"""(?P<command>.+?)"""|^app = typer\.Typer\(help="(?P<group>[^"]+)"', re.MULTILINE | re.DOTALL
)
INTERRUPTED = 130


def summary(name: str) -> str:
    """The help of a command, read from its file."""
    found = SUMMARY.search(Path(__file__).with_name(f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
    assert found is not None, f"{name} has neither a command nor a group"
    return found["command"] or found["group"]


def load(name: str) -> Any:
    """A command or group, from its file."""
    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    if hasattr(module, "app"):
        group = typer.main.get_group(module.app)
        group.name, group.rich_help_panel = name, PANELS[name]
        return group
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name, cls=getattr(module, "COMMAND_CLASS", None), rich_help_panel=PANELS[name])(module.command)
    return typer.main.get_command(alone)


class LazyCommands(dict[str, Any]):
    """name → command, each loaded when it is asked for; while the list of all is shown, stand-ins that only have a help."""

    listing = False

    def __missing__(self, name: str) -> Any:
        if name not in PANELS:
            raise KeyError(name)
        if self.listing:
            return TyperCommand(name, help=summary(name), rich_help_panel=PANELS[name])
        self[name] = load(name)
        return self[name]

    def get(self, name: str, default: Any = None) -> Any:
        """As of any mapping."""
        return self[name] if name in PANELS else default

    def __iter__(self) -> Any:
        return iter(PANELS)

    def keys(self) -> Any:
        """The names, in the order of the help."""
        return PANELS.keys()

    def items(self) -> Any:
        """Names and commands; loads them all."""
        return [(name, self[name]) for name in PANELS]


class ErrorGroup(TyperGroup):
    """Turns a QuestError, a full disk, a closed pipe and Ctrl-C into one line on stderr and the documented exit code."""

    commands: LazyCommands

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        return list(PANELS)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help, without loading what it lists."""
        self.commands.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.commands.listing = False

    def invoke(self, ctx: Any) -> Any:
        """Run the command below it."""
        console.show_log()
        try:
            return super().invoke(ctx)
        except QuestError as e:
            console.error(str(e))
            raise typer.Exit(e.exit_code) from e
        except KeyboardInterrupt as e:
            console.error("interrupted.")
            raise typer.Exit(INTERRUPTED) from e
        except BrokenPipeError as e:  # `questctl runs ls | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from e
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            console.error(f"{e.filename or 'writing'}: {e.strerror}.")
            raise typer.Exit(2) from e


app = typer.Typer(
    name="questctl",
    cls=ErrorGroup,
    help="Train low-bit language models, fit their scaling laws, and find out which bits pay.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        console.say(f"questctl {version('questctl')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `questctl` program."""
    app(prog_name="questctl")
