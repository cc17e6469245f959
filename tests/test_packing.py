"""Documents packed whole: every target once, no attention across, one loss however a batch is split."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from questctl.config import DataConfig
from questctl.data.packing import IGNORED, best_fit, documents_of, pack, parts, windows_of
from questctl.data.tokens import prepare
from questctl.errors import UsageError
from questctl.models.llama import Llama
from questctl.store import RunStore
from questctl.training.loading import load, loss_on
from questctl.training.loop import Trainer, train

END = 0


def stream(lengths, seed=0):
    """Documents of these lengths, of ids 1 to 9, each followed by the end."""
    draw = np.random.default_rng(seed)
    return np.concatenate([np.append(draw.integers(1, 10, n), END) for n in lengths]).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    seq_len=st.sampled_from([1, 2, 7, 16]),
    rest=st.integers(0, 3),
)
def test_every_target_of_the_stream_is_one_of_a_sequence(lengths, seq_len, rest):
    tokens = np.append(stream(lengths), np.ones(rest, np.uint8))
    packed = pack(tokens, seq_len, documents_of(tokens, END))
    inputs, targets, first = parts(packed.rows(np.arange(packed.sequences)))
    counts = targets != IGNORED
    found = sorted(zip(inputs[counts].tolist(), targets[counts].tolist(), strict=True))
    assert found == sorted(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    at = np.arange(seq_len)
    assert (first <= at).all()
    assert packed.filled <= 1
    # what a token may attend to is the text before it, without a gap
    for row, place in zip(*np.nonzero(counts), strict=True):
        context = inputs[row, first[row, place] : place + 1].tobytes()
        assert context + targets[row, place].tobytes() in tokens.astype(np.int64).tobytes()


def test_documents_that_fit_are_not_cut_and_the_fullest_sequence_takes_the_next():
    tokens = stream([9, 3, 2, 5, 4, 20])
    packed = pack(tokens, 15, documents_of(tokens, END))
    assert sorted(packed.lengths.tolist()) == [4, 5, 6, 7, 7, 10, 16]  # with the end before; 22 is 16 and 7 that share a token
    assert packed.sequences == 4
    owner = best_fit(np.array([10, 5, 6, 4, 7, 16, 7]), 16)
    sizes = [sum(n for n, o in zip([10, 5, 6, 4, 7, 16, 7], owner, strict=True) if o == i) for i in range(owner.max() + 1)]
    assert sorted(sizes) == [9, 14, 16, 16]
    assert best_fit(np.zeros(0, np.int64), 4).tolist() == []


def test_the_order_is_a_permutation_of_each_epoch_and_that_of_any_number_of_processes():
    tokens = stream([5, 3, 8, 2, 6, 7, 4, 9, 3, 5])
    packed = pack(tokens, 10, documents_of(tokens, END))
    n = packed.sequences
    epoch = np.concatenate([packed.batch(seed=3, step=i, batch_size=1) for i in range(n)])
    assert sorted(map(bytes, epoch)) == sorted(map(bytes, packed.rows(np.arange(n))))
    whole = packed.batch(seed=1, step=2, batch_size=4)
    halves = [packed.batch(seed=1, step=2, batch_size=4, rank=r, world_size=2) for r in range(2)]
    assert np.array_equal(np.concatenate(halves), whole)
    assert len(packed.validation(25)) == 2
    assert len(packed.validation(1)) == 1


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("kv", [0, 1])
def test_the_loss_of_packed_documents_is_that_of_the_documents_alone(window, kv):
    shape = tiny.config(model__n_kv_head=kv, model__window=window).model.model_copy(update={"vocab_size": 10})
    model = Llama(shape, seed=1)
    tokens = stream([5, 3, 8, 2, 11])
    packed = pack(tokens, 12, documents_of(tokens, END))
    inputs, targets, first = (torch.from_numpy(x) for x in parts(packed.rows(np.arange(packed.sequences))))
    loss = model(inputs, targets, first)
    total, n = torch.zeros(()), 0
    for start, stop in zip(packed.starts, packed.starts + packed.lengths, strict=True):
        piece = torch.from_numpy(tokens[start:stop].astype(np.int64))[None]
        total, n = total + model(piece[:, :-1], piece[:, 1:]) * (stop - start - 1), n + stop - start - 1
    torch.testing.assert_close(loss, total / n)
    ours, theirs = (torch.autograd.grad(x, model.blocks[0].q.weight)[0] for x in (loss, total / n))
    torch.testing.assert_close(ours, theirs)
    nothing = torch.full_like(targets, IGNORED)
    assert model(inputs, nothing, first).item() == 0


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    """Short lines, each a document."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{"abc" * (i % 7)} line {i}"}}\n' for i in range(800)))
    return f"file:{path}"


def config(text, **changes):
    return tiny.config({"data.source": text, "data.packing": "documents", "data.seq_len": 32, **changes})


def test_a_run_on_documents_resumes_and_is_evaluated_as_it_was_trained(text, tmp_path):
    c = config(text, **{"train.micro_batch": 2, "train.checkpoint_every": 3})
    whole = tiny.assert_resumes(c, tmp_path)
    loaded = load(RunStore(tmp_path / "whole").run(c.run_id))
    assert loss_on(loaded.model, c, loaded.data) == whole.loss
    rows = windows_of(loaded.data, "val", c.data).validation(c.train.eval_tokens)
    assert whole.val_tokens == int((rows[:, 1] != IGNORED).sum())
    assert c.run_id != config(text, **{"data.packing": "stream"}).run_id


def test_micro_batches_weigh_every_target_alike(text):
    c = config(text)
    data = prepare(c.data.source, c.data.tokenizer, val_fraction=c.data.val_fraction)
    gradients = []
    for rows in (8, 2, 1):
        train_config = c.train.model_copy(update={"micro_batch": rows})
        trainer = Trainer(c.model_copy(update={"train": train_config}), data, torch.device("cpu"), stop=lambda: False)
        loss = trainer.forward_backward(0)
        gradients.append((float(loss), trainer.model.blocks[0].q.weight.grad))
    for loss, gradient in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], abs=1e-6)
        torch.testing.assert_close(gradient, gradients[0][1], rtol=0, atol=1e-6)


def test_a_teacher_reads_the_same_documents(text, tmp_path):
    first = config(text, **{"train.steps": 2})
    train(first, runs=tmp_path)
    c = config(text, **{"teacher.source": str(tmp_path / first.run_id), "teacher.weight": 1.0, "train.steps": 1})
    trainer = Trainer(c, load(RunStore(tmp_path).run(first.run_id)).data, torch.device("cpu"), stop=lambda: False)
    trainer.model.load_state_dict(trainer.teacher.model.state_dict())
    loss, divergence = trainer.forward_backward(0).tolist()
    assert loss > 1
    assert abs(divergence) < 1e-6


def test_ids_of_no_known_text_have_no_documents():
    c = tiny.config({"data.packing": "documents"})
    with pytest.raises(UsageError, match=r"data\.packing: documents: synthetic.*choose stream"):
        train(c)
    assert "packing" not in DataConfig().model_dump()
