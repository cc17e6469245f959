"""Checkpoints: the same bits back, whole or absent, damage found and named, nothing executed."""

import errno
import json
import math
import os
import pickle
import resource
import shutil
import threading
from contextlib import suppress

import pytest
import tiny
import torch

from questctl.errors import DataError
from questctl.store import checkpoint_steps
from questctl.training import checkpoint
from questctl.training.checkpoint import Checkpoint, load, load_latest, save


def made(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {f"w{i}": torch.randn(shape, generator=generator) for i, shape in enumerate([(3, 5), (7,), (), (0, 2)])}
    tensors["half"] = torch.randn(4, 4, generator=generator).bfloat16()
    tensors["turned"] = torch.randn(4, 6, generator=generator).T
    state = {"step": step, "loss_sum": 0.1 + 0.2, "tiny": 5e-324, "big": 1.7976931348623157e308}
    return Checkpoint(step, tensors, {f"{k}/exp_avg": v * 2 for k, v in tensors.items()}, state)


def same(a, b):
    assert (a.step, a.state) == (b.step, b.state)
    for x, y in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            assert torch.equal(x[name], y[name])
    return True


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_the_same_bits_back(tmp_path):
    folder = tmp_path / "checkpoints"
    assert load_latest(folder) is None
    path = save(folder, made(7))
    assert path.name == "step-00000007"
    assert same(load(path), made(7))
    assert same(load_latest(folder), made(7))


def test_the_last_two_are_kept_and_the_newest_is_taken(tmp_path):
    for step in (1, 2, 30):
        save(tmp_path, made(step))
    assert checkpoint_steps(tmp_path) == [2, 30]
    assert same(load_latest(tmp_path), made(30))
    save(tmp_path, made(30))  # again, as a stop right after a resume may do
    assert checkpoint_steps(tmp_path) == [2, 30]


FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "first bit", "middle bit", "last bit", "longer"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, made(4))
    path = save(tmp_path, made(8)) / name
    data = bytearray(path.read_bytes())
    at = {"first bit": 0, "middle bit": len(data) // 2, "last bit": len(data) - 1}.get(damage)
    if at is not None:
        data[at] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "longer": data + b"x"}.get(damage, data))
    with pytest.warns(UserWarning, match=rf"{name}: .* going back to the checkpoint before it"):
        assert same(load_latest(tmp_path), made(4))
    assert same(load_latest(tmp_path), made(4))  # without a second warning: the damaged one was set aside
    assert (tmp_path / "damaged-step-00000008").is_dir()


def test_nothing_intact_is_one_sentence(tmp_path):
    for step in (4, 8):
        (save(tmp_path, made(step)) / "state.json").write_text("{")
    with pytest.warns(match="damaged"), pytest.raises(DataError, match=r"step-00000004.* none before it; remove the run") as e:
        load_latest(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", [{"schema": 99}, {"step": 9}, {"sha256": {}}, {"state": {}}])
def test_an_edited_state_is_refused(tmp_path, change):
    path = save(tmp_path, made(4)) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(DataError, match=r"state.json: (is damaged|schema 99)"):
        load(path.parent)


def test_a_pickle_in_its_place_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    path = save(tmp_path / "c", made(4))
    for name in FILES:
        (path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.warns(match="damaged"), pytest.raises(DataError):
        load_latest(tmp_path / "c")
    assert not (tmp_path / "boom").exists()
    with pytest.raises(DataError, match="is damaged"):
        checkpoint.load_tensors(tmp_path / "c" / "damaged-step-00000004" / "model.safetensors")


@pytest.mark.parametrize(("failing", "call"), [*(("fsync", i) for i in range(5)), ("replace", 0)])
def test_a_full_disk_leaves_the_earlier_one_and_no_part(tmp_path, monkeypatch, failing, call):
    save(tmp_path, made(4))
    before, real, calls = files(tmp_path), getattr(os, failing), iter(range(100))

    def limited(*args):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as m:
        m.setattr(checkpoint.os, failing, limited)
        with suppress(OSError):
            save(tmp_path, made(8))
    if checkpoint_steps(tmp_path) == [4]:
        assert files(tmp_path) == before
    assert same(load_latest(tmp_path), made(max(checkpoint_steps(tmp_path))))
    assert not list(tmp_path.glob(".*"))


def too_large(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        save(folder, Checkpoint(8, {"w": torch.zeros(10_000)}, {}, {}))
    except OSError as e:
        os._exit(e.errno)


def test_a_file_system_that_really_refuses(tmp_path):
    save(tmp_path, made(4))
    before = files(tmp_path)
    assert tiny.in_child(too_large, tmp_path) == errno.EFBIG
    assert files(tmp_path) == before


def killed_in_save(folder, kill_at):
    tiny.dying_at(kill_at, ("fsync", "replace", "mkdir", "open", "unlink", "rmdir", "write"))
    save(folder, made(12))
    os._exit(0)


def test_killed_anywhere_inside_a_write_the_newest_whole_one_is_found(tmp_path):
    """At every system call of `save` in turn, until it comes through."""
    found = []
    for kill_at in range(40):
        folder = tmp_path / str(kill_at)
        for step in (4, 8):
            save(folder, made(step))
        code = tiny.in_child(killed_in_save, folder, kill_at)
        latest = load_latest(folder)
        assert same(latest, made(latest.step))
        assert not list(folder.glob(".*"))
        found.append(latest.step)
        shutil.rmtree(folder)
        if code == 0:
            break
    assert code == 0
    assert found == sorted(found)
    assert set(found) == {8, 12}
    assert math.isclose(len(found), 17, abs_tol=8)


def test_two_writers_of_one_step_do_not_touch_each_others_files(tmp_path, monkeypatch):
    """A process that is suspended in the middle of a write, and taken over, goes on writing beside its successor."""
    begun, go_on, write = threading.Event(), threading.Event(), checkpoint._write
    outcome = []

    def hindered(path, data):
        if path.name == FILES[1] and threading.current_thread() is not threading.main_thread():
            begun.set()
            go_on.wait(20)
        elif path.name == FILES[1]:
            go_on.set()
            first.join()
        return write(path, data)

    def suspended():
        try:
            outcome.append(save(tmp_path, made(4)))
        except OSError as e:
            outcome.append(e)

    monkeypatch.setattr(checkpoint, "_write", hindered)
    first = threading.Thread(target=suspended)
    first.start()
    assert begun.wait(20)
    save(tmp_path, made(4))
    assert isinstance(outcome[0], FileNotFoundError)  # its files were cleared away as leftovers
    assert same(load_latest(tmp_path), made(4))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
