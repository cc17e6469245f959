"""Measure what training takes in memory on a CPU beside what the dry run predicts, and the loss in parts beside the plain one.

    python benchmarks/memory.py [--json]

Each configuration trains two steps in a process of its own. Measured is the rise of the process's peak resident memory above
what it had before the model was built; predicted is `sweep.costs.memory_bytes`, and tensors is `sweep.cpu_memory.step_bytes`,
the most bytes of tensors that live at once. With `--tensors` nothing but these is measured: the profiler's count of allocations
beside `step_bytes`, with an eighth of the sequences. With `--mapped` each configuration is also measured where the allocator
returns every freed block above 1 MB to the system, beside `sweep.cpu_memory.cpu_bytes`, with the time of the second step.

The loss is that of 16 x 512 tokens over 50,304 ids at width 512, forward and backward, with the logits of all tokens (`plain`)
and with those of a part (`models/loss.py`); its rounds are interleaved, and its memory is measured in a process for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from questctl.config import RunConfig

LARGE = {"model.vocab_size": 50304, "data.seq_len": 256, "train.batch_size": 8, "train.micro_batch": 8}
SHAPE = {"model.d_model": 256, "model.n_head": 4, "model.d_ff": 768, "model.n_layer": 6}
CONFIGS: dict[str, dict[str, Any]] = {
    "width 256, 6 layers, bf16 in fp32": {**SHAPE, "train.batch_size": 32, "data.seq_len": 256},
    "the same, W4A4": {**SHAPE, "train.batch_size": 32, "data.seq_len": 256, "quant.method": "quest", "quant.bits": 4},
    "the same, W4A4, activations checkpointed": {
        **SHAPE,
        "train.batch_size": 32,
        "data.seq_len": 256,
        "quant.method": "quest",
        "quant.bits": 4,
        "train.checkpoint_activations": True,
    },
    "the same, by autocast to bf16": {**SHAPE, "train.batch_size": 32, "data.seq_len": 256, "train.precision": "bf16"},
    "50,304 ids, loss in parts": {**SHAPE, **LARGE},
    "30M of the paper, 4 x 512 tokens": {"preset": "30M", "train.batch_size": 4, "train.precision": "fp32"},
}
COMMON = {
    "data.source": "synthetic:markov?vocab=64&tokens=200000",
    "train.steps": 2,
    "train.eval_tokens": 2048,
    "train.threads": 1,
}
LOSS = (8192, 512, 50304)  # tokens, width, ids
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "128000000", "MALLOC_TOP_PAD_": "1000000"}
PLAIN, PARTS = "plain", "parts"


def resident() -> int:
    """Bytes that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def training(name: str) -> dict[str, float]:
    """Train two steps of a configuration in this process; measured and predicted bytes."""
    import torch

    from questctl.config import Layer, resolve
    from questctl.sweep.costs import memory_bytes
    from questctl.sweep.cpu_memory import cpu_bytes, step_bytes
    from questctl.training import loop
    from questctl.training.allocator import keep_memory

    values = {**COMMON, **CONFIGS[name]}
    config = resolve([Layer("benchmark", {tuple(key.split(".")): value for key, value in values.items()})]).config
    data = loop.load_data(config)
    keep_memory()
    torch.set_num_threads(1)
    torch.randn(64, 64, requires_grad=True).matmul(torch.randn(64, 64)).sum().backward()
    before = resident()
    trainer = loop.Trainer(config, data, torch.device("cpu"), stop=lambda: False)
    trainer.step()
    start = time.process_time()
    trainer.step()
    seconds, sized = time.process_time() - start, config.with_vocabulary(data.meta.vocab_size)
    bounds = {"predicted": memory_bytes(sized), "tensors": step_bytes(sized), "on_cpu": cpu_bytes(sized)}
    return {"measured": peak() - before, **bounds, "seconds": seconds}


