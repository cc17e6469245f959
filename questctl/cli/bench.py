"""`questctl bench [OP…]`: how fast the parts of low-bit training and inference are on this machine, and whether they are right.

    quantizer     the model's own quantizer, forward and backward, against its plain formula and against a copy
    train-step    the quantized training step against the full-precision step of the same model, in fp32 and bf16 autocast
    prefill       sequences through the packed model, against the same model in bf16
    decode        one more token after a sequence, the same way
    others        the kernels: `kernels.op.OPS`

Everything compared takes turns in one run. A wrong result is a FAIL without a speed, and ends the command with 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from .. import console
from ..bench import DECODE, PREFILL, QUANTIZER, TRAIN_STEP
from ..config import Layer, RunConfig, env_layer, file_layer, resolve, set_layer
from ..errors import DataError, MissingDependency, UsageError, unknown
from ..kernels.op import OPS, KernelError
from . import options as opt

if TYPE_CHECKING:
    import torch

    from ..kernels.bench import BenchRow
    from ..kernels.op import Case, Shape

PRODUCTS = ("int-gemm", "packed-gemm", "packed-gemm-16", "int-linear")
PACKED_ROWS = 64  # up to so many rows a layer of inference reads packed weights (kernels.gemv.SKINNY_ROWS)
CHOICES = (QUANTIZER, TRAIN_STEP, PREFILL, DECODE, *OPS)
STDOUT = "-"
LAYERS = {  # model → (N, K) of qkv, o, gate·up, down; SwiGLU 8/3 rounded up; 70B: arXiv 2307.09288, 8 heads of keys and values
    "800M": ((6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632)),
    "1.6B": ((7680, 2560), (2560, 2560), (13824, 2560), (2560, 6912)),
    "7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
AGAIN_S = 0.1  # for each rate, between ops

Ops = Annotated[list[str] | None, typer.Argument(help=f"{', '.join(CHOICES)} (default: all).", show_default=False)]
JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="[FILE]", help="Rows as JSON, to a file or to stdout.", show_default=False)
]
Csv = Annotated[Path | None, typer.Option(metavar="FILE", help="Rows as CSV.", show_default=False)]
CheckOnly = Annotated[bool, typer.Option("--check-only", help="Compare with the definitions; time nothing.")]
CompileOnly = Annotated[
    bool, typer.Option("--compile-only", help="Build the GPU kernels for sm_80 and sm_90, with or without a GPU; time nothing.")
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: as torch chooses.")]
Seconds = Annotated[float, typer.Option(min=0.0, help="Time for each implementation at each shape.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help=f"Products at the layers of: {', '.join(LAYERS)}.", show_default=False)
]
Rows = Annotated[str | None, typer.Option("--m", help="Products at these numbers of rows: 1,16,64.", show_default=False)]
Plot = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Draw speed-ups against M and shares of the roofline.", show_default=False)
]
Compare = Annotated[
    Path | None,
    typer.Option(metavar="OLD.json", help="Compare with an earlier --json file; 1 if anything got slower.", show_default=False),
]
TrainStep = Annotated[bool, typer.Option("--train-step", help="The op train-step.")]
Prefill = Annotated[bool, typer.Option("--prefill", help="The op prefill.")]
Decode = Annotated[bool, typer.Option("--decode", help="The op decode.")]


class BenchCommand(TyperCommand):
    """Lets `--json` stand alone: without a file after it, it means stdout."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare --json its dash before the parser sees it."""
        full: list[str] = []
        for arg, after in zip(args, [*args[1:], None], strict=False):  # of no arguments there is none
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
    train_step: TrainStep = False,
    prefill: Prefill = False,
    decode: Decode = False,
) -> None:
    """Check and time kernels, the quantizer, the training step, prefill and decode on this machine.

    The model of train-step, prefill and decode is a preset (640K where none is given) with random weights, quantized by quest
    at 4 bits unless told otherwise.
    """
    flagged = {TRAIN_STEP: train_step, PREFILL: prefill, DECODE: decode}
    ops = list(dict.fromkeys([*(ops or ()), *(name for name, given in flagged.items() if given)]))
    for name in ops:
        if name not in CHOICES:
            raise UsageError(unknown("bench", name, CHOICES, what="op"))
    if model is not None and model not in LAYERS:
        raise UsageError(unknown("--model", model, LAYERS))
    if m is not None and not all(part.isdigit() and int(part) for part in m.split(",")):
        raise UsageError(f"--m: '{m}' is not a list of positive whole numbers, such as 1,16,64.")
    if compile_only:
        return _compile(ops or list(OPS))
    default = {("preset",): "640K", ("quant", "method"): "quest", ("quant", "bits"): 4}
    flags = {("preset",): preset, ("quant", "method"): quant, ("quant", "bits"): int(bits) if bits and bits.isdigit() else bits}
    layers = [Layer("default", default), *([file_layer(config)] if config else []), env_layer(), set_layer(set_ or [])]
    resolved = resolve([*layers, Layer("--preset, --quant, --bits", {k: v for k, v in flags.items() if v is not None})])
    for path in (csv, None if json_file in (None, STDOUT) else Path(str(json_file))):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: its folder {path.parent} does not exist.")
    old = _read(compare) if compare else None
    ms = [int(part) for part in m.split(",")] if m else []
    asked = Sizes(model, ms, int(bits) if bits and bits.isdigit() and (model or ms) else None)
    if asked.model or asked.ms:
        ops = ops or [name for name in OPS if name in PRODUCTS]
    rows, calibration = measure_rows(
        ops or CHOICES, resolved.config, check_only=check_only, threads=threads, seconds=seconds, sizes=asked
    )
    from ..kernels import bench

    if json_file == STDOUT:
        console.print_json(bench.document(rows, calibration))
    else:
        show(rows)
    if json_file not in (None, STDOUT):
        import json

        Path(str(json_file)).write_text(json.dumps(bench.document(rows, calibration), indent=1) + "\n", encoding="utf-8")
    if csv:
        bench.write_csv(rows, csv)
    if plot:
        from ..kernels.plots import write_plots

        for path in write_plots(rows, plot):
            console.note(f"{path}")
    regressed = _show_comparison(old, rows) if old is not None else False
    if regressed or any(row.verdict == "FAIL" for row in rows):
        raise typer.Exit(1)


