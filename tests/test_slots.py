"""Slots: which GPUs, how many runs on each, how many on a CPU, and what fits nowhere."""

from __future__ import annotations

import itertools
import os

import pytest
import tiny
from helpers import until
from hypothesis import given
from hypothesis import strategies as st
from test_worker import cell

from questctl.config import Layer, resolve
from questctl.errors import UsageError
from questctl.store import RunStore
from questctl.sweep import slots as module
from questctl.sweep.costs import activation_bytes, memory_bytes
from questctl.sweep.resource_rules import Resources
from questctl.sweep.slots import (
    GPU,
    Device,
    Need,
    Pool,
    Slot,
    first_fit,
    require_memory,
    require_places,
    slots,
    turn,
    visible_gpus,
)
from questctl.sweep.sweep_file import Cell

SMI = [("GPU-aaaa-1", GPU("0", "NVIDIA H100", 80 * 2**30)), ("GPU-bbbb-2", GPU("1", "NVIDIA L4", 24 * 2**30))]


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(module, "_nvidia_smi", lambda: SMI)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        ("GPU-bbbb-2", ["GPU-bbbb-2"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
    ],
)
def test_the_gpus_are_those_that_cuda_would_see(two, monkeypatch, visible, found):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.id for gpu in visible_gpus()] == found


