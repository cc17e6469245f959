"""The Hugging Face Hub: the only place that reaches it, and only for words that begin with `hf:`.

A data set is streamed by the library `datasets`, row by row; its `state_dict` is the place where a reading goes on. Tokenizers
are two small files, which `huggingface_hub` keeps in its own cache, so that they serve without a network afterwards.
"""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ..errors import DataError, MissingDependency, Unreachable, UsageError
from .readers import Item, text_of

if TYPE_CHECKING:
    from .corpora import HubText, Reading

EXTRA = "pip install 'questctl[data]'"


def stream(corpus: HubText, reading: Reading) -> Iterator[Item]:
    """The rows of the data set after `reading.place`: its text, or why it has none."""
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar, set_verbosity_error
    except ImportError as e:
        raise MissingDependency(f"data.source: {corpus.word} needs the library datasets: {EXTRA}.") from e
    disable_progress_bar()
    set_verbosity_error()
    local = os.path.isdir(corpus.data_set)
    if not local:
        _require_hub(corpus.word)
    row, state = reading.place or (0, None)
    try:
        # A folder is given as an absolute path, so that no data set of that name is looked for.
        name = str(Path(corpus.data_set).resolve()) if local else corpus.data_set
        rows = load_dataset(name, corpus.config, split=corpus.split, revision=corpus.revision, streaming=True)
        if state is not None:
            rows.load_state_dict(state)
        reading.locate = lambda: (row, rows.state_dict())
        for record in rows:
            row += 1
            yield text_of(record, corpus.field, f"{corpus.word}, row {row}")
    except (ValueError, OSError, TypeError, KeyError, RuntimeError) as e:  # the library's own errors derive from these
        if isinstance(e, ConnectionError) or _is_network(e):
            raise Unreachable(f"data.source: {corpus.word}: {_first_line(e)}; the same command goes on from here.") from e
        raise DataError(f"data.source: {corpus.word}: {_first_line(e)}.") from e


def tokenizer_files(name: str) -> tuple[bytes, bytes | None]:
    """(tokenizer.json, tokenizer_config.json or None) of a folder or of a model on the hub.

    Raises DataError if there is no tokenizer.json, Unreachable without a network unless a copy is in the hub's own cache.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        try:
            config = folder / "tokenizer_config.json"
            return (folder / "tokenizer.json").read_bytes(), config.read_bytes() if config.is_file() else None
        except OSError as e:
            raise DataError(f"data.tokenizer: {e.filename} cannot be read: {e.strerror}.") from e
    if name.startswith(("/", ".", "~")):
        raise DataError(f"data.tokenizer: {name} is no folder.")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as e:
        raise MissingDependency(f"data.tokenizer: hf:{name} needs huggingface_hub: {EXTRA}.") from e
    offline = not _answers()

    def fetch(file: str) -> bytes:
        return Path(hf_hub_download(name, file, local_files_only=offline)).read_bytes()

    try:
        table = fetch("tokenizer.json")
    except LocalEntryNotFoundError as e:
        raise Unreachable(f"data.tokenizer: hf:{name} is not in the hub's cache, and the hub cannot be reached.") from e
    except RepositoryNotFoundError as e:
        raise DataError(f"data.tokenizer: there is no model '{name}' on the hub that may be read.") from e
    except EntryNotFoundError as e:
        raise DataError(f"data.tokenizer: the model '{name}' has no tokenizer.json.") from e
    except HFValidationError as e:
        raise UsageError(f"data.tokenizer: '{name}' is neither a folder nor the name of a model on the hub.") from e
    except OSError as e:
        raise Unreachable(f"data.tokenizer: hf:{name}: {_first_line(e)}.") from e
    try:
        return table, fetch("tokenizer_config.json")
    except (EntryNotFoundError, OSError):  # it has none, or only tokenizer.json is in the cache
        return table, None


def _require_hub(word: str) -> None:
    if not _answers():
        raise Unreachable(f"data.source: {word}: the hub cannot be reached; hf: needs a network or a folder (hf:./FOLDER).")


def _answers() -> bool:
    """False where the hub's name is certainly unknown here, which saves half a minute of vain attempts."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname, 443)
    except OSError:
        return False
    return True


def _is_network(e: BaseException) -> bool:
    known = type(e).__module__.partition(".")[0] in ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
    return known or (e.__cause__ is not None and _is_network(e.__cause__))


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
