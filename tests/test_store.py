"""The run folder: no path leaves it, no reader sees half a file, and a resumed run continues its metric lines exactly."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import files_in

from questctl import store
from questctl.config import RunConfig
from questctl.errors import DataError, StorageError, UsageError
from questctl.store import COLUMNS, Result, RunStore, Status, describe, load_runs
from questctl.store.lease import Lease, LeaseHeld, LeaseLost
from questctl.store.runs import LINES_TOGETHER_S

CONFIG = RunConfig()
ENV = {"data_hash": "d" * 64, "threads": 1, "attempt": {"torch": "2"}}


def result_of(config, **changes):
    values = describe(config) | {
        "loss": 1.7,
        "bits_per_byte": 2.45,
        "train_loss": 1.69,
        "model_bits": 1e6,
        "flops": 1e12,
        "tokens_per_s": 5e4,
        "seconds": 20.0,
        "peak_memory_bytes": 2**28,
        "data_hash": "d" * 64,
        "params_total": 86464,
        "steps": config.train.steps,
        "val_tokens": 131072,
        "attempts": 1,
        "device": "cpu",
    }
    return Result(**(values | changes))


def other(seed):
    return CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"seed": seed})})


def begun(root, config=CONFIG, steps=5):
    run = RunStore(root).run(config.run_id)
    with run.open_for_training(config) as writer:
        writer.begin(step=0, steps=10, env=ENV)
        for step in range(steps):
            writer.log({"step": step, "train_loss(nats/token)": 5.0 - step}, {"step": step, "tokens/s": 1e4})
    return run


# --- names ------------------------------------------------------------------------------------------------------------


NOT_NAMES = ["", ".", "..", "a/b", "/etc", "../x", "a\\b", ".hidden", "a\0b", "a\n", "-x", "x" * 201, "~root", "a b"]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UsageError, match="not the name of a run"):
        RunStore(tmp_path).run(name)


def test_links_out_are_refused_and_not_listed(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "runs"
    begun(outside)
    root.mkdir()
    (root / "link").symlink_to(outside / CONFIG.run_id)
    with pytest.raises(UsageError, match="link that leads out"):
        RunStore(root).run("link")
    assert RunStore(root).runs() == []


def test_find_by_prefix_or_digits(tmp_path):
    runs = [begun(tmp_path, other(s)) for s in (1, 2)]
    found = RunStore(tmp_path)
    assert found.find(runs[0].name).path == runs[0].path
    assert found.find(runs[1].name[-8:]).path == runs[1].path
    with pytest.raises(UsageError, match="fits 2 runs"):
        found.find("53K")
    with pytest.raises(DataError, match="there is no run 'nix'"):
        found.find("nix")


# --- where it cannot write --------------------------------------------------------------------------------------------


def test_a_root_that_cannot_be_made_is_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    run = RunStore(tmp_path / "file" / "runs").run(CONFIG.run_id)
    with pytest.raises(StorageError, match=r"cannot be created: Not a directory\."), run.open_for_training(CONFIG):
        pass
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["lease", "reserve", "config"])
def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path, monkeypatch, failing):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"lease": (Lease, "_create"), "reserve": (Path, "write_bytes"), "config": (os, "replace")}[failing]
    monkeypatch.setattr(*target, full)
    run = RunStore(tmp_path / "runs").run(CONFIG.run_id)
    with pytest.raises(StorageError, match="No space left on device"), run.open_for_training(CONFIG):
        pass
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_the_reserve_lets_a_full_disk_record_the_failure(tmp_path, monkeypatch):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    with run.open_for_training(CONFIG) as writer:
        writer.begin(step=0, steps=10, env=ENV)
        reserve, write_bytes = run.path / "reserve.tmp", store.write_bytes
        assert reserve.stat().st_blocks * 512 >= store.RESERVE_BYTES

        def only_with_room(path, data):
            if reserve.exists():
                raise StorageError("full")
            write_bytes(path, data)

        monkeypatch.setattr(store.files, "write_bytes", only_with_room)
        with pytest.raises(StorageError):
            writer.set_state("running", 3)
        writer.set_state("failed", 3, "No space left on device.")
    assert (run.state(), run.status().message) == ("failed", "No space left on device.")


# --- whole files only -------------------------------------------------------------------------------------------------


def test_a_replacement_that_fails_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    store.write_json(path, {"a": 1})
    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
            with pytest.raises(StorageError, match=r"status.json: cannot be written: Input/output error\."):
                store.write_json(path, {"a": 2})
        assert json.loads(path.read_bytes()) == {"a": 1}
        assert files_in(tmp_path) == ["status.json"]


WRITE = """
import sys; from pathlib import Path; from questctl import store
path = Path(sys.argv[1]); i = 0
while True:
    i += 1
    store.write_json(path, {"i": i, "fill": "x" * 5000})
    if i == 1: print("go", flush=True)