def _compile(names: Sequence[str]) -> None:
    """Build the named kernels and show what the machine code needs; a kernel that spills registers ends the command with 1."""
    if alien := [name for name in names if name not in OPS]:
        raise UsageError(f"bench: {alien[0]} has no kernel of its own to compile; choices: {', '.join(OPS)}.")
    from ..kernels.bench import shape_text
    from ..kernels.compile import ARCHITECTURES, compile_ops

    try:
        found = [kernel for arch in ARCHITECTURES for kernel in compile_ops(names, arch)]
    except KernelError as e:
        raise MissingDependency(str(e)) from e
    console.print_table(
        ("op", "kernel", "shape", "GPU", "matrix instructions", "result", "registers", "stack bytes", "shared bytes"),
        [
            (
                k.op,
                k.kernel,
                shape_text(k.shape),
                f"sm_{k.arch}",
                " ".join(k.instructions),
                "FAIL" if k.stack_bytes else "PASS",
                k.registers,
                k.stack_bytes,
                k.shared_bytes,
            )
            for k in found
        ],
        left=6,
    )
    if any(k.stack_bytes for k in found):
        raise typer.Exit(1)


def measure_rows(
    names: Sequence[str], config: RunConfig, *, check_only: bool, threads: int, seconds: float, sizes: Sizes | None = None
) -> tuple[list[BenchRow], Any]:
    """Rows of all named ops and the calibration they were measured against (None with `check_only`)."""
    import torch

    from ..kernels import bench
    from ..kernels.devices import calibrate

    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        console.note("no CUDA GPU here: the CPU implementations are measured; the Triton kernels and CUDA graphs are not.")
    calibration = None if check_only else calibrate(device)
    if calibration:
        rates = ", ".join(f"{unit} {tops * 1000:,.0f} G" for unit, tops in calibration.tops.items())
        measured = f"copy {calibration.copy_gbs:.1f} GB/s, matmul op/s {rates}"
        console.note(f"{calibration.device}, {calibration.threads} threads: {measured}")
    rows: list[BenchRow] = []
    for i, name in enumerate(names):
        if calibration and i:  # again beside each op: the best of all is the limit
            calibration = calibration.best(calibrate(device, seconds=AGAIN_S))
        console.note(f"{name} …")
        before = len(rows)
        for case, graph in _cases(name, config, device, sizes or Sizes()):
            rows += bench.run_case(case, device, calibration, check_only=check_only, seconds=seconds, graph=graph)
        if len(rows) == before:
            console.note(f"{name}: there is nothing to measure of it on this machine; it needs a CUDA GPU.")
    if calibration:
        calibration = calibration.best(calibrate(device, seconds=AGAIN_S))
        rows = [bench.rated(row, calibration) for row in rows]
    return rows, calibration


