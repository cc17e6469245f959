import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from questctl.data import tokenizers
from questctl.errors import UsageError

text = st.text(st.characters(exclude_categories=["Cs"]))


@given(text)
def test_bytes_are_utf8_and_come_back(t: str) -> None:
    byte = tokenizers.load("byte")
    ids = byte.encode(t)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(t.encode("utf-8"))
    assert byte.decode(ids) == t
    assert byte.decode(ids.astype(np.int64).tolist()) == t


def test_bytes_that_are_no_text_decode_to_the_replacement_character() -> None:
    assert tokenizers.load("byte").decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


def test_definition_of_byte() -> None:
    byte = tokenizers.load("byte")
    assert (byte.word, byte.vocab_size, byte.end) == ("byte", 256, 0)
    assert byte.hash == "7eac506e2ba91f4f432768ac99bb57115de44b0b77aaf9360a921b6a70696e0c"  # token files on disk bear it


def test_words_that_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match=r"data\.tokenizer: unknown tokenizer 'bite'; did you mean 'byte'\?"):
        tokenizers.load("bite")
    with pytest.raises(UsageError, match="'byte' takes no argument, got 'byte:3'"):
        tokenizers.load("byte:3")
    with pytest.raises(UsageError):
        tokenizers.load("")
