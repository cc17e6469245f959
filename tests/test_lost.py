"""A gradient that is lost ends the run with the name of its layer; one that is rightly zero does not."""

from __future__ import annotations

import pytest
import tiny
import torch

from questctl.errors import RunFailed
from questctl.quant import linear, quantizer
from questctl.quant.linear import quantized_layers
from questctl.store import RunStore
from questctl.training import loop, lost
from questctl.training.loop import train


def losing(monkeypatch, steps=range(100)):
    """Quantized values pass no gradient on in these steps, as in compiled code of torch 2.11; the values stay as they are."""
    real, count = quantizer._QuantizeRows.backward, iter(range(10**6))
    step = loop.Trainer.step
    now = []
    monkeypatch.setattr(loop.Trainer, "step", lambda self: now.append(next(count)) or step(self))

    def backward(ctx, g):
        grad, none = real(ctx, g)
        return grad * (now[-1] not in steps), none

    monkeypatch.setattr(quantizer._QuantizeRows, "backward", staticmethod(backward))


def test_a_lost_gradient_ends_the_run_with_the_name_of_the_layer(tmp_path, monkeypatch):
    losing(monkeypatch)
    config = tiny.config(tiny.QUEST)
    with pytest.raises(RunFailed, match=r"blocks\.0\.q: its gradient is zero .* first 3 steps.*14 layers.*doctor --train"):
        train(config, runs=tmp_path)
    status = RunStore(tmp_path).run(config.run_id).status()
    assert (status.state, status.step) == ("failed", 3)
    assert status.message.startswith("blocks.0.q: its gradient is zero")


def test_a_short_run_is_judged_at_its_end(tmp_path, monkeypatch):
    losing(monkeypatch)
    with pytest.raises(RunFailed, match="first 1 steps"):
        train(tiny.config(tiny.QUEST, train__steps=1), runs=tmp_path)


def test_zeros_that_end_within_the_first_steps_are_no_fault(tmp_path, monkeypatch):
    """So it is below an output projection that begins at zero."""
    asked = []
    monkeypatch.setattr(loop, "lost", lambda *_: asked.append(1) or [])
    losing(monkeypatch, steps=range(2))
    train(tiny.config(tiny.QUEST), runs=tmp_path)
    assert asked == []


def dead(monkeypatch, *kinds, frozen=False):
    """The weights of these layers begin at zero; `frozen`: and stay there."""
    build = loop.Trainer._build

    def with_zeros(self, first):
        build(self, first)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name.endswith(tuple(f".{kind}.weight" for kind in kinds)):
                    p.zero_()
                    p.requires_grad_(not frozen)
        self.optimizer = loop.Optimizer(self.model, self.config.optim)
        self._use(self.model)

    monkeypatch.setattr(loop.Trainer, "_build", with_zeros)


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_below_a_projection_that_is_zero_train_on(frozen, tmp_path, monkeypatch):
    """The definition gives them no gradient either, in the first step or, if the projection stays, ever."""
    dead(monkeypatch, "o", "down", frozen=frozen)
    silent = []
    over = lost.FirstSteps.over
    monkeypatch.setattr(lost.FirstSteps, "over", lambda self, last: silent.append(set(self.silent)) or over(self, last))
    train(tiny.config(tiny.QUEST), runs=tmp_path)
    below = {f"blocks.{i}.{kind}" for i in (0, 1) for kind in ("q", "k", "v", "gate", "up")}
    assert silent[0] == below
    assert silent[-1] == (below if frozen else set())


def test_frozen_layers_are_not_watched(tmp_path):
    c = tiny.config(tiny.QUEST, model__d_model=32)
    model = loop.Trainer(c, loop.load_data(c), torch.device("cpu"), stop=lambda: False).model
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    assert set(lost.FirstSteps(model).silent) == {f"blocks.1.{kind}" for kind in ("q", "k", "v", "o", "gate", "up", "down")}


def test_looking_ends_after_the_first_steps():
    first = lost.FirstSteps(torch.nn.Module())
    assert [first.over(last=False) for _ in range(2)] == [False, False]
    for _ in range(lost.FIRST_STEPS):
        first.look()
    assert [first.over(last=False), first.over(last=False), first.over(last=True)] == [True, False, False]


def test_the_definition_is_asked_with_quantizers_and_layers_as_they_were(monkeypatch):
    c = tiny.config(tiny.QUEST | {"train.kernels": "fused"})
    trainer = loop.Trainer(c, loop.load_data(c), torch.device("cpu"), stop=lambda: False)
    layers = quantized_layers(trainer.model)
    fused = [layer.fused for layer in layers]
    assert all(fused)
    calls = []
    real = quantizer.Quantizer.reference
    monkeypatch.setattr(quantizer.Quantizer, "reference", lambda self, x, generator=None: calls.append(1) or real(self, x))
    assert lost.lost(trainer.model, {"blocks.0.q"}, lambda: trainer.forward_backward(0)) == ["blocks.0.q"]
    assert calls
    assert [layer.fused for layer in layers] == fused
    assert all("forward" not in vars(layer.weight_quantizer) for layer in layers)
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize(
    "words",
    [
        tiny.QUEST,
        tiny.LSQ,
        {"quant.method": "mxfp4"},
        {"quant.gradients": "int8.sr-absmax-ste"},
        {"quant.gradients": "int8.sr-absmax-ste", "quant.backward": "both"},
        tiny.QUEST | {"train.kernels": "fused"},
    ],
)
def test_functions_return_no_alias_where_they_are_traced(words, monkeypatch):
    """Compiled, torch 2.11 loses the gradient where the output is a view of an intermediate tensor or an input."""
    outputs = []

    def watched(cls):
        real = cls.forward

        def forward(ctx, *args):
            y = real(ctx, *args)
            outputs.append(cls.__name__)
            inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            for out in y if isinstance(y, tuple) else (y,):
                assert not out._is_view(), cls
                assert out.untyped_storage().data_ptr() not in inputs, cls
            return y

        monkeypatch.setattr(cls, "forward", staticmethod(forward))

    functions = [cls for cls in torch.autograd.Function.__subclasses__() if cls.__module__.startswith("questctl.")]
    assert {linear._RoundGradient, quantizer._Quantize} <= set(functions)
    for cls in functions:
        watched(cls)
    c = tiny.config(words)
    trainer = loop.Trainer(c, loop.load_data(c), torch.device("cpu"), stop=lambda: False)
    trainer._joined = False
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # every function takes the path that is traced
    trainer.forward_backward(0)
    assert outputs
    assert not {"_RMSNorm", "_Turned", "_QuantizeRows"} & set(outputs)  # which return aliases, and are never traced
