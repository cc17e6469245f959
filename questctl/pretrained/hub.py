"""A model of the Hugging Face Hub as a folder in the hub's own cache, so that it is fetched once."""

from __future__ import annotations

from pathlib import Path

from ..errors import DataError, MissingDependency, Unreachable
from ..system import hub_answers

FILES = ("config.json", "generation_config.json", "tokenizer*.json", "chat_template.jinja", "*.safetensors", "*.index.json")


def fetched(name: str) -> Path:
    """The folder of the model OWNER/NAME, fetched if it is not in the cache.

    Raises MissingDependency, DataError if there is no such model, Unreachable without a network and a copy.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as e:
        raise MissingDependency(f"model.init: hf:{name} needs huggingface_hub: pip install 'questctl[data]'.") from e
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=not hub_answers()))
    except LocalEntryNotFoundError as e:
        raise Unreachable(f"model.init: hf:{name} is not in the hub's cache, and the hub cannot be reached.") from e
    except RepositoryNotFoundError as e:
        raise DataError(f"model.init: the hub has no model '{name}', or none that you may read.") from e
    except HFValidationError as e:
        raise DataError(f"model.init: '{name}' is not the name of a model on the hub; a folder is given without hf:.") from e
    except OSError as e:
        raise Unreachable(f"model.init: hf:{name}: {str(e).splitlines()[0].rstrip('.')}.") from e
