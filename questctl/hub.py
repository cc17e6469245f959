"""Errors of fetching files of models from the Hugging Face Hub, as one sentence that names the config key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import DataError, MissingDependency, Unreachable, UsageError

EXTRA = "pip install 'questctl[data]'"


@contextmanager
def fetching(key: str, name: str, file: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub for the `file` of model `name`, which the config's `key` names, into ours.

    Raises MissingDependency without the library, Unreachable without a network and a copy, UsageError for an invalid name, and
    DataError for a model or a file that does not exist.
    """
    try:
        from huggingface_hub import errors
    except ImportError as e:
        raise MissingDependency(f"{key}: hf:{name} needs huggingface_hub: {EXTRA}.") from e
    try:
        yield
    except errors.LocalEntryNotFoundError as e:
        raise Unreachable(f"{key}: hf:{name} is not in the hub's cache, and the hub cannot be reached.") from e
    except errors.RepositoryNotFoundError as e:
        raise DataError(f"{key}: the hub has no model '{name}', or none that you may read.") from e
    except errors.EntryNotFoundError as e:
        raise DataError(f"{key}: the model '{name}' has no {file}.") from e
    except errors.HFValidationError as e:
        raise UsageError(f"{key}: '{name}' is neither a folder nor the name of a model on the hub.") from e
    except OSError as e:
        raise Unreachable(f"{key}: hf:{name}: {first_line(e)}.") from e


def first_line(e: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    return (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
