"""The index of runs: lists read from it equal those read from the files, after any change of runs or index."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import report_runs

from questctl.errors import DataError
from questctl.scaling.sources import load_sources
from questctl.store import RunStore, runs_in
from questctl.store import index as index_module
from questctl.store.files import sha256
from questctl.store.listing import list_runs
from questctl.store.packing import archive_runs, restore_runs
from questctl.sweep.estimate import finished_speeds

CONFIGS = report_runs.configs(presets=("53K",), ratios=(8, 16))


@pytest.fixture(autouse=True)
def small_stores_have_an_index(monkeypatch):
    monkeypatch.setattr(index_module, "LEAST_NEW", 1)
    monkeypatch.setattr(index_module, "SETTLED_NS", 0)


class NoIndex(index_module.Index):
    """An index that knows nothing and is never written."""

    def get(self, run, looks):
        return None

    def write(self):
        pass


def answers(root: Path) -> list[object]:
    """All that is read through the index; of what is refused, the sentence."""

    def rows():
        return [run.row() for run in runs_in(root, facts=True)]

    def sources():
        read = load_sources(root)
        return read.records, read.damaged, [run.name for run in read.runs]

    out: list[object] = []
    for question in (lambda: list_runs(root), lambda: list_runs(root, state="done"), rows, sources):
        try:
            out.append(question())
        except DataError as e:
            out.append(str(e))
    return [*out, finished_speeds(RunStore(root), here=False)]


def agree(root: Path, monkeypatch) -> None:
    with_index = answers(root)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "Index", NoIndex)
        assert answers(root) == with_index
    assert answers(root) == with_index


def mutate(root: Path, rng: random.Random, spare: list, old: list[bytes]) -> str:
    """Change something in the folder or its index, at random; what."""
    index = root / index_module.NAME
    folders = [run.path for run in RunStore(root).runs() if not run.is_archived]
    what = rng.choice(
        ["remove", "loss", "damage", "in place", "lose", "add", "truncate", "garbage", "wrong", "old", "gone", "pack"]
    )
    if what in ("remove", "loss", "damage", "in place", "lose") and folders:
        folder = rng.choice(folders)
        file = folder / rng.choice(["config.json", "status.json", "env.json", "result.json"])
        if what == "remove":
            shutil.rmtree(folder)
        elif what == "loss" and (result := folder / "result.json").exists():
            values = json.loads(result.read_text()) | {"loss": rng.random()}
            (folder / "new").write_text(json.dumps(values))
            os.replace(folder / "new", result)
        elif what == "damage" and file.exists():
            file.write_bytes(file.read_bytes()[: rng.randrange(5)])
        elif what == "in place" and (result := folder / "result.json").exists():
            time.sleep(0.02)  # longer than a tick of the clock of files
            result.write_text(result.read_text().replace("0", "1"))
        elif what == "lose" and file.name != "config.json":
            file.unlink(missing_ok=True)
    elif what == "add" and spare:
        report_runs.write(root, spare.pop())
    elif what in ("truncate", "garbage", "wrong") and index.exists():
        content = index.read_bytes()
        old.append(content)
        wrong = json.dumps({"code": index_module.code(), "runs": [1, 2]}).encode()
        changed = {
            "truncate": content[: rng.randrange(len(content))],
            "garbage": rng.randbytes(50),
            "wrong": rng.choice([content.replace(b"bf16", b"bf61"), f"{sha256(wrong)}\n".encode() + wrong]),
        }
        index.write_bytes(changed[what])
    elif what == "old" and old:
        index.write_bytes(rng.choice(old))
    elif what == "gone":
        index.unlink(missing_ok=True)
    elif what == "pack":
        if RunStore(root).archive and rng.random() < 0.5:
            restore_runs(runs=root)
        else:
            archive_runs(runs=root)
    return what


@pytest.mark.parametrize("seed", range(3))
def test_no_answer_depends_on_the_index(tmp_path, monkeypatch, seed):
    root, rng, old = tmp_path / "runs", random.Random(seed), []
    report_runs.write_all(root, CONFIGS[:4])
    report_runs.write(root, CONFIGS[4], state="failed", message="no")
    spare = report_runs.configs(presets=("107K",), methods=("bf16", "ste-2"), ratios=(8, 16))
    agree(root, monkeypatch)
    assert (root / index_module.NAME).exists()
    for _ in range(12):
        mutate(root, rng, spare, old)
        agree(root, monkeypatch)


def test_unchanged_runs_are_not_read_again(tmp_path, monkeypatch):
    report_runs.write_all(tmp_path, CONFIGS[:3])
    rows = list_runs(tmp_path)
    monkeypatch.setattr("questctl.store.runs.read_json", lambda *_: pytest.fail("a file was read"))
    assert list_runs(tmp_path) == rows
    monkeypatch.setattr(index_module, "code", lambda: "other code")
    with pytest.raises(pytest.fail.Exception, match="a file was read"):
        list_runs(tmp_path)


def test_a_file_that_has_just_changed_is_not_entered(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SETTLED_NS", 3600 * 10**9)
    report_runs.write_all(tmp_path, CONFIGS[:2])
    list_runs(tmp_path)
    assert not (tmp_path / index_module.NAME).exists()


def test_small_stores_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "LEAST_NEW", 3)
    report_runs.write_all(tmp_path, CONFIGS[:2])
    list_runs(tmp_path)
    assert not (tmp_path / index_module.NAME).exists()
    report_runs.write(tmp_path, CONFIGS[2])
    list_runs(tmp_path)
    assert (tmp_path / index_module.NAME).exists()


def test_a_folder_that_cannot_be_written_is_read_without_one(tmp_path, monkeypatch):
    report_runs.write_all(tmp_path, CONFIGS[:2])

    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_module, "write_bytes", refuse)
    assert [row["state"] for row in list_runs(tmp_path)] == ["done", "done"]
    assert not (tmp_path / index_module.NAME).exists()
