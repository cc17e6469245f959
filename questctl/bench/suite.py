"""Measure kernels and whole-model cases on this machine: one call, its rows as records, their files and comparisons.

    quantizer     the model's quantizer, forward and backward, against its plain formula and against a copy
    train-step    the quantized training step against the full-precision step of the same model, in fp32 and bf16 autocast
    prefill       sequences through the packed model, against the same model in bf16
    decode        one more token after a sequence, compared in the same way
    others        the kernels of `kernels.op.OPS`

Requests are checked before torch is imported. Candidates take turns within one run, and a wrong result has no speed
(`kernels/bench.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import console
from ..config import Layer, RunConfig, resolve
from ..errors import DataError, MissingDependency, UsageError, unknown
from ..kernels.op import OPS, KernelError
from ..kernels.rows import BenchRow, Comparison, compare, document, read_rows, write_csv, write_json
from .names import DECODE, PREFILL, QUANTIZER, TRAIN_STEP

if TYPE_CHECKING:
    import torch

    from ..kernels.compile import Compiled
    from ..kernels.devices import Calibration
    from ..kernels.op import Case, Shape

CHOICES = (QUANTIZER, TRAIN_STEP, PREFILL, DECODE, *OPS)
DEFAULT_CONFIG = {("preset",): "640K", ("quant", "method"): "quest", ("quant", "bits"): 4}  # of the whole-model cases
PRODUCTS = ("int-gemm", "packed-gemm", "packed-gemm-16", "int-linear")
PACKED_ROWS = 64  # a layer of inference reads packed weights for at most this many rows (kernels.gemv.SKINNY_ROWS)
LAYERS = {  # model → (N, K) of qkv, o, gate·up, down; SwiGLU 8/3 rounded up; 70B: arXiv 2307.09288, 8 heads of keys and values
    "800M": ((6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632)),
    "1.6B": ((7680, 2560), (2560, 2560), (13824, 2560), (2560, 6912)),
    "7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}


@dataclass(frozen=True)
class Benchmark:
    """The measurements of one run, and the rates of the device behind rooflines (None with `check_only`)."""

    rows: tuple[BenchRow, ...]
    calibration: Calibration | None

    @property
    def failures(self) -> list[BenchRow]:
        """The rows whose result is wrong, with the reason in each."""
        return [row for row in self.rows if row.verdict == "FAIL"]

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file: schema version, calibration, rows."""
        return document(self.rows, self.calibration)

    def write_json(self, path: Path | str) -> None:
        """Write the file that `read_benchmark` reads."""
        write_json(self.rows, self.calibration, Path(path))

    def write_csv(self, path: Path | str) -> None:
        """Write one line per row."""
        write_csv(self.rows, Path(path))

    def write_plots(self, folder: Path | str) -> list[Path]:
        """Draw speed-ups against M and shares of the roofline; returns the files. Rows without a time are left out."""
        from ..kernels.plots import write_plots

        return write_plots(self.rows, Path(folder))

    def compare(self, old: Sequence[BenchRow] | Path | str) -> list[Comparison]:
        """Compare with earlier rows, or with the file of them; `Comparison.regressed` marks what became slower or wrong.

        Raises DataError for a file of another kind, and if no operation, shape, device and thread count is in both.
        """
        comparisons = compare(read_benchmark(old) if isinstance(old, Path | str) else old, self.rows)
        if not comparisons:
            raise DataError("--compare: no op, shape, device and thread count is in both measurements.")
        return comparisons


def read_benchmark(path: Path | str) -> list[BenchRow]:
    """The rows of a file that `questctl bench --json FILE` wrote. Raises DataError naming the file."""
    try:
        return read_rows(Path(path))
    except KernelError as e:
        raise DataError(str(e)) from e


