"""Killed at any moment and started again, a run ends with the same bits in its weights and the same metric lines."""

import os
import random
import signal
import time

import pytest
import tiny

from questctl.config import Layer, resolve
from questctl.errors import Preempted
from questctl.store import RunStore
from questctl.training.loop import Trainer, train

VARIANTS = {
    "fp32": tiny.config(),
    "bf16": tiny.config(train__precision="bf16"),
    "quest": tiny.config(tiny.QUEST),
    "lsq-bf16": tiny.config(tiny.LSQ, train__precision="bf16"),
    "muon": tiny.config(tiny.QUEST, optim__name="muon"),
    "stochastic": tiny.config({f"quant.{x}": "int4.sr-h16.s-rms.g16-ste" for x in ("weights", "activations", "gradients")}),
    "staged": tiny.config(tiny.LSQ, quant__stages="3:lsq-w8a8", quant__start=7, optim__name="muon"),
    "accumulated": tiny.config(train__micro_batch=2, train__eval_every=3, train__log_every=5, train__checkpoint_every=3),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Outcome of each variant, trained in one go in a process of its own."""
    root = tmp_path_factory.mktemp("undisturbed")
    outcomes = {}
    for name, config in VARIANTS.items():
        assert tiny.in_child(go_on, root / name, config) == 0
        outcomes[name] = tiny.outcome(root / name / config.run_id)
    return outcomes


def go_on(root, config):
    train(config, runs=root)


def killed_at_step(root, config, step, written=False):
    """Die after a step: in the middle of the checkpoint that may be being written, or when it is `written`."""
    real = Trainer.step

    def deadly(self):
        real(self)
        if self.counters.step == step:
            if written:
                self.saving.wait()
            tiny.die()

    Trainer.step = deadly
    train(config, runs=root)


CALLS = ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir", "write")


def killed_at_call(root, config, number):
    """Die at system call `number` of those that change files."""
    tiny.dying_at(number, CALLS)
    train(config, runs=root)
    os._exit(0)


def ends_the_same(root, config, expected):
    run = RunStore(root).run(config.run_id)
    assert tiny.in_child(go_on, root, config) == 0
    assert tiny.outcome(run.path) == expected
    assert run.state() == "done"
    assert not run.checkpoints_path.exists()
    leftovers = [p.name for p in run.path.rglob("*.tmp")]
    assert all(name.startswith("lease.") for name in leftovers)  # of a kill inside the claim: removed when they are old
    return run


AT_STEPS = {
    "fp32": (1, 4, 5, 11, 12),
    "bf16": (3, 4, 9, 12),
    "quest": (6,),
    "lsq-bf16": (2, 10),
    "staged": (3, 5, 7, 8),  # before, between and after the switches, and at each before its first step
    "muon": (6, 11),
    "stochastic": (4,),
    "accumulated": (4, 11),
}


# make test takes the first and the last step, each side of a switch, and one step of every other variant
FEW = {("fp32", 1), ("fp32", 12), ("bf16", 9), ("quest", 6), ("lsq-bf16", 10), ("staged", 5), ("staged", 7), ("muon", 11)}
FEW |= {("stochastic", 4), ("accumulated", 11)}
KILLS = [(name, step) for name, steps in AT_STEPS.items() for step in steps]


@pytest.mark.parametrize(
    ("variant", "step"), [pytest.param(*kill, marks=[] if kill in FEW else pytest.mark.slow) for kill in KILLS]
)
def test_killed_at_a_step(tmp_path, undisturbed, variant, step):
    config = VARIANTS[variant]
    assert tiny.in_child(killed_at_step, tmp_path, config, step) == -signal.SIGKILL
    ends_the_same(tmp_path, config, undisturbed[variant])


def test_killed_again_and_again(tmp_path, undisturbed):
    config = VARIANTS["quest"]
    for step in (2, 6, 7, 10, 12):
        assert tiny.in_child(killed_at_step, tmp_path, config, step) == -signal.SIGKILL
    run = ends_the_same(tmp_path, config, undisturbed["quest"])
    assert run.status().attempts == 6


def sweep_of_kills(tmp_path, config, expected, numbers):
    codes = set()
    for number in numbers:
        root = tmp_path / str(number)
        codes.add(tiny.in_child(killed_at_call, root, config, number))
        ends_the_same(root, config, expected)
    return codes


def test_killed_at_system_calls(tmp_path, undisturbed):
    """Every thirteenth call that changes files: the lease, status, lines, checkpoints and their removal, weights, result."""
    assert sweep_of_kills(tmp_path, VARIANTS["fp32"], undisturbed["fp32"], range(4, 135, 13)) == {0, -signal.SIGKILL}


@pytest.mark.slow
def test_killed_at_every_system_call(tmp_path, undisturbed):
    assert sweep_of_kills(tmp_path, VARIANTS["bf16"], undisturbed["bf16"], range(140)) == {0, -signal.SIGKILL}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run that begins with another one, which is also its teacher, and what it ends with."""
    root = tmp_path_factory.mktemp("taught")
    source = tiny.config(train__steps=3)
    assert tiny.in_child(go_on, root, source) == 0
    keys = {key: value for key, value in tiny.BASE.items() if not key.startswith("model.")}
    keys |= {"model.init": str(root / source.run_id), "teacher.source": "init", "quant.method": "lsq", "quant.bits": 4}
    config = resolve([Layer("test", {tuple(key.split(".")): value for key, value in keys.items()})]).config
    assert tiny.in_child(go_on, root, config) == 0
    return config, tiny.outcome(root / config.run_id)


def test_an_initialised_run_with_a_teacher_killed_at_steps(tmp_path, taught):
    config, expected = taught
    for step in (3, 6, 9):
        assert tiny.in_child(killed_at_step, tmp_path, config, step) == -signal.SIGKILL
    ends_the_same(tmp_path, config, expected)


@pytest.mark.faults
def test_an_initialised_run_with_a_teacher_killed_at_twenty_random_calls(tmp_path, taught):
    config, expected = taught
    numbers = random.Random(17).sample(range(4, 135), 20)
    assert -signal.SIGKILL in sweep_of_kills(tmp_path, config, expected, numbers)


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_stopped_and_continued(tmp_path, undisturbed, steps):
    config, asked = VARIANTS["accumulated"], iter(range(10**6))
    with pytest.raises(Preempted):
        train(config, runs=tmp_path, stop=lambda: next(asked) >= steps)
    ends_the_same(tmp_path, config, undisturbed["accumulated"])


def test_stopped_in_the_middle_of_a_validation(tmp_path, undisturbed, monkeypatch):
    from questctl.training import loop

    def interrupted(*_, **__):
        raise loop.Interrupted

    with monkeypatch.context() as m:
        m.setattr(loop, "evaluate", interrupted)
        with pytest.raises(Preempted, match="step 3/12"):
            train(VARIANTS["accumulated"], runs=tmp_path)
    ends_the_same(tmp_path, VARIANTS["accumulated"], undisturbed["accumulated"])


def test_a_damaged_checkpoint_costs_time_and_nothing_else(tmp_path, undisturbed):
    config = VARIANTS["fp32"]
    tiny.in_child(killed_at_step, tmp_path, config, 11, True)
    newest = RunStore(tmp_path).run(config.run_id).checkpoints_path / "step-00000008" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 4
    newest.write_bytes(data)
    ends_the_same(tmp_path, config, undisturbed["fp32"])


def test_several_threads(tmp_path):
    """More than one thread, in a process whose pool of threads is new, and again after a kill."""
    config = tiny.config(tiny.QUEST, train__threads=2, train__batch_size=32, train__steps=4, train__checkpoint_every=2)
    for root, kill in ((tmp_path / "a", None), (tmp_path / "b", 3)):
        if kill:
            assert tiny.in_child(killed_at_step, root, config, kill) == -signal.SIGKILL
        assert tiny.in_child(go_on, root, config) == 0
    assert tiny.outcome(tmp_path / "a" / config.run_id) == tiny.outcome(tmp_path / "b" / config.run_id)


def test_killed_from_outside_at_a_moment_of_its_own(tmp_path):
    """No hooks: a process that is killed while it trains."""
    config = tiny.config(train__steps=150)
    go_on(tmp_path / "a", config)
    run = RunStore(tmp_path / "b").run(config.run_id)
    for step in (10, 60):
        child = tiny.start(go_on, tmp_path / "b", config)
        while run.last_metrics().get("step", 0) < step:
            time.sleep(0.001)
        child.kill()
        child.join()
        assert run.state() == "preempted"
    go_on(tmp_path / "b", config)
    assert tiny.outcome(tmp_path / "a" / config.run_id) == tiny.outcome(run.path)
