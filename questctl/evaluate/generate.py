"""Text from a model, one token after the other: greedy, or drawn from softmax(logits/temperature) of the likeliest tokens.

The prompt goes through the model once; its keys and values stay in a `Cache`, so that each further token costs one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..models.llama import Cache, Llama


@torch.inference_mode()  # one token is bound by what a call costs, and without autograd's part an op of kernels/ costs half
def generate(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    end: int | None = None,
) -> Iterator[int]:
    """Up to `max_tokens` ids that follow `prompt`, which is not empty; `end` ends the text and is not given out.

    `temperature` 0 takes the likeliest token, the lowest id of equal ones; above 0 tokens are drawn, with `top_k` > 0 from that
    many of the likeliest, by a generator of `seed`: the same on every device for the same logits.
    """
    device = next(model.parameters()).device
    cache = Cache(model.config, len(prompt) + max_tokens, device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    for _ in range(max_tokens):
        token = choose(model(tokens, cache=cache)[0, -1], temperature, top_k, generator)
        if token == end:
            return
        yield token
        tokens = torch.tensor([[token]], dtype=torch.int64, device=device)


def choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One id by logits (V,); see `generate`."""
    if not temperature:
        return int(logits.argmax())
    scaled = logits.double().cpu() / temperature
    if 0 < top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
