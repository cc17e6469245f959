"""Time a training step on a CPU: ours, eager and compiled, beside transformers' Llama in a plain loop, and torchao's QAT of it.

    python benchmarks/cpu_step.py [--rounds 15] [--threads 1] [--compile] [--clock cpu] [--out benchmarks/results/cpu_step.md]

All have the shape of `laptop-107K`: two layers of width 64, 256 ids, 8 sequences of 128 tokens, fp32, fused AdamW. Ours is a
whole step of `questctl train`: reading the batch, clipping, checks of the loss and metrics. The plain loop has none of these.
Rounds are interleaved and begin with another step each time, so that a machine that changes its speed does so for all. Printed
are the median of each, and the median of the rounds' ratios to the plain loop with their range from the 20th to the 80th
percentile. On a machine with other work, `--clock cpu --threads 1` counts the time of the processor alone.

torchao is measured if it is installed (pip install --no-deps torchao): weights in 4 bits by groups of 32, inputs by token in 8
bits.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from module_step import CLOCKS, with_torchao

from questctl.config import RunConfig, resolve, set_layer
from questctl.system import package_version
from questctl.training.allocator import keep_memory
from questctl.training.loop import Trainer, execution
from questctl.training.provenance import device_name
from questctl.training.run_data import load_data

PLAIN = "transformers, plain loop"
VALUES = {
    "model.n_layer": 2,
    "model.d_model": 64,
    "model.n_head": 2,
    "model.d_ff": 192,
    "data.source": "synthetic:markov?vocab=256&tokens=200000",
    "data.seq_len": 128,
    "train.batch_size": 8,
    "train.device": "cpu",
    "quant.block": 64,
}
SCHEMES = {"bf16": {"quant.method": "bf16"}, "W4A4": {"quant.bits": 4}, "W1A1": {"quant.bits": 1}}
CPU = torch.device("cpu")


def config(scheme: str, compiled: str) -> RunConfig:
    """The run of a scheme."""
    values = {**VALUES, "quant.method": "quest", **SCHEMES[scheme], "train.compile": compiled}
    return resolve([set_layer([f"{key}={value}" for key, value in values.items()])]).config


def our_trainer(scheme: str, compiled: str) -> Trainer:
    """A run, whose steps are timed."""
    c = config(scheme, compiled)
    return Trainer(c, load_data(c), CPU, stop=lambda: False)


def plain_loop(wrap: Callable[[torch.nn.Module], torch.nn.Module | None] = lambda model: model) -> Callable[[], None] | None:
    """A step of transformers' Llama of the same shape; None where `wrap` gives no model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = wrap(LlamaForCausalLM(shape))
    if model is None:
        return None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, 256, (64, 8, 128), generator=torch.Generator().manual_seed(0))
    count = 0

    def step() -> None:
        nonlocal count
        batch, count = ids[count % len(ids)], count + 1
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="of each in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compiled steps, too (a minute for each)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    keep_memory()
    with execution(options.threads, CPU), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = {PLAIN: plain_loop()}
        ours = {f"questctl {scheme}": our_trainer(scheme, "off") for scheme in SCHEMES}
        compiled = {f"questctl {scheme}, compiled": our_trainer(scheme, "on") for scheme in SCHEMES if options.compile}
        steps |= {name: trainer.step for name, trainer in {**ours, **compiled}.items()}
        steps["transformers, torchao w4.g32 a8"] = plain_loop(lambda model: with_torchao(copy.deepcopy(model), 4))
        present = {name: step for name, step in steps.items() if step is not None}
        first = {}
        for name, step in present.items():
            start = time.perf_counter()
            step()
            first[name] = time.perf_counter() - start
            step()
        failed = [name for name, trainer in compiled.items() if not trainer.compiled]  # such a run goes on without
        present = {name: step for name, step in present.items() if name not in failed}
        rounds: list[dict[str, float]] = []
        for i in range(options.rounds):
            names = list(present)[i % len(present) :] + list(present)[: i % len(present)]
            seconds = {}
            for name in names:
                start = clock()
                for _ in range(options.steps):
                    present[name]()
                seconds[name] = (clock() - start) / options.steps
            rounds.append(seconds)
    text = page(rounds, first, f"{options.threads} thread{'s' * (options.threads > 1)}, {options.clock} clock", failed)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def page(rounds: list[dict[str, float]], first: dict[str, float], how: str, failed: Sequence[str] = ()) -> str:
    """The measurement as a page in Markdown."""
    tokens = 8 * 128
    lines = [
        "# A training step on a CPU",
        "",
        f"107K parameters, 8 × 128 tokens, fp32, fused AdamW; {how}, {len(rounds)} interleaved rounds.",
        f"{device_name(CPU)}; torch {torch.__version__}, transformers {package_version('transformers')}, "
        f"torchao {package_version('torchao') if find_spec('torchao') else 'not installed'}, questctl {package_version()}.",
        *([f"torch.compile fails for {', '.join(failed)}."] if failed else []),
        "`python benchmarks/cpu_step.py` (`make bench-cpu`) makes this page and says what is compared.",
        "",
        "| step | ms | tokens/s | speed ÷ plain loop [20 %, 80 %] | first step, s |",
        "|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        median = float(np.median([r[name] for r in rounds]))
        ratio = np.percentile([r[PLAIN] / r[name] for r in rounds], [50, 20, 80])
        spread = f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"
        lines.append(f"| {name} | {1e3 * median:.1f} | {tokens / median:,.0f} | {spread} | {first[name]:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
