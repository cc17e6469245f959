"""A model of the Hugging Face Hub as a folder in the hub's own cache, so that it is fetched once."""

from __future__ import annotations

from pathlib import Path

from ..hub import fetching
from ..system import hub_answers

FILES = ("config.json", "generation_config.json", "tokenizer*.json", "chat_template.jinja", "*.safetensors", "*.index.json")


def fetched(name: str, key: str) -> Path:
    """The folder of the model OWNER/NAME, fetched if it is not in the cache. Raises what `questctl.hub.fetching` does."""
    with fetching(key, name, "config.json"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=not hub_answers()))
