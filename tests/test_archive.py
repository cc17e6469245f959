"""Archives: every reader gives the same before and after, kills lose nothing, damage is one sentence."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import report_runs
import tiny
from command_line import output, run_cli
from helpers import files_in, write_file
from tiny import dying_at

from questctl.errors import DataError, StorageError, UsageError
from questctl.scaling.comparison import compare_runs
from questctl.scaling.curves import load_curves
from questctl.scaling.sources import load_sources
from questctl.store import Run, RunStore
from questctl.store.listing import list_runs, remove_runs, run_details
from questctl.store.packing import archive_runs, restore_runs
from questctl.sweep.outcomes import read_outcomes
from questctl.sweep.sweep_file import Cell
from questctl.training.loop import train

CONFIGS = report_runs.configs(presets=("53K",), methods=("bf16", "quest-4"), ratios=(8, 16))
NAMES = sorted(config.run_id for config in CONFIGS)
WEIGHTS = b"weights" * 1000


@pytest.fixture
def root(tmp_path) -> Path:
    """Four finished runs with weights and an evaluation, and one that was preempted."""
    root = tmp_path / "runs"
    report_runs.write_all(root, CONFIGS, lines=40)
    for name in NAMES:
        write_file(root / name / "model.safetensors", name.encode() + WEIGHTS)
        write_file(root / name / "log.txt", "a line\n")
    report_runs.write(root, report_runs.config("53K", "ste", 2), state="preempted")
    return root


def without_paths(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in ("path", "imported_at")} for row in rows]


def answers(root: Path) -> list[object]:
    """What readers say of a folder of runs, without where the runs lie."""
    read = load_sources(root)
    shown = run_details(NAMES[0], root)
    return [
        without_paths(list_runs(root)),
        without_paths([run.row() for run in RunStore(root).runs()]),
        without_paths(list(read.records)),
        read.points.hash,
        [(curve.name, curve.loss.tolist()) for curve in load_curves(root).curves],
        compare_runs(NAMES[:2], root).to_json(),
        {key: size for key, size in shown.files.items() if key != "SHA256SUMS"},
        [outcome.state for outcome in read_outcomes([Cell(config, {}) for config in CONFIGS], RunStore(root))],
        {name: RunStore(root).run(name).model_path.read_bytes() for name in NAMES},
    ]


def test_all_readers_give_the_same_from_an_archive_and_after_it(root):
    before, files = answers(root), {name: Path(root, name).read_bytes() for name in files_in(root)}
    done = archive_runs(runs=root)
    assert done.runs == tuple(NAMES)
    assert list(done.left.values()) == ["is not finished (preempted)"]
    assert answers(root) == before
    assert sorted(p.name for p in root.iterdir() if not p.name.startswith(".")) == sorted(["archive.zip", *done.left])
    with zipfile.ZipFile(root / "archive.zip") as file:
        assert file.testzip() is None
        assert {info.compress_type for info in file.infolist() if info.filename.endswith(".safetensors")} == {
            zipfile.ZIP_STORED
        }
    assert restore_runs([NAMES[1][-8:]], root) == [NAMES[1]]
    assert (root / NAMES[1] / "result.json").exists()
    assert answers(root) == before
    assert restore_runs(runs=root) == [NAMES[0], *NAMES[2:]]
    assert {name: Path(root, name).read_bytes() for name in files_in(root) if not name.startswith(".")} == files


def test_runs_that_finish_later_join_the_archive(root):
    later = report_runs.config("107K", bits=4)
    archive_runs([NAMES[0]], root)
    archive_runs([NAMES[1]], root)
    report_runs.write(root, later)
    assert archive_runs(runs=root).runs == tuple(sorted([later.run_id, *NAMES[2:]]))
    assert {run.name for run in RunStore(root).runs() if run.is_archived} == {later.run_id, *NAMES}
    assert archive_runs(runs=root).runs == ()


def test_an_archive_elsewhere_is_a_source_of_its_own(root, tmp_path):
    points, file = load_sources(root).points.hash, tmp_path / "elsewhere" / "some.zip"
    file.parent.mkdir()
    assert archive_runs(runs=root, to=file, keep=True).runs == tuple(NAMES)
    assert load_sources(root).points.hash == load_sources(file).points.hash == points
    assert [row["run"] for row in list_runs(file)] == NAMES
    assert load_sources(RunStore(file).run(NAMES[2]).path).records[0]["run"] == NAMES[2]
    assert archive_runs(runs=root, to=file).runs == tuple(NAMES)  # the same content: only the folders go
    assert [run.name for run in RunStore(root).runs()] == [report_runs.config("53K", "ste", 2).run_id]
    assert restore_runs(runs=file) == NAMES
    assert not file.exists()
    assert Run(file.parent / NAMES[0]).result() is not None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"to": "packed.tar"}, "--to packed.tar: the name of an archive ends in .zip."),
        ({"to": "{root}/other.zip"}, "is archive.zip; name that, or a file in another folder"),
        ({"keep": True}, "--keep: a run of {root} is in a folder or in archive.zip, not in both"),
        ({"names": ["53K-ste"]}, "is not finished (preempted)"),
    ],
)
def test_what_is_refused(root, options, sentence):
    options = {key: value.format(root=root) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UsageError) as e:
        archive_runs(options.pop("names", ()), root, **options)
    assert sentence.format(root=root) in str(e.value)
    assert not (root / "archive.zip").exists()


def test_branches_find_their_trunks(root):
    write_file(root / NAMES[0] / "kept" / "step-00000001" / "state.json", "{}")
    assert archive_runs(runs=root).left[NAMES[0]] == "keeps checkpoints, from which branches may start"
    assert RunStore(root).run(NAMES[1]).sibling(NAMES[0]).checkpoint_path(1) is not None


def test_nobody_writes_into_an_archive(root):
    archive_runs(runs=root)
    run = RunStore(root).run(NAMES[0])
    way = "the run is in an archive (questctl runs restore takes it out)"
    with pytest.raises(StorageError, match=r"evaluations.jsonl: cannot be written: the run is in an archive") as e:
        run.add_evaluation({"loss": 1.0})
    assert way in str(e.value)
    with pytest.raises(StorageError, match="in an archive"), run.open_for_training(CONFIGS[0]):
        pass
    with pytest.raises(UsageError, match=re.escape(f"questctl runs restore {NAMES[0]} takes it out")):
        run.require_folder("--init")


def test_a_worker_that_looked_too_early_trains_nothing_again(root):
    config = next(c for c in CONFIGS if c.run_id == NAMES[0])
    archive_runs(runs=root)
    with pytest.raises(UsageError, match="is finished, and in"), Run(root / NAMES[0]).open_for_training(config):
        pass
    assert RunStore(root).run(NAMES[0]).state() == "done"
    assert [run.name for run in RunStore(root).runs()].count(NAMES[0]) == 1


def test_of_a_folder_and_an_archive_the_finished_one_counts(root):
    shutil.copytree(root / NAMES[0], root.parent / "copy")
    archive_runs(runs=root)
    os.rename(root.parent / "copy", root / NAMES[0])
    assert not RunStore(root).run(NAMES[0]).is_archived
    write_file(root / NAMES[0] / "evaluations.jsonl", '{"loss": 1.0, "time": "now"}\n')
    assert archive_runs(runs=root).runs == (NAMES[0],)  # in the place of what the archive had
    assert RunStore(root).run(NAMES[0]).evaluations() == [{"loss": 1.0, "time": "now"}]
    write_file(root / NAMES[0] / "config.json", RunStore(root).run(NAMES[0]).config_path.read_bytes())
    assert RunStore(root).run(NAMES[0]).is_archived
    assert len(RunStore(root).runs()) == len(NAMES) + 1
    assert restore_runs([NAMES[0]], root) == [NAMES[0]]
    assert RunStore(root).run(NAMES[0]).evaluations()


def test_removal_takes_a_run_from_both_places(root):
    shutil.copytree(root / NAMES[0], root.parent / "copy")
    archive_runs(runs=root)
    os.rename(root.parent / "copy", root / NAMES[0])
    remove_runs(NAMES[:2], root)
    assert [run.name for run in RunStore(root).runs() if run.result()] == NAMES[2:]


def test_a_damaged_archive_is_one_sentence(root):
    archive_runs(runs=root)
    file = root / "archive.zip"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for reader in (list_runs, load_sources, lambda root: RunStore(root).run(NAMES[0]), lambda root: restore_runs(runs=root)):
        with pytest.raises(DataError, match=r"archive.zip: is damaged \(File is not a zip file\); put a copy in its place"):
            reader(root)
    assert "archive.zip: is damaged" in run_cli("runs", "ls", "--runs", root, code=2).stderr
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("../run/SHA256SUMS", "")
    with pytest.raises(DataError, match="is no archive of runs"):
        list_runs(root)


def test_a_damaged_run_of_an_archive_is_named_and_not_restored(root):
    archive_runs(runs=root)
    file = root / "archive.zip"
    content = bytearray(file.read_bytes())
    content[content.index(NAMES[2].encode() + WEIGHTS) + 500] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{NAMES[2]}/model.safetensors: is damaged"):
        RunStore(root).run(NAMES[2]).model_path.read_bytes()
    with pytest.raises(DataError, match="is damaged"):
        restore_runs(runs=root)
    assert [run.name for run in RunStore(root).runs() if run.is_archived] == NAMES[2:]
    assert [row["state"] for row in list_runs(root)].count("done") == len(NAMES)


def test_weights_that_are_not_those_of_the_result_are_not_packed(root, monkeypatch):
    monkeypatch.setattr(Run, "model_sha256", lambda run: "0" * 64)
    with pytest.raises(DataError, match=r"model\.safetensors: is damaged"):
        archive_runs(runs=root)
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == sorted([*NAMES, report_runs.config("53K", "ste", 2).run_id])
    assert not list(root.glob(".*.tmp"))


def in_fork(job) -> int:
    """Run `job` in a fork to its end; the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            job()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("change", ["archive", "restore", "remove"])
