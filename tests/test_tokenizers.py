"""Tokenizers: what their ids mean, the same ids as the library gives, and words that cannot be meant."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from questctl.data import encode, tokenizers
from questctl.data.tokenizers import CUTS, from_table, train_bpe
from questctl.data.tokens import prepare, tokenizer_of
from questctl.errors import DataError, Unreachable, UsageError

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
    assert (byte.name, byte.vocab_size, byte.end) == ("byte", 256, 0)
    assert byte.hash == "7eac506e2ba91f4f432768ac99bb57115de44b0b77aaf9360a921b6a70696e0c"  # token files on disk bear it


# --- byte-pair encoding -----------------------------------------------------------------------------------------------

SENTENCES = [
    f"The {a} {b}s {i % 7} times; it's “{b}” — 日本語 и ещё\n\n    return x_{a}({i})\n"
    for i in range(40)
    for a, b in [("dog", "bark"), ("cat", "sleep"), ("tree", "grow")]
]


@pytest.fixture(scope="module")
def bpe() -> tokenizers.TableTokenizer:
    pytest.importorskip("tokenizers")
    return from_table("bpe:400", train_bpe(SENTENCES, 400))


def test_merges_are_learnt_and_bytes_are_always_there(bpe: tokenizers.TableTokenizer) -> None:
    assert 300 < bpe.vocab_size <= 400
    assert bpe.end == 0
    assert len(bpe.encode(SENTENCES[0])) < 0.4 * len(SENTENCES[0].encode())
    assert bpe.encode("\x00\x7f\U0010ffff").max() <= 256  # nothing is unknown


def test_the_first_merge_is_the_commonest_pair() -> None:
    pytest.importorskip("tokenizers")
    merges = json.loads(train_bpe(["ababab abab ab xy"], 259))["model"]["merges"]
    assert merges[0] in (["a", "b"], "a b")  # newer and older forms


special = st.sampled_from(
    ["<|endoftext|>", "'s", "'ll", " ", "\n", "\t", "  \n ", "12345", "日本", "ü", "\u2028", "\u00a0", "“", "x"]
)


@given(st.lists(special | text, max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_the_same_ids_as_the_library_and_back(bpe: tokenizers.TableTokenizer, t: str) -> None:
    ids = bpe.encode(t)
    assert ids.dtype == np.uint16
    assert ids.tolist() == bpe._library.encode(t, add_special_tokens=False).ids
    assert bpe.end not in ids  # text that spells the end is text
    assert bpe.decode(ids) == t


def test_a_table_that_cuts_otherwise_goes_by_the_library(bpe: tokenizers.TableTokenizer) -> None:
    table = json.loads(bpe.table)
    assert bpe._words is not None
    assert table["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == CUTS
    table["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S+"
    other = from_table("hf:x", json.dumps(table).encode())
    assert other._words is None
    assert other.hash != bpe.hash
    assert other.decode(other.encode(SENTENCES[0])) == SENTENCES[0]


@pytest.fixture(scope="module")
def gpt2(bpe: tokenizers.TableTokenizer) -> tokenizers.TableTokenizer:
    """The table with the words of GPT-2: split by the library's own expression."""
    table = json.loads(bpe.table)
    table["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return from_table("hf:gpt2", json.dumps(table).encode())


@pytest.fixture(scope="module")
def llama3(bpe: tokenizers.TableTokenizer) -> tokenizers.TableTokenizer:
    return from_table("bpe.llama3:400", train_bpe(SENTENCES, 400, family="llama3"))


def test_whose_words_a_table_cuts_is_known(
    bpe: tokenizers.TableTokenizer, gpt2: tokenizers.TableTokenizer, llama3: tokenizers.TableTokenizer
) -> None:
    assert [t.family for t in (bpe, gpt2, llama3)] == ["own", "gpt2", "llama3"]
    for change in (
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel"}]},
    ):
        assert (
            tokenizers.TableTokenizer("x", json.dumps(json.loads(bpe.table) | {"pre_tokenizer": change}).encode(), 0).family
            == ""
        )


@pytest.fixture(scope="module")
def smollm(gpt2: tokenizers.TableTokenizer) -> tokenizers.TableTokenizer:
    """The table with the words of SmolLM2, whose tokenizer.json has these two steps."""
    table = json.loads(gpt2.table)
    digits = {"type": "Digits", "individual_digits": True}
    table["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, table["pre_tokenizer"]]}
    return from_table("hf:smollm", json.dumps(table).encode())


@pytest.mark.parametrize("family", ["gpt2", "smollm", "llama3"])
def test_the_tokenizer_inside_a_gguf_file_gives_the_ids_with_which_it_was_written(family, request, tmp_path):
    pytest.importorskip("gguf")
    from questctl.export.gguf import Writer, add_tokenizer
    from questctl.export.tokenizer import vocabulary

    written = request.getfixturevalue(family)
    assert written.family == family
    writer = Writer(tmp_path / "model.gguf", "llama")
    add_tokenizer(writer, vocabulary(written, written.vocab_size), "{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    name = f"gguf:{tmp_path / 'model.gguf'}"
    read = tokenizers.load(name)
    assert (read.name, read.vocab_size, read.end, read.family) == (name, written.vocab_size, written.end, family)
    for text in (*SENTENCES, "x = 12345 + 67\n\n  y", "\t<|endoftext|> é 日本 12"):
        assert read.encode(text).tolist() == written.encode(text).tolist()
        assert read.decode(read.encode(text)) == text
    assert json.loads(tokenizers.template_files(name)[1])["chat_template"] == "{{ messages }}"


def test_a_gguf_file_with_another_kind_of_tokenizer_is_refused_with_the_kinds_that_are_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    for model, words in (("llama", "default"), ("gpt2", "deepseek-llm")):
        writer = gguf.GGUFWriter(tmp_path / f"{words}.gguf", "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(words)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(DataError, match=f"of the model {model} with the words of {words}; only gpt2 .* smollm"):
            tokenizers.load(f"gguf:{tmp_path / words}.gguf")
    with pytest.raises(DataError, match=r"gguf:nowhere\.gguf does not exist"):
        tokenizers.load("gguf:nowhere.gguf")


def test_words_of_llama3_end_numbers_after_three_digits_and_leave_spaces(llama3: tokenizers.TableTokenizer) -> None:
    assert llama3.encode(" 12345").tolist() == [i for word in (" ", "123", "45") for i in llama3.encode(word).tolist()]
    spelled = [llama3.decode([i]) for i in range(257, llama3.vocab_size)]
    words = [
        word for word in spelled if len(llama3._library.pre_tokenizer.pre_tokenize_str(word)) == 1 and "\ufffd" not in word
    ]
    assert len(words) > 50
    assert all(len(llama3.encode(word)) == 1 for word in words)  # a word that is a token is that token


@given(st.lists(special | text | st.sampled_from(["foo bar", "a 1", "1 a", "é é", " . "]), max_size=20).map("".join))
@settings(max_examples=100, deadline=None)
def test_a_long_text_has_the_ids_of_its_pieces(
    bpe: tokenizers.TableTokenizer, gpt2: tokenizers.TableTokenizer, llama3: tokenizers.TableTokenizer, t: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "_PIECE", 4)
        for tokenizer in (tokenizers.load("byte"), bpe, gpt2, llama3):
            some = list(tokenizers.pieces(tokenizer, t))
            assert "".join(some) == t
            ids = [i for piece in some for i in tokenizer.encode(piece).tolist()]
            assert ids == tokenizer.encode(t).tolist()
            assert encode.encode(tokenizer, [t])[0].tolist() == [*ids, tokenizer.end]
    assert tokenizers.utf8_size(t) == len(t.encode())


def test_a_text_is_cut_only_where_the_table_allows(bpe: tokenizers.TableTokenizer, gpt2: tokenizers.TableTokenizer) -> None:
    long = "word " * 500_000
    assert len(list(tokenizers.pieces(bpe, long))) == len(list(tokenizers.pieces(gpt2, long))) == 3
    assert len(list(tokenizers.pieces(bpe, "w" * 3_000_000))) == 1
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": None}, {"pre_tokenizer": {"type": "Whitespace"}}):
        other = from_table("hf:x", json.dumps(json.loads(gpt2.table) | change).encode())
        assert list(tokenizers.pieces(other, long)) == [long]


PEAK = """
import resource, sys
from pathlib import Path
import numpy, tokenizers
from questctl.data.tokens import prepare
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
prepare("file:" + sys.argv[1], sys.argv[2], cache_dir=Path(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("byte", 4), ("bpe:300", 5)])
def test_a_long_line_takes_a_few_times_its_size(name: str, most: float, tmp_path: Path) -> None:
    """The text, its training part and its ids, and a hundredth of that for what a tokenizer makes of it on the way."""
    pytest.importorskip("tokenizers")
    line = tmp_path / "line.txt"
    line.write_text("".join(f"{w}{i} " for i in range(1_000) for w in SENTENCES[i % 120].split()) * 200)
    command = [sys.executable, "-c", PEAK, str(line), name, str(tmp_path / "cache")]
    assert int(subprocess.check_output(command, text=True)) < most * line.stat().st_size + 50_000_000


TRAIN = (
    "import sys, hashlib; from questctl.data.tokenizers import train_bpe; sys.path.insert(0, {here!r});"
    "from test_tokenizers import SENTENCES; print(hashlib.sha256(train_bpe(SENTENCES, 400)).hexdigest())"
)


def test_training_is_the_same_in_every_process(bpe: tokenizers.TableTokenizer) -> None:
    import hashlib

    here = str(Path(__file__).parent)
    for threads in ("1", "3"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        printed = subprocess.check_output([sys.executable, "-c", TRAIN.format(here=here)], env=env, text=True)
        assert printed.strip() == hashlib.sha256(bpe.table).hexdigest()


def test_it_learns_from_so_much_text_and_no_more() -> None:
    pytest.importorskip("tokenizers")
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "some text " * 1000

    train_bpe(endless(), 300)
    assert 10_000 * (taken - 1) <= tokenizers.TRAINING_BYTES * 300 + 10_000


@pytest.mark.parametrize("kind", ["bpe", "bpe.llama3"])
def test_prepared_with_its_own_tokenizer(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    source, cache = tmp_path / "d.jsonl", tmp_path / "cache"
    source.write_text("".join(json.dumps({"text": f"{s} {i}"}) + "\n" for i, s in enumerate(SENTENCES * 5)))
    data = prepare(f"file:{source}", f"{kind}:400", cache_dir=cache)
    own = tokenizer_of(data)
    assert own is not None
    assert (own.hash, data.meta.dtype) == (data.meta.tokenizer_hash, "uint16")
    ends = np.flatnonzero(data.val == own.end)
    held_out = own.decode(data.val[: ends[0]])
    assert held_out.startswith("The ")
    train = own.decode(data.train)
    assert held_out + tokenizers.END not in tokenizers.END + train
    assert data.meta.train.bytes_per_token == pytest.approx(
        (len(train.replace(tokenizers.END, "").encode()) + int((data.train == own.end).sum())) / len(data.train)
    )
    kept = [p.stat().st_mtime_ns for p in (cache / "tokenizers").iterdir()]
    assert prepare(f"file:{source}", f"{kind}:400", cache_dir=cache, force=True).data_hash == data.data_hash
    assert [p.stat().st_mtime_ns for p in (cache / "tokenizers").iterdir()] == kept  # trained once
    again = prepare(f"file:{source}", f"hf:{data.folder}", cache_dir=cache)  # a folder that was prepared has a tokenizer
    assert (again.data_hash, again.meta.tokenizer_hash) == (data.data_hash, data.meta.tokenizer_hash)
    table = data.folder / "tokenizer.json"
    table.write_text(table.read_text().replace('"id":0,', '"id":0 ,').replace("dog", "god"))
    with pytest.raises(DataError, match=r"tokenizer\.json (is not the tokenizer of these tokens|cannot be read)|its tokenizer"):
        tokenizer_of(data)


# --- tables of others -------------------------------------------------------------------------------------------------


def word_level(folder: Path, vocab: int, end: str = "</s>", config: object = None) -> Path:
    """A model's folder whose tokenizer knows `vocab` words, w0, w1, …"""
    library = pytest.importorskip("tokenizers")
    words = {**{f"w{i}": i for i in range(vocab - 1)}, end: vocab - 1}
    table = library.Tokenizer(library.models.WordLevel(words, unk_token="w0"))
    table.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    table.enable_truncation(3)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(table.to_str())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_table_of_more_than_65536_ids_is_stored_in_four_bytes(tmp_path: Path) -> None:
    folder = word_level(tmp_path / "m", 70_000)
    (tmp_path / "a.txt").write_text("w5 w69998 " * 500)
    data = prepare(f"file:{tmp_path}/a.txt", f"hf:{folder}", cache_dir=tmp_path / "cache")
    assert (data.meta.dtype, data.meta.vocab_size) == ("uint32", 70_000)
    assert data.train[:4].tolist() == [5, 69_998, 5, 69_998]  # the table's own truncation to three is not asked for
    assert data.train[-1] == 69_999
    assert data.meta.train.bytes_per_token == pytest.approx(5, abs=0.1)


def test_the_end_of_a_text_is_what_the_model_says(tmp_path: Path) -> None:
    said = {"eos_token": {"content": "w7"}}
    assert tokenizers.load(f"hf:{word_level(tmp_path / 'a', 20, config=said)}").end == 7
    assert tokenizers.load(f"hf:{word_level(tmp_path / 'b', 20, config={'eos_token': 'w3'})}").end == 3
    assert tokenizers.load(f"hf:{word_level(tmp_path / 'c', 20)}").end == 19
    with pytest.raises(DataError, match="has no token that ends a text"):
        tokenizers.load(f"hf:{word_level(tmp_path / 'd', 20, end='stop')}")
    (tmp_path / "d" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"its tokenizer\.json cannot be read"):
        tokenizers.load(f"hf:{tmp_path}/d")


def test_without_a_network_hf_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unreachable, match=r"hf:nobody/nothing is not in the hub's cache, and the hub cannot be reached\.") as e:
        tokenizers.load("hf:nobody/nothing")
    assert e.value.exit_code == 5
    pytest.importorskip("datasets")
    with pytest.raises(Unreachable, match="the hub cannot be reached; hf: needs a network or a folder"):
        prepare("hf:nobody/nothing", cache_dir=tmp_path)
    assert [p for p in tmp_path.iterdir() if not p.name.startswith("tok")] == []


# --- several processes ------------------------------------------------------------------------------------------------


def test_workers_give_the_same_ids_in_the_same_order(bpe: tokenizers.TableTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "INLINE_BYTES", 1000)
    batches = [SENTENCES[i : i + 7] for i in range(0, len(SENTENCES), 7)]
    with encode.Encoder(bpe, workers=2) as encoder:
        futures = [encoder.submit(batch) for batch in batches]
        found = [row.tolist() for future in futures for row in future.result()]
        processes = list(encoder._processes)
    assert found == [[*bpe.encode(t).tolist(), bpe.end] for t in SENTENCES]
    assert len(processes) == 2
    assert [p.returncode for p in processes] == [0, 0]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bite", r"data\.tokenizer: unknown tokenizer 'bite'; did you mean 'byte'\?"),
        ("byte:3", "'byte' takes no argument, got 'byte:3'"),
        ("", "unknown tokenizer ''; choices: byte, bpe, bpe.llama3, hf"),
        ("bpe", "bpe:V needs a number of ids from 257 to 1,048,576, got 'bpe:'"),
        ("bpe:256", "from 257"),
        ("bpe.llama3:12", r"bpe\.llama3:V needs a number of ids from 257 to 1,048,576, got 'bpe\.llama3:12'"),
        ("bpe.llama3:8192", r"bpe\.llama3:8192 is trained on a corpus"),
        ("bpe:8k", "got 'bpe:8k'"),
        ("bpe:8192", "is trained on a corpus; name a folder that was prepared with it"),
        ("hf", "'hf' needs a name"),
    ],
)
def test_words_that_cannot_be_meant(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tokenizers.load(word)
