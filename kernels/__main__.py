"""`python -m questctl.kernels [OP…]`: check and time the kernels on a machine that has only torch and Triton.

It writes the same rows as `questctl bench` and imports nothing of questctl outside this package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .bench import op_cases, run_ops
from .op import OPS
from .rows import BenchRow, write_csv, write_json


def main() -> int:
    """Run the command line; returns 1 if a result is wrong. argparse ends the process with 2 for an unknown operation."""
    parser = argparse.ArgumentParser(prog="python -m questctl.kernels", description="Check and time the kernels.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(OPS)} [default: all]")
    parser.add_argument("--check-only", action="store_true", help="compare with the definitions; time nothing")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each implementation at each shape [default: 1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows as CSV")
    options = parser.parse_args()
    if unknown := [name for name in options.ops if name not in OPS]:
        parser.error(f"unknown op '{unknown[0]}'; choices: {', '.join(OPS)}")
    import torch

    from .devices import calibrate
    from .one_bit import rule as one_bit_rule

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calibration = None if options.check_only else calibrate(device, seconds=min(options.seconds, 0.5))
    if calibration:
        sys.stdout.write(f"{calibration.device}: copy {calibration.copy_gbs:.1f} GB/s, matmul 10¹² op/s {calibration.tops}\n")
    cases = {name: partial(op_cases, name, device) for name in options.ops or OPS}
    rows: list[BenchRow] = []
    for measured in run_ops(cases, device, calibration, seconds=options.seconds, again_s=0.05, on_rows=_print):
        rows = measured.rows
        if options.json:
            write_json(rows, measured.calibration, options.json)
        if options.csv:
            write_csv(rows, options.csv)
    if sentence := one_bit_rule(rows):
        sys.stdout.write(sentence + "\n")
    return int(any(row.verdict == "FAIL" for row in rows))


def _print(rows: Sequence[BenchRow]) -> None:
    """One line for each row of a case, as soon as it is measured."""
    sys.stdout.writelines(_line(row) + "\n" for row in rows)
    sys.stdout.flush()


def _line(row: BenchRow) -> str:
    if row.p50_us is None:
        return f"{row.label:<80} {row.verdict} {row.reason}"
    gain = f"{row.speed_up_p50:7.2f}× {row.baseline}" if row.speed_up_p50 else ""
    share = f"{100 * row.roofline_share:5.0f} % of roofline" if row.roofline_share else ""
    return f"{row.label:<80} {row.verdict:<5} {row.p50_us:12.2f} µs {gain} {share}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