def show(rows: Sequence[BenchRow]) -> None:
    """The table, and beneath it why rows failed or were not run."""
    from ..kernels.bench import shape_text

    if not rows:
        return
    columns = ("op", "shape", "implementation", "result", "µs", "p20–p80", "speed-up", "p20–p80", "GB/s", "GOP/s", "roofline")
    lines = []
    last = ""
    for row in rows:
        head = f"{row.op} {shape_text(row.shape)}"
        spread = f"{row.p20_us:,.1f}–{row.p80_us:,.1f}" if row.p20_us and row.p80_us else None
        gain = f"{row.speed_up_p20:.2f}–{row.speed_up_p80:.2f}" if row.speed_up_p20 and row.speed_up_p80 else None
        name = row.implementation + (" *" if row.implementation == row.baseline else "")
        share = _share(row.roofline_share)
        lines.append(
            (
                *((row.op, shape_text(row.shape)) if head != last else ("", "")),
                name,
                row.verdict,
                f"{row.p50_us:,.1f}" if row.p50_us else None,
                spread,
                console.rough(row.speed_up_p50),
                gain,
                console.rough(row.gb_per_s),
                row.tops and console.rough(row.tops * 1000),
                share,
            )
        )
        last = head
    console.print_table(columns, lines, left=4, optional=("p20–p80", "GOP/s", "GB/s"))
    console.say("* baseline: speed-up is its time / this time, formed round by round. roofline: share of this run's limit")
    console.say("> 100 %: faster than the rates calibrated beside it, so these were too low; the share says nothing")
    for row in rows:
        if row.op.startswith(TRAIN_STEP) and row.implementation != row.baseline and row.speed_up_p50:
            ratio = [1 / x for x in (row.speed_up_p80, row.speed_up_p50, row.speed_up_p20) if x]
            spread = f"p20–p80 {ratio[0]:.2f}–{ratio[-1]:.2f}"
            console.say(f"{row.op}: the {row.implementation} step takes {ratio[1]:.2f} × the {row.baseline} step ({spread})")
            base = next(r.extra_bytes for r in rows if (r.op, r.implementation) == (row.op, row.baseline))
            if row.extra_bytes and base:
                memory = f"{row.extra_bytes / 2**20:,.0f} MiB at its peak, {row.extra_bytes / base:.2f} × that step's"
                console.say(f"{row.op}: beyond the model and its optimizer it takes {memory}")
    from ..kernels.one_bit import rule

    if sentence := rule(rows):
        console.say(sentence)
    for row in rows:
        if row.reason:
            (console.error if row.verdict == "FAIL" else console.note)(f"{row.label}: {row.verdict}: {row.reason}")


def _read(path: Path) -> list[BenchRow]:
    from ..kernels.bench import read_rows

    try:
        return read_rows(path)
    except KernelError as e:
        raise DataError(str(e)) from e


def _show_comparison(old: Sequence[BenchRow], new: Sequence[BenchRow]) -> bool:
    """Print old against new; True if something regressed. Raises DataError where nothing was measured in both."""
    from ..kernels.bench import compare

    pairs = compare(old, new)
    if not pairs:
        raise DataError("--compare: no op, shape, device and thread count is in both measurements.")
    timed = [(p.label, p.old_us, p.new_us, p.ratio, "SLOWER" if p.regressed else "") for p in pairs if p.ratio or p.regressed]
    console.print_table(("measurement", "old µs", "new µs", "new/old", ""), timed)
    return any(p.regressed for p in pairs)


# --- what is measured -------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Which products are asked for: the layers of a model, numbers of rows, bits; what is not said is as the op has it."""

    model: str | None = None
    ms: Sequence[int] = ()
    bits: int | None = None

    def of(self, shapes: Sequence[Shape]) -> Sequence[Shape]:
        """The op's own shapes, changed as asked for; of an op without rows M they stay."""
        if not (self.model or self.ms) or not shapes or "M" not in shapes[0]:
            return shapes
        layers = LAYERS[self.model] if self.model else tuple(dict.fromkeys((s["N"], s["K"]) for s in shapes))
        rows = self.ms or tuple(dict.fromkeys(s["M"] for s in shapes))
        widths = (self.bits,) if self.bits else tuple(dict.fromkeys(s["bits"] for s in shapes))
        made = [{**shapes[0], "M": m, "N": n, "K": k, "bits": b} for m in rows for n, k in layers for b in widths]
        return [{**s, "packed": int(s["M"] <= PACKED_ROWS)} if "packed" in s else s for s in made]


def _cases(name: str, config: RunConfig, device: torch.device, sizes: Sizes) -> Iterator[tuple[Case, bool]]:
    """The cases of one name, each with whether a CUDA graph can time it."""
    if name not in OPS:
        from ..bench.model_cases import CASES

        yield from CASES[name](config, device)
    else:
        from ..kernels.op import load

        op = load(name)
        for shape in sizes.of(op.bench_shapes(device.type)):
            yield op.case(shape, device), True


def _share(share: float | None) -> str | None:
    """Share of the roofline as a cell. Above 1 the rates that this run calibrated were too low, and the share says nothing."""
    if not share:
        return None
    return f"{100 * share:.0f} %" if share <= 1 else "> 100 %"
