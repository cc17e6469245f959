"""Estimates of vocabulary and tokens of a text before it is prepared; estimating writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import invoke, output
from test_tokenizers import word_level

from questctl.config import DataConfig
from questctl.data.size_estimate import CorpusEstimate, estimate_corpus, vocabulary
from questctl.data.tokens import prepare
from questctl.errors import DataError, UsageError

TEXT = "one two three\n" * 1000


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path


def tokens_in(folder: Path, ids: int = 2048, **meta: object) -> str:
    """A folder as nanoGPT leaves it, 9,000 and 1,000 tokens; its word."""
    folder.mkdir()
    for name, n in (("train", 9000), ("val", 1000)):
        (np.arange(n) % ids).astype(np.uint16).tofile(folder / f"{name}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))
    return f"bin:{folder.name}"


def test_of_each_kind_what_its_word_and_files_say(here: Path) -> None:
    pytest.importorskip("tokenizers")
    word_level(here / "table", 20)
    tokens_in(here / "said", vocab_size=2048)
    tokens_in(here / "unsaid")
    before = sorted(here.rglob("*"))
    for source, tokenizer, ids, tokens, exact in (
        ("file:a.txt", "byte", 256, len(TEXT) + 1, False),
        ("file:a.txt", "bpe:300", 300, len(TEXT) + 1, False),
        ("file:a.txt", "hf:./table", 20, len(TEXT) + 1, False),
        ("file:a.txt", "hf:OWNER/NAME", None, len(TEXT) + 1, False),
        ("synthetic:markov?vocab=7&tokens=1000", "byte", 7, 950, True),
        ("bin:said", "byte", 2048, 9000, True),
        ("bin:unsaid", "byte", None, 9000, True),
        ("bin:unsaid?vocab=5000", "byte", 5000, 9000, True),
        ("bin:said/val.bin?dtype=uint32&vocab=9", "byte", 9, 475, True),
        ("hf:OWNER/NAME?tokens=3M", "bpe:8192", 8192, 3_000_000, False),
        ("hf:OWNER/NAME", "byte", 256, None, False),
    ):
        data = DataConfig(source=source, tokenizer=tokenizer)
        assert estimate_corpus(data) == CorpusEstimate(ids, tokens, exact, vocab_exact="bpe" not in tokenizer), data
        assert vocabulary(data) == ids, data
    assert sorted(here.rglob("*")) == before


def test_a_packed_file_says_nothing_of_its_length(here: Path) -> None:
    import gzip

    (here / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert estimate_corpus(DataConfig(source="file:a.jsonl.gz")).train_tokens is None


@pytest.mark.parametrize(("source", "tokenizer"), [("file:a.txt", "byte"), ("file:a.txt", "bpe:300"), ("bin:unsaid", "byte")])
def test_what_was_prepared_is_known_exactly(here: Path, source: str, tokenizer: str) -> None:
    if tokenizer != "byte":
        pytest.importorskip("tokenizers")
    tokens_in(here / "unsaid", 1500)
    data = DataConfig(source=source, tokenizer=tokenizer)
    before = estimate_corpus(data)
    made = prepare(source, tokenizer)
    assert estimate_corpus(data) == CorpusEstimate(made.meta.vocab_size, len(made.train), exact=True)
    if before.train_tokens is not None:
        assert before.train_tokens >= len(made.train)
    (here / "a.txt").write_text(TEXT + "more")
    if source == "file:a.txt":
        assert not estimate_corpus(data).exact


def test_a_folder_that_was_prepared_is_read_as_it_is(here: Path) -> None:
    made = prepare("file:a.txt", out=here / "out")
    assert estimate_corpus(DataConfig(source="bin:out", tokenizer="bpe:300")) == CorpusEstimate(
        256, len(made.train), exact=True
    )


def test_what_cannot_be_is_refused_as_by_the_preparation() -> None:
    for source, tokenizer, kind in (
        ("file:nowhere.txt", "byte", DataError),
        ("bin:nowhere", "byte", DataError),
        ("pystdlub", "byte", UsageError),
        ("file:a.txt", "bpe:12", UsageError),
        ("file:a.txt", "bit", UsageError),
        ("synthetic:markov", "bpe:300", UsageError),
    ):
        with pytest.raises(kind) as seen:
            estimate_corpus(DataConfig(source=source, tokenizer=tokenizer))
        with pytest.raises(kind) as made:
            prepare(source, tokenizer)
        assert str(seen.value) == str(made.value)


# --- what commands make of it -----------------------------------------------------------------------------------------


def test_a_dry_run_costs_the_vocabulary_of_the_tokens_and_agrees_with_the_run(here: Path) -> None:
    source = tokens_in(here / "said", vocab_size=2048)
    words = ["train", f"--data={source}", "--steps=2", "--set=train.eval_tokens=128", "--json"]
    cost, result = json.loads(output(*words, "--dry-run")), json.loads(output(*words, "--quiet"))
    assert cost["vocab_size"] == 2048
    for key in ("run", "params_total", "flops"):
        assert cost[key] == result[key], key
    assert cost["disk_bytes"] == 40 * cost["params_total"] > 12_000_000
    said = invoke(*words[:2], "--steps=3", "--set=train.eval_tokens=128")
    assert "disk: at most 12.0 MiB while it trains, 1.2 MiB after" in said.stderr
    folder = Path(json.loads(output(*words))["path"])
    assert sum(p.stat().st_size for p in folder.iterdir()) == pytest.approx(1.2 * 2**20, rel=0.02)


def test_a_dry_run_says_that_a_vocabulary_is_not_known(here: Path) -> None:
    source = tokens_in(here / "unsaid", 300)
    words = ["train", f"--data={source}", "--steps=2", "--dry-run"]
    assert "not known before the text is prepared; counted as 256 ids" in output(*words)
    (here / "p.toml").write_text(f'[base]\ndata.source = "{source}"\ntrain.steps = 2\n')
    assert f"The vocabulary of {source} is not known before it is prepared" in output("sweep", "p.toml", "--dry-run")
    prepare(source)
    assert "300 ids" in output(*words)
    assert "is not known" not in output("sweep", "p.toml", "--dry-run")


def test_a_cell_that_fits_nowhere_by_its_vocabulary_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from questctl.sweep import slots

    source = tokens_in(here / "said", vocab_size=50304)
    base = f'[base]\ndata = {{ source = "{source}" }}\ntrain.device = "cpu"\ntrain.steps = 2\n'
    (here / "p.toml").write_text(base)
    monkeypatch.setattr(slots, "host_memory", lambda: 2**27)
    assert "needs at least 251.4 MiB" in output("sweep", "p.toml", "--dry-run", code=2)
    assert "needs at least 251.4 MiB" in output("sweep", "p.toml", code=2)
    assert "needs at least 251.4 MiB" in output("sweep", "p.toml", "--emit", code=2)
    (here / "p.toml").write_text(base.replace(source, "synthetic:markov"))
    output("sweep", "p.toml", "--dry-run")


def test_passes_are_counted_before_while_and_after_and_many_are_warned_of(here: Path) -> None:
    source = tokens_in(here / "said", 300, vocab_size=300)  # 9,000 training tokens
    words = ["train", f"--data={source}", "--set=train.eval_tokens=128", "--set=data.seq_len=64"]  # 1,024 tokens a step
    few, many = [*words, "--steps=8"], [*words, "--steps=36"]
    for args, often in ((few, False), (many, True)):
        passes = 1024 * int(args[-1][8:]) / 9000
        dry = invoke(*args, "--dry-run")
        assert f"{passes:.3g} passes over the text" in dry.stdout
        assert ("Beyond 4 a repeated token" in dry.stderr) == often
        assert json.loads(output(*args, "--dry-run", "--json"))["passes"] == pytest.approx(passes)
        done = invoke(*args)
        assert f"tokens ({passes:.3g} passes over the text)" in done.stderr
        assert f"{passes:.3g} passes over the text" in done.stdout
        assert ("Beyond 4 a repeated token" in done.stderr) == often
        run = json.loads(output(*args, "--json"))["run"]
        shown = json.loads(output("runs", "show", run, "--json"))
        assert shown["passes"] == pytest.approx(shown["tokens"] / 9000)
        assert "passes over the text" in output("runs", "show", run)


def test_fewer_validation_tokens_than_asked_for_are_said_with_both_numbers_and_recorded(here: Path) -> None:
    source = tokens_in(here / "said", 300, vocab_size=300)  # 1,000 validation tokens
    words = [f"--data={source}", "--set=data.seq_len=64", "--steps=2"]
    few = "has 1,000 validation tokens, so a loss is measured on 960 where 131,072 are asked for (train.eval_tokens)"
    for command in (["train", *words, "--dry-run"], ["train", *words], ["sweep", "p.toml", "--dry-run"]):
        (here / "p.toml").write_text(
            f'[base]\ndata = {{ source = "{source}", seq_len = 64 }}\n[matrix]\ntrain.steps = [3, 4]\n'
        )
        said = " ".join(invoke(*command).stderr.split())
        assert said.count(few) == 1, said
        assert ("The same holds for 1 of the other cells." in said) == (command[0] == "sweep")
    result = json.loads(output("train", *words, "--json"))
    run = result["run"]
    assert result["val_tokens"] == json.loads((here / "runs" / run / "result.json").read_text())["val_tokens"] == 960
    for tokens, warns in ((2000, True), (960, False), (64, False)):
        done = invoke("eval", run, f"--tokens={tokens}", "--json")
        assert ("validation tokens" in done.stderr) == warns
        assert json.loads(done.stdout)["tokens"] == min(tokens, 960)
    enough = invoke("train", *words, "--set=train.eval_tokens=1000", "--dry-run")  # as many as whole windows hold
    assert "validation tokens" not in enough.stderr


def test_a_text_that_is_not_prepared_has_about_as_many_validation_tokens(here: Path) -> None:
    (here / "b.txt").write_text("x" * 100_000)
    about = "file:b.txt has about 5,000 validation tokens, so a loss is measured on about 4,992"
    assert about in " ".join(invoke("train", "--data=file:b.txt", "--steps=2", "--dry-run").stderr.split())


def test_a_sweep_warns_once_of_all_cells_that_read_their_text_too_often(here: Path) -> None:
    (here / "p.toml").write_text(
        '[base]\ndata = { source = "file:a.txt", seq_len = 64 }\ntrain.eval_tokens = 64\n'
        "[matrix]\ntrain.steps = [1, 80, 90]\n"  # ≤ 14,001 tokens
    )
    dry = invoke("sweep", "p.toml", "--dry-run")
    assert dry.stderr.count("warning:") == 1
    assert "file:a.txt has at most 14K training tokens, and 92K are at least 6.58 passes" in dry.stderr
    assert "The same holds for 1 of the other cells." in dry.stderr
    few = invoke("sweep", "p.toml", "--dry-run", "--set=data.seq_len=32", "--set=train.batch_size=4")
    assert few.stderr == ""


def test_a_learned_vocabulary_is_a_bound_until_it_is_learned(here: Path) -> None:
    pytest.importorskip("tokenizers")
    words = ["train", "--data=file:a.txt", "--set=data.tokenizer=bpe:2000", "--set=data.seq_len=64", "--dry-run"]
    assert "at most 2,000 ids" in output(*words)
    output(*words, "--set=model.vocab_size=300")
    made = prepare("file:a.txt", "bpe:2000").meta.vocab_size
    assert 257 < made < 300
    assert f"  {made:,} ids" in output(*words)
    assert "model.vocab_size: 200 is smaller than the 256 ids" in output(
        "train", "--data=file:a.txt", "--set=model.vocab_size=200", "--dry-run", code=2
    )
