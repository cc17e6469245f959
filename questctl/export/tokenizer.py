"""The run's tokenizer in the form that transformers and llama.cpp read, with the same ids for every text.

Bytes: each of the 256 ids stands for a byte, written as the character that GPT-2's byte-level vocabulary shows for it, and no
merges. The end of a document is the id 0, the byte NUL, as a special token whose text is NUL, for which nothing else can be
taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.tokens import Meta
from ..store import write_json

END = "\x00"


def byte_characters() -> list[str]:
    """The character that stands for each byte 0 … 255: itself where it is printable, else the next free one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(free)) for b in range(256)]


def byte_tokenizer() -> str:
    """tokenizer.json of the byte tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {c: b for b, c in enumerate(byte_characters())}
    vocabulary[END] = vocabulary.pop(byte_characters()[0])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, normalized=False, special=True)])
    text: str = tokenizer.to_str()
    return text


def write(folder: Path, meta: Meta, seq_len: int) -> dict[str, Any]:
    """Write the tokenizer's files, if the run's tokenizer has such a form; the special ids that config.json names."""
    if meta.tokenizer != "byte":
        return {}
    (folder / "tokenizer.json").write_text(byte_tokenizer(), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len, "eos_token": END, "pad_token": END,
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    ids = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    write_json(folder / "generation_config.json", ids)
    return ids

