"""A teacher: loss and gradient by hand, runs that learn from one, its part in their identity, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise

import pytest
import tiny
import torch
from command_line import run_cli
from helpers import files_in
from safetensors.torch import load_file, save_file

from questctl.config import RunConfig, TeacherConfig
from questctl.config.commands import make_config
from questctl.errors import UsageError
from questctl.export.tokenizer import byte_tokenizer
from questctl.metrics import TEACHER_KL
from questctl.models.llama import Llama
from questctl.pretrained import hf_name
from questctl.store import RunStore
from questctl.sweep.costs import flops_per_token, memory_bytes, teacher_cost
from questctl.sweep.sweep_file import parse_sweep_file
from questctl.training import teacher as module
from questctl.training.loading import load_model
from questctl.training.loop import train
from questctl.training.teacher import Mixture, Teacher, divergence

N, V = 7, 23


def by_hand(z, taught, targets, w, temperature, k):
    """The mean loss of the positions that count, written with loops over classes, differentiated by autograd."""
    total, counted = 0.0, 0
    for row, other, y in zip(z, taught, targets.tolist(), strict=True):
        if y == -100:
            continue
        counted += 1
        ce = torch.logsumexp(row, 0) - row[y]
        p, q = torch.softmax(other / temperature, 0), torch.softmax(row / temperature, 0)
        told = sorted(range(len(p)), key=lambda i: -p[i])[: k or len(p)]
        rest = [i for i in range(len(p)) if i not in told]
        kl = sum(p[i] * torch.log(p[i] / q[i]) for i in told)
        if rest:
            kl = kl + p[rest].sum() * torch.log(p[rest].sum() / q[rest].sum())
        total = total + (1 - w) * ce + w * temperature**2 * kl
    return total / max(counted, 1)


@pytest.mark.parametrize("k", [0, 1, 4, V - 1, V, 2 * V])
@pytest.mark.parametrize(("w", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 0.5)])
def test_loss_and_gradient_are_those_written_by_hand(w, temperature, k, monkeypatch):
    monkeypatch.setattr(module, "VALUES_AT_A_TIME", 3 * V)  # three positions at a time, of seven
    generator = torch.Generator().manual_seed(k)
    z, taught = (3 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in "zt")
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[2] = -100
    z.requires_grad_()
    expected = by_hand(z, taught, targets, w, temperature, k if k < V else 0)
    (gradient,) = torch.autograd.grad(expected, z)
    about = TeacherConfig(weight=w, temperature=temperature, top_k=k)
    single = z.detach().float().requires_grad_()
    loss, measured = Mixture.apply(single, taught.float(), targets, about)
    (5 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    torch.testing.assert_close(single.grad.double(), 5 * gradient, rtol=0, atol=2e-6)
    both = float((1 - w) * measured[0] + w * temperature**2 * measured[1])
    assert both == pytest.approx(float(expected.detach()), abs=2e-6)


def test_the_divergence_is_zero_at_the_teacher_and_grows_with_the_ids_that_it_tells_apart():
    z, taught = torch.randn(N, V), torch.randn(N, V)
    rows = [divergence(z, taught, TeacherConfig(top_k=k))[0] for k in (1, 3, 10, V)]
    assert all((a <= b + 1e-6).all() for a, b in pairwise(rows))
    assert torch.equal(rows[-1], divergence(z, taught, TeacherConfig())[0])
    for k in (0, 3):
        kl, gradient = divergence(taught.clone(), taught, TeacherConfig(top_k=k))
        assert float(kl.abs().max()) < 1e-6
        assert float(gradient.abs().max()) < 1e-6


def test_positions_that_do_not_count_and_far_logits_give_numbers():
    about = TeacherConfig(weight=0.5, top_k=2)
    z = torch.zeros(2, V, requires_grad=True)
    loss, _ = Mixture.apply(z, torch.zeros(2, V), torch.tensor([-100, -100]), about)
    loss.backward()
    assert (loss.item(), float(z.grad.abs().sum())) == (0, 0)
    far = torch.zeros(2, V)
    far[:, 0] = 200.0
    kl, gradient = divergence(far.clone(), far.roll(1, 1), about)
    assert kl.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("of_teacher", [V - 3, V + 3])
def test_padded_vocabularies_are_compared_in_the_ids_that_both_have(of_teacher):
    z, taught = torch.randn(N, V, dtype=torch.float64), torch.randn(N, of_teacher, dtype=torch.float64)
    kl, gradient = divergence(z.clone(), taught, TeacherConfig())
    p = torch.softmax(taught[:, :V], -1)
    q = torch.softmax(z, -1)
    n = p.shape[1]
    torch.testing.assert_close(kl, (p * (p / q[:, :n]).log()).sum(-1))
    torch.testing.assert_close(gradient[:, :n], q[:, :n] - p)
    torch.testing.assert_close(gradient[:, n:], q[:, n:])


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder of runs with a finished one in full precision, which teaches."""
    root = tmp_path_factory.mktemp("teacher")
    c = tiny.config(train__steps=40, optim__lr=2e-2)
    train(c, runs=root)
    return root / c.run_id


