"""`questctl generate`: the text that a trained run writes after a prompt, from its full-precision or its packed weights."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import console
from ..evaluate.runs import generate_text
from ..store import RunStore
from . import options as opt
from .eval import Average, Packed, ProductBy


def command(
    name: opt.OneRun,
    text: Annotated[str, typer.Argument(metavar="TEXT", show_default=False, help="Beginning of the text; of token data: ids.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to write at the most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token; above 0: drawn by chance.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from this many of the likeliest tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    packed: Packed = False,
    product: ProductBy = None,
    average: Average = False,
    runs: opt.RunsDir = None,
    as_json: opt.Json = False,
) -> None:
    """Continue a text with the model of a run, token by token.

    For example: questctl generate 53K "def main("
    """
    written = generate_text(
        RunStore(runs).find(name),
        text,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        packed=packed,
        product=product,
        average=average,
    )
    if written.unfinished:
        console.warn(written.unfinished.sentence(written.run))
    if written.beyond is not None:
        console.warn(f"{written.run} was trained on {written.beyond} tokens at a time; what comes after may make less sense.")
    if as_json:
        console.print_json(written.to_json())
        return
    if written.packed:
        console.note(written.packed.sentence())
    console.say(written.whole, as_is=True)
