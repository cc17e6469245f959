"""Run folders as a sweep leaves them, written in milliseconds: losses from a planted law, metric lines with noise."""

import json
from pathlib import Path

import numpy as np
from sweep_trainers import result_of

from questctl.config import Layer as L
from questctl.config import RunConfig, flatten, resolve
from questctl.store import SCHEMA_VERSION, write_json

METHODS = {"bf16": 1.0, "quest-4": 0.7, "quest-2": 0.15, "ste-2": 0.07}


def config(preset: str = "53K", method: str = "quest", bits: int | None = None, ratio: float = 8, seed: int = 0) -> RunConfig:
    quant = {"method": method, **({"bits": bits} if bits else {})}
    tree = {"preset": preset, "quant": quant, "train": {"tokens_per_param": ratio, "seed": seed, "log_every": 10}}
    return resolve([L("test", flatten(tree, where="test"))]).config


def configs(presets=("53K", "107K", "214K"), methods=tuple(METHODS), ratios=(8, 16), seeds=(0,)) -> list[RunConfig]:
    cells = [(p, m.split("-"), r, s) for p in presets for m in methods for r in ratios for s in seeds]
    return [config(p, m[0], int(m[1]) if len(m) > 1 else None, r, s) for p, m, r, s in cells]


def write(
    folder: Path, config: RunConfig, *, lines: int = 20, state: str = "done", message: str = "", data: str = "ab" * 32
) -> Path:
    """One run folder; a finished one unless `state` says otherwise."""
    run = folder / config.run_id
    run.mkdir(parents=True)
    rng = np.random.default_rng(config.train.seed)
    label = config.quant.label
    share = {"bf16": 1.0, "quest-w4a4": 0.7, "quest-w2a2": 0.15, "ste-w2a2": 0.07}.get(label, 0.5)
    N, D = config.model.params_non_embedding, config.tokens
    loss = (8 * (N * share) ** -0.12 + 60 * D**-0.3 + 0.5) * float(np.exp(2e-3 * rng.standard_normal()))
    steps = np.unique(np.linspace(1, config.train.steps, lines).astype(int))
    if state != "done":
        steps = steps[: len(steps) // 2]
    curve = loss + 4 * np.exp(-6 * steps / config.train.steps) + 0.01 * rng.standard_normal(len(steps))
    metrics = [
        {
            "step": int(s),
            "tokens": int(D * s / config.train.steps),
            "train_loss(nats/token)": float(y),
            "lr": 1e-3,
            "grad_norm": float(0.5 + 2 / s),
            "trust_fraction(weights)": 0.9,
        }
        for s, y in zip(steps, curve, strict=True)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))

    def write(name: str, value: object) -> None:  # without fsync: a thousand runs in seconds
        (run / name).write_text(json.dumps(value))

    write("config.json", config.to_json())
    attempt = {"host": "here", "torch": "2.13.0", "python": "3.11", "questctl": "0.1.0", "commit": "c0ffee", "cpu": "a CPU"}
    write("env.json", {"data_hash": data, "threads": 1, "attempts": [attempt]})
    steps_of = {"step": int(steps[-1]), "steps": config.train.steps}
    write("status.json", {"state": state, **steps_of, "attempts": 1, "message": message})
    if state == "done":
        result = result_of(
            config,
            loss=loss,
            bits_per_byte=loss / np.log(2),
            params_total=N + 32768,
            model_bits=N * 4.0,
            flops=6.0 * N * D,
            tokens_per_s=1e4 * share + N / 100,
            seconds=D / 1e4,
            data_hash=data,
        )
        write("result.json", {"schema": SCHEMA_VERSION, **result.__dict__})
    return run


def write_all(folder: Path, some: list[RunConfig], **options: object) -> None:
    for one in some:
        write(folder, one, **options)  # type: ignore[arg-type]


BENCH_ROW = {
    "op": "hadamard",
    "implementation": "triton",
    "shape": {"R": 64, "C": 128},
    "verdict": "PASS",
    "p20_us": 9.0,
    "p50_us": 10.0,
    "p80_us": 12.0,
    "baseline": "torch",
    "speed_up_p20": 1.5,
    "speed_up_p50": 2.0,
    "speed_up_p80": 2.4,
    "roofline_share": 0.71,
    "bound": "memory",
    "device": "a GPU",
    "threads": 1,
}


def write_bench(path: Path) -> Path:
    base = {**BENCH_ROW, "implementation": "torch", **{f"speed_up_p{q}": 1.0 for q in (20, 50, 80)}, "p50_us": 20.0}
    write_json(path, {"schema": 1, "calibration": None, "rows": [base, BENCH_ROW]})
    return path