def of(teacher, changes=None, **more) -> RunConfig:
    return tiny.config({"teacher.source": str(teacher), **tiny.QUEST, **(changes or {})}, **more)


def test_a_run_comes_nearer_to_its_teacher(taught, tmp_path):
    near = of(taught, teacher__weight=1.0, train__steps=30, optim__schedule="constant")
    train(near, runs=tmp_path)
    lines = RunStore(tmp_path).run(near.run_id).metrics()
    assert lines[-1][TEACHER_KL] < 0.5 * lines[0][TEACHER_KL]


def test_without_weight_the_run_is_the_one_without_a_teacher(taught):
    alone = tiny.config(tiny.QUEST)
    assert of(taught, teacher__weight=0.0) == alone
    assert "teacher" not in json.dumps(alone.to_json())
    assert RunConfig.from_json(alone.to_json()) == alone
    with_one = of(taught)
    assert RunConfig.from_json(with_one.to_json()) == with_one
    assert with_one.run_id != alone.run_id
    assert "+teacher." in with_one.scheme


def test_with_almost_no_weight_it_trains_as_without(taught, tmp_path):
    alone = train(tiny.config(tiny.QUEST, train__steps=3), runs=tmp_path)
    hardly = train(of(taught, teacher__weight=1e-9, train__steps=3), runs=tmp_path)
    assert hardly.loss == pytest.approx(alone.loss, abs=1e-5)
    assert hardly.train_loss == pytest.approx(alone.train_loss, abs=1e-5)


def test_what_is_reported_is_the_loss_on_the_text(taught, tmp_path):
    for w in (0.2, 0.9):
        c = of(taught, teacher__weight=w, train__steps=1)
        train(c, runs=tmp_path)
        (line,) = RunStore(tmp_path).run(c.run_id).metrics()
        assert line["train_loss(nats/token)"] == pytest.approx(math.log(16), abs=0.05)


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_stopped_run_continues_to_the_same_bits(taught, tmp_path, micro_batch):
    c = of(taught, train__micro_batch=micro_batch, teacher__top_k=4, train__checkpoint_every=3)
    tiny.assert_resumes(c, tmp_path)


@pytest.mark.parametrize("quant", [tiny.QUEST, {"quant.weights": "int2-absmax-ste"}])
def test_a_quantized_run_teaches_as_it_was_trained(tmp_path, quant):
    c = tiny.config(quant, train__steps=3)
    train(c, runs=tmp_path)
    run = RunStore(tmp_path).run(c.run_id)
    teacher = Teacher(of(run.path, teacher__precision="fp32"), torch.device("cpu"))
    tokens = torch.randint(0, 16, (2, 8))
    assert torch.equal(tiny.logits(teacher.model, tokens), tiny.logits(load_model(run), tokens))
    assert "PackedLinear" in str(teacher.model)


