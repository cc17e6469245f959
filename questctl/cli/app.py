"""The command line: one lazily loaded file per command, and one place where errors become a sentence and an exit code.

A command's file is imported only when it is called or described, and none imports torch, pandas, scipy or matplotlib before it
works, so that `--help` and every mistake answer at once.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import console
from ..errors import QuestError
from . import allocate, bench, config, data, demo, doctor, eval, fit_scaling, plan, probe, quantize, runs, sweep, train

INTERRUPTED = 130


class ErrorGroup(TyperGroup):
    """Turns a QuestError, a full disk, a closed pipe and Ctrl-C into one line on stderr and the documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command below it."""
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


app.command("train")(train.command)
app.command("sweep")(sweep.command)
app.command("fit-scaling")(fit_scaling.command)
app.command("plan")(plan.command)
app.command("eval")(eval.command)
app.command("probe")(probe.command)
app.command("quantize")(quantize.command)
app.command("allocate")(allocate.command)
app.command("bench", cls=bench.BenchCommand)(bench.command)
app.command("demo")(demo.command)
app.command("doctor")(doctor.command)
app.add_typer(runs.app, name="runs")
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")


def main() -> None:
    """Entry point of the `questctl` program."""
    app(prog_name="questctl")
