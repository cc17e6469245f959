"""What Ray is asked for, with a stand-in of Ray that runs tasks in threads of this process; test_cluster has the real one."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
from sweep_trainers import traced
from test_slurm import sweep

from questctl.errors import UsageError
from questctl.sweep.launchers import ray as launcher
from questctl.sweep.launchers.options import RayOptions
from questctl.sweep.manifest import join
from questctl.sweep.resources import settle
from questctl.sweep.slots import GPU


class Task:
    """The reference of a task, which is a thread."""

    def __init__(self, work, arguments):
        self.value, self.error = None, None

        def run():
            try:
                self.value = work(*(a.value_of() if isinstance(a, Task) else a for a in arguments))
            except BaseException as e:
                self.error = e

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def value_of(self):
        self.thread.join()
        if self.error:
            raise self.error
        return self.value


class Ray:
    """As much of Ray as the launcher calls; it notes what was asked for."""

    def __init__(self, *nodes):
        self.asked, self.groups, self.removed = [], [], []
        self.nodes = lambda: [{"Alive": True, "Resources": node} for node in nodes]
        self.exceptions = SimpleNamespace(RayError=ZeroDivisionError)
        self.util = SimpleNamespace(placement_group=self.placement_group, remove_placement_group=self.removed.append)

    def remote(self, *_, **settings):
        return self.handle

    def handle(self, work, options=None):
        def remote(*arguments):
            self.asked.append((work.__name__, options))
            return Task(work, arguments)

        return SimpleNamespace(options=lambda **options: self.handle(work, options), remote=remote)

    def placement_group(self, bundles, strategy):
        self.groups.append((bundles, strategy))
        return len(self.groups)

    def wait(self, pending, num_returns, timeout):
        pending[0].thread.join(timeout)
        return [task for task in pending if not task.thread.is_alive()], []

    def get(self, task):
        return task.value_of()


@pytest.fixture
def cluster(monkeypatch):
    """Makes a cluster of these nodes the one that the launcher connects to."""

    def make(*nodes):
        stand_in = Ray(*nodes)
        monkeypatch.setattr(launcher, "_connected", contextmanager(lambda options: (yield stand_in)))
        module = ModuleType("ray.util.scheduling_strategies")
        module.PlacementGroupSchedulingStrategy = lambda group, placement_group_bundle_index: (
            group,
            placement_group_bundle_index,
        )
        ray = ModuleType("ray")
        ray.util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.util", ModuleType("ray.util"))
        monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", module)
        return stand_in

    return make


@pytest.mark.slow
def test_a_cell_of_several_processes_has_a_placement_group(tmp_path, cluster, monkeypatch):
    """Two nodes of two ranks each, in processes that Ray's tasks start; the cell of one process is a task as before."""
    monkeypatch.setenv("SWEEP_TRACE", str(tmp_path / "trace"))
    ray = cluster({"CPU": 4.0}, {"CPU": 4.0})
    rules = [{"nproc": 1}, {"min_params": "100K", "nproc": 4, "nodes": 2}]
    both = settle(sweep(tmp_path, rules, ("53K", "214K")), [GPU("", "", 0)])
    monkeypatch.setenv("RANK", "0")  # of the cell that has no ranks, for the trainer of the test
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    join(both, both.cells)
    outcomes = launcher.launch(both, RayOptions(cpus=2), trainer="sweep_trainers:ranked", force=True, poll_s=0.05)
    assert [outcome.state for outcome in outcomes] == ["done", "done"]
    assert ray.groups == [([{"CPU": 4.0}] * 2, "STRICT_SPREAD")]
    assert ray.removed == [1]
    parts = [options for name, options in ray.asked if name == "_part"]
    assert [options["scheduling_strategy"] for options in parts] == [(1, 0), (1, 1)]
    assert {options["num_cpus"] for options in parts} == {4.0}
    ranks = {name.partition("/")[2] for name, *_ in traced(tmp_path / "trace") if name.startswith(f"{both.cells[1].run_id}/")}
    assert ranks == {"0", "1", "2", "3"}


def test_a_group_on_one_node_is_packed_and_has_a_gpu_for_each_process(tmp_path, cluster):
    cells = settle(sweep(tmp_path, {"nproc": 4}, ("53K",)), [GPU("", "", 0)]).cells
    ray = cluster({"CPU": 8.0, "GPU": 4.0})
    sender = launcher._Cluster(ray, RayOptions())
    assert sender.bundle(cells[0]) == {"CPU": 4.0, "GPU": 4.0}
    sender.require(cells)


def test_a_cluster_that_is_too_small_is_told_what_a_cell_takes(tmp_path, cluster):
    cells = settle(sweep(tmp_path, {"nproc": 8, "nodes": 2}, ("53K",)), [GPU("", "", 0)]).cells
    sender = launcher._Cluster(cluster({"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}), RayOptions())
    with pytest.raises(UsageError, match=r"takes 4 CPUs and 4 GPUs on each of 2 nodes, and the cluster has 1 such nodes; set"):
        sender.require(cells)
