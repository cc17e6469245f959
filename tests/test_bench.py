"""The benchmark: wrong results get no speed, rows survive writing and reading, and the command's answers and exit codes."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import outcome

import questctl
from questctl.bench.suite import CHOICES, Benchmark, Sizes
from questctl.cli import bench as command
from questctl.errors import DataError, UsageError
from questctl.kernels.bench import rated, run_case
from questctl.kernels.devices import Calibration
from questctl.kernels.op import OPS, Case, Check, Cost, Implementation, KernelError, load
from questctl.kernels.rows import BenchRow, compare, document, read_rows, shape_text, write_csv, write_json

CPU = torch.device("cpu")
RATES = Calibration("test", 1, copy_gbs=10.0, tops={"fp32": 0.1})


def case(*implementations: Implementation, cost: Cost | None = None) -> Case:
    """Doubling 1000 numbers; the first implementation is ours."""
    return Case(
        "double",
        {"N": 1000},
        implementations,
        implementations[-1].name,
        lambda seed: (torch.arange(1000.0) + seed,),
        lambda given, found: Check(float((found - 2 * given[0]).abs().max()), 0.0),
        cost,
    )


def refuse(x):
    raise RuntimeError("not here\nand not there")


RIGHT = Implementation("right", lambda x: x + x)
PEER = Implementation("peer", lambda x: x * 2)


def test_a_right_result_gets_times_rates_and_a_share_of_the_roofline():
    ours, peer = run_case(case(RIGHT, PEER, cost=Cost(8000, 1000)), CPU, RATES, seconds=0.01)
    assert (ours.verdict, peer.verdict) == ("PASS", "PASS")
    assert 0 < ours.p20_us <= ours.p50_us <= ours.p80_us
    assert ours.gb_per_s == pytest.approx(8000 / ours.p50_us / 1e3)
    assert ours.tops == pytest.approx(1000 / ours.p50_us / 1e6)
    assert ours.roofline_us == pytest.approx(8000 / 10e9 * 1e6)
    assert ours.bound == "memory"
    assert ours.roofline_share == pytest.approx(ours.roofline_us / ours.p50_us)
    assert peer.speed_up_p50 == 1
    assert ours.speed_up_p20 <= ours.speed_up_p50 <= ours.speed_up_p80
    assert ours.timer == "perf_counter"


def test_a_roofline_can_be_the_matmul_and_needs_its_rate():
    row = run_case(case(RIGHT, PEER, cost=Cost(8, 1e9, "fp32")), CPU, RATES, seconds=0.001)[0]
    assert (row.bound, row.roofline_us) == ("matmul", pytest.approx(1e9 / 0.1e12 * 1e6))
    row = run_case(case(RIGHT, PEER, cost=Cost(8, 1e9, "int8")), CPU, RATES, seconds=0.001)[0]
    assert (row.bound, row.roofline_us) == ("", None)


def test_a_better_calibration_lowers_the_share():
    row = run_case(case(RIGHT, PEER, cost=Cost(8000, 1000)), CPU, RATES, seconds=0.001)[0]
    again = rated(row, Calibration("test", 1, copy_gbs=20.0, tops={"fp32": 0.1}))
    assert again.roofline_share == pytest.approx(row.roofline_share / 2)
    assert again.roofline_us == pytest.approx(row.roofline_us / 2)
    assert rated(row, Calibration("test", 1, copy_gbs=20.0, tops={})) == row


@pytest.mark.parametrize("wrong", [lambda x: x * 2 + 1e-3, lambda x: x * float("nan"), refuse])
def test_a_wrong_result_is_a_fail_without_a_speed(wrong):
    ours, peer = run_case(case(Implementation("wrong", wrong), PEER), CPU, RATES, seconds=0.001)
    assert ours.verdict == "FAIL"
    assert ours.reason
    assert ours.p50_us is ours.speed_up_p50 is ours.gb_per_s is None
    assert (peer.verdict, peer.p50_us is None) == ("PASS", False)


def test_a_peer_that_cannot_run_is_listed_with_its_reason():
    absent = Implementation("absent", lambda x: x, why_not=lambda device: f"not on a {device.type}")
    rows = run_case(case(RIGHT, Implementation("refuses", refuse), absent, PEER), CPU, RATES, seconds=0.001)
    assert [r.verdict for r in rows] == ["PASS", "SKIP", "SKIP", "PASS"]
    assert rows[1].reason == "RuntimeError: not here"
    assert rows[2].reason == "not on a cpu"
    assert rows[1].p50_us is rows[2].p50_us is None


def test_a_floor_is_timed_but_has_no_rate_of_work_that_it_does_not_do():
    copy = Implementation("copy", torch.clone, checked=False)
    floor = run_case(case(RIGHT, copy, cost=Cost(8000)), CPU, RATES, seconds=0.001)[1]
    assert (floor.verdict, floor.gb_per_s, floor.roofline_share, floor.error) == ("floor", None, None, None)
    assert floor.p50_us > 0


def test_check_only_times_nothing_and_preparing_is_not_timed():
    prepared = []
    slow = Implementation("prepared", lambda x, y: y, lambda x: (x, prepared.append(1) or 2 * x))
    rows = run_case(case(slow, PEER), CPU, check_only=True)
    assert rows[0].verdict == "PASS"
    assert rows[0].p50_us is None
    assert len(prepared) == 1
    run_case(case(slow, PEER), CPU, seconds=0.05)
    assert len(prepared) < 100


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_right_on_a_cpu_in_all_its_implementations(name):
    op = load(name)
    rows = run_case(op.case(op.test_shapes[3], CPU), CPU, check_only=True)
    assert rows[0].verdict == "PASS"
    assert {r.verdict for r in rows} <= {"PASS", "SKIP", "floor"}
    assert all(r.reason for r in rows if r.verdict == "SKIP")


# --- files ------------------------------------------------------------------------------------------------------------


def row(**changes) -> BenchRow:
    times = {"p20_us": 9.0, "p50_us": 10.0, "p80_us": 11.0}
    return BenchRow(**{"op": "a", "implementation": "b", "shape": {"M": 1, "N": 2}, "verdict": "PASS", **times, **changes})


def test_rows_survive_json_and_csv(tmp_path):
    rows = run_case(case(RIGHT, PEER, cost=Cost(8000, 10)), CPU, RATES, seconds=0.001)
    path = tmp_path / "rows.json"
    write_json(rows, RATES, path)
    assert read_rows(path) == rows
    write_csv(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as f:
        lines = list(csv.DictReader(f))
    assert [line["shape"] for line in lines] == ["N=1000", "N=1000"]
    assert float(lines[0]["p50_us"]) == rows[0].p50_us
    assert set(lines[0]) == set(BenchRow.__dataclass_fields__)
    assert shape_text({"M": 1, "N": 2}) == "M=1 N=2"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": []}', '{"schema": 1, "rows": [{"op": "a"}]}', '{"schema": 99, "rows": []}']
)
def test_a_file_that_is_none_of_ours_is_named(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(KernelError, match=r"odd\.json"):
        read_rows(path)
    with pytest.raises(KernelError, match="missing"):
        read_rows(tmp_path / "missing.json")


def test_slower_than_the_old_spread_is_a_regression():
    old = [row()]
    assert not compare(old, [row(p20_us=10.5, p50_us=12, p80_us=15)])[0].regressed
    found = compare(old, [row(p20_us=11.5, p50_us=12, p80_us=15)])[0]
    assert found.regressed
    assert found.ratio == pytest.approx(1.2)
    assert compare(old, [row(verdict="FAIL", p20_us=None, p50_us=None, p80_us=None)])[0].regressed
    assert compare(old, [row(shape={"M": 2, "N": 2})]) == []
    assert compare(old, [row(threads=7)]) == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_an_unknown_op_a_missing_folder_and_a_bad_file_are_refused(tmp_path):
    code, _, err = outcome("bench", "hadamrd")
    assert code == 2
    assert "did you mean 'hadamard'" in err.replace("\n", " ")
    assert outcome("bench", "pack", "--json", str(tmp_path / "none" / "x.json"))[0] == 2
    (tmp_path / "x.json").write_text("{}")
    code, _, err = outcome("bench", "pack", "--compare", str(tmp_path / "x.json"))
    assert code == 2
    assert "x.json" in err
    assert outcome("bench", "train-step", "--compile-only")[0] == 2


def test_json_alone_goes_to_stdout_and_with_a_file_to_the_file(tmp_path):
    code, out, _ = outcome("bench", "pack", "--check-only", "--json")
    assert code == 0
    document = json.loads(out)
    assert {r["op"] for r in document["rows"]} == {"pack"}
    assert document["calibration"] is None
    code, out, _ = outcome("bench", "--check-only", "--json", "pack", "unpack")  # an op after --json is an op
    assert {r["op"] for r in json.loads(out)["rows"]} == {"pack", "unpack"}
    path, table = tmp_path / "rows.json", tmp_path / "rows.csv"
    code, out, _ = outcome("bench", "pack", "--check-only", "--json", str(path), "--csv", str(table))
    assert code == 0
    assert "PASS" in out
    assert {r.op for r in read_rows(path)} == {"pack"}
    assert table.read_text().startswith("op,implementation,shape")


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures it")
def test_what_only_a_gpu_can_measure_is_said():
    code, out, err = outcome("bench", "one-bit-rate", "--check-only")
    assert (code, out) == (0, "")
    assert "one-bit-rate: there is nothing to measure of it on this machine" in " ".join(err.split())


def test_a_wrong_kernel_ends_with_1_and_a_regression_too(monkeypatch, tmp_path):
    rows = [row(device="here")]
    monkeypatch.setattr(command, "benchmark", lambda *a, **k: Benchmark(tuple(rows), None))
    assert outcome("bench", "pack")[0] == 0
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document([row(device="here", p20_us=1.0, p50_us=2.0, p80_us=3.0)], None)))
    code, out, _ = outcome("bench", "pack", "--compare", str(old))
    assert code == 1
    assert "SLOWER" in out
    rows[:] = [row(device="elsewhere")]
    assert outcome("bench", "pack", "--compare", str(old))[0] == 2
    rows[:] = [row(verdict="FAIL", p20_us=None, p50_us=None, p80_us=None, reason="7 wrong elements")]
    code, _, err = outcome("bench", "pack")
    assert code == 1
    assert "7 wrong elements" in err


def test_the_kernels_alone_are_measured_without_the_rest_of_the_package(tmp_path):
    path = tmp_path / "rows.json"
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('typer', 'pydantic', 'rich', 'pandas')))\n"
        f"sys.argv = ['kernels', 'pack', '--check-only', '--json', {str(path)!r}]\n"
        "import runpy; runpy.run_module('questctl.kernels', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = read_rows(path)
    assert {(r.op, r.verdict) for r in rows} == {("pack", "PASS"), ("pack", "floor")}
    assert "PASS" in done.stdout
    done = subprocess.run([sys.executable, "-m", "questctl.kernels", "pak"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pak" in done.stderr
    assert "torch" not in done.stderr


def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path, capsys):
    """Its question to torch is asked here, and its answer given to the script by `true`, which prints nothing."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
    (question,) = re.findall(r"^gpu=\$\(\$python -c '(.+)'\)$", script.read_text(), re.MULTILINE)
    exec(question)
    assert capsys.readouterr().out == "\n"
    environment = {**os.environ, "PYTHON": "true"}
    done = subprocess.run(["bash", script, tmp_path / "out"], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_runs_but_cannot_be_timed_says_so_and_does_not_stop_the_others():
    calls = []

    def once(x):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("only once\nand never again")
        return x * 2

    rows = run_case(case(Implementation("once", once), PEER), CPU, RATES, seconds=0.001)
    assert (rows[0].verdict, rows[0].p50_us, rows[0].reason) == ("PASS", None, "not timed: only once")
    assert rows[1].p50_us > 0


def test_products_are_measured_at_the_sizes_that_are_asked_for(tmp_path):
    shapes = [{"M": 64, "N": 8, "K": 16, "bits": 4, "packed": 1}, {"M": 64, "N": 8, "K": 16, "bits": 1, "packed": 1}]
    assert Sizes().of(shapes) == shapes
    found = Sizes("7B", [1, 256], 2).of(shapes)
    assert [(s["M"], s["N"], s["K"], s["bits"], s["packed"]) for s in found[:1] + found[-1:]] == [
        (1, 12288, 4096, 2, 1),
        (256, 4096, 11008, 2, 0),
    ]
    assert len(found) == 8
    assert [s["bits"] for s in Sizes(None, [3]).of(shapes)] == [4, 1]
    assert Sizes("7B").of([{"R": 1}]) == [{"R": 1}]
    assert Sizes("7B").of([]) == []
    assert outcome("bench", "--model", "8B")[0] == outcome("bench", "--m", "1,x")[0] == outcome("bench", "--m", "0")[0] == 2


def test_pictures_are_drawn_of_what_was_measured(tmp_path):
    from questctl.kernels.plots import write_plots

    rates = {"gb_per_s": 1.0, "roofline_us": 5.0, "roofline_share": 0.5, "speed_up_p50": 2.0, "baseline": "c"}
    rows = [row(shape={"M": m, "N": 2}, **rates) for m in (1, 16)]
    rows += [row(shape={"M": m, "N": 2}, implementation="c", speed_up_p50=1.0, baseline="c") for m in (1, 16)]
    names = {path.name for path in write_plots(rows, tmp_path / "new")}
    assert names == {"speedup-a.png", "roofline.png"}
    assert all((tmp_path / "new" / name).stat().st_size > 5000 for name in names)
    assert write_plots([row(shape={"R": 1})], tmp_path) == []


# --- from Python ------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_compared_and_stored_without_the_command_line(tmp_path):
    done = questctl.benchmark(["pack", "unpack"], check_only=True, threads=1)
    assert next(row.op for row in done.rows if row.implementation == "torch") == "pack", done.rows
    assert {row.op for row in done.rows} == {"pack", "unpack"}
    assert not done.failures
    done.write_json(tmp_path / "rows.json")
    done.write_csv(tmp_path / "rows.csv")
    assert tuple(questctl.read_benchmark(tmp_path / "rows.json")) == done.rows
    pairs = done.compare(tmp_path / "rows.json")
    assert len(pairs) == len(done.rows)
    assert not any(p.regressed for p in pairs)
    assert (tmp_path / "rows.csv").read_text().startswith("op,implementation,shape")


@pytest.mark.parametrize("how", [{"ops": ["pak"]}, {"ops": [], "model": "8B"}, {"ops": [], "m": [0]}])
def test_a_script_is_told_what_it_cannot_measure(how):
    with pytest.raises(UsageError):
        questctl.benchmark(**how)
    with pytest.raises(UsageError, match="train-step"):
        questctl.compile_kernels(["train-step"])


def test_products_and_everything_are_the_defaults(monkeypatch):
    """Without names: all operations; with a model or numbers of rows: the products alone."""
    from questctl.kernels import bench

    asked = []

    def run_ops(cases, *args, **how):
        asked.append(list(cases))
        return iter(())

    monkeypatch.setattr(bench, "run_ops", run_ops)
    assert questctl.benchmark(check_only=True).rows == ()
    assert asked.pop() == list(CHOICES)
    questctl.benchmark(m=[1], check_only=True)
    assert asked.pop() == ["int-gemm", "packed-gemm", "packed-gemm-16", "int-linear"]
    with pytest.raises(DataError, match="both measurements"):
        Benchmark((), None).compare([row()])


def test_an_op_that_breaks_is_a_row_and_the_next_one_begins(tmp_path, monkeypatch):
    """Triton's errors are no RuntimeErrors, so each would end all later operations. What came before is on the disk."""
    from triton.errors import TritonError

    from questctl.kernels import bench

    real, written = bench.op_cases, []

    def cases(name, *args):
        if name == "pack":
            raise TritonError("out of resource: shared memory")
        written.append(json.loads((tmp_path / "rows.json").read_text())["rows"] if written else [])
        return real(name, *args)

    monkeypatch.setattr(bench, "op_cases", cases)
    found = questctl.benchmark(["unpack", "pack", "one-bit-rate"], check_only=True, out=tmp_path / "rows.json")
    broken = [r for r in found.rows if r.op == "pack"]
    assert [(r.verdict, r.reason) for r in broken] == [("FAIL", "TritonError: out of resource: shared memory")]
    assert any(r.op == "unpack" for r in found.rows)
    assert {r["op"] for r in written[-1]} >= {"unpack", "pack"}


def test_a_kernel_that_does_not_compile_is_no_failure_of_a_peer(monkeypatch):
    """The first implementation fails with its reason; a peer with the same error is left out."""
    from triton.errors import TritonError

    def broken(*args):
        raise TritonError("PTX assembly error")

    first, peer = run_case(case(Implementation("ours", broken), Implementation("peer", broken)), CPU, check_only=True)
    assert (first.verdict, peer.verdict) == ("FAIL", "SKIP")
    assert first.reason == peer.reason == "TritonError: PTX assembly error"


FAKE_PYTHON = """#!/bin/bash
echo "$*" >> "$FAKE_LOG"
case "$*" in
  *get_device_name*) echo "Fake GPU" ;;
  *"questctl.kernels quantize "*) echo wrong; exit 1 ;;
  *"questctl.kernels pack "*) kill -9 $$ ;;
esac
"""


def test_the_script_for_a_gpu_gives_each_op_a_process_and_goes_on_where_it_stopped(tmp_path):
    """With an interpreter that measures nothing: one op has a wrong result, one is killed and is tried again."""
    python, log, out = tmp_path / "python", tmp_path / "log", tmp_path / "results"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "FAKE_LOG": str(log)}
    script = [Path(__file__).parent.parent / "benchmarks" / "gpu.sh", "speed", str(out)]
    assert subprocess.run(script, env=env, check=False, capture_output=True).returncode == 1
    first = re.findall(r"questctl\.kernels ([\w-]+)", log.read_text())
    assert sorted(first) == sorted(set(first))
    assert set(first) <= set(OPS)
    done = {path.stem for path in out.glob("*.done")}
    assert done == set(first) - {"pack"}
    assert "exit code" in (out / "pack.txt").read_text()
    assert (tmp_path / "results.tar.gz").exists()
    log.write_text("")
    assert subprocess.run(script, env=env, check=False, capture_output=True).returncode == 1
    assert re.findall(r"questctl\.kernels ([\w-]+)", log.read_text()) == ["pack"]
