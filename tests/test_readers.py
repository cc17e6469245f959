"""Files → documents: each format gives the same texts, from any place on, and names what is broken."""

import gzip
import json
import os
from pathlib import Path

import pytest

from questctl.data import corpora, readers
from questctl.data import reading as reading_module
from questctl.data.corpora import parse
from questctl.data.reading import Reading
from questctl.errors import DataError

TEXTS = [f"text {i} é\n" * (1 + i % 5) for i in range(700)]


def lines(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": str(i), field: t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def documents(word: str, **reading: object) -> list[str]:
    corpus = parse(word)
    return list(corpus.documents(Reading(**reading)))  # type: ignore[union-attr, arg-type]


def write(path: Path, kind: str) -> Path:
    if kind.startswith(".parquet"):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"id": [1] * len(TEXTS), "text": TEXTS}), path, row_group_size=150)
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(lines()))
    elif kind.endswith(".zst"):
        path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(lines()))
    else:
        path.write_bytes(lines())
    return path


KINDS = [".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_from_each_place(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"d{kind}", kind)
    assert documents(f"file:{path}") == TEXTS
    for place in (1, 149, 150, 256, 300, 699, 700):
        assert documents(f"file:{path}", place=[0, place]) == TEXTS[place:]
    with pytest.raises(DataError, match=r"has no text under 'story'; fields with text: (id, )?text\."):
        documents(f"file:{path}:story")


def test_a_place_survives_storing(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", ".jsonl")
    corpus = parse(f"file:{tmp_path}")
    reading = Reading()
    stream = corpus.documents(reading)  # type: ignore[union-attr]
    first = [next(stream) for _ in range(1000)]
    stored = json.loads(json.dumps(reading.state()))
    assert first + list(corpus.documents(Reading(**stored))) == TEXTS * 3  # type: ignore[union-attr]


def test_a_folder_of_many_kinds(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl.gz", ".jsonl.gz")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("# words\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    assert documents(f"file:{tmp_path}") == ["# words\n", *TEXTS, "packed text"]
    (tmp_path / "d.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(DataError, match=r"d\.png is not UTF-8 text \(byte 0x89 at 0\)"):
        documents(f"file:{tmp_path}")
    reading = Reading(skip_bad=True)
    assert list(parse(f"file:{tmp_path}").documents(reading)) == ["# words\n", *TEXTS, "packed text"]  # type: ignore[union-attr]
    assert reading.bad == 1


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_is_cut_off_is_named(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"d{kind}", kind)
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(DataError, match=rf"d{kind}"):
        documents(f"file:{path}")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=rf"d{kind}"):
        documents(f"file:{path}")


def test_dotted_fields(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"meta": {"text": "inner"}}\n')
    assert documents(f"file:{tmp_path}/d.jsonl:meta.text") == ["inner"]


def test_a_mistaken_field_stops_soon_though_broken_lines_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "HOPELESS", 100)
    path = write(tmp_path / "d.jsonl", ".jsonl")
    with pytest.raises(DataError, match="line 100: has no text under 'story'"):
        documents(f"file:{path}:story", skip_bad=True)


def test_parts_of_text_are_what_they_were(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line\n" * 50_000)
    parts = documents(f"file:{tmp_path}/a.txt")
    assert [len(p) for p in parts] == [65_540, 65_540, 65_540, 53_380]
    assert documents(f"file:{tmp_path}/a.txt", place=[0, 3]) == parts[3:]
    assert readers.PART_BYTES == 65_536  # data hashes rest on it


# --- data sets that `datasets` streams --------------------------------------------------------------------------------


def test_a_data_set_is_streamed_from_any_place(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for i in range(2):
        rows = [{"text": f"{i} {t}", "other": None} for t in TEXTS[:100]]
        (tmp_path / f"train-{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    corpus = parse(f"hf:{tmp_path}")
    reading = Reading()
    everything = list(corpus.documents(reading))  # type: ignore[union-attr]
    assert everything == [f"{i} {t}" for i in range(2) for t in TEXTS[:100]]
    for n in (1, 99, 100, 150):
        reading = Reading()
        stream = corpus.documents(reading)  # type: ignore[union-attr]
        for _ in range(n):
            next(stream)
        stored = json.loads(json.dumps(reading.state()))
        assert list(corpus.documents(Reading(**stored))) == everything[n:]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"row 1: has no text under 'story'; fields with text: text\."):
        documents(f"hf:{tmp_path}:story")
    with pytest.raises(DataError, match="test"):
        documents(f"hf:{tmp_path}?split=test")


def test_words_of_data_sets(tmp_path: Path) -> None:
    c4 = parse("hf:allenai/c4/en:text?tokens=3B")
    assert isinstance(c4, corpora.HubText)
    assert (c4.data_set, c4.config, c4.field, c4.split, c4.max_tokens) == ("allenai/c4", "en", "text", "train", 3_000_000_000)
    assert parse("hf:allenai/c4/en").fingerprint() == c4.fingerprint()
    (tmp_path / "sub").mkdir()
    local = parse(f"hf:{tmp_path}/sub:body")
    assert isinstance(local, corpora.HubText)
    assert (local.data_set, local.config, local.field) == (f"{tmp_path}/sub", None, "body")
    with pytest.raises(DataError, match="is not a folder"):
        parse(f"hf:{tmp_path}/nowhere/at/all")
