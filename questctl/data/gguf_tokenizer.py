"""The tokenizer inside a GGUF file → the tokenizer.json and tokenizer_config.json that it amounts to.

The file has the vocabulary, the merges and the name of the rule that splits text into words. Only byte-level BPEs are read, of
the rules in `word_rules.LLAMA_CPP`: those can be expressed in a tokenizer.json.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..pretrained import gguf_files
from .word_rules import LLAMA_CPP, layout

KEY = "data.tokenizer"
CONTROL, ADDED, UNUSED = 3, 4, 5  # types of tokens that no merge makes
NAMES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # special tokens: in GGUF → in tokenizer_config.json


def tokenizer_files(name: str) -> tuple[bytes, bytes]:
    """The contents of tokenizer.json and tokenizer_config.json for the file, the chat template included.

    Raises DataError for a missing file and for another kind of tokenizer, MissingDependency without the package `gguf`.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"{KEY}: gguf:{name} does not exist; gguf: reads the tokenizer of a .gguf file.")
    return _files(path, path.stat().st_size, path.stat().st_mtime_ns)


@cache  # reading a large vocabulary takes seconds; size and time identify an unchanged file
def _files(path: Path, size: int, modified: int) -> tuple[bytes, bytes]:
    fields = gguf_files.reader(path, KEY).fields

    def value(name: str, default: Any = None) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return default if field is None else field.contents()

    model, rule = value("ggml.model", "none"), value("ggml.pre", "none")
    family = next((family for family, name in LLAMA_CPP.items() if name == rule), None)
    if model != gguf_files.BYTE_LEVEL or family is None:
        raise DataError(
            f"{KEY}: gguf:{path.name}: its tokenizer is of the model {model} with the words of {rule}; only "
            f"{gguf_files.BYTE_LEVEL} with the words of {', '.join(LLAMA_CPP.values())} is read, name another: hf:FOLDER."
        )
    tokens, types = value("ggml.tokens"), value("ggml.token_type", [])
    types = [*types, *[1] * (len(tokens) - len(types))]
    table = layout(family)
    table["model"]["vocab"] = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    table["model"]["merges"] = value("ggml.merges", [])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    table["added_tokens"] = [
        {"id": i, "content": tokens[i], **flags, "special": kind == CONTROL}
        for i, kind in enumerate(types)
        if kind in (CONTROL, ADDED)
    ]
    ids = {short: value(f"ggml.{name}_token_id") for name, short in NAMES.items()}
    config = {f"{short}_token": tokens[i] for short, i in ids.items() if i is not None and i < len(tokens)}
    if template := value("chat_template"):
        config["chat_template"] = template
    return json.dumps(table, ensure_ascii=False).encode(), json.dumps(config, ensure_ascii=False).encode()
