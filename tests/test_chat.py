"""Chat files: the learned spans of a conversation, by hand and by transformers; tokens, runs, and refused files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from command_line import run_cli
from helpers import files_in

from questctl.data import tokens as module
from questctl.data.chat import BEGINS, COUNTS, ID, ChatTokenizer, Template, Unrendered, rendered, template_of
from questctl.data.packing import IGNORED, parts, windows_of
from questctl.data.tokenizers import load
from questctl.data.tokens import open_dataset, prepare
from questctl.errors import DataError, Preempted, UsageError
from questctl.export.tokenizer import byte_tokenizer
from questctl.store import RunStore
from questctl.training.loading import load as load_run
from questctl.training.loop import train

CHATML = """{%- for m in messages %}
    {{- '<|' + m.role + '|>' + m.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}"""
MARKED = """{%- for m in messages %}
    {{- '<|' + m.role + '|>' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content + eos_token }}{% endgeneration %}
    {%- else %}{{ m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
FORGETS = """{%- for m in messages %}
    {{- '<|' + m.role + '|>' + (m.content if loop.last or m.role != 'assistant' else m.content.split('@')[-1]) + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hé?"},
    {"role": "assistant", "content": "why@yes ✓"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
WHOLE = "<|system|>be brief\0<|user|>hé?\0<|assistant|>why@yes ✓\0<|user|>more\0<|assistant|>no\0"


def template(text):
    return Template(text, (("eos_token", "\0"),))


def learned(record, text):
    """The text of a record, and the parts of it that are learned."""
    item = rendered(record, template(text), "here", "")
    assert isinstance(item, str), item
    whole, spans, end = json.loads(item)
    return whole, [whole[a:b] for a, b in spans], end


@pytest.mark.parametrize("text", [CHATML, MARKED])
def test_the_answers_of_a_conversation_are_learned(text):
    assert learned({"messages": TALK}, text) == (WHOLE, ["why@yes ✓\0", "no\0"], False)
    assert learned({"prompt": TALK[:4], "completion": TALK[4:]}, text) == (WHOLE, ["no\0"], False)


def test_of_a_template_that_changes_former_answers_the_last_is_learned():
    whole, parts_of_it, _ = learned({"messages": TALK}, FORGETS)
    assert "why@" not in whole
    assert parts_of_it == ["no\0"]


def test_texts_of_prompt_and_completion_need_no_template():
    item = rendered({"prompt": "2+2=", "completion": "4"}, None, "here", "")
    assert json.loads(item) == ["2+2=4", [[4, 5]], True]


def test_transformers_renders_the_same_text_and_the_same_answers():
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for text in (CHATML, MARKED, FORGETS):
        ((theirs,), _) = utils.render_jinja_template([TALK], chat_template=text, eos_token="\0")
        assert learned({"messages": TALK}, text)[0] == theirs
    (_, (spans,)) = utils.render_jinja_template([TALK], chat_template=MARKED, eos_token="\0", return_assistant_tokens_mask=True)
    assert [WHOLE[a:b] for a, b in spans] == learned({"messages": TALK}, MARKED)[1]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a"}, "here: has neither 'messages'.*its fields: text"),
        ({"messages": [{"role": "user"}]}, "has neither 'messages'"),
        ({"messages": TALK[:2]}, "the assistant says nothing in it"),
        ({"prompt": "a", "completion": ""}, "empty completion"),
        ([1], "its fields: none"),
    ],
)
def test_records_without_an_answer_are_told_of(record, said):
    item = rendered(record, template(CHATML), "here", "")
    assert isinstance(item, DataError)
    with pytest.raises(DataError, match=said):
        raise item


def test_a_template_may_refuse_a_conversation():
    item = rendered({"messages": TALK}, template(STRICT), "line 3", "")
    assert "line 3: the chat template does not take it (begin with the user)" in str(item)
    with pytest.raises(Unrendered):
        template("{{ messages[9].content }}").render(TALK)
    with pytest.raises(DataError, match="chat template cannot be read"):
        template("{% for %}").render(TALK)


def test_the_template_is_looked_for_where_tokenizers_keep_it():
    config = {"eos_token": {"content": "</s>"}, "bos_token": None, "chat_template": CHATML}
    assert template_of(None, json.dumps(config).encode()) == Template(CHATML, (("eos_token", "</s>"),))
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert template_of(None, json.dumps({"chat_template": named}).encode()) == Template(CHATML)
    assert template_of(b"own", json.dumps(config).encode()) == Template("own", (("eos_token", "</s>"),))
    assert template_of(None, None) is None
    assert template_of(None, b"{") is None


@pytest.fixture
def folder(tmp_path):
    """A byte tokenizer with a table, and a template."""
    path = tmp_path / "tokenizer"
    path.mkdir()
    (path / "tokenizer.json").write_text(byte_tokenizer())
    (path / "tokenizer_config.json").write_text('{"eos_token": "\\u0000"}')
    (path / "chat_template.jinja").write_text(CHATML)
    return path


@pytest.mark.parametrize("with_table", [False, True])
def test_the_ids_that_are_learned_spell_the_answers(folder, with_table):
    tokenizer = ChatTokenizer(load(f"hf:{folder}" if with_table else "byte"), template(CHATML))
    ids = tokenizer.encode(rendered({"messages": TALK}, tokenizer.template, "here", ""))
    assert tokenizer.decode(ids & ID) == WHOLE
    assert tokenizer.decode(ids[(ids & COUNTS) > 0] & ID) == "why@yes ✓\0no\0"
    assert np.flatnonzero(ids & np.uint32(BEGINS)).tolist() == [0]
    plain = tokenizer.encode(rendered({"prompt": "é", "completion": "ab"}, None, "here", ""))
    assert tokenizer.decode(plain[(plain & COUNTS) > 0] & ID) == "ab\0"


# --- files and runs ---------------------------------------------------------------------------------------------------


def talks(n):
    return [
        {"messages": [{"role": "user", "content": f"{i}+1"}, {"role": "assistant", "content": str(i + 1)}]} for i in range(n)
    ]


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in talks(300)))
    return path


def test_token_files_of_every_format_hold_the_conversations_and_their_marks(folder, chat, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist(talks(300)), tmp_path / "chat.parquet")
    (tmp_path / "chat.json").write_text(json.dumps(talks(300)))
    data = prepare(f"chat:{chat}", f"hf:{folder}")
    assert (data.meta.dtype, data.meta.documents, data.meta.dedup, data.meta.leak) == ("uint8", 300, "exact", None)
    text = bytes(data.train).decode()
    assert "<|user|>7+1\0<|assistant|>8\0\0<|user|>" in text
    marks = np.asarray(data.train_marks)
    assert data.meta.train.learned == int((marks == 1).sum()) > 0
    assert bytes(data.train[marks == 2]) == b"<" * int((marks == 2).sum())
    for other in ("chat.parquet", "chat.json"):
        assert prepare(f"chat:{tmp_path / other}", f"hf:{folder}").data_hash == data.data_hash
    again = open_dataset(data.folder)
    assert np.array_equal(again.val_marks, data.val_marks)
    (folder / "chat_template.jinja").write_text(MARKED)
    other = prepare(f"chat:{chat}", f"hf:{folder}")
    assert np.array_equal(other.train, data.train)
    assert other.folder != data.folder
    assert other.data_hash == data.data_hash  # the same tokens are learned
    (folder / "chat_template.jinja").write_text(MARKED.replace("m.content + eos_token }}{% endgen", "m.content }}{% endgen"))
    assert prepare(f"chat:{chat}", f"hf:{folder}").data_hash != data.data_hash


def test_a_preparation_that_failed_between_ids_and_marks_begins_anew(folder, chat, monkeypatch):
    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr(module, "to_disk", full)
    with pytest.raises(Exception, match="no space"):
        prepare(f"chat:{chat}", f"hf:{folder}", val_fraction=0.1)
    monkeypatch.undo()
    data = prepare(f"chat:{chat}", f"hf:{folder}", val_fraction=0.1)
    assert len(data.train) == len(data.train_marks)
    assert data.data_hash == prepare(f"chat:{chat}", f"hf:{folder}", val_fraction=0.1, force=True).data_hash


def config(chat, folder, **changes):
    return tiny.config({"data.source": f"chat:{chat}", "data.tokenizer": f"hf:{folder}", "data.seq_len": 64, **changes})


def test_a_run_learns_the_answers_alone(folder, chat, tmp_path):
    c = config(chat, folder, **{"train.steps": 30, "train.checkpoint_every": 10, "train.eval_tokens": 4096})
    whole = train(c, runs=tmp_path / "whole")
    asked = iter(range(100))
    with pytest.raises(Preempted):
        train(c, runs=tmp_path / "killed", stop=lambda: next(asked) == 17)
    assert train(c, runs=tmp_path / "killed").loss == whole.loss
    assert whole.bits_per_byte is None
    loaded = load_run(RunStore(tmp_path / "whole").run(c.run_id))
    _, targets, _ = parts(windows_of(loaded.data, "val", c.data).validation(c.train.eval_tokens))
    assert whole.val_tokens == int((targets != IGNORED).sum())
    assert bytes(targets[targets != IGNORED].astype(np.uint8)).replace(b"\0", b"").isdigit()
    # by hand: each conversation alone
    total = n = 0
    for talk in bytes(loaded.data.val).removesuffix(b"\0\0").split(b"\0\0"):
        ids = torch.tensor([list(talk + b"\0")])
        at = talk.index(b"<|assistant|>") + len(b"<|assistant|>")
        log_q = torch.log_softmax(tiny.logits(loaded.model, ids), -1)[0]
        total += sum(-float(log_q[i - 1, ids[0, i]]) for i in range(at, ids.shape[1]))
        n += ids.shape[1] - at
    assert n == whole.val_tokens
    assert whole.loss == pytest.approx(total / n, abs=1e-5)


def test_conversations_are_packed_in_one_spelling(chat, folder):
    c = config(chat, folder)
    assert c == config(chat, folder, **{"data.packing": "documents"})
    with pytest.raises(UsageError, match=r"data\.packing: stream cuts conversations"):
        config(chat, folder, **{"data.packing": "stream"})


def test_bad_chat_files_are_one_sentence_and_nothing_is_written(chat, folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "plain.txt").write_text("text")
    cases = [
        (chat, "byte", ["needs a chat template", "byte has none", "hf:FOLDER"]),
        (chat, "bpe:300", ["data.tokenizer", "bpe:300", "hf:FOLDER"]),
        (tmp_path / "bad.jsonl", f"hf:{folder}", ["bad.jsonl, line 1", "neither 'messages'"]),
        (tmp_path / "plain.txt", f"hf:{folder}", ["plain.txt", ".jsonl"]),
    ]
    runs = tmp_path / "runs"
    for path, tokenizer, words in cases:
        options = [f"--set=data.tokenizer={tokenizer}", "--steps=2", "--set=data.seq_len=16", "--runs", runs]
        result = run_cli("train", "--data", f"chat:{path}", *options, code=2)
        assert all(word in " ".join(result.stderr.split()) for word in words), result.stderr
        assert result.stderr.count("error:") == 1
    with pytest.raises(UsageError, match=r"data\.dedup: near"):
        prepare(f"chat:{chat}", f"hf:{folder}", dedup="near")
    assert not runs.exists() or files_in(runs) == []
