"""Validation text that does not stand in the training text: copies in every disguise, and where they cannot be kept apart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import write_file
from hypothesis import given
from hypothesis import strategies as st

from questctl.config import DataConfig
from questctl.data import split, tokenizers
from questctl.data.split import Split, batches, digest_of, plain_digest_of, sliced, without
from questctl.data.tokens import Dataset, prepare

WORDS = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "pi",
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def sentence(rng: random.Random, words: int = 12) -> str:
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(1000)}" for _ in range(words)).capitalize() + "."


def prose(seed: int, sentences: int = 20) -> str:
    rng = random.Random(seed)
    return "\n".join(sentence(rng) for _ in range(sentences)) + "\n"


def prepared(path: Path, texts: list[str], **options: object) -> Dataset:
    write_file(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(f"file:{path}", cache_dir=path.parent / "cache", **options)  # type: ignore[arg-type]


def share(data: Dataset) -> float:
    assert data.meta.leak is not None
    return data.meta.leak.share


# --- copies -----------------------------------------------------------------------------------------------------------


DISGUISES: dict[str, Callable[[str, random.Random], str]] = {
    "trailing blanks": lambda text, rng: text + " " * rng.randrange(1, 9),
    "case": lambda text, rng: text.upper() if rng.random() < 0.5 else text.lower(),
    "line ends": lambda text, rng: text.replace("\n", "\r\n" if rng.random() < 0.5 else "\n\n"),
    "wrapping": lambda text, rng: text.replace(" ", "\n", rng.randrange(1, 20)),
    "quotation": lambda text, rng: "> " + text.replace("\n", "\n> ") + f"\nReply {rng.random()}",
    "a date": lambda text, rng: f"Version of {rng.randrange(10**9)}\n\n{text}",
    "a word in each paragraph": lambda text, rng: "\n".join(line + f" {rng.random()}" for line in text.splitlines()),
    "order of the lines": lambda text, rng: "\n".join(rng.sample(lines := text.splitlines(), len(lines))),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_copies_in_disguise_do_not_leak(name: str, tmp_path: Path) -> None:
    """Each of 100 documents comes three times. By `exact` the windows of a copy that are not disguised stand in train."""
    rng = random.Random(1)
    texts = [
        version for i in range(100) for text in [prose(i)] for version in (text, *(DISGUISES[name](text, rng) for _ in "ab"))
    ]
    near, exact = (prepared(tmp_path / "d.jsonl", texts, dedup=rule, val_fraction=0.1) for rule in ("near", "exact"))
    assert share(near) < 0.01
    if name in ("trailing blanks", "quotation", "a date"):  # the measure compares tokens, and finds less of the other copies
        assert share(exact) > 0.4
    held_out = near.meta.val.tokens / (near.meta.val.tokens + near.meta.train.tokens)
    assert 0.02 < held_out < 0.25, held_out
    assert near.data_hash != exact.data_hash


def test_repeated_paragraphs_are_cut_from_the_validation_text_alone(tmp_path: Path) -> None:
    rng = random.Random(0)
    common = [prose(10_000 + i, 4) for i in range(40)]
    texts = ["\n".join([prose(i, 6), *rng.sample(common, 2), prose(5_000 + i, 6)]) for i in range(500)]
    near, exact = (prepared(tmp_path / "d.jsonl", texts, dedup=rule) for rule in ("near", "exact"))
    assert share(exact) > 0.25
    assert share(near) < 0.01
    train = near.train.tobytes()
    assert all(text.encode() in train for text in common)
    val = near.val.tobytes().split(b"\0")[:-1]
    assert all(any(piece.decode() in text for text in texts) for piece in val)  # pieces of documents, word for word
    assert near.meta.cut_bytes == pytest.approx(0.4 * (near.meta.cut_bytes + len(near.val)), rel=0.1)
    assert len(val) > 20


def test_documents_all_alike_are_split_by_their_own_hashes_and_the_leak_is_said(tmp_path: Path) -> None:
    template = prose(0, 30)
    data = prepared(tmp_path / "d.jsonl", [f"{template}Record {i} of {i * 7919 % 1000}" for i in range(1000)])
    assert 0.02 < data.meta.val.tokens / data.meta.train.tokens < 0.1
    assert data.meta.cut_bytes == 0  # next to nothing would remain
    assert share(data) > 0.5
    assert any("stands in its training text" in doubt for doubt in data.meta.doubts)


def test_few_documents_lose_the_repeated_ends(tmp_path: Path, cache: Path) -> None:
    licence = prose(99, 8)
    for i in range(30):
        write_file(tmp_path / f"c/{i}.txt", licence + prose(i, 60) + licence)
    near, exact = (prepare(f"file:{tmp_path}/c", dedup=rule, val_fraction=0.3, cache_dir=cache) for rule in ("near", "exact"))
    assert share(exact) > 0.25
    assert share(near) < 0.01
    assert np.array_equal(near.train, exact.train)


# --- rules ------------------------------------------------------------------------------------------------------------


def test_auto_is_near_for_new_text_and_exact_for_pystdlib(tmp_path: Path, cache: Path) -> None:
    texts = [prose(i, 3) for i in range(500)]
    assert prepared(tmp_path / "d.jsonl", texts).meta.dedup == "near"
    for source, rule in (("pystdlib", "exact"), ("pystdlib:clean", "near")):
        from questctl.data.corpora import parse
        from questctl.data.tokens import _rules

        assert _rules(parse(source), "auto")[0] == rule


def test_text_that_was_prepared_by_the_older_rule_keeps_its_tokens(tmp_path: Path) -> None:
    texts = [prose(i, 3) for i in range(500)] + [prose(i, 3) + " " for i in range(500)]
    older = prepared(tmp_path / "d.jsonl", texts, dedup="exact")
    assert prepared(tmp_path / "d.jsonl", texts).data_hash == older.data_hash
    newer = prepared(tmp_path / "d.jsonl", texts, force=True)
    assert (newer.meta.dedup, newer.meta.documents) == ("near", 500)
    assert prepared(tmp_path / "d.jsonl", texts).data_hash == newer.data_hash
    assert prepared(tmp_path / "d.jsonl", texts, dedup="exact").data_hash == older.data_hash
    out = tmp_path / "out"
    mine = prepared(tmp_path / "d.jsonl", texts, dedup="exact", out=out)
    assert prepared(tmp_path / "d.jsonl", texts, out=out).data_hash == mine.data_hash


def test_a_run_goes_on_with_the_rule_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs of earlier versions, which recorded no rule, it is `exact`, even where their tokens are not in the cache."""
    from types import SimpleNamespace

    from questctl.config import RunConfig
    from questctl.training.run_data import load_data

    texts = [prose(i, 3) for i in range(500)] + [prose(i, 3) + " " for i in range(500)]
    exact = prepared(tmp_path / "d.jsonl", texts, dedup="exact")
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path / "another"))
    config = RunConfig().model_copy(update={"data": DataConfig(source=f"file:{tmp_path}/d.jsonl")})
    assert load_data(config).meta.dedup == "near"
    for env in ({"data_hash": exact.data_hash}, {"data_hash": exact.data_hash, "dedup": "exact"}):
        run = SimpleNamespace(env=lambda env=env: env)
        assert load_data(config, run).data_hash == exact.data_hash  # type: ignore[arg-type]