def test_a_kill_at_any_moment_loses_nothing_and_doubles_nothing(tmp_path, change):
    """A process dies before each of its calls that change the folder; the same command, repeated, ends what it left."""
    calls = ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir", "link")
    made = tmp_path / "made"
    report_runs.write_all(made, CONFIGS[:3])
    names = sorted(config.run_id for config in CONFIGS[:3])
    jobs = {
        "archive": lambda root: archive_runs(runs=root),
        "restore": lambda root: restore_runs([n for n in names[:2] if RunStore(root).run(n).is_archived], root),
        "remove": lambda root: remove_runs([n for n in names[:2] if RunStore(root).run(n).exists()], root),
    }
    if change != "archive":
        archive_runs(runs=made)
    before = without_paths(list_runs(made))
    kills = 0
    for number in range(0, 200, 1 if change == "remove" else 5):
        root = tmp_path / f"runs-{number}"
        shutil.copytree(made, root)

        def job(root=root, number=number):
            dying_at(number, calls)
            jobs[change](root)

        killed = in_fork(job)
        after = without_paths(list_runs(root))
        assert [row["run"] for row in after] == sorted({row["run"] for row in after})
        if change == "remove":
            assert all(row in before for row in after)
        else:
            assert after == before
        if change != "restore" or RunStore(root).archive:
            jobs[change](root)
        left = [row for row in before if change != "remove" or row["run"] not in names[:2]]
        assert without_paths(list_runs(root)) == left
        if change == "archive":
            assert sorted(p.name for p in root.iterdir()) == ["archive.zip"]
        shutil.rmtree(root)
        kills += bool(killed)
        if not killed:
            break
    assert kills > 3
    assert not killed, "the range of calls was too short"


