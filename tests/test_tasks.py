"""Tasks: log-likelihoods against a loop by hand, accuracy on a planted task, and errors for files that are no task."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from questctl.data.tokenizers import ByteTokenizer
from questctl.errors import DataError, UsageError
from questctl.evaluate import tasks
from questctl.models.llama import build_model

BYTE = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    config = tiny.config(tiny.QUEST, model__vocab_size=256)
    return build_model(config.model, config.quant, 0).eval()


@torch.no_grad()
def by_hand(model, context, continuation):
    """One token at a time."""
    ids, total, greedy = list(context), 0.0, True
    for token in continuation:
        logp = model(torch.tensor([ids]))[0, -1].float().log_softmax(-1)
        total, greedy = total + logp[token].item(), greedy and int(logp.argmax()) == token
        ids.append(token)
    return total, greedy


def test_log_likelihoods_are_those_of_a_loop_by_hand(model):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(1, 256, (n,), generator=g).tolist()  # noqa: E731
    pairs = [(draw(c), draw(k)) for c, k in ((1, 1), (5, 3), (5, 3), (2, 6), (1, 7))]
    greedy = int(model(torch.tensor([pairs[0][0]]))[0, -1].argmax())
    pairs.append((pairs[0][0], [greedy]))
    for (value, is_greedy), (context, continuation) in zip(tasks.loglikelihoods(model, pairs, 16), pairs, strict=True):
        total, best = by_hand(model, context, continuation)
        assert value == pytest.approx(total, abs=1e-4)
        assert is_greedy == best
    assert tasks.loglikelihoods(model, pairs[-1:], 16)[0][1] is True


def test_a_long_context_loses_its_beginning(model):
    context, continuation = list(range(1, 60)), [65, 66]
    short = tasks.loglikelihoods(model, [(context[-7:], continuation)], 8)[0]
    assert tasks.loglikelihoods(model, [(context, continuation)], 8)[0] == short


def test_generated_text_ends_before_its_stop(model):
    whole = tasks.continued(model, BYTE, "ab", {"until": [], "max_gen_toks": 8}, max_length=16)
    assert len(whole) >= 1
    stop = whole[1:2] or whole[:1]
    assert tasks.continued(model, BYTE, "ab", {"until": [stop], "max_gen_toks": 8}, max_length=16) == whole.partition(stop)[0]


@pytest.mark.slow
def test_lm_eval_agrees_with_a_count_by_hand(model, tmp_path):
    pytest.importorskip("lm_eval")
    g = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(40):
        text = lambda n: "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (n,), generator=g))  # noqa: E731
        rows.append({"ctx": text(6), "endings": [text(3), text(5), text(4)], "label": len(rows) % 3})
    path = tmp_path / "cloze.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    right = norm = 0
    for row in rows:  # lm-eval puts one space between the context and a choice
        pairs = [(list(row["ctx"].encode()), list(f" {e}".encode())) for e in row["endings"]]
        scores = [v for v, _ in tasks.loglikelihoods(model, pairs, 16)]
        right += max(range(3), key=scores.__getitem__) == row["label"]
        per = [v / len(e) for v, e in zip(scores, row["endings"], strict=True)]
        norm += max(range(3), key=per.__getitem__) == row["label"]
    found = tasks.evaluate(model, BYTE, [str(path)], max_length=16)
    assert found["cloze"]["acc"] == right / 40
    assert found["cloze"]["acc_norm"] == norm / 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ('{"context": "a", "choices": ["b", "c"]}', "line 1: has no answer"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 0}\n{"context": ', "line 2: is not JSON"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "'answer' is 2, not the index of one of 2"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "line 1: 'choices' is not a list of two or more"),
        ("[1, 2]", "line 1: has no context"),
    ],
)
def test_a_file_that_is_no_task_is_refused_with_its_line(text, message, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        tasks.load(str(path))


def test_only_an_explicit_prefix_reaches_the_hub(tmp_path):
    with pytest.raises(UsageError, match="hf:hellaswag"):
        tasks.load("hellaswag")
    assert tasks.load("hf:hellaswag") == "hellaswag"
    with pytest.raises(DataError, match="not a file"):
        tasks.load(str(tmp_path / "no.jsonl"))
