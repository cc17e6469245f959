"""The bytes of tensors in a training step, against the allocations that torch's profiler reports: no clock, no allocator."""

import pytest

from questctl.config import Layer, flatten, resolve
from questctl.sweep.cpu_memory import step_bytes

SHAPE = {"d_model": 64, "n_head": 2, "d_ff": 192, "n_layer": 3}
W4A4 = {"method": "quest", "bits": 4, "block": 64}


def config_of(model=None, quant=None, data=None, train=None):
    tree = {
        "model": {**SHAPE, **(model or {})},
        "quant": quant or {},
        "data": {"source": "synthetic:markov?vocab=64&tokens=20000", "seq_len": 64, **(data or {})},
        "train": {"steps": 3, "batch_size": 16, "eval_tokens": 128, "threads": 1, **(train or {})},
    }
    return resolve([Layer("test", flatten(tree, where="test"))]).config


def counted(config) -> tuple[int, int]:
    """The most bytes of tensors that live at once in the second step of a run, and the predicted ones."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from questctl.training import loop

    data = loop.load_data(config)
    trainer = loop.Trainer(config, data, torch.device("cpu"), stop=lambda: False)
    trainer.step()
    states = 12 * sum(p.numel() for p in trainer.model.parameters())  # weights and moments, which live before the step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.step()
    events = sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    lives = most = 0
    for event in events:
        if event.name() == "[memory]":
            lives += event.nbytes()
            most = max(most, lives)
    return states + most, step_bytes(config.with_vocabulary(data.meta.vocab_size))


CASES = {  # each is decided at another place of the step, or by another term
    "fp32": {},
    "W4A4": {"quant": W4A4},
    "checkpointed": {"quant": W4A4, "train": {"checkpoint_activations": True}},
    "weights decide": {"quant": W4A4, "train": {"batch_size": 1}},
    "autocast": {"train": {"precision": "bf16"}},
    "parts of a batch": {"quant": W4A4, "train": {"micro_batch": 4}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_count_is_that_of_the_profiler(name):
    measured, predicted = counted(config_of(**CASES[name]))
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
    measured, predicted = counted(config_of(**OTHERS[name]))
    assert predicted == pytest.approx(measured, rel=0.1)
