"""`questctl data prepare|info`: write the token files of a source, and say what they hold."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..config import DataConfig, human_count
from . import options as opt

if TYPE_CHECKING:
    from ..data.tokens import Dataset

app = typer.Typer(help="Prepare and inspect token files.", no_args_is_help=True)

DEFAULT = DataConfig()
SAMPLE_TOKENS = 400

SOURCES = "pystdlib, pysite:NAME, file:PATH, bin:PATH, synthetic:markov."
Source = Annotated[str, typer.Argument(help=SOURCES, show_default=False)]
Tokenizer = Annotated[str, typer.Option(help="Tokenizer of text: byte.")]
ValFraction = Annotated[float, typer.Option(help="Share of the documents held out for validation.")]
Force = Annotated[bool, typer.Option("--force", help="Write the files anew, even if they are in the cache.")]


@app.command("prepare")
def prepare(
    source: Source,
    tokenizer: Tokenizer = DEFAULT.tokenizer,
    val_fraction: ValFraction = DEFAULT.val_fraction,
    force: Force = False,
    as_json: opt.Json = False,
) -> None:
    """Tokenize SOURCE into the cache ($QUESTCTL_CACHE, else ~/.cache/questctl), unless it is there."""
    _report(_prepared(source, tokenizer, val_fraction, force), as_json)


@app.command("info")
def info(
    source: Source,
    tokenizer: Tokenizer = DEFAULT.tokenizer,
    val_fraction: ValFraction = DEFAULT.val_fraction,
    as_json: opt.Json = False,
) -> None:
    """Show what the token files of SOURCE hold, with the beginning of the validation text; prepares them if need be."""
    data = _prepared(source, tokenizer, val_fraction, False)
    _report(data, as_json, sample=_sample(data))


def _prepared(source: str, tokenizer: str, val_fraction: float, force: bool) -> Dataset:
    from ..data import tokens

    start = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= console.PLAIN_INTERVAL_S:
            last = now
            left = console.duration((now - start) * (total - done) / done)
            console.note(f"{source}: {human_count(done)} of {human_count(total)}, {left} left")

    return tokens.prepare(source, tokenizer, val_fraction=val_fraction, force=force, progress=progress)


def _sample(data: Dataset) -> str:
    """The beginning of the first validation document; ids where there is no tokenizer. Control characters are taken out."""
    from ..data import tokenizers

    ids = data.val[:SAMPLE_TOKENS].tolist()
    if data.meta.tokenizer == tokenizers.NONE:
        return " ".join(map(str, ids[:40]))
    tokenizer = tokenizers.load(data.meta.tokenizer)
    text = tokenizer.decode(ids[: ids.index(tokenizer.end)] if tokenizer.end in ids else ids)
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _report(data: Dataset, as_json: bool, **more: str) -> None:
    meta = data.meta
    if as_json:
        console.print_json({"data_hash": data.data_hash, "folder": str(data.folder), **meta.model_dump(mode="json"), **more})
        return
    facts: list[tuple[str, Any]] = [
        ("source", meta.source), ("folder", str(data.folder)), ("data hash", data.data_hash[:16]),
        ("tokenizer", meta.tokenizer), ("vocabulary", meta.vocab_size), ("dtype", meta.dtype),
        ("documents", meta.documents or None), ("equal documents left out", meta.duplicates or None),
        ("files passed over", len(meta.skipped) or None), ("entropy (nats/token)", meta.entropy),
    ]  # fmt: skip
    console.print_table(("", ""), [fact for fact in facts if fact[1] is not None], left=2)
    sides = (("train", meta.train), ("val", meta.val))
    rows = [(name, side.tokens, side.bytes_per_token, side.sha256[:16]) for name, side in sides]
    console.print_table(("", "tokens", "bytes/token", "SHA-256"), rows)
    for title, text in more.items():
        console.say(f"{title}:")
        console.say(text)
