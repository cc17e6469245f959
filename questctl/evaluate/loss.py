"""Validation loss, the same for every run on the same data: fixed windows that share no target, each token counted once.

loss = −(1/n) Σ ln p(xₜ | x<ₜ within its window)   nats/token;      bits/byte = loss / ln 2 / (bytes per token)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..data.sampler import Tokens, validation_windows
from ..training.distributed import SINGLE_PROCESS, World

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (tokens (B, T), targets (B, T)) → mean loss (), nats/token


class Interrupted(Exception):
    """`stop` asked for an end in the middle of an evaluation."""


@torch.no_grad()
def evaluate(
    loss: Loss,
    tokens: Tokens,
    *,
    seq_len: int,
    max_tokens: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    stop: Callable[[], bool] = lambda: False,
    world: World = SINGLE_PROCESS,
) -> float:
    """Mean loss in nats/token over at most `max_tokens` of `tokens` (n,), in batches of `batch_size` windows.

    The processes of `world` take batches in turn; one that has none left takes the first again, for nothing, as the others may
    need it to gather weights. `stop` is asked between batches. Raises Interrupted if it says so.
    """
    windows = torch.from_numpy(validation_windows(tokens, seq_len, max_tokens))
    total = torch.zeros((), dtype=torch.float64, device=device)
    batches = windows.split(batch_size)
    for first in range(0, len(batches), world.size):
        if stop():
            raise Interrupted
        mine = first + world.rank
        rows = batches[mine] if mine < len(batches) else batches[0]
        batch = rows.to(device, non_blocking=True)
        total += loss(batch[:, :-1], batch[:, 1:]).double() * (len(rows) * (mine < len(batches)))
    return float(world.sum(total) / len(windows))


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """nats/token → bits per byte of text; None where the tokens stand for no known number of bytes."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None