def test_in_bf16_it_takes_half_the_memory_and_says_about_the_same(taught):
    single, half = (Teacher(of(taught, teacher__precision=p), torch.device("cpu")) for p in ("fp32", "bf16"))
    sizes = [sum(p.numel() * p.element_size() for p in t.model.parameters()) for t in (single, half)]
    assert sizes[0] == 2 * sizes[1]
    tokens = torch.randint(0, 16, (2, 8))
    a, b = (tiny.logits(t.model, tokens) for t in (single, half))
    assert 0 < float((a - b).norm() / a.norm()) < 0.02
    assert not any(p.requires_grad for p in half.model.parameters())


def test_costs_are_those_of_the_run_and_of_the_modules(taught, tmp_path):
    c = of(taught, train__steps=2)
    sized, alone = c.with_vocabulary(16), tiny.config(tiny.QUEST).with_vocabulary(16)
    cost = teacher_cost(sized)
    teacher = Teacher(c, torch.device("cpu"))
    assert cost.params_total == sum(p.numel() for p in teacher.model.parameters())
    linear = sum(2 * m.weight.numel() for m in teacher.model.modules() if isinstance(m, torch.nn.Linear))
    assert cost.flops_per_token == linear + 4 * 16 * 32 * 2
    assert memory_bytes(sized) - memory_bytes(alone) == 4 * cost.params_total + 4 * 16 * 8 * 16
    assert train(c, runs=tmp_path).flops == flops_per_token(sized) * c.tokens
    half = of(taught, teacher__precision="bf16").with_vocabulary(16)
    assert teacher_cost(half).memory_bytes * 2 == cost.memory_bytes
    packed = tiny.config(tiny.QUEST, train__steps=1)
    train(packed, runs=tmp_path)
    less = cost.memory_bytes - teacher_cost(of(tmp_path / packed.run_id).with_vocabulary(16)).memory_bytes
    assert less == packed.model.linear_weights * 3.5
    rows = tiny.config({**tiny.QUEST, "quant.embedding": "int4-rms-ste", "quant.head": "int2-rms-ste"}, train__steps=1)
    train(rows, runs=tmp_path)
    less = cost.memory_bytes - teacher_cost(of(tmp_path / rows.run_id).with_vocabulary(16)).memory_bytes
    assert less == packed.model.linear_weights * 3.5 + 16 * 32 * (3.5 + 3.75)


def test_the_dry_run_shows_what_the_teacher_takes(taught, tmp_path):
    words = ["train", "--dry-run", "--teacher", taught, "--data=synthetic:markov?vocab=16&tokens=20000", "--runs", tmp_path]
    shown = " ".join(run_cli(*words, columns=200).stdout.split())
    assert f"teacher {taught}" in shown
    assert "of the FLOPs" in shown
    record = json.loads(run_cli(*words, "--json").stdout)
    assert 0 < record["teacher_flops"] < record["flops"] / 3
    assert 0 < record["teacher_memory_bytes"] < record["memory_bytes"]


def test_a_teacher_is_an_axis(taught, tmp_path):
    base = {k: v for k, v in tiny.BASE.items() if not k.startswith("model.")}
    tree = {
        "base": {**base, "model.init": str(taught), "teacher.weight": 0.7},
        "matrix": {"teacher.source": ["", "init"], "quant.method": ["bf16", "quest"], "quant.bits": [4]},
    }
    cells = parse_sweep_file(tree, tmp_path / "sweep.toml").cells
    assert [c.config.teacher.source for c in cells] == ["", "", str(taught), str(taught)]
    assert {c.config.teacher.weight for c in cells[2:]} == {0.7}
    assert {c.config.teacher.sha256 for c in cells[2:]} == {cells[0].config.model.init_sha256}
    tree["matrix"] = {"teacher.weight": [0.0, 0.5], "teacher.top_k": [0, 2]}
    tree["base"] = {**base, "model.init": str(taught), "teacher.source": "init"}
    with pytest.raises(UsageError, match="are one experiment"):  # a teacher without weight has no number of ids either
        parse_sweep_file(tree, tmp_path / "sweep.toml")