def test_a_gpu_called_by_its_uuid_keeps_its_memory(two, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb-2,MIG-7")
    assert [gpu.memory for gpu in visible_gpus()] == [24 * 2**30, 0]


def test_a_run_a_core_for_laptop_sizes_only(monkeypatch):
    monkeypatch.setattr(module, "_nvidia_smi", list)
    monkeypatch.setattr(module, "cpu_count", lambda: 6)
    assert slots([cell(1)]) == [Slot(None, 6)] * 6
    assert slots([cell(1)], jobs=2) == [Slot(None, 2)] * 2
    monkeypatch.setattr(module, "LAPTOP_PARAMS", 50_000)
    assert slots([cell(1)]) == [Slot(None, 1)]


def test_gpus_are_filled_in_turn_and_each_slot_knows_its_neighbours(two, monkeypatch):
    monkeypatch.setattr(module, "cpu_count", lambda: 6)
    cells = [cell(1)]
    assert slots(cells) == [Slot("0", 1), Slot("1", 1)]
    assert slots(cells, jobs_per_gpu=2) == [Slot("0", 2), Slot("1", 2)] * 2
    assert slots(cells, jobs=3) == [Slot("0", 2), Slot("1", 1), Slot("0", 2)]
    assert slots([cell(1, device="cpu")]) == [Slot(None, 6)] * 6
    assert slots([cell(1, device="cuda:1")]) == [Slot(None, 1)]


def test_auto_is_bounded_by_memory_and_by_cores(two, monkeypatch):
    cells = [cell(1)]
    monkeypatch.setattr(module, "cpu_count", lambda: 64)
    assert len(slots(cells, jobs_per_gpu="auto")) == 2 * 16  # 64 cores, 2 GPUs, 2 cores a run
    monkeypatch.setattr(module, "memory_bytes", lambda *_: 6 * 2**30)
    places = slots(cells, jobs_per_gpu="auto")  # 0.85 · (80 and 24) GiB / (6 + 1) GiB
    assert [slot.gpu for slot in places] == ["0", "1"] * 2 + ["0"] * 7
    assert {slot.gpu: (slot.beside, slot.memory) for slot in places} == {"0": (9, 68 * 2**30), "1": (2, 20.4 * 2**30)}
    monkeypatch.setattr(module, "memory_bytes", lambda *_: 60 * 2**30)
    assert len(slots(cells, jobs_per_gpu="auto")) == 2


def test_locks_of_a_device_leave_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    slot = Slot(None, 2)
    with turn(slot, tmp_path / "runs", alone=False), turn(slot, tmp_path / "runs", alone=False):
        assert {p.suffix for p in tmp_path.iterdir()} == {".door", ".room"}
    with pytest.raises(KeyError), turn(slot, tmp_path / "runs", alone=True):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def _visit(folder, number, turns):
    """Come and go; while alone, look that nobody else is in, and else that nobody is who is alone."""
    import random
    import tempfile

    dice, tempfile.tempdir, inside = random.Random(number), str(folder / "locks"), folder / "inside"
    for _ in range(turns):
        alone = dice.random() < 0.3
        with turn(Slot(None, 3), folder / "runs", alone=alone):
            mine = inside / f"{number}{'-alone' if alone else ''}"
            mine.touch()
            others = {p.name for p in inside.iterdir()} - {mine.name}
            assert not (others if alone else [name for name in others if name.endswith("-alone")]), (mine, others)
            mine.unlink()


def test_a_run_that_wants_its_device_alone_has_it_alone_however_files_come_and_go(tmp_path):
    for name in ("locks", "inside"):
        (tmp_path / name).mkdir()
    children = [tiny.start(_visit, tmp_path, number, 300) for number in range(4)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_cell_that_fits_nowhere_is_named_with_its_number(monkeypatch):
    monkeypatch.setattr(module, "host_memory", lambda: 64 * 2**30)
    large = cell(1, batch_size=2**15)
    need = f"{memory_bytes(large.config) / 2**30:,.1f} GiB"
    with pytest.raises(
        UsageError, match=f"{large.run_id}: needs at least {need}, with.*largest device has 24.0 GiB .NVIDIA L4.*micro_batch"
    ):
        require_memory([cell(1), large], [SMI[1][1]])
    require_memory([large], [SMI[0][1]])
    require_memory([large], [GPU("", "not known", 0)])
    require_memory([cell(1, batch_size=2**15, micro_batch=2)], [SMI[1][1]])
    monkeypatch.setattr(module, "host_memory", lambda: 16 * 2**30)
    with pytest.raises(UsageError, match="memory of this machine"):
        require_memory([large], [])


def test_the_estimate_of_memory_is_what_autograd_keeps():
    """States and what is saved for the backward pass, counted from the tensors of a real forward pass."""
    from questctl.models.llama import build_model

    grouped = {"n_head": 8, "n_kv_head": 2, "head_width": 32, "tied": True}
    for quant, shape in itertools.product(({}, {"method": "quest", "bits": 4, "block": 64}), ({}, grouped, {"n_kv_head": 1})):
        c = _config(quant, **shape)
        saved = _saved(c)
        states = 16 * sum(p.numel() for p in build_model(c.model, c.quant, 0).parameters())
        # passes of native.c keep less than torch's, which the estimate counts: there may be no compiler
        assert 0.85 * (states + saved) < memory_bytes(c) < 1.15 * (states + saved)


@pytest.mark.parametrize(
    ("precision", "spec"),
    [
        ("fp32", "int4-h32-rms-trust"),
        ("fp32", "int4-rms-ste"),
        pytest.param("bf16", "int4-rms-trust", marks=pytest.mark.slow),
    ],
)
def test_the_estimate_counts_what_quantized_embedding_and_head_keep(precision, spec):
    for key, tied in (("embedding", False), ("head", False), ("embedding", True)):
        shape = {"vocab_size": 3000, "tied": tied, "n_layer": 1}
        plain, rows = (_config(quant, precision, **shape) for quant in ({}, {key: spec}))
        counted = activation_bytes(rows) - activation_bytes(plain)
        assert counted == pytest.approx(_saved(rows) - _saved(plain), rel=0.02)
        assert (counted > 0) == (spec.endswith("trust") or key == "head" or tied)


def _saved(c) -> int:
    """Bytes that autograd saves of a forward pass, without parameters."""
    import torch

    from questctl.models.llama import build_model

    model = build_model(c.model, c.quant, 0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    tokens = torch.zeros(c.train.batch_size, c.data.seq_len, dtype=torch.int64)
    half = torch.autocast("cpu", torch.bfloat16, enabled=c.train.precision == "bf16")
    with half, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens, tokens)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def _config(quant: dict, precision: str = "fp32", **shape):
    from questctl.config import Layer, flatten, resolve

    tree = {
        "model": {"d_model": 128, "d_ff": 384, "n_layer": 3, "vocab_size": 16, **shape},
        "quant": quant,
        "data": {"seq_len": 64},
        "train": {"batch_size": 32, "precision": precision},
    }
    return resolve([Layer("test", flatten(tree, where="test"))]).config


def test_the_cpus_are_divided_and_a_tiny_model_takes_one(monkeypatch):
    monkeypatch.setattr(module, "cpu_count", lambda: 7)
    assert [slot.cpus for slot in module.divided([Slot()] * 3)] == [2] * 3
    assert [slot.cpus for slot in module.divided([Slot()] * 9)] == [1] * 9
    tiny, large = cell(1).config, resolve([Layer("test", {("preset",): "640K"})]).config
    assert (module.useful_threads(tiny, 7), module.useful_threads(large, 7), module.useful_threads(large, 0)) == (1, 7, 0)
    assert module.useful_threads(cell(1, threads=3).config, 7) == 3  # a sweep file that says so decides
    assert module.useful_threads(resolve([Layer("test", {("preset",): "53K"})]).config, 2) == 1


def test_a_small_model_beside_other_work_is_better_off_with_one_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    small, run = cell(1).config, RunStore(tmp_path).run("a-run")
    told = module.threads_warning(small, run, 2.04)
    assert told.startswith("other programs use 2.0 of the 4 CPUs;")
    assert "--set train.threads=1" in told
    assert module.threads_warning(small, run, 0.3) == ""  # an idle machine
    large = resolve([Layer("test", {("preset",): "1.3M"})]).config
    assert module.threads_warning(large, run, 2.0) == ""
    for threads in (1, 2):
        chosen = small.model_copy(update={"train": small.train.model_copy(update={"threads": threads})})
        assert module.threads_warning(chosen, run, 2.0) == ""
    run.create(small)
    assert module.threads_warning(small, run, 2.0) == ""  # it keeps the number that it began with
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert module.threads_warning(small, RunStore(tmp_path).run("another"), 2.0) == ""


# --- pools ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), max_size=12),
    st.lists(st.integers(4, 12), min_size=1, max_size=4),
)
def test_what_fits_first_never_takes_more_than_there_is(wanted, memories):
    """Against a count of its own: a GPU of its own for each process, no more memory or slots than a GPU has."""
    total = [Device(str(i), 2, memory) for i, memory in enumerate(memories)]
    left, taken = list(total), []
    for processes, memory in wanted:
        where = first_fit(left, Need(processes, memory))
        room = [i for i, d in enumerate(left) if d.slots and d.memory >= memory]
        assert where == (room[:processes] if len(room) >= processes else None)
        for i in where or ():
            left[i] = Device(left[i].gpu, left[i].slots - 1, left[i].memory - memory)
            taken.append((i, memory))
    for i, device in enumerate(total):
        mine = [memory for j, memory in taken if j == i]
        assert len(mine) <= device.slots
        assert sum(mine) <= device.memory


def test_small_cells_fill_the_gaps_of_large_ones():
    """80 GiB each: 60 and 15 fit beside each other, a cell of two processes takes what both GPUs have left."""
    left = [Device("0", 4, 80), Device("1", 4, 80)]
    for need, where in ((Need(1, 60), [0]), (Need(1, 60), [1]), (Need(1, 30), None), (Need(2, 15), [0, 1]), (Need(1, 5), [0])):
        assert first_fit(left, need) == where
        for i in where or ():
            left[i] = Device(left[i].gpu, left[i].slots - 1, left[i].memory - need.memory)


def test_processes_on_cpus_take_as_many_slots_of_one_device():
    assert first_fit([Device(None, 4)], Need(4)) == [0] * 4
    assert first_fit([Device(None, 3)], Need(4)) is None


def test_a_pool_is_shared_until_its_claims_are_closed(tmp_path):
    pool = Pool.of([Slot(None, 3, 2)] * 3, tmp_path)
    one, two = pool.take(Need(1)), Pool.of([Slot(None, 3, 2)] * 3, tmp_path).take(Need(2))
    assert (one.slot, two.slot) == (Slot(None, 3, 2), Slot(None, 1, 2))
    assert pool.take(Need(1)) is None
    assert pool.fits(Need(3))
    assert not pool.fits(Need(4))
    two.close()
    again = pool.take(Need(1))
    assert again is not None
    assert len(list(tmp_path.glob("*.json"))) == 2  # what nobody holds is removed


def test_a_child_keeps_what_its_killed_worker_has_taken(tmp_path):
    import multiprocessing
    import signal
    import time

    context, pool = multiprocessing.get_context("fork"), Pool.of([Slot(None, 2)] * 2, tmp_path)
    told, tell = context.Pipe(duplex=False)

    def work():
        claim = pool.take(Need(2))
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        tell.send(child.pid)
        child.join()
        claim.close()

    worker = context.Process(target=work)
    worker.start()
    child = told.recv()
    worker.kill()
    worker.join()
    assert pool.take(Need(1)) is None
    os.kill(child, signal.SIGKILL)
    until(lambda: pool.take(Need(2)) is not None)


def test_a_pool_whose_folder_was_cleaned_up_begins_anew(tmp_path):
    assert Pool.of([Slot()], tmp_path / "removed").take(Need(1)) is not None


def test_a_gpu_cell_sees_its_gpus_and_a_cell_that_is_too_large_has_one_to_itself():
    pool = Pool.of([Slot("3", 2, memory=10.0), Slot("5", 1, memory=8.0), Slot("3", 2, memory=10.0)])
    assert pool.take(Need(2, 4.0)).slot.gpu == "3,5"
    assert pool.take(Need(1, 20.0)).slot.gpu == "3"
    assert pool.take(Need(2, 20.0)).slot.gpu == "3,5"
    assert pool.take(Need(3)) is None


def test_a_cell_of_more_processes_than_places_is_refused():
    one, four, nodes = (Cell(cell(i).config, {}, r) for i, r in enumerate((None, Resources(4), Resources(4, 2))))
    require_places([one, four], [Slot(None, 4)] * 4)
    with pytest.raises(
        UsageError, match=r"takes 4 processes, and this machine has places for 2; --jobs 4, or a smaller nproc\."
    ):
        require_places([one, four], [Slot(None, 2)] * 2)
    with pytest.raises(UsageError, match=r"takes 4 processes, and this machine has 2 GPUs; a smaller nproc\."):
        require_places([four], [Slot("0", 2), Slot("1", 2)] * 2)
    with pytest.raises(
        UsageError, match=r"takes 2 nodes, and this is one machine; set nodes = 1, or use --launcher slurm or ray"
    ):
        require_places([nodes], [Slot(None, 4)] * 4)


def test_a_process_that_fits_on_no_device_is_named_with_its_group(monkeypatch):
    monkeypatch.setattr(module, "host_memory", lambda: 64 * 2**30)
    one = cell(1, batch_size=2**15)
    group = Cell(one.config, one.values, Resources(4))
    need = f"{memory_bytes(group.config, 4) / 2**30:,.1f} GiB in each of 4 processes, with {2**13} sequences"
    with pytest.raises(UsageError, match=f"{need}.*more processes with parallel = 'fsdp' in .resources., or --force"):
        require_memory([group], [GPU("0", "small", 2**30)])
    require_memory([group], [SMI[1][1]])