def tensors(name: str) -> dict[str, float]:
    """The bytes of `counted` for a configuration of an eighth of the sequences, counted and predicted."""
    import torch

    from questctl.config import Layer, resolve

    values = {**COMMON, **CONFIGS[name]}
    sequences = max(1, values["train.batch_size"] // 8)
    values |= {"train.batch_size": sequences} | ({"train.micro_batch": sequences} if "train.micro_batch" in values else {})
    torch.set_num_threads(1)
    config = resolve([Layer("benchmark", {tuple(key.split(".")): value for key, value in values.items()})]).config
    return dict(zip(("counted", "tensors"), counted(config), strict=True))


def counted(config: RunConfig) -> tuple[int, int]:
    """The most bytes of tensors that live at once in the second step of a run by torch's profiler, and the predicted ones."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from questctl.sweep.cpu_memory import step_bytes
    from questctl.training import loop

    data = loop.load_data(config)
    trainer = loop.Trainer(config, data, torch.device("cpu"), stop=lambda: False)
    trainer.step()
    states = 12 * sum(p.numel() for p in trainer.model.parameters())  # weights and moments, which live before the step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.step()
    events = sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    lives = most = 0
    for event in events:
        lives += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, lives)
    return states + most, step_bytes(config.with_vocabulary(data.meta.vocab_size))


def loss_operands() -> tuple[Any, Any, Any]:
    """x (n, D), weight (V, D), both with gradients, and targets (n,)."""
    import torch

    torch.manual_seed(0)
    n, width, ids = LOSS
    x, weight = (torch.randn(rows, width).mul_(0.05).requires_grad_() for rows in (n, ids))
    return x, weight, torch.randint(ids, (n,))


def loss_of(kind: str, x: Any, weight: Any, targets: Any) -> Any:
    """The mean loss, after its backward pass."""
    import torch.nn.functional as F

    from questctl.config import ModelConfig
    from questctl.models.loss import summed_loss

    if kind == PLAIN:
        loss = F.cross_entropy(F.linear(x, weight), targets)
    else:
        loss = summed_loss(x, weight, targets, ModelConfig.loss_rows(len(weight))) / len(x)
    loss.backward()
    return loss.detach()


def loss_memory(kind: str) -> dict[str, float]:
    """The rise of this process's memory by one loss with its gradients."""
    import torch

    torch.set_num_threads(1)
    operands = loss_operands()
    before = resident()
    loss_of(kind, *operands)
    return {"measured": peak() - before}


def loss_times(rounds: int) -> dict[str, float]:
    """Seconds of both losses, medians of interleaved rounds; their ratio; the largest relative differences."""
    import torch

    torch.set_num_threads(1)
    x, weight, targets = loss_operands()
    seconds: dict[str, list[float]] = {PLAIN: [], PARTS: []}
    found = {}
    for turn in range(rounds):
        for kind in (PLAIN, PARTS) if turn % 2 else (PARTS, PLAIN):
            x.grad = weight.grad = None
            start = time.process_time()
            loss = loss_of(kind, x, weight, targets)
            seconds[kind].append(time.process_time() - start)
            found[kind] = loss, x.grad, weight.grad
    far = [float((a - b).norm() / b.norm()) for a, b in zip(found[PARTS], found[PLAIN], strict=True)]
    ratios = [parts / plain for parts, plain in zip(seconds[PARTS], seconds[PLAIN], strict=True)]
    times = {f"seconds_{kind}": statistics.median(values) for kind, values in seconds.items()}
    return {**times, "ratio": statistics.median(ratios), "loss_error": far[0], "gradient_error": max(far[1:])}


def in_child(*words: str, env: Mapping[str, str] | None = None) -> dict[str, float]:
    """What this script prints in a process of its own, with these variables."""
    line, variables = [sys.executable, __file__, *words], {**os.environ, **(env or {})}
    out = subprocess.run(line, check=True, capture_output=True, text=True, env=variables).stdout
    values: dict[str, float] = json.loads(out.splitlines()[-1])
    return values


def show_mapped(rounds: int) -> None:
    """Print memory and time of each configuration with both settings of the allocator, medians of interleaved rounds."""
    columns = ("configuration", "predicted", "returned", "ratio", "freed memory kept", "time")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for name in CONFIGS:
        found = [(in_child("--training", name), in_child("--training", name, env=MAPPED)) for _ in range(rounds)]
        kept, returned = (statistics.median(pair[i]["measured"] for pair in found) for i in (0, 1))
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in found)
        predicted = found[0][0]["on_cpu"]
        sizes = [f"{size / 2**20:,.0f} MiB" for size in (predicted, returned, kept)]
        print(f"| {name} | {sizes[0]} | {sizes[1]} | {predicted / returned:.3f} | {sizes[2]} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Measure everything, or in a child one thing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", action="store_true", help="only count the tensors of each configuration")
    parser.add_argument("--mapped", action="store_true", help="only compare both settings of the allocator")
    parser.add_argument("--training", help=argparse.SUPPRESS)
    parser.add_argument("--loss", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.tensors:
        print("| configuration, an eighth of the sequences | counted | predicted | ratio |\n|---|---|---|---|", flush=True)
        for name in CONFIGS:
            row = tensors(name)
            print(f"| {name} | {row['counted'] / 2**20:,.1f} MiB | {row['tensors'] / 2**20:,.1f} MiB | ", end="")
            print(f"{row['tensors'] / row['counted']:.3f} |", flush=True)
        return
    if words.mapped:
        show_mapped(words.rounds)
        return
    if words.training or words.loss:
        print(json.dumps(training(words.training) if words.training else loss_memory(words.loss)))
        return
    rows = {name: in_child("--training", name) for name in CONFIGS}
    losses = {kind: in_child("--loss", kind)["measured"] for kind in (PLAIN, PARTS)}
    times = loss_times(words.rounds)
    if words.json:
        print(json.dumps({"training": rows, "loss_bytes": losses, "loss": times}, indent=1))
        return
    print("| configuration | measured | tensors | predicted | ratio |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['measured'] / 2**20:,.0f} MiB | {row['tensors'] / 2**20:,.0f} MiB | ", end="")
        print(f"{row['predicted'] / 2**20:,.0f} MiB | ", end="")
        print(f"{row['predicted'] / row['measured']:.3f} |")
    print(f"\nloss: {losses[PLAIN] / 2**20:,.0f} MiB plain, {losses[PARTS] / 2**20:,.0f} MiB in parts, ", end="")
    print(f"{losses[PARTS] / losses[PLAIN]:.3f} of it; {times['ratio']:.3f} of the time; ", end="")
    print(f"loss differs by {times['loss_error']:.1e}, gradients by {times['gradient_error']:.1e}")


if __name__ == "__main__":
    main()