def benchmark(
    ops: Sequence[str] = (),
    config: RunConfig | None = None,
    *,
    check_only: bool = False,
    seconds: float = 1.0,
    threads: int = 0,
    model: str | None = None,
    m: Sequence[int] = (),
    bits: int | None = None,
    out: Path | str | None = None,
) -> Benchmark:
    """Check and time the named operations on the GPU, or on the CPU without one.

    Args:
        ops: Names among `CHOICES`. Default: all, or the matrix products if `model` or `m` is given.
        config: The model of the whole-model cases; its weights are random. Default: preset 640K with quest at 4 bits.
        check_only: Compare with the definitions and time nothing.
        seconds: Time for each implementation at each shape.
        threads: CPU threads; 0 leaves torch's choice.
        model: Measure products at the layers of this model, a key of `LAYERS`.
        m: Measure products at these numbers of rows of the activations.
        bits: Bits of the weights in these products. Default: those of the operation's own shapes.
        out: A file for the rows, written anew after each case, so that a killed run leaves its rows so far.

    Raises:
        UsageError: An operation or model is unknown, or there is nothing to pack in the config.
    """
    for name in ops:
        if name not in CHOICES:
            raise UsageError(unknown("bench", name, CHOICES, what="op"))
    if model is not None and model not in LAYERS:
        raise UsageError(unknown("--model", model, LAYERS))
    if min(m, default=1) < 1:
        raise UsageError(f"--m: {min(m)} is not a positive number of rows.")
    if not ops:
        ops = [name for name in OPS if name in PRODUCTS] if model or m else CHOICES
    config = config or resolve([Layer("default", DEFAULT_CONFIG)]).config
    import torch

    from ..kernels.bench import run_ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        console.note("no CUDA GPU here: the CPU implementations are measured; the Triton kernels and CUDA graphs are not.")
    cases = {name: partial(_cases, name, config, device, Sizes(model, m, bits)) for name in dict.fromkeys(ops)}
    rows: list[BenchRow] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        rates = None if check_only else _calibrated(device)
        for measured in run_ops(cases, device, rates, seconds=seconds):
            rows, rates = measured.rows, measured.calibration
            if out is not None:
                write_json(rows, rates, Path(out))
            if not measured.count:
                console.note(f"{measured.name}: there is nothing to measure of it on this machine; it needs a CUDA GPU.")
    finally:
        torch.set_num_threads(before)
    return Benchmark(tuple(rows), rates)


def _calibrated(device: torch.device) -> Calibration:
    """Measure the rates of the device, and show them."""
    from ..kernels.devices import calibrate

    rates = calibrate(device)
    matmul = ", ".join(f"{unit} {tops * 1000:,.0f} G" for unit, tops in rates.tops.items())
    console.note(f"{rates.device}, {rates.threads} threads: copy {rates.copy_gbs:.1f} GB/s, matmul op/s {matmul}")
    return rates


def compile_kernels(ops: Sequence[str] = ()) -> list[Compiled]:
    """Build the GPU kernels of `ops` (default: all) for compute capability 8.0 and 9.0, with or without a GPU.

    Each record holds registers, stack bytes (0 unless registers are spilled), shared memory and matrix instructions. Raises
    UsageError for an operation without a kernel, MissingDependency if no Triton that compiles is installed.
    """
    if alien := [name for name in ops if name not in OPS]:
        raise UsageError(f"bench: {alien[0]} has no kernel of its own to compile; choices: {', '.join(OPS)}.")
    from ..kernels.compile import ARCHITECTURES, compile_ops

    try:
        return [kernel for arch in ARCHITECTURES for kernel in compile_ops(ops or list(OPS), arch)]
    except KernelError as e:
        raise MissingDependency(str(e)) from e


class Sizes(NamedTuple):
    """The shapes at which products are measured: layers of a model, numbers of rows, bits. The operation decides the rest."""

    model: str | None = None
    m: Sequence[int] = ()
    bits: int | None = None

    def of(self, shapes: Sequence[Shape]) -> Sequence[Shape]:
        """The operation's own shapes with these sizes instead; unchanged for an operation without rows M."""
        if not (self.model or self.m) or not shapes or "M" not in shapes[0]:
            return shapes
        layers = LAYERS[self.model] if self.model else tuple(dict.fromkeys((s["N"], s["K"]) for s in shapes))
        rows = self.m or tuple(dict.fromkeys(s["M"] for s in shapes))
        widths = (self.bits,) if self.bits else tuple(dict.fromkeys(s["bits"] for s in shapes))
        made = [{**shapes[0], "M": m, "N": n, "K": k, "bits": b} for m in rows for n, k in layers for b in widths]
        return [{**s, "packed": int(s["M"] <= PACKED_ROWS)} if "packed" in s else s for s in made]


def _cases(name: str, config: RunConfig, device: torch.device, sizes: Sizes) -> Iterable[tuple[Case, bool]]:
    """The cases of one operation, each with whether a CUDA graph can time it. Its name is shown when its turn comes."""
    console.note(f"{name} …")
    if name in OPS:
        from ..kernels.bench import op_cases

        return op_cases(name, device, sizes.of)
    from .model_cases import CASES

    return CASES[name](config, device)
