"""Checks of a run's text: tokens of another tokenizer are refused by every command that reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from command_line import invoke
from test_tokenizers import word_level

from questctl.config import QuantConfig
from questctl.data.tokenizers import load
from questctl.data.tokens import prepare
from questctl.errors import UsageError
from questctl.posttraining.quantize import quantize
from questctl.store import RunStore
from questctl.training.loop import train

TEXT = "w1 w5 w9 w2 w14 w3 "


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in full precision whose text was read by the table in `mine`; `other` differs from it in which id ends a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT * 500)
    word_level(tmp_path / "mine", 20)
    word_level(tmp_path / "other", 20, config={"eos_token": "w7"})
    result = train(tiny.config({"data.source": "file:a.txt", "data.tokenizer": "hf:./mine", "train.steps": 4}), runs="runs")
    return RunStore("runs").run(result.run)


def refused(*args: str) -> str:
    done = invoke(*args, "--runs", "runs")
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    return done.stderr


def digests(run) -> tuple[str, str]:
    """First digits of the hashes of the run's tokenizer and of the other."""
    return run.env()["tokenizer_hash"][:8], load("hf:./other").hash[:8]


EXPORT = ["export", "--format", "gguf", "--out", "out"]


@pytest.mark.parametrize("command", [["eval"], ["generate", "w1 w5"], EXPORT, ["probe"]])
def test_a_table_that_was_replaced_is_named_beside_the_runs(run, tmp_path, command):
    if command is EXPORT:
        pytest.importorskip("gguf")
    mine, other = digests(run)
    (tmp_path / "mine" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w7"}))
    said = refused(command[0], run.name, *command[1:])
    assert f"hf:./mine of file:a.txt has the hash {other}, but the run began with hf:./mine of hash {mine}" in said
    assert not (tmp_path / "out").exists()


def test_it_is_refused_to_go_on_with_too(run, tmp_path):
    mine, other = digests(run)
    run.result_path.unlink()
    (tmp_path / "mine" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w7"}))
    with pytest.raises(UsageError, match=f"has the hash {other}, but the run began with hf:./mine of hash {mine}: their ids"):
        train(run.config(), runs="runs")


@pytest.mark.parametrize("quantized", [False, True])
def test_another_text_in_the_ids_of_another_tokenizer_is_refused(run, quantized):
    mine, other = digests(run)
    if quantized:
        run = run.sibling(quantize(run, QuantConfig(weights="int4-rms-ste"), method="rtn").run)
    for name in ("mine", "other"):
        prepare("file:a.txt", f"hf:./{name}", out=run.path.parents[1] / f"of-{name}")
    said = refused("eval", run.name, "--data", "bin:of-other")
    assert f"bin:of-other is in the ids of hf:./other (hash {other}), {run.name} knows those of hf:./mine (hash {mine})" in said
    assert invoke("eval", run.name, "--data", "bin:of-mine", "--runs", "runs").exit_code == 0


def test_ids_that_stand_for_no_known_text_are_refused_beside_those_of_a_tokenizer(run, tmp_path):
    np.arange(2000, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    for source in ("synthetic:markov?vocab=16&tokens=20000", "bin:ids.bin?vocab=2000"):
        said = refused("eval", run.name, "--data", source)
        assert f"{source} holds ids of no known tokenizer, {run.name} knows those of hf:./mine; name the text itself" in said
    chain = train(tiny.config({"train.steps": 4}), runs="runs").run
    said = refused("eval", chain, "--data", "file:a.txt")
    assert (
        f"file:a.txt is text, {chain} knows the ids of synthetic:markov?vocab=16&tokens=20000, which stand for no kno" in said
    )
    np.arange(2000, dtype=np.uint16).tofile(tmp_path / "few.bin")
    (tmp_path / "meta.json").write_text('{"vocab_size": 16}')
    (np.arange(2000, dtype=np.uint16) % 16).tofile(tmp_path / "few.bin")
    assert f"is of another kind, {chain} knows the ids of synthetic:" in refused("eval", chain, "--data", "bin:few.bin")


def test_a_text_is_read_by_the_table_of_a_run_on_token_files(run, tmp_path):
    prepare("file:a.txt", "hf:./mine", out=tmp_path / "tokens")
    other = train(tiny.config({"data.source": "bin:tokens", "train.steps": 4}), runs="runs")
    (tmp_path / "b.txt").write_text(TEXT[::-1] * 400)
    read = json.loads(invoke("eval", other.run, "--data", "file:b.txt", "--runs", "runs", "--json").stdout)
    assert read["data_hash"] == prepare("file:b.txt", f"hf:{tmp_path}/tokens").data_hash
