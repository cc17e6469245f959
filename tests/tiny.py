"""A run that takes a fraction of a second: the smallest Llama on a Markov chain, for the tests of training."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from questctl.config import Layer, RunConfig, resolve

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as questctl.training does, before torch is loaded in the children

BASE = {
    "model.d_model": 32,
    "model.n_head": 2,
    "model.d_ff": 64,
    "model.n_layer": 2,
    "data.seq_len": 16,
    "data.source": "synthetic:markov?vocab=16&tokens=20000",
    "train.batch_size": 8,
    "train.steps": 12,
    "train.log_every": 2,
    "train.eval_tokens": 256,
    "train.checkpoint_every": 4,
    "train.threads": 1,
    "optim.lr": 1e-2,
}
QUEST = {"quant.method": "quest", "quant.bits": 4, "quant.block": 32}
LSQ = {"quant.method": "lsq", "quant.bits": 4}


def config(changes: dict | None = None, **more: object) -> RunConfig:
    """The tiny config with changes: config({"train.steps": 3}), or with two underscores for the dot, config(train__steps=3)."""
    values = BASE | (changes or {}) | {key.replace("__", "."): value for key, value in more.items()}
    return resolve([Layer("test", {k if isinstance(k, tuple) else tuple(k.split(".")): v for k, v in values.items()})]).config


def start(target, *args) -> multiprocessing.Process:
    """Begin `target(*args)` in a process of its own, forked from one that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["questctl.training.loop"])
    child = context.Process(target=target, args=args)
    child.start()
    return child


def in_child(target, *args) -> int:
    """Run `target(*args)` in a process of its own to its end; its exit code."""
    child = start(target, *args)
    child.join(120)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def die() -> None:
    """What the out-of-memory killer and a pulled plug do."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(number: int, names: Sequence[str]) -> None:
    """From now on this process dies at call `number` of those functions of `os`, counted together."""
    calls = iter(range(10**6))

    def deadly(real):
        def call(*args, **kwargs):
            if next(calls) == number:
                die()
            return real(*args, **kwargs)

        return call

    for name in names:
        setattr(os, name, deadly(getattr(os, name)))


def logits(model, tokens):
    """(n, T) ids → (n, T, V), of a model of ours or of transformers, without gradients."""
    import torch

    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def outcome(run: Path) -> dict[str, bytes]:
    """What must not depend on how often a run was killed."""
    return {name: (run / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl")}


def assert_resumes(c: RunConfig, folder: Path):
    """Train a run whole, and one that is stopped at its seventh question and resumed: the same bits. The whole one's result."""
    import pytest

    from questctl.errors import Preempted
    from questctl.training import train

    whole = train(c, runs=folder / "whole")
    asked = iter(range(100))
    with pytest.raises(Preempted):
        train(c, runs=folder / "killed", stop=lambda: next(asked) == 7)
    assert train(c, runs=folder / "killed").loss == whole.loss
    assert outcome(folder / "killed" / c.run_id) == outcome(folder / "whole" / c.run_id)
    return whole
