"""Truncated or corrupted files, and a disk that refuses writes: the same result, or an error of one sentence.

A run that was killed between two checkpoints has one of its files damaged and is gone on with. It must either end with the very
bytes of an undisturbed run, or refuse by naming the file; what it had acknowledged is then still there.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import tally
import tiny
import torch

from questctl.errors import DataError, QuestError
from questctl.store import RunStore
from questctl.training.loading import load_model
from questctl.training.loop import Trainer, train

CONFIG = tiny.config(tiny.QUEST)
REFUSED = 42
CALLS = ("fsync", "replace", "rename", "mkdir", "open", "link", "write")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """What an undisturbed run ends with, and the folder of one that was killed at step 11, with its cache of tokens."""
    root = tmp_path_factory.mktemp("begun")
    assert tiny.in_child(go_on, root / "whole", CONFIG) == 0
    assert tiny.in_child(killed, root / "killed", CONFIG) == -signal.SIGKILL
    tally.COUNTS["killed: a training process"] += 1
    return tiny.outcome(root / "whole" / CONFIG.run_id), root / "killed"


def go_on(root: Path, config) -> None:
    """Train; a refusal leaves its sentence in the file `said`."""
    try:
        train(config, runs=root)
    except QuestError as e:
        (root / "said").write_text(str(e))
        os._exit(REFUSED)


def killed(root: Path, config) -> None:
    real = Trainer.step

    def deadly(self):
        real(self)
        if self.counters.step == 11:
            tiny.die()

    Trainer.step = deadly
    train(config, runs=root)


def damage(path: Path, dice: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if dice.random() < 0.4:
        path.write_bytes(data[: dice.randrange(len(data))])
        return "truncated"
    at = dice.randrange(len(data))
    data[at] ^= 1 << dice.randrange(8)
    path.write_bytes(data)
    return "bit flipped"


def files(folder: Path) -> list[str]:
    """All files of the killed run but its lease and its reserve, which hold nothing."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name not in ("lease", "reserve.tmp")]
    return sorted(str(p.relative_to(folder)) for p in found)


def survives(begun, root: Path, name: str, dice: random.Random) -> None:
    expected, source = begun
    shutil.copytree(source, root)
    run = RunStore(root).run(CONFIG.run_id)
    how = damage(run.path / name, dice)
    tally.COUNTS[f"{how}: {Path(name).name}"] += 1
    code = tiny.in_child(go_on, root, CONFIG)
    if code == REFUSED:
        said = (root / "said").read_text()
        assert str(run.path) in said, (name, how, said)
        assert "\n" not in said
        assert run.checkpoints_path.exists()
        return
    assert code == 0, (name, how)
    assert tiny.outcome(run.path) == expected, (name, how)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_file_changes_no_result(begun, tmp_path, seed):
    dice = random.Random(seed)
    for i, name in enumerate(files(begun[1] / CONFIG.run_id)):
        survives(begun, tmp_path / str(i), name, dice)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(10, 18))
def test_many_damaged_files_change_no_result(begun, tmp_path, seed):
    test_a_damaged_file_changes_no_result(begun, tmp_path, seed)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_damaged_tokens_are_refused_or_made_anew(begun, tmp_path, monkeypatch, name):
    expected, source = begun
    for seed in range(3):
        root, cache = tmp_path / f"runs{seed}", tmp_path / f"cache{seed}"
        shutil.copytree(source, root)
        shutil.copytree(os.environ["QUESTCTL_CACHE"], cache)
        for path in cache.rglob(name):
            tally.COUNTS[f"{damage(path, random.Random(seed))}: {name}"] += 1
        code = tiny.in_child(in_cache, cache, root, CONFIG)
        if code == REFUSED:
            assert name in (root / "said").read_text()
        else:
            assert code == 0
            assert tiny.outcome(root / CONFIG.run_id) == expected


def in_cache(cache: Path, root: Path, config) -> None:
    os.environ["QUESTCTL_CACHE"] = str(cache)
    go_on(root, config)


@pytest.mark.parametrize("seed", range(3))
def test_a_bit_that_finished_weights_lost_is_noticed_where_they_are_loaded(begun, tmp_path, seed):
    shutil.copytree(begun[1].parent / "whole", tmp_path, dirs_exist_ok=True)
    run = RunStore(tmp_path).run(CONFIG.run_id)
    whole = run.model_path.read_bytes()
    weights = load_model(run)
    at = random.Random(seed).randrange(len(whole) // 2, len(whole))  # among the tensors: what is in the header cannot be parsed
    run.model_path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << seed]) + whole[at + 1 :])
    tally.COUNTS["a bit flipped: model.safetensors of a finished run"] += 1
    with pytest.raises(DataError, match=r"model\.safetensors: is damaged .its hash differs.; restore it, or remove the run"):
        load_model(run)
    result = json.loads(run.result_path.read_text())
    del result["model_sha256"], result["seal"]  # as written by earlier versions
    run.result_path.write_text(json.dumps(result))
    changed = load_model(run).state_dict()
    assert sum(not torch.equal(changed[name], t) for name, t in weights.state_dict().items()) == 1


# --- a disk that refuses ----------------------------------------------------------------------------------------------


def failing_at_call(root: Path, config, number: int, code: int) -> None:
    """Call `number` of those that write fails with `code`, as do all of the next ten: a disk is not full for one call only."""
    calls = iter(range(10**6))

    def guarded(real):
        def call(*args, **kwargs):
            if number <= next(calls) < number + 10:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, guarded(getattr(os, name)))
    opened = {True: guarded(io.open), False: io.open}
    io.open = lambda file, mode="r", *args, **kwargs: opened["r" not in mode](file, mode, *args, **kwargs)
    go_on(root, config)
    os._exit(0)


def refuses(begun, root: Path, number: int, code: int) -> None:
    tally.COUNTS[f"refused by the disk: {errno.errorcode[code]}"] += 1
    assert tiny.in_child(failing_at_call, root, CONFIG, number, code) in (0, 1, REFUSED)
    assert tiny.in_child(go_on, root, CONFIG) == 0, (root / "said").read_text()
    assert tiny.outcome(root / CONFIG.run_id) == begun[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_costs_time_only(begun, tmp_path, code):
    for number in (6, 30, 60, 90):
        refuses(begun, tmp_path / str(number), number, code)


@pytest.mark.faults
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_at_every_third_call(begun, tmp_path, code):
    for number in range(0, 130, 3):
        refuses(begun, tmp_path / str(number), number, code)
