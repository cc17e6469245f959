"""Hashes of runs and passages: equal exactly where the letters are, wherever a run starts and however the text is laid out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from questctl.data.passages import INSIDE, Passages, Runs, Search, id_hashes

TEXT = b"The quick brown fox jumps over the lazy dog, and the lazy dog sleeps on while the quick brown fox runs away at last."


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
@settings(deadline=None)
def test_runs_have_equal_hashes_where_their_items_are_equal(ids: list[int], length: int) -> None:
    runs_ = Runs(id_hashes(np.array(ids, np.uint16)))
    hashes = runs_.all(length)
    runs = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))
    assert runs_.at(np.arange(len(runs))[::-1], length).tolist() == hashes[::-1].tolist()
    assert len(set(zip(hashes.tolist(), runs, strict=True))) == len(set(runs))


def test_hashes_are_the_same_on_every_machine() -> None:
    ids = np.arange(49, dtype=np.uint32)
    assert Runs(id_hashes(ids)).all(48).tolist() == [18269379981107476449, 2374746414823820743]
    assert Runs(id_hashes(ids.astype(np.uint8))).all(48).tolist() == [18269379981107476449, 2374746414823820743]
    assert Passages.of([TEXT], 48).hashes[0] == 12304028295630015799


def found(text: bytes, length: int = 48) -> set[int]:
    return set(Passages.of([text], length).hashes.tolist())


@pytest.mark.parametrize(
    "copy",
    [
        TEXT.upper(),
        TEXT.replace(b" ", b"\r\n    "),
        b"> " + TEXT.replace(b" fox", b"\n> fox"),
        TEXT.replace(b",", b" --"),
        b"Another beginning. " + TEXT + b" Another end.",
    ],
)
def test_a_copy_in_another_layout_has_the_passages_of_its_original(copy: bytes) -> None:
    assert len(found(TEXT)) > 10
    assert found(TEXT) <= found(copy)


def test_another_word_changes_the_passages_that_hold_it() -> None:
    changed = Passages.of([TEXT.replace(b"sleeps", b"dreams")], 48)
    same = np.isin(changed.hashes, list(found(TEXT)))
    place = TEXT.index(b"sleeps")
    assert same.tolist() == [end <= place or start > place for start, end in zip(changed.starts, changed.ends, strict=True)]
    assert 0 < same.sum() < len(same)


def test_places_are_those_of_the_text() -> None:
    texts = [TEXT, b"", b"short", "Füchse: ".encode() + TEXT, TEXT[40:]]
    passages = Passages.of(texts, 48)
    assert set(passages.owner.tolist()) == {0, 3, 4}
    for hash_, owner, start, end in zip(passages.hashes, passages.owner, passages.starts, passages.ends, strict=True):
        part = texts[owner][start:end]
        letters = bytes(b for b in part.lower() if chr(b).isalnum() or b >= 0x80)
        assert len(letters) == 48
        assert part[0] == letters[0] or part[:1].isupper()
        assert part.rstrip(b" ,.") == part
        assert Passages.of([part], 48).hashes.tolist() == [hash_]


def test_long_words_and_scripts_without_spaces_have_passages_inside() -> None:
    blob = b"0123456789abcdef" * 20
    assert Passages.of([b"data = " + blob], 48).starts.tolist() == [0, 7, *range(7 + INSIDE, 7 + len(blob) - 47, INSIDE)]
    chinese = "敏捷的棕色狐狸跳过了懒狗而懒狗继续睡觉直到天亮为止然后他们一起回家吃饭".encode()
    assert found(chinese) <= found("前言".encode() + chinese)
    assert Passages.of([chinese], 48).starts.tolist() == list(range(0, len(chinese) - 47, 3))


def test_thinned_passages_leave_no_gap_and_depend_on_the_text_alone() -> None:
    passages = Passages.of([TEXT, TEXT], 48)
    keep = passages.thinned(24)
    first, second = (passages.hashes[keep & (passages.owner == i)].tolist() for i in (0, 1))
    assert first == second
    letters = passages.letter[keep & (passages.owner == 0)]
    assert letters[0] == 0
    assert np.diff(letters).max() < 24 + 8
    assert len(letters) < (passages.owner == 0).sum()


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.lists(st.integers(0, 2**64 - 1), max_size=50), st.data())
@settings(deadline=None)
def test_a_search_finds_what_is_in_the_stream(wanted: list[int], others: list[int], draw: st.DataObject) -> None:
    stream = draw.draw(st.permutations(others + wanted[::2]))
    search = Search(np.array(wanted, np.uint64))
    for at in range(0, len(stream), 7):
        search.look(np.array(stream[at : at + 7], np.uint64))
    assert search.found(np.array(wanted, np.uint64)).tolist() == [hash_ in set(stream) for hash_ in wanted]
