"""The course of a sweep on virtual time: without trouble that of the plain schedule, with trouble what the rates say."""

import math
import random
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from questctl.config.sections import CHECKPOINTS
from questctl.store.lease import STALE_AFTER_S
from questctl.sweep.costs import wall_seconds
from questctl.sweep.simulation import HOUR, Cluster, Job, lower_bound, simulate
from questctl.sweep.slots import Device, Need

ONE = (Device("0", 1),)


def node(gpus, memory=math.inf):
    return tuple(Device(str(i), 1, memory) for i in range(gpus))


def in_order(jobs):
    return sorted(jobs, key=lambda job: (-job.devices, -job.seconds))


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=30), st.integers(1, 8))
def test_without_trouble_single_processes_take_as_long_as_the_plain_schedule(seconds, nodes):
    jobs = in_order(Job(str(i), s) for i, s in enumerate(seconds))
    course = simulate(jobs, Cluster(nodes, ONE, start_s=0.0))
    assert course.makespan == pytest.approx(wall_seconds(seconds, nodes))
    assert course.makespan >= course.lower_bound * (1 - 1e-9)
    assert [a.end for a in course.attempts] == ["done"] * len(jobs)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 2), st.floats(0, 5), st.floats(0, 1))
def test_every_cell_is_done_once_and_no_device_has_two(seed, failures, preemptions, slow):
    dice = random.Random(seed)
    jobs = [Job("trunk", 900.0, Need(2)), *(Job(f"branch {i}", 100.0, Need(2), trunk="trunk", leaves=i / 4) for i in range(4))]
    jobs += [Job(f"wide {i}", 300.0, Need(4), nodes=2) for i in range(2)]
    jobs += [Job(str(i), dice.uniform(1, 500), Need(dice.choice([1, 1, 2, 3]), dice.uniform(1, 60))) for i in range(20)]
    cluster = Cluster(3, node(4, 80.0), 10.0, failures, 100.0, preemptions, 50.0, slow)
    course = simulate(in_order(jobs), cluster, seed=seed)
    assert sorted(a.run_id for a in course.attempts if a.end == "done") == sorted(job.run_id for job in jobs)
    at = defaultdict(list)
    for a in course.attempts:
        assert len(a.devices) == len(set(a.devices)) == {job.run_id: job for job in jobs}[a.run_id].devices
        for device in a.devices:
            at[device].append((a.start, a.stop))
    for spans in at.values():
        spans.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert course == simulate(in_order(jobs), cluster, seed=seed)
    assert course.makespan >= course.lower_bound * (1 - 1e-9)


def test_branches_start_where_their_trunk_lets_them():
    jobs = [Job("trunk", 100.0), Job("a", 10.0, trunk="trunk", leaves=0.5), Job("b", 10.0, trunk="trunk", leaves=1.0)]
    course = simulate(jobs, Cluster(3, ONE, start_s=5.0))
    starts = {a.run_id: a.start for a in course.attempts}
    assert starts == {"trunk": 0.0, "a": 55.0, "b": 105.0}
    assert course.makespan == course.lower_bound == 120.0


def test_small_cells_fill_the_gaps_of_large_ones():
    jobs = in_order([Job("six", 100.0, Need(6)), Job("four", 50.0, Need(4)), *(Job(str(i), 100.0) for i in range(2))])
    course = simulate(jobs, Cluster(1, node(8), start_s=0.0))
    assert {a.run_id: a.start for a in course.attempts} == {"six": 0.0, "0": 0.0, "1": 0.0, "four": 100.0}


def test_memory_is_not_given_twice():
    places = (Device("0", 4, 80.0),)
    course = simulate([Job(str(i), 10.0, Need(1, 30.0)) for i in range(4)], Cluster(1, places, start_s=0.0))
    assert sorted(a.start for a in course.attempts) == [0.0, 0.0, 10.0, 10.0]


def test_a_failure_costs_what_no_checkpoint_holds_and_a_preemption_only_time():
    """Many cells of one length on nodes that fail: a failure undoes half a checkpoint's distance on average, and no more."""
    seconds = 4000.0
    jobs = [Job(str(i), seconds) for i in range(800)]
    failing = simulate(jobs, Cluster(50, ONE, 0.0, failures=1.0, repair_s=0.0))
    each = [failing.lost / failing.takeovers / (seconds / CHECKPOINTS)]
    assert each[0] == pytest.approx(0.5, abs=0.03)
    hours = sum(a.stop - a.start for a in failing.attempts) / HOUR
    assert failing.takeovers / hours == pytest.approx(1.0, abs=0.1)
    work = sum(job.seconds for job in jobs)
    assert failing.busy == pytest.approx(work + failing.lost)
    preempted = simulate(jobs, Cluster(50, ONE, 0.0, preemptions=1.0, away_s=0.0))
    assert (preempted.lost, preempted.takeovers) == (0.0, 0)
    assert preempted.busy == pytest.approx(work)


def test_a_failed_cell_waits_for_its_lease_to_be_stale():
    course = simulate([Job("a", 1000.0)], Cluster(2, ONE, 0.0, failures=3.0, repair_s=1e9), seed=2)
    first, *rest = sorted(course.attempts, key=lambda a: a.start)
    assert first.end == "failed"
    assert rest[0].start == pytest.approx(first.stop + STALE_AFTER_S)


def test_a_thousand_devices_are_used_to_within_15_percent():
    dice = random.Random(0)
    jobs = in_order(Job(str(i), 10 ** dice.uniform(1.5, 4), Need(dice.choice([1] * 15 + [8]), 10.0)) for i in range(3000))
    assert simulate(jobs, Cluster(125, node(8, 80.0))).ratio < 1.15


def test_the_bound_is_that_of_work_and_of_the_longest_chain():
    jobs = [Job("a", 10.0), Job("b", 30.0, trunk="a", leaves=1.0), Job("c", 5.0, Need(2))]
    assert lower_bound(jobs, Cluster(1, node(2), start_s=1.0)) == 42.0
    assert lower_bound(jobs, Cluster(1, (Device(None, 1),), start_s=0.0)) == 50.0
