"""Text generation, token by token: greedy, or sampled from softmax(logits / temperature) of the likeliest tokens.

The prompt passes through the model once. Its keys and values are kept in a `Cache`, so that each new token costs one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..models.llama import Cache, Llama


@torch.inference_mode()  # for one row the overhead of calls dominates; without autograd, an op of kernels/ has half as much
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
    """Yield up to `max_tokens` ids that follow `prompt`, which must not be empty. The id `end` ends the text and is left out.

    Temperature 0 takes the likeliest token and, of equally likely ones, the lowest id. Above 0 tokens are sampled by a
    generator with `seed`; `top_k` > 0 limits the choice to that many likeliest tokens. Equal logits give equal tokens on every
    device.
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
    """The next id for logits (V,). The arguments are those of `generate`."""
    if not temperature:
        return int(logits.argmax())
    scaled = logits.double().cpu() / temperature
    if 0 < top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
