"""Write the run's tokenizer in the form that transformers reads, with the same ids for every text.

A tokenizer with a table has its own tokenizer.json. For the byte tokenizer one is made: each of its 256 ids stands for a byte,
written as the character that GPT-2's byte-level vocabulary shows for it, without merges. The end of a document is id 0, the
byte NUL, as a special token whose text is NUL and which no other text yields.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..data.tokenizers import ByteTokenizer, TableTokenizer, Tokenizer
from ..store import write_json

END = "\x00"
COPIED = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # of a source's config.json


def byte_characters() -> list[str]:
    """The character for each byte 0 … 255: itself if it is printable, else the next unused one from U+0100 on (as in GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(free)) for b in range(256)]


def byte_tokenizer() -> str:
    """The text of tokenizer.json for the byte tokenizer."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    vocabulary = {c: b for b, c in enumerate(byte_characters())}
    vocabulary[END] = vocabulary.pop(byte_characters()[0])
    tokenizer = Library(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    text: str = tokenizer.to_str()
    return text


def write(folder: Path, tokenizer: Tokenizer | None, seq_len: int) -> dict[str, Any]:
    """Write the tokenizer's files, and return the special ids for config.json. Without a known tokenizer nothing is written."""
    if tokenizer is None:
        return {}
    table = byte_tokenizer() if isinstance(tokenizer, ByteTokenizer) else ""
    end = END
    if isinstance(tokenizer, TableTokenizer):
        table, end = tokenizer.table.decode(), tokenizer.end_token
    (folder / "tokenizer.json").write_text(table, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": seq_len,
            "eos_token": end,
            "pad_token": end,
            "clean_up_tokenization_spaces": False,
        },
    )
    ids = {"eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end, "bos_token_id": None}
    write_json(folder / "generation_config.json", ids)
    return ids


def copy_from_source(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Copy what a folder of transformers that the run began with says of its text: chat template, generation, special tokens.

    Returns what its config.json says of positions and special ids, for that of the export. Without such a folder: {}.
    """
    source = Path(config.model.init.removeprefix("hf:") or "?").expanduser()
    if not (source / "config.json").is_file() or config.data.tokenizer != f"hf:{config.model.init}":
        return {}
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return {key: values[key] for key in COPIED if key in values}
