"""Time a training step of a module of others: plain, with our quantized layers, and with those of torchao.

    python benchmarks/module_step.py [--bits 4] [--threads 2] [--rounds 11] [--precision fp32 bf16] [--clock wall]

The module is a stack of transformer blocks (attention and a gated feed-forward layer) of width 256 on 16 sequences of 256
tokens. A step is forward, backward and AdamW. Rounds are interleaved, so that a machine that changes its speed does so for all.
Printed are the medians of the rounds' ratios to the plain step, with their range from the 20th to the 80th percentile. On a
machine with other work, `--clock cpu --threads 1` counts the time of the processor alone.

torchao, if it is installed, runs its fake quantization of the same bits: weights in groups of 32, and inputs by token in 8
bits.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import questctl

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Block(nn.Module):
    """Attention and SwiGLU, with the layer names of a Llama in transformers."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, D) → (B, T, D)."""
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        h = self.ffn_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Step:
    """One training step on fixed data."""

    def __init__(self, module: nn.Module, x: torch.Tensor, clock: Callable[[], float], *, autocast: bool) -> None:
        self.module, self.x, self.clock, self.autocast = module, x, clock, autocast
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def __call__(self) -> float:
        """Take the step; returns its seconds."""
        start = self.clock()
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.module(self.x).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.clock() - start


def with_torchao(module: nn.Module, bits: int) -> nn.Module | None:
    """The module with torchao's fake quantization; None without torchao."""
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError:
        return None
    weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), group_size=32)
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    quantize_(module, QATConfig(weight_config=weights, activation_config=inputs, step="prepare"))
    return module


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain, x = nn.Sequential(*(Block(256) for _ in range(options.layers))), torch.randn(16, 256, 256)
    ours = questctl.quantize_(copy.deepcopy(plain), "quest", bits=options.bits)
    modules = {"plain": plain, f"questctl quest-w{options.bits}a{options.bits}": ours}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = with_torchao(copy.deepcopy(plain), options.bits)
    if theirs is not None:
        modules[f"torchao w{options.bits}.g32 a8"] = theirs
    for precision in options.precision:
        steps: dict[str, Callable[[], float]] = {
            name: Step(copy.deepcopy(m), x, CLOCKS[options.clock], autocast=precision == "bf16") for name, m in modules.items()
        }
        for step in steps.values():
            step()
        rounds = [{name: step() for name, step in steps.items()} for _ in range(options.rounds)]
        for name in steps:
            ratio = np.percentile([r[name] / r["plain"] for r in rounds], [50, 20, 80])
            milliseconds = 1e3 * np.median([r[name] for r in rounds])
            print(f"{precision}  {name:24} {milliseconds:8.1f} ms   {ratio[0]:.2f} × plain  [{ratio[1]:.2f}, {ratio[2]:.2f}]")


if __name__ == "__main__":
    main()
