"""CAGE, OsciReset and averages of weights: formulas on quadratics, state in checkpoints, resume on each side of a switch."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import questctl
from questctl.config import OptimConfig
from questctl.errors import DataError, UsageError
from questctl.quant.linear import QuantLinear
from questctl.quant.spec import QuantSpec
from questctl.store import RunStore
from questctl.training import loading
from questctl.training.branch import branch
from questctl.training.corrections import Cage, Ema, Lawa, OsciReset, nearest
from questctl.training.loop import train
from questctl.training.optim import Optimizer

ON = torch.ones(())
SPECS = [
    *("int4-h16-rms-trust", "int2-rms-trust", "int4-learned.r-clip1", "int4-learned-clip1"),
    *("fp4-e4m3.g16-ste", "ternary-absmean.t-ste"),
]


def layer(spec: str = "int4-rms-trust", k: int = 32, n: int = 8, seed: int = 0) -> QuantLinear:
    torch.manual_seed(seed)
    made = QuantLinear(k, n, QuantSpec.parse(spec), QuantSpec.parse("bf16"))
    made.calibrate_weight()
    return made


def levels_by_hand(m: QuantLinear) -> torch.Tensor:
    y = m.weight_quantizer(m.weight.detach())
    return m.weight_quantizer.spec.basis.unrotate(y) if m.weight_quantizer.spec.basis else y


@pytest.mark.parametrize("spec", SPECS)
def test_levels_are_those_of_each_layer_alone_in_its_own_basis(spec: str) -> None:
    layers = [layer(spec), layer(spec, seed=1, n=5), layer(spec, k=64, seed=2)]
    for q, m in zip(nearest(layers), layers, strict=True):
        torch.testing.assert_close(q, levels_by_hand(m), rtol=1e-6, atol=1e-7)
        again = m.weight_quantizer.nearest(m.weight.detach())
        torch.testing.assert_close(q, again)
        levels, scale, _ = m.weight_quantizer.rounded(m.weight.detach())
        product, basis = (levels * scale).reshape(m.weight.shape), m.weight_quantizer.spec.basis
        assert torch.equal(again, basis.unrotate(product) if basis else product)  # in one pass or by the formula
    assert nearest([]) == []


# --- CAGE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1, 10, 100])
@pytest.mark.parametrize("pull", [0.5, 10.0])
def test_cage_on_a_quadratic_rests_where_the_formula_says_and_gets_there_at_its_rate(condition: float, pull: float) -> None:
    """Curvatures h from 1 to the condition number, minimum w*, gradient descent. Levels do not change on the way."""
    m = layer("int2-learned-clip1", k=16, n=4).double()
    with torch.no_grad():
        m.weight_quantizer.scale.fill_(1.0)  # levels ±½, ±1½
    h = torch.logspace(0, np.log10(condition), 64, dtype=torch.float64).view(4, 16)
    generator = torch.Generator().manual_seed(1)
    level = torch.randint(-2, 2, (4, 16), generator=generator).double() + 0.5
    goal = level + 0.3 * (2 * torch.rand(4, 16, generator=generator, dtype=torch.float64) - 1)
    start = level + 0.3 * (2 * torch.rand(4, 16, generator=generator, dtype=torch.float64) - 1)
    lr = 0.05 / condition
    cage = Cage(nn.ModuleDict({"blocks": nn.ModuleList([m])}), pull, 0.0)
    w = m.weight.data
    w.copy_(start)
    rate = (1 - lr * h) * (1 - min(lr * pull, 1))
    rest = (lr * pull * level + (1 - lr * pull) * lr * h * goal) / (1 - rate)
    distance = w - rest
    for _ in range(60):
        w -= lr * h * (w - goal)
        cage.after(lr, 0, 1, ON.double())
        distance = distance * rate
        torch.testing.assert_close(w - rest, distance, rtol=1e-9, atol=1e-12)
    slow = (pull * level + h * goal) / (pull + h)  # of an infinitesimal rate
    torch.testing.assert_close(rest, slow, rtol=0, atol=0.3 * lr * pull)


def test_the_pull_rises_from_its_share_of_the_run_to_the_end_and_stops_at_the_level() -> None:
    cage = Cage(nn.ModuleDict({"blocks": nn.ModuleList([layer()])}), 10.0, 0.8)
    assert [cage.strength_at(step, 10) for step in (0, 7, 8, 9)] == pytest.approx([0, 0, 5, 10])
    m = layer()
    cage = Cage(nn.ModuleDict({"blocks": nn.ModuleList([m])}), 1e9, 0.0)
    q = levels_by_hand(m)
    cage.after(1e-3, 0, 1, torch.zeros(()))
    assert not torch.equal(m.weight, q)  # a step that is skipped changes nothing
    cage.after(1e-3, 0, 1, ON)
    torch.testing.assert_close(m.weight.data, q)


# --- OsciReset --------------------------------------------------------------------------------------------------------


def test_weights_whose_level_moves_more_than_they_do_are_reset() -> None:
    m = layer("int2-learned-clip1", k=16, n=2)
    with torch.no_grad():
        m.weight_quantizer.scale.fill_(1.0)
        m.weight.fill_(0.01)
    model = nn.ModuleDict({"blocks": nn.ModuleList([m, nn.Linear(16, 2, bias=False)])})
    reset = OsciReset(model, 4.0, 10)
    plain = model["blocks"][1].weight.data.clone()
    for step in range(10):
        reset.before()
        with torch.no_grad():
            m.weight[0] *= -1  # crosses the edge at 0 each time: its level travels by 1, it by .02
            m.weight[1] += 0.04  # moves on, and never changes its level
            model["blocks"][1].weight.add_(0.01)
        if step == 8:
            assert reset.flips[0][0].tolist() == pytest.approx([8.0] * 16)
            assert reset.travel[0][0].tolist() == pytest.approx([8 * 0.02] * 16)
        reset.after(1e-3, step, 100, ON)
    assert m.weight[0].tolist() == [0.5] * 16
    torch.testing.assert_close(m.weight[1].detach(), torch.full((16,), 0.41))
    torch.testing.assert_close(model["blocks"][1].weight.detach(), plain + 0.1)
    assert not any(t.any() for t in (*reset.flips, *reset.travel))


# --- averages ---------------------------------------------------------------------------------------------------------


def test_averages_are_those_of_the_formulas() -> None:
    p = nn.Parameter(torch.zeros(3))
    ema, lawa = Ema({"w": p}, 0.9), Lawa({"w": p}, 3, 2)
    values, expected = [], 0.0
    assert torch.equal(lawa.values(0)[0], p)
    for step in range(11):
        values.append(float(step**2))
        p.data.fill_(values[-1])
        ema.after(1e-3, step, 20, ON)
        lawa.after(1e-3, step, 20, ON)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * values[-1]
    torch.testing.assert_close(ema.values(11)[0], torch.full((3,), expected))
    torch.testing.assert_close(lawa.values(11)[0], torch.full((3,), float(np.mean([values[i] for i in (5, 7, 9)]))))
    assert lawa.values(3)[0].tolist() != p.tolist()
    before = ema.values(11)[0].clone()
    ema.after(1e-3, 11, 20, torch.zeros(()))
    assert torch.equal(ema.values(11)[0], before)
    with ema.swapped(11):
        assert torch.equal(p.data, before)
    assert p.tolist() == [100.0] * 3


@pytest.mark.parametrize("word", ["ema", "ema:1", "ema:1.5", "lawa:5", "lawa:0:10", "swa:3:4"])
def test_words_that_are_no_average_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=r"optim\.average: .*' is not of the form ema:DECAY"):
        tiny.config(optim__average=word)


ALL = {"optim.cage": 10.0, "optim.cage_from": 0.25, "optim.reset_ratio": 1.5, "optim.reset_window": 3}


@pytest.mark.parametrize(("average", "start"), [("ema:0.9", 0), ("lawa:2:3", 7)])
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(tmp_path, average: str, start: int) -> None:
    """Within a window, on each side of a switch of precision, with sums, snapshots and averages in the checkpoint."""
    config = tiny.config({**tiny.QUEST, **ALL, "quant.start": start, "optim.average": average, "train.checkpoint_every": 5})
    whole = train(config, runs=tmp_path / "whole")
    for stop_at in (5, 8):
        folder = tmp_path / str(stop_at)
        seen = []

        def stop(seen=seen, stop_at=stop_at) -> bool:
            seen.append(1)
            return len(seen) > stop_at

        with pytest.raises(Exception, match="stopped by"):
            train(config, runs=folder, stop=stop)
        assert train(config, runs=folder).loss == whole.loss
        for name in ("model.safetensors", "average.safetensors", "metrics.jsonl"):
            a, b = (RunStore(root).run(config.run_id).path / name for root in (tmp_path / "whole", folder))
            assert a.read_bytes() == b.read_bytes(), (stop_at, name)


def test_the_average_is_rounded_after_averaging_and_evaluated_beside_the_weights(tmp_path) -> None:
    config = tiny.config({**tiny.QUEST, "optim.average": "ema:0.9"})
    result = train(config, runs=tmp_path)
    run = RunStore(tmp_path).run(config.run_id)
    raw = train(tiny.config(tiny.QUEST), runs=tmp_path)
    assert result.loss == raw.loss  # an average changes no weight
    assert config.run_id != tiny.config(tiny.QUEST).run_id
    model = loading.load_model(run, average=True)
    assert loading.loss_on(model, config, loading.load(run).data) == result.loss_average != result.loss
    assert (run.result().loss_average, raw.loss_average) == (result.loss_average, None)
    assert "loss_average" not in RunStore(tmp_path).run(raw.run).result_path.read_text()
    measured = questctl.evaluate_run(run, average=True)
    assert (measured["loss"], measured["average"]) == (result.loss_average, True)
    assert questctl.evaluate_run(run)["loss"] == result.loss
    assert questctl.generate_text(run, "1 2", max_tokens=3, average=True).to_json()["average"]
    card = questctl.export_run(run, tmp_path / "out", format="gguf", dtype="f32", average=True, tokens=256)
    assert card.agreement.loss_run == pytest.approx(result.loss_average, rel=1e-6)
    assert card.agreement.kl < 1e-3
    assert f"| validation loss | {result.loss_average:.4f}" in (tmp_path / "out" / "README.md").read_text()
    packed = questctl.evaluate_run(run, average=True, packed=True)
    assert packed["loss"] == pytest.approx(result.loss_average, rel=1e-6)
    for call in (lambda of: loading.load_model(of, average=True), lambda of: questctl.evaluate_run(of, average=True)):
        with pytest.raises(DataError, match="has no average of its weights"):
            call(RunStore(tmp_path).run(raw.run))


def test_runs_without_corrections_keep_ids_and_optimizer_state() -> None:
    off = {"optim.cage": 0.0, "optim.cage_from": 0.8, "optim.reset_ratio": 0.0, "optim.reset_window": 200, "optim.average": ""}
    assert tiny.config(off).run_id == tiny.config().run_id
    assert "cage" not in str(tiny.config().to_json())
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer()])})
    assert {key.partition("/")[2] for key in Optimizer(model, OptimConfig()).tensors()} == {"exp_avg", "exp_avg_sq"}
    many = Optimizer(model, OptimConfig(reset_ratio=4.0, average="lawa:2:5"))
    buffers = {"exp_avg", "exp_avg_sq", "travel", "flips", "lawa0", "lawa1"}
    assert {key.partition("/")[2] for key in many.tensors()} == buffers


@pytest.mark.parametrize(
    "quant",
    [
        {"quant.method": "paretoq", "quant.bits": 2},
        *(pytest.param(quant, marks=pytest.mark.slow) for quant in (tiny.QUEST, {"quant.method": "nvfp4"})),
    ],
)
def test_corrections_compose_with_quantizers_and_change_what_is_trained(tmp_path, quant) -> None:
    """A rotation, groups below a scale of the tensor, a learned scale per row: CAGE leaves weights nearer to their levels."""
    errors = []
    for more in ({}, {"optim.cage": 100.0, "optim.cage_from": 0.0}):
        result = train(tiny.config({**quant, **more, "train.steps": 20}), runs=tmp_path)
        model = loading.load_model(RunStore(tmp_path).run(result.run))
        m = next(m for m in model.modules() if isinstance(m, QuantLinear))
        errors.append(float((m.weight.detach() - nearest([m])[0]).norm() / m.weight.detach().norm()))
    assert errors[1] < 0.85 * errors[0]


def test_a_branch_of_a_caged_trunk_is_refused_where_its_pull_had_begun() -> None:
    trunk = tiny.config({**tiny.QUEST, "optim.cage": 10.0, "optim.schedule": "wsd", "train.steps": 40})
    with pytest.raises(UsageError, match=r"has optim\.cage, whose pull begins before step 30"):
        branch(trunk, 30, 4)
    assert branch(trunk, 30, 10).optim.cage == 10.0
    full = tiny.config({"optim.cage": 10.0, "optim.schedule": "wsd", "train.steps": 40})
    assert branch(full, 30, 4).branch.step == 30
