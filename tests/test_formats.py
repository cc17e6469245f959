"""Token files and texts of other programs: read as they are meant, or refused with what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from command_line import output
from helpers import write_file

from questctl.config import DataConfig
from questctl.data.corpora import parse
from questctl.data.formats import MEGATRON, check_width
from questctl.data.info import as_source
from questctl.data.size_estimate import estimate_corpus
from questctl.data.tokens import Dataset, prepare
from questctl.errors import DataError

IDS = np.random.default_rng(0).zipf(1.2, 200_000)
IDS = (IDS[IDS < 50_257] - 1)[:20_000]  # frequent ids are small, as those of byte pairs are


def adopted(path: Path, query: str = "") -> Dataset:
    return prepare(f"bin:{path}{query}", val_fraction=0.1, cache_dir=path.parent / "cache")


def assert_holds(data: Dataset, ids: np.ndarray) -> None:
    assert np.array_equal(np.concatenate([data.train, data.val]), ids)
    estimate = estimate_corpus(DataConfig(source=data.meta.source, val_fraction=0.1))
    assert (estimate.train_tokens, estimate.val_tokens) == (len(data.train), len(data.val))


def llm_c(ids: np.ndarray, magic: int = 20240520, dtype: str = "<u2", n: int | None = None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if n is None else n
    return header.tobytes() + ids.astype(dtype).tobytes()


# --- read as they are meant -------------------------------------------------------------------------------------------


def test_the_header_of_llm_c_is_no_text(tmp_path: Path) -> None:
    write_file(tmp_path / "fineweb.bin", llm_c(IDS))
    data = adopted(tmp_path / "fineweb.bin")
    assert (data.meta.dtype, data.meta.train.start, data.meta.val.start) == ("uint16", 512, 512 + len(data.train))
    assert_holds(data, IDS)
    write_file(tmp_path / "llama3.bin", llm_c(IDS + 70_000, 20240801, "<u4"))
    data = adopted(tmp_path / "llama3.bin")
    assert (data.meta.dtype, data.meta.train.start) == ("uint32", 256)
    assert_holds(data, IDS + 70_000)
    for side, ids in (("train", IDS), ("val", IDS[:500])):
        write_file(tmp_path / f"both/{side}.bin", llm_c(ids))
    both = prepare(f"bin:{tmp_path}/both", cache_dir=tmp_path / "cache")
    assert np.array_equal(both.train, IDS)
    assert np.array_equal(both.val, IDS[:500])
    assert prepare(f"bin:{tmp_path}/both", cache_dir=tmp_path / "cache").data_hash == both.data_hash  # verified when opened


def test_a_file_of_llm_c_that_was_cut_off(tmp_path: Path) -> None:
    write_file(tmp_path / "a.bin", llm_c(IDS, n=len(IDS) + 1))
    with pytest.raises(DataError, match=r"a\.bin is damaged or cut off: its header says 20,001 ids of uint16"):
        adopted(tmp_path / "a.bin")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32"])
def test_arrays_of_numpy(dtype: str, tmp_path: Path) -> None:
    ids = IDS % 256 if dtype == "uint8" else IDS
    np.save(tmp_path / "ids.npy", ids.astype(dtype).reshape(100, -1))
    data = adopted(tmp_path / "ids.npy")
    assert data.meta.dtype == dtype.replace("int32", "uint32").replace("uuint", "uint")
    assert_holds(data, ids)
    assert as_source(tmp_path / "ids.npy") == f"bin:{tmp_path}/ids.npy"


def test_arrays_of_other_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    with pytest.raises(DataError, match=r"ids\.npy is an array of int64, not of .*; convert it: numpy\.save\("):
        adopted(tmp_path / "ids.npy")
    np.save(tmp_path / "ids.npy", IDS.astype("uint16"))
    with pytest.raises(DataError, match=r"says that its ids are uint16, but bin:.* says uint32"):
        adopted(tmp_path / "ids.npy", "?dtype=uint32")


def test_the_index_of_megatron_says_the_type(tmp_path: Path) -> None:
    for code, dtype in ((8, "uint16"), (4, "int32")):
        write_file(tmp_path / "corpus.bin", IDS.astype(dtype).tobytes())
        write_file(tmp_path / "corpus.idx", MEGATRON + (1).to_bytes(8, "little") + bytes([code]) + bytes(100))
        data = adopted(tmp_path / "corpus.bin")
        assert_holds(data, IDS)
        assert data.meta.dtype == f"u{dtype}".replace("uu", "u")
    with pytest.raises(DataError, match=r"corpus\.idx is the index of Megatron's token files, .*; name corpus\.bin instead"):
        adopted(tmp_path / "corpus.idx")
    write_file(tmp_path / "floats.bin", IDS.astype("float64").tobytes())
    write_file(tmp_path / "floats.idx", MEGATRON + (1).to_bytes(8, "little") + bytes([6]) + bytes(100))
    with pytest.raises(DataError, match=r"floats\.bin holds numbers of type 6 of Megatron"):
        adopted(tmp_path / "floats.bin")


def test_a_changed_index_is_noticed(tmp_path: Path) -> None:
    """The same bytes are other ids by another index, so tokens that were adopted by the first are not opened for the second."""
    write_file(tmp_path / "corpus.bin", IDS.astype("uint16").tobytes())
    for code, dtype in ((8, "uint16"), (4, "uint32")):
        write_file(tmp_path / "corpus.idx", MEGATRON + (1).to_bytes(8, "little") + bytes([code]) + bytes(100))
        assert_holds(adopted(tmp_path / "corpus.bin"), IDS.astype("uint16").view(dtype))


# --- widths that are not said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("<u4", r"looks like 32-bit ids, not like uint16 ids; write \?dtype=uint32, or \?dtype=uint16 if it is"),
        (
            "<i8",
            r"looks like 64-bit ids, not like uint16 ids; convert them: numpy\.fromfile\(PATH, '<i8'\)",
        ),
        (">u2", r"looks like big-endian uint16 ids, .*'>u2'"),
        (">u4", r"looks like big-endian 32-bit ids, .*'>u4'"),
        (">i8", r"looks like big-endian 64-bit ids, .*'>i8'"),
    ],
)
@pytest.mark.parametrize("query", ["", "?vocab=50257"])
def test_ids_of_another_width_are_refused(dtype: str, words: str, query: str, tmp_path: Path) -> None:
    write_file(tmp_path / "t.bin", IDS.astype(dtype).tobytes())
    with pytest.raises(DataError, match=words if not query or dtype[0] == "<" else "holds id|big-endian"):
        adopted(tmp_path / "t.bin", query)
    assert len(adopted(tmp_path / "t.bin", "?dtype=uint16").train)  # said, it is believed


def test_single_bytes_and_text_are_refused_as_ids(tmp_path: Path) -> None:
    write_file(tmp_path / "t.bin", (IDS % 64).astype("uint8").tobytes())
    with pytest.raises(DataError, match=r"looks like uint8 ids, .*; write \?dtype=uint8"):
        adopted(tmp_path / "t.bin")
    write_file(tmp_path / "t.bin", "plain text\n" * 100)
    with pytest.raises(DataError, match=r"looks like text, .*; write file: instead of bin:"):
        adopted(tmp_path / "t.bin")


@pytest.mark.parametrize("vocab", [2, 16, 64, 256, 1000, 8192, 32_000, 50_257, 65_536])
@pytest.mark.parametrize("kind", ["zipf", "uniform", "ascending"])
def test_ids_of_uint16_of_any_vocabulary_are_believed(vocab: int, kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ids = {"zipf": IDS % vocab, "uniform": rng.integers(0, vocab, 20_000), "ascending": np.arange(20_000) % vocab}[kind]
    check_width(write_file(tmp_path / "t.bin", ids.astype("<u2").tobytes()), "uint16")


# --- other formats ----------------------------------------------------------------------------------------------------


def zipped() -> bytes:
    import io

    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("a", "text")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b"text", mtime=0), "gzip data"),
        (bz2.compress(b"text"), "bzip2 data"),
        (lzma.compress(b"text"), "xz data"),
        (zipped(), "a zip archive"),
        (pickle.dumps([1, 2]), "a pickle"),
        (b"PAR1\x15\x04\x15" + bytes(50), "a Parquet file"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,  # archives hold the time at which they were made
)
def test_other_formats_are_named(content: bytes, what: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.bin", content)
    with pytest.raises(DataError, match=rf"a\.bin is {what}.*, not a file of token ids; .+"):
        adopted(path)
    with pytest.raises(DataError, match=rf"is not (UTF-8 )?text \(byte 0x.. at [\d,]+\); it is {what}"):
        list(parse(f"file:{path}").documents())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("encoding", "suffix"),
    [
        *((name, ".txt") for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        ("utf-16", ".jsonl"),
        ("utf-16-le", ".jsonl"),
    ],
)
def test_text_of_two_bytes_a_character(encoding: str, suffix: str, tmp_path: Path) -> None:
    text = "def f(x):\n    return x\n" if suffix == ".txt" else '{"text": "words"}\n{"text": "more"}\n'
    path = write_file(tmp_path / f"a{suffix}", text.encode(encoding))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(DataError, match=rf"it seems to be {name}: iconv -f {name} -t UTF-8 FILE > NEW converts it"):
        list(parse(f"file:{path}").documents())  # type: ignore[union-attr]


def test_the_mark_of_utf_8_is_not_part_of_the_text(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", "\ufeffwords\n" * 2)
    write_file(tmp_path / "b.jsonl", "\ufeff" + json.dumps({"text": "one"}))
    write_file(tmp_path / "c.json", "\ufeff" + json.dumps([{"text": "two"}]))
    texts = list(parse(f"file:{tmp_path}").documents())  # type: ignore[union-attr]
    assert texts == ["words\n\ufeffwords\n", "one", "two"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (json.dumps([{"text": "one", "n": 1}, {"text": "é"}]), ["one", "é"]),
        (json.dumps([{"text": f"entry {i} " * 9_000} for i in range(5)], indent=2), [f"entry {i} " * 9_000 for i in range(5)]),
        (json.dumps(["one", "two, [three]"]), ["one", "two, [three]"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('{"text": "alone"}', ["alone"]),
    ],
)
def test_json_holds_records(content: str, texts: list[str], packed: bool, tmp_path: Path) -> None:
    raw = content.encode()
    path = write_file(tmp_path / ("a.json.gz" if packed else "a.json"), gzip.compress(raw, mtime=0) if packed else raw)
    corpus = parse(f"file:{path}")
    assert list(corpus.documents()) == texts  # type: ignore[union-attr]
    from questctl.data.reading import Reading

    assert list(corpus.documents(Reading(place=[0, 1]))) == texts[1:]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"content": "x"}]', "entry 1: has no text under 'text'; fields with text: content"),
        ('[{"text": "x"}, {"text": ', "entry 2: is not JSON"),
        ('[{"text": "x"}, 7]', "entry 2: has no text under 'text'"),
        (b'[{"text": "x"}, {"text": "\xff"}]', "entry 1: is not UTF-8 text"),
    ],
)
def test_json_lists_that_are_broken(content: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        list(parse(f"file:{write_file(tmp_path / 'a.json', content)}").documents())  # type: ignore[union-attr]


@pytest.mark.parametrize("content", ['{\n "name": "package"\n}\n', "[1, 2, 3]\n", '"just a text"', "not JSON at all"])
def test_other_json_is_text(content: str, tmp_path: Path) -> None:
    assert list(parse(f"file:{write_file(tmp_path / 'a.json', content)}").documents()) == [content]  # type: ignore[union-attr]


def test_line_ends_and_empty_files_are_as_they_are(tmp_path: Path) -> None:
    write_file(tmp_path / "a.txt", b"one\r\ntwo\r\n")
    write_file(tmp_path / "b.txt", b"")
    write_file(tmp_path / "c.jsonl", b'{"text": "x"}\r\n\r\n')
    assert list(parse(f"file:{tmp_path}").documents()) == ["one\r\ntwo\r\n", "x"]  # type: ignore[union-attr]
    assert "is too small: 0 tokens remain" in output("data", "info", f"file:{tmp_path}/b.txt", code=2)
