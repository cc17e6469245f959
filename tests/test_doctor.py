"""The diagnosis of a machine: each check has a state and a remedy, and nothing is written."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from command_line import output

from questctl import doctor
from questctl.doctor import LIMITED, MISSING, OK, check_machine


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Matrix rates that are not measured."""
    values = {"fp32": 100.0, "bf16": 140.0}
    monkeypatch.setattr(doctor, "matrix_rates", lambda: values)
    monkeypatch.setattr(doctor.OtherWork, "cpus", lambda self: 0.1)
    return values


def check(name, **how):
    return next(c for c in check_machine(**how) if c.what == name)


def test_every_check_has_a_state_and_nothing_is_written(tmp_path):
    checks = check_machine(tmp_path / "runs")
    assert {c.state for c in checks} <= {OK, LIMITED, MISSING}
    assert all(c.found and c.means for c in checks)
    assert len({c.what for c in checks}) == len(checks)
    assert list(tmp_path.iterdir()) == []


def test_bf16_is_advised_where_it_is_measured_to_be_faster(rates):
    assert "1.4x fp32: train.precision=bf16 may pay" in check("matrix rate").means
    rates["bf16"] = 50.0
    assert "0.5x fp32: stay with train.precision=fp32" in check("matrix rate").means


def test_a_folder_that_cannot_be_written_and_a_full_disk(tmp_path, monkeypatch):
    assert check("runs folder", runs=tmp_path / "a" / "b").state == OK
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert check("runs folder", runs=tmp_path).state == LIMITED
    monkeypatch.setattr(os, "access", lambda *_: False)
    folder = check("runs folder", runs=tmp_path)
    assert (folder.state, "QUESTCTL_RUNS" in folder.means) == (MISSING, True)


def test_what_is_missing_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'questctl[parquet]'" in check("pyarrow").means
    assert check("triton").state == LIMITED


def test_the_command_shows_the_same_as_table_and_json(tmp_path):
    rows = json.loads(output("doctor", "--runs", tmp_path, "--json"))
    table = output("doctor", "--runs", tmp_path)
    assert all(row["what"] in table and row["state"] in table for row in rows)


def test_other_work_delays_both_precisions_alike(monkeypatch):
    """A machine that is busy during the first half of the measurement: every product takes ten times as long there."""
    monkeypatch.undo()
    clock, calls = [0.0], [0]

    def tick():
        calls[0] += 1
        if calls[0] % 2 == 0:  # the end of a product
            clock[0] += 10.0 if calls[0] <= 2 * doctor.REPEATS else 1.0
        return clock[0]

    monkeypatch.setattr(doctor.time, "perf_counter", tick)
    monkeypatch.setattr(doctor, "SIZE", 16)
    rates = doctor.matrix_rates()
    assert rates["fp32"] == rates["bf16"] == pytest.approx(2 * doctor.SIZE**3 / 1e9)


def test_rates_that_are_measured_beside_other_work_are_no_advice(monkeypatch):
    monkeypatch.setattr(doctor.OtherWork, "cpus", lambda self: 1.26)
    rate = check("matrix rate")
    assert rate.state == LIMITED
    assert rate.means.startswith("other programs use 1.3 CPUs")


def test_a_process_with_fewer_cpus_than_the_machine_is_told(monkeypatch):
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 64)
    monkeypatch.setattr(doctor, "cpu_count", lambda: 1)
    found = check("processor")
    assert "64 cores, of which this process may use 1" in found.found
    assert "no more threads than that" in found.means
    monkeypatch.setattr(doctor, "cpu_count", lambda: 64)
    assert "may use" not in check("processor").found


def test_what_a_compiler_is_for_is_said_where_there_is_none_or_it_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "none")
    assert (check("compiler").state, check("compiler").found) == (LIMITED, "none")
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    assert "fails: CalledProcessError" in check("compiler").found
