"""Tokenize a source, and say what its token files hold: counts, hashes, and the beginning of the validation text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tokens
from .tokens import DEFAULT, Dataset
from .writing import ProgressListener

SAMPLE_TOKENS = 400  # read from the validation side; a sample ends with its first document
SAMPLE_IDS = 40  # shown where ids have no text


@dataclass(frozen=True)
class DataInfo:
    """Token files in numbers (`dataset.meta`), and a `sample` of their text."""

    dataset: Dataset
    sample: str

    def to_json(self) -> dict[str, Any]:
        """`facts` of the dataset, with the sample."""
        return {**facts(self.dataset), "sample": self.sample}


def prepare_data(
    source: str | Path,
    tokenizer: str = DEFAULT.tokenizer,
    *,
    val_fraction: float = DEFAULT.val_fraction,
    max_tokens: int | None = None,
    out: Path | None = None,
    skip_bad: bool = False,
    force: bool = False,
    progress: ProgressListener | None = None,
) -> Dataset:
    """Tokenize `source` into the cache, or into the folder `out`, unless that has been done; memory-mapped tokens.

    `source` is a value of `data.source` or the path of a text or token file. The arguments and the errors are those of
    `questctl.data.tokens.prepare`.
    """
    return tokens.prepare(
        as_source(source),
        tokenizer,
        val_fraction=val_fraction,
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
    progress: ProgressListener | None = None,
) -> DataInfo:
    """What the token files of `source` hold; prepares them if they do not exist. Errors as of `prepare_data`."""
    dataset = prepare_data(source, tokenizer, val_fraction=val_fraction, progress=progress)
    return DataInfo(dataset, sample(dataset))


def facts(dataset: Dataset) -> dict[str, Any]:
    """Hash, folder and all fields of meta.json, for JSON."""
    return {"data_hash": dataset.data_hash, "folder": str(dataset.folder), **dataset.meta.model_dump(mode="json")}


def as_source(source: str | Path) -> str:
    """A path that exists → `bin:` for token files, `file:` for all other files; any other text is a source already."""
    path = Path(source)
    if not path.exists():
        return str(source)
    return f"bin:{source}" if path.suffix == ".bin" or (path / "train.bin").is_file() else f"file:{source}"


def sample(dataset: Dataset) -> str:
    """The beginning of the first validation document, or its ids where there is no tokenizer.

    Control characters are replaced, so that the text of a corpus cannot command a terminal.
    """
    ids = dataset.val[:SAMPLE_TOKENS].tolist()
    tokenizer = tokens.tokenizer_of(dataset)
    if tokenizer is None:
        return " ".join(map(str, ids[:SAMPLE_IDS]))
    text = tokenizer.decode(ids[: ids.index(tokenizer.end)] if tokenizer.end in ids else ids)
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
