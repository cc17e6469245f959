"""[resources]: which rule applies, `auto` from the memory of a device, what stays out of the run id, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from questctl.errors import UsageError
from questctl.store import RunStore
from questctl.sweep import resources
from questctl.sweep.costs import memory_bytes, sized
from questctl.sweep.launchers.options import LauncherOptions
from questctl.sweep.manifest import Sweep, join, open_sweep
from questctl.sweep.resource_rules import Resources, parse_resources
from questctl.sweep.resources import in_words, settle
from questctl.sweep.run import estimate_sweep, launch_commands, run_sweep
from questctl.sweep.slots import GPU
from questctl.sweep.sweep_file import parse_sweep_file

GIB = 2**30


def sweep(tmp_path, tables, *, presets=("53K", "640K"), devices=(), **train):
    """The settled sweep of a file with these tables of [resources]."""
    data = {"source": "synthetic:markov?tokens=5000", "seq_len": 16}
    tree = {"base": {"data": data, "train": {"batch_size": 8, "steps": 4, **train}}, "matrix": {"preset": list(presets)}}
    if tables is not None:
        tree["resources"] = tables
    return settle(Sweep(parse_sweep_file(tree, tmp_path / "s.toml"), RunStore(tmp_path / "runs")), devices)


def gpu(gib: float) -> list[GPU]:
    return [GPU("0", "a GPU", int(gib * GIB))]


def test_a_key_is_that_of_the_last_rule_that_holds(tmp_path):
    rules = [{"nproc": 2, "parallel": "fsdp"}, {"min_params": "100K", "nproc": 4}, {"max_params": 60_000, "micro_batch": 2}]
    small, large = sweep(tmp_path, rules).cells
    assert (small.resources, large.resources) == (Resources(2), Resources(4))
    assert [(c.config.train.parallel, c.config.train.micro_batch) for c in (small, large)] == [("fsdp", 2), ("fsdp", 0)]


def test_without_rules_nothing_changes_and_with_them_no_identity_does(tmp_path):
    plain, ruled = sweep(tmp_path, None), sweep(tmp_path, {"nproc": 4, "parallel": "fsdp", "micro_batch": 2})
    assert [cell.resources for cell in plain.cells] == [None, None]
    assert [cell.run_id for cell in plain.cells] == [cell.run_id for cell in ruled.cells]
    assert plain.folder == ruled.folder
    assert in_words(plain.cells) == ""
    assert in_words(ruled.cells) == "[resources]: 2 of 4 processes (fsdp)."


def test_activations_are_checkpointed_by_size_under_the_same_ids(tmp_path):
    plain, ruled = sweep(tmp_path, None), sweep(tmp_path, [{"min_params": "100K", "checkpoint_activations": True}])
    assert [c.run_id for c in plain.cells] == [c.run_id for c in ruled.cells]
    assert [c.config.train.checkpoint_activations for c in ruled.cells] == [False, True]
    assert not any(c.config.train.checkpoint_activations for c in plain.cells)


def test_a_micro_batch_of_the_sweep_file_stays(tmp_path):
    cells = sweep(tmp_path, {"micro_batch": 2}, micro_batch=4).cells
    assert {cell.config.train.micro_batch for cell in cells} == {4}


def test_auto_takes_the_first_choice_that_fits(tmp_path, monkeypatch):
    """The fewest processes, DDP before FSDP2, the most rows; each choice before it does not fit."""
    monkeypatch.setattr(resources, "CUDA_CONTEXT_BYTES", 0)
    monkeypatch.setattr(resources, "FILL", 1.0)
    auto = {"nproc": "auto", "parallel": "auto", "micro_batch": "auto"}
    (config,) = sized(sweep(tmp_path, None, presets=("30M",), batch_size=4).cells)

    def need(n, kind, rows):
        train = config.train.model_copy(update={"parallel": kind, "micro_batch": rows})
        return memory_bytes(config.model_copy(update={"train": train}), n)

    order = [(1, "ddp", rows) for rows in (0, 2, 1)]
    order += [(n, kind, rows) for n in (2, 4) for kind in ("ddp", "fsdp") for rows in ((0, 1) if n == 2 else (0,))]
    seen = set()
    for target in order:
        memory = need(*target)
        (got,) = sweep(tmp_path, auto, presets=("30M",), devices=[GPU("0", "", memory)], batch_size=4).cells
        first = next(choice for choice in order if need(*choice) <= memory)
        assert (got.nproc, got.config.train.parallel, got.config.train.micro_batch) == first
        seen.add(first)
    assert {(1, "ddp", 0), (1, "ddp", 1), (2, "fsdp", 1), (4, "fsdp", 0)} <= seen


def test_a_cell_that_fits_nowhere_gets_what_needs_least(tmp_path):
    (cell,) = sweep(tmp_path, {"nproc": 4, "parallel": "auto"}, presets=("30M",), devices=gpu(1.2)).cells
    assert (cell.nproc, cell.config.train.parallel) == (4, "fsdp")


def test_fsdp_shares_what_ddp_repeats(tmp_path):
    (cell,) = sweep(tmp_path, None, presets=("30M",)).cells
    ddp = cell.config
    fsdp = ddp.model_copy(update={"train": ddp.train.model_copy(update={"parallel": "fsdp"})})
    assert memory_bytes(fsdp, 1) == memory_bytes(ddp, 1)
    assert memory_bytes(fsdp, 4) < memory_bytes(ddp, 4) < memory_bytes(ddp, 1)


def test_processes_on_the_cpu_share_its_memory(tmp_path, monkeypatch):
    (config,) = sized(sweep(tmp_path, None, presets=("30M",)).cells)
    monkeypatch.setattr(resources, "host_memory", lambda: 2 * memory_bytes(config, 2) - 1)
    (got,) = sweep(tmp_path, {"nproc": 2, "parallel": "auto"}, presets=("30M",)).cells
    assert got.config.train.parallel == "fsdp"
    (got,) = sweep(tmp_path, {"nproc": 2, "parallel": "auto", "gpus": 0}, presets=("30M",), devices=gpu(80)).cells
    assert (got.config.train.parallel, got.config.train.device) == ("fsdp", "cpu")


def test_gpus_are_as_many_processes(tmp_path):
    cells = sweep(tmp_path, {"gpus": 4}).cells
    assert [cell.nproc for cell in cells] == [4, 4]


def test_nodes_share_the_processes(tmp_path):
    rules = [{"nproc": 8, "nodes": 2}, {"max_params": "60K", "nproc": "auto"}]
    small, large = sweep(tmp_path, rules, devices=gpu(80)).cells
    assert large.resources == Resources(8, 2)
    assert large.resources.per_node == 4
    assert small.resources == Resources(2, 2)


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"nproc": 3}, r"3 processes cannot share train.batch_size 8 equally; set nproc to 1, 2, 4 or 8."),
        ({"nproc": 4, "nodes": 3}, r"nproc = 4 cannot be divided evenly among 3 nodes; set nproc to a multiple of 3."),
        ({"nproc": 4, "gpus": 2}, r"gpus = 2, but nproc = 4; a process has one GPU, so leave one of them out."),
        ({"micro_batch": 3}, r"micro_batch = 3 does not divide train.batch_size 8; set one of 1, 2, 4, 8."),
        ({"procs": 2}, r"s.toml: resources: unknown key 'procs'; did you mean 'nproc'\?"),
        ([{}, {"parallel": "tensor"}], r"s.toml: resources 2: parallel: unknown value 'tensor'; choices: ddp, fsdp, auto."),
        ({"nproc": "many"}, r"s.toml: resources: nproc: 'many' is neither a number of at least 1 nor auto."),
        ({"nproc": 0}, r"s.toml: resources: nproc: 0 is neither a number of at least 1 nor auto."),
        ({"min_params": "big"}, r"s.toml: resources: min_params: 'big' is not a positive amount; units: K, M, B, G, T."),
        ("all", r"s.toml: resources: 'all' is neither a table of keys nor \[\[resources\]\]."),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, tables, sentence):
    with pytest.raises(UsageError, match=sentence) as e:
        sweep(tmp_path, tables)
    assert "\n" not in str(e.value)


def test_auto_needs_the_memory_of_the_device(tmp_path):
    with pytest.raises(UsageError, match=r"parallel = 'auto' needs the memory of a GPU, which is not known"):
        sweep(tmp_path, {"nproc": 2, "parallel": "auto"}, devices=[GPU("", "not known", 0)])
    sweep(tmp_path, {"nproc": 2, "parallel": "fsdp"}, devices=[GPU("", "not known", 0)])


def test_workers_read_from_the_manifest_what_cells_take(tmp_path):
    begun = sweep(tmp_path, {"nproc": 4, "nodes": 2, "parallel": "fsdp"})
    join(begun, begun.cells)
    read = open_sweep(begun.folder)
    assert [cell.resources for cell in read.cells] == [Resources(4, 2)] * 2
    assert {cell.config.train.parallel for cell in read.cells} == {"fsdp"}
    assert settle(read, []) == read
    again = sweep(tmp_path, {"nproc": 2})
    join(again, again.cells)  # edited rules are recorded
    assert [cell.nproc for cell in open_sweep(begun.folder).cells] == [2, 2]
    plain = replace(again, file=replace(again.file, cells=tuple(replace(cell, resources=None) for cell in again.cells)))
    join(plain, plain.cells)
    assert "resources" not in plain.manifest_path.read_text()


def test_a_rule_holds_between_its_sizes():
    (rule,) = parse_resources({"min_params": "1M", "max_params": "2M", "nproc": 2}, "s.toml")
    assert [rule.holds(n) for n in (999_999, 1_000_000, 1_999_999, 2_000_000)] == [False, True, True, False]


def test_what_this_machine_has_no_place_for_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("questctl.sweep.slots._nvidia_smi", list)
    tree = {"base": {"data": {"source": "synthetic:markov?tokens=5000", "seq_len": 16}, "train": {"batch_size": 8, "steps": 4}}}
    four = Sweep(parse_sweep_file({**tree, "resources": {"nproc": 4}}, tmp_path / "s.toml"), RunStore(tmp_path / "runs"))
    two = LauncherOptions(jobs=2)
    for refuse in (run_sweep, estimate_sweep, launch_commands):
        with pytest.raises(
            UsageError, match=r"takes 4 processes, and this machine has places for 2; --jobs 4, or a smaller nproc"
        ):
            refuse(four, launcher=two)
    with pytest.raises(UsageError, match=r"s: none of the 1 cells that remain fits on this machine \(\[resources\]\)"):
        run_sweep(four, launcher=two, helping=True)
    assert not (tmp_path / "runs").exists()
    estimate = estimate_sweep(four, launcher=LauncherOptions(jobs=4))
    assert estimate.resources == "[resources]: 1 of 4 processes (ddp)."
    assert estimate.to_dict()["cells"][0]["nproc"] == 4
    assert launch_commands(four, launcher=LauncherOptions(jobs=4)) == f"questctl worker {four.folder} --jobs 4"
