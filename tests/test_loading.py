"""A run read back: the same loss to the last digit, checkpoints, and one sentence for what cannot be read."""

from __future__ import annotations

import pytest
import torch
from tiny import LSQ, QUEST, config

from questctl.config import PTQConfig
from questctl.errors import DataError, UsageError
from questctl.posttraining.preflight import require_full_precision
from questctl.store import RunStore
from questctl.training.loading import load, load_model, loss_on
from questctl.training.loop import train


@pytest.mark.parametrize("changes", [{}, QUEST, LSQ, {"train.precision": "bf16"}])
def test_a_loaded_run_has_the_loss_that_it_reported(changes, tmp_path):
    result = train(config(changes), runs=tmp_path)
    loaded = load(RunStore(tmp_path).run(result.run))
    torch.set_num_threads(1)
    assert loss_on(loaded.model, loaded.config, loaded.data) == result.loss
    assert loss_on(loaded.model, loaded.config, loaded.data, part="train", max_tokens=64) != result.loss


def test_an_unfinished_run_gives_its_newest_checkpoint_and_older_ones_by_step(tmp_path):
    c = config(QUEST)
    asked = iter(range(100))
    with pytest.raises(InterruptedError):
        train(c, runs=tmp_path, stop=lambda: next(asked) == 9)
    run = RunStore(tmp_path).run(c.run_id)
    newest, at_8, at_9 = load_model(run), load_model(run, step=8), load_model(run, step=9)
    assert torch.equal(newest.blocks[0].q.weight, at_9.blocks[0].q.weight)
    assert not torch.equal(at_8.blocks[0].q.weight, at_9.blocks[0].q.weight)
    with pytest.raises(DataError, match="not finished"):
        require_full_precision(_as_bf16(run, tmp_path), "quantize")


def _as_bf16(run, root):
    c = config()
    other = RunStore(root).run(c.run_id)
    other.create(c)
    return other


def test_what_cannot_be_read_is_named(tmp_path):
    c = config()
    run = RunStore(tmp_path).run(c.run_id)
    run.create(c)
    with pytest.raises(DataError, match="no weights yet"):
        load_model(run)
    train(c, runs=tmp_path)
    weights = run.model_path.read_bytes()
    run.model_path.write_bytes(weights[:100])
    with pytest.raises(DataError, match=r"model\.safetensors: is damaged"):
        load_model(run)
    run.model_path.write_bytes(weights)
    wider = config(model__n_layer=1)
    RunStore(tmp_path).run(wider.run_id).create(wider)
    (tmp_path / wider.run_id / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match="do not fit its config"):
        load_model(RunStore(tmp_path).run(wider.run_id))


def test_quantized_runs_are_refused_where_full_precision_is_needed(tmp_path):
    c = config(QUEST)
    run = RunStore(tmp_path).run(c.run_id)
    run.create(c)
    with pytest.raises(UsageError, match=r"quantize: .*\(quest-w4a4\)"):
        require_full_precision(run, "quantize")


def test_weights_rounded_after_training_are_not_rounded_again():
    c = config({**QUEST, ("quant", "overrides", "blocks.0.q", "weights"): "int8-h32-rms-ste"})
    assert c.remaining_quant is c.quant
    left = c.model_copy(update={"ptq": PTQConfig(source="x")}).remaining_quant
    assert (str(left.weights), left.activations) == ("bf16", c.quant.activations)
    assert left.overrides["blocks.0.q"].weights is None
