"""Write the run's tokenizer in the forms that transformers and llama.cpp read, with the same ids for every text.

A tokenizer with a table has its own tokenizer.json. For the byte tokenizer one is made: each of its 256 ids stands for a byte,
written as the character that GPT-2's byte-level vocabulary shows for it, without merges. The end of a document is id 0, the
byte NUL, as a special token whose text is NUL and which no other text yields.

A GGUF file has the vocabulary, the merges, and the name of the rule that splits text into words first; llama.cpp knows only
some families of rules. It cannot contain strings with NUL: there the end of a byte tokenizer has the text that other ends have.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..data import chat, tokenizers
from ..data.tokenizers import TABLE, ByteTokenizer, TableTokenizer, Tokenizer
from ..data.word_rules import GPT2, LLAMA_CPP, OWN
from ..errors import UsageError
from ..store import write_json

END = "\x00"
_TWO_DIGITS = re.compile("[0-9]{2}")
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
    (folder / TABLE).write_text(table, encoding="utf-8")
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
    """From the checkpoint with which the run began, copy what concerns text: chat template, generation, special tokens.

    Returns the entries of its config.json on positions and special ids, for that of the export; {} without such a checkpoint.
    """
    if config.model.init.endswith(".gguf") and config.data.tokenizer == f"gguf:{config.model.init}":
        return _copy_from_gguf(folder, config.data.tokenizer)
    source = Path(config.model.init.removeprefix("hf:") or "?").expanduser()
    if not (source / "config.json").is_file() or config.data.tokenizer != f"hf:{config.model.init}":
        return {}
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return {key: values[key] for key in COPIED if key in values}


def _copy_from_gguf(folder: Path, name: str) -> dict[str, Any]:
    values = json.loads(tokenizers.template_files(name)[1] or b"{}")
    if template := values.pop("chat_template", None):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)
    ids = {token["content"]: token["id"] for token in json.loads((folder / TABLE).read_text(encoding="utf-8"))["added_tokens"]}
    return {f"{short}_token_id": ids.get(values.get(f"{short}_token")) for short in ("bos", "eos", "pad")}


def chat_template(config: RunConfig) -> str | None:
    """The chat template of the local checkpoint with which the run began; None without one."""
    name = config.data.tokenizer
    if not config.model.init or not tokenizers.is_here(name):
        return None
    template = chat.template_of(*tokenizers.template_files(name))
    return template.text if template else None


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level vocabulary as GGUF stores it: the text of every id, which of them are special, and merges "a b" by rank."""

    pre: str  # how llama.cpp splits text into words
    tokens: list[str]
    special: frozenset[int]  # text that spells them is not encoded as these tokens, unless special tokens are parsed
    added: frozenset[int]  # matched in text before it is split into words
    unused: frozenset[int]
    merges: list[str]
    end: int


def vocabulary(tokenizer: Tokenizer | None, size: int) -> Vocabulary | None:
    """The vocabulary of `size` ids for GGUF; None without a tokenizer.

    Raises UsageError for a tokenizer whose ids llama.cpp would not reproduce.
    """
    if isinstance(tokenizer, ByteTokenizer):
        tokens, none = [tokenizers.END, *byte_characters()[1:]], frozenset[int]()
        return Vocabulary(LLAMA_CPP[GPT2], tokens, frozenset({tokenizer.end}), none, none, [], tokenizer.end)
    if not isinstance(tokenizer, TableTokenizer):
        return None
    table = json.loads(tokenizer.table)
    words, extra = table["model"], table["added_tokens"]
    known = {i: text for text, i in words.get("vocab", {}).items()} if words["type"] == "BPE" else {}
    known |= {token["id"]: token["content"] for token in extra}
    return Vocabulary(
        _pre(tokenizer, table),
        [known.get(i, f"[PAD{i}]") for i in range(size)],
        frozenset(token["id"] for token in extra if token["special"]),
        frozenset(token["id"] for token in extra if not token["special"]),
        frozenset(range(size)) - known.keys(),
        [pair if isinstance(pair, str) else " ".join(pair) for pair in words.get("merges", [])],
        tokenizer.end,
    )


def _pre(tokenizer: TableTokenizer, table: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which the tokenizer splits words. Raises UsageError if it has no equal rule.

    Words of `bpe:V` are those of GPT-2, except that numbers end after three digits. If no token has two digits, this makes no
    difference.
    """
    family, own = tokenizer.family, tokenizer.family == OWN
    way_out = "take hf-dense, which llama.cpp's convert_hf_to_gguf.py may read."
    if own and any(_TWO_DIGITS.search(token) for token in table["model"]["vocab"]):
        raise UsageError(
            f"gguf: the tokenizer {tokenizer.name} ends numbers after three digits and has tokens of several, which llama.cpp "
            "cuts otherwise; train with bpe.llama3:V, or take hf-dense."
        )
    if table["model"]["type"] != "BPE" or not (own or family in LLAMA_CPP):
        raise UsageError(f"gguf: the tokenizer {tokenizer.name} cuts text in no way that llama.cpp is known to; {way_out}")
    if table.get("normalizer") and not (family == "qwen2" and table["normalizer"] == {"type": "NFC"}):
        raise UsageError(f"gguf: the tokenizer {tokenizer.name} normalizes text, which llama.cpp does not; {way_out}")
    if bool(table["model"].get("ignore_merges")) != (family == "llama3"):
        raise UsageError(f"gguf: the tokenizer {tokenizer.name} merges tokens as llama.cpp does not; {way_out}")
    return LLAMA_CPP[GPT2 if own else family]
