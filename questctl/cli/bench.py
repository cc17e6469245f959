"""`questctl bench [OP…]`: check and time kernels and whole-model cases on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .. import console
from ..bench import table
from ..bench.names import DECODE, PREFILL, TRAIN_STEP
from ..bench.suite import CHOICES, DEFAULT_CONFIG, LAYERS, Benchmark, Sizes, benchmark, compile_kernels, read_benchmark
from ..errors import UsageError
from . import options as opt

STDOUT = "-"
option = partial(typer.Option, show_default=False)
Ops = Annotated[
    list[str] | None, typer.Argument(metavar="OP", help=f"{', '.join(CHOICES)} (default: all).", show_default=False)
]
JsonFile = Annotated[str | None, option("--json", metavar="[FILE]", help="Rows as JSON, to a file or to stdout.")]
Csv = Annotated[Path | None, option(metavar="FILE", help="Rows as CSV.")]
CheckOnly = Annotated[bool, typer.Option("--check-only", help="Compare with the definitions; time nothing.")]
COMPILE_HELP = "Build the GPU kernels for sm_80 and sm_90, with or without a GPU; time nothing."
CompileOnly = Annotated[bool, typer.Option("--compile-only", help=COMPILE_HELP)]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: as torch chooses.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Time for each implementation at each shape.")]
ModelName = Annotated[str | None, option("--model", help=f"Products at the layers of: {', '.join(LAYERS)}.")]
Rows = Annotated[str | None, option("--m", help="Products at these numbers of rows: 1,16,64.")]
Plot = Annotated[Path | None, option(metavar="DIR", help="Draw speed-ups against M and shares of the roofline.")]
COMPARE_HELP = "Compare with an earlier --json file; exit code 1 if anything got slower."
Compare = Annotated[Path | None, option(metavar="OLD.json", help=COMPARE_HELP)]


class BenchCommand(TyperCommand):
    """Lets `--json` stand alone: without a file after it, it means stdout."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the dash after a bare --json before the parser reads it."""
        full: list[str] = []
        for arg, after in zip(args, [*args[1:], None], strict=False):  # empty if there are no arguments
            full.append(arg)
            if arg == "--json" and (after is None or after in CHOICES or (after.startswith("-") and after != STDOUT)):
                full.append(STDOUT)
        return super().parse_args(ctx, full)


COMMAND_CLASS = BenchCommand


def command(
    ops: Ops = None,
    config: opt.ConfigFile = None,
    preset: opt.Preset = None,
    quant: opt.Method = None,
    bits: opt.Bits = None,
    set_: opt.Set = None,
    json_file: JsonFile = None,
    csv: Csv = None,
    check_only: CheckOnly = False,
    compile_only: CompileOnly = False,
    threads: Threads = 0,
    seconds: Seconds = 1.0,
    compare: Compare = None,
    model: ModelName = None,
    m: Rows = None,
    plot: Plot = None,
    train_step: Annotated[bool, typer.Option("--train-step", help="Only train-step.")] = False,
    prefill: Annotated[bool, typer.Option("--prefill", help="Only prefill.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Only decode.")] = False,
) -> None:
    """Check and time kernels, the quantizer, the training step, prefill and decode on this machine.

    The model of train-step, prefill and decode is a preset (640K where none is given) with random weights, quantized by quest
    at 4 bits unless told otherwise.
    """
    flagged = {TRAIN_STEP: train_step, PREFILL: prefill, DECODE: decode}
    names = list(dict.fromkeys([*(ops or ()), *(name for name, chosen in flagged.items() if chosen)]))
    if compile_only:
        kernels = compile_kernels(names)
        console.print_table(table.COMPILED, table.compiled_cells(kernels), left=6)
        raise typer.Exit(int(any(k.stack_bytes for k in kernels)))
    resolved = opt.build_config(config, set_, defaults=DEFAULT_CONFIG, preset=preset, quant=quant, bits=bits)
    outputs = [path for path in (csv, Path(json_file) if json_file and json_file != STDOUT else None) if path]
    if missing := next((path for path in outputs if not path.parent.is_dir()), None):
        raise UsageError(f"{missing}: its folder {missing.parent} does not exist.")
    old = read_benchmark(compare) if compare else None
    sizes = Sizes(model, _numbers(m) if m is not None else (), int(bits) if bits and bits.isdigit() else None)
    out = None if json_file in (None, STDOUT) else json_file
    asked = {"check_only": check_only, "seconds": seconds, "threads": threads, "out": out, **sizes._asdict()}
    measured = benchmark(names, resolved.config, **asked)
    if json_file == STDOUT:
        console.print_json(measured.to_dict())
    else:
        _show(measured)
    if csv:
        measured.write_csv(csv)
    for path in measured.write_plots(plot) if plot else ():
        console.note(f"{path}")
    pairs = measured.compare(old) if old is not None else []
    if pairs:
        console.print_table(table.COMPARED, table.compared_cells(pairs))
    if measured.failures or any(p.regressed for p in pairs):
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--m: '{text}' is not a list of positive whole numbers, such as 1,16,64.")
    return [int(part) for part in parts]


def _show(measured: Benchmark) -> None:
    if not measured.rows:
        return
    console.print_table(table.COLUMNS, table.cells(measured.rows), left=4, optional=("p20–p80", "GOP/s", "GB/s"))
    for sentence in (*table.LEGEND, *table.sentences(measured.rows)):
        console.say(sentence)
    for row in measured.rows:
        if row.reason:
            (console.error if row.verdict == "FAIL" else console.note)(f"{row.label}: {row.verdict}: {row.reason}")
