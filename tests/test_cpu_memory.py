"""The bytes of tensors in a training step, against the allocations that torch's profiler reports: no clock, no allocator."""

import importlib.util
from pathlib import Path

import pytest

from questctl.config import Layer, flatten, resolve

spec = importlib.util.spec_from_file_location("memory", Path(__file__).parents[1] / "benchmarks" / "memory.py")
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)

SHAPE = {"d_model": 64, "n_head": 2, "d_ff": 192, "n_layer": 3}
W4A4 = {"method": "quest", "bits": 4, "block": 64}


def config_of(model=None, quant=None, data=None, train=None, optim=None):
    tree = {
        "model": {**SHAPE, **(model or {})},
        "quant": quant or {},
        "data": {"source": "synthetic:markov?vocab=64&tokens=20000", "seq_len": 64, **(data or {})},
        "optim": optim or {},
        "train": {"steps": 3, "batch_size": 16, "eval_tokens": 128, "threads": 1, **(train or {})},
    }
    return resolve([Layer("test", flatten(tree, where="test"))]).config


CASES = {  # each is decided at another place of the step, or by another term
    "fp32": {},
    "W4A4": {"quant": W4A4},
    "checkpointed": {"quant": W4A4, "train": {"checkpoint_activations": True}},
    "weights decide": {"quant": W4A4, "train": {"batch_size": 1}},
    "autocast": {"train": {"precision": "bf16"}},
    "parts of a batch": {"quant": W4A4, "train": {"micro_batch": 4}},
    "muon": {"quant": W4A4, "optim": {"name": "muon"}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_count_is_that_of_the_profiler(name):
    measured, predicted = memory.counted(config_of(**CASES[name]))
    assert predicted == pytest.approx(measured, rel=0.06)


OTHERS = {  # none of them was looked at when the terms were written
    "grouped heads": {"model": {"n_head": 4, "n_kv_head": 2, "head_width": 32}},
    "wide": {"model": {"d_model": 128, "d_ff": 512, "n_layer": 2}, "quant": {"method": "quest", "bits": 2}},
    "deep": {"model": {"n_layer": 8}, "quant": {"method": "ste", "bits": 3, "block": 64}, "train": {"batch_size": 4}},
    "long": {"data": {"seq_len": 128}, "train": {"batch_size": 4, "checkpoint_activations": True}},
    "many ids": {"model": {"vocab_size": 1000}},
    "W8A8 by autocast": {"quant": {**W4A4, "bits": 8}, "train": {"precision": "bf16"}},
    "small parts": {"train": {"micro_batch": 2}},
    "weights alone": {"quant": {"weights": "int4-h64-rms-trust", "activations": "bf16"}},
    "one sequence": {"train": {"batch_size": 1}},
    "small ffn": {"model": {"d_ff": 128}, "quant": W4A4},
    "autocast, parts": {"train": {"precision": "bf16", "micro_batch": 8}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_configurations_are_within_a_tenth(name):
    measured, predicted = memory.counted(config_of(**OTHERS[name]))
    assert predicted == pytest.approx(measured, rel=0.1)
