"""`questctl doctor`: say what this machine can do, and what is missing for the rest."""

from __future__ import annotations

from dataclasses import asdict, astuple
from typing import Annotated

import typer

from .. import console
from . import options as opt

Train = Annotated[bool, typer.Option("--train", help="Train in each way of computing steps, and compare.")]
Everything = Annotated[bool, typer.Option("--all", help="With --train: every family of specs.")]


def command(runs: opt.RunsDir = None, train: Train = False, everything: Everything = False, as_json: opt.Json = False) -> None:
    """Say what this machine can do: processor, memory, GPU, precision, kernels, disk, extras.

    With --train it trains a tiny model eager and compiled, by formula and by kernels. Exit code 1: losses or gradients differ.
    """
    if train:
        from ..training.agreement import COLUMNS, check_training, raise_if_different

        trained = check_training(everything=everything, tell=console.note)
        if as_json:
            console.print_json([asdict(way) for way in trained])
        else:
            console.print_table(COLUMNS, [way.cells for way in trained], left=5)
        raise_if_different(trained)
        return
    from ..doctor import check_machine

    checks = check_machine(runs)
    if as_json:
        console.print_json([asdict(check) for check in checks])
        return
    console.print_table(("check", "state", "found", "what it means"), [astuple(check) for check in checks], left=4)
