"""Generation: the cache changes nothing but the time, draws follow their distribution, packed weights write the same text."""

import json

import pytest
import tiny
import torch
from command_line import invoke

from questctl.config import ModelConfig, QuantConfig
from questctl.evaluate.generate import choose, generate
from questctl.models.llama import Cache, Llama, build_model
from questctl.training import train

SHAPE = ModelConfig(n_layer=2, d_model=64, n_head=2, d_ff=128, vocab_size=50)


def model(word: str = "bf16") -> Llama:
    m = build_model(SHAPE, QuantConfig(weights=word, activations=word), 0)
    with torch.no_grad():
        m.head.weight.mul_(40)  # so that the next token is not a matter of rounding
    return m


@pytest.mark.parametrize("word", ["bf16", "int4-h64-rms-trust"])
@pytest.mark.parametrize("prompt", [1, 7])
def test_the_cache_gives_the_logits_of_the_whole_text(word: str, prompt: int) -> None:
    m, x = model(word), torch.randint(0, 50, (1, 19), generator=torch.Generator().manual_seed(2))
    cache = Cache(SHAPE, 19, "cpu")
    with torch.no_grad():
        whole = m(x)
        parts = [m(x[:, :prompt], cache=cache), *(m(x[:, i : i + 1], cache=cache) for i in range(prompt, 19))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        m(x[:, :1], cache=cache)  # it is full
    cache.rewind(18)
    with torch.no_grad():
        assert torch.equal(m(x[:, 18:], cache=cache), parts[-1])


def test_greedy_is_the_likeliest_continuation_token_by_token() -> None:
    m, text = model(), [3, 1, 4]
    found = list(generate(m, text, max_tokens=12))
    for token in found:
        with torch.no_grad():
            assert token == int(m(torch.tensor([text]))[0, -1].argmax())
        text = [*text, token]
    assert list(generate(m, [3, 1, 4], max_tokens=12, end=found[4])) == found[: found.index(found[4])]


def test_draws_follow_temperature_and_top_k() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])

    def shares(temperature: float, top_k: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = [choose(logits, temperature, top_k, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    torch.testing.assert_close(shares(1.0, 0), logits.softmax(-1), rtol=0, atol=0.03)
    torch.testing.assert_close(shares(2.0, 0), (logits / 2).softmax(-1), rtol=0, atol=0.03)
    two = logits.masked_fill(torch.tensor([True, False, False, True]), -torch.inf).softmax(-1)
    torch.testing.assert_close(shares(1.0, 2), two, rtol=0, atol=0.03)
    assert shares(1.0, 1)[1] == shares(1e-3, 0)[1] == 1
    assert choose(logits, 0.0, 0, torch.Generator()) == 1


def test_a_seed_says_which_text() -> None:
    m = model()
    texts = [list(generate(m, [5], max_tokens=10, temperature=5.0, seed=s)) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Im Anfang war das Wort, und das Wort war klein. " * 200, encoding="utf-8")
    return tmp_path


def answer(*args):
    done = invoke(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


TEXT = {"data.source": "file:a.txt", "train.steps": 20, "train.checkpoint_every": 0, "train.eval_tokens": 1024}


RUNS = [(4, {"train.precision": "bf16"}), (2, {"quant.weight_only": True})]
RUNS += [pytest.param(bits, {}, marks=pytest.mark.slow) for bits in (1, 3, 4)]


@pytest.mark.parametrize(("bits", "more"), RUNS, ids=str)
def test_packed_loss_and_text_are_those_of_the_run(runs, bits, more):
    name = train(tiny.config({**tiny.QUEST, **TEXT, "quant.bits": bits, **more})).run
    plain, packed = answer("eval", name), answer("eval", name, "--packed")
    assert packed["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert packed["packed"]["layers"] == 14
    assert "packed" not in plain
    prompt = "Im Anfang"
    args = ("generate", name, prompt, "--max-tokens", "24")
    written = [answer(*args), answer(*args, "--packed")]
    written += [answer(*args, "--packed", "--product", product) for product in ("integers", "bytes")]
    assert written[1]["tokens"] == written[0]["tokens"]
    assert len(written[0]["tokens"]) == 24
    if "train.precision" not in more:  # exact sums are not those of values rounded to bf16
        assert written[2]["tokens"] == written[0]["tokens"]
    assert written[3]["tokens"] == written[2]["tokens"]
    by_bytes = written[3]["packed"]
    assert by_bytes["expanded_bytes"] == (by_bytes["bf16_bytes"] // 2 if by_bytes["by_integers"] else 0)
    assert written[2]["packed"]["by_integers"] == (0 if more.get("quant.weight_only") else 14)
    shown = invoke(*args, "--packed")
    assert shown.stdout.rstrip("\n") == (prompt + written[0]["text"]).rstrip("\n")
    assert "14 layers packed in" in shown.stderr
    assert "trained on 16 tokens at a time" in shown.stderr


def test_ids_where_there_is_no_tokenizer(runs):
    name = train(tiny.config(tiny.QUEST)).run
    found = answer("generate", name, "3 1 4", "--max-tokens", "5")
    assert found["text"] == " ".join(map(str, found["tokens"]))
    assert invoke("generate", name, "3 1 4", "--max-tokens", "5").stdout == f"3 1 4 {found['text']}\n"
    for text, sentence in (("three", "trained on token ids"), ("3 99", "id 99 is not one of the 16"), (" ", "TEXT: is empty")):
        done = invoke("generate", name, text)
        assert done.exit_code == 2
        assert sentence in done.stderr


def test_what_cannot_be_packed_is_said(runs):
    full = train(tiny.config()).run
    for args, sentence in (
        (("eval", full, "--packed"), "nothing to pack"),
        (("generate", full, "1", "--packed"), "nothing to pack"),
        (("eval", full, "--product", "integers"), "add --packed"),
        (("eval", full, "--packed", "--product", "ints"), "--product: unknown value 'ints'; did you mean 'integers'?"),
        (("generate", "nosuch", "1"), "there is no run 'nosuch'"),
    ):
        done = invoke(*args)
        assert (done.exit_code, sentence in done.stderr.replace("\n", " ")) == (2, True), done.stderr
