"""How long commands take on a store of many finished runs: seconds of processor time of each, with and without the index.

    python benchmarks/store_scale.py FOLDER --runs 10000

FOLDER gets `runs/`, a store of so many finished runs with losses of a planted law and 20 metric lines each, and `grid.toml`, a
sweep file of as many other cells. Nothing is trained. What is there is used again. Each row is one process:

    without   the index of the runs folder was removed before
    with      the index was there
    archived  all runs are in one archive, in a store of its own (with --archive)

The time is user and system together, of the process and its children, because the wall clock of a busy machine says little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from questctl.config import Layer, RunConfig, resolve
from questctl.config.presets import laptop_model
from questctl.store import RunStore, describe
from questctl.store.files import sealed
from questctl.sweep.costs import flops_per_token

WIDTHS = (32, 64, 96, 128, 160, 192, 224, 256, 288, 320)
RATIOS = (10, 20, 40, 80, 160)
SCHEMES = {"bf16": 1.0, "quest 8": 0.98, "quest 4": 0.7, "quest 3": 0.43, "quest 2": 0.15}  # method and bits → planted eff
LINES = 20  # of metrics, each run
HOST = os.uname().nodename
COMMANDS = {
    "runs ls": ["-m", "questctl", "runs", "ls", "--runs", "{runs}"],
    "load_runs": ["-c", "import sys, questctl; assert len(questctl.load_runs(sys.argv[1]))", "{runs}"],
    "fit-scaling": ["-m", "questctl", "fit-scaling", "{runs}"],
    "report": ["-m", "questctl", "report", "{runs}", "--out", "{folder}/report.html"],
    "sweep --dry-run": ["-m", "questctl", "sweep", "{folder}/grid.toml", "--dry-run", "--runs", "{runs}"],
}


def settings(seeds: range) -> Iterator[tuple[RunConfig, float]]:
    """Configs of the grid, for each of the seeds, and the planted eff of their schemes."""
    for d in WIDTHS:
        shape = laptop_model(d)
        for scheme, eff in SCHEMES.items():
            method, _, bits = scheme.partition(" ")
            for ratio in RATIOS:
                values: dict[str, Any] = {f"model.{k}": getattr(shape, k) for k in ("n_layer", "d_model", "n_head", "d_ff")}
                values |= {"quant.method": method, "quant.block": 32, "train.tokens_per_param": ratio, "data.seq_len": 128}
                values |= {"quant.bits": int(bits)} if bits else {}
                config = resolve([Layer("grid", {tuple(key.split(".")): value for key, value in values.items()})]).config
                for seed in seeds:
                    yield config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})}), eff


def write_run(root: Path, config: RunConfig, eff: float) -> None:
    """A finished run as the loop leaves it, but for its weights; without fsync."""
    facts = describe(config)
    folder, N, D, steps = root / facts["run"], facts["params_non_embedding"], config.tokens, config.train.steps
    folder.mkdir()
    noise = random.Random(folder.name)
    loss = 1.0 + 20 * (eff * N) ** -0.25 + 60 * D**-0.3
    loss *= math.exp(noise.gauss(0, 3e-3))
    ends = [max(1, steps * i // LINES) for i in range(1, LINES + 1)]
    curve = [loss * (1 + 0.5 * math.exp(-5 * i / LINES)) + noise.gauss(0, 0.01) for i in range(LINES)]
    lines = [
        {"step": s, "tokens": D * s // steps, "train_loss(nats/token)": y, "lr": config.optim.lr, "grad_norm": 0.5}
        for s, y in zip(ends, curve, strict=True)
    ]
    attempt = {"host": HOST, "questctl": "0.1.0", "python": "3.11", "torch": "2.11", "cpu": "a CPU", "commit": "0" * 40}
    result = {
        **facts,
        **{
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / 3,
            "train_loss": curve[-1],
            "model_bits": N * facts["w_stored_bits"],
        },
        **{
            "flops": flops_per_token(config) * D,
            "tokens_per_s": 2e9 / N,
            "seconds": D * N / 2e9,
            "peak_memory_bytes": 2**28,
            "data_hash": "ab" * 32,
        },
        **{
            "params_total": N + 512 * config.model.d_model,
            "steps": steps,
            "val_tokens": 131072,
            "attempts": 1,
            "device": "cpu",
        },
    }
    at = "2026-01-01T00:00:00.000+00:00"
    status = {"state": "done", "step": steps, "steps": steps, "attempts": 1, "message": "", "started_at": at, "updated_at": at}
    files = {
        "config.json": config.to_json(),
        "env.json": {
            "data_hash": "ab" * 32,
            "threads": 1,
            "train_tokens": 3_000_000,
            "attempts": [{"started_at": at, **attempt}],
        },
        "status.json": {**status, "metrics_bytes": 0, "metrics_sha256": "", "alone": False},
        "result.json": {"schema": 1, **result},
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in files.items():
        (folder / name).write_text(sealed(value))


def write_store(folder: Path, count: int) -> Path:
    """The store of `count` runs in `folder`, and the sweep file of as many others."""
    root, seeds = folder / "runs", -(-count // (len(WIDTHS) * len(RATIOS) * len(SCHEMES)))
    if not root.is_dir():
        partial = folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for i, (config, eff) in enumerate(settings(range(seeds))):
            if i < count:
                write_run(partial, config, eff)
        partial.rename(root)
    models = [laptop_model(d).model_dump(include={"n_layer", "d_model", "n_head", "d_ff"}) for d in WIDTHS]
    quants = [{"method": s.split()[0], "block": 32} | ({"bits": int(s.split()[1])} if " " in s else {}) for s in SCHEMES]
    lines = [
        f"base.data.seq_len = 128\n[matrix]\ntrain.seed = {list(range(seeds, 2 * seeds))}",
        f"train.tokens_per_param = {list(RATIOS)}",
        "size = [" + ", ".join(_table("model", model) for model in models) + "]",
        "scheme = [" + ", ".join(_table("quant", quant) for quant in quants) + "]",
    ]
    (folder / "grid.toml").write_text("\n".join(lines) + "\n")
    return root


def _table(section: str, keys: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{section}.{key} = {json.dumps(value)}" for key, value in keys.items()) + "}"


def seconds(command: list[str]) -> float:
    """User and system time of a process and its children; exits with what it printed if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Write the store and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--archive", action="store_true", help="measure a store whose runs are in an archive, too")
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), choices=list(COMMANDS), help="the commands to measure")
    options = parser.parse_args()
    root = write_store(options.folder, options.runs)
    stores = {"without": root, "with": root}
    if options.archive:
        stores["archived"] = options.folder / "archived" / "runs"
        if not stores["archived"].is_dir():
            shutil.copytree(root, stores["archived"])
            packing = ["-m", "questctl", "runs", "archive", "--runs", str(stores["archived"])]
            print(f"{'runs archive':<18}{seconds(packing):>10.1f}")
    print(f"{f'{options.runs} runs, seconds':<18}" + "".join(f"{name:>10}" for name in stores))
    for name in options.only:
        row = []
        for store, path in stores.items():
            words = [word.format(runs=path, folder=options.folder) for word in COMMANDS[name]]
            if store == "without":
                RunStore(path).index_path.unlink(missing_ok=True)
            row.append(seconds(words))
        print(f"{name:<18}" + "".join(f"{s:>10.1f}" for s in row), flush=True)


if __name__ == "__main__":
    main()
