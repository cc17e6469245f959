"""`questctl data prepare|info`: write the token files of a source, and say what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..config import DataConfig, parse_count
from . import options as opt

if TYPE_CHECKING:
    from ..data.tokens import Dataset

app = typer.Typer(help="Prepare and inspect token files.", no_args_is_help=True)

DEFAULT = DataConfig()
SOURCES = "pystdlib, pysite:NAME, file:PATH or hf:DATASET/CONFIG (with :FIELD at the end), bin:PATH, synthetic:markov, a path."
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCES, show_default=False)]
Tokenizer = Annotated[str, typer.Option(help="Tokenizer: byte, bpe:V, bpe.llama3:V, hf:NAME_OR_DIR, gguf:FILE.")]
ValFraction = Annotated[float, typer.Option(help="Share of the documents held out for validation.")]
Dedup = Annotated[str, typer.Option(help="Copies kept out of the validation text: exact, near, or auto.")]
MaxTokens = Annotated[str | None, typer.Option(help="Tokens to write at most, both parts together: 3B.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write, for --data bin:FOLDER; left out: the cache.", show_default=False)
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out broken lines and files, and count them.")]
Force = Annotated[bool, typer.Option("--force", help="Write the files again even if they exist.")]


@app.command("prepare")
def prepare(
    source: Source,
    tokenizer: Tokenizer = DEFAULT.tokenizer,
    val_fraction: ValFraction = DEFAULT.val_fraction,
    dedup: Dedup = DEFAULT.dedup,
    max_tokens: MaxTokens = None,
    out: Out = None,
    skip_bad: SkipBad = False,
    force: Force = False,
    as_json: opt.Json = False,
) -> None:
    """Tokenize SOURCE into the cache ($QUESTCTL_CACHE, else ~/.cache/questctl) or a folder, unless that has been done.

    After an interruption the same command continues where it stopped and writes the same tokens.
    """
    from ..data.info import as_source, facts, prepare_data

    limit = parse_count(max_tokens, "--max-tokens") if max_tokens is not None else None
    how: dict[str, Any] = {"dedup": dedup, "max_tokens": limit, "out": out, "skip_bad": skip_bad, "force": force}
    progress = console.DataProgress(as_source(source))
    data = prepare_data(source, tokenizer, val_fraction=val_fraction, progress=progress, **how)
    _warn(data)
    console.print_json(facts(data)) if as_json else _show(data)


@app.command("info")
def info(
    source: Source,
    tokenizer: Tokenizer = DEFAULT.tokenizer,
    val_fraction: ValFraction = DEFAULT.val_fraction,
    dedup: Dedup = DEFAULT.dedup,
    as_json: opt.Json = False,
) -> None:
    """Show what the token files of SOURCE hold, and the beginning of the validation text; prepares them first if needed."""
    from ..data.info import as_source, data_info

    progress = console.DataProgress(as_source(source))
    result = data_info(source, tokenizer, val_fraction=val_fraction, dedup=dedup, progress=progress)
    _warn(result.dataset)
    if as_json:
        console.print_json(result.to_json())
        return
    _show(result.dataset)
    console.say("sample:")
    console.say(result.sample, as_is=True)


def _warn(data: Dataset) -> None:
    if data.meta.bad:
        console.warn(f"{data.meta.bad:,} broken lines or files are left out; the first: {data.meta.first_bad}")
    for sentence in data.meta.doubts:
        console.warn(sentence)


def _show(data: Dataset) -> None:
    meta = data.meta
    rows: list[tuple[str, Any]] = [
        ("source", meta.source),
        ("folder", str(data.folder)),
        ("data hash", data.data_hash[:16]),
        ("tokenizer", meta.tokenizer),
        ("tokenizer hash", (meta.tokenizer_hash or "")[:16] or None),
        ("vocabulary", meta.vocab_size),
        ("dtype", meta.dtype),
        ("documents", meta.documents or None),
        ("equal documents left out", meta.duplicates or None),
        ("rule of the split", meta.dedup if meta.documents else None),
        ("validation text in train", str(meta.leak) if meta.leak else None),
        ("bytes cut from it", meta.cut_bytes or None),
        ("unreadable files left out", len(meta.skipped) or None),
        ("broken lines left out", meta.bad or None),
        ("tokens asked for", meta.max_tokens),
        ("entropy (nats/token)", meta.entropy),
    ]
    console.print_table(("", ""), [row for row in rows if row[1] is not None], left=2)
    sides = (("train", meta.train), ("val", meta.val))
    table = [(name, side.tokens, side.bytes_per_token, side.sha256[:16]) for name, side in sides]
    console.print_table(("", "tokens", "bytes/token", "SHA-256"), table)