def test_the_split_of_the_text_does_not_depend_on_the_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    texts = [prose(i, 5) for i in range(600)] + [prose(i, 5) + prose(9000 + i, 2) for i in range(100)]
    by_bytes, by_pairs = (prepared(tmp_path / "d.jsonl", texts, tokenizer=name) for name in ("byte", "bpe:300"))
    tokenizer = tokenizers.from_table("bpe:300", (by_pairs.folder / "tokenizer.json").read_bytes())
    for side in ("train", "val"):
        ids = getattr(by_pairs, side)
        decoded = [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.end) + 1)[:-1]]
        plain = getattr(by_bytes, side).tobytes().split(b"\0")[:-1]
        assert [text.removesuffix(tokenizers.END) for text in decoded] == [text.decode() for text in plain]


def test_the_side_of_a_document_depends_on_it_alone() -> None:
    texts = [prose(i, 4) for i in range(300)] + ["short", "", "tiny text"]
    rule = Split(0.2, "passages", "near")
    together = [parts[0][0] for parts in rule.divide(texts).documents]
    assert together == [rule.divide([text]).documents[0][0][0] for text in texts]
    assert together == [parts[0][0] for parts in rule.divide(texts[::-1]).documents][::-1]
    assert 0.1 < np.mean(together) < 0.3
    parts = rule.divide(texts)
    alone = [rule.divide([text]).passages for text in texts]
    for k, hashes in enumerate(alone):
        assert parts.passages[parts.bounds[k] : parts.bounds[k + 1]].tolist() == hashes.tolist()
        assert len(hashes) == 0 or not together[k]


# --- pieces of it -----------------------------------------------------------------------------------------------------


@given(st.text(alphabet="ab AB\n\tßİ é", max_size=80), st.integers(1, 9))
def test_digests_do_not_depend_on_slices(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        whole = digest_of(text), plain_digest_of(text)
        patch.setattr(split, "BATCH_BYTES", size)
        assert (digest_of(text), plain_digest_of(text)) == whole
    assert plain_digest_of(text) == digest_of("".join(c for c in text.casefold() if c not in " \t\n\r\v\f"))


def test_long_texts_are_searched_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    text, rule = prose(0, 400), Split(0.05, "ends", "near")
    whole = rule.divide([text])
    monkeypatch.setattr(split, "SLICE_BYTES", 5_000)
    sliced_ = rule.divide([text])
    assert sliced_.documents == whole.documents
    common = prose(0, 60).encode()
    assert split.without_known([common, prose(1, 60).encode()], [sliced_.passages]) == [prose(1, 60).encode()]
    assert list(sliced("abcdefgh", 3, 1)) == [(0, "abcd"), (3, "defg"), (6, "gh")]


def test_what_remains_without_passages() -> None:
    text = b"A" * 200 + b"\n" + b"B" * 200 + b"\n" + b"C" * 200 + b"\n"

    def remains(*places: tuple[int, int]) -> list[bytes]:
        return without(text, np.array(places, np.int64).reshape(-1, 2))

    a, c = text[:201], text[402:]
    assert remains() == [text]
    assert remains((210, 290)) == [text]  # 80 bytes are an idiom
    assert remains((205, 395)) == [a, c]  # from line to line
    assert remains((205, 260), (250, 300), (310, 395)) == [a, c]  # overlapping and neighbouring passages are one
    assert remains((205, 260), (300, 370)) == [text]
    assert remains((0, 140)) == [text[140:]]
    assert remains((0, 402)) == [c]
    assert remains((0, 530)) == []  # what is left is as short as an idiom
    assert remains((0, 603)) == []
    euro = "€".encode() * 200
    assert without(euro, np.array([[0, 301]])) == [euro[303:]]


def test_batches_hold_all_items_in_order() -> None:
    items = ["x" * n for n in (3, 0, 9, 1, 1, 12, 2)]
    assert list(batches(items, 10)) == [items[:3], items[3:6], items[6:]]
    assert list(batches([], 10)) == []
