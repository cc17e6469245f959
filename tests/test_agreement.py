"""`doctor --train`: every family of specs is compared, planted faults are found and named, gaps are reported."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from command_line import run_cli

from questctl.errors import QuestError
from questctl.kernels import fake_quant, native
from questctl.quant.grids import GRIDS
from questctl.quant.methods import METHODS
from questctl.quant.quantizer import Quantizer
from questctl.quant.spec import KINDS
from questctl.training import agreement
from questctl.training.agreement import ABSENT, AGREES, DIFFERS, FAILS, Step, Way, compare, families, raise_if_different

CPU = torch.device("cpu")
FAMILIES = families()
QUEST = FAMILIES["quest-w4a4"] | {"train.precision": "fp32"}


def specs():
    for values in FAMILIES.values():
        quant = agreement._config(values).quant
        yield from (quant.weights, quant.activations, quant.gradients)


def test_families_have_every_method_and_every_component():
    named = {values.get("quant.method") for values in FAMILIES.values()}
    assert named >= set(METHODS)
    kinds = {type(part) for spec in specs() for part in agreement._parts(spec)}
    assert kinds >= {cls for classes in KINDS.values() for cls in classes}
    assert any(spec.grid.stochastic for spec in specs())
    assert {values.get("quant.backward") for values in FAMILIES.values()} == {None, "both"}
    assert set(agreement.FEW) <= set(FAMILIES)


def test_a_new_component_becomes_a_family(monkeypatch):
    class Other(GRIDS[0]):
        stem = "other"
        forms = ("other4",)

    monkeypatch.setitem(KINDS, "grid", (*GRIDS, Other))
    assert any("other4" in name for name in families())
    assert not any("absmean" in name for name in FAMILIES)  # what a method has is not asked for again


@pytest.fixture
def quickly(monkeypatch):
    """Graphs are traced, backward passes too, but no code is generated."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


def ways(values=QUEST, steps=3):
    return {way.way: way for way in compare(values, CPU, steps)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "others"), [("quest-w4a4", 2), ("lsq-w4a4", 1)])
def test_ways_agree(name, others, quickly, monkeypatch):
    """The slow test has all families, and code that is generated."""
    monkeypatch.setattr(agreement, "OTHERS", agreement.OTHERS[:2])
    found = ways(FAMILIES[name] | {"train.precision": "fp32"})
    states = [("compiled, reference", AGREES), ("eager, fused", AGREES)]
    assert [(way, a.state) for way, a in found.items()] == states[:others]
    assert all(a.gradient_error < 1e-3 and a.loss_error < 1e-5 for a in found.values())
    raise_if_different(list(found.values()))


def test_only_layers_with_kernels_are_fused(monkeypatch):
    monkeypatch.setattr(agreement, "OTHERS", (Way(fused=True),))
    assert ways(FAMILIES["lsq-w4a4"] | {"train.precision": "fp32"}, 1) == {}
    assert [(way, a.state) for way, a in ways(steps=1).items()] == [("eager, fused", AGREES)]


def test_a_kernel_that_masks_wrongly_is_named(monkeypatch):
    monkeypatch.setattr(agreement, "OTHERS", (Way(fused=True),))
    real = fake_quant.mask_rotate
    monkeypatch.setattr(fake_quant, "mask_rotate", lambda g, mask, block: 0 * real(g, mask, block))
    (found,) = ways().values()
    assert (found.state, found.parameter, found.loss_error) == (DIFFERS, "embed.weight", 0)
    assert 0.1 < found.gradient_error < 1  # the residual path still has its gradient
    with pytest.raises(
        QuestError, match=r"quest-w4a4 in fp32, eager, fused: .* embed\.weight by 0.\d+ of its norm.*'int4-h128-rms"
    ):
        raise_if_different([found])


def test_losses_and_gradients_are_judged_by_their_medians():
    """What tips in a few steps is no fault; what is off in most of them is."""
    g, lost = torch.ones(4), {"a": torch.ones(4)}
    right, lossy, silent = Step(2.0, {"a": g, "b": g}), Step(2.1, {"a": g, "b": g}), Step(2.0, lost)
    about = ("quest-w4a4", "w", "a", "bf16", "fp32")

    def judged(*found):
        return agreement._judged(about, Way(fused=True), [right] * 5, found)

    assert judged(right, lossy, right, lossy, right).state == AGREES
    assert judged(right, lossy, lossy, lossy, right).state == DIFFERS
    assert judged(right, silent, right, silent, right).state == AGREES
    found = judged(right, silent, silent, silent, right)
    assert (found.state, found.parameter, found.gradient_error, found.loss_error) == (DIFFERS, "b", 1.0, 0.0)


def test_a_failure_is_a_row_with_its_reason(monkeypatch):
    monkeypatch.setattr(agreement, "OTHERS", (Way(fused=True), Way(compiled=True)))

    def no_kernel(*_):
        raise RuntimeError("out of shared memory\nand so on")

    def no_compiler(model):
        def call(*inputs):
            raise NotImplementedError("no such operator")

        return call

    monkeypatch.setattr(fake_quant, "mask_rotate", no_kernel)
    monkeypatch.setattr(torch, "compile", no_compiler)
    kernels, compiler = ways(steps=1).values()
    assert (kernels.state, kernels.reason) == (FAILS, "RuntimeError: out of shared memory")
    assert compiler.state == FAILS
    assert "NotImplementedError: no such operator" in compiler.reason
    raise_if_different([kernels, compiler])  # training goes on without a compiler that fails
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    assert ways(steps=1)["compiled, reference"].state == ABSENT


def test_the_command_shows_rows_and_ends_with_1_where_they_differ(monkeypatch):
    monkeypatch.setattr(agreement, "OTHERS", (Way(fused=True),))
    check = agreement.check_training
    monkeypatch.setattr(agreement, "check_training", lambda **how: check(**how, steps=5))
    rows = json.loads(run_cli("doctor", "--train", "--json").stdout)
    assert [(row["scheme"], row["way"], row["state"]) for row in rows] == [("quest-w4a4", "eager, fused", "agrees")]
    assert "quest-w4a4" in run_cli("doctor", "--train", columns=160).stdout
    monkeypatch.setattr(fake_quant, "mask_rotate", lambda g, mask, block: g * 0)
    failed = run_cli("doctor", "--train", code=1, columns=200)
    assert "embed.weight" in failed.stderr
    assert "differs" in failed.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_gradients_equal_eager_ones(name):
    """Each family, with all of the compiler: one graph, and the gradients of the formula."""
    found = ways(FAMILIES[name] | {"train.precision": "fp32"}, 5)
    assert {a.state for a in found.values()} == {AGREES}, found


def test_quantizers_are_those_of_the_definition(monkeypatch):
    """What the others are compared with is eager and by the formula."""
    seen = []
    monkeypatch.setattr(agreement, "OTHERS", ())
    real = Quantizer.forward
    monkeypatch.setattr(
        Quantizer, "forward", lambda self, *a: seen.append((self.fused, torch.compiler.is_compiling())) or real(self, *a)
    )
    assert ways(steps=1) == {}
    assert set(seen) == {(None, False)}
