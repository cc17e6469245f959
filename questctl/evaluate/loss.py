"""Validation loss on fixed windows that share no target, so that runs on the same data are measured on the same tokens.

loss = −(1/n) Σ ln p(xₜ | x<ₜ within its window, or its document)   nats/token;      bits/byte = loss / ln 2 / (bytes per token)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..data import sampler
from ..data.packing import IGNORED, Packing, parts
from ..data.sampler import Tokens, validation_windows
from ..training.distributed import SINGLE_PROCESS, World

Loss = Callable[..., torch.Tensor]  # (tokens (B, T), targets (B, T), of packed ones first (B, T)) → mean loss (), nats/token
Measure = Callable[..., torch.Tensor]  # of the same arguments → means of any shape


class Interrupted(Exception):
    """Raised by an evaluation that `stop` interrupted."""


def evaluate(
    loss: Loss,
    tokens: Tokens | Packing,
    *,
    seq_len: int,
    max_tokens: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    stop: Callable[[], bool] = lambda: False,
    world: World = SINGLE_PROCESS,
) -> float:
    """The mean loss in nats/token over at most `max_tokens` of `tokens` (n,). Arguments and errors are those of `means`."""
    how = {"seq_len": seq_len, "max_tokens": max_tokens, "batch_size": batch_size}
    return float(means(loss, tokens, **how, device=device, stop=stop, world=world))


@torch.no_grad()
def means(
    measure: Measure,
    tokens: Tokens | Packing,
    *,
    seq_len: int,
    max_tokens: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    stop: Callable[[], bool] = lambda: False,
    world: World = SINGLE_PROCESS,
) -> torch.Tensor:
    """The means of what `measure` gives over at most `max_tokens` of `tokens` (n,), in batches of `batch_size` sequences; fp64.

    The processes of `world` take batches in turn. A process without a batch of its own evaluates the first one again and
    discards the result, because the other processes may need it to gather weights. `stop` is called between batches. Raises
    Interrupted if it returns true.
    """
    packed = isinstance(tokens, Packing)
    windows = torch.from_numpy(
        tokens.validation(max_tokens) if isinstance(tokens, Packing) else validation_windows(tokens, seq_len, max_tokens)
    )
    total = torch.zeros((), dtype=torch.float64, device=device)
    counted = int((windows[:, 1] != IGNORED).sum()) if packed else len(windows)
    batches = windows.split(batch_size)
    for first in range(0, len(batches), world.size):
        if stop():
            raise Interrupted
        index = first + world.rank
        rows = batches[index] if index < len(batches) else batches[0]
        here = int((rows[:, 1] != IGNORED).sum()) if packed else len(rows)
        total = total + measure(*parts(rows.to(device, non_blocking=True))).double() * (here * (index < len(batches)))
    return world.sum(total) / counted


def evaluated_tokens(tokens: Tokens | Packing, seq_len: int, max_tokens: int) -> int:
    """The targets whose mean `evaluate` returns."""
    if isinstance(tokens, Packing):
        return int((tokens.validation(max_tokens)[:, 1] != IGNORED).sum())
    return sampler.evaluated_tokens(len(tokens), seq_len, max_tokens)


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Convert a loss in nats/token to bits per byte of text; None if the bytes per token are unknown."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None
