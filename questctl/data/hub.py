"""Data sets and tokenizers of the Hugging Face Hub. Only sources named `hf:` use it; `questctl.pretrained` fetches models.

The library `datasets` streams a data set row by row, and its `state_dict` is the place from which reading resumes. A tokenizer
consists of two small files, which `huggingface_hub` keeps in its own cache, so that they can be used without a network later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..errors import DataError, MissingDependency, Unreachable
from ..hub import EXTRA, fetching, first_line
from ..system import hub_answers as _answers
from .readers import Item, text_of
from .reading import Reading
from .source_files import fingerprint, visible_files


@dataclass(frozen=True)
class HubText:
    """A split of a data set that is streamed from the hub or from a folder. Its rows are never stored."""

    data_set: str
    config: str | None
    field: str
    split: str
    revision: str | None
    max_tokens: int | None

    lenient: ClassVar[bool] = False
    size: ClassVar[None] = None  # unknown until the last row has been read

    @property
    def source(self) -> str:
        """The source in full, without the option `tokens`."""
        revision = f"&revision={self.revision}" if self.revision else ""
        return f"hf:{self.data_set}{f'/{self.config}' if self.config else ''}:{self.field}?split={self.split}{revision}"

    def fingerprint(self) -> str:
        """A hash of the files of a local folder. For a data set on the hub it is the source itself, so that tokens which were
        prepared once are used again without a network."""
        if not os.path.isdir(self.data_set):
            return self.source
        return fingerprint(visible_files(Path(self.data_set)))

    def documents(self, reading: Reading | None = None) -> Iterator[str]:
        """Yield the documents after `reading.place`, without empty ones, and advance `reading` with each of them.

        Raises DataError if the data set does not exist or a row has no text, Unreachable if there is no network, and
        MissingDependency if the library `datasets` is not installed.
        """
        reading = reading or Reading()
        for item in stream(self, reading):
            if isinstance(item, DataError):
                reading.pass_over(item)
            elif item:
                reading.good += 1
                yield item


def stream(corpus: HubText, reading: Reading) -> Iterator[Item]:
    """Yield the rows of the data set after `reading.place`: the text of each, or the error that says why it has none."""
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar, set_verbosity_error
    except ImportError as e:
        raise MissingDependency(f"data.source: {corpus.source} needs the library datasets: {EXTRA}.") from e
    disable_progress_bar()
    set_verbosity_error()
    local = os.path.isdir(corpus.data_set)
    if not local:
        _require_hub(corpus.source)
    row, state = reading.place or (0, None)
    try:
        # A folder is passed as an absolute path, so that `datasets` does not take it for the name of a data set.
        name = str(Path(corpus.data_set).resolve()) if local else corpus.data_set
        rows = load_dataset(name, corpus.config, split=corpus.split, revision=corpus.revision, streaming=True)
        if state is not None:
            rows.load_state_dict(state)
        reading.locate = lambda: (row, rows.state_dict())
        for record in rows:
            row += 1
            yield text_of(record, corpus.field, f"{corpus.source}, row {row}")
    except (ValueError, OSError, TypeError, KeyError, RuntimeError) as e:  # the library's own errors derive from these
        if isinstance(e, ConnectionError) or _is_network(e):
            raise Unreachable(f"data.source: {corpus.source}: {first_line(e)}; repeat the command to resume from here.") from e
        raise DataError(f"data.source: {corpus.source}: {first_line(e)}.") from e


def tokenizer_files(name: str) -> tuple[bytes, bytes | None]:
    """The contents of (tokenizer.json, tokenizer_config.json or None) of a folder or of a model on the hub.

    Raises DataError if there is no tokenizer.json, and Unreachable if there is neither a network nor a copy in the hub's cache.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        try:
            config = folder / "tokenizer_config.json"
            return (folder / "tokenizer.json").read_bytes(), config.read_bytes() if config.is_file() else None
        except OSError as e:
            raise DataError(f"data.tokenizer: {e.filename} cannot be read: {e.strerror}.") from e
    if name.startswith(("/", ".", "~")):
        raise DataError(f"data.tokenizer: {name} is not a folder.")
    with fetching("data.tokenizer", name, "tokenizer.json"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        offline = not _answers()

        def fetch(file: str) -> bytes:
            return Path(hf_hub_download(name, file, local_files_only=offline)).read_bytes()

        table = fetch("tokenizer.json")
    try:
        return table, fetch("tokenizer_config.json")
    except (EntryNotFoundError, OSError):  # there is none, or only tokenizer.json is in the cache
        return table, None


def template_files(name: str) -> tuple[bytes | None, bytes | None]:
    """The contents of chat_template.jinja and tokenizer_config.json beside a tokenizer; None for a missing one."""
    folder, files = Path(os.path.expanduser(name)), ("chat_template.jinja", "tokenizer_config.json")
    if folder.is_dir():
        jinja, config = ((folder / file).read_bytes() if (folder / file).is_file() else None for file in files)
        return jinja, config
    with fetching("data.tokenizer", name, "tokenizer.json"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        offline, contents = not _answers(), list[bytes | None]()
        for file in files:
            try:
                contents.append(Path(hf_hub_download(name, file, local_files_only=offline)).read_bytes())
            except EntryNotFoundError:
                contents.append(None)
    return contents[0], contents[1]


def _require_hub(source: str) -> None:
    if not _answers():
        raise Unreachable(f"data.source: {source}: the hub cannot be reached; hf: needs a network or a folder (hf:./FOLDER).")


def _is_network(e: BaseException) -> bool:
    of_client = type(e).__module__.partition(".")[0] in ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
    return of_client or (e.__cause__ is not None and _is_network(e.__cause__))
