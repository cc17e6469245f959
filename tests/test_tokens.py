"""Token files: what is written, the split, the cache under edits, races, kills and damage, and what is refused."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers import slow_but, write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from questctl.data import corpora, tokenizers, tokens, writing
from questctl.data.tokens import Dataset, open_dataset, prepare, require_windows
from questctl.data.writing import PreparationProgress as Progress
from questctl.errors import DataError, QuestError, StorageError, UsageError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def corpus_of(path: Path, n: int, *, first: int = 0) -> str:
    """A .jsonl of n different documents; its source."""
    write_file(path, "".join(json.dumps({"text": f"document {i} " * (1 + i % 7)}) + "\n" for i in range(first, first + n)))
    return f"file:{path}"


def pieces(ids: np.ndarray) -> list[bytes]:
    """Documents of byte tokens."""
    assert ids[-1] == 0
    return ids.tobytes().split(b"\0")[:-1]


def same_tokens(a: Dataset, b: Dataset) -> bool:
    return np.array_equal(a.train, b.train) and np.array_equal(a.val, b.val)


# --- what is written --------------------------------------------------------------------------------------------------


def test_pystdlib_end_to_end(cache: Path) -> None:
    data = prepare("pystdlib", cache_dir=cache)
    require_windows(data, 128)
    meta = data.meta
    assert (meta.dtype, meta.vocab_size, meta.tokenizer) == ("uint8", 256, "byte")
    assert data.train.dtype == data.val.dtype == np.uint8
    assert (len(data.train), len(data.val)) == (meta.train.tokens, meta.val.tokens)
    assert meta.train.bytes_per_token == meta.val.bytes_per_token == 1.0
    corpus = corpora.parse("pystdlib")
    assert isinstance(corpus, corpora.TextFiles)
    texts = {t.encode() for t in corpus.documents()}
    train, val = pieces(data.train), pieces(data.val)
    assert len(train) + len(val) == len(texts) == meta.documents
    assert set(train) | set(val) == texts
    assert not set(train) & set(val)
    assert 0.02 < len(data.val) / (len(data.train) + len(data.val)) < 0.09
    assert len(val) > 20  # many files, none of which is most of it
    assert max(map(len, val)) < 0.3 * len(data.val)
    assert not data.train.flags.writeable


def test_meta_json_says_what_the_files_are(tmp_path: Path, cache: Path) -> None:
    source = corpus_of(tmp_path / "d.jsonl", 1000)
    data = prepare(source, cache_dir=cache)
    stored = json.loads((data.folder / "meta.json").read_text())
    assert stored["format"] == "questctl-tokens-1"
    assert stored["source"] == source
    assert stored["tokenizer_hash"] == tokenizers.load("byte").hash
    assert stored["documents"] == 1000
    assert stored["entropy"] is None
    for side in ("train", "val"):
        raw = (data.folder / f"{side}.bin").read_bytes()
        assert stored[side]["tokens"] == len(raw)
        assert stored[side]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert sorted(p.name for p in data.folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert [p.name for p in cache.iterdir()] == [data.folder.name]


@dataclass(frozen=True)
class Chars:
    """A tokenizer of characters with any vocabulary: an id is a code point."""

    vocab_size: int
    name: str = "chars"
    end: int = 0
    hash: str = "c" * 64

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) for c in text])

    def decode(self, ids: object) -> str:
        return "".join(map(chr, np.asarray(ids)))


@pytest.mark.parametrize(("vocab", "dtype"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_width_of_an_id_follows_the_vocabulary(
    vocab: int, dtype: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tokenizers.TOKENIZERS, "chars", lambda *_: Chars(vocab))
    top = chr(vocab - 1)
    source = f"file:{write_file(tmp_path / 'a.txt', ('ab' + top) * 100)}"
    data = prepare(source, "chars", cache_dir=cache)
    assert data.meta.dtype == dtype == str(data.train.dtype)
    assert data.train[:4].tolist() == [97, 98, vocab - 1, 97]
    assert (len(data.train), len(data.val)) == (286, 16)
    assert data.meta.train.bytes_per_token == pytest.approx((95 * (2 + len(top.encode())) + 1) / 286)
    other = prepare(source, cache_dir=cache)  # the same source as bytes is another entry
    assert other.folder != data.folder
    assert other.data_hash != data.data_hash


def test_synthetic_reports_its_entropy(cache: Path) -> None:
    data = prepare("synthetic:markov?vocab=8&tokens=10000&seed=2", cache_dir=cache)
    chain = corpora.Markov(8, 1, 10_000, 2)
    assert np.array_equal(np.concatenate([data.train, data.val]), chain.chain())
    assert (len(data.val), data.meta.vocab_size, data.meta.tokenizer) == (500, 8, "none")
    assert data.meta.entropy == chain.entropy()
    assert data.meta.val.bytes_per_token is None
    assert prepare("synthetic:markov?seed=2&vocab=8&tokens=10000", "none", cache_dir=cache).folder == data.folder


# --- the split --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10_000), unique=True, min_size=300, max_size=400), st.integers(1, 100), st.data())
@settings(max_examples=20, deadline=None)
def test_new_documents_move_no_old_one(ids: list[int], more: int, draw: st.DataObject) -> None:
    import tempfile

    order = draw.draw(st.permutations(ids))
    with tempfile.TemporaryDirectory() as t:
        folder = Path(t)

        def split(numbers: list[int], name: str) -> Dataset:
            write_file(folder / name, "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in numbers))
            return prepare(f"file:{folder / name}", val_fraction=0.1, cache_dir=folder / "cache")

        small, large = split(ids, "a.jsonl"), split([*order, *range(20_000, 20_000 + more)], "b.jsonl")
        assert set(pieces(small.train)) <= set(pieces(large.train))
        assert set(pieces(small.val)) <= set(pieces(large.val))
        assert not set(pieces(large.train)) & set(pieces(large.val))


@pytest.mark.parametrize("fraction", slow_but([0.02, 0.1, 0.5], [0.02, 0.5]))
def test_share_held_out(fraction: float, tmp_path: Path, cache: Path) -> None:
    data = prepare(corpus_of(tmp_path / "d.jsonl", 20_000), val_fraction=fraction, cache_dir=cache)
    share = len(pieces(data.val)) / 20_000
    assert abs(share - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / 20_000)


def test_equal_documents_are_kept_once(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "d.jsonl"
    once = prepare(corpus_of(path, 500), cache_dir=cache)
    path.write_bytes(path.read_bytes() * 3)
    thrice = prepare(f"file:{path}", cache_dir=cache)
    assert (thrice.meta.documents, thrice.meta.duplicates) == (500, 1000)
    assert thrice.folder != once.folder
    assert thrice.data_hash == once.data_hash


def test_few_documents_give_their_ends(tmp_path: Path, cache: Path) -> None:
    for i, name in enumerate(("a", "b", "c")):
        write_file(tmp_path / f"{name}.txt", name * 100 * (i + 1))
    data = prepare(f"file:{tmp_path}/*.txt", val_fraction=0.1, cache_dir=cache)
    assert pieces(data.train) == [b"a" * 90, b"b" * 180, b"c" * 270]
    assert pieces(data.val) == [b"a" * 10, b"b" * 20, b"c" * 30]
    assert data.meta.documents == 3


# --- the cache --------------------------------------------------------------------------------------------------------


def test_second_time_nothing_is_written(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus_of(tmp_path / "d.jsonl", 500)
    first = prepare(source, cache_dir=cache)
    monkeypatch.setattr(tokens, "_build", lambda *_: pytest.fail("built twice"))
    assert same_tokens(prepare(source, cache_dir=cache), first)


def test_an_edited_source_and_another_split_are_noticed(tmp_path: Path, cache: Path) -> None:
    source = corpus_of(tmp_path / "d.jsonl", 500)
    first = prepare(source, cache_dir=cache)
    path = Path(source.removeprefix("file:"))
    path.write_text(path.read_text().replace("document 3 ", "document X "))  # same size
    edited = prepare(source, cache_dir=cache)
    assert edited.data_hash != first.data_hash
    assert prepare(source, val_fraction=0.2, cache_dir=cache).folder != edited.folder


def test_identity_is_of_the_tokens_not_of_the_words(tmp_path: Path, cache: Path) -> None:
    a = prepare(corpus_of(tmp_path / "a.jsonl", 500), cache_dir=cache)
    b = prepare(corpus_of(tmp_path / "b.jsonl", 500), cache_dir=tmp_path / "other")
    c = prepare(f"bin:{a.folder}", cache_dir=cache)
    assert a.data_hash == b.data_hash == c.data_hash
    assert len(a.data_hash) == 64
    assert prepare(corpus_of(tmp_path / "c.jsonl", 501), cache_dir=cache).data_hash != a.data_hash


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("QUESTCTL_CACHE", raising=False)
    assert tokens.cache_root() == tmp_path / "home/.cache/questctl/data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tokens.cache_root() == tmp_path / "xdg/questctl/data"
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path / "q"))
    data = prepare("synthetic:markov?tokens=1000")
    assert data.folder.parent == tmp_path / "q/data"


PREPARE = """
import sys
from pathlib import Path
from questctl.data.tokens import prepare
print(prepare(sys.argv[1], cache_dir=Path(sys.argv[2])).data_hash)
"""


def test_processes_that_prepare_the_same_source_at_once(tmp_path: Path, cache: Path) -> None:
    source = corpus_of(tmp_path / "d.jsonl", 10_000)
    command = [sys.executable, "-c", PREPARE, source, str(cache)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = {p.communicate()[0] for p in running}
    assert [p.returncode for p in running] == [0] * 4
    assert len(printed) == 1
    assert len(list(cache.iterdir())) == 1  # and no leftovers


def test_who_waited_for_another_takes_what_that_one_wrote(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = corpus_of(tmp_path / "d.jsonl", 500)
    claim = tokens.Lease.claim

    def held(lease: tokens.Lease) -> tokens.Lease:
        monkeypatch.setattr(tokens.Lease, "claim", claim)
        prepare(source, cache_dir=cache)  # another process is faster
        monkeypatch.setattr(tokens, "_build", lambda *_: pytest.fail("built twice"))
        raise tokens.LeaseHeld("held")

    monkeypatch.setattr(tokens.Lease, "claim", held)
    prepare(source, cache_dir=cache)
    assert len(list(cache.iterdir())) == 1


def killed_at(event: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that kills itself before the `event`th time that a file is brought to the disk or renamed; →
    whether it came to that."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def instead(*args: object, **more: object) -> object:
                nonlocal count
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **more)

            return instead

        tokens.to_disk = writing.to_disk = counted(writing.to_disk)  # type: ignore[assignment]
        Path.rename, Path.replace, Path.unlink = counted(Path.rename), counted(Path.replace), counted(Path.unlink)  # type: ignore
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("limit", [None, 20_000])
def test_killed_anywhere_goes_on_to_the_same_tokens(
    limit: int | None, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(writing, "BATCH_BYTES", 4_000)
    source = corpus_of(tmp_path / "d.jsonl", 1000)
    path = Path(source.removeprefix("file:"))
    path.write_text(path.read_text() + "".join(path.read_text().splitlines(keepends=True)[:300]))  # with repetitions
    whole = prepare(source, cache_dir=tmp_path / "undisturbed", max_tokens=limit)
    assert whole.meta.train.tokens + whole.meta.val.tokens <= (limit or 10**9)
    kills, event = 0, 1
    while killed_at(event, lambda: prepare(source, cache_dir=cache, max_tokens=limit)):
        assert list(cache.glob("file-*")) == []
        kills, event = kills + 1, event % 29 + 5
        assert kills < 200
    data = prepare(source, cache_dir=cache, max_tokens=limit)
    assert kills > 3
    assert data.meta == whole.meta
    assert same_tokens(data, whole)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".tmp")] == [data.folder.name]  # no lease, no work folder
    assert sorted(p.name for p in data.folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_what_was_killed_long_ago_is_removed(tmp_path: Path, cache: Path) -> None:
    now = time.time()
    for name, days in [
        (".a.0123456789abcdef.partial", 8),
        (".b.0123456789abcdef.partial", 6),
        (".c-byte-12.0a1b2c3d", 0.1),
        (".d-byte-12.0a1b2c3d", 0.01),
        (".e.0123456789abcdef.lease", 0.1),
        (".mine", 99),
    ]:
        write_file(cache / name / "train.bin", "x")
        for path in (cache / name / "train.bin", cache / name):
            os.utime(path, (now - days * 86_400,) * 2)
    data = prepare("synthetic:markov?tokens=1000", cache_dir=cache)
    left = {".b.0123456789abcdef.partial", ".d-byte-12.0a1b2c3d", ".mine", data.folder.name}
    assert {p.name for p in cache.iterdir()} == left


# --- limits and folders -----------------------------------------------------------------------------------------------


def test_at_most_so_many_tokens(tmp_path: Path, cache: Path) -> None:
    source = corpus_of(tmp_path / "d.jsonl", 1000)
    whole = prepare(source, cache_dir=cache)
    part = prepare(source, cache_dir=cache, max_tokens=30_000)
    total = part.meta.train.tokens + part.meta.val.tokens
    assert 29_000 < total <= 30_000
    assert np.array_equal(part.train, whole.train[: len(part.train)])
    assert part.meta.max_tokens == 30_000
    assert prepare(source, cache_dir=cache).data_hash == whole.data_hash
    assert prepare(source, cache_dir=cache, max_tokens=10**9).data_hash == whole.data_hash
    with pytest.raises(UsageError, match="max_tokens: synthetic:markov is tokens already"):
        prepare("synthetic:markov", cache_dir=cache, max_tokens=100)


def test_a_folder_of_ones_own(tmp_path: Path, cache: Path) -> None:
    source, out = corpus_of(tmp_path / "d.jsonl", 1000), tmp_path / "mine"
    out.mkdir()
    data = prepare(source, cache_dir=cache, out=out)
    assert data.folder == out
    assert data.data_hash == prepare(source, cache_dir=cache).data_hash == prepare(f"bin:{out}", cache_dir=cache).data_hash
    assert prepare(source, cache_dir=cache, out=out).data_hash == data.data_hash  # it is there
    with pytest.raises(UsageError, match=r"mine holds other tokens, of file:.*; name another folder, or give --force"):
        prepare(source, cache_dir=cache, out=out, val_fraction=0.2)
    assert prepare(source, cache_dir=cache, out=out, val_fraction=0.2, force=True).data_hash != data.data_hash
    write_file(tmp_path / "home" / "thesis.tex", "x")
    for force in (False, True):
        with pytest.raises(UsageError, match="home holds something other than token files"):
            prepare(source, cache_dir=cache, out=tmp_path / "home", force=force)
    write_file(tmp_path / ".new.0123456789abcdef.partial" / "state.json", "{}")
    with pytest.raises(UsageError, match="is an unfinished preparation of other tokens"):
        prepare(source, cache_dir=cache, out=tmp_path / "new")


def test_broken_lines_are_counted_when_asked(tmp_path: Path, cache: Path) -> None:
    good = [json.dumps({"text": f"document {i} "}) for i in range(900)]
    clean = prepare(f"file:{write_file(tmp_path / 'clean.jsonl', chr(10).join(good))}", cache_dir=cache)
    lines = [*good[:300], '{"text": ', *good[300:], '{"txt": "x"}', "[1]"]
    source = f"file:{write_file(tmp_path / 'd.jsonl', chr(10).join(lines))}"
    with pytest.raises(DataError, match=r"d\.jsonl, line 301: is not JSON.*; questctl data prepare --skip-bad leaves out"):
        prepare(source, cache_dir=cache)
    data = prepare(source, cache_dir=cache, skip_bad=True)
    assert data.data_hash == clean.data_hash
    assert data.meta.bad == 3
    assert "d.jsonl, line 301: is not JSON" in data.meta.first_bad
    assert prepare(source, cache_dir=cache).folder == data.folder  # and training finds it without being told
    mistaken = f"file:{tmp_path}/clean.jsonl:story"
    with pytest.raises(DataError, match=r"skipped; the first: .*line 1: has no text under 'story'; fields with text: text"):
        prepare(mistaken, cache_dir=cache, skip_bad=True)


def test_an_error_far_into_a_corpus_undoes_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(writing, "BATCH_BYTES", 4_000)
    source = corpus_of(tmp_path / "d.jsonl", 1000)
    path = Path(source.removeprefix("file:"))
    path.write_text(path.read_text() + "{\n" + path.read_text().replace("document", "text"))
    with pytest.raises(DataError, match="line 1001"):
        prepare(source, cache_dir=cache)
    (partial,) = cache.glob(".file-*.partial")
    assert json.loads((partial / "state.json").read_text())["documents"] > 900
    told: list[Progress] = []
    data = prepare(source, cache_dir=cache, skip_bad=True, progress=told.append)
    assert (data.meta.documents, data.meta.bad) == (2000, 1)
    assert told[0].text_bytes > 15_000  # it went on, and did not begin again
    assert data.data_hash == prepare(source, cache_dir=tmp_path / "2", skip_bad=True).data_hash


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def resize(by: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size + by)


def change(key: str, value: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


@pytest.mark.parametrize("via", ["word", "bin"])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.bin", flip, r"train\.bin is damaged: its SHA-256 is .{12}…, not .{12}… as meta\.json says"),
        ("val.bin", flip, r"val\.bin is damaged: its SHA-256"),
        ("train.bin", resize(-1), r"train\.bin is damaged: [\d,]+ bytes where [\d,]+ were expected"),
        ("val.bin", resize(4), r"val\.bin is damaged: [\d,]+ bytes where [\d,]+ were expected"),
        ("val.bin", Path.unlink, r"val\.bin cannot be read \(No such file or directory\)"),
        ("meta.json", change("dtype", "uint16"), r"train\.bin is damaged: [\d,]+ bytes where [\d,]+ were expected"),
        ("meta.json", change("train", {"file": "train.bin"}), r"meta\.json is damaged \(train\.tokens: Field required\)"),
        ("meta.json", change("dtype", "object"), r"meta\.json is damaged \(dtype: "),
        ("meta.json", change("vocab_size", "256"), r"meta\.json is damaged \(vocab_size: "),
    ],
)
def test_damage_is_named_and_can_be_mended(
    name: str, damage: Callable[[Path], None], message: str, via: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    source = corpus_of(tmp_path / "d.jsonl", 500)
    data = prepare(source, cache_dir=cache)
    damage(data.folder / name)
    with pytest.raises(DataError, match=message) as e:
        prepare(source if via == "word" else f"bin:{data.folder}", cache_dir=cache)
    assert str(data.folder) in str(e.value)
    if via == "word":
        assert f"`questctl data prepare '{source}' --force` makes it anew" in str(e.value)
    mended = prepare(source, cache_dir=cache, force=True)
    assert mended.data_hash == data.data_hash
    assert prepare(source, cache_dir=cache).data_hash == data.data_hash
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\x80\x04\x95", b"null"])
def test_a_meta_that_is_no_meta(content: bytes, tmp_path: Path, cache: Path) -> None:
    source = corpus_of(tmp_path / "d.jsonl", 500)
    folder = prepare(source, cache_dir=cache).folder
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.json is damaged \(.*--force` makes it anew"):
        prepare(source, cache_dir=cache)
    with pytest.raises(DataError, match=r"meta\.json"):
        prepare(f"bin:{folder}", cache_dir=cache)


def test_large_files_are_verified_when_asked(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "VERIFY_BYTES", 1000)
    folder = prepare(corpus_of(tmp_path / "d.jsonl", 500), cache_dir=cache).folder
    flip(folder / "train.bin")
    open_dataset(folder)
    with pytest.raises(DataError, match="SHA-256"):
        open_dataset(folder, verify=True)


# --- token files of others --------------------------------------------------------------------------------------------


def ids(path: Path, values: np.ndarray, dtype: str = "uint16") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values.astype(dtype).tofile(path)


def test_nanogpt_files_are_used_in_place(tmp_path: Path, cache: Path) -> None:
    train, val = np.arange(5000) % 50_257, np.arange(400) + 40_000
    ids(tmp_path / "b/train.bin", train)
    ids(tmp_path / "b/val.bin", val)
    data = prepare(f"bin:{tmp_path}/b", cache_dir=cache)
    assert np.array_equal(data.train, train)
    assert np.array_equal(data.val, val)
    assert (data.meta.dtype, data.meta.vocab_size, data.meta.tokenizer) == ("uint16", 40_400, "none")
    assert data.meta.train.bytes_per_token is None
    assert [p.name for p in data.folder.iterdir()] == ["meta.json"]
    assert same_tokens(prepare(f"bin:{tmp_path}/b/train.bin", cache_dir=cache), data)
    assert prepare(f"bin:{tmp_path}/b?vocab=50257", cache_dir=cache).meta.vocab_size == 50_257
    ids(tmp_path / "b/val.bin", val + 1)
    assert prepare(f"bin:{tmp_path}/b", cache_dir=cache).data_hash != data.data_hash


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_a_single_file_gives_its_end(dtype: str, tmp_path: Path, cache: Path) -> None:
    values = np.random.default_rng(0).integers(0, 200, 1003)
    ids(tmp_path / "tokens.bin", values, dtype)
    meta = {"dtype": dtype, "vocab_size": 300, "bytes_per_token": 3.5, "by": "someone"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    data = prepare(f"bin:{tmp_path}/tokens.bin", val_fraction=0.1, cache_dir=cache)
    assert np.array_equal(data.train, values[:903])
    assert np.array_equal(data.val, values[903:])
    assert (data.meta.dtype, data.meta.vocab_size, data.meta.val.bytes_per_token) == (dtype, 300, 3.5)
    assert same_tokens(data, prepare(f"bin:{tmp_path}/tokens.bin", val_fraction=0.1, cache_dir=cache))


def test_token_files_are_read_in_chunks(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 60_000, 1003)
    ids(tmp_path / "t.bin", values)
    whole = prepare(f"bin:{tmp_path}/t.bin", cache_dir=cache)
    monkeypatch.setattr(tokens, "_CHUNK", 7)
    told: list[Progress] = []
    in_chunks = prepare(f"bin:{tmp_path}/t.bin", cache_dir=tmp_path / "2", progress=told.append)
    assert in_chunks.data_hash == whole.data_hash
    assert in_chunks.meta.vocab_size == values.max() + 1
    assert told[-1] == Progress("reading", 1.0, 2006, 1003)


@pytest.mark.parametrize(
    ("raw", "meta", "query", "message"),
    [
        (b"", None, "", r"t\.bin has 0 bytes, which is not a positive number of uint16 ids"),
        (b"abc", None, "", r"t\.bin has 3 bytes, which is not a positive number of uint16 ids"),
        (b"abcdef", None, "?dtype=uint32", r"has 6 bytes, which is not a positive number of uint32 ids"),
        (b"ab" * 99, {"vocab_size": 100}, "", r"holds id 25,185, but its vocabulary has 100 ids; is uint16 the right dtype\?"),
        (b"ab" * 99, None, "?vocab=100", r"holds id 25,185"),
        (b"ab" * 99, {"dtype": "float32"}, "", r"meta\.json: dtype: unknown dtype 'float32'"),
        (b"ab" * 99, {"vocab_size": -1}, "", r"meta\.json: vocab_size must be a positive number, got -1"),
        (b"ab" * 99, {"bytes_per_token": "4"}, "", r"meta\.json: bytes_per_token must be a positive number, got '4'"),
        (b"ab" * 99, [], "", r"meta\.json: must hold a JSON object, not list"),
    ],
)
def test_token_files_that_cannot_be_meant(raw: bytes, meta: object, query: str, message: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_file(tmp_path / "t.bin", raw)
    if meta is not None:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=message):
        prepare(f"bin:{tmp_path}/t.bin{query}", cache_dir=cache)
    assert not cache.exists() or list(cache.iterdir()) == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_too_small_says_what_is_needed(tmp_path: Path, cache: Path) -> None:
    data = prepare(f"file:{write_file(tmp_path / 'a.txt', 'x' * 1000)}", cache_dir=cache)
    require_windows(data, 50)
    with pytest.raises(DataError) as e:
        require_windows(data, 51)
    assert str(e.value).endswith(
        "a.txt is too small: 951 training and 51 validation tokens, but data.seq_len 51 needs at least 52 of each."
    )
    for text in ("", "\n", "xy"):
        with pytest.raises(DataError, match=r"a\.txt is too small: \d tokens remain for training and 0 for validation"):
            prepare(f"file:{write_file(tmp_path / 'a.txt', text)}", cache_dir=cache)
    assert [p.name for p in cache.iterdir()] == [data.folder.name]


def test_a_limit_that_is_too_small_is_not_blamed_on_the_corpus(tmp_path: Path, cache: Path) -> None:
    lines = "\n".join(json.dumps({"text": f"document {i} " * 20}) for i in range(40))
    source = f"file:{write_file(tmp_path / 'd.jsonl', lines)}"
    with pytest.raises(DataError, match=r"^--max-tokens: 10 tokens of .* hold no whole document for training and validation"):
        prepare(source, cache_dir=cache, max_tokens=10)
    data = prepare(source, cache_dir=cache, max_tokens=6000)
    with pytest.raises(DataError, match="validation tokens, since it was prepared with --max-tokens 6,000, but"):
        require_windows(data, 5000)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokenizer": "bpf:9"}, "data.tokenizer: unknown tokenizer 'bpf:9'"),
        ({"val_fraction": 0.0}, "data.val_fraction: must lie between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "data.val_fraction: must lie between 0 and 1, got 1.0"),
        ({"val_fraction": float("nan")}, "data.val_fraction"),
        ({"source": "synthetic:markov", "tokenizer": "bpe:100"}, "data.tokenizer: synthetic:markov is tokens already"),
    ],
)
def test_bad_words_write_nothing(kwargs: dict, message: str, cache: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(**{"source": "pystdlib", "cache_dir": cache, **kwargs})
    assert not cache.exists()


def test_a_broken_source_leaves_no_trace(tmp_path: Path, cache: Path) -> None:
    path = write_file(tmp_path / "d.jsonl", '{"text": "fine"}\n' * 1000 + '{"text": ')
    with pytest.raises(DataError, match=r"d\.jsonl, line 1001: is not JSON"):
        prepare(f"file:{path}", cache_dir=cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = write_file(tmp_path / "file", "")
    with pytest.raises(StorageError, match=r"file: the token cache cannot be written: .*; set QUESTCTL_CACHE to another"):
        prepare("synthetic:markov?tokens=1000", cache_dir=blocked)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_can_be_read(tmp_path: Path, cache: Path) -> None:
    data = prepare("synthetic:markov?tokens=1000", cache_dir=cache)
    cache.chmod(0o500)
    try:
        assert same_tokens(prepare("synthetic:markov?tokens=1000", cache_dir=cache), data)
        with pytest.raises(StorageError, match="cannot be written: Permission denied"):
            prepare("synthetic:markov?tokens=1001", cache_dir=cache)
    finally:
        cache.chmod(0o700)


@pytest.mark.parametrize("room", [0, 1000, 300_000])
def test_a_disk_that_is_full(room: int, cache: Path) -> None:
    """A limit on the size of files stands for the end of the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(StorageError, match="the token cache cannot be written: File too large"):
            prepare("synthetic:markov?tokens=400000", cache_dir=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(cache.iterdir()) == []
    prepare("synthetic:markov?tokens=400000", cache_dir=cache)


def test_an_error_of_ours_inside_stays_what_it_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(QuestError, OSError):
        pass

    def stop(*_: object) -> None:
        raise Stop("stop")

    monkeypatch.setattr(tokens, "_build", stop)
    with pytest.raises(Stop):
        prepare("synthetic:markov?tokens=1000", cache_dir=cache)
    assert list(cache.iterdir()) == []
