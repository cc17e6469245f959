"""experiments/law: rounds are predicted before they are trained, and go on from the table of points alone."""

import importlib.util
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

SOURCE = Path(__file__).parents[1] / "experiments" / "law"
SMALLER = {"1048576": "16384", "2097152": "24576", "4194304": "32768", "524288": "8192", "131072": "2048"}


@pytest.mark.slow
def test_rounds_are_predicted_trained_and_continued(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("measure", SOURCE / "measure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fewer = {
        "SIZES": module.SIZES[:2],
        "LENGTHS": (8192, 16384),
        "ROUNDS": ("1", "2", "5"),
        "RUNS_A_ROUND": {"2": 2, "5": 2},
        "GOALS": {"5": "loss@402048:16384"},
        "LARGE": module.SIZES[1:3],
        "HELD_OUT": {"held-out": ("1", "2"), "held-out-2": ("1", "2", "5")},
    }
    for name, value in fewer.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "BASE", {**module.BASE, "train.eval_tokens": 2048, "optim.warmup_steps": 2})
    for name in ("round-1.toml", "held-out.toml", "held-out-2.toml"):
        text = (SOURCE / name).read_text().replace("laptop-402K", "laptop-222K").replace("laptop-1.8M", "laptop-402K")
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        (tmp_path / name).write_text(text.replace('schedule = "wsd"', 'schedule = "wsd"\noptim.warmup_steps = 2'))
    law = module.Law(tmp_path, tmp_path / "runs")
    assert not module.measure(stopped(law, after=1))
    assert len(law.points) == 36
    predicted = json.loads((tmp_path / "round-2.json").read_text())
    assert all(row["interval"] and "loss" not in row for row in predicted["runs"])

    shutil.rmtree(tmp_path / "runs")  # what another sitting has is the table
    assert module.measure(module.Law(tmp_path, tmp_path / "runs"))
    outcome = json.loads((tmp_path / "round-2.json").read_text())
    assert outcome["law_of_rounds"] == ["1"]
    for before, after in zip(predicted["runs"], outcome["runs"], strict=True):
        assert before.items() <= after.items()
        assert after["within"] == (before["interval"][0] <= after["loss"] <= before["interval"][1])
    table = pd.read_csv(tmp_path / "points.csv")
    assert dict(table["round"].astype(str).value_counts()) == {"1": 36, "2": 2, "held-out": 6, "5": 2, "held-out-2": 4}
    assert set(table.N[table["round"].astype(str) == "5"]) <= set(module.LARGE)
    for name, rounds in (("held-out", ["1", "2"]), ("held-out-2-qat", ["1", "2", "5"])):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["law_of_rounds"] == rounds
        assert all("within" in row for row in found["runs"])


def stopped(law, after):
    """The law, whose training stops before the round after `after`."""
    real, rounds = law.train, []

    def train(*words):
        rounds.append(words)
        return len(rounds) <= after and real(*words)

    law.train = train
    return law
