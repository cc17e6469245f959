"""`questctl generate`: what a trained run writes after a text, from its full-precision or its packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..errors import DataError, UsageError
from ..store import RunStore
from . import options as opt
from .eval import A_RUN, Packed, ProductBy, pack, packed_note, warn_unfinished

if TYPE_CHECKING:
    from ..data.tokenizers import Tokenizer


def command(
    name: Annotated[str, A_RUN],
    text: Annotated[str, typer.Argument(metavar="TEXT", show_default=False, help="How the text begins; of token data: ids.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to write at the most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token; above: drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from that many of the likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    packed: Packed = False,
    product: ProductBy = None,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Continue a text with the model of a run, token by token.

    For example: questctl generate 53K "def main("
    """
    from ..training.preflight import run_tokenizer

    run = RunStore(opt.runs_dir(runs)).find(name)
    config = run.config()
    prompt, tokenizer = _ids(text, run_tokenizer(config, run))
    if not prompt:
        raise UsageError("TEXT: is empty; give at least one character to go on from.")
    import torch

    from ..evaluate.generate import generate
    from ..training.loading import load_model, unfinished
    from ..training.loop import execution, pick_device

    device = pick_device(config.train.device)
    partial = unfinished(run)
    model = load_model(run, device=device)
    if partial:
        warn_unfinished(run.name, **partial._asdict())
    if not all(0 <= i < model.config.vocab_size for i in prompt):
        raise DataError(f"TEXT: id {max(prompt, key=abs)} is not one of the {model.config.vocab_size} that {run.name} knows.")
    size = pack(model, run.name, packed, product)
    if len(prompt) + max_tokens > config.data.seq_len:
        console.warn(f"{run.name} was trained on {config.data.seq_len} tokens at a time; what comes after may make less sense.")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    with execution(int(run.env().get("threads") or 1), device), autocast:
        end = tokenizer.end if tokenizer else None
        ids = list(generate(model, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed, end=end))
    written = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
    if as_json:
        found = {"unfinished": partial, "packed": size}
        more = {key: value._asdict() for key, value in found.items() if value}
        console.print_json(
            {"run": run.name, "prompt": text, "text": written, "tokens": ids, "ended": len(ids) < max_tokens, **more}
        )
        return
    if size:
        console.note(packed_note(size))
    console.say(text + written if tokenizer else f"{text} {written}")


def _ids(text: str, tokenizer: Tokenizer | None) -> tuple[list[int], Tokenizer | None]:
    """Ids of the prompt, and the tokenizer; None for token data, whose prompt is ids already."""
    if tokenizer is not None:
        return [int(i) for i in tokenizer.encode(text)], tokenizer
    try:
        return [int(i) for i in text.split()], None
    except ValueError:
        raise UsageError(f"TEXT: '{text}': the run was trained on token ids, not on text; write such as '3 1 4'.") from None
