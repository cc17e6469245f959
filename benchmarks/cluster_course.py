"""Send 10,000 cells through 1,000 GPUs on virtual time: makespan, lost work, and the load of the shared file system.

    python benchmarks/cluster_course.py

Two grids: lengths between half a minute and three hours, evenly on a logarithmic scale, the longest on eight GPUs; and one GPU
for each of half an hour to two and a half. Rates of trouble are per node of eight GPUs and hour.
"""

from __future__ import annotations

import random

from questctl.sweep.simulation import HOUR, Cluster, Job, simulate
from questctl.sweep.slots import Device, Need

NODE = tuple(Device(str(i), 1, 80e9) for i in range(8))
TROUBLE = {
    "none": {},
    "a failure in 100 h": {"failures": 0.01},
    "the same, preempted every 20 h, 2 % slow": {"failures": 0.01, "preemptions": 0.05, "slow": 0.02},
    "a failure in 10 h": {"failures": 0.1},
}


def grid(kind: str, dice: random.Random) -> list[Job]:
    """10,000 cells in the order in which workers take them."""
    if kind == "short and long":
        lengths = [10 ** dice.uniform(1.5, 4) for _ in range(10_000)]
    else:
        lengths = [dice.uniform(0.5 * HOUR, 2.5 * HOUR) for _ in range(10_000)]
    wide = 8000 if kind == "short and long" else 1e9
    jobs = [Job(str(i), seconds, Need(8 if seconds > wide else 1, 10e9)) for i, seconds in enumerate(lengths)]
    return sorted(jobs, key=lambda job: (-job.devices, -job.seconds))


def main() -> None:
    """Print a row for each grid and kind of trouble."""
    print("| cells | trouble | hours | of the least possible | work undone | takeovers | operations a second |")
    print("|---|---|---|---|---|---|---|")
    for kind in ("short and long", "one GPU each"):
        for trouble, rates in TROUBLE.items():
            course = simulate(grid(kind, random.Random(1)), Cluster(125, NODE, **rates))
            cells = (course.makespan / HOUR, course.ratio, 100 * course.lost / course.busy, course.takeovers)
            print(f"| {kind} | {trouble} | {cells[0]:.2f} | {cells[1]:.3f} | {cells[2]:.2f} % | {cells[3]} | ", end="")
            print(f"{sum(course.operations.values()):.0f} |")


if __name__ == "__main__":
    main()
