"""The `questctl` program: commands that are loaded when they are used, and errors as one sentence and an exit code.

The file of a command is imported only when the command is called or its help is shown, and no file imports torch, pandas, scipy
or matplotlib before the command works. So `--help` and every mistake are answered at once. The list of commands reads their
help from the files without importing them.
"""

from __future__ import annotations

import errno
import importlib
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from .. import console
from ..errors import QuestError
from ..system import wait_passively
from .help import plain_type, polish, way_out

COMMANDS = {  # heading → commands; `fit-scaling` is `command`, or the group `app`, of fit_scaling.py
    "Train": ("train", "sweep", "worker", "simulate", "study", "demo", "quantize", "allocate"),
    "Understand": ("fit-scaling", "report", "plan", "predict", "forecast", "fit-knobs", "eval", "generate", "probe", "bench"),
    "Ship": ("export",),
    "Look after": ("runs", "data", "config", "doctor"),
}
PANELS = {name: panel for panel, names in COMMANDS.items() for name in names}
SUMMARY = re.compile(
    r'^def command\(.*?"""(?P<command>.+?)"""|^app = typer\.Typer\(help="(?P<group>[^"]+)"', re.MULTILINE | re.DOTALL
)
INTERRUPTED = 130
REFUSALS = (  # of a file system; any other OSError is a fault of ours, and shows its traceback
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


def summary(name: str) -> str:
    """The help of a command, read from the text of its file."""
    match = SUMMARY.search(Path(__file__).with_name(f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
    assert match is not None, f"{name} has neither a command nor a group"
    return match["command"] or match["group"]


def load(name: str) -> Any:
    """Import the file of a command or group, and build it."""
    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    if hasattr(module, "app"):
        command: Any = typer.main.get_group(module.app)
        command.name, command.rich_help_panel = name, PANELS[name]
    else:
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
        alone.command(name, cls=getattr(module, "COMMAND_CLASS", None), rich_help_panel=PANELS[name])(module.command)
        command = typer.main.get_command(alone)
    polish(command)
    return command


class LazyCommands(dict[str, Any]):
    """name → command, loaded on first use. While the list of commands is shown, stand-ins with only a help take their place."""

    listing = False

    def __missing__(self, name: str) -> Any:
        if name not in PANELS:
            raise KeyError(name)
        if self.listing:
            return TyperCommand(name, help=summary(name), rich_help_panel=PANELS[name])
        if name != "bench":  # times the machine as it is
            wait_passively()
        self[name] = load(name)
        return self[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The command of this name, or the default."""
        return self[name] if name in PANELS else default

    def __iter__(self) -> Any:
        return iter(PANELS)

    def keys(self) -> Any:
        """The names, in the order of the help."""
        return PANELS.keys()

    def items(self) -> Any:
        """All names with their commands; loads every file."""
        return [(name, self[name]) for name in PANELS]


class ErrorGroup(TyperGroup):
    """Reports a QuestError, a full disk, a lost output or Ctrl-C as one line on stderr, with the documented exit code."""

    commands: LazyCommands

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        return list(PANELS)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help without loading the commands that it lists."""
        for parameter in self.get_params(ctx):
            plain_type(parameter)
        self.commands.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.commands.listing = False

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the program with streams that may be closed, full or of another encoding."""
        with console.guarded_streams(console.error):
            return super().main(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and report its errors."""
        console.show_log()
        try:
            return super().invoke(ctx)
        except QuestError as e:
            console.error(str(e))
            raise typer.Exit(e.exit_code) from e
        except KeyboardInterrupt as e:
            console.error("interrupted.")
            raise typer.Exit(INTERRUPTED) from e
        except TyperException as e:  # an option or argument that does not exist
            e.message = way_out(e.message)
            raise
        except OSError as e:
            if e.errno not in REFUSALS:
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
        from ..system import package_version

        console.say(f"questctl {package_version()}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the `questctl` program."""
    console.open_missing_streams()
    app(prog_name="questctl")