"""


def test_a_reader_never_sees_half_a_file_even_when_the_writer_is_killed(tmp_path):
    path = tmp_path / "status.json"
    child = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    seen, until = set(), time.monotonic() + 30
    while len(seen) <= 10 and time.monotonic() < until:
        seen.add(json.loads(path.read_bytes())["i"])
    child.kill()
    child.wait()
    assert len(seen) > 10
    assert json.loads(path.read_bytes())["i"] >= max(seen)


@pytest.mark.parametrize("name", ["config.json", "status.json", "env.json", "result.json"])
@pytest.mark.parametrize("damage", ["", "{", '{"run": 1', "[]", "null", "\xff\xfe", '{"surprise": 1}', '{"schema": 99}'])
def test_damaged_files_are_named_with_a_remedy(tmp_path, name, damage):
    run = begun(tmp_path)
    store.write_json(run.result_path, {"schema": 1, **asdict(result_of(CONFIG))})
    (run.path / name).write_bytes(damage.encode("latin1"))
    read = {"config.json": run.config, "status.json": run.status, "env.json": run.env, "result.json": run.result}[name]
    if name == "env.json" and damage.startswith('{"s'):
        return  # free-form: any object is whole
    with pytest.raises(DataError) as e:
        read()
    text = str(e.value)
    assert text.startswith(str(run.path / name))
    assert "\n" not in text
    assert "remove the run" in text or "delete this file" in text or "schema" in text


def test_damaged_config_stops_listing_and_training(tmp_path):
    run = begun(tmp_path)
    run.config_path.write_text("{")
    with pytest.raises(DataError, match=r"config.json: is damaged"):
        load_runs(tmp_path)
    with pytest.raises(DataError, match=r"config.json: is damaged"), run.open_for_training(CONFIG):
        pass
    assert not run.lease_path.exists()


def test_a_folder_with_another_experiment_is_refused(tmp_path):
    run = begun(tmp_path)
    store.write_json(run.config_path, other(1).to_json())
    with pytest.raises(UsageError, match="another experiment"), run.open_for_training(CONFIG):
        pass


# --- lines ------------------------------------------------------------------------------------------------------------


def test_lines_are_cut_back_and_continued_byte_for_byte(tmp_path):
    undisturbed, killed = begun(tmp_path / "a", steps=8), begun(tmp_path / "b", steps=5)
    with killed.metrics_path.open("ab") as f:
        f.write(b'{"step": 5, "train_l')  # torn by the kill
    assert [m["step"] for m in killed.metrics()] == [0, 1, 2, 3, 4]
    assert killed.last_metrics()["step"] == 4
    with killed.open_for_training(CONFIG) as writer:
        writer.begin(step=3, steps=10, env=ENV)
        assert [m["step"] for m in killed.metrics()] == [m["step"] for m in killed.timing()] == [0, 1, 2]
        for step in range(3, 8):
            writer.log({"step": step, "train_loss(nats/token)": 5.0 - step}, {"step": step, "tokens/s": 1e4})
    assert killed.metrics_path.read_bytes() == undisturbed.metrics_path.read_bytes()
    assert killed.status().attempts == len(killed.env()["attempts"]) == 2


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    run = begun(tmp_path)
    lines = run.metrics_path.read_bytes().split(b"\n")
    run.metrics_path.write_bytes(b"\n".join([lines[0], b"\x00garbage", *lines[2:]]))
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is damaged"):
        run.metrics()


def test_a_line_that_the_disk_takes_in_part_is_an_error(tmp_path, monkeypatch):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    with run.open_for_training(CONFIG) as writer:
        writer.begin(step=0, steps=10, env=ENV)
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
        with pytest.raises(StorageError, match=r"metrics.jsonl: cannot be written: No space left on device\."):
            writer.log({"step": 1}, {"step": 1})
    assert run.metrics() == []


def test_a_run_beside_many_writes_its_lines_together_and_before_all_that_relies_on_them(tmp_path):
    """Beside many others, lines wait for three minutes, a checkpoint or a state."""
    run = RunStore(tmp_path).run(CONFIG.run_id)
    heard = []
    with Lease(tmp_path / "lease", beside=99) as lease, run.open_for_training(CONFIG, lease=lease) as writer:
        writer.begin(step=0, steps=10, env=ENV)
        writer.listeners.append(lambda metrics, timing: heard.append(metrics["step"]))
        lease.beside = 0
        for step in (1, 2):
            writer.log({"step": step}, {"step": step})
            assert len(run.metrics()) == step
        lease.beside = 99
        for step in (3, 4):
            writer.log({"step": step}, {"step": step})
        assert len(run.metrics()) == len(run.timing()) == 2
        assert heard == [1, 2, 3, 4]
        writer.sync()
        assert [line["step"] for line in run.metrics()] == [line["step"] for line in run.timing()] == [1, 2, 3, 4]
        writer.set_state("running", 4)
        assert run.status().metrics_bytes == run.metrics_path.stat().st_size
        writer.log({"step": 5}, {"step": 5})
        writer._last_lines -= LINES_TOGETHER_S
        writer.log({"step": 6}, {"step": 6})
        assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6]
        writer.log({"step": 7}, {"step": 7})
        writer.set_state("failed", 7, "why")
        assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_that_fails_as_its_lines_cannot_be_written_is_marked_all_the_same(tmp_path, monkeypatch):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    with Lease(tmp_path / "lease", beside=99) as lease, run.open_for_training(CONFIG, lease=lease) as writer:
        writer.begin(step=0, steps=10, env=ENV)
        writer.log({"step": 1}, {"step": 1})
        monkeypatch.setattr("questctl.store.runs.append_lines", lambda *_: (_ for _ in ()).throw(StorageError("full")))
        with pytest.raises(StorageError, match="full"):
            writer.sync()
        writer.set_state("failed", 1, "full")
    assert run.state() == "failed"


# --- one writer -------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    with run.open_for_training(CONFIG) as writer:
        before = files_in(tmp_path)
        with pytest.raises(LeaseHeld), RunStore(tmp_path).run(CONFIG.run_id).open_for_training(CONFIG):
            pass
        with pytest.raises(LeaseHeld):
            run.remove()
        assert files_in(tmp_path) == before
        writer.begin(step=0, steps=10, env=ENV)
        assert run.state() == "running"
    assert files_in(run.path) == ["config.json", "env.json", "status.json"]


def test_a_caller_may_bring_its_own_lease(tmp_path):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    run.create(CONFIG)
    with Lease(run.lease_path) as lease:
        with run.open_for_training(CONFIG, lease=lease) as writer:
            writer.begin(step=0, steps=10, env=ENV)
        lease.check()


def test_a_writer_that_lost_its_lease_writes_nothing_more(tmp_path):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    with run.open_for_training(CONFIG) as slow:
        slow.begin(step=0, steps=10, env=ENV)
        os.utime(run.lease_path, (0, 0))
        with run.open_for_training(CONFIG) as fast:
            fast.begin(step=0, steps=10, env=ENV)
            before = {p: p.read_bytes() for p in run.path.iterdir() if p.is_file()}
            for write in (
                lambda: slow.log({"step": 1}, {"step": 1}),
                lambda: slow.set_state("done", 1),
                lambda: slow.begin(step=0, steps=10, env=ENV),
                lambda: slow.finish(result_of(CONFIG)),
            ):
                with pytest.raises(LeaseLost):
                    write()
            assert {p: p.read_bytes() for p in run.path.iterdir() if p.is_file()} == before


def test_states(tmp_path):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    assert (run.state(), run.exists()) == ("pending", False)
    run.create(CONFIG)
    assert (run.state(), run.exists()) == ("pending", True)
    with run.open_for_training(CONFIG) as writer:
        writer.begin(step=0, steps=10, env=ENV)
        assert run.state() == "running"
    assert run.state() == "preempted"  # its process left without a word
    with run.open_for_training(CONFIG) as writer:
        for state in ("failed", "diverged", "preempted"):
            writer.set_state(state, 4, "why")
            assert run.state() == state
        writer.set_state("done", 10)
        assert run.state() == "running"  # not before the result is there
        run.checkpoints_path.mkdir()
        writer.finish(result_of(CONFIG))
    assert run.state() == "done"
    assert not run.checkpoints_path.exists()
    assert run.result() == result_of(CONFIG)
    assert run.status() == Status("done", 522, 10, 1, "", run.status().started_at, run.status().updated_at)


def test_remove(tmp_path):
    run = begun(tmp_path)
    run.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="cannot be removed"):
        run.remove()


# --- tables -----------------------------------------------------------------------------------------------------------


def test_load_runs_has_one_row_a_run_finished_or_not(tmp_path):
    finished, unfinished = begun(tmp_path, other(1)), begun(tmp_path, other(2))
    pending = RunStore(tmp_path).run(other(3).run_id)
    with finished.open_for_training(other(1)) as writer:
        writer.finish(result_of(other(1)))
    with unfinished.open_for_training(other(2)) as writer:
        writer.set_state("diverged", 4, "loss")
    pending.create(other(3))
    (tmp_path / "not-a-run").mkdir()
    frame = load_runs(tmp_path).set_index("seed", drop=False)
    assert list(frame.columns) == list(COLUMNS)
    assert frame.state.to_dict() == {1: "done", 2: "diverged", 3: "pending"}
    assert frame.loc[1, "loss"] == 1.7
    assert frame.loc[[2, 3], "loss"].isna().all()
    assert frame.loc[2, "train_loss"] == 1.0
    assert frame.loc[2, "data_hash"] == "d" * 64
    assert (frame.params_non_embedding == 53440).all()
    assert frame.loc[3, "path"] == str(pending.path)
    assert load_runs(finished.path).run.tolist() == [finished.name]
    assert load_runs(str(tmp_path)).shape == frame.shape


def test_load_runs_of_nothing(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        load_runs(tmp_path / "nix")
    assert list(load_runs(tmp_path).columns) == list(COLUMNS)


def test_a_thousand_results_load_in_two_seconds(tmp_path):
    line = json.dumps({"step": 1, "train_loss(nats/token)": 3.0, "lr": 1e-3, "grad_norm": 1.0}) + "\n"
    base = result_of(CONFIG)
    for i in range(1000):
        path = tmp_path / f"run-{i}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG.to_json()))
        (path / "metrics.jsonl").write_text(line * 500)
        (path / "result.json").write_text(json.dumps(asdict(replace(base, run=path.name))))
    load_runs(tmp_path / "run-0")  # pandas itself
    seconds = []  # of the processor, best of three: what the clock would show on an idle machine
    for _ in range(3):
        start = time.process_time()
        assert len(load_runs(tmp_path)) == 1000
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2


def test_the_store_needs_neither_torch_nor_pandas():
    code = "import sys, questctl.store; print([m for m in ('torch', 'pandas', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names_are_lazy():
    code = "import sys, questctl; print([m for m in sys.modules if 'questctl.' in m], questctl.load_runs.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[] load_runs\n"


def test_a_rival_s_temporary_file_may_vanish_while_the_leftovers_are_cleared(tmp_path):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    run.path.mkdir()
    (run.path / "lease.0123.tmp").symlink_to(tmp_path / "gone")  # listed, but no longer there when it is looked at
    (run.path / ".status.json.1.2.tmp").write_text("half")
    with run.open_for_training(CONFIG) as writer:
        writer.set_state("failed", 0)
    assert run.status().state == "failed"
    assert not (run.path / ".status.json.1.2.tmp").exists()


def test_one_function_lists_the_runs_of_a_path(tmp_path):
    root = tmp_path / "runs"
    run, second = (RunStore(root).run(other(seed).run_id) for seed in (1, 2))
    run.create(other(1))
    second.create(other(2))
    (root / "notes").mkdir()
    assert sorted([run.name, second.name]) == [r.name for r in store.runs_in(root)]
    assert [r.path for r in store.runs_in(run.path)] == [run.path]
    assert [store.is_run_folder(path) for path in (run.path, root, root / "notes")] == [True, False, False]
    with pytest.raises(DataError, match="no such folder"):
        store.runs_in(tmp_path / "elsewhere")


def test_checkpoints_are_named_by_their_step_and_found_in_both_folders(tmp_path):
    run = RunStore(tmp_path).run(CONFIG.run_id)
    assert (run.checkpoint_steps(), run.checkpoint_path(5)) == ([], None)
    for folder, step in ((run.checkpoints_path, 20), (run.checkpoints_path, 123), (run.kept_path, 5), (run.kept_path, 20)):
        (folder / store.checkpoint_name(step)).mkdir(parents=True)
    (run.checkpoints_path / "damaged-step-00000099").mkdir()
    (run.checkpoints_path / ".step-00000200.tmp").mkdir()
    assert run.checkpoint_steps() == [5, 20, 123]
    assert store.checkpoint_steps(run.checkpoints_path) == [20, 123]
    assert run.checkpoint_path(123) == run.path / "checkpoints" / "step-00000123"
    assert run.checkpoint_path(20) == run.path / "kept" / "step-00000020"
    assert run.checkpoint_path(6) is None


@pytest.mark.parametrize("overrides", [{}, {"blocks.*.down": {"weights": "int8-h32-rms-trust"}}])
def test_a_result_of_version_0_1_is_read_with_the_bits_that_it_meant(tmp_path, overrides):
    quant = {"weights": "int4-h32-rms-2of4pairs-trust", "activations": "int4-h32-rms-trust", "overrides": overrides}
    config = RunConfig(quant=quant)
    run = RunStore(tmp_path).run(config.run_id)
    run.create(config)
    now = {**asdict(result_of(config)), **describe(config)}
    early = {k: v for k, v in now.items() if not k.endswith("_bits") and k not in ("optimizer", "warmup_steps", "tokens_fp")}
    early |= {"model_bits": now["model_bits"], "w_bits": now["w_stored_bits"], "a_bits": now["a_stored_bits"]}
    store.write_sealed(run.result_path, {"schema": 1, **early})
    assert asdict(run.result()) == now
    assert (now["w_grid_bits"], now["w_stored_bits"]) == (4, 2.5) or overrides
    row = load_runs(run.path).iloc[0]
    assert [row[c] for c in COLUMNS if c.endswith("_bits")] == [now[c] for c in COLUMNS if c.endswith("_bits")]


def test_external_runs_of_version_0_1_are_read_with_the_width_of_their_grids(tmp_path):
    row = {"run": "table/1", "scheme": "mine", "w_bits": 4, "a_bits": 8, "loss": 3.0}
    store.write_json(RunStore(tmp_path).external_path("table"), {"schema": 1, "runs": [row]})
    frame = load_runs(tmp_path)
    assert frame[["w_grid_bits", "a_grid_bits", "state"]].values.tolist() == [[4, 8, "imported"]]
