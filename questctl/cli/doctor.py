"""`questctl doctor`: say what this machine can do, and what is missing for the rest."""

from __future__ import annotations

from dataclasses import asdict

from .. import console
from . import options as opt


def command(runs: opt.RunsDir = None, as_json: opt.Json = False) -> None:
    """Say what this machine can do: processor, memory, GPU, precision, kernels, disk, extras."""
    from ..doctor import check_machine

    checks = check_machine(runs)
    if as_json:
        console.print_json([asdict(check) for check in checks])
        return
    rows = [(check.what, check.state, check.found, check.means) for check in checks]
    console.print_table(("check", "state", "found", "what it means"), rows, left=4)