def test_two_processes_take_turns(root):
    from questctl.store.packing import changing

    with changing(root / "archive.zip"), pytest.raises(UsageError, match="another process is changing this archive; wait"):
        archive_runs(runs=root)
    assert not (root / "archive.zip").exists()


def test_commands(root):
    said = run_cli("runs", "archive", "--runs", root).stderr
    assert "packed 4 runs into" in said
    assert "left as a folder: 53K-ste-w2a2" in said
    assert NAMES[0] in output("runs", "show", NAMES[0], "--runs", root)
    assert "restored 1 runs" in run_cli("runs", "restore", NAMES[0], "--runs", root).stderr
    assert "removed 2 runs" in run_cli("runs", "rm", *NAMES[:2], "--yes", "--runs", root).stderr
    run_cli("runs", "restore", "--runs", root)
    assert "has no archive" in run_cli("runs", "restore", "--runs", root, code=2).stderr


def test_an_archived_run_writes_text_and_is_exported_and_to_begin_from_it_is_restored(tmp_path, monkeypatch):
    """What reads a run finds its weights in the archive; a checkpoint is read shard by shard, which needs its folder."""
    monkeypatch.chdir(tmp_path)
    name = train(tiny.config(tiny.QUEST, train__steps=4)).run

    def answers(folder: str) -> list[object]:
        text = output("generate", name, "1 2 3", "--max-tokens", 5)
        run_cli("export", name, "--format", "hf-dense", "--out", folder)
        return [text, {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix == ".safetensors"}]

    before = answers("before")
    archive_runs()
    assert not (tmp_path / "runs" / name).exists()
    assert answers("after") == before
    with pytest.raises(DataError, match=rf"; if it is in runs/archive.zip, questctl runs restore {name} takes it out;"):
        train(tiny.config(train__steps=3, model__init=f"runs/{name}"))
    restore_runs([name])
    assert train(tiny.config(train__steps=3, model__init=f"runs/{name}")).steps == 3
