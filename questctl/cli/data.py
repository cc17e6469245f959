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
SAMPLE_TOKENS = 400

SOURCES = "pystdlib, pysite:NAME, file:PATH or hf:DATASET/CONFIG (with :FIELD at the end), bin:PATH, synthetic:markov, a path."
Source = Annotated[str, typer.Argument(help=SOURCES, show_default=False)]
Tokenizer = Annotated[str, typer.Option(help="Tokenizer of text: byte, bpe:V, hf:NAME_OR_DIR.")]
ValFraction = Annotated[float, typer.Option(help="Share of the documents held out for validation.")]
MaxTokens = Annotated[str | None, typer.Option(help="Stop at so many tokens of both sides: 3B.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write, for --data bin:FOLDER; left out: the cache.", show_default=False)
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out broken lines and files, and count them.")]
Force = Annotated[bool, typer.Option("--force", help="Write the files anew, even if they are there.")]


@app.command("prepare")
def prepare(
    source: Source,
    tokenizer: Tokenizer = DEFAULT.tokenizer,
    val_fraction: ValFraction = DEFAULT.val_fraction,
    max_tokens: MaxTokens = None,
    out: Out = None,
    skip_bad: SkipBad = False,
    force: Force = False,
    as_json: opt.Json = False,
) -> None:
    """Tokenize SOURCE into the cache ($QUESTCTL_CACHE, else ~/.cache/questctl) or a folder, unless it is there.

    Whatever ended it, the same command goes on where it stood, to the same tokens.
    """
    limit = parse_count(max_tokens, "--max-tokens") if max_tokens is not None else None
    _report(_prepared(source, tokenizer, val_fraction, max_tokens=limit, out=out, skip_bad=skip_bad, force=force), as_json)


@app.command("info")
def info(
    source: Source,
    tokenizer: Tokenizer = DEFAULT.tokenizer,
    val_fraction: ValFraction = DEFAULT.val_fraction,
    as_json: opt.Json = False,
) -> None:
    """Show what the token files of SOURCE hold, with the beginning of the validation text; prepares them if need be."""
    data = _prepared(source, tokenizer, val_fraction)
    _report(data, as_json, sample=_sample(data))


def _prepared(source: str, tokenizer: str, val_fraction: float, **more: Any) -> Dataset:
    from ..data import tokens

    source = _word(source)
    progress = console.DataProgress(source)
    data = tokens.prepare(source, tokenizer, val_fraction=val_fraction, progress=progress, **more)
    if data.meta.bad:
        console.warn(f"{data.meta.bad:,} broken lines or files are left out; the first: {data.meta.first_bad}")
    return data


def _word(source: str) -> str:
    """A path that exists → its word: bin: for token files, file: for the rest."""
    path = Path(source)
    if not path.exists():
        return source
    return f"bin:{source}" if path.suffix == ".bin" or (path / "train.bin").is_file() else f"file:{source}"


def _sample(data: Dataset) -> str:
    """The beginning of the first validation document; ids where there is no tokenizer. Control characters are taken out."""
    from ..data import tokens

    ids = data.val[:SAMPLE_TOKENS].tolist()
    tokenizer = tokens.tokenizer_of(data)
    if tokenizer is None:
        return " ".join(map(str, ids[:40]))
    text = tokenizer.decode(ids[: ids.index(tokenizer.end)] if tokenizer.end in ids else ids)
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _report(data: Dataset, as_json: bool, **more: str) -> None:
    meta = data.meta
    if as_json:
        console.print_json({"data_hash": data.data_hash, "folder": str(data.folder), **meta.model_dump(mode="json"), **more})
        return
    facts: list[tuple[str, Any]] = [
        ("source", meta.source),
        ("folder", str(data.folder)),
        ("data hash", data.data_hash[:16]),
        ("tokenizer", meta.tokenizer),
        ("tokenizer hash", (meta.tokenizer_hash or "")[:16] or None),
        ("vocabulary", meta.vocab_size),
        ("dtype", meta.dtype),
        ("documents", meta.documents or None),
        ("equal documents left out", meta.duplicates or None),
        ("files passed over", len(meta.skipped) or None),
        ("broken lines left out", meta.bad or None),
        ("tokens asked for", meta.max_tokens),
        ("entropy (nats/token)", meta.entropy),
    ]
    console.print_table(("", ""), [fact for fact in facts if fact[1] is not None], left=2)
    sides = (("train", meta.train), ("val", meta.val))
    rows = [(name, side.tokens, side.bytes_per_token, side.sha256[:16]) for name, side in sides]
    console.print_table(("", "tokens", "bytes/token", "SHA-256"), rows)
    for title, text in more.items():
        console.say(f"{title}:")
        console.say(text)
