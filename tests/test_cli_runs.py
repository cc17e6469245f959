"""`questctl runs`: lists, shows, compares and removes exactly the runs that are named."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from command_line import invoke, output
from sweep_trainers import result_of

from questctl.config import Layer, RunConfig, flatten, resolve
from questctl.console.curves import drawing, sparkline
from questctl.store import Run, RunStore
from questctl.store.lease import Lease


def config(seed: int = 0, **quant: object) -> RunConfig:
    tree = {"preset": "53K", "train": {"seed": seed, "steps": 10}, "quant": quant or {"method": "bf16"}}
    return resolve([Layer("test", flatten(tree, where="test"))]).config


def plant(runs: Path, config: RunConfig, state: str = "done", *, loss: float = 2.0, message: str = "") -> Run:
    run = RunStore(runs).run(config.run_id)
    with run.open_for_training(config) as writer:
        writer.begin(step=0, steps=10, env={"data_hash": "ab" * 32, "threads": 1, "attempt": {"host": "here"}})
        for step in (2, 4, 6):
            metrics = {"step": step, "train_loss(nats/token)": loss + 2 / step, "grad_norm": 0.5}
            writer.log(metrics, {"step": step, "tokens/s": 1e3})
        if state != "done":
            writer.set_state(state, 6, message)
            return run
        writer.finish(result_of(config, loss=loss))
    return run


@pytest.fixture
def runs(tmp_path):
    plant(tmp_path / "runs", config(0), loss=2.0)
    plant(tmp_path / "runs", config(0, method="quest", bits=2), loss=2.5)
    plant(tmp_path / "runs", config(1), "failed", message="out of memory")
    plant(tmp_path / "runs", config(2), "preempted")
    return tmp_path / "runs"


def test_ls_shows_every_run_within_80_columns(runs):
    text = output("runs", "ls", "--runs", runs)
    for run in RunStore(runs).runs():
        assert run.name in text
    assert max(map(len, text.splitlines())) <= 80
    assert "2.5000" in text
    assert "6/10" in text


def test_ls_filters_sorts_and_writes_json(runs):
    def names(*words: str) -> list[str]:
        return [row["run"] for row in json.loads(output("runs", "ls", "--runs", runs, "--json", *words))]

    bf16, quest = config(0).run_id, config(0, method="quest", bits=2).run_id
    assert names() == sorted(r.name for r in RunStore(runs).runs())
    assert names("--state", "done", "--sort", "loss") == [bf16, quest]
    assert names("--sort", "loss")[:2] == [bf16, quest]
    assert names("--state", "failed") == [config(1).run_id]
    row = json.loads(output("runs", "ls", "--runs", runs, "--json", "--state", "failed"))[0]
    assert (row["state"], row["step"], row["steps"], row["message"], row["attempts"]) == ("failed", 6, 10, "out of memory", 1)


def test_ls_names_a_damaged_run_and_shows_the_others(runs):
    bad = RunStore(runs).run(config(0).run_id)
    bad.result_path.write_text("{")
    result = invoke("runs", "ls", "--runs", runs)
    assert result.exit_code == 0
    assert "damaged" in result.stdout
    assert config(2).run_id in result.stdout
    assert str(bad.result_path) in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "--sort", "los"], "did you mean 'loss'"),
        (["ls", "--state", "dun"], "--state: unknown state 'dun'"),
        (["show", "53K-bf15"], "did you mean '53K-bf16"),
        (["show", "53K"], "fits 4 runs"),
        (["show", "../runs"], "not the name of a run"),
        (["rm", "..", "--yes"], "not the name of a run"),
        (["rm", "/etc", "--yes"], "not the name of a run"),
        (["rm", "--yes"], "name the runs, or give --state"),
        (["rm"], "name the runs, or give --state"),
        (["compare", "quest-w2a2"], "fits"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(runs, words, message):
    before = sorted(runs.rglob("*"))
    if words[0] == "compare":
        words, message = ["compare", config(0).run_id], "two runs"
    text = output("runs", *words, "--runs", runs, code=2)
    assert message in text
    assert "Traceback" not in text
    assert sorted(runs.rglob("*")) == before


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    assert "no such folder" in output("runs", "ls", "--runs", tmp_path / "x", code=2)


def test_show_has_result_curve_config_and_files(runs):
    name = config(0, method="quest", bits=2).run_id
    text = output("runs", "show", name[-8:], "--runs", runs)
    assert name in text
    assert f"3.500 {sparkline([3.5, 3.0, 2.5 + 1 / 3])} 2.833" in text
    assert "int2-h64-rms-trust" in text
    assert "metrics.jsonl" in text
    data = json.loads(output("runs", "show", name, "--runs", runs, "--json"))
    assert data["loss"] == 2.5
    assert RunConfig.from_json(data["config"]).run_id == name
    assert data["last"]["step"] == 6
    assert set(data["files"]) >= {"config.json", "result.json"}
    assert "out of memory" in output("runs", "show", config(1).run_id, "--runs", runs)


def test_compare_shows_only_what_differs_and_the_difference_to_the_first(runs):
    a, b = config(0).run_id, config(0, method="quest", bits=2).run_id
    text = output("runs", "compare", a, b, "--runs", runs)
    assert "2.5000 (+0.5000)" in text
    assert "quant.weights" in text
    assert "model.d_model" not in text
    assert max(map(len, text.splitlines())) <= 80
    data = json.loads(output("runs", "compare", a, b, config(1).run_id, "--runs", runs, "--json"))
    assert data["config"] == {
        "quant.weights": ["bf16", "int2-h64-rms-trust", "bf16"],
        "quant.activations": ["bf16", "int2-h64-rms-trust", "bf16"],
        "train.seed": [0, 0, 1],
    }
    assert data["result"]["loss"] == [2.0, 2.5, None]
    assert data["minus_first"]["loss"] == [0.0, 0.5, None]
    assert data["curves"][b]["train_loss(nats/token)"] == pytest.approx([3.5, 3.0, 2.5 + 1 / 3])
    assert "twice" in output("runs", "compare", a, a[-8:], "--runs", runs, code=2)


def test_curves_stand_where_their_values_are():
    falling = [(float(x), 8.0 / x) for x in range(1, 9)]
    flat = [(float(x), 1.0) for x in range(1, 5)]
    lines = drawing({"A": falling, "B": flat}, width=8, height=4)
    body = [line.partition("│")[2].ljust(8) for line in lines[:4]]
    assert [row.index("A") for row in body if "A" in row] == [0, 1, 2, 5]  # 8, 4, then 2.7 to 1.6, then 1.3 to 1 nats
    assert body[3].startswith("BBBB")
    assert body[3][4:] == " AAA"
    assert lines[0].startswith("   8.000 │")
    assert lines[3].startswith("   1.000 │")
    assert lines[-1].split() == ["1", "8"]


def test_watch_ends_when_nothing_is_left_and_tells_how_it_ended(runs):
    text = output("runs", "watch", "--runs", runs)
    assert "out of memory" in text
    assert "2.5000" in text
    seen = json.loads(output("runs", "watch", "--runs", runs, "--json"))
    assert {s["state"] for s in seen} == {"done", "failed", "preempted"}
    assert "no such folder" in output("runs", "watch", "--runs", runs / "x", code=2)


def test_watch_follows_a_run_until_it_is_settled(runs):
    busy = RunStore(runs).run(config(2).run_id)
    begun = threading.Event()

    def train() -> None:
        with busy.open_for_training(config(2)) as writer:
            writer.set_state("running", 6)
            begun.set()
            time.sleep(0.5)
            writer.set_state("failed", 7, "stopped by hand")

    trainer = threading.Thread(target=train)
    trainer.start()
    begun.wait()
    assert "stopped by hand" in output("runs", "watch", "--interval", "0.1", "--runs", runs)
    trainer.join()


def test_rm_removes_the_named_and_only_with_consent(runs):
    name = config(0).run_id
    assert "--yes" in output("runs", "rm", name, "--runs", runs, code=2)
    assert (runs / name).exists()
    output("runs", "rm", name[-8:], "--runs", runs, "--yes")
    assert len(RunStore(runs).runs()) == 3
    assert json.loads(output("runs", "rm", "--state", "failed", "--runs", runs, "--yes", "--json")) == {
        "removed": [config(1).run_id]
    }
    assert [r.state() for r in RunStore(runs).runs()] == ["preempted", "done"]
    output("runs", "rm", "--state", "failed", "--runs", runs, "--yes")
    assert sorted(p.name for p in runs.iterdir()) == sorted(r.name for r in RunStore(runs).runs())


def test_rm_refuses_a_run_that_is_being_trained_and_then_removes_none(runs):
    busy = RunStore(runs).run(config(2).run_id)
    with busy.open_for_training(config(2)) as writer:
        writer.set_state("running", 6)
        assert f"{busy.name} is being trained" in output(
            "runs", "rm", config(0).run_id, busy.name, "--runs", runs, "--yes", code=2
        )
    assert len(RunStore(runs).runs()) == 4
    waiting = RunStore(runs).run(config(1).run_id)
    with Lease(waiting.lease_path):  # claimed, but not yet running
        assert "is working on this run" in output("runs", "rm", waiting.name, "--runs", runs, "--yes", code=2)
    assert len(RunStore(runs).runs()) == 4


def test_a_link_out_of_the_folder_is_neither_shown_nor_removed(runs, tmp_path):
    outside = plant(tmp_path / "other", config(7))
    (runs / "link").symlink_to(outside.path)
    assert "link" not in output("runs", "ls", "--runs", runs)
    assert "leads out" in output("runs", "rm", "link", "--runs", runs, "--yes", code=2)
    assert outside.exists()


def test_sparklines_keep_ends_and_width():
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 1.0]) == "▁█"
    line = sparkline([float(i) for i in range(1000)])
    assert (len(line), line[0], line[-1]) == (60, "▁", "█")
    assert list(line) == sorted(line)
