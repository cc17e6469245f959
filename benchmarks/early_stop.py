"""What [stop] saves: one grid of learning rates and schemes trained in full and with early stopping, and what both find.

    python benchmarks/early_stop.py FOLDER [--replay] [--out benchmarks/results/early_stop_adamw]

Trains the grid below twice in FOLDER (FOLDER/full, FOLDER/stop), one run at a time; a repeated call goes on.
Compared are the operations of all steps taken, the frontier of validation loss against model bits, the best learning rate of
each scheme, and the processor time of judging. The forecast intervals are held against the ends of the full runs, at every look
and for every pair of a cell and a finished alternative. Operations are those of `questctl sweep --dry-run`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from questctl.analysis.pareto import non_dominated
from questctl.config import read_toml
from questctl.scaling.stopping import decide, gap, tail, windows
from questctl.store import RunStore
from questctl.sweep import LauncherOptions
from questctl.sweep.costs import flops_per_token, sized
from questctl.sweep.manifest import Sweep
from questctl.sweep.run import run_sweep
from questctl.sweep.stop_rule import StopRule
from questctl.sweep.stopping import STOP, Stopping, group_key
from questctl.sweep.sweep_file import SweepFile, parse_sweep_file

GRID = """
name = "early-stop"
[base]
data.source = "{source}"
data.seq_len = 128
model.n_layer = 2
model.d_model = 32
model.n_head = 1
model.ffn_multiple_of = 32
quant.block = 32
optim.name = "{optimizer}"
optim.schedule = "wsd"
optim.warmup_steps = {warmup}
train.steps = {steps}
train.batch_size = 8
train.eval_tokens = 65536
train.log_every = 4
train.threads = 1
[matrix]
optim.lr = {rates}
scheme = [{{ quant.method = "bf16" }}, {{ quant.method = "quest", quant.bits = {bits} }}]
"""
GRIDS = {
    "adamw": {"source": "pystdlib:clean", "warmup": 30, "steps": 300, "rates": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1], "bits": [4, 2]},
    "muon": {"source": "pystdlib", "warmup": 20, "steps": 320, "rates": [5e-4 * 2**i for i in range(9)], "bits": [4, 1]},
}


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="stem of a .json and a .md file")
    parser.add_argument("--file", type=Path, help="another sweep file (its [stop] is used if it has one)")
    parser.add_argument(
        "--replay", action="store_true", help="train the full sweep alone, and judge its cells along their curves"
    )
    parser.add_argument("--optimizer", choices=tuple(GRIDS), default="adamw", help="the grid")
    args = parser.parse_args()
    path = args.file or args.folder / "early-stop.toml"
    if not args.file:
        args.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(GRID.format(optimizer=args.optimizer, **GRIDS[args.optimizer]), encoding="utf-8")
    file = parse_sweep_file(read_toml(path), path)
    rule = file.stop or StopRule()
    full = Sweep(SweepFile(file.name, "", file.cells), RunStore(args.folder / "full"))
    run_sweep(full, launcher=LauncherOptions(jobs=1), record=False)
    if args.replay:
        endings = replayed(full, rule)
    else:
        stop = Sweep(SweepFile(file.name, "", file.cells, {}, rule), RunStore(args.folder / "stop"))
        run_sweep(stop, launcher=LauncherOptions(jobs=1), record=False)
        endings = trained(stop)
    found = {"replay": args.replay, **measure(full, endings, rule)}
    print(text := as_markdown(found))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")


@dataclass
class Ending:
    """How a cell ended with [stop]: its steps, the verdict that stopped it, its looks, and its loss if it is done."""

    steps: int
    verdict: dict[str, Any] | None
    looks: int
    look_seconds: float
    loss: float | None


def trained(stop: Sweep) -> dict[str, Ending]:
    """The endings of a sweep that was trained with [stop]."""
    out = {}
    for cell in stop.cells:
        run = stop.store.run(cell.run_id)
        verdicts, result = run.verdicts(), run.result()
        verdict = verdicts[-1] if run.state() == "stopped" else None
        seconds = sum(line.get("seconds", 0.0) for line in verdicts)
        steps = cell.config.train.steps if result else run.status().step
        out[cell.run_id] = Ending(steps, verdict, len(verdicts), seconds, result.loss if result else None)
    return out


def replayed(full: Sweep, rule: StopRule) -> dict[str, Ending]:
    """The endings that [stop] would bring about, from the curves of the full sweep: all cells come to a look together."""
    left = {cell.run_id: cell for cell in full.cells}
    out = {
        name: Ending(c.config.train.steps, None, 0, 0.0, full.store.run(name).require_result("replay").loss)
        for name, c in left.items()
    }
    for look in range(len(rule.marks(full.cells[0].config.train.steps))):
        stopped = []
        for name, cell in left.items():
            mark = rule.marks(cell.config.train.steps)[look]
            begin = time.process_time()
            verdict = decide(Stopping(rule, tuple(left.values())), cell, full.store.run(name), mark)
            out[name].look_seconds += time.process_time() - begin
            out[name].looks += 1
            if verdict["verdict"] == STOP:
                out[name].steps, out[name].verdict, out[name].loss = mark, verdict, None
                stopped.append(name)
        for name in stopped:
            del left[name]
    return out


def measure(full: Sweep, endings: dict[str, Ending], rule: StopRule) -> dict[str, Any]:
    """What both sweeps did and found."""
    rows = []
    for cell, config in zip(full.cells, sized(full.cells), strict=True):
        whole, ending = full.store.run(cell.run_id), endings[cell.run_id]
        result = whole.require_result("early_stop")
        rows.append(
            {
                "run": cell.run_id,
                "scheme": config.scheme,
                "lr": config.optim.lr,
                "state": "stopped" if ending.verdict else "done",
                "steps": ending.steps,
                "of": config.train.steps,
                "flops": config.tokens * flops_per_token(config),
                "loss": result.loss,
                "end": tail(whole.metrics()),
                "model_bits": result.model_bits,
                "same_bits": ending.loss in (None, result.loss),
                "gap": ending.verdict["gap"] if ending.verdict else None,
                "by": ending.verdict["by"] if ending.verdict else None,
                "judged": ending.looks,
                "judge_seconds": ending.look_seconds,
                "seconds": result.seconds,
            }
        )
    done = [row for row in rows if row["state"] == "done"]
    total = sum(row["flops"] for row in rows)
    return {
        "saved": 1 - sum(row["flops"] * row["steps"] / row["of"] for row in rows) / total,
        "flops": total,
        "frontier": frontier(rows),
        "frontier_stop": frontier(done),
        "best": best(rows),
        "best_stop": best(done),
        "bit_for_bit": all(row["same_bits"] for row in done),
        "judge_seconds_each": sum(row["judge_seconds"] for row in rows) / max(1, sum(row["judged"] for row in rows)),
        "coverage": coverage(full, rule),
        "rule": rule.model_dump(mode="json"),
        "rows": rows,
    }


def frontier(rows: list[dict[str, Any]]) -> list[str]:
    """The runs that no other beats in model bits and loss."""
    on = non_dominated(np.array([row["model_bits"] for row in rows]), np.array([row["loss"] for row in rows]))
    return sorted(row["run"] for row, keep in zip(rows, on, strict=True) if keep)


def best(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Scheme → the learning rate of least loss."""
    return {
        scheme: min((row for row in rows if row["scheme"] == scheme), key=lambda row: row["loss"])["lr"]
        for scheme in sorted({row["scheme"] for row in rows})
    }


