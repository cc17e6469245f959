"""Rules by which byte-level BPE tokenizers split text into words before they merge bytes within a word.

    own       a word or up to three digits, with the space before it (`CUTS`): of `bpe:V`
    gpt2      as GPT-2; the library `tokenizers` has them built into its ByteLevel
    smollm    as GPT-2, and each digit is a word
    llama3    as Llama 3: up to three digits are a word
    qwen2     as Qwen2: each digit is a word

A family of words has a layout of tokenizer.json, by which it is recognized, and most have a name in llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LETTERS = "A-Za-zÀ-\u1fff\u2c00-\u2dff\u3040-\ufaff\U00010000-\U0001efff\U00020000-\U0003ffff"  # scripts
_SPACE = " \t\n\r\x0b\x0c"
CUTS = (  # a word or up to three digits with the space before it, an English ending, punctuation, white space before a word
    rf" ?[{_LETTERS}]+| ?[0-9]{{1,3}}|'(?:[sdmt]|ll|ve|re)| ?[^{_SPACE}0-9{_LETTERS}]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)
CUT = re.compile(rf"(?<=[0-9{_LETTERS}])(?= [0-9{_LETTERS}])")  # a place where words of `CUTS`, GPT-2 and Llama 3 always end
_ENGLISH, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {  # family → its words, as its tokenizer.json has them
    "llama3": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
}
OWN, GPT2, SMOLLM = "own", "gpt2", "smollm"
LLAMA_CPP = {GPT2: "gpt-2", SMOLLM: "smollm", "llama3": "llama-bpe", "qwen2": "qwen2"}  # family → its name there
_DIGITS = {"type": "Digits", "individual_digits": True}


def layout(family: str) -> dict[str, Any]:
    """The content of tokenizer.json for a family, without vocabulary and merges.

    In `llama3` a word that is a token is that token, however it merges.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": family in (GPT2, SMOLLM)}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS.get(family, CUTS)}, "behavior": "Isolated", "invert": False}
    words = {GPT2: [byte_level], SMOLLM: [_DIGITS, byte_level]}.get(family, [split, byte_level])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if family == "qwen2" else None,
        "pre_tokenizer": words[0] if len(words) == 1 else {"type": "Sequence", "pretokenizers": words},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {}, "merges": [], **({"ignore_merges": True} if family == "llama3" else {})},
    }


def family_of(table: Mapping[str, Any]) -> str:
    """The family of the words of a tokenizer.json; "" if it is not one of those here."""
    found = table.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    byte_level = parts[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        return ""
    if byte_level.get("use_regex", True):
        return GPT2 if len(parts) == 1 else SMOLLM if parts[:-1] == [_DIGITS] else ""
    pattern = parts[0].get("pattern", {}).get("Regex")
    known = {CUTS: OWN} | {words: family for family, words in PATTERNS.items()}
    return known.get(pattern, "") if len(parts) == 2 and parts[0].get("behavior") == "Isolated" else ""
