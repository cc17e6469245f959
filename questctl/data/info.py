"""Prepare token files by one call, and describe them: counts, hashes, and the beginning of the validation text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tokens
from .tokens import DEFAULT, Dataset
from .writing import ProgressListener

SAMPLE_TOKENS = 400  # at most; a sample is the beginning of the first validation document
SAMPLE_IDS = 40  # shown if there is no tokenizer that could decode them


@dataclass(frozen=True)
class DataInfo:
    """The token files of a source (their numbers are in `dataset.meta`), and a `sample` of their text."""

    dataset: Dataset
    sample: str

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `questctl data info --json` prints: the `facts` of the dataset, and the sample."""
        return {**facts(self.dataset), "sample": self.sample}


def prepare_data(
    source: str | Path,
    tokenizer: str = DEFAULT.tokenizer,
    *,
    val_fraction: float = DEFAULT.val_fraction,
    dedup: str = DEFAULT.dedup,
    max_tokens: int | None = None,
    out: Path | None = None,
    skip_bad: bool = False,
    force: bool = False,
    progress: ProgressListener | None = None,
) -> Dataset:
    """Tokenize `source` into the cache, or into the folder `out`, and open the memory-mapped tokens.

    A source that was tokenized before is only opened. `source` is a value of `data.source`, or the path of a text or token
    file. The arguments and the errors are those of `questctl.data.tokens.prepare`.
    """
    return tokens.prepare(
        as_source(source),
        tokenizer,
        val_fraction=val_fraction,
        dedup=dedup,
        max_tokens=max_tokens,
        out=out,
        skip_bad=skip_bad,
        force=force,
        progress=progress,
    )


def data_info(
    source: str | Path,
    tokenizer: str = DEFAULT.tokenizer,
    *,
    val_fraction: float = DEFAULT.val_fraction,
    dedup: str = DEFAULT.dedup,
    progress: ProgressListener | None = None,
) -> DataInfo:
    """Describe the token files of `source`, and prepare them first if needed. The errors are those of `prepare_data`."""
    dataset = prepare_data(source, tokenizer, val_fraction=val_fraction, dedup=dedup, progress=progress)
    return DataInfo(tokens.with_leak(dataset), sample(dataset))


def facts(dataset: Dataset) -> dict[str, Any]:
    """The hash and the folder of a dataset and all fields of its meta.json, as JSON values."""
    return {"data_hash": dataset.data_hash, "folder": str(dataset.folder), **dataset.meta.model_dump(mode="json")}


def as_source(source: str | Path) -> str:
    """The source that a path stands for: `bin:` for token files, `file:` for other files; a source is returned as it is."""
    path = Path(source)
    if not path.exists():
        return str(source)
    return f"bin:{source}" if path.suffix in (".bin", ".npy") or (path / "train.bin").is_file() else f"file:{source}"


def sample(dataset: Dataset) -> str:
    """The beginning of the first validation document, or its ids if there is no tokenizer.

    Control characters are replaced, so that a text cannot control the terminal that shows it.
    """
    ids = dataset.val[:SAMPLE_TOKENS].tolist()
    tokenizer = tokens.tokenizer_of(dataset)
    if tokenizer is None:
        return " ".join(map(str, ids[:SAMPLE_IDS]))
    text = tokenizer.decode(ids[: ids.index(tokenizer.end)] if tokenizer.end in ids else ids)
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
