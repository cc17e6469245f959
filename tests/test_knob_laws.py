"""Learning rate and batch by a fitted law: the values by hand, where they come from, and files that hold no law."""

from __future__ import annotations

import json

import pytest
from command_line import run_cli

from questctl.config import Layer, flatten, resolve
from questctl.errors import DataError, UsageError

LR = {"factor": 0.5, "exponents": {"N": -0.4, "D": 0.1}, "offsets": {}, "p_value": None}
BATCH = {"factor": 2.0, "exponents": {"D": 0.5}, "offsets": {"quest-w4a4": [1.5, 1.2, 1.9]}, "p_value": 0.001}
CELLS = [{"N": 1e4, "D": 1e5}, {"N": 1e6, "D": 1e7}]


def config(**values):
    return resolve([Layer("test", flatten({"preset": "laptop-27K", "data": {"seq_len": 128}, **values}, where="test"))])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "knobs.json"
    path.write_text(json.dumps({"kind": "knobs", "laws": {"lr": LR, "batch": BATCH}, "cells": CELLS}))
    return path


def test_the_rate_and_the_batch_are_those_of_the_law(file) -> None:
    found = config(optim={"lr": f"law:{file}"}, train={"tokens": 1 << 20, "batch_size": f"law:{file}"})
    made = found.config
    N, D = made.model.params_non_embedding, made.tokens
    assert made.train.batch_size == round(2.0 * (1 << 20) ** 0.5 / 128)
    assert made.train.steps == round((1 << 20) / (made.train.batch_size * 128))
    assert made.optim.lr == pytest.approx(0.5 * N**-0.4 * D**0.1, rel=1e-3)
    assert "0.5 · N^-0.400 · D^0.100" in found.origins["optim.lr"]
    by_hand = config(optim={"lr": made.optim.lr}, train={"steps": made.train.steps, "batch_size": made.train.batch_size})
    assert by_hand.config.run_id == made.run_id


def test_schemes_that_differ_have_factors_and_far_sizes_are_said(file) -> None:
    plain = config(train={"tokens": 1 << 20, "batch_size": f"law:{file}"}).config.train.batch_size
    low = config(train={"tokens": 1 << 20, "batch_size": f"law:{file}"}, quant={"method": "quest", "bits": 4}).config
    assert low.train.batch_size == round(1.5 * 2.0 * (1 << 20) ** 0.5 / 128) != plain
    far = config(optim={"lr": f"law:{file}"}, train={"tokens": 1e9})
    assert "D = 1e+09 is far outside the 1e+05 to 1e+07 that were fitted" in far.origins["optim.lr"]


def test_a_batch_by_law_needs_its_tokens(file) -> None:
    with pytest.raises(UsageError, match=r"train\.batch_size: a batch by law needs the length in tokens"):
        config(train={"steps": 100, "batch_size": f"law:{file}"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file; questctl fit-knobs --json > "),
        ("{", "is no JSON that can be read"),
        ("[]", "is not what questctl fit-knobs --json writes"),
        ('{"kind": "knobs", "laws": {"batch": {}}}', "has no law of lr; its laws: batch"),
        ('{"kind": "knobs", "laws": {"lr": {"factor": 1}}}', "its law of lr is not what questctl fit-knobs --json writes"),
        ('{"kind": "knobs", "laws": {"lr": {"factor": "a", "exponents": {"N": 1}}}}', "its law of lr is not what"),
        (json.dumps({"kind": "knobs", "laws": {"lr": {**LR, "factor": 0.0}}}), "gives 0, which is no positive number"),
    ],
)
def test_files_without_the_law_are_refused(tmp_path, text, message) -> None:
    if text is not None:
        (tmp_path / "k.json").write_text(text)
    with pytest.raises(DataError, match=f"optim.lr: .*{message}"):
        config(optim={"lr": f"law:{tmp_path / 'k.json'}"})


def test_the_file_of_fit_knobs_is_one(tmp_path) -> None:
    """From a table with planted optima lr* = .03·N^-.3 to a config."""
    rows = "N,D,lr,batch_sequences,seq_len,loss\n"
    for n in (1e5, 4e5, 16e5):
        for k in range(-4, 5):
            lr = 0.03 * n**-0.3 * 2 ** (k / 2)
            rows += f"{n},{20 * n},{lr},8,128,{3 + 0.05 * (k / 2) ** 2}\n"
    (tmp_path / "table.csv").write_text(rows)
    (tmp_path / "knobs.json").write_text(run_cli("fit-knobs", tmp_path / "table.csv", "--json").stdout)
    made = config(optim={"lr": f"law:{tmp_path / 'knobs.json'}"}, train={"tokens_per_param": 20}).config
    assert made.optim.lr == pytest.approx(0.03 * made.model.params_non_embedding**-0.3, rel=0.02)