def test_the_run_id_holds_the_teachers_weights_and_not_their_place(taught, tmp_path):
    elsewhere = tmp_path / taught.name
    shutil.copytree(taught, elsewhere)
    a, b = of(taught), of(elsewhere)
    assert a.run_id == b.run_id
    assert a.run_id != of(taught, teacher__temperature=2.0).run_id
    weights = load_file(elsewhere / "model.safetensors")
    save_file({name: t + 1 for name, t in weights.items()}, elsewhere / "model.safetensors")
    with pytest.raises(UsageError, match=r"teacher.source.*has other weights.*began with"):
        train(b, runs=tmp_path / "runs")
    shutil.rmtree(elsewhere)
    with pytest.raises(ValueError, match=r"teacher.source.*is not here.*began with it"):
        train(b, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def byte_folder(tmp_path):
    """A folder as transformers writes it, with a byte tokenizer, and a text."""
    text, folder = tmp_path / "text.txt", tmp_path / "folder"
    text.write_text("a line of text that is repeated\n" * 200)
    folder.mkdir()
    shape = tiny.config().model.model_copy(update={"vocab_size": 256})
    save_file({hf_name(name): p.detach() for name, p in Llama(shape).named_parameters()}, folder / "model.safetensors")
    about = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({**about, "intermediate_size": 64, "vocab_size": 256}))
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "\\u0000"}')
    return folder, text


def _resize(folder, vocab_size):
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name].repeat(2, 1)[:vocab_size].contiguous()
    save_file(tensors, folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text()) | {"vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(about))


def _other_ids(folder):
    table = json.loads((folder / "tokenizer.json").read_text())
    swapped = {"a": "b", "b": "a"}
    table["model"]["vocab"] = {swapped.get(word, word): i for word, i in table["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(table))


REFUSED = {
    "missing": (lambda _: None, ["teacher.source", "nowhere", "hf:OWNER/NAME"]),
    "vocabulary": (lambda folder: _resize(folder, 100), ["teacher.source", "100 ids", "256"]),
    "tokenizer": (_other_ids, ["teacher.source", "another tokenizer", "byte"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_teacher_that_cannot_teach_is_one_sentence_and_nothing_is_written(byte_folder, tmp_path, name):
    folder, text = byte_folder
    spoil, words = REFUSED[name]
    spoil(folder)
    runs, source = tmp_path / "runs", "./nowhere" if name == "missing" else folder
    options = ["--data", f"file:{text}", "--set=data.seq_len=16", "--steps=2", "--runs", runs, "--teacher", source]
    for more in ([], ["--dry-run"]):
        result = run_cli("train", *options, *more, code=2)
        assert all(word in result.stderr for word in words), result.stderr
        assert result.stderr.count("error:") == 1
    assert not runs.exists() or files_in(runs) == []


@pytest.mark.parametrize("padding", [0, 4])
def test_a_folder_whose_tokenizer_is_the_same_teaches_though_its_vocabulary_is_padded(byte_folder, tmp_path, padding):
    folder, text = byte_folder
    _resize(folder, 256 + padding)
    options = ["--data", f"file:{text}", "--set=data.seq_len=16", "--steps=2", "--set=train.eval_tokens=64", "--runs", tmp_path]
    record = json.loads(run_cli("train", *options, "--teacher", folder, "--json", "--quiet").stdout)
    assert "+teacher." in record["scheme"]


def test_a_run_is_named_without_its_folder_and_init_is_the_checkpoint(taught):
    shown = run_cli("config", "show", "--init", taught, "--teacher", "init").stdout
    assert f'source = "{taught}"' in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set=teacher.weight=.5"], "teacher.weight: needs a teacher: --teacher"),
        (["--teacher=init"], "teacher.source: init is the checkpoint of model.init, which is not given."),
        (["--teacher=RUN", "--set=teacher.weight=2"], "teacher.weight"),
        (["--teacher=RUN", f"--set=teacher.sha256={'0' * 64}"], "has other weights"),
    ],
)
def test_keys_that_say_nothing_are_refused(taught, words, said):
    words = [word.replace("RUN", str(taught)) for word in words]
    assert said in run_cli("config", "show", *words, code=2).stderr


def test_the_python_call_takes_a_teacher(taught):
    assert make_config(teacher={"source": str(taught)}).teacher.sha256 == of(taught).teacher.sha256