def coverage(full: Sweep, rule: StopRule) -> list[dict[str, float]]:
    """At each look: how many intervals of gaps held the gap at the end, and how many lay above it, over all pairs."""
    out = []
    ends = {cell.run_id: math.log(tail(full.store.run(cell.run_id).metrics())) for cell in full.cells}
    for share in rule.marks(100):
        seen = {c.run_id: windows(full.store.run(c.run_id), c.config, share / 100) for c in full.cells}
        gaps = [
            (gap(seen[a.run_id], seen[b.run_id], a.config, b.config, share / 100, rule.level), a, b)
            for a in full.cells
            for b in full.cells
            if a is not b and group_key(a.config) == group_key(b.config)
        ]
        truth = [ends[a.run_id] - ends[b.run_id] for _, a, b in gaps]
        held = [g.low <= t <= g.high for (g, *_), t in zip(gaps, truth, strict=True)]
        above = [t < g.low for (g, *_), t in zip(gaps, truth, strict=True)]
        error = np.median([abs(g.middle - t) for (g, *_), t in zip(gaps, truth, strict=True)])
        out.append(
            {"share": share / 100, "pairs": len(gaps), "held": np.mean(held), "above": np.mean(above), "median_error": error}
        )
    return [{key: float(value) for key, value in row.items()} for row in out]


def as_markdown(found: dict[str, Any]) -> str:
    """The numbers in tables."""
    rule, stopped = found["rule"], [row for row in found["rows"] if row["state"] == "stopped"]
    bits = "yes" if found["bit_for_bit"] else "NO"
    how = (
        "Replayed along the curves of the full sweep: a cell that is stopped ends at the look. "
        if found["replay"]
        else f"Runs that were not stopped ended bit for bit as in the full sweep: {bits}. "
    )
    lines = [
        "# Early stopping",
        "",
        f"{len(found['rows'])} cells, {found['flops']:.3g} FLOPs in full; {len(stopped)} were stopped, which saved "
        f"**{found['saved']:.1%}** of them. The frontier is {'the same' if same(found, 'frontier') else 'ANOTHER'} "
        f"({len(found['frontier'])} runs), and so are the best learning rates: {'yes' if same(found, 'best') else 'NO'}. "
        f"{how}"
        f"A look took {found['judge_seconds_each'] * 1e3:.0f} ms of processor time. after = {rule['after']:g}, "
        f"margin = {rule['margin']:g}, level = {rule['level']:g}.",
        "",
        "| scheme | lr | loss in full | with [stop] | steps | forecast gap to the run ahead (nats/token) | gap at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    end = {row["run"]: row["end"] for row in found["rows"]}
    for row in found["rows"]:
        forecast = "{1:+.3f} [{0:+.3f}, {2:+.3f}]".format(*row["gap"]) if row["gap"] else ""
        truth = f"{row['end'] - end[row['by']]:+.3f}" if row["gap"] else ""
        about = (row["scheme"], f"{row['lr']:g}", f"{row['loss']:.4f}", row["state"], f"{row['steps']}/{row['of']}")
        lines.append(f"| {' | '.join((*about, forecast, truth))} |")
    lines += ["", "Intervals over all pairs of alternatives, level " + f"{rule['level']:g}:", ""]
    lines += ["| look at | pairs | held the gap at the end | lay above it | median error, log loss |", "|---|---|---|---|---|"]
    for row in found["coverage"]:
        lines.append(
            f"| {row['share']:.0%} | {row['pairs']:.0f} | {row['held']:.1%} | {row['above']:.1%} | {row['median_error']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def same(found: dict[str, Any], key: str) -> bool:
    """Whether both sweeps found the same."""
    return bool(found[key] == found[f"{key}_stop"])


if __name__ == "__main__":
    main()
