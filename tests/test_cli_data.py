"""`questctl data prepare|info`: the JSON of token files, their sample, their progress, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import invoke, output

from questctl import console
from questctl.data import corpora, tokens


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUESTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def test_prepare_as_json_is_the_meta_and_the_hash(cache: Path) -> None:
    shown = json.loads(output("data", "prepare", "synthetic:markov?tokens=5000&vocab=8", "--val-fraction", "0.1", "--json"))
    data = tokens.open_dataset(Path(shown["folder"]))
    assert Path(shown["folder"]).parent == cache
    assert shown["data_hash"] == data.data_hash
    assert (shown["train"]["tokens"], shown["val"]["tokens"]) == (4500, 500)
    assert shown["entropy"] == pytest.approx(corpora.Markov(8, 1, 5000, 0).entropy())
    assert shown["dtype"] == "uint8"
    assert "sample" not in shown


def test_info_shows_tokens_and_a_sample(tmp_path: Path) -> None:
    content = "alpha\n" * 200 + "omega \x1b[31m é\n" * 20
    (tmp_path / "a.txt").write_text(content)
    text = output("data", "info", f"file:{tmp_path}/a.txt")
    assert f"{len(content[:-74].encode()) + 1:,}" in text  # 5 % of 1480 characters are held out
    assert "omega \ufffd[31m é" in text
    assert "\x1b[31m" not in text  # the text of a corpus does not command the terminal
    shown = json.loads(output("data", "info", f"file:{tmp_path}/a.txt", "--json"))
    assert shown["sample"].endswith("é\n")
    assert shown["val"]["bytes_per_token"] == 1.0


def test_info_of_ids_without_tokenizer(tmp_path: Path) -> None:
    np.arange(1000, 3000).astype(np.uint16).tofile(tmp_path / "t.bin")
    assert json.loads(output("data", "info", f"bin:{tmp_path}/t.bin", "--json"))["sample"].startswith("2900 2901 2902")
    assert "–" in output("data", "info", f"bin:{tmp_path}/t.bin")  # bytes per token are not known


def test_force_mends(tmp_path: Path) -> None:
    source = "synthetic:markov?tokens=5000"
    folder = Path(json.loads(output("data", "prepare", source, "--json"))["folder"])
    (folder / "val.bin").write_bytes(b"")
    assert "val.bin is damaged: 0 bytes" in output("data", "info", source, code=2)
    output("data", "prepare", source, "--force")
    output("data", "info", source)


def test_progress_goes_to_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.progress, "PLAIN_INTERVAL_S", 0.0)
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(400_000)))
    result = invoke("data", "prepare", f"file:{tmp_path}/a.txt", "--json")
    json.loads(result.stdout)
    assert f"file:{tmp_path}/a.txt: tokenizing, " in result.stderr
    assert "MB/s, " in result.stderr
    assert " left" in result.stderr


def test_mistakes_are_raised_before_anything_is_written(cache: Path) -> None:
    assert "did you mean 'pystdlib'" in output("data", "prepare", "pystdlb", code=2)
    assert "data.val_fraction" in output("data", "prepare", "pystdlib", "--val-fraction", "2", code=2)
    assert not cache.exists()
