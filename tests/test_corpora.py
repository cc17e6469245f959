"""Sources of documents: what they hold, in which order, what they refuse, and chains whose entropy is known."""

import hashlib
import json
import os
import random
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import write_file

from questctl.data import readers, source_files
from questctl.data.corpora import Markov, TextFiles, parse
from questctl.data.reading import Reading
from questctl.errors import DataError, UsageError


def documents(word: str) -> list[str]:
    corpus = parse(word)
    assert isinstance(corpus, TextFiles)
    return list(corpus.documents())


# --- Python sources ---------------------------------------------------------------------------------------------------


def test_pystdlib_is_this_pythons_library() -> None:
    corpus = parse("pystdlib")
    assert isinstance(corpus, TextFiles)
    names = [name for name, _ in corpus.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "typing.py"} <= set(names)
    assert not {part for name in names for part in name.split("/")} & {"test", "tests", "site-packages", "dist-packages"}
    assert 7e6 < corpus.size < 20e6
    reading = Reading()
    assert sum(len(text.encode()) for text in corpus.documents(reading)) == corpus.size == reading.done
    assert reading.skipped == []


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library."""
    root = tmp_path / "lib"
    for name in ("b.py", "a.py", "pkg/c.py", "pkg/__init__.py", "pkg/test/t.py", "test/u.py", "site-packages/v.py", "z.txt"):
        write_file(root / name, f"# {name}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_order_is_that_of_names_not_of_the_file_system(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ["# a.py\n", "# b.py\n", "# pkg/__init__.py\n", "# pkg/c.py\n"]
    before = parse("pystdlib").fingerprint()
    walk = os.walk

    def shuffled(root: Path):
        for folder, folders, files in walk(root):
            random.shuffle(folders)
            yield folder, folders, random.sample(files, len(files))

    monkeypatch.setattr(os, "walk", shuffled)
    for _ in range(5):
        assert documents("pystdlib") == expected
        assert parse("pystdlib").fingerprint() == before


def test_sources_that_are_not_utf8_or_cannot_be_read_are_passed_over_and_named(library: Path) -> None:
    write_file(library / "aa.py", b"# caf\xe9\n")
    (library / "ab.py").symlink_to(library / "nowhere.py")
    (library / "ac.py").mkdir()  # a folder of that name is no file at all
    corpus = parse("pystdlib")
    reading = Reading()
    assert [t for t in corpus.documents(reading) if "pkg" not in t] == ["# a.py\n", "# b.py\n"]
    assert (reading.skipped, reading.bad) == (["aa.py", "ab.py"], 0)
    assert corpus.fingerprint() == parse("pystdlib").fingerprint()


def test_a_library_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="pystdlib: no Python sources in"):
        parse("pystdlib")


def test_pysite_takes_packages_by_import_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "pure/zlib_ng/a.py",
        "pure/single.py",
        "pure/alpha/__init__.py",
        "pure/alpha/tests/t.py",
        "pure/alpha-1.dist-info/x.py",
        "plat/native/n.py",
        "pure/__pycache__/single.py",
    ):
        write_file(tmp_path / name, f"# {name}\n")
    paths = {"purelib": str(tmp_path / "pure"), "platlib": str(tmp_path / "plat")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    everything = ["# pure/alpha/__init__.py\n", "# plat/native/n.py\n", "# pure/single.py\n", "# pure/zlib_ng/a.py\n"]
    assert documents("pysite:") == documents("pysite") == everything
    assert documents("pysite:zlib-ng,single") == everything[2:]
    assert parse("pysite:single,zlib_ng") == parse("pysite: zlib_ng , single")
    with pytest.raises(UsageError, match=r"data\.source: unknown installed package 'singel'; did you mean 'single'\?"):
        parse("pysite:singel")


# --- files ------------------------------------------------------------------------------------------------------------


def test_text_files_by_pattern_in_order(tmp_path: Path) -> None:
    write_file(tmp_path / "b.txt", "bb")
    write_file(tmp_path / "a.txt", "aa\r\nä")
    write_file(tmp_path / "empty.txt", "")
    write_file(tmp_path / "sub/c.txt", "cc")
    assert documents(f"file:{tmp_path}/a.txt") == ["aa\r\nä"]
    assert documents(f"file:{tmp_path}/*.txt") == ["aa\r\nä", "bb"]
    assert documents(f"file:{tmp_path}/**/*.txt") == ["aa\r\nä", "bb", "cc"]
    write_file(tmp_path / "odd[1].txt", "brackets")
    assert documents(f"file:{tmp_path}/odd[1].txt") == ["brackets"]  # a file of just that name


def test_a_long_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = "".join("é" * rng.randrange(200) + "\n" for _ in range(3000)) + "no end of line"
    parts = documents(f"file:{write_file(tmp_path / 'long.txt', text)}")
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(part.endswith("\n") for part in parts[:-1])
    assert all(readers.PART_BYTES <= len(part.encode()) <= readers.PART_BYTES + 402 for part in parts[:-1])
    one_line = write_file(tmp_path / "line.txt", "x" * 200_000)
    assert documents(f"file:{one_line}") == ["x" * 200_000]


def test_jsonl_and_its_field(tmp_path: Path) -> None:
    lines = [{"text": "one\ntwo", "body": "B1", "n": 3}, {"text": "", "body": "B2"}, {"text": "ü\x00", "body": "B3"}]
    path = write_file(tmp_path / "d.jsonl", "\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert documents(f"file:{path}") == ["one\ntwo", "ü\x00"]
    assert documents(f"file:{path}:body") == ["B1", "B2", "B3"]
    assert documents(f"file:{tmp_path}/*.jsonl:body") == ["B1", "B2", "B3"]
    with pytest.raises(DataError, match=r"d\.jsonl, line 1: has no text under 'story'; fields with text: text, body\."):
        documents(f"file:{path}:story")
    with pytest.raises(DataError, match="line 1: has no text under 'n'"):
        documents(f"file:{path}:n")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "cut o', "line 2: is not JSON"),
        (b'{"text": "\xff"}', "line 2: is not JSON"),
        (b"[" * 100_000, "line 2: is not JSON"),
        (b'["text"]', "line 2: has no text under 'text'; fields with text: none"),
        (b'{"text": null}', "line 2: has no text under 'text'"),
        (b'{"text": "\\ud800"}', "line 2: 'text' holds half of a surrogate pair"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    path = write_file(tmp_path / "d.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=what):
        documents(f"file:{path}")


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path: Path) -> None:
    good = "line\n" * 40_000
    path = write_file(tmp_path / "latin.txt", good.encode() + b"caf\xe9\n")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text \(byte 0xe9 at 200,003\)"):
        documents(f"file:{path}")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        parse(f"file:{tmp_path}/none*.txt")
    with pytest.raises(DataError, match="no file matches"):
        parse("file:" + "x" * 5000)
    with pytest.raises(DataError, match="no file matches"):
        parse(f"file:{tmp_path}")  # a folder without files
    with pytest.raises(DataError, match=r"train\.bin does not exist"):
        parse(f"bin:{tmp_path}")
    with pytest.raises(UsageError, match="names no file; write file:PATH"):
        parse("file:")
    with pytest.raises(UsageError, match="names no file; write bin:PATH"):
        parse("bin")


def test_a_file_that_vanishes_is_a_data_error(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt", "x")
    corpus = parse(f"file:{path}")
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        corpus.fingerprint()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        list(corpus.documents())  # type: ignore[union-attr]


def test_fingerprint_tells_content_names_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_file(tmp_path / "a.txt", "one"), write_file(tmp_path / "b.txt", "two")

    def mark(*files: tuple[str, Path]) -> str:
        return source_files.fingerprint(files)

    base = mark(("a", a), ("b", b))
    assert base == mark(("a", a), ("b", b))
    assert len({base, mark(("a", a)), mark(("b", b), ("a", a)), mark(("c", a), ("b", b))}) == 4
    os.utime(a, (1, 1))
    assert mark(("a", a), ("b", b)) == base  # touched, not changed
    write_file(a, "onE")
    assert mark(("a", a), ("b", b)) != base
    monkeypatch.setattr(source_files, "CONTENT_LIMIT", 5)  # now by time of change
    large = mark(("a", a), ("b", b))
    assert large == mark(("a", a), ("b", b))
    os.utime(a, (2, 2))
    assert mark(("a", a), ("b", b)) != large


# --- Markov chains ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted(Markov):
    """A chain with given probabilities in 4096ths."""

    rows: tuple[tuple[int, ...], ...] = ()

    def counts(self) -> np.ndarray:
        return np.array(self.rows)


def test_entropy_rate_of_a_planted_chain() -> None:
    """Two states, a = P(0→1), b = P(1→0): π = (b, a)/(a + b), h = (b H(a) + a H(b))/(a + b)."""
    a, b = 410 / 4096, 1229 / 4096
    chain = Planted(2, 1, 1000, 0, rows=((4096 - 410, 410), (1229, 4096 - 1229)))

    def h(p: float) -> float:
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    assert chain.stationary() == pytest.approx([b / (a + b), a / (a + b)], rel=1e-12)
    assert chain.entropy() == pytest.approx((b * h(a) + a * h(b)) / (a + b), rel=1e-12)
    fair = Planted(4, 2, 10, 0, rows=((1024,) * 4,) * 16)
    assert fair.entropy() == pytest.approx(np.log(4), rel=1e-13)


@pytest.mark.parametrize(("v", "k"), [(64, 1), (5, 3), (2, 7), (256, 1)])
def test_stationary_distribution_is_the_eigenvector(v: int, k: int) -> None:
    chain = Markov(v, k, 1, 3)
    p = chain.counts() / chain.RESOLUTION
    full = np.zeros((v**k, v**k))  # from context (x₁ … x_k) to (x₂ … x_k, x)
    for context in range(v**k):
        for x in range(v):
            full[context, (context * v + x) % v**k] += p[context, x]
    values, vectors = np.linalg.eig(full.T)
    one = np.argmin(abs(values - 1))
    assert chain.stationary() == pytest.approx(vectors[:, one].real / vectors[:, one].real.sum(), abs=1e-11)


@pytest.mark.parametrize(("v", "k", "seed"), [(64, 1, 0), (2, 3, 1), (17, 2, 2), (256, 1, 3)])
def test_the_chain_has_the_probabilities_and_the_entropy_that_it_says(v: int, k: int, seed: int) -> None:
    """−mean ln P(x_t | context) of 400,000 tokens meets the entropy rate within five standard errors; frequencies meet π P."""
    chain = Markov(v, k, 400_000, seed)
    ids = chain.chain()
    assert len(ids) == 400_000
    assert ids.max() < v
    counts = chain.counts()
    assert counts.shape == (v**k, v)
    assert np.all(counts.sum(axis=1) == 4096)
    assert counts.min() >= 1
    context = sum(ids[i : len(ids) - k + i].astype(int) * v ** (k - 1 - i) for i in range(k))
    assert isinstance(context, np.ndarray)
    surprise = -np.log(counts[context, ids[k:]] / 4096)
    blocks = surprise[: len(surprise) // 400 * 400].reshape(400, -1).mean(axis=1)  # neighbours are dependent: error by blocks
    assert abs(blocks.mean() - chain.entropy()) < 5 * blocks.std() / 20
    assert 0.2 * np.log(v) < chain.entropy() < 0.95 * np.log(v)  # there is something to learn, and to be uncertain of
    seen = np.bincount(context, minlength=v**k) / len(context)
    assert np.abs(seen - chain.stationary()).sum() < 0.05
    top = int(np.argmax(chain.stationary()))
    following = np.bincount(ids[k:][context == top], minlength=v)
    error = np.sqrt(counts[top] * (4096 - counts[top]) / 4096**2 * following.sum())
    assert np.all(abs(following - counts[top] / 4096 * following.sum()) < 6 * error + 1)


def test_golden_chain() -> None:
    """Frozen: the same word means the same tokens in every version and on every machine."""
    assert Markov(64, 1, 100_000, 0).chain()[:12].tolist() == [51, 39, 46, 63, 9, 24, 38, 0, 20, 47, 0, 3]
    assert hashlib.sha256(Markov(64, 1, 100_000, 0).chain().tobytes()).hexdigest()[:16] == "3ab240c310e3f5fb"
    assert hashlib.sha256(Markov(5, 2, 100_000, 9).chain().tobytes()).hexdigest()[:16] == "8feea92a3c5b20cc"
    assert Markov(64, 1, 100_000, 0).entropy() == pytest.approx(2.755119214829403, rel=1e-12)


def test_a_longer_chain_begins_like_a_shorter_one_and_seeds_differ() -> None:
    short, long = Markov(8, 2, 1000, 4).chain(), Markov(8, 2, 5000, 4).chain()
    assert np.array_equal(short, long[:1000])
    assert not np.array_equal(short, Markov(8, 2, 1000, 5).chain())


def test_markov_words() -> None:
    assert parse("synthetic:markov") == Markov(64, 1, 4_000_000, 0)
    assert parse("synthetic:markov?seed=7&order=2&vocab=8&tokens=99") == Markov(8, 2, 99, 7)
    assert parse(Markov(8, 2, 99, 7).source) == Markov(8, 2, 99, 7)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pystdlb", r"data.source: unknown source 'pystdlb'; did you mean 'pystdlib'\?"),
        ("", "data.source: unknown source ''; choices: pystdlib, pysite, file, chat, hf, bin, synthetic"),
        ("c4", "unknown source 'c4'; choices: pystdlib"),
        ("pystdlib:json", "'pystdlib' takes no argument, got 'pystdlib:json'"),
        ("synthetic:marko", r"unknown source 'synthetic:marko'; did you mean 'synthetic:markov'\?"),
        ("synthetic", "unknown source 'synthetic'; did you mean 'synthetic:markov'"),
        ("synthetic:markov?vocab=1", "vocab must be a whole number from 2 to 256, got '1'"),
        ("synthetic:markov?vocab=many", "vocab must be a whole number from 2 to 256, got 'many'"),
        ("synthetic:markov?seed=-1", "seed must be a whole number from 0 to 4,294,967,295, got '-1'"),
        ("synthetic:markov?tokens=", "tokens must be a whole number from 1 to 1,000,000,000, got ''"),
        ("synthetic:markov?order=3", r"vocab\^order is 262,144 contexts; at most 16,384 are possible"),
        ("synthetic:markov?sede=3", r"unknown option of synthetic:markov 'sede'; did you mean 'seed'\?"),
        ("bin:x.bin?dtype=int16", r"unknown dtype of bin:x.bin 'int16'; did you mean 'uint16'\?"),
        ("bin:x.bin?vocab=0", "vocab must be a whole number from 1 to"),
    ],
)
def test_words_that_cannot_be_meant(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(word)


def test_data_needs_no_torch() -> None:
    heavy = "{'torch', 'pandas', 'scipy', 'matplotlib'}"
    code = f"import sys, questctl.data.tokens, questctl.data.sampler; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
