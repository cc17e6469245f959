"""A benchmark as tables and sentences: rows, comparisons, compiled kernels, and what a training step costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import console
from ..kernels.rows import BenchRow, Comparison, shape_text
from .names import TRAIN_STEP

if TYPE_CHECKING:
    from ..kernels.compile import Compiled

COLUMNS = ("op", "shape", "implementation", "result", "µs", "p20–p80", "speed-up", "p20–p80", "GB/s", "GOP/s", "roofline")
COMPARED = ("measurement", "old µs", "new µs", "new/old", "")
COMPILED = ("op", "kernel", "shape", "GPU", "matrix instructions", "result", "registers", "stack bytes", "shared bytes")
LEGEND = (
    "* baseline: speed-up is its time / this time, formed round by round. roofline: share of this run's limit",
    "> 100 %: faster than the rates calibrated beside it, so these were too low and the share is void",
)


def cells(rows: Sequence[BenchRow]) -> list[tuple[Any, ...]]:
    """One line of `COLUMNS` per row; operation and shape stand in the first line of each case only."""
    lines: list[tuple[Any, ...]] = []
    last: tuple[str, str] | None = None
    for row in rows:
        case = row.op, shape_text(row.shape)
        lines.append(
            (
                *(case if case != last else ("", "")),
                row.implementation + (" *" if row.implementation == row.baseline else ""),
                row.verdict,
                f"{row.p50_us:,.1f}" if row.p50_us else None,
                f"{row.p20_us:,.1f}–{row.p80_us:,.1f}" if row.p20_us and row.p80_us else None,
                console.rough(row.speed_up_p50),
                f"{row.speed_up_p20:.2f}–{row.speed_up_p80:.2f}" if row.speed_up_p20 and row.speed_up_p80 else None,
                console.rough(row.gb_per_s),
                row.tops and console.rough(row.tops * 1000),
                _share(row.roofline_share),
            )
        )
        last = case
    return lines


def compared_cells(pairs: Sequence[Comparison]) -> list[tuple[Any, ...]]:
    """One line of `COMPARED` for each measurement that was timed in both, or that regressed."""
    return [(p.label, p.old_us, p.new_us, p.ratio, "SLOWER" if p.regressed else "") for p in pairs if p.ratio or p.regressed]


def compiled_cells(kernels: Sequence[Compiled]) -> list[tuple[Any, ...]]:
    """One line of `COMPILED` per kernel; spilled registers are a FAIL."""
    return [
        (
            *(k.op, k.kernel, shape_text(k.shape), f"sm_{k.arch}", " ".join(k.instructions)),
            "FAIL" if k.stack_bytes else "PASS",
            *(k.registers, k.stack_bytes, k.shared_bytes),
        )
        for k in kernels
    ]


def sentences(rows: Sequence[BenchRow]) -> list[str]:
    """The results in sentences: how much longer and larger a quantized training step is, and whether a one-bit kernel pays."""
    lines = []
    for row in rows:
        if row.op.startswith(TRAIN_STEP) and row.implementation != row.baseline and row.speed_up_p50:
            ratio = [1 / x for x in (row.speed_up_p80, row.speed_up_p50, row.speed_up_p20) if x]
            spread = f"p20–p80 {ratio[0]:.2f}–{ratio[-1]:.2f}"
            lines.append(f"{row.op}: the {row.implementation} step takes {ratio[1]:.2f} × the {row.baseline} step ({spread})")
            base = next(r.extra_bytes for r in rows if (r.op, r.implementation) == (row.op, row.baseline))
            if row.extra_bytes and base:
                memory = f"{row.extra_bytes / 2**20:,.0f} MiB at its peak, {row.extra_bytes / base:.2f} × that step's"
                lines.append(f"{row.op}: beyond the model and its optimizer it takes {memory}")
    from ..kernels.one_bit import rule

    return [*lines, *filter(None, [rule(rows)])]


def _share(share: float | None) -> str | None:
    """A share of the roofline. Above 1 the calibrated rates were too low, so that no number is shown."""
    if not share:
        return None
    return f"{100 * share:.0f} %" if share <= 1 else "> 100 %"
