"""Common mistakes of users: each error names the words to type instead."""

from __future__ import annotations

import pytest
import tiny
from command_line import invoke
from helpers import write_file

from questctl.config.layers import known_keys
from questctl.errors import unknown
from questctl.store import RunStore
from questctl.words import choices

MEANT = {
    "train --set lr=1e-3": "--set: unknown key 'lr'; did you mean 'optim.lr'?",
    "train --set train.lr=1e-3": "did you mean 'optim.lr'?",
    "train --set optim.learning_rate=1e-3": "did you mean 'optim.lr'?",
    "train --set max_steps=5": "did you mean 'train.steps'?",
    "train --set batch_size=5": "did you mean 'train.batch_size'?",
    "train --config typo.toml": "typo.toml: unknown key 'train.stepz'; did you mean 'train.steps'?",
    "sweep axis.toml": "axis.toml: matrix: unknown key 'lr'; did you mean 'optim.lr'?",
    "train --quant QUEST --bits 4": "unknown method 'QUEST'; did you mean 'quest'?",
    "train --quant quest-w4a4": "'quest-w4a4' is a scheme; write --quant quest --bits 4.",
    "train --quant lsq-w4a8": "'lsq-w4a8' is a scheme; write --quant lsq --bits w4a8.",
    "train --quant int4-h64-rms-trust": "is a spec; write --set quant.weights=int4-h64-rms-trust --set quant.activations=int4",
    "train --bits w4a4": "quant.bits: 'w4a4' is not a number of bits; write --bits 4.",
    "train --bits W2A2": "write --bits 2.",
    "train --bits w4a16": "write --bits 4 --set quant.weight_only=true.",
    "train --bits w4a8": "write --set quant.weights=int4-h64-rms-trust --set quant.activations=int8-h64-rms-trust without",
    "train --bits int4": "write --bits 4.",
    "train --bits 4bit": "write --bits 4.",
    "train --data my.txt": "data.source: 'my.txt' names no kind of source; a path is written file:my.txt.",
    "train --data no/where.jsonl": "a path is written file:no/where.jsonl, a data set of the Hub hf:no/where.jsonl.",
    "train --data tokens.bin": "a path is written bin:tokens.bin.",
    "train --config swept.toml": "swept.toml: is no config but a sweep file; questctl sweep swept.toml trains it.",
    "train --config studied.toml": "questctl study studied.toml trains it.",
    "train swept.toml": "questctl sweep swept.toml trains the sweep file",
    "train config.toml": "--config config.toml takes the config",
    "train my.txt": "--data file:my.txt trains on it",
    "sweep config.toml": "config.toml: is no sweep file but a config; questctl train --config config.toml trains it.",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "my.txt", "some text")
    write_file(tmp_path / "typo.toml", "train.stepz = 3")
    write_file(tmp_path / "config.toml", "train.steps = 3")
    write_file(tmp_path / "axis.toml", "[matrix]\nlr = [1e-3]")
    write_file(tmp_path / "swept.toml", "[matrix]\ntrain.seed = [0, 1]")
    write_file(tmp_path / "studied.toml", "[matrix]\ntrain.seed = [0, 1]\n[study]\n")


@pytest.mark.parametrize("command", MEANT)
def test_a_mistake_has_a_way_out(command, here):
    done = invoke(*command.split(), columns=200)
    assert done.exit_code == 2
    assert MEANT[command] in done.stderr
    assert len(done.stderr) < 300 or done.stderr.startswith("Usage")


def test_a_run_given_as_a_sweep(here, tmp_path):
    config = tiny.config()
    RunStore("runs").run(config.run_id).create(config)
    shown = f"questctl runs show {config.run_id} shows"
    for word in (config.run_id, f"runs/{config.run_id}"):
        assert f"error: {word}: is a run, not a sweep; {shown} it." in invoke("sweep", word).stderr
        assert f"{shown} the run" in " ".join(invoke("train", word, columns=200).stderr.replace("│", " ").split())


def test_the_nearest_three_of_many_choices():
    many = [f"quite-{i}-other" for i in range(40)] + ["near-by", "nearby", "nearly"]
    assert unknown("key", "nearb", many, what="word", all_by="questctl words") == (
        "key: unknown word 'nearb'; did you mean 'nearby'? The nearest words are nearby, near-by, nearly; "
        "questctl words lists all."
    )
    assert unknown("key", "nearb", many, what="word") == (
        "key: unknown word 'nearb'; did you mean 'nearby'? Choices: nearby, near-by, nearly, quite-0-other, quite-1-other, "
        "quite-2-other, quite-3-other, quite-4-other and 35 more."
    )
    assert choices([f"c{i}" for i in range(21)] + ["Los"], "loss") == "Los, c0, c1, c2, c3, c4, c5, c6 and 14 more"
    assert choices(["b", "loss"], "loss") == "b, loss"
    assert unknown("key", "QUEST", ["ste", "quest"]) == "key: unknown value 'QUEST'; did you mean 'quest'? Choices: ste, quest."
    assert unknown("key", "zzz", ["a", "b"]) == "key: unknown value 'zzz'; choices: a, b."


@pytest.mark.parametrize("key", sorted(".".join(key) for key in known_keys() if len(key) == 2 and key[1] != "beta2"))
def test_every_key_is_found_by_its_last_part_and_with_a_letter_missing(key):
    names = {".".join(k): about for k, about in known_keys().items()}
    twins = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    for mistyped in (key.split(".")[-1], key[:-1], "model." + key.split(".")[-1]):
        if mistyped not in names:
            sentence = unknown("--set", mistyped, names, what="key", all_by="x")
            assert any(f"did you mean '{twin}'?" in sentence for twin in twins), sentence
