"""`python -m questctl.kernels [OP…]`: check and time the kernels with torch and Triton alone.

The same rows as `questctl bench` without the rest of the package, for a machine that has nothing else installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .op import OPS, load


def main() -> int:
    """The command line of this package; returns 1 if anything is wrong, 2 for a word that is not known."""
    parser = argparse.ArgumentParser(prog="python -m questctl.kernels", description="Check and time the kernels.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(OPS)} [default: all]")
    parser.add_argument("--check-only", action="store_true", help="compare with the definitions; time nothing")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each implementation at each shape [default: 1]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="rows as CSV")
    options = parser.parse_args()
    if unknown := [name for name in options.ops if name not in OPS]:
        parser.error(f"unknown op '{unknown[0]}'; choices: {', '.join(OPS)}")
    import torch

    from . import bench
    from .devices import calibrate
    from .one_bit import rule as one_bit_rule

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calibration = None if options.check_only else calibrate(device, seconds=min(options.seconds, 0.5))
    if calibration:
        sys.stdout.write(f"{calibration.device}: copy {calibration.copy_gbs:.1f} GB/s, matmul 10¹² op/s {calibration.tops}\n")
    rows: list[bench.BenchRow] = []
    for name in options.ops or OPS:
        op = load(name)
        if calibration and rows:  # again beside each op: the best of all is the limit
            calibration = calibration.best(calibrate(device, seconds=0.05))
        for shape in op.bench_shapes(device.type):
            case, how = op.case(shape, device), {"check_only": options.check_only, "seconds": options.seconds}
            found = bench.run_case(case, device, calibration, **how)
            rows += found
            for row in found:
                sys.stdout.write(_line(row) + "\n")
            sys.stdout.flush()
        if calibration:
            rows = [bench.rated(row, calibration) for row in rows]
        if options.json:  # after each op, so that a run that is cut short leaves what it had
            options.json.write_text(json.dumps(bench.document(rows, calibration), indent=1) + "\n", encoding="utf-8")
        if options.csv:
            bench.write_csv(rows, options.csv)
    if sentence := one_bit_rule(rows):
        sys.stdout.write(sentence + "\n")
    return int(any(row.verdict == "FAIL" for row in rows))


def _line(row: object) -> str:
    from .bench import BenchRow

    assert isinstance(row, BenchRow)
    if row.p50_us is None:
        return f"{row.label:<80} {row.verdict} {row.reason}"
    gain = f"{row.speed_up_p50:7.2f}× {row.baseline}" if row.speed_up_p50 else ""
    share = f"{100 * row.roofline_share:5.0f} % of roofline" if row.roofline_share else ""
    return f"{row.label:<80} {row.verdict:<5} {row.p50_us:12.2f} µs {gain} {share}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
